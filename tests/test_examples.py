import runpy
from pathlib import Path

import numpy as np

import gradlab

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    return runpy.run_path(str(EXAMPLES / name))


def test_plain_pytorch_finds_who_wants_the_opposite(tmp_path):
    path = load("plain_pytorch.py")["main"](tmp_path / "run", updates=11)
    run = gradlab.open_run(path)
    assert run.state == "done"
    place = {"network": "actor", "space": "psi", "layer": "all"}
    cosine = run.quantity("cosine_debiased", where=place)
    assert cosine["update"].values.tolist() == [0, 5, 10]
    assert np.array_equal(np.sign(cosine[0]), [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])

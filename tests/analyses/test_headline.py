import numpy as np
import pytest

from analyses.headline import headline
from gradlab.quantity import Quantity
from gradlab.run import open_run
from gradlab.run_writer import RunWriter

LAYERS = ["all", "layer0", "head"]
AXES = ("network", "space", "layer", "agent", "agent_other")
NOT_YET, ONE = {}, {"head": [(0, 1)], "all": [(0, 1)]}


def write(path, updates, method="hypermarl", space=0, coupling=(), verdicts=True, sign=-1.0):
    """A run of three agents; `updates` has for each the pairs in conflict by layer."""
    with RunWriter(path) as writer:
        writer.describe(method=method, environment="e", agents=3, state="done")
        for number, by_layer in enumerate(updates):
            verdict = np.zeros((1, 2, len(LAYERS), 3, 3))
            for layer, pairs in by_layer.items():
                for i, k in pairs:
                    place = (0, space, LAYERS.index(layer))
                    verdict[(*place, i, k)] = verdict[(*place, k, i)] = sign
            coords = {
                "network": ["actor"],
                "space": ["psi", "theta"],
                "layer": LAYERS,
                "agent": [0, 1, 2],
                "agent_other": [0, 1, 2],
            }
            found = {"cosine": Quantity(values=verdict * 0.5, dims=AXES, coords=coords)}
            if verdicts:
                found["verdict"] = Quantity(values=verdict, dims=AXES, coords=coords)
            if coupling:
                matrix = np.full((1, 1, 3, 3), coupling[number])
                names = {"network": ["actor"], "layer": ["all"], **dict(list(coords.items())[3:])}
                found["coupling"] = Quantity(
                    values=matrix, dims=("network", "layer", "agent", "agent_other"), coords=names
                )
            writer.write(10 * number, found)
    return open_run(path)


def test_conflict_is_dated_and_placed_and_coupling_is_followed(tmp_path):
    run = write(tmp_path / "r", [NOT_YET, ONE, ONE], coupling=(1.0, 0.5, 0.18))
    assert headline(run) == (
        "1 of 3 pairs in conflict from update 10 on, mostly in head; "
        "coupling falls from 1.00 to 0.18."
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"updates": [ONE, NOT_YET]}, "None of 3 pairs in conflict now, the last at update 0."),
        ({"updates": [ONE], "sign": 1.0}, "None of 3 pairs in conflict at any time, 1 aligned."),
        ({"updates": [ONE, ONE]}, "1 of 3 pairs in conflict from the start, mostly in head."),
        (
            {"updates": [ONE], "method": "nops", "space": 1},
            "Nothing is shared, so nothing interferes; of what agents want, 1 of 3 pairs in "
            "conflict from the start, mostly in head.",
        ),
        (
            {"updates": [ONE], "verdicts": False},
            "1 of 3 pairs with a negative plug-in cosine at the end, which noise alone can make; "
            "no verdicts recorded.",
        ),
        ({"updates": []}, "No diagnostics recorded."),
    ],
    ids=["before", "aligned", "start", "nops", "plug-in", "nothing"],
)
def test_headline_says_what_was_recorded(tmp_path, settings, said):
    assert headline(write(tmp_path / "r", **settings)) == said

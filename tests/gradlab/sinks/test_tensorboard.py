import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gradlab
from gradlab.cli import run as command

pytest.importorskip("tensorboard")
MARK = "cosine/actor/psi/0-1"


def loss(policy, sample):
    return policy(sample["x"]).square().sum()


def watch(out, updates, **settings):
    torch.manual_seed(0)
    settings = {"sinks": ["tensorboard"], "agents": ["left\tone", "right"], **settings}
    policy = nn.Linear(3, 2)
    with gradlab.Probe(policy, loss, every=1, out=out, **settings) as probe:
        for step in updates:
            x = torch.randn(2, 32, 3)
            probe({"x": x}, copy=torch.arange(32) % 16, scalars={"episode_return": step + 0.5})


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensorboard") / "run"
    watch(path, range(12))
    return path


def test_tensorboard_reads_back_every_number(folder):
    found, run = events(folder / "tensorboard"), gradlab.open_run(folder)
    returns = found.Scalars("return/episode_return")
    assert [(event.step, event.value) for event in returns] == [(u, u + 0.5) for u in range(12)]
    where = {"network": "actor", "space": "psi", "layer": "all"}
    cosine = run.quantity("cosine", where=where)
    read = found.Scalars(MARK)
    assert [event.step for event in read] == cosine["update"].values.tolist()
    np.testing.assert_allclose([event.value for event in read], cosine[:, 0, 1], rtol=1e-6)
    [settings] = found.Tensors("settings")
    assert b'| diagnostics | "full" |' in settings.tensor_proto.string_val[0]


def test_pictures_come_at_the_first_every_tenth_and_the_last_diagnosis(folder):
    images = events(folder / "tensorboard").Images("matrix/cosine/actor/psi")
    assert [image.step for image in images] == [0, 10, 11]
    import io

    picture = np.asarray(Image.open(io.BytesIO(images[0].encoded_image_string)))
    assert picture.shape == (images[0].height, images[0].width, 3)


def test_projector_serves_the_embeddings_with_agents_and_updates(folder):
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
    from werkzeug.test import Client

    runs = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(folder))
    plugin = ProjectorPlugin(base_plugin.TBContext(data_provider=provider, logdir=str(folder)))
    apps = plugin.get_plugin_apps()

    def ask(route, **query):
        answer = Client(apps[route]).get("/", query_string={"run": "tensorboard", **query})
        assert answer.status_code == 200, answer.get_data()
        return answer.get_data()

    [shown] = json.loads(ask("/info"))["embeddings"]
    rows = gradlab.open_run(folder).embeddings["actor"]
    kept = rows.sel(update=[0, 10, 11]).values.reshape(6, -1)
    assert shown["tensorShape"] == list(kept.shape)
    tensor = np.frombuffer(ask("/tensor", name=shown["tensorName"]), np.float32)
    np.testing.assert_allclose(tensor.reshape(kept.shape), kept, rtol=1e-6)
    header, *labels = ask("/metadata", name=shown["tensorName"]).decode().splitlines()
    assert header.split("\t") == ["agent", "name", "update"]
    assert labels[:3] == ["0\tleft one\t0", "1\tright\t0", "0\tleft one\t10"]


def test_a_resumed_run_goes_on_there_and_what_is_made_again_counts_once(folder, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(folder, path)
    from gradlab.run_writer import RunWriter

    with RunWriter(path, resume=True) as writer:  # as after a kill, with a checkpoint before
        writer.discard_after(9)
    watch(path, range(10, 13), resume=True)
    found = events(path / "tensorboard")
    assert [event.step for event in found.Scalars("return/episode_return")] == list(range(13))
    labels = (path / "tensorboard" / "actor" / "metadata.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[2] for row in labels] == ["0"] * 2 + ["10"] * 2 + ["12"] * 2
    tensors = (path / "tensorboard" / "actor" / "tensors.tsv").read_text().splitlines()
    assert len(tensors) == len(labels)


def test_a_finished_run_is_replayed_alike_and_again(folder, tmp_path, capsys):
    for _ in range(2):
        line = ["export", str(folder), "--to", "tensorboard", str(tmp_path / "board")]
        assert command(line) == 0
    assert "Exported" in capsys.readouterr().out
    live, replayed = events(folder / "tensorboard"), events(tmp_path / "board")
    assert live.Tags() == replayed.Tags()
    for tag in live.Tags()["scalars"]:
        one, other = live.Scalars(tag), replayed.Scalars(tag)
        assert [(e.step, e.value) for e in one] == [(e.step, e.value) for e in other]
    for file in ("actor/tensors.tsv", "actor/metadata.tsv", "projector_config.pbtxt"):
        assert (folder / "tensorboard" / file).read_text() == (
            tmp_path / "board" / file
        ).read_text()


def test_a_full_disk_is_told_of_once_and_the_run_is_whole(tmp_path):
    (tmp_path / "run" / "tensorboard" / "actor").mkdir(parents=True)
    (tmp_path / "run" / "tensorboard" / "actor" / "metadata.tsv").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="TensorBoard failed.*No space left on device") as told:
        watch(tmp_path / "run", range(3))
    assert len(told) == 1
    run = gradlab.open_run(tmp_path / "run")
    assert (run.state, run.updates("cosine")) == ("done", [0, 1, 2])

import random

import numpy as np
import pytest
import torch
from torch import nn

import gradlab
from gradlab.checks import UsageError
from gradlab.sinks.known import SINKS
from gradlab.sinks.sink import _same_random_states
from trainers.config import TrainConfig
from trainers.train import train_run

SHORT = {"copies": 8, "steps": 8, "agents": 2, "frames": 192, "every": 1, "threads": 1}


class Kept:
    """A sink as a user would write it, which draws from every source there is."""

    def __init__(self, fails=None):
        self.fails = fails
        self.records, self.about, self.state = [], None, None

    def draw(self, where):
        random.random(), np.random.rand(), torch.rand(1)
        if where == self.fails:
            raise OSError(28, "No space left on device")

    def open(self, about):
        self.about = about
        self.draw("open")

    def write(self, record):
        self.draw("write")
        self.records.append(record)

    def close(self, state):
        self.state = state
        self.draw("close")


def loss(policy, sample):
    return policy(sample["x"]).square().sum()


def loop(out, sinks, updates=3, **settings):
    """Somebody's training, which draws as it goes; returns all that it ends with."""
    torch.manual_seed(0), np.random.seed(0)
    policy = nn.Linear(3, 2)
    with gradlab.Probe(policy, loss, agents=2, every=2, out=out, sinks=sinks, **settings) as probe:
        for step in range(updates):
            x = torch.randn(2, 32, 3) + float(np.random.rand())
            probe({"x": x}, copy=torch.arange(32) % 16, scalars={"episode_return": step})
            with torch.no_grad():
                policy.weight += 0.01 * torch.randn_like(policy.weight)
    return policy.weight.detach().clone(), np.random.rand()


def test_a_sink_gets_all_that_the_run_folder_gets(tmp_path):
    sink = Kept()
    loop(tmp_path / "run", [sink])
    run = gradlab.open_run(tmp_path / "run")
    assert [record.update for record in sink.records] == [0, 1, 2]
    assert (sink.state, sink.about.first, sink.about.folder) == ("done", 0, tmp_path / "run")
    assert sink.about.id == run.info["id"]
    assert sink.about.settings["every"] == 2
    assert set(sink.records[0].quantities) == set(run.quantities)
    cosine = run.quantity("cosine").sel(update=2)
    np.testing.assert_array_equal(sink.records[2].metrics["cosine"], cosine)
    np.testing.assert_array_equal(
        sink.records[2].embeddings["actor"], run.embeddings["actor"].sel(update=2)
    )
    assert sink.records[1].scalars == {"return/episode_return": 1.0}


def test_a_resumed_run_is_the_same_one_to_its_sinks(tmp_path):
    first, second = Kept(), Kept()
    loop(tmp_path / "run", [first], updates=2)
    loop(tmp_path / "run", [second], updates=1, resume=True)
    assert second.about.id == first.about.id
    assert second.about.first == 2
    assert [record.update for record in second.records] == [2]


@pytest.mark.parametrize("fails", ["open", "write", "close"])
def test_a_sink_that_fails_is_told_of_once_and_changes_nothing(fails, tmp_path):
    plain = loop(tmp_path / "plain", [])
    broken, other = Kept(fails), Kept()
    with pytest.warns(UserWarning, match="Kept failed") as told:
        watched = loop(tmp_path / "run", [broken, other])
    said = [str(warning.message) for warning in told]
    assert len(said) == 1
    assert "Kept failed" in said[0]
    assert "OSError: [Errno 28] No space left on device" in said[0]
    assert torch.equal(plain[0], watched[0])
    assert plain[1] == watched[1]
    run = gradlab.open_run(tmp_path / "run")
    assert run.state == "done"
    assert run.updates("episode_return") == [0, 1, 2]
    assert len(other.records) == 3
    assert other.state == "done"


def test_random_states_are_put_back_also_after_an_error():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(1))

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    wanted = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with pytest.raises(OSError, match="full"), _same_random_states():  # noqa: PT012
        draw()
        raise OSError("full")
    assert draw() == wanted


def weights(folder):
    [newest] = sorted((folder / "checkpoints").glob("*.safetensors"))[-1:]
    return newest.name, newest.read_bytes()


def test_a_training_is_bitwise_the_same_with_sinks_even_one_that_fails(tmp_path, monkeypatch):
    made = {"good": Kept(), "bad": Kept("write")}
    for name, sink in made.items():
        monkeypatch.setitem(SINKS._entries, name, lambda _, sink=sink: sink)
    train_run(TrainConfig.model_validate(SHORT), tmp_path / "plain")
    told = []
    log = {"log": ["bad", "good"]}
    train_run(TrainConfig.model_validate(SHORT | log), tmp_path / "run", tell=told.append)
    assert [sentence.partition(",")[0] for sentence in told] == ["Kept failed"]
    name, data = weights(tmp_path / "plain")
    with_sinks = weights(tmp_path / "run")
    assert with_sinks[0] == name
    import safetensors.torch as stored

    plain, logged = stored.load(data), stored.load(with_sinks[1])
    assert plain.keys() == logged.keys()
    assert all(torch.equal(plain[key], logged[key]) for key in plain)
    run = gradlab.open_run(tmp_path / "run")
    assert run.config["log"] == ["bad", "good"]
    assert [record.update for record in made["good"].records] == [0, 1, 2]
    more = TrainConfig.model_validate(SHORT | {"frames": 256})  # to go on without them is no change
    assert train_run(more, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (["tensorbord"], "Unknown sink 'tensorbord'. Did you mean 'tensorboard'?"),
        ([Kept], "must hold names"),
    ],
)
def test_what_is_no_sink_is_said_before_anything_is_written(sinks, message, tmp_path):
    with pytest.raises(UsageError, match=message.partition("(")[0].replace("?", r"\?")):
        loop(tmp_path / "run", sinks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SINKS)
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr("gradlab.extras.installed", lambda _: False)
    with pytest.raises(UsageError, match=rf"pip install 'gradlab\[{name}\]'"):
        train_run(TrainConfig.model_validate(SHORT | {"log": [name]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()

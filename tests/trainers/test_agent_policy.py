import numpy as np
import pytest
import torch
from torch import nn

import gradlab
from gradlab.checks import UsageError
from gradlab.cli import run as command
from gradlab.extras import installed
from trainers.config import TrainConfig
from trainers.evaluation import saved_trainer
from trainers.policy_files import POLICY_FORMATS
from trainers.train import train_run

SHORT = {"agents": 3, "copies": 8, "steps": 4, "frames": 64, "diagnostics": "off"}
GRU = {"memory": "gru", "memory_size": 16}
FORMS = {
    "hypermarl": {"method": "hypermarl", "env": "specialisation"},
    "nops": {"method": "nops", "env": "specialisation"},
    "fups-id, continuous, scaled": {
        "method": "fups-id",
        "env": "vmas/dispersion",
        "normalise": {"observations": True},
    },
    "hypermarl, recurrent": {"method": "hypermarl", "env": "specialisation", "network": GRU},
    "fups-id, recurrent, continuous": {
        "method": "fups-id",
        "env": "vmas/dispersion",
        "network": GRU,
    },
}


@pytest.fixture(scope="module", params=FORMS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "run"
    train_run(TrainConfig.model_validate(SHORT | FORMS[request.param]), folder)
    trainer = saved_trainer(gradlab.open_run(folder), None, [])
    return folder, trainer


def expected(trainer, inputs):
    """What all agents' own networks make of it: the distribution of agent 2, and its memory."""
    observation, *state = inputs
    theta = trainer.actor.all_agents()
    read = trainer.collector.scaled(observation.expand(3, *observation.shape))
    before = state[0].expand(3, *state[0].shape) if state else None
    read, after = trainer.policy.network.read_next(theta, read, before)
    made = trainer.policy.distribution(theta, read)
    return [tensor[2].detach() for tensor in (*made.values(), *([] if after is None else [after]))]


def random_inputs(policy, rows):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(rows, i.shape[-1], generator=random) for i in policy.example()]


def close(made, wanted):
    made = made if isinstance(made, tuple | list) else [made]
    assert len(made) == len(wanted)
    for own, right in zip(made, wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(own), right, rtol=1e-5, atol=1e-6)


def test_loaded_policy_acts_as_the_trained_one(trained):
    folder, trainer = trained
    policy = gradlab.load_policy(folder, agent=2)
    inputs = random_inputs(policy, 5)
    close(policy(*inputs), expected(trainer, inputs))


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated as a whole
@pytest.mark.parametrize("rows", [1, 7])
def test_torchscript_of_a_policy_acts_as_it_does(rows, trained, tmp_path, capsys):
    folder, trainer = trained
    file = tmp_path / "policy.pt"
    line = ["export", str(folder), "--agent", "2", "--to", "torchscript", str(file)]
    assert command(line) == 0
    assert "Exported" in capsys.readouterr().out
    inputs = random_inputs(gradlab.load_policy(folder, agent=2), rows)
    close(torch.jit.load(file)(*inputs), expected(trainer, inputs))


def test_onnx_of_a_policy_acts_as_it_does(trained, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, trainer = trained
    file = tmp_path / "policy.onnx"
    assert command(["export", str(folder), "--agent", "2", "--to", "onnx", str(file)]) == 0
    assert capsys.readouterr().out == f"Exported: {file}\n"
    session = onnxruntime.InferenceSession(file)
    policy = gradlab.load_policy(folder, agent=2)
    names = [given.name for given in session.get_inputs()]
    assert names == ["observation", "state"][: len(policy.example())]
    outputs = [made.name for made in session.get_outputs()]
    acts = ["mean", "std"] if policy.continuous else ["logits"]
    assert outputs == acts + ["next_state"] * (len(names) - 1)
    for rows in (1, 7):
        inputs = random_inputs(policy, rows)
        given = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
        close(session.run(None, given), expected(trainer, inputs))


def test_a_recurrent_policy_remembers_as_in_the_training(tmp_path):
    config = SHORT | FORMS["hypermarl, recurrent"]
    train_run(TrainConfig.model_validate(config), tmp_path / "run")
    trainer = saved_trainer(gradlab.open_run(tmp_path / "run"), None, [])
    policy = gradlab.load_policy(tmp_path / "run", agent=1)
    seen = torch.randn(3, 5, 6, trainer.spec.observation_size)  # [agent, copy, time, obs]
    theta, network = trainer.actor.all_agents(), trainer.policy.network
    segment = {
        "observation": seen,
        "memory": network.begin(3, 5),
        "starts": torch.zeros(3, 5, 6, dtype=torch.bool),
    }
    right = trainer.policy.distribution(theta, network.read(theta, segment))["logits"][1]
    [_, state] = policy.example(5)
    for step in range(6):
        logits, state = policy(seen[1, :, step], state)
        torch.testing.assert_close(logits, right[:, step], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def hypermarl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused") / "run"
    train_run(TrainConfig.model_validate(SHORT | FORMS["hypermarl"]), folder)
    return folder


@pytest.mark.parametrize("agent", [3, -1])
def test_an_agent_that_does_not_exist_is_refused(agent, hypermarl):
    with pytest.raises(UsageError, match=f"must be from 0 to 2. Got agent={agent}"):
        gradlab.load_policy(hypermarl, agent=agent)


def test_a_run_without_a_policy_is_refused(hypermarl, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        gradlab.load_policy(tmp_path / "no", agent=0)
    with pytest.raises(UsageError, match="checkpoint of update 7"):
        gradlab.load_policy(hypermarl, agent=0, update=7)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_bytes((hypermarl / "run.json").read_bytes())
    with pytest.raises(UsageError, match="has no checkpoint that is whole"):
        gradlab.load_policy(tmp_path / "bare", agent=0)


def test_the_policy_of_another_programs_training_is_refused(tmp_path):
    def loss(policy, sample):
        return policy(sample["x"]).sum()

    with gradlab.Probe(nn.Linear(3, 2), loss, agents=2, out=tmp_path / "run") as probe:
        probe({"x": torch.from_numpy(np.ones((2, 4, 3), np.float32))})
    with pytest.raises(UsageError, match="a training of gradlab's own"):
        gradlab.load_policy(tmp_path / "run", agent=0)


def test_a_policy_without_fixed_weights_is_refused(tmp_path):
    config = SHORT | {"method": "hypermarl-coupled", "env": "specialisation"}
    train_run(TrainConfig.model_validate(config), tmp_path / "run")
    with pytest.raises(UsageError, match=r"fixed weights.*hypermarl-coupled"):
        gradlab.load_policy(tmp_path / "run", agent=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx", "p"], "Say whose: add --agent 0"),
        (["--to", "csv", "--agent", "0", "p"], "choose from onnx, torchscript"),
        (["--to", "onx", "--agent", "0", "p"], "Did you mean 'onnx'"),
        (["--to", "onnx", "--agent", "5", "p"], "must be from 0 to 2"),
        (["--to", "torchscript", "--agent", "0", "no/such/p"], "can't be written"),
    ],
)
def test_a_policy_that_cannot_be_exported_is_one_line(
    options, message, hypermarl, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert command(["export", str(hypermarl), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_onnx_is_one_line(hypermarl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gradlab.extras.installed", lambda name: installed(name) and name != "onnx")
    line = ["export", str(hypermarl), "--agent", "0", "--to", "onnx", str(tmp_path / "p")]
    assert command(line) == 2
    assert "pip install 'gradlab[onnx]'" in capsys.readouterr().err
    assert set(POLICY_FORMATS) == {"onnx", "torchscript"}

"""SePS: who ends in which group, and the two phases of a training."""

import numpy as np
import pytest
import torch
from resuming import same_end
from selection import slow_but
from two_roles import ROLES, TwoRoles

from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.agent_encoder import encode_agents
from trainers.agent_policy import load_policy
from trainers.config import SePSConfig, TrainConfig
from trainers.grouping import cluster, said
from trainers.loop import Trainer
from trainers.train import train_run

COPIES, STEPS = 32, 16
UPDATE = COPIES * STEPS
SETTINGS = {
    "method": "seps",
    "algorithm": "a2c",
    "env": "specialisation",  # replaced
    "copies": COPIES,
    "steps": STEPS,
    "frames": 6 * UPDATE,
    "network": {"hidden": [8]},
    "diagnostics": "off",
    "seps": {"pretraining_frames": 2 * UPDATE, "epochs": 2},
}


@pytest.fixture(autouse=True)
def _game(monkeypatch):
    """Put the game in place of what a trainer makes."""

    def make(_name, *, copies, seed, args, **_):
        return TwoRoles(copies, seed=seed, **args)

    monkeypatch.setattr("trainers.loop.make_env", make)


def trainer_of(**settings):
    return Trainer(TrainConfig.model_validate(SETTINGS | settings))


def grouped(trainer):
    """Train until agents are in groups; what was recorded then."""
    while True:
        _, found = trainer._next_update()
        if "group" in found:
            return found


@pytest.mark.parametrize(("algorithm", "differ"), [("a2c", "reward"), ("ippo", "transition")])
def test_agents_are_grouped_by_their_true_roles(algorithm, differ):
    trainer = trainer_of(
        algorithm=algorithm,
        env_args={"differ": differ},
        seps={"pretraining_frames": UPDATE, "groups": 2},
    )
    found = grouped(trainer)
    assert trainer.updates_done == 1
    assert found["group"].values.tolist() == list(ROLES)
    assert trainer.learner.findings == ["agents are grouped: 0 2 3 6 | 1 4 5 7"]
    assert "davies_bouldin" not in found
    for generator in (trainer.actor, trainer.critic):
        assert generator.group.tolist() == list(ROLES)


@pytest.mark.slow
def test_the_hidden_groups_of_blind_spread_are_found_and_counted(monkeypatch):
    monkeypatch.undo()
    settings = {"env": "bps/1", "frames": 20 * UPDATE, "seps": {"pretraining_frames": 10 * UPDATE}}
    found = grouped(trainer_of(**settings))
    assert found["group"].values.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    index = found["davies_bouldin"]
    assert index.coords["groups"] == [*range(2, 11)]
    assert index.values.argmin() == 1


def test_groups_start_afresh_and_train_apart():
    trainer = trainer_of(seps={"pretraining_frames": UPDATE, "epochs": 1, "groups": 3})
    first = trainer.actor.theta["layer0/weight"].detach().clone()
    grouped(trainer)
    weight = trainer.actor.theta["layer0/weight"]
    began = weight.detach().clone()
    assert all(torch.dist(began[k], first[j]) > 0.1 for k in range(3) for j in range(3))
    assert not trainer.learner.optimiser.state
    trainer.actor.group.copy_(torch.tensor([0, 2, 0, 0, 2, 2, 0, 2]))  # nobody is in group 1
    trainer._next_update()
    assert torch.equal(weight[1], began[1])
    assert not torch.equal(weight[0], began[0])
    assert not torch.equal(weight[2], began[2])
    theta = trainer.actor.all_agents()["layer0.weight"]
    assert torch.equal(theta, weight[[0, 2, 0, 0, 2, 2, 0, 2]])


def test_a_critic_alone_can_be_grouped():
    trainer = trainer_of(method="fups", critic_method="seps")
    grouped(trainer)
    assert len(trainer.learner.optimiser.state) == len([*trainer.actor.parameters()])
    trainer._next_update()


@pytest.mark.parametrize("memory", ["none", pytest.param("gru", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stopped", slow_but([1, 2, 3], 1))
def test_stopped_and_resumed_it_ends_as_the_uninterrupted_one(tmp_path, stopped, memory):
    config = TrainConfig.model_validate(
        SETTINGS
        | {"copies": 8, "steps": 4, "frames": 32 * 5, "every": 3, "effects_every": 3}
        | {"network": {"hidden": [4], "memory": memory, "memory_size": 3}}
        | {"diagnostics": "full", "seps": {"pretraining_frames": 64, "epochs": 2, "groups": 3}}
    )
    told, done = [], []
    assert train_run(config, tmp_path / "whole", tell=told.append)
    again = {"progress": lambda frames, _: done.append(frames // 32)}
    assert not train_run(config, tmp_path / "parts", **again, stop=lambda: done[-1] == stopped)
    assert train_run(config, tmp_path / "parts", resume=True)
    same_end(tmp_path / "whole", tmp_path / "parts")
    run = open_run(tmp_path / "parts")
    assert run.method == run.method_of("critic") == "seps"
    assert run.quantity("residual").max() < 1e-4
    group = run.quantity("group")
    assert group["update"].values.tolist() == [1]
    of = group.values[0].astype(int).tolist()
    assert told == [f"update 1: agents are grouped: {said(of)}"]
    coupling = run.quantity("coupling").sel(network="actor", layer="all")
    assert coupling["update"].values.tolist() == [3]
    np.testing.assert_array_equal(coupling.values[0], np.equal.outer(of, of))
    policies = [load_policy(run, agent=agent) for agent in range(len(ROLES))]
    heads = [dict(policy.named_parameters())["layers.2.weight"] for policy in policies]
    for i, one in enumerate(heads):
        for k, other in enumerate(heads):
            assert torch.equal(one, other) == (of[i] == of[k])


def experience(frames=60, seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(frames, 3, *shape, generator=random)

    return {
        "observation": draw(2),
        "action": draw(1),
        "following": draw(2),
        "reward": draw(),
        "left": draw() < 0,
        "active": draw() < 1,
    }


def test_what_nobody_did_is_not_learned_from():
    config = SePSConfig(epochs=1)
    held, altered = experience(), experience()
    for name in ("observation", "following", "reward"):
        altered[name][~altered["active"]] = 1e6
    rows, loss = encode_agents(held, config, torch.Generator().manual_seed(0))
    again, same = encode_agents(altered, config, torch.Generator().manual_seed(0))
    assert torch.equal(rows, again)
    assert loss == same


def test_where_nothing_follows_only_the_reward_is_to_be_reconstructed():
    config = SePSConfig(epochs=1, batch_size=1000)  # one step: the loss is that before it
    held = experience()
    held["active"][:] = True
    losses = []
    for left in (False, True):
        held["left"][:] = left
        losses.append(encode_agents(held, config, torch.Generator().manual_seed(0))[1])
    assert losses[0] == pytest.approx(3, rel=0.1)  # of each component about its variance, 1
    assert losses[1] == pytest.approx(1, rel=0.1)


def davies_bouldin(rows, labels):
    """Mean over groups of the worst (s_i + s_j) / d_ij, in loops."""
    groups = sorted(set(labels))
    members = {
        g: [row for row, label in zip(rows, labels, strict=True) if label == g] for g in groups
    }
    centres = {g: np.mean(members[g], axis=0) for g in groups}
    spread = {g: np.mean([np.linalg.norm(r - centres[g]) for r in members[g]]) for g in groups}
    worst = [
        max(
            (spread[i] + spread[j]) / np.linalg.norm(centres[i] - centres[j])
            for j in groups
            if j != i
        )
        for i in groups
    ]
    return np.mean(worst)


def test_the_number_of_groups_has_the_least_index():
    random = torch.Generator().manual_seed(0)
    true = [2, 0, 1, 1, 0, 2, 2, 0, 0, 1, 2, 1]
    rows = 5 * torch.eye(3)[true] + 0.3 * torch.randn(12, 3, generator=random)
    found = cluster(rows, None, 6, 0)
    assert found.group.tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 1, 2, 0, 2]
    assert list(found.index) == [2, 3, 4, 5, 6]
    assert min(found.index, key=found.index.get) == 3
    assert found.index[3] == pytest.approx(davies_bouldin(rows.double().numpy(), true), rel=1e-6)
    for number in (1, 2, 5, 12):
        group = cluster(rows, number, 6, 0).group.tolist()
        assert len(set(group)) == number
        assert list(dict.fromkeys(group)) == list(range(number))


def test_agents_that_are_all_the_same_are_one_group():
    found = cluster(torch.ones(4, 3), None, 3, 0)
    assert found.group.tolist() == [0, 0, 0, 0]
    assert np.isnan(list(found.index.values())).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seps.groups", "5"], "`seps.groups` must be at most 4, the number of agents. Got s"),
        (["--seps.groups", "0"], "`seps.groups`: Input should be greater than or equal to 1"),
        (["--agents", "2"], "`seps.groups` must be given with 2 agents: a number of groups is ch"),
        (
            ["--frames", "20480", "--seps.pretraining-frames", "18433"],
            "`seps.pretraining_frames` must leave an update to train the groups in: be at most "
            "18432 with 20480 frames (--frames), 2048 in each update. Got",
        ),
        (["--algorithm", "matd3"], "`method` must not be seps with --algorithm matd3"),
    ],
)
def test_bad_input_is_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--method", "seps", *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed

"""Agents that leave their episode early: nothing is learned or measured of them after that."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from leaving_game import AGENTS, LeavingGame
from reference import per_sample_gradients
from selection import slow_but
from torch.func import functional_call

from gradlab.decomposition import decompose
from gradlab.metrics.interference import interference
from gradlab.metrics.variance import variance
from gradlab.run import open_run
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.loop import Trainer
from trainers.ppo import normalise
from trainers.samples import Weights
from trainers.train import train_run

COPIES, STEPS = 9, 20
SETTINGS = {
    "env": "specialisation",  # replaced
    "agents": AGENTS,
    "copies": COPIES,
    "steps": STEPS,
    "frames": COPIES * STEPS * 3,
    "network": {"hidden": [6, 5]},
    "hypernetwork": {"hidden": [7]},
    "every": 2,
    "effects_every": 2,
    "evaluation": {"every": 1, "episodes": 5},
}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def use(monkeypatch):
    """Put the game in place of what a trainer makes."""

    def use(**settings):
        def make(_name, *, copies, seed, **_):
            return LeavingGame(copies, seed=seed, **settings)

        monkeypatch.setattr("trainers.loop.make_env", make)

    return use


def trainer_of(**settings):
    return Trainer(TrainConfig.model_validate(SETTINGS | settings))


def watched(trainer):
    steps = []
    plain = trainer.collector.env.step

    def step(action):
        steps.append(plain(action))
        return steps[-1]

    trainer.collector.env.step = step
    return steps


def plain_active(steps):
    """Who acted at each step, [agent, time, copy]."""
    now = torch.ones(AGENTS, COPIES, dtype=torch.bool)
    found = []
    for step in steps:
        found.append(now)
        now = step.active | step.terminated | step.truncated
    return torch.stack(found, 1)


@pytest.mark.parametrize("reward", ["agent", "team"])
@pytest.mark.parametrize("algorithm", ["ippo", "mappo"])
def test_advantages_end_where_their_agent_leaves(use, algorithm, reward):
    use(garbage=torch.nan)
    trainer = trainer_of(algorithm=algorithm, reward=reward)
    steps = watched(trainer)
    samples = trainer._collect().samples
    active = plain_active(steps)
    assert torch.equal(samples["active"].unflatten(1, (STEPS, COPIES)), active)
    assert 0.3 < active.float().mean() < 0.8

    def value(observation, agent, copy):
        read = observation[:, copy]
        read = read.flatten() if algorithm == "mappo" else read[agent]
        theta = {n: t[agent if len(t) > 1 else 0] for n, t in trainer.critic.all_agents().items()}
        return trainer.critic.mlp.forward(theta, read).item()

    seen = samples["observation"].unflatten(1, (STEPS, COPIES))
    for agent, copy in np.ndindex(AGENTS, COPIES):
        following = 0.0
        for t in reversed(range(STEPS)):
            step = steps[t]
            acted = active[:, t, copy]
            if not acted[agent]:
                assert (seen[agent, t, copy] == 0).all()
                following = 0.0
                continue
            paid = step.reward[agent, copy]
            if reward == "team":
                paid = step.reward[acted, copy].sum() / AGENTS
            own = value(seen[:, t], agent, copy)
            goes_on = step.active[agent, copy].item()
            after = 0.0
            if goes_on:  # whoever has left is seen as zeros
                final = torch.where(step.active[..., None], step.final_observation, 0.0)
                after = value(final, agent, copy)
            delta = paid.item() + 0.99 * after - own
            ended = step.terminated[copy] or step.truncated[copy] or not goes_on
            following = delta + (0.0 if ended else 0.99 * 0.95 * following)
            found = samples["advantage"][agent, t * COPIES + copy].item()
            assert found == pytest.approx(following, rel=1e-4, abs=1e-5)


def test_returns_are_of_what_agents_earned_before_they_left(use):
    use(garbage=1e6)
    trainer = trainer_of()
    steps = watched(trainer)
    rollout = trainer._collect()
    active = plain_active(steps)
    returns, lengths = [], []
    total, length = [0.0] * COPIES, [0] * COPIES
    for t, step in enumerate(steps):
        for copy in range(COPIES):
            total[copy] += step.reward[active[:, t, copy], copy].sum().item() / AGENTS
            length[copy] += 1
            if step.terminated[copy] or step.truncated[copy]:
                returns.append(total[copy])
                lengths.append(length[copy])
                total[copy], length[copy] = 0.0, 0
    np.testing.assert_allclose(rollout.episode_returns, returns, rtol=1e-5)
    assert rollout.episode_lengths == lengths


OPTIONS = {
    "plain": {},
    "mappo": {"algorithm": "mappo", "reward": "team", "method": "fups-id"},
    "scales": {"normalise": {"observations": True, "rewards": True}, "method": "nops"},
    "coupled": {"method": "hypermarl-coupled", "effects_every": 1000},
    "matd3": {
        "algorithm": "matd3",
        "method": "fups-id",
        "matd3": {"warmup_frames": 1, "batch_size": 16, "replay_frames": COPIES * 30},
        "diagnosed_samples": COPIES * STEPS,
        "effects_every": 1000,
    },
}


@pytest.mark.parametrize("options", slow_but(OPTIONS, "coupled", "matd3"))
def test_what_is_said_of_agents_that_have_left_changes_nothing(use, tmp_path, options):
    found = []
    for garbage in (0.0, -1e30) if options == "plain" else (0.0, torch.nan):
        use(garbage=garbage)
        folder = tmp_path / str(garbage)
        config = TrainConfig.model_validate(SETTINGS | OPTIONS[options])
        assert train_run(config, folder, tell=pytest.fail)
        checkpoint, _ = newest_checkpoint(folder)
        found.append((checkpoint.tensors, open_run(folder)))
    tensors, run = found[0]
    for others, other in found[1:]:
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
        for name in set(run.quantities) - {"seconds"}:
            np.testing.assert_array_equal(run.quantity(name).values, other.quantity(name).values)
    assert (run.quantity("samples") < STEPS * COPIES).all()
    assert (run.quantity("residual") < 1e-6).all()


@pytest.mark.parametrize("method", ["hypermarl", "fups-id", "nops"])
def test_what_stands_in_place_of_a_sample_changes_no_step(use, method):
    use()
    found = []
    for garbage in (False, True):
        trainer = trainer_of(method=method)
        samples = trainer._collect().samples
        gone = ~samples["active"]
        if garbage:
            random = torch.Generator().manual_seed(0)
            for name, tensor in samples.items():
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=random)
                    samples[name] = torch.where(
                        gone.view(*gone.shape, *[1] * (tensor.dim() - 2)), 3 * noise, tensor
                    )
            samples["action"] = torch.where(gone, 2 - samples["action"], samples["action"])
        numbers = trainer._update(samples)
        psi = [*trainer.actor.parameters(), *trainer.critic.parameters()]
        found.append((psi, {name: quantity.values for name, quantity in numbers.items()}))
    assert found[0][1] == found[1][1]
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)


def test_a_resumed_training_knows_who_has_left(use, tmp_path):
    use(garbage=torch.nan)
    whole = tmp_path / "whole"
    train_run(TrainConfig.model_validate(SETTINGS), whole)
    parts, done = tmp_path / "parts", []
    for stop in (2, None):
        train_run(
            TrainConfig.model_validate(SETTINGS),
            parts,
            resume=True,
            progress=lambda frames, _: done.append(frames // (COPIES * STEPS)),
            stop=lambda stop=stop: done[-1] == stop,
        )
    one, other = (newest_checkpoint(folder)[0].tensors for folder in (whole, parts))
    assert not one["collector.active"].all()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def rollout_of(method, **settings):
    """A trainer in float64, and a rollout of it."""
    trainer = trainer_of(method=method, **settings)
    samples = trainer._collect().samples
    trainer.actor.double()
    trainer.critic.double()
    return trainer, {n: t.double() if t.is_floating_point() else t for n, t in samples.items()}


def oracle_gradients(generator, loss, batch):
    def forward(psi, agent):
        theta = functional_call(generator, psi, (torch.tensor([agent]),))
        return {name: tensor[0] for name, tensor in theta.items()}

    psi = {name: p.detach() for name, p in generator.named_parameters()}
    samples = batch["advantage"].shape[1]
    return per_sample_gradients(forward, loss, psi, batch, AGENTS, samples)


@pytest.mark.parametrize("method", ["hypermarl", "fups-id", "nops"])
def test_parts_add_up_to_the_gradient_that_is_trained_on(use, method):
    use(garbage=torch.nan)
    trainer, samples = rollout_of(method)
    active = samples["active"]
    batch = samples | {"advantage": normalise(samples["advantage"], active)}
    del batch["active"]
    each = oracle_gradients(trainer.actor, trainer.learner.policy_loss, batch)
    means = torch.stack([each[i, active[i]].mean(0) for i in range(AGENTS)])
    d = decompose(trainer.actor, trainer.learner.policy_loss, batch, mask=active)
    torch.testing.assert_close(d.g, means, **CLOSE)
    assert d.residual < 1e-10
    losses = trainer.learner.policy_loss(trainer.actor.all_agents(), batch)
    Weights.of(active)(losses).mean().backward()
    trained = torch.cat([p.grad.flatten() for p in trainer.actor.parameters()])
    torch.testing.assert_close(AGENTS * trained, d.total, **CLOSE)


@pytest.mark.parametrize("method", ["hypermarl", "fups-id"])
def test_estimates_from_unequal_clusters_are_those_of_loops(use, method):
    use()
    trainer, samples = rollout_of(method)
    active = samples["active"]
    batch = {n: t for n, t in samples.items() if n != "active"}
    copy = torch.arange(COPIES).repeat(STEPS)
    d = decompose(trainer.actor, trainer.learner.policy_loss, batch, mask=active, copy=copy)
    counts = torch.stack([active[:, copy == e].sum(1) for e in range(COPIES)], 1)
    assert torch.equal(d.moments.copy_count, counts)
    assert len(counts.unique()) > 4
    each = oracle_gradients(trainer.actor, trainer.learner.policy_loss, batch)
    each = torch.where(active[..., None], each, 0.0)
    found = interference(d).inner_product_debiased.sel(space="psi", layer="all")
    for i, k in np.ndindex(AGENTS, AGENTS):
        total = pairs = 0.0
        for e, f in np.ndindex(COPIES, COPIES):
            if e != f:
                total += float(each[i, copy == e].sum(0) @ each[k, copy == f].sum(0))
                pairs += int(counts[i, e] * counts[k, f])
        assert float(found[i, k]) == pytest.approx(total / pairs, rel=1e-9)


def test_an_agent_without_samples_is_nan_and_named(use):
    use()
    trainer = trainer_of(diagnosed_samples=COPIES)
    rollout = trainer._collect()
    samples = rollout.samples
    samples["active"] = samples["active"].clone()
    samples["active"][1] = False
    found = trainer.diagnosis.of(0, rollout)
    assert any(f.startswith("actor, agent 1: it acted in none") for f in trainer.diagnosis.findings)
    for name in ("cosine", "norm", "cosine_debiased", "variance_agent"):
        quantity = found[name]
        values = np.moveaxis(quantity.values, quantity.dims.index("agent"), 0)
        assert np.isnan(values[1]).all(), name
    assert np.isfinite(found["norm"].values[..., 0]).any()
    before = [p.detach().clone() for p in trainer.actor.parameters()]
    trainer._update(samples)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.actor.parameters(), strict=True)]
    assert all(moved)


def test_moments_of_garbage_are_nan_for_nobody_else(use):
    use(garbage=torch.inf)
    trainer, samples = rollout_of("fups-id")
    active = samples.pop("active")
    clean = decompose(
        trainer.actor, trainer.learner.policy_loss, samples, mask=active, coordinates=True
    )
    spoilt = {
        n: torch.where(active.view(*active.shape, *[1] * (t.dim() - 2)), t, torch.nan)
        if t.is_floating_point()
        else t
        for n, t in samples.items()
    }
    d = decompose(trainer.actor, trainer.learner.policy_loss, spoilt, mask=active, coordinates=True)
    assert torch.equal(d.g, clean.g)
    assert d.residual < 1e-10
    for one, other in ((variance(d), variance(clean)), (interference(d), interference(clean))):
        assert one.equals(other)


def minibatch_means(weights, values, cuts):
    order = torch.arange(values.shape[1])
    parts = [order[a:b] for a, b in pairwise(cuts)]
    return [weights.part(p)(values[:, p]).mean() * len(p) for p in parts]


def test_minibatches_average_to_each_agents_own_mean():
    random = torch.Generator().manual_seed(0)
    values = torch.randn(3, 20, generator=random, dtype=torch.float64)
    exist = torch.rand(3, 20, generator=random) < 0.5
    exist[2] = False
    values[~exist] = torch.nan
    found = sum(minibatch_means(Weights.of(exist), values, [0, 7, 14, 20])) / 20
    expected = sum(values[i, exist[i]].mean() for i in range(2)) / 3
    torch.testing.assert_close(found, expected, **CLOSE)


def test_nobody_acting_has_no_advantage():
    advantage = torch.full((2, 3), torch.nan)
    active = torch.zeros(2, 3, dtype=torch.bool)
    assert (normalise(advantage, active) == 0).all()
    active[0, 1], advantage[0, 1] = True, 5.0
    assert (normalise(advantage, active) == 0).all()
    active[1, 1], advantage[1, 1] = True, 7.0
    found = normalise(advantage, active)
    torch.testing.assert_close(found[:, 1], torch.tensor([-(0.5**0.5), 0.5**0.5]))

"""Agents with fewer observations or actions than others, and actions that come and go."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal
from torch.func import vmap
from turns_game import use_turns

from gradlab import diversity
from gradlab.checks import UsageError
from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.vector_env import Box
from trainers.evaluation import evaluate
from trainers.loop import Trainer
from trainers.train import train_run

SMALL = {
    "pad": True,
    "copies": 8,
    "steps": 16,
    "frames": 8 * 16 * 2,
    "every": 1,
    "effects_every": 1,
    "network": {"hidden": [16]},
    "hypernetwork": {"hidden": [8]},
}
DISCRETE = {"continuous_actions": False}
CASES = {
    "observations": {"env": "vmas/simple_tag"},
    "components": {"env": "vmas/diff_drive"},
    "actions": {"env": "vmas/diff_drive", "env_args": DISCRETE},
    "both": {"env": "vmas/simple_speaker_listener"},
    "both, numbered": {"env": "vmas/simple_speaker_listener", "env_args": DISCRETE},
}
SIZES = {  # of observations and actions
    "observations": ([16, 16, 16, 14], [2, 2, 2, 2]),
    "components": ([4, 4], [2, 3]),
    "actions": ([4, 4], [9, 27]),
    "both": ([3, 11], [5, 2]),
    "both, numbered": ([3, 11], [27, 9]),
}


def trainer(case, **settings):
    return Trainer(TrainConfig.model_validate(SMALL | CASES[case] | settings))


def in_float64(made):
    """A trainer's policy, parameters and samples as they are in the middle of a training."""
    made._next_update()
    samples = made._collect().samples
    samples = {n: t.double() if t.is_floating_point() else t for n, t in samples.items()}
    actor = made.actor.double()
    theta = {n: t.detach() for n, t in actor.policy_for(samples["observation"]).items()}
    return theta, samples


def test_what_is_not_equal_is_refused_unless_padding_is_asked_for(capsys):
    assert main(["train", "--env", "vmas/simple_tag"]) == 2
    found = capsys.readouterr()
    assert not found.out
    assert len(found.err.splitlines()) == 1
    assert "every agent must have the same observation and action size" in found.err
    assert "Got observation sizes adversary_0 16, " in found.err
    assert "agent_0 14. Add --pad true" in found.err


@pytest.mark.parametrize("method", ["hypermarl", "nops"])
@pytest.mark.parametrize("case", CASES)
def test_padded_training_runs_says_so_once_and_is_diagnosed(tmp_path, case, method):
    told = []
    config = TrainConfig.model_validate(SMALL | CASES[case] | {"method": method})
    assert train_run(config, tmp_path / "r", tell=told.append)
    assert len(told) == 1
    assert told[0].startswith(f"{config.env} is padded: ")
    run = open_run(tmp_path / "r")
    assert run.info["padding"] in told[0]
    assert float(run.quantity("residual").max()) < 1e-4
    assert run.quantity("snd").notnull().all()
    assert run.quantity("approximate_kl").notnull().all()


def test_equal_spaces_are_not_touched_by_padding():
    made = Trainer(TrainConfig.model_validate(SMALL | {"env": "vmas/navigation", "agents": 2}))
    assert made.spec.padding == ""
    assert made.spec.action_mask is None
    assert "action_mask" not in made._collect().samples


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_the_agents_own_and_what_is_beyond_is_zero(case):
    made = trainer(case)
    observed, acted = SIZES[case]
    observation = made._collect().samples["observation"]
    assert observation.shape[-1] == made.spec.observation_size == max(observed)
    for agent, size in enumerate(observed):
        assert not observation[agent, :, size:].any()
        assert observation[agent, :, size - 1].any()
    if len(set(acted)) > 1:
        assert made.spec.action_mask is not None
        assert made.spec.action_mask.sum(-1).tolist() == acted


@pytest.mark.parametrize("case", [case for case in CASES if case != "observations"])
def test_log_probability_and_entropy_are_those_of_the_own_distribution(case):
    made = trainer(case)
    theta, samples = in_float64(made)
    policy, mask = made.policy, samples["action_mask"]
    output = policy.network.forward(theta, samples["observation"])
    log_prob, entropy = policy.evaluate(theta, samples["observation"], samples["action"], mask)
    for agent, size in enumerate(SIZES[case][1]):
        action = samples["action"][agent]
        if isinstance(made.spec.action_space, Box):
            std = theta["log_std"][0].exp()[:size].expand(len(action), size)
            own = Independent(Normal(output[agent, :, :size], std), 1)
            action = action[:, :size]
        else:
            own = Categorical(logits=output[agent, :, :size])
            assert int(action.max()) < size
        torch.testing.assert_close(log_prob[agent], own.log_prob(action), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(entropy[agent], own.entropy(), rtol=1e-10, atol=1e-10)
        # what the policy drew with was the same, in float32
        torch.testing.assert_close(
            samples["log_prob"][agent], log_prob[agent], rtol=1e-4, atol=1e-4
        )
        # and so it is for one sample at a time, as the diagnostics' general engine asks
        alone = {n: t[agent if len(t) > 1 else 0] for n, t in theta.items()}
        one_by_one = vmap(lambda o, a, m, t=alone: policy.evaluate(t, o, a, m))
        each = one_by_one(samples["observation"][agent], samples["action"][agent], mask[agent])
        torch.testing.assert_close(each, (log_prob[agent], entropy[agent]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["components", "both"])
def test_padded_components_change_nothing(case):
    made = trainer(case, method="nops")
    other = trainer(case, method="nops")
    samples = made._collect().samples
    altered = dict(samples)
    altered["action"] = torch.where(samples["action_mask"], samples["action"], 7.5)
    assert not torch.equal(altered["action"], samples["action"])
    made._update(samples)
    other._collect()
    other._update(altered)
    for mine, theirs in zip(made.actor.parameters(), other.actor.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    (head,) = (p for n, p in made.actor.named_parameters() if "head" in n and "weight" in n)
    assert head.grad is not None
    for agent, size in enumerate(SIZES[case][1]):
        assert not head.grad[agent, size:].any()
        assert head.grad[agent, :size].any()

    action = made.policy.to_env(samples["action"][:, : made.config.copies])
    assert made.spec.action_mask is not None
    one, two = (
        make_env(made.config.env, copies=made.config.copies, seed=3, args={}) for _ in range(2)
    )
    one.reset(), two.reset()
    mask = made.spec.action_mask[:, None]
    for _ in range(3):
        step, same = one.step(action), two.step(torch.where(mask, action, -0.5))
        assert torch.equal(step.observation, same.observation)
        assert torch.equal(step.reward, same.reward)


@pytest.mark.parametrize("case", ["actions", "both", "both, numbered"])
def test_diversity_is_that_of_the_masked_distributions(case):
    made = trainer(case)
    theta, samples = in_float64(made)
    shared = samples["observation"][1, :20].expand(made.spec.agents, -1, -1)
    output = made.policy.network.forward(theta, shared)
    own = []  # the two agents' distributions, with nothing where they have no action
    for agent, size in enumerate(SIZES[case][1]):
        if isinstance(made.spec.action_space, Box):
            box = make_env(made.config.env, copies=1).spec.action_space
            assert isinstance(box, Box)
            low, high = box.low.expand(2, -1)[agent], box.high.expand(2, -1)[agent]
            mean, std = torch.zeros(2, 20, box.size).double()
            for k in range(size):
                half = (high[k] - low[k]) / 2
                mean[:, k] = (low[k] + high[k]) / 2 + half * output[agent, :, k]
                std[:, k] = half * theta["log_std"][0, k].exp()
            own.append(torch.stack([mean, std]))
        else:
            p = torch.zeros(20, output.shape[-1]).double()
            p[:, :size] = output[agent, :, :size].softmax(-1)
            own.append(p)
    one, other = own
    if isinstance(made.spec.action_space, Box):
        distance = (one - other).square().sum((0, -1)).sqrt().mean()
    else:
        middle = (one + other) / 2
        divergence = sum(torch.xlogy(p, p / middle).nansum(-1) for p in own) / 2
        distance = (divergence / math.log(2)).sqrt().mean()
    found = diversity(**made.policy.distribution(theta, shared))
    assert float(found.snd) == pytest.approx(float(distance), rel=1e-10)


def test_agents_with_other_bounds_keep_to_their_own():
    made = Trainer(TrainConfig.model_validate(SMALL | {"env": "vmas/kinematic_bicycle"}))
    space = made.spec.action_space
    assert isinstance(space, Box)
    assert space.high[:, :2].tolist() == [[1.0, pytest.approx(math.pi / 6)], [1.0, 1.0]]
    far = made.policy.to_env(torch.full((2, 8, 3), 100.0))
    assert torch.equal(far[:, 0, :2], space.high[:, :2])
    assert torch.equal(made.policy.to_env(torch.zeros(2, 8, 3)), torch.zeros(2, 8, 3))
    made._next_update()


def test_padded_observations_are_not_normalised_together():
    with pytest.raises(UsageError, match=r"`normalise.observations` must be false where obs"):
        trainer("both", normalise={"observations": True})
    trainer("components", normalise={"observations": True})._next_update()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", ["actions", "components"])
def test_evaluation_acts_within_the_agents_own_spaces(case, deterministic):
    made = trainer(case)
    played = evaluate(made, episodes=2, deterministic=deterministic).episodes
    assert played.lengths.tolist() == [100, 100]
    observation, mask = made.collector.observation, made.collector.env.action_mask()
    assert mask is not None
    theta = made.actor.policy_for(observation)
    action, log_prob = made.policy.mode(theta, observation, mask)
    if case == "actions":
        assert mask.gather(-1, action[..., None]).all()
    again, _ = made.policy.evaluate(theta, observation, action, mask)
    torch.testing.assert_close(log_prob, again)


def test_actions_that_are_not_available_at_a_step_are_not_taken(tmp_path, monkeypatch):
    use_turns(monkeypatch)
    settings = SMALL | {"env": "specialisation-temporal", "agents": 4, "method": "fups-id"}
    config = TrainConfig.model_validate(settings)
    assert train_run(config, tmp_path / "r")
    assert float(open_run(tmp_path / "r").quantity("residual").max()) < 1e-4
    made = Trainer(config)
    theta, samples = in_float64(made)
    mask, action = samples["action_mask"], samples["action"]
    assert mask.float().mean() == 0.5
    assert mask.gather(-1, action[..., None]).all()
    log_prob, entropy = made.policy.evaluate(theta, samples["observation"], action, mask)
    output = made.policy.network.forward(theta, samples["observation"])
    own = Categorical(logits=output.masked_fill(~mask, -torch.inf))
    torch.testing.assert_close(log_prob, own.log_prob(action), rtol=1e-10, atol=1e-10)
    of_two = Categorical(logits=output[mask].view(*mask.shape[:2], 2))
    torch.testing.assert_close(entropy, of_two.entropy(), rtol=1e-10, atol=1e-10)

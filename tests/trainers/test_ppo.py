import math

import pytest
import torch

from gradlab.engine.accumulate import gradient_moments
from trainers.config import PPOConfig
from trainers.envs.vector_env import Box, Discrete
from trainers.networks import MLP
from trainers.policies import make_policy
from trainers.ppo import policy_gradient_loss, policy_loss, value_loss

SPACES = {"discrete": Discrete(n=3), "continuous": Box(low=-torch.ones(2), high=torch.ones(2))}
AGENTS, SAMPLES = 2, 6


def case(space):
    random = torch.Generator().manual_seed(0)
    policy = make_policy(4, SPACES[space], hidden=(), activation="tanh")

    def draw(*shape):
        return torch.randn(AGENTS, *shape, generator=random, dtype=torch.float64)

    outputs = policy.network.sizes[-1]
    theta = {"head.weight": draw(outputs, 4), "head.bias": draw(outputs)}
    if space == "continuous":
        theta["log_std"] = 0.3 * draw(outputs)
    batch = {"observation": draw(SAMPLES, 4), "advantage": draw(SAMPLES)}
    discrete = torch.randint(3, (AGENTS, SAMPLES), generator=random)
    batch["action"] = discrete if space == "discrete" else draw(SAMPLES, 2)
    return policy, theta, batch


def test_policy_gradient_of_a_softmax_is_advantage_times_probability_minus_choice():
    policy, theta, batch = case("discrete")
    found = gradient_moments(policy_gradient_loss(policy), theta, batch)
    by_name = found.layout.unflatten(found.sum)
    for agent in range(AGENTS):
        expected = torch.zeros(3, 4, dtype=torch.float64)
        for s in range(SAMPLES):
            x = batch["observation"][agent, s]
            p = (theta["head.weight"][agent] @ x + theta["head.bias"][agent]).softmax(0)
            choice = torch.eye(3, dtype=torch.float64)[batch["action"][agent, s]]
            expected += batch["advantage"][agent, s] * torch.outer(p - choice, x)
        torch.testing.assert_close(by_name["head.weight"][agent], expected)


@pytest.mark.parametrize("space", SPACES)
def test_clipped_loss_at_the_old_policy_has_the_plain_policy_gradient(space):
    policy, theta, batch = case(space)
    batch["log_prob"] = policy.evaluate(theta, batch["observation"], batch["action"])[0]
    weight = 0.1
    clipped = policy_loss(policy, PPOConfig(entropy_coefficient=weight))
    plain = policy_gradient_loss(policy, weight)
    for engine in ("auto", "general"):
        ours, theirs = (gradient_moments(f, theta, batch, engine=engine) for f in (clipped, plain))
        torch.testing.assert_close(ours.sum, theirs.sum, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.squared_norm, theirs.squared_norm, rtol=1e-10, atol=1e-12)


def test_entropy_bonus_rewards_a_wider_gaussian_by_its_weight():
    policy, theta, batch = case("continuous")
    batch["advantage"] *= 0
    found = gradient_moments(policy_gradient_loss(policy, 0.25), theta, batch)
    of_log_std = found.layout.unflatten(found.mean)["log_std"]  # the entropy's slope is 1
    torch.testing.assert_close(of_log_std, torch.full_like(of_log_std, -0.25))


def test_clipping_takes_the_gradient_of_samples_beyond_the_range():
    policy, theta, batch = case("discrete")
    now = policy.evaluate(theta, batch["observation"], batch["action"])[0]
    batch["log_prob"] = now - math.log(1.5)  # a ratio of 1.5, clipped at 1.2
    loss = policy_loss(policy, PPOConfig(clip=0.2, entropy_coefficient=0))
    batch["advantage"] = batch["advantage"].abs()
    assert not gradient_moments(loss, theta, batch).sum.any()
    batch["advantage"] *= -1  # the pessimistic side is not clipped
    assert gradient_moments(loss, theta, batch).sum.any()


def test_value_loss_by_hand():
    network = MLP(sizes=(1, 1), activation="tanh", head_gain=1.0)
    theta = {"head.weight": torch.tensor([[2.0]]), "head.bias": torch.tensor([0.0])}
    sample = {
        "observation": torch.tensor([1.0]),
        "value": torch.tensor(1.5),
        "target": torch.tensor(3.0),
    }

    def loss(**settings):
        return value_loss(network, PPOConfig(value_coefficient=0.5, **settings))(theta, sample)

    assert loss(clip_value=False) == pytest.approx(0.25 * 1.0)
    assert loss(clip_value=True, clip=0.2) == pytest.approx(0.25 * 1.3**2)

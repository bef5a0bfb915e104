import pytest
import torch

from gradlab.checks import UsageError
from gradlab.engine.accumulate import gradient_moments
from trainers.envs.vector_env import Box
from trainers.networks import MLP
from trainers.off_policy import CRITIC, deterministic_actor_loss, q_loss

# Linear networks, whose gradients can be written down.
CRITIC_NETWORK = MLP(sizes=(3, 1), activation="tanh", head_gain=1.0)  # two observed, one done
ACTOR_NETWORK = MLP(sizes=(2, 1), activation="tanh", head_gain=1.0)
BOX = Box(low=torch.tensor([-1.0]), high=torch.tensor([3.0]))
W, B = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([0.25])
OBSERVATION, ACTION = torch.tensor([1.0, 2.0]), torch.tensor([3.0])


def test_q_loss_is_the_squared_temporal_difference_error():
    loss = q_loss(CRITIC_NETWORK)
    sample = {"observation": OBSERVATION, "action": ACTION, "target": torch.tensor(5.0)}
    value = 0.5 * 1 - 1 * 2 + 2 * 3 + 0.25
    theta = {"head.weight": W, "head.bias": B}
    assert loss(theta, sample) == pytest.approx((value - 5) ** 2)
    found = gradient_moments(
        loss,
        {name: t[None] for name, t in theta.items()},
        {name: t[None, None] for name, t in sample.items()},
    )
    expected = 2 * (value - 5) * torch.tensor([[1.0, 2.0, 3.0, 1.0]])
    torch.testing.assert_close(found.sum, expected.double())


def actor_case():
    loss = deterministic_actor_loss(ACTOR_NETWORK, CRITIC_NETWORK, BOX)
    theta = {"head.weight": torch.tensor([[0.3, -0.2]]), "head.bias": torch.tensor([0.1])}
    return loss, theta, {CRITIC + "head.weight": W, CRITIC + "head.bias": B}


def test_deterministic_actor_loss_is_minus_the_critics_value_of_the_action():
    loss, theta, critic = actor_case()
    squashed = torch.tanh(torch.tensor(0.3 * 1 - 0.2 * 2 + 0.1)).item()
    action = 1 + 2 * squashed  # the range's middle is 1, its half width 2
    value = 0.5 * 1 - 1 * 2 + 2 * action + 0.25
    assert loss(theta, {"observation": OBSERVATION} | critic) == pytest.approx(-value)
    found = gradient_moments(
        loss,
        {name: t[None] for name, t in theta.items()},
        {"observation": OBSERVATION[None, None]},
        context={name: t[None] for name, t in critic.items()},
    )
    slope = -2 * 2 * (1 - squashed**2)  # dQ/da times da/du
    torch.testing.assert_close(found.sum, slope * torch.tensor([[1.0, 2.0, 1.0]]).double())


def test_deterministic_actions_stay_in_their_range():
    loss, theta, critic = actor_case()
    for sign in (-1, 1):
        extreme = {name: sign * 1e3 * t.abs() for name, t in theta.items()}
        value = -loss(extreme, {"observation": OBSERVATION} | critic)
        at_edge = 0.5 - 2 + 2 * (3 if sign > 0 else -1) + 0.25
        assert value == pytest.approx(at_edge)


def test_a_missing_critic_is_named():
    loss, theta, _ = actor_case()
    with pytest.raises(UsageError, match=r"`batch` must hold .*Got no 'critic/head\.weight' among"):
        gradient_moments(
            loss,
            {name: t[None] for name, t in theta.items()},
            {"observation": OBSERVATION[None, None]},
        )

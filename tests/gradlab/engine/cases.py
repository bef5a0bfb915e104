"""Every sharing scheme with every surrogate, small, in float64."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trainers.config import PPOConfig, SharingConfig
from trainers.envs.vector_env import Box, Discrete
from trainers.generators import METHODS
from trainers.generators.dico import DiCo
from trainers.generators.seps import SePS
from trainers.networks import MLP, make_network
from trainers.off_policy import CRITIC, deterministic_actor_loss, q_loss
from trainers.policies import make_policy
from trainers.ppo import policy_gradient_loss, policy_loss, value_loss

AGENTS, SAMPLES, OBSERVATION, TIME = 3, 10, 5, 3
DECOUPLED = (
    "hypermarl",
    "hypermarl-no-rf",
    "hypermarl-linear",
    "fups",
    "fups-id",
    "fups-id-nostate",
    "nops",
    "adapters",
    "dico",
    "kaleidoscope",
    "seps",
)
CONFIG = SharingConfig(kaleidoscope={"thresholds": (-3, 0)})
"""Every mask hides a good part of the weights."""

SURROGATES = (
    "pg-discrete",
    "pg-continuous",
    "ppo-discrete",
    "ppo-continuous",
    "value",
    "value-clipped",
    "ppo-recurrent",
    "q",
    "dpg",
)


@dataclass
class Case:
    generator: nn.Module
    surrogate: object
    batch: dict[str, Tensor]
    context: dict[str, Tensor] = field(default_factory=dict)
    networks: tuple[MLP, ...] = ()

    @property
    def theta(self):
        theta = self.generator(torch.arange(AGENTS))
        return {name: t.detach() for name, t in theta.items()}


def one_agents(theta):
    """One agent's parameters, to differentiate by: also those that nothing trained makes."""
    return {
        name: tensor[0] if tensor.requires_grad else tensor[0].clone().requires_grad_()
        for name, tensor in theta.items()
    }


def case(method, surrogate, dtype=torch.float64, samples=SAMPLES, seed=1):
    random = torch.Generator().manual_seed(seed)
    box = Box(low=-torch.ones(2), high=torch.ones(2))
    space = Discrete(n=4) if surrogate.endswith("discrete") else box

    def draw(*shape):
        return torch.randn(AGENTS, samples, *shape, generator=random).to(dtype)

    def make(mlp):
        generator = METHODS[method](mlp, AGENTS, random, CONFIG).to(dtype)
        with torch.no_grad():
            for parameter in generator.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=random).to(dtype)
            if isinstance(generator, DiCo):
                generator.ratio.fill_(0.7)
            if isinstance(generator, SePS):
                generator.group.copy_(torch.tensor([0, 1, 0]))
        return generator

    recurrent = surrogate.endswith("recurrent")
    form = {"hidden": (6, 7), "memory_size": None}
    if recurrent:  # smaller: its oracles are slower
        form = {"hidden": (3,), "memory_size": 2}
    policy = make_policy(OBSERVATION, space, activation="tanh", **form)
    value = make_network(OBSERVATION, 1, activation="relu", head_gain=1.0, **form)
    q = MLP(sizes=(OBSERVATION + 2, 6, 7, 1), activation="relu", head_gain=1.0)
    actor = MLP(sizes=(OBSERVATION, 6, 7, 2), activation="tanh", head_gain=1.0)
    steps = (TIME,) if recurrent else ()
    batch = {"observation": draw(*steps, OBSERVATION)}
    if recurrent:
        shape = (AGENTS, samples, TIME)
        batch |= {"memory": 0.5 * draw(2), "starts": torch.rand(shape, generator=random) < 0.3}
        batch["active"] = torch.rand(shape, generator=random) < 0.8
        batch["active"][..., 1] = True
    if surrogate.startswith("value"):
        batch |= {"value": 0.1 * draw(*steps), "target": draw(*steps)}
        made, config = make(value), PPOConfig(clip_value=surrogate != "value")
        return Case(made, value_loss(made.mlp, config), batch)
    if surrogate == "q":
        made = make(q)
        return Case(made, q_loss(made.mlp), batch | {"action": draw(2), "target": draw()})
    if surrogate == "dpg":
        critic, made = make(q), make(actor)
        fixed = critic(torch.arange(AGENTS))
        context = {CRITIC + n: t.detach().expand(AGENTS, *t.shape[1:]) for n, t in fixed.items()}
        box = Box(low=box.low.to(dtype), high=box.high.to(dtype))
        loss = deterministic_actor_loss(made.mlp, critic.mlp, box)
        return Case(made, loss, batch, context, (made.mlp, critic.mlp))
    batch["action"] = (
        draw(*steps, 2) if space is box else torch.randint(4, (AGENTS, samples), generator=random)
    )
    batch |= {"advantage": draw(*steps), "log_prob": 0.3 * draw(*steps) - 1.5}
    made = make(policy.network)
    policy = replace(policy, network=made.mlp)
    if surrogate.startswith("pg"):
        return Case(made, policy_gradient_loss(policy, 0.01), batch)
    return Case(made, policy_loss(policy, PPOConfig()), batch)

"""Sharing schemes by name."""

from collections.abc import Callable

from torch import Generator as RandomGenerator

from gradlab.registry import Registry
from trainers.config import HypernetworkConfig
from trainers.generators.coupled import CoupledHyperNetwork
from trainers.generators.generator import Generator
from trainers.generators.hypernetwork import HyperNetwork
from trainers.generators.independent import NoPS
from trainers.generators.shared import FuPS, FuPSID
from trainers.networks import MLP

Factory = Callable[[MLP, int, RandomGenerator, HypernetworkConfig], Generator]


def _hypernetwork(
    default: str, *, linear: bool = False, kind_of: type[HyperNetwork] = HyperNetwork
) -> Factory:
    def make(
        mlp: MLP, agents: int, random: RandomGenerator, config: HypernetworkConfig
    ) -> Generator:
        kind = default if config.embedding == "default" else config.embedding
        return kind_of(
            mlp,
            agents,
            random,
            embedding_size=config.embedding_size if kind == "learned" else None,
            hidden=() if linear else config.hidden,
            scaled_init=config.scaled_init,
            bias=config.bias,
        )

    return make


METHODS: Registry[Factory] = Registry(
    "method",
    {
        "hypermarl": _hypernetwork("learned"),
        "hypermarl-coupled": _hypernetwork("learned", kind_of=CoupledHyperNetwork),
        "hypermarl-linear": _hypernetwork("one-hot", linear=True),
        "fups": lambda mlp, agents, random, _: FuPS(mlp, agents, random),
        "fups-id": lambda mlp, agents, random, _: FuPSID(mlp, agents, random),
        "nops": lambda mlp, agents, random, _: NoPS(mlp, agents, random),
    },
)

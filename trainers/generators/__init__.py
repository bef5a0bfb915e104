"""Sharing schemes by name."""

from torch import Generator as RandomGenerator

from gradlab.registry import Registry
from trainers.config import HypernetworkConfig, NetworkConfig, SharingConfig
from trainers.generators.adapters import Adapters
from trainers.generators.coupled import CoupledHyperNetwork
from trainers.generators.dico import DiCo
from trainers.generators.generator import Generator
from trainers.generators.hypernetwork import HyperNetwork
from trainers.generators.independent import NoPS
from trainers.generators.kaleidoscope import Kaleidoscope, MaskedEnsemble
from trainers.generators.method import Method, matched
from trainers.generators.seps import SePS
from trainers.generators.shared import FuPS, FuPSID
from trainers.networks import MLP


def _hypernetwork(
    default: str,
    *,
    linear: bool = False,
    reset_fan: bool = True,
    kind_of: type[HyperNetwork] = HyperNetwork,
) -> Method:
    def resolved(sharing: SharingConfig) -> HypernetworkConfig:
        config = sharing.hypernetwork
        kind = default if config.embedding == "default" else config.embedding
        hidden = () if linear else config.hidden
        return config.model_copy(update={"embedding": kind, "hidden": hidden})

    def make(
        mlp: MLP, agents: int, random: RandomGenerator, config: SharingConfig, own: bool
    ) -> Generator:
        return kind_of(mlp, agents, random, resolved(config), reset_fan=reset_fan, own_log_std=own)

    return Method(
        factory=make,
        count=lambda mlp, agents, config, own: kind_of.count(mlp, agents, resolved(config), own),
    )


def _shared_with_id(*, observed: bool) -> Method:
    return Method(
        factory=lambda mlp, agents, random, _, own: FuPSID(
            mlp, agents, random, own_log_std=own, observed=observed
        ),
        count=lambda mlp, agents, _, own: FuPSID.count(mlp, agents, own, observed=observed),
    )


METHODS: Registry[Method] = Registry(
    "method",
    {
        "hypermarl": _hypernetwork("learned"),
        "hypermarl-no-rf": _hypernetwork("learned", reset_fan=False),
        "hypermarl-coupled": _hypernetwork("learned", kind_of=CoupledHyperNetwork),
        "hypermarl-linear": _hypernetwork("one-hot", linear=True),
        "fups": Method(
            factory=lambda mlp, agents, random, _, own: FuPS(mlp, agents, random, own_log_std=own),
            count=lambda mlp, agents, _, own: FuPS.count(mlp, agents, own),
        ),
        "fups-id": _shared_with_id(observed=True),
        "fups-id-nostate": _shared_with_id(observed=False),
        "nops": Method(
            factory=lambda mlp, agents, random, _, own: NoPS(mlp, agents, random, own_log_std=own),
            count=lambda mlp, agents, _, own: NoPS.count(mlp, agents, own),
            own_log_std=True,
        ),
        "adapters": Method(
            factory=lambda mlp, agents, random, config, own: Adapters(
                mlp, agents, random, config.adapter, own_log_std=own
            ),
            count=lambda mlp, agents, config, own: Adapters.size(mlp, agents, config.adapter, own),
        ),
        "dico": Method(
            factory=lambda mlp, agents, random, config, own: DiCo(
                mlp, agents, random, config.dico, own_log_std=own
            ),
            count=lambda mlp, agents, _, own: DiCo.count(mlp, agents, own),
        ),
        "kaleidoscope": Method(
            factory=lambda mlp, agents, random, config, own: Kaleidoscope(
                mlp, agents, random, config.kaleidoscope, own_log_std=own
            ),
            count=lambda mlp, agents, _, own: Kaleidoscope.count(mlp, agents, own),
            ensemble=Method(
                factory=lambda mlp, agents, random, config, _: MaskedEnsemble(
                    mlp, agents, random, config.kaleidoscope
                ),
                count=lambda mlp, _, config, __: MaskedEnsemble.size(mlp, config.kaleidoscope),
            ),
        ),
        "seps": Method(
            factory=lambda mlp, agents, random, config, own: SePS(
                mlp, agents, random, config.seps, own_log_std=own
            ),
            count=lambda mlp, agents, config, own: SePS.count(mlp, agents, config.seps, own),
        ),
    },
)

_OWN_LOG_STD = {"default": None, "shared": False, "agent": True}


def make_generator(
    name: str,
    mlp: MLP,
    agents: int,
    random: RandomGenerator,
    network: NetworkConfig,
    sharing: SharingConfig,
    *,
    ensemble: bool = False,
) -> Generator:
    """Make the generator of one network.

    Args:
        name: The sharing scheme.
        mlp: The network, with the widths that are asked for.
        agents: Number of agents.
        random: Source of randomness.
        network: Whose size to match, and what to do with `log_std`.
        sharing: Settings of the sharing schemes.
        ensemble: Whether to make an ensemble of such networks, if the scheme has one.

    Returns:
        The generator; the network that it makes parameters for, of matched widths if so asked, is
        its `mlp`.

    Raises:
        UsageError: If a method is unknown, or nothing can be matched.
    """
    method, own = METHODS[name], _OWN_LOG_STD[network.log_std]
    if ensemble and method.ensemble is not None:
        method = method.ensemble

    def size_of(some: Method, sized: MLP) -> int:
        return some.parameters(sized, agents, sharing, own)

    if network.match is not None:
        target = size_of(METHODS[network.match], mlp)
        mlp = matched(mlp, lambda sized: size_of(method, sized), target)
    return method(mlp, agents, random, sharing, own)

"""Whether each agent's network, taken out of a multi-agent module, does what it does in there."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.func import functional_call

from gradlab.attach.samples import check_samples
from gradlab.checks import UsageError
from gradlab.integrations.agent_network import Key, Networks
from gradlab.integrations.group_batch import GroupBatch

_TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
"""A single precision's rounding, also of long sums."""


@torch.no_grad()
def compare(
    module: TensorDictModuleBase, networks: Networks, outputs: Sequence[Key], batch: GroupBatch
) -> None:
    """Insist that agents' networks make what the module makes, of the first copy's samples.

    Args:
        module: The module, with or without a distribution at its end.
        networks: What was taken out of it.
        outputs: Keys of what it makes, [*batch, agent, ...].
        batch: A batch.

    Raises:
        UsageError: If they do not: something without parameters mixes agents, for example.
    """
    first = GroupBatch(batch.tensors[:1], batch.agents, segments=batch.segments)
    samples = first.read(networks.reads)
    check_samples(samples, next(networks.policy.parameters()).device)
    made = GroupBatch(
        _without_distribution(copy.deepcopy(module)).eval()(first.tensors.clone(False)),
        batch.agents,
        segments=batch.segments,
    )
    for agent in range(batch.agents):
        network = _alone(networks, agent)
        found = torch.vmap(network)({name: tensor[agent] for name, tensor in samples.items()})
        for key in outputs:
            name = key if isinstance(key, str) else "/".join(key)
            expected = made.of_agents(key)[agent]
            if not torch.allclose(found[name], expected, equal_nan=True, **_TOLERANCE):
                away = float((found[name] - expected).abs().max())
                raise UsageError(
                    f"a network must make each agent's {name} of what that agent reads. Got one in "
                    f"which agent {agent}'s is another when it is alone, by up to {away:.3g}; a "
                    "module without parameters that mixes agents must not stand in it."
                )


def _without_distribution(module: TensorDictModuleBase) -> TensorDictModuleBase:
    if not isinstance(module, TensorDictSequential):
        return module
    parts = [part for part in module.module if not isinstance(part, ProbabilisticTensorDictModule)]
    return TensorDictSequential(*parts)


def _alone(networks: Networks, agent: int) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """An agent's network with its own parameters."""
    if networks.target is None:
        own: nn.Module = copy.deepcopy(networks.policy.get_submodule(str(agent))).eval()
        return own
    target = networks.target
    theta = {name: tensor[0] for name, tensor in networks.policy(torch.tensor([agent])).items()}
    return lambda sample: functional_call(target, theta, (dict(sample),))

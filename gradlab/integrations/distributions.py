"""Action distributions of TorchRL as functions of one sample.

The framework's own classes look at values in Python, which `torch.func.vmap` can't. Constants of a
sample, such as the inverse of a squashing, are made once for the whole batch, in its precision.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from tensordict.nn import ProbabilisticTensorDictModule
from torch import Tensor
from torch.nn import functional
from torchrl.modules import IndependentNormal, MaskedCategorical, OneHotCategorical, TanhNormal

from gradlab.checks import UsageError, check

# Names of a sample's constants that no tensordict's key has.
ACTION = "loss: action"
SQUASHING = "loss: squashing"
DRAWS = "loss: draws"
HALF_RANGE = "loss: half the range"

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Actions(ABC):
    """A distribution of one agent's actions.

    Attributes:
        reads: What it reads, by the name of the distribution's argument.
    """

    def __init__(self, reads: Mapping[str, str]) -> None:
        self.reads = dict(reads)

    def constants(self, action: Tensor, draws: int) -> dict[str, Tensor]:  # noqa: ARG002
        """What does not depend on the network.

        Args:
            action: The actions [agent, sample, ...].
            draws: How many draws an entropy without a closed form is to be estimated from; 0 where
                no entropy is needed.

        Returns:
            Tensors [agent, sample, ...] by name.
        """
        return {ACTION: action}

    @abstractmethod
    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-probability of the sample's action.

        Args:
            values: What the network made, and `constants`.

        Returns:
            It, without the action's axis.
        """

    @abstractmethod
    def entropy(self, values: Mapping[str, Tensor]) -> Tensor:
        """Entropy, or the framework's estimate of it.

        Args:
            values: As for `log_prob`.

        Returns:
            It, without the action's axis.
        """


class NumberedActions(Actions):
    """`Categorical` of torch, by logits; `OneHotCategorical` and `MaskedCategorical` of TorchRL."""

    def __init__(self, reads: Mapping[str, str], *, one_hot: bool = False) -> None:
        super().__init__(reads)
        self._one_hot = one_hot

    def constants(self, action: Tensor, draws: int) -> dict[str, Tensor]:  # noqa: ARG002
        """See `Actions.constants`."""
        return {ACTION: action.argmax(-1) if self._one_hot else action.long()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """See `Actions.log_prob`."""
        return self._log_p(values).gather(-1, values[ACTION][..., None]).squeeze(-1)

    def entropy(self, values: Mapping[str, Tensor]) -> Tensor:
        """See `Actions.entropy`."""
        log_p = self._log_p(values)
        return -(log_p.exp() * log_p).sum(-1)

    def _log_p(self, values: Mapping[str, Tensor]) -> Tensor:
        logits = values[self.reads["logits"]]
        if "mask" in self.reads:
            least = torch.finfo(logits.dtype).min
            logits = torch.where(values[self.reads["mask"]].bool(), logits, least)
        return logits.log_softmax(-1)


class NormalActions(Actions):
    """TorchRL's `IndependentNormal`."""

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """See `Actions.log_prob`."""
        return self._density(values[ACTION], values)

    def entropy(self, values: Mapping[str, Tensor]) -> Tensor:
        """See `Actions.entropy`."""
        return (values[self.reads["scale"]].log() + 0.5 + _HALF_LOG_TWO_PI).sum(-1)

    def _density(self, of: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        loc, scale = values[self.reads["loc"]], values[self.reads["scale"]]
        noise = (of - loc) / scale
        return (-0.5 * noise.square() - scale.log() - _HALF_LOG_TWO_PI).sum(-1)


class SquashedNormalActions(NormalActions):
    """TorchRL's `TanhNormal`, whose entropy is estimated from draws."""

    def __init__(
        self,
        reads: Mapping[str, str],
        *,
        low: Tensor | float = -1.0,
        high: Tensor | float = 1.0,
    ) -> None:
        super().__init__(reads)
        self._range = Range(low, high)

    def constants(self, action: Tensor, draws: int) -> dict[str, Tensor]:
        """See `Actions.constants`: the unsquashed action, and what squashing adds."""
        middle, half = self._range.of(action)
        limit = 1.0 - torch.finfo(action.dtype).resolution
        unsquashed = ((action - middle) / half).clamp(-limit, limit).atanh()
        half = half.expand_as(action)
        found = {ACTION: unsquashed, SQUASHING: _squashing(unsquashed, half)}
        if draws:
            shape = (*action.shape[:-1], draws, action.shape[-1])
            found[DRAWS] = torch.randn(shape, dtype=action.dtype, device=action.device)
            found[HALF_RANGE] = half
        return found

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """See `Actions.log_prob`."""
        return self._density(values[ACTION], values) - values[SQUASHING]

    def entropy(self, values: Mapping[str, Tensor]) -> Tensor:
        """See `Actions.entropy`."""
        names = (self.reads["loc"], self.reads["scale"])
        repeated = {name: values[name].unsqueeze(-2) for name in names}
        loc, scale = repeated.values()
        drawn = loc + scale * values[DRAWS]
        squashing = _squashing(drawn, values[HALF_RANGE].unsqueeze(-2))
        return -(self._density(drawn, repeated) - squashing).mean(-1)


class Range:
    """The range of continuous actions: numbers, a vector, or a vector for each agent."""

    def __init__(self, low: Tensor | float, high: Tensor | float) -> None:
        self._low, self._high = torch.as_tensor(low), torch.as_tensor(high)

    def of(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Find out where actions lie.

        Args:
            action: Actions [agent, sample, ..., action].

        Returns:
            Its middle and half its width, ready to be broadcast against them.
        """
        low, high = (
            self._along(bound.to(action), action.dim()) for bound in (self._low, self._high)
        )
        return (high + low) / 2, (high - low) / 2

    @staticmethod
    def _along(bound: Tensor, axes: int) -> Tensor:
        if bound.dim() < 2:
            return bound
        return bound.view(len(bound), *[1] * (axes - 2), -1)


def _squashing(unsquashed: Tensor, half: Tensor) -> Tensor:
    """Logarithm of the volume that tanh and the action's range make of one."""
    twice = 2 * (math.log(2) - unsquashed - functional.softplus(-2 * unsquashed))
    return (twice + half.log()).sum(-1)


_KNOWN: dict[type, tuple[Callable[..., Actions], set[str]]] = {
    torch.distributions.Categorical: (NumberedActions, {"logits"}),
    MaskedCategorical: (NumberedActions, {"logits", "mask"}),
    OneHotCategorical: (lambda reads: NumberedActions(reads, one_hot=True), {"logits"}),
    IndependentNormal: (NormalActions, {"loc", "scale"}),
    TanhNormal: (SquashedNormalActions, {"loc", "scale"}),
}


def actions_of(module: ProbabilisticTensorDictModule) -> Actions:
    """Find a policy's distribution.

    Args:
        module: What makes it, at the end of a policy.

    Returns:
        The distribution.

    Raises:
        UsageError: If it is another one, or has other arguments.
    """
    reads = argument_names(module)
    kind, arguments = module.distribution_class, dict(module.distribution_kwargs)
    known = _KNOWN.get(kind)
    if known is None:
        names = ", ".join(of.__name__ for of in _KNOWN)
        raise UsageError(
            f"a policy's distribution must be one of {names}. Got "
            f"{getattr(kind, '__name__', kind)}; composite and other distributions can't be taken "
            "apart here."
        )
    make, expected = known
    rule = f"read {' and '.join(sorted(expected))}"
    check(set(reads) == expected, f"{kind.__name__}", rule, sorted(reads))
    allowed = {"low", "high"} if kind is TanhNormal else set()
    rule = f"have no arguments but {', '.join(sorted(allowed))}" if allowed else "have no arguments"
    check(set(arguments) <= allowed, f"{kind.__name__}", rule, sorted(arguments))
    return make(reads, **arguments)


def argument_names(module: ProbabilisticTensorDictModule) -> dict[str, str]:
    """What a distribution reads.

    Args:
        module: What makes it.

    Returns:
        The names of tensors by the distribution's arguments.
    """
    return {
        argument if isinstance(argument, str) else argument[-1]: (
            key if isinstance(key, str) else "/".join(key)
        )
        for argument, key in zip(module.dist_keys, module.in_keys, strict=True)
    }

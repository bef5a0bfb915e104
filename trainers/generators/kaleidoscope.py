r"""Kaleidoscope: one network's weights seen through learnable masks, one for each agent or critic.

Li et al., "Kaleidoscope: learnable masks for heterogeneous multi-agent reinforcement learning"
(NeurIPS 2024). Seen through mask i, a layer's weight W is

.. math:: W_i = \operatorname{sign}(W) \, \max(|W| - \sigma(s_i), 0)

with thresholds :math:`s_i` of its shape: what is not above its threshold is 0, and what is, is that
much smaller. Both W and all s are trained.
"""

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.engine.per_sample import Lookup, PerSample, Rows
from gradlab.metrics.coupling_forms import CouplingForms
from gradlab.quantity import Quantity
from trainers.config import KaleidoscopeConfig
from trainers.generators.shared import FuPS
from trainers.networks import MLP, Ensemble, Theta


class Masked(FuPS):
    """A network's weights under several masks; biases and a memory are those of all.

    Heads start with gain 1: thresholds are made for weights of the size of other layers'.

    Attributes:
        thresholds: s of all masks [mask, outputs, inputs] by layer.
        masks: Number of masks.
        recent: The last losses, and diversities of the masks with them; a buffer [2, step].
        steps: How many steps there were of them so far; a buffer.
    """

    recent: Tensor
    steps: Tensor

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        config: KaleidoscopeConfig,
        *,
        masks: int,
        start: tuple[float, float],
        diversity: float,
        own_log_std: bool = False,
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            random: Source of randomness.
            config: How the masks are trained.
            masks: Number of masks.
            start: What the thresholds are drawn between.
            diversity: How much the masks' diversity counts beside the rest of the loss.
            own_log_std: Whether each agent has its own `log_std`.
        """
        super().__init__(replace(mlp, head_gain=1.0), agents, random, own_log_std=own_log_std)
        self.masks = masks
        self._config, self._start, self._diversity = config, start, diversity
        self.thresholds = nn.ParameterDict({
            layer: nn.Parameter(self._drawn((masks, *shape), random))
            for layer, shape in mlp.layers.items()
        })
        self.register_buffer("recent", torch.zeros(2, config.window, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))

    def weight(self, layer: str) -> Tensor:
        """The weight that all masks are laid on.

        Args:
            layer: Its layer.

        Returns:
            W [outputs, inputs].
        """
        weight: Tensor = self.theta[f"{layer}/weight"]
        return weight

    def seen(self, layer: str, masks: Int[Tensor, " mask"]) -> Float[Tensor, "mask outputs inputs"]:
        """Look at a weight through some masks.

        Args:
            layer: Its layer.
            masks: Numbers of the masks.

        Returns:
            W_i of each.
        """
        weight = self.weight(layer)
        return weight.sign() * (weight.abs() - self._limits(layer, masks)).relu()

    @torch.no_grad()
    def mask(self, layer: str) -> Bool[Tensor, "mask outputs inputs"]:
        """Tell which weights are seen through each mask.

        Args:
            layer: The layer.

        Returns:
            Whether |W| is above the threshold.
        """
        return self.weight(layer).abs() > self._limits(layer)

    def diversity(self) -> Float[Tensor, ""]:
        r"""How much the masks differ, with a gradient for the thresholds alone.

        .. math:: D = \frac{1}{n (n - 1) P} \sum_l c_l \sum_{i, j} \big\| |W_l| \odot m_{i,l}
                      - |W_l| \odot m_{j,l} \big\|_1

        over n masks m of ones and zeros and the layers' P weights, :math:`c_l` being
        `layer_factor` to the power of l. W is a constant in it; the step in m passes the tanh of
        the gradient on (a straight-through estimator).

        Returns:
            D; 0 of a single mask.
        """
        total = torch.zeros(())
        if self.masks == 1:
            return total
        for number, layer in enumerate(self.thresholds):
            size = self.weight(layer).detach().abs()
            mask = _step(size - self._limits(layer))
            # Of ones and zeros the sum over pairs, and its derivatives, follow from the ones' count
            count = mask.detach().sum(0)
            slope = 2 * torch.where(mask.detach() > 0, self.masks - count, -count)
            total = total + self._config.layer_factor**number * (size * slope * mask).sum()
        weights = sum(self.weight(layer).numel() for layer in self.thresholds)
        return total / (self.masks * (self.masks - 1) * weights)

    def regularise(self, loss: float) -> None:
        r"""See `Generator.regularise`: minimise :math:`- \beta D` as well.

        :math:`\beta = |d \, \bar L / \bar D|` with d from the settings and means over the last
        steps of the loss L and of D: the term is d times as large as the loss whatever the scale
        of the rewards. d itself as long as no two masks differ.
        """
        diversity = self.diversity()
        if not diversity.requires_grad:
            return
        window = self.recent.shape[1]
        place, known = int(self.steps) % window, min(int(self.steps) + 1, window)
        self.recent[:, place] = torch.tensor([loss, diversity.item()], dtype=torch.float64)
        self.steps += 1
        loss, mean = self.recent[:, :known].mean(1).tolist()
        weight = abs(self._diversity * (loss / mean if mean else 1.0))
        (-weight * diversity).backward()

    @abstractmethod
    def renew(self, before: int, after: int, planned: int, random: RandomGenerator) -> None:
        """See `Generator.renew`."""

    def _drawn(self, shape: tuple[int, ...], random: RandomGenerator) -> Tensor:
        """New thresholds."""
        low, high = self._start
        return torch.empty(shape).uniform_(low, high, generator=random)

    def _limits(self, layer: str, masks: Tensor | slice = slice(None)) -> Tensor:
        """What weights must be above to be seen: sigma(s) [mask, outputs, inputs]."""
        thresholds: Tensor = self.thresholds[layer][masks]
        return thresholds.sigmoid()

    def _derivatives(self, layer: str) -> tuple[Tensor, Tensor]:
        """Of what is seen, with respect to W and to s: [mask, outputs, inputs] each."""
        weight, limit = self.weight(layer), self._limits(layer)
        mask = self.mask(layer).to(weight)
        return mask, -mask * weight.sign() * limit * (1 - limit)

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        return super().layer_of(parameter.removeprefix("thresholds."))


class Kaleidoscope(Masked):
    """theta_i = psi with the layers' weights as agent i's mask shows them."""

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        config: KaleidoscopeConfig,
        *,
        own_log_std: bool = False,
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            random: Source of randomness.
            config: Where thresholds start, and how they are trained.
            own_log_std: Whether each agent has its own `log_std`.
        """
        super().__init__(
            mlp,
            agents,
            random,
            config,
            masks=agents,
            start=config.thresholds,
            diversity=config.diversity,
            own_log_std=own_log_std,
        )

    @classmethod
    def count(cls, mlp: MLP, agents: int, own_log_std: bool = False) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            own_log_std: As for the constructor.

        Returns:
            P + N sum_l a_l b_l, and the log standard deviations.
        """
        return super().count(mlp, agents, own_log_std) + agents * _weights(mlp)

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        theta = super().forward(agents)
        return theta | {f"{layer}.weight": self.seen(layer, agents) for layer in self.thresholds}

    @torch.no_grad()
    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`: what is masked gets nothing."""
        found = super().pull_back(z, agents)
        for layer, thresholds in self.thresholds.items():
            rows = z[f"{layer}.weight"]
            of_weight, of_threshold = (table[agents] * rows for table in self._derivatives(layer))
            found[f"theta.{layer}/weight"] = Rows(of_weight[None])
            found[f"thresholds.{layer}"] = Lookup(
                agents[None, :, None], of_threshold[None, :, None], thresholds.shape
            )
        return found

    @torch.no_grad()
    def coupling_forms(self) -> CouplingForms:
        r"""See `Generator.coupling_forms`: of weights, :math:`J_i J_k^\top` is diagonal.

        It is 1 where both agents see the weight, and else 0; with itself an agent also has the
        squared derivative with respect to its threshold.
        """
        forms = super().coupling_forms()
        trace, squared = forms.trace.clone(), forms.squared.clone()
        for layer in self.thresholds:
            place = forms.names.index(f"{layer}.weight")
            diagonal = _products(*self._trained_derivatives(layer))
            trace[place] = diagonal.sum(2)
            squared[place, place] = diagonal.square().sum(2)
        return CouplingForms(names=forms.names, head=trace, trace=trace, squared=squared)

    def _trained_derivatives(self, layer: str) -> tuple[Tensor, Tensor]:
        """[mask, weight] each, in float64, 0 for what is frozen."""
        of_weight, of_threshold = (t.double().flatten(1) for t in self._derivatives(layer))
        trained = self.weight(layer).requires_grad, self.thresholds[layer].requires_grad
        return of_weight * trained[0], of_threshold * trained[1]

    @torch.no_grad()
    def renew(self, before: int, after: int, planned: int, random: RandomGenerator) -> None:
        """See `Generator.renew`: weights that no agent sees any more, and their thresholds.

        Each is drawn with the probability that is set: the weight as torch starts a linear layer's
        (Kaiming uniform), the thresholds as they started.
        """
        if not _due(self._config.reset_frames, before, after, planned):
            return
        for layer, thresholds in self.thresholds.items():
            weight = self.weight(layer)
            chosen = torch.rand(weight.shape, generator=random) < self._config.reset_share
            chosen &= ~self.mask(layer).any(0)
            bound = 1 / math.sqrt(weight.shape[1])
            drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=random)
            again = self._drawn(tuple(thresholds.shape), random)
            weight.copy_(torch.where(chosen, drawn, weight))
            thresholds.copy_(torch.where(chosen, again, thresholds))

    def account(self) -> dict[str, Quantity]:
        """See `Generator.account`."""
        hidden = torch.cat([(~self.mask(layer)).flatten(1) for layer in self.thresholds], dim=1)
        sparsity = Quantity(
            values=hidden.double().mean(1).numpy(),
            dims=("agent",),
            coords={"agent": list(range(self.agents))},
            unit="1",
            estimator="share of the actor's weights that are masked",
        )
        with torch.no_grad():
            diversity = Quantity.scalar(self.diversity().item(), "1", "of the actor's masks; exact")
        return {"mask_sparsity": sparsity, "mask_diversity": diversity}

    @torch.no_grad()
    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        rows = [(self.weight(n).abs() * self.mask(n)).flatten(1) for n in self.thresholds]
        return torch.cat(rows, dim=1), "each agent's masks, weighted by the weights' sizes"

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        return (
            f"{super().jacobian()}; of a weight selects what the agent's mask shows, and bends it "
            "through the agent's own threshold"
        )


class MaskedEnsemble(Masked):
    """theta_i = psi as several masks show it, for all agents alike: critics of one network."""

    mlp: Ensemble

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        config: KaleidoscopeConfig,
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network of one critic.
            agents: Number of agents.
            random: Source of randomness.
            config: How many critics, where thresholds start, and how they are trained.
        """
        super().__init__(
            mlp,
            agents,
            random,
            config,
            masks=config.critics,
            start=config.critic_thresholds,
            diversity=config.critic_diversity,
        )
        self._own_layers = tuple(mlp.layers)
        self.mlp = Ensemble.of(self.mlp, config.critics)

    @classmethod
    def size(cls, mlp: MLP, config: KaleidoscopeConfig) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network of one critic.
            config: How many critics.

        Returns:
            P + K sum_l a_l b_l.
        """
        return mlp.size + config.critics * _weights(mlp)

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:  # noqa: ARG002 -- all have the same
        """See `Generator.forward`."""
        every = torch.arange(self.masks)
        seen = {layer: self.seen(layer, every) for layer in self._own_layers}
        return {
            name: tensor
            for prefix, number in zip(self.mlp.prefixes, every, strict=True)
            for layer in self._own_layers
            for name, tensor in (
                (f"{prefix}{layer}.weight", seen[layer][number][None]),
                (f"{prefix}{layer}.bias", self.theta[f"{layer}/bias"][None]),
            )
        }

    @torch.no_grad()
    def pull_back(
        self,
        z: Theta,
        agents: Int[Tensor, " row"],  # noqa: ARG002 -- all have the same
    ) -> dict[str, PerSample]:
        """See `Generator.pull_back`: what the critics ask of their common weights adds up."""
        found: dict[str, PerSample] = {}
        for layer in self._own_layers:
            weight, bias = (
                torch.stack([z[f"{prefix}{layer}.{kind}"] for prefix in self.mlp.prefixes], dim=1)
                for kind in ("weight", "bias")
            )
            of_weight, of_threshold = self._derivatives(layer)
            found[f"theta.{layer}/weight"] = Rows((of_weight * weight).sum(1)[None])
            found[f"theta.{layer}/bias"] = Rows(bias.sum(1)[None])
            found[f"thresholds.{layer}"] = Rows((of_threshold * weight)[None])
        return found

    @torch.no_grad()
    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`: the same for every pair, with blocks between critics."""
        names = tuple(f"{layer}.{kind}" for layer in self.mlp.layers for kind in ("weight", "bias"))
        trace = torch.zeros(len(names), dtype=torch.float64)
        squared = torch.zeros(len(names), len(names), dtype=torch.float64)
        for layer in self._own_layers:
            of_weight, of_threshold = (t.double().flatten(1) for t in self._derivatives(layer))
            bias = self.theta[f"{layer}/bias"]
            of_weight *= self.weight(layer).requires_grad
            of_threshold *= self.thresholds[layer].requires_grad
            ones = bias.new_ones(self.masks, bias.numel(), dtype=torch.float64) * bias.requires_grad
            for kind, diagonal in (
                ("weight", _products(of_weight, of_threshold)),
                ("bias", _products(ones, torch.zeros_like(ones))),
            ):
                places = torch.tensor([
                    names.index(f"{prefix}{layer}.{kind}") for prefix in self.mlp.prefixes
                ])
                trace[places] = diagonal.sum(2).diagonal()
                squared[places[:, None], places] = diagonal.square().sum(2)
        every = (self.agents, self.agents)
        traces = trace[:, None, None].expand(-1, *every)
        return CouplingForms(
            names=names,
            head=traces,
            trace=traces,
            squared=squared[..., None, None].expand(-1, -1, *every),
        )

    @torch.no_grad()
    def renew(self, before: int, after: int, planned: int, random: RandomGenerator) -> None:
        """See `Generator.renew`: one critic's thresholds, the critics taking turns."""
        every = self._config.critic_reset_frames
        if _due(every, before, after, planned):
            turn = (after // every - 1) % self.masks
            for thresholds in self.thresholds.values():
                thresholds[turn] = self._drawn(tuple(thresholds.shape[1:]), random)

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        return (
            "the same for every agent; of a weight selects what each critic's mask shows, and "
            "bends it through the critic's threshold; identity for biases"
        )


class _Step(torch.autograd.Function):
    """1 above 0, and else 0; passes the tanh of the gradient on."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:  # noqa: ANN401 -- torch's context
        return (x > 0).to(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return gradient.tanh()


def _step(x: Tensor) -> Tensor:
    made: Tensor = _Step.apply(x)  # type: ignore[no-untyped-call]
    return made


def _products(
    shared: Float[Tensor, "mask weight"], own: Float[Tensor, "mask weight"]
) -> Float[Tensor, "mask mask_other weight"]:
    """Diagonals of K between masks: of what all have in common, and what each has of its own."""
    diagonal = shared[:, None] * shared[None]
    number = range(len(shared))
    diagonal[number, number] += own.square()
    return diagonal


def _weights(mlp: MLP) -> int:
    """Number of weights, without biases and memory."""
    return sum(outputs * inputs for outputs, inputs in mlp.layers.values())


def _due(every: int, before: int, after: int, planned: int) -> bool:
    """Whether a multiple of so many frames was reached, with more than as many still to come."""
    return every > 0 and before // every < after // every and planned - after > every

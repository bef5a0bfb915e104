"""The policy and value networks as plain functions of their parameters.

One implementation serves training, acting and diagnostics: tensors may come for one agent and one
sample (as `torch.func.vmap` presents them), or for all agents and samples at once. With all agents,
a parameter has a leading agent axis, of size 1 where the agents share it; each agent's samples meet
only its own parameters, in one batched product.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from trainers.activations import ACTIVATIONS
from trainers.linear import linear
from trainers.memory import ENCODER, Memory

Theta = dict[str, Tensor]

DEVIATION = "deviation_"
"""Prefix of the layers whose outputs are added to those of the layers without it."""


@dataclass(frozen=True, kw_only=True)
class MLP:
    """A multi-layer perceptron's form; its parameters are handed in.

    Attributes:
        sizes: Widths from input to output.
        activation: Between layers: "tanh" or "relu".
        head_gain: Gain of the last layer's orthogonal initialisation; that of the others is
            sqrt 2.
        log_std_size: Length of the free vector `log_std` of a Gaussian policy; 0 for none.
        memory: What comes before the layers in a recurrent network; they read its state.
    """

    sizes: tuple[int, ...]
    activation: str
    head_gain: float
    log_std_size: int = 0
    memory: Memory | None = None

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer by name, in order."""
        names = [f"layer{i}" for i in range(len(self.sizes) - 2)] + ["head"]
        shapes = zip(self.sizes[1:], self.sizes[:-1], strict=True)
        return dict(zip(names, shapes, strict=True))

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """Layers from input to output, by name; what several paths make is added."""
        return (tuple(self.layers),)

    @property
    def remembering(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of the memory by name; none without one."""
        return {} if self.memory is None else self.memory.shapes

    @property
    def first(self) -> str:
        """Name of the layer that reads the observation."""
        return ENCODER if self.memory is not None else next(iter(self.layers))

    @property
    def observation_size(self) -> int:
        """Length of what is observed."""
        return self.sizes[0] if self.memory is None else self.memory.inputs

    @property
    def outputs_of_first(self) -> int:
        """Width of the layer that reads the observation."""
        return self.sizes[1] if self.memory is None else self.memory.size

    @property
    def size(self) -> int:
        """Number of weights and biases, without `log_std`."""
        return self.size_of_layers + sum(math.prod(shape) for shape in self.remembering.values())

    @property
    def size_of_layers(self) -> int:
        """The same without the memory."""
        return sum(outputs * (inputs + 1) for outputs, inputs in self.layers.values())

    def without_observation(self) -> "MLP":
        """The same network with nothing to read."""
        if self.memory is not None:
            return replace(self, memory=replace(self.memory, inputs=0))
        return replace(self, sizes=(0, *self.sizes[1:]))

    def gain(self, layer: str) -> float:
        """Gain of a layer's orthogonal initialisation.

        Args:
            layer: A name in `layers`.

        Returns:
            The gain, PPO's usual one.
        """
        return self.head_gain if layer == "head" else math.sqrt(2)

    def forward(
        self, theta: Theta, x: Float[Tensor, "*batch inputs"]
    ) -> Float[Tensor, "*batch outputs"]:
        """Apply the layers.

        Args:
            theta: Parameters by name, "layer0.weight" [outputs, inputs] and so on; or each with a
                leading axis [agent] or [1], or as many as x has rows, see `trainers.linear`.
            x: What they read, see `read`; [agent, *batch, inputs] if the parameters have an agent
                axis.

        Returns:
            Outputs.
        """
        first, *others = (self.along(path, theta, x) for path in self.paths)
        return sum(others, first)

    def along(
        self, path: tuple[str, ...], theta: Theta, x: Float[Tensor, "*batch inputs"]
    ) -> Float[Tensor, "*batch outputs"]:
        """Apply some layers, one after the other.

        Args:
            path: One of `paths`.
            theta: As for `forward`.
            x: As for `forward`.

        Returns:
            What the last one makes.
        """
        *hidden, head = path
        activation = ACTIVATIONS[self.activation]
        for layer in hidden:
            x = activation(linear(x, theta[f"{layer}.weight"], theta[f"{layer}.bias"]))
        return linear(x, theta[f"{head}.weight"], theta[f"{head}.bias"])

    def read(self, theta: Theta, sample: Mapping[str, Tensor]) -> Float[Tensor, "*batch inputs"]:
        """What the layers read of samples.

        Args:
            theta: Parameters, as for `forward`.
            sample: Samples by name: `observation`; of a recurrent network, whose sample is a
                segment of a trajectory, [*batch, time, obs], with the `memory` [*batch, size]
                before it, and `starts` [*batch, time], where an episode begins.

        Returns:
            The observations, or the memory's state after each step.
        """
        observation = sample["observation"]
        if self.memory is None:
            return observation
        return self.memory.over_time(theta, observation, sample["memory"], sample["starts"])

    def begin(self, agents: int, copies: int) -> Float[Tensor, "agent copy size"] | None:
        """What the memory holds when episodes begin.

        Args:
            agents: Number of agents.
            copies: Number of copies.

        Returns:
            Empty states; None without a memory.
        """
        return None if self.memory is None else self.memory.empty(agents, copies)

    def read_next(
        self, theta: Theta, observation: Float[Tensor, "agent copy obs"], state: Tensor | None
    ) -> tuple[Float[Tensor, "agent copy inputs"], Tensor | None]:
        """What the layers read of one step.

        Args:
            theta: Parameters with an agent axis.
            observation: What all agents see.
            state: What their memory holds [agent, copy, size]; None without one.

        Returns:
            What they read, and what the memory holds then.
        """
        if self.memory is None:
            return observation, None
        assert state is not None
        state = self.memory.over_time(theta, observation[:, :, None], state)[:, :, 0]
        return state, state


@dataclass(frozen=True, kw_only=True)
class Deviating(MLP):
    """Two perceptrons of one form that read the same, and whose outputs are added.

    The layers of the second have the prefix `DEVIATION`; its last layer starts with gain 1.
    """

    @classmethod
    def of(cls, mlp: MLP) -> "Deviating":
        """Give a network a second one of its form.

        Args:
            mlp: The network.

        Returns:
            Both.
        """
        return cls(**{field.name: getattr(mlp, field.name) for field in fields(mlp)})

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """See `MLP.layers`: those of the first, then those of the second."""
        layers = super().layers
        return layers | {DEVIATION + name: shape for name, shape in layers.items()}

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """See `MLP.paths`."""
        layers = tuple(super().layers)
        return layers, tuple(DEVIATION + name for name in layers)

    def gain(self, layer: str) -> float:
        """See `MLP.gain`."""
        return 1.0 if layer == f"{DEVIATION}head" else super().gain(layer)


@dataclass(frozen=True, kw_only=True)
class Ensemble(MLP):
    """Perceptrons of one form that read the same; their outputs stand one after the other.

    Attributes:
        members: How many.
    """

    members: int

    @classmethod
    def of(cls, mlp: MLP, members: int) -> "Ensemble":
        """Make an ensemble of networks of a form.

        Args:
            mlp: The form of each.
            members: How many.

        Returns:
            All of them.
        """
        form = {field.name: getattr(mlp, field.name) for field in fields(mlp)}
        return cls(**form, members=members)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names of each member's layers begin with."""
        return tuple(f"member{number}_" for number in range(self.members))

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """See `MLP.layers`: those of one member after the other."""
        layers = super().layers
        return {p + name: shape for p in self.prefixes for name, shape in layers.items()}

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """Layers from input to output, by name, of each member."""
        layers = tuple(super().layers)
        return tuple(tuple(p + name for name in layers) for p in self.prefixes)

    def gain(self, layer: str) -> float:
        """See `MLP.gain`."""
        return super().gain(layer.partition("_")[2])

    def forward(
        self, theta: Theta, x: Float[Tensor, "*batch inputs"]
    ) -> Float[Tensor, "*batch outputs"]:
        """See `MLP.forward`."""
        return torch.cat([self.along(path, theta, x) for path in self.paths], dim=-1)


def per_agent(parameter: Tensor, x: Tensor) -> Tensor:
    """Give a free vector the axes of what it is combined with.

    Args:
        parameter: A vector [size], one with an agent axis [agent, size] or [1, size], or one for
            every sample [agent, sample, size].
        x: A tensor [*batch, size], with batch axes [agent, *sample] in the latter cases.

    Returns:
        The parameter, ready to be broadcast against `x`.
    """
    if parameter.dim() != 2:
        return parameter
    return parameter.view(len(parameter), *[1] * (x.dim() - 2), -1).expand_as(x)


def make_network(
    observation_size: int,
    outputs: int,
    *,
    hidden: tuple[int, ...],
    activation: str,
    memory_size: int | None,
    head_gain: float,
    log_std_size: int = 0,
) -> MLP:
    """Make a feed-forward or recurrent network's form.

    Args:
        observation_size: Length of what it observes.
        outputs: Number of outputs.
        hidden: Widths of the hidden layers.
        activation: As for `MLP`.
        memory_size: Size of the memory before them; None for none.
        head_gain: As for `MLP`.
        log_std_size: As for `MLP`.

    Returns:
        The form.
    """
    memory = None if memory_size is None else Memory(inputs=observation_size, size=memory_size)
    return MLP(
        sizes=(memory_size or observation_size, *hidden, outputs),
        activation=activation,
        head_gain=head_gain,
        log_std_size=log_std_size,
        memory=memory,
    )

"""Named parameters as one flat vector, and which coordinates belong to which layer."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

WHOLE = "all"
"""The label that stands for all layers together."""


def owning_module(name: str) -> str:
    """The default layer of a parameter: the module that owns it.

    Args:
        name: A parameter's name, e.g. "layer0.weight".

    Returns:
        The name up to its last dot; the name itself if it has none.

    >>> owning_module("layer0.weight"), owning_module("log_std")
    ('layer0', 'log_std')
    """
    return name.rpartition(".")[0] or name


@dataclass(frozen=True)
class ParameterLayout:
    """The order in which named tensors are laid out in a flat vector.

    Attributes:
        shapes: Shape of each tensor by name, in order.
        layer_of: Layer of each tensor by name.
    """

    shapes: dict[str, torch.Size]
    layer_of: dict[str, str]

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        batch_dims: int = 0,
        layer_of: Callable[[str], str] = owning_module,
    ) -> "ParameterLayout":
        """Read the layout off named tensors.

        Args:
            tensors: Tensors by name.
            batch_dims: Number of leading axes that are not the parameter's own.
            layer_of: Gives a parameter's layer.

        Returns:
            The layout, in the mapping's order.
        """
        return cls(
            shapes={name: tensor.shape[batch_dims:] for name, tensor in tensors.items()},
            layer_of={name: layer_of(name) for name in tensors},
        )

    @property
    def size(self) -> int:
        """Number of scalars."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in order of first appearance."""
        return tuple(dict.fromkeys(self.layer_of.values()))

    @property
    def layer_index(self) -> Int[Tensor, " parameter"]:
        """Each parameter's layer, by its number in `layers`."""
        number = {layer: i for i, layer in enumerate(self.layers)}
        return torch.tensor([number[self.layer_of[name]] for name in self.shapes])

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*batch param"]:
        """Lay out named tensors.

        Args:
            tensors: Tensors [*batch, *shape] by name, with the names of this layout.

        Returns:
            One vector for each element of the batch.
        """
        return torch.cat(
            [
                tensors[name].flatten(tensors[name].dim() - len(shape))
                if len(shape)
                else tensors[name].unsqueeze(-1)
                for name, shape in self.shapes.items()
            ],
            dim=-1,
        )

    def unflatten(self, flat: Float[Tensor, "*batch param"]) -> dict[str, Tensor]:
        """Name the parts of flat vectors.

        Args:
            flat: Vectors in this layout.

        Returns:
            Views [*batch, *shape] by name.
        """
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        return {
            name: part.unflatten(-1, shape) if len(shape) else part.squeeze(-1)
            for (name, shape), part in zip(
                self.shapes.items(), torch.split(flat, sizes, dim=-1), strict=True
            )
        }

    def split_by_layer(
        self, flat: Float[Tensor, "*batch param"]
    ) -> Iterator[tuple[str, Float[Tensor, "*batch layer_param"]]]:
        """Cut flat vectors into their layers.

        Args:
            flat: Vectors in this layout.

        Yields:
            Each layer's name and its coordinates.
        """
        parts = {
            name: part.reshape(*flat.shape[:-1], -1) for name, part in self.unflatten(flat).items()
        }
        for layer in self.layers:
            yield layer, torch.cat([parts[n] for n in parts if self.layer_of[n] == layer], dim=-1)

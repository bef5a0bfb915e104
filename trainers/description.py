"""What the networks of a training are: layers, sizes, and how each agent's hangs on psi."""

from dataclasses import dataclass

from trainers.generators.generator import LOG_STD, Generator
from trainers.loop import Trainer
from trainers.memory import ENCODER, GRU


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a policy or value function, or what makes several of them.

    Attributes:
        name: Its name in the diagnostics.
        form: Inputs and outputs, "-" for what is no layer of theta.
        theta: Number of parameters that one agent's network has there.
        psi: Number of trained parameters there, of all agents together.
    """

    name: str
    form: str
    theta: int
    psi: int


@dataclass(frozen=True, kw_only=True)
class NetworkDescription:
    """One network of a training.

    Attributes:
        network: "actor", "critic", or "twin", a second critic.
        method: Its sharing scheme.
        widths: From input to output.
        activation: Between the layers.
        layers: Its layers in order, then what makes several of them.
        jacobian: What J_i is, in words.
    """

    network: str
    method: str
    widths: tuple[int, ...]
    activation: str
    layers: tuple[Layer, ...]
    jacobian: str

    @property
    def theta(self) -> int:
        """Number of parameters of one agent's network."""
        return sum(layer.theta for layer in self.layers)

    @property
    def psi(self) -> int:
        """Number of trained parameters."""
        return sum(layer.psi for layer in self.layers)


def describe_networks(trainer: Trainer) -> list[NetworkDescription]:
    """Describe all that a training trains.

    Args:
        trainer: The training.

    Returns:
        One description for each.
    """
    methods = trainer.config.methods
    return [
        describe_generator(network, methods.get(network, methods["critic"]), generator)
        for network, generator in trainer.learner.networks.items()
    ]


def describe_generator(network: str, method: str, generator: Generator) -> NetworkDescription:
    """Describe one network.

    Args:
        network: What it is.
        method: The name of its sharing scheme.
        generator: Makes its parameters.

    Returns:
        The description.
    """
    mlp = generator.mlp
    trained: dict[str, int] = {}
    for name, parameter in generator.named_parameters():
        layer = generator.layer_of(name)
        trained[layer] = trained.get(layer, 0) + parameter.numel()
    forms: dict[str, tuple[str, int]] = {}
    if mlp.memory is not None:
        size = mlp.memory.size
        forms[ENCODER] = (f"{mlp.memory.inputs} -> {size}", size * (mlp.memory.inputs + 1))
        forms[GRU] = (f"{size} -> {size}", 6 * size * (size + 1))
    for name, (outputs, inputs) in mlp.layers.items():
        forms[name] = (f"{inputs} -> {outputs}", outputs * (inputs + 1))
    if mlp.log_std_size:
        forms[LOG_STD] = (str(mlp.log_std_size), mlp.log_std_size)
    return NetworkDescription(
        network=network,
        method=method,
        widths=mlp.sizes if mlp.memory is None else (mlp.memory.inputs, *mlp.sizes),
        activation=mlp.activation,
        layers=tuple(
            Layer(name=name, form=form, theta=theta, psi=trained.get(name, 0))
            for name, (form, theta) in [
                *forms.items(),
                *((name, ("-", 0)) for name in trained if name not in forms),
            ]
        ),
        jacobian=generator.jacobian(),
    )

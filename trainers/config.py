"""Every setting of a training run, its default and its meaning, in one place."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from gradlab.checks import UsageError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
NONE = "none"
"""The name of an aggregator that stands for there being none."""
CRITICS = {"dico": "nops"}
"""Sharing schemes of policies alone, and what the critics have with them unless told otherwise."""
USUAL = {"happo": {"method": "nops", "critic_method": "fups", "reward": "team"}}
"""Defaults that are an algorithm's own, by algorithm."""
Fraction = Annotated[float, Field(ge=0, le=1)]


MAY_DIFFER = ("frames", "log")
"""Settings that may be others when a training is gone on with."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OnPolicyConfig(_Section):
    """What on-policy algorithms have in common."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-4, description="Adam's step size")
    anneal_learning_rate: bool = Field(
        False, description="let the step size fall linearly to 0 over the run's updates"
    )
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-5, description="Adam's epsilon")
    discount: Fraction = Field(0.99, description="discount factor gamma")
    gae_lambda: Fraction = Field(0.95, description="lambda of generalised advantage estimation")
    entropy_coefficient: NonNegative | None = Field(
        None,
        description="weight of the entropy bonus; by default 0.01 for numbered actions and 0 for "
        "continuous ones, whose entropy has no upper bound",
    )
    anneal_entropy: bool = Field(
        False,
        description="let the weight of the entropy bonus fall linearly to 0 over the run's updates",
    )
    value_coefficient: NonNegative = Field(0.5, description="weight of the value loss")
    max_gradient_norm: Annotated[float, Field(gt=0)] = Field(
        0.5, description="clip the gradient's norm; nops clips each agent's own gradient"
    )


class PPOConfig(OnPolicyConfig):
    """Proximal policy optimisation (Schulman et al., 2017): `--algorithm ippo`, `mappo`, `happo`.

    Attributes:
        normalises_advantages: Whether advantages are normalised: over each minibatch, in `happo`
            over the rollout.
    """

    normalises_advantages: ClassVar[bool] = True
    epochs: PositiveInt = Field(4, description="passes over each rollout")
    minibatches: PositiveInt = Field(
        4,
        description="parts that a rollout is cut into per pass, as even as can be (they differ by "
        "one sample at most); no more than its samples, copies * steps, or copies of recurrent "
        "networks",
    )
    clip: Annotated[float, Field(gt=0)] = Field(0.2, description="clip range of the policy ratio")
    clip_value: bool = Field(True, description="clip the value loss by the same range")
    target_kl: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="end an update after the first pass whose mean approximate KL divergence from "
        "the policy that collected is above this (nats)",
    )


class A2CConfig(OnPolicyConfig):
    """Advantage actor-critic (Mnih et al., 2016), all copies in step: `--algorithm a2c`.

    Attributes:
        normalises_advantages: Whether advantages are normalised: they are not.
        epochs: Passes over each rollout.
        minibatches: Parts of a pass.
        target_kl: What could end an update before its last pass.
    """

    normalises_advantages: ClassVar[bool] = False
    epochs: ClassVar[int] = 1
    minibatches: ClassVar[int] = 1
    target_kl: ClassVar[None] = None
    gae_lambda: Fraction = Field(
        1.0, description="lambda of generalised advantage estimation; 1: n-step returns"
    )


class OffPolicyConfig(_Section):
    """What off-policy algorithms have in common."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-4, description="the actors' step size")
    critic_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="the critics' step size"
    )
    gradient_steps: PositiveInt | None = Field(
        None,
        description="steps of the critics in an update (default: one for each step of a rollout)",
    )
    batch_size: PositiveInt = Field(
        1000, description="samples of each agent in a step, drawn from the replay"
    )
    replay_frames: PositiveInt = Field(
        1_000_000, description="frames that the replay holds; the oldest go first"
    )
    warmup_frames: Annotated[int, Field(ge=0)] = Field(
        10_000,
        description="frames that are collected, with much noise, before anything is learned",
    )
    discount: Fraction = Field(0.99, description="discount factor gamma")
    n_step: PositiveInt = Field(5, description="steps of reward in a critic's target")
    policy_delay: PositiveInt = Field(
        2, description="steps of the critics for each of the actors and of the target networks"
    )
    polyak: Annotated[float, Field(gt=0, le=1)] = Field(
        0.005, description="how far the target networks move towards the networks in a step"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of the straight-through Gumbel-softmax of numbered actions"
    )
    max_gradient_norm: Annotated[float, Field(gt=0)] = Field(
        10.0, description="clip the gradient's norm; nops clips each agent's own gradient"
    )


class MATD3Config(OffPolicyConfig):
    """Multi-agent TD3 (Ackermann et al., 2019): `--algorithm matd3`."""

    exploration_noise: Annotated[float, Field(gt=0)] = Field(
        0.1,
        description="standard deviation of what is added to continuous actions, in units of half "
        "their range; numbered actions are drawn",
    )
    target_noise: NonNegative = Field(
        0.2, description="the same for the actions in a target (target policy smoothing)"
    )
    noise_clip: NonNegative = Field(0.5, description="where that is cut off")
    logit_penalty: NonNegative = Field(
        1e-3, description="weight of the mean squared logit in the loss of numbered actions"
    )


class MASACConfig(OffPolicyConfig):
    """Multi-agent soft actor-critic (Haarnoja et al., 2018): `--algorithm masac`."""

    n_step: PositiveInt = Field(1, description="steps of reward in a critic's target")
    policy_delay: PositiveInt = Field(
        1, description="steps of the critics for each of the actors and of the target networks"
    )
    alpha: Annotated[float, Field(gt=0)] = Field(
        0.1, description="weight of the entropy at the start, for each agent"
    )
    alpha_learning_rate: NonNegative = Field(
        3e-4, description="step size of alpha's logarithm; 0: alpha stays as it is"
    )
    target_entropy: float = Field(
        -1.0,
        description="entropy that alpha is moved towards: nats of each component of continuous "
        "actions, in units of half their range",
    )
    target_share: Fraction = Field(
        0.2,
        description="the same for numbered actions: share of the entropy of a uniform choice among "
        "those that may be taken",
    )


class NetworkConfig(_Section):
    """The policy and value networks that every method uses or generates."""

    hidden: tuple[PositiveInt, ...] = Field((64, 64), description="widths of the hidden layers")
    activation: Literal["tanh", "relu"] = Field("tanh", description="hidden activation")
    memory: Literal["none", "gru"] = Field(
        "none",
        description="gru: recurrent networks, with a dense layer and a gated recurrent unit before "
        "the hidden layers; a sample is then a segment, all steps of one copy in a rollout",
    )
    memory_size: PositiveInt = Field(128, description="width of a recurrent network's memory")
    match: str | None = Field(
        None,
        description="widen or narrow the hidden layers until all agents' parameters together come "
        "nearest to what this method has with the widths given",
    )
    log_std: Literal["default", "shared", "agent"] = Field(
        "default",
        description="a continuous policy's log_std: one that all agents share (with seps all of a "
        "group), or one for each agent; default: agent for nops, else shared",
    )


class HypernetworkConfig(_Section):
    """The generator of the hypermarl methods."""

    embedding: Literal["default", "learned", "one-hot", "orthogonal", "random", "equiangular"] = (
        Field(
            "default",
            description="what the hypernetwork reads: learned embeddings, or fixed ones: one-hot, "
            "rows of a random orthogonal matrix, random (standard normal), or equiangular (unit "
            "vectors, any two at the same cosine); default: one-hot for hypermarl-linear, else "
            "learned",
        )
    )
    embedding_size: PositiveInt = Field(
        8, description="size of an embedding that is not one-hot or equiangular"
    )
    cosine: Fraction = Field(
        0.5,
        description="cosine of any two agents' equiangular embeddings, from 0, with which "
        "hypermarl-linear without bias is as nops, to 1, with which it is as fups",
    )
    hidden: tuple[PositiveInt, ...] = Field((64,), description="widths of hypermarl's trunks")
    shared_trunk: bool = Field(
        False, description="one trunk for all weights and biases of a network, not one for each"
    )
    bias: bool = Field(
        True, description="heads have a bias, which all agents share; false with one-hot: as nops"
    )
    scaled_init: bool = Field(
        True,
        description="scale the weight heads so that generated layers start with PPO's gains; "
        "false: as in the official code; hypermarl-no-rf starts them as any other layer",
    )


class AdapterConfig(_Section):
    """The low-rank adapters of `--method adapters`."""

    rank: PositiveInt = Field(
        4,
        description="rank of each agent's own change of a layer's weight; of layers with fewer "
        "inputs or outputs, their number",
    )


class DiCoConfig(_Section):
    """The deviations of `--method dico`."""

    snd: NonNegative | None = Field(
        None,
        description="system neural diversity that the policies are scaled to: the mean distance "
        "between two agents' means, in half action ranges (of numbered actions between their "
        "logits); 0: all the same; by default it is left as it comes",
    )


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("must be two numbers, the lower one first")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]


class KaleidoscopeConfig(_Section):
    """The masks of `--method kaleidoscope`."""

    thresholds: Range = Field(
        (-10.0, -5.0),
        description="what the thresholds s of the agents' masks are drawn between; a weight w is "
        "masked where |w| is not above sigmoid(s)",
    )
    diversity: NonNegative = Field(
        0.1, description="how much the masks' diversity counts beside the rest of the loss"
    )
    layer_factor: Annotated[float, Field(gt=0)] = Field(
        2.0, description="how much more each layer counts in it than the layer before"
    )
    window: PositiveInt = Field(
        100, description="steps over whose losses the two are weighed against each other"
    )
    reset_frames: Annotated[int, Field(ge=0)] = Field(
        1_000_000,
        description="draw weights that no agent's mask shows anew after every this many frames, "
        "but for the last time; 0: never",
    )
    reset_share: Fraction = Field(0.5, description="probability of each of them to be drawn")
    critics: Annotated[int, Field(ge=2)] = Field(
        5, description="masks of an off-policy critic, each of which is a critic of its own"
    )
    critic_thresholds: Range = Field((-20.0, 0.0), description="the same as thresholds for them")
    critic_diversity: NonNegative = Field(0.1, description="the same as diversity for them")
    critic_reset_frames: Annotated[int, Field(ge=0)] = Field(
        800_000,
        description="draw one critic's thresholds anew after every this many frames, in turn, but "
        "for the last time; 0: never",
    )


class SePSConfig(_Section):
    """The groups of `--method seps`."""

    groups: PositiveInt | None = Field(
        None,
        description="number of groups of agents, which have a network each (default: the one from "
        "2 to 10, below the number of agents, with the least Davies-Bouldin index)",
    )
    pretraining_frames: PositiveInt = Field(
        20_000,
        description="frames in which all agents share one network and are watched, before they are "
        "grouped by what they went through and start afresh; rounded up to whole updates",
    )
    epochs: PositiveInt = Field(
        10, description="passes of the encoder of agents over what they went through"
    )
    batch_size: PositiveInt = Field(128, description="samples in one step of the encoder")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        3e-3, description="the encoder's step size"
    )


class SharingConfig(_Section):
    """Settings of the sharing schemes, each of which reads its own."""

    hypernetwork: HypernetworkConfig = Field(default_factory=HypernetworkConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    dico: DiCoConfig = Field(default_factory=DiCoConfig)
    kaleidoscope: KaleidoscopeConfig = Field(default_factory=KaleidoscopeConfig)
    seps: SePSConfig = Field(default_factory=SePSConfig)


class NormaliseConfig(_Section):
    """Running scales of what the environment gives."""

    observations: bool = Field(
        False,
        description="shift and scale observations by their running mean and standard deviation",
    )
    rewards: bool = Field(
        False, description="scale rewards by the running standard deviation of discounted returns"
    )
    clip: Annotated[float, Field(gt=0)] = Field(
        10.0, description="cut what is normalised off at plus and minus this"
    )


class EvaluationConfig(_Section):
    """Whole episodes in an environment of their own, beside the training."""

    every: Annotated[int, Field(ge=0)] = Field(
        0, description="evaluate after every this many updates, and after the last; 0: never"
    )
    episodes: PositiveInt = Field(32, description="whole episodes of an evaluation")
    deterministic: bool = Field(
        True, description="act by each policy's likeliest action (argmax, mean); false: draw it"
    )
    seed: Seed | None = Field(
        None, description="seed of the evaluations' environments and actions (default: --seed)"
    )


class TrainConfig(SharingConfig):
    """One training run.

    `preset` says where settings came from; `trainers.presets.with_preset` is what reads it.
    """

    preset: str | None = Field(
        None,
        description="settings of a scenario of the paper, beneath all others; list prints them",
    )
    method: str = Field("hypermarl", description="sharing scheme (nops with happo)")
    actor_method: str | None = Field(
        None, description="sharing scheme of the actors (default: --method)"
    )
    critic_method: str | None = Field(
        None, description="sharing scheme of the critics (default: --method; nops with dico)"
    )
    algorithm: Literal["ippo", "mappo", "happo", "a2c", "matd3", "masac"] = Field(
        "ippo",
        description="ippo: PPO whose critics read their agent's own observation; mappo: that of "
        "all agents; happo: as mappo, one agent after the other, each with what the agents before "
        "it have changed; a2c: advantage actor-critic, one step on each rollout, critics as in "
        "ippo; matd3: off-policy, critics read all agents' observations and actions; masac: the "
        "same with soft actor-critic, whose policies are rewarded for their entropy",
    )
    critic_input: Literal["observations", "state"] = Field(
        "observations",
        description="what critics read, but ippo's and a2c's: observations, those of all agents; "
        "state: the environment's own world state, if it has one (smax, mamujoco)",
    )
    env: str = Field("specialisation", description="environment")
    env_args: dict[str, JsonValue] = Field(
        default_factory=dict, description="keyword arguments to the environment"
    )
    agents: int | None = Field(None, description="number of agents (default: the environment's)")
    pad: bool = Field(
        False,
        description="where agents' observations or actions differ in size, pad them with zeros and "
        "with actions that are never taken",
    )
    reward: Literal["agent", "team"] = Field(
        "agent",
        description="what agents learn from. agent: each its own reward; team: all the mean of all "
        "agents' rewards, as always in happo",
    )
    frames: PositiveInt = Field(
        150_000, description="environment steps, summed over copies; one frame moves all agents"
    )
    copies: PositiveInt = Field(64, description="environment copies stepped at once")
    steps: PositiveInt = Field(32, description="steps of every copy in one rollout")
    seed: Seed = Field(0, description="seed of everything random")
    threads: PositiveInt = Field(1, description="torch threads; more is often slower here")
    diagnostics: Literal["off", "light", "full"] = Field(
        "full",
        description="light: the actors' conflict and norms; full: gradient variance as well, and "
        "the critics'",
    )
    diagnosed_samples: PositiveInt | None = Field(
        None,
        description="diagnose at most this many steps of each agent: whole time steps, spread "
        "over the rollout; of recurrent networks all steps of some copies, at least 8 if there are "
        "as many (default: `every` times 512 for full, 128 for light)",
    )
    every: PositiveInt = Field(10, description="diagnose every this many updates")
    effects_every: PositiveInt | None = Field(
        None,
        description="with full diagnostics, record every this many updates, beside a diagnosis, "
        "coupling, transference, behavioural diversity, and how embeddings are arranged; not of "
        "the untrained networks (default: five times --every)",
    )
    effects_preconditioned: bool = Field(
        False,
        description="transference of the steps that Adam would take of the gradients, from its "
        "first step on, instead of steps along them",
    )
    aggregate: str = Field(
        NONE,
        description="what makes one gradient of the agents' own, an aggregator of torchjd: pcgrad, "
        "upgrad, cagrad, gradvac, mgda, ...; none: their sum, as ever",
    )
    aggregate_args: dict[str, JsonValue] = Field(
        default_factory=dict, description="arguments to the aggregator"
    )
    log: tuple[str, ...] = Field(
        (),
        description="record elsewhere too: tensorboard, wandb, mlflow; may differ on resuming",
    )
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    a2c: A2CConfig = Field(default_factory=A2CConfig)
    matd3: MATD3Config = Field(default_factory=MATD3Config)
    masac: MASACConfig = Field(default_factory=MASACConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    normalise: NormaliseConfig = Field(default_factory=NormaliseConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)

    @model_validator(mode="before")
    @classmethod
    def _with_usual(cls, given: Any) -> Any:  # noqa: ANN401 -- unchecked as yet
        return with_usual(given) if isinstance(given, Mapping) else given

    @property
    def methods(self) -> dict[str, str]:
        """Sharing scheme of each network."""
        return {
            "actor": self.actor_method or self.method,
            "critic": self.critic_method or CRITICS.get(self.method, self.method),
        }

    @property
    def on_policy(self) -> PPOConfig | A2CConfig:
        """Settings of the on-policy algorithm that trains."""
        return self.a2c if self.algorithm == "a2c" else self.ppo

    @property
    def off_policy(self) -> MATD3Config | MASACConfig:
        """Settings of the off-policy algorithm that trains."""
        return self.masac if self.algorithm == "masac" else self.matd3

    @property
    def scheme(self) -> str:
        """The sharing scheme in a word: the actors' and the critics', if they are not of it.

        With the aggregator, if there is one: runs of the same scheme are compared as one.
        """
        aggregator = [] if self.aggregate == NONE else [self.aggregate]
        actor, critic = self.methods.values()
        named = [actor] if critic == CRITICS.get(actor) else [actor, critic]
        return "+".join(dict.fromkeys([*named, *aggregator]))

    @property
    def discount(self) -> float:
        """Discount factor of the algorithm that trains."""
        off = self.algorithm in {"matd3", "masac"}
        return (self.off_policy if off else self.on_policy).discount

    @property
    def recurrent_size(self) -> int | None:
        """Size of the networks' memory; None for feed-forward ones."""
        return None if self.network.memory == "none" else self.network.memory_size

    @property
    def updates(self) -> int:
        """Number of updates: rollouts needed for the frames, rounded up."""
        return -(-self.frames // (self.copies * self.steps))

    @property
    def effects_period(self) -> int:
        """Number of updates from one record of coupling, transference and so on to the next."""
        return self.effects_every or 5 * self.every


def with_usual(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the algorithm's own defaults beneath settings that are given.

    Args:
        given: Nested settings, unchecked.

    Returns:
        Nested settings, unchecked.
    """
    algorithm = given.get("algorithm")
    usual = USUAL.get(algorithm, {}) if isinstance(algorithm, str) else {}
    return {**usual, **given}


def differing_settings(
    recorded: Mapping[str, Any], asked: TrainConfig, *, but: Sequence[str] = ()
) -> str:
    """Name the settings in which a training differs from what is asked for.

    Args:
        recorded: Settings of the training, as JSON holds them; those that are newer than it had
            their defaults.
        asked: What is asked for.
        but: Names of settings that may differ.

    Returns:
        E.g. "ppo.epochs=4, not 5; seed=0, not 1"; empty if there is no difference.

    Raises:
        UsageError: If the recorded settings are none.
    """
    try:
        known = TrainConfig.model_validate(recorded).model_dump(mode="json", exclude=set(but))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"the recorded settings can't be used: `{where}`: {first['msg']}. Go on with the "
            "gradlab that wrote them."
        ) from None
    old, new = flat(known), flat(asked.model_dump(mode="json", exclude=set(but)))
    return "; ".join(
        f"{name}={old.get(name)!r}, not {new.get(name)!r}"
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Take sections apart.

    Args:
        settings: Nested settings.
        prefix: What dotted names begin with.

    Returns:
        Settings by dotted name.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inside = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return found

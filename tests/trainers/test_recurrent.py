"""Recurrent networks: a memory before the layers, and segments of trajectories as samples."""

import numpy as np
import pytest
import torch
from leaving_game import AGENTS, LeavingGame
from reference import per_sample_gradients
from selection import slow_but
from test_update import CLOSE, Plain
from torch import nn
from torch.func import functional_call

from gradlab.checks import UsageError
from gradlab.decomposition import decompose
from gradlab.estimates import FEWEST
from gradlab.run import open_run
from trainers.checkpoints import newest_checkpoint
from trainers.config import SharingConfig, TrainConfig
from trainers.description import describe_generator
from trainers.envs.vector_env import Discrete, EnvSpec, Step, VectorEnv
from trainers.generators import METHODS as SCHEMES
from trainers.loop import Trainer
from trainers.memory import Memory
from trainers.networks import make_network
from trainers.ppo import normalise
from trainers.samples import Weights, exist, of_network
from trainers.train import train_run

COPIES, STEPS, SIZE = 9, 12, 4
SETTINGS = {
    "env": "specialisation-temporal",
    "env_args": {"horizon": 5},
    "agents": AGENTS,
    "copies": COPIES,
    "steps": STEPS,
    "frames": COPIES * STEPS * 4,
    "network": {"hidden": [5], "memory": "gru", "memory_size": SIZE},
    "hypernetwork": {"hidden": [6]},
    "seps": {"pretraining_frames": COPIES * STEPS},
    "ppo": {"minibatches": 2},
    "every": 2,
    "effects_every": 2,
    "evaluation": {"every": 2, "episodes": 5},
}
METHODS = (
    "hypermarl",
    "fups-id",
    "fups-id-nostate",
    "nops",
    "hypermarl-coupled",
    "adapters",
    "dico",
    "kaleidoscope",
    "seps",
)


def trainer_of(**settings):
    return Trainer(TrainConfig.model_validate(SETTINGS | settings))


@pytest.fixture
def leaving(monkeypatch):
    """Let agents leave early."""

    def make(_name, *, copies, seed, **_):
        return LeavingGame(copies, seed=seed, garbage=torch.nan)

    monkeypatch.setattr("trainers.loop.make_env", make)


# --- the memory itself


def draw(random, *shape):
    return torch.randn(*shape, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("form", ["shared", "own bias", "own", "one"])
def test_memory_is_torchs_layer_started_anew_at_each_reset(form):
    random = torch.Generator().manual_seed(0)
    memory, agents, segments, time = Memory(inputs=3, size=5), 2, 4, 7
    theta = {}
    for name, shape in memory.shapes.items():
        own = form == "own" or (form == "own bias" and name == "encoder.bias")
        theta[name] = draw(random, agents if own else 1, *shape)
    observation = draw(random, agents, segments, time, 3)
    state = draw(random, agents, segments, 5)
    starts = torch.rand(agents, segments, time, generator=random) < 0.3
    starts[0, 0] = False
    if form == "one":  # as a sample is seen by per-sample gradients

        def follow(agent, segment):
            own = {name: tensor[0] for name, tensor in theta.items()}
            at = agent, segment
            return memory.over_time(own, observation[at], state[at], starts[at])

        found = torch.stack([
            torch.stack([follow(i, s) for s in range(segments)]) for i in range(agents)
        ])
    else:
        found = memory.over_time(theta, observation, state, starts)
    layer = nn.GRU(5, 5).double()
    for agent, segment in np.ndindex(agents, segments):
        own = {name: t[agent if len(t) > 1 else 0] for name, t in theta.items()}
        layer.load_state_dict({
            f"{name.removeprefix('gru.')}_l0": t for name, t in own.items() if "gru" in name
        })
        dense = observation[agent, segment] @ own["encoder.weight"].mT + own["encoder.bias"]
        held, begin = state[agent, segment], 0
        for t in [*starts[agent, segment].nonzero()[:, 0].tolist(), time]:
            if t > begin:
                expected, _ = layer(dense[begin:t].clamp(min=0), held[None])
                torch.testing.assert_close(found[agent, segment, begin:t], expected, **CLOSE)
            held, begin = torch.zeros(5, dtype=torch.float64), t


def test_gradients_of_the_fused_and_the_stepwise_memory_agree():
    random = torch.Generator().manual_seed(0)
    memory = Memory(inputs=3, size=5)
    shared = {name: draw(random, 1, *shape) for name, shape in memory.shapes.items()}
    observation, state = draw(random, 2, 4, 6, 3), draw(random, 2, 4, 5)
    starts = torch.rand(2, 4, 6, generator=random) < 0.3
    found = []
    for agents in (1, 2):
        leaves = {n: t.clone().requires_grad_() for n, t in shared.items()}
        theta = {n: t.expand(agents, *t.shape[1:]) for n, t in leaves.items()}
        memory.over_time(theta, observation, state, starts).square().sum().backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# --- collecting


@pytest.mark.parametrize("algorithm", ["ippo", "mappo"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("leaving")
def test_segments_repeat_what_was_collected(method, algorithm):
    trainer = trainer_of(method=method, algorithm=algorithm)
    for _ in range(2):  # the second starts in the midst of episodes
        samples = trainer._collect().samples
        assert samples["observation"].shape == (AGENTS, COPIES, STEPS, 4)
        actor = of_network(samples, "actor")
        theta = trainer.actor.policy_for(samples["observation"])
        _, log_ratio = trainer.learner.policy_loss.with_log_ratio(
            theta, actor | {"advantage": samples["advantage"]}
        )
        torch.testing.assert_close(log_ratio, torch.zeros_like(log_ratio), rtol=0, atol=1e-5)
        critic = of_network(samples, "critic")
        critic["observation"] = trainer.learner.critic.input(samples["observation"])
        theta = trainer.critic.policy_for(critic["observation"])
        value = trainer.critic.mlp.forward(theta, trainer.critic.mlp.read(theta, critic)).squeeze(
            -1
        )
        torch.testing.assert_close(value, samples["value"], rtol=1e-4, atol=1e-5)
    assert samples["actor_memory"].abs().sum() > 0
    assert 0 < samples["starts"].float().mean() < 0.5


def test_a_cut_off_episode_is_valued_by_what_its_memory_holds():
    trainer = trainer_of(ppo={"gae_lambda": 0.0, "minibatches": 2}, steps=5)
    steps, plain = [], trainer.collector.env.step

    def step(action):
        steps.append(plain(action))
        return steps[-1]

    trainer.collector.env.step = step
    samples = trainer._collect().samples
    assert steps[-1].truncated.all()
    theta = trainer.critic.all_agents()
    whole = torch.cat([samples["observation"], steps[-1].final_observation[:, :, None]], 2)
    held = trainer.critic.mlp.memory.over_time(theta, whole, samples["critic_memory"])
    following = trainer.critic.mlp.forward(theta, held[:, :, -1]).squeeze(-1)
    expected = steps[-1].reward + 0.99 * following
    torch.testing.assert_close(samples["target"][..., -1], expected, rtol=1e-4, atol=1e-5)


# --- sharing schemes


SHARED_GRU = SIZE * (4 + 1) + 6 * SIZE * (SIZE + 1)  # of a memory that reads 4 numbers


@pytest.mark.parametrize(
    ("method", "memory", "made"),
    [
        ("fups", SHARED_GRU, False),
        ("fups-id", SHARED_GRU + 3 * SIZE, False),
        ("fups-id-nostate", SHARED_GRU + 3 * SIZE - 4 * SIZE, False),
        ("nops", 3 * SHARED_GRU, False),
        ("hypermarl", SHARED_GRU, True),
        ("hypermarl-linear", SHARED_GRU, True),
        ("hypermarl-coupled", SHARED_GRU, True),
    ],
)
def test_what_is_shared_and_what_is_made(method, memory, made):
    form = {"hidden": (5,), "activation": "tanh", "memory_size": SIZE, "head_gain": 1.0}
    network, config = make_network(4, 2, **form), SharingConfig()
    generator = SCHEMES[method](network, 3, torch.Generator().manual_seed(0), config)
    found = describe_generator("actor", method, generator)
    trained = sum(p.numel() for p in generator.parameters())
    assert found.psi == trained == SCHEMES[method].parameters(network, 3, config)
    assert found.theta == network.size == SHARED_GRU + SIZE * 5 + 5 + 5 * 2 + 2
    assert found.widths == (4, SIZE, 5, 2)
    layers = {layer.name: layer.psi for layer in found.layers}
    assert list(layers)[:4] == ["encoder", "gru", "layer0", "head"]
    assert layers["encoder"] + layers["gru"] == memory
    theta = generator.policy_for(torch.zeros(3, 2, 6, 4))
    for name, tensor in theta.items():
        of_memory = name.partition(".")[0] in ("encoder", "gru")
        own = made != of_memory if made else method == "nops"
        if name == "encoder.bias" and method.startswith("fups-id"):
            own = True
        steps = (2, 6) if generator.reads_observation and not of_memory else ()
        assert tensor.shape[: 1 + len(steps)] == (3 if own else 1, *steps), name


def test_a_memory_starts_orthogonal():
    generator = trainer_of(method="fups", network={"memory": "gru", "memory_size": 16}).actor
    theta = {name: tensor[0].detach() for name, tensor in generator.all_agents().items()}
    dense = theta["encoder.weight"]
    torch.testing.assert_close(dense.mT @ dense, 2 * torch.eye(dense.shape[1]))
    for gate in theta["gru.weight_hh"].chunk(3):
        torch.testing.assert_close(gate @ gate.mT, torch.eye(16), rtol=1e-5, atol=1e-5)
    assert theta["gru.weight_ih"].std() == pytest.approx(1 / 4, rel=0.1)
    assert all((tensor == 0).all() for name, tensor in theta.items() if "bias" in name)


# --- training


class RecurrentPlain(Plain):
    """The plain implementation with a gated unit, segment by segment."""

    def losses(self, batch):
        self.batch = batch
        flat = ("action", "log_prob", "advantage", "value", "target")
        steps = {name: batch[name].flatten(1, 2) for name in flat}
        return super().losses({**batch, **steps})

    def output(self, which, agent, x):
        psi = self.psi[which]
        own = {n: p[agent] if self.method == "nops" else p for n, p in psi.items()}
        memory = self.batch["actor_memory" if which == 0 else "critic_memory"]
        rows = []
        for segment, seen in enumerate(x):
            h = memory[agent, segment]
            for t, o in enumerate(seen):
                if self.batch["starts"][agent, segment, t]:
                    h = torch.zeros_like(h)
                e = own["encoder/weight"] @ o + own["encoder/bias"]
                if self.method == "fups-id":
                    e = e + psi["id_columns"][agent]
                e = e.clamp(min=0)
                from_input = own["gru/weight_ih"] @ e + own["gru/bias_ih"]
                from_state = own["gru/weight_hh"] @ h + own["gru/bias_hh"]
                r, z = (
                    1 / (1 + torch.exp(-from_input[k : k + SIZE] - from_state[k : k + SIZE]))
                    for k in (0, SIZE)
                )
                new = torch.tanh(from_input[2 * SIZE :] + r * from_state[2 * SIZE :])
                h = (1 - z) * new + z * h
                y = torch.tanh(own["layer0/weight"] @ h + own["layer0/bias"])
                rows.append(own["head/weight"] @ y + own["head/bias"])
        return torch.stack(rows), own.get("log_std")


@pytest.mark.parametrize("algorithm", ["ippo", "mappo"])
@pytest.mark.parametrize("method", ["fups", "fups-id", "nops"])
def test_update_is_that_of_a_plain_implementation(method, algorithm):
    ppo = {"minibatches": 2, "epochs": 2, "learning_rate": 0.01, "clip": 0.05}
    ppo |= {"entropy_coefficient": 0.03, "max_gradient_norm": 0.2}
    trainer = trainer_of(method=method, algorithm=algorithm, ppo=ppo, copies=4, steps=7)
    samples = {
        n: t.double() if t.is_floating_point() else t for n, t in trainer._collect().samples.items()
    }
    random = torch.Generator().manual_seed(3)
    for network in (trainer.actor.double(), trainer.critic.double()):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.2 * draw(random, *parameter.shape)
    for name in ("actor_memory", "critic_memory", "advantage"):
        samples[name] = samples[name] + 0.3 * draw(random, *samples[name].shape)
    assert samples["starts"].any()
    plain = RecurrentPlain(trainer)
    order = torch.Generator()
    order.set_state(trainer.random.get_state())
    before = [p.detach().clone() for p in trainer.actor.parameters()]
    found = trainer._update(samples)
    for _ in range(2):
        for part in torch.randperm(4, generator=order).tensor_split(2):
            batch = {name: tensor[:, part] for name, tensor in samples.items()}
            policy, value, _ = plain.losses(batch)
            plain.steps += 1
            plain.step(0, policy)
            plain.step(1, value)
    for network, psi in zip((trainer.actor, trainer.critic), plain.psi, strict=True):
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter, psi[name.removeprefix("theta.")], **CLOSE)
    moved = [torch.dist(a, b) for a, b in zip(before, trainer.actor.parameters(), strict=True)]
    assert min(moved) > 1e-4
    assert 0 < found["clip_fraction"].values < 1


class CueGame(VectorEnv):
    """The first observation is a cue; the last action must name it."""

    def __init__(self, copies, horizon=4):
        self.copies, self.horizon, self.time = copies, horizon, 0
        self.random = torch.Generator().manual_seed(0)
        self.spec = EnvSpec(
            name="cue",
            agent_names=("agent_0", "agent_1"),
            observation_size=3,
            action_space=Discrete(n=2),
        )

    def reset(self):
        self.time = 0
        self.cue = torch.randint(2, (2, self.copies), generator=self.random)
        return torch.cat([nn.functional.one_hot(self.cue, 2), self._late()], dim=-1).float()

    def _late(self):
        return torch.full((2, self.copies, 1), self.time)

    def step(self, action):
        self.time += 1
        last = self.time == self.horizon
        reward = (action == self.cue).float() * last
        final = torch.cat([torch.zeros(2, self.copies, 2), self._late()], dim=-1).float()
        everywhere = torch.full((self.copies,), last)
        return Step(
            observation=self.reset() if last else final,
            reward=reward,
            terminated=everywhere,
            truncated=torch.zeros_like(everywhere),
            final_observation=final,
        )

    def state(self):
        return {"/cue": self.cue, "/random": self.random.get_state()}, {"time": self.time}

    def load_state(self, tensors, values):
        self.cue, self.time = tensors["/cue"], values["time"]
        self.random.set_state(tensors["/random"])


@pytest.mark.parametrize(
    ("method", "memory"),
    slow_but(
        [("hypermarl", "gru"), ("nops", "gru"), ("fups", "none")],
        ("hypermarl", "gru"),
    ),
)
def test_only_a_memory_answers_a_cue_that_is_gone(tmp_path, monkeypatch, method, memory):
    monkeypatch.setattr("trainers.loop.make_env", lambda *_, copies, **__: CueGame(copies))
    network = {"hidden": [16], "memory": memory, "memory_size": 16}
    config = TrainConfig.model_validate({
        "method": method,
        "copies": 64,
        "steps": 8,
        "frames": 64 * 8 * 30,
        "network": network,
        "ppo": {"learning_rate": 0.005, "minibatches": 2},
        "diagnostics": "off",
    })
    assert train_run(config, tmp_path / "r")
    found = np.mean(open_run(tmp_path / "r").quantity("episode_return")[-5:])
    if memory == "gru":
        assert found > 0.95
    else:
        assert found == pytest.approx(0.5, abs=0.1)


RESUMED = {
    "hypermarl": {"method": "hypermarl"},
    "nops, mappo": {"method": "nops", "algorithm": "mappo", "normalise": {"observations": True}},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_training_remembers(tmp_path, case):
    def train(folder, stop_after=None):
        done = []
        train_run(
            TrainConfig.model_validate(SETTINGS | RESUMED[case]),
            folder,
            resume=True,
            progress=lambda frames, _: done.append(frames // (COPIES * STEPS)),
            stop=lambda: done[-1] == stop_after,
            tell=pytest.fail,
        )
        return newest_checkpoint(folder)[0].tensors

    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_after=2)
    resumed = train(tmp_path / "parts")
    assert whole["memory.actor"].abs().sum() > 0
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    one, other = (open_run(tmp_path / name) for name in ("whole", "parts"))
    for name in set(one.quantities) - {"seconds"}:
        np.testing.assert_array_equal(one.quantity(name).values, other.quantity(name).values)


# --- diagnostics


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("leaving")
def test_parts_add_up_to_the_gradient_that_is_trained_on(method):
    trainer = trainer_of(method=method, steps=4)
    samples = trainer._collect().samples
    samples = {n: t.double() if t.is_floating_point() else t for n, t in samples.items()}
    samples["active"] = samples["active"].clone()
    samples["active"][1, :3] = False  # whole segments without their agent
    trainer.actor.double()
    mask = exist(samples)
    assert not mask.all()
    batch = of_network(samples, "actor")
    batch["advantage"] = normalise(batch["advantage"], batch["active"])
    read = ("observation", "action", "log_prob", "advantage", "memory", "starts", "active")
    batch = {name: batch[name] for name in read}
    d = decompose(trainer.actor, trainer.learner.policy_loss, batch, mask=mask)
    assert d.residual < 1e-10
    losses = trainer.learner.policy_loss(trainer.actor.policy_for(batch["observation"]), batch)
    Weights.of(mask)(losses).mean().backward()
    trained = torch.cat([p.grad.flatten() for p in trainer.actor.parameters()])
    torch.testing.assert_close(AGENTS * trained, d.total, **CLOSE)
    if trainer.actor.reads_observation:
        return

    def forward(psi, agent):
        theta = functional_call(trainer.actor, psi, (torch.tensor([agent]),))
        return {name: tensor[0] for name, tensor in theta.items()}

    psi = {name: p.detach() for name, p in trainer.actor.named_parameters()}
    each = per_sample_gradients(forward, trainer.learner.policy_loss, psi, batch, AGENTS, COPIES)
    means = torch.stack([each[i, mask[i]].mean(0) for i in range(AGENTS)])
    torch.testing.assert_close(d.g, means, **CLOSE)


@pytest.mark.parametrize("method", ["hypermarl", "nops"])
def test_diagnosed_segments_are_enough_for_intervals(tmp_path, method):
    config = SETTINGS | {"method": method, "copies": 12, "diagnosed_samples": 2, "effects_every": 2}
    assert train_run(TrainConfig.model_validate(config), tmp_path / "r", tell=pytest.fail)
    run = open_run(tmp_path / "r")
    assert (run.quantity("samples") == FEWEST).all()
    assert (run.quantity("residual") < 1e-10).all()
    assert np.isfinite(run.quantity("cosine_low").sel(space="theta", layer="gru")).any()
    assert np.isfinite(run.quantity("snd")).any()
    assert np.isfinite(run.quantity("transference")).any()


def test_more_minibatches_than_copies_are_refused():
    rule = r"`ppo.minibatches` must be at most 9: .* \(a segment of each copy\). Got .*10"
    with pytest.raises(UsageError, match=rule):
        trainer_of(ppo={"minibatches": 10})

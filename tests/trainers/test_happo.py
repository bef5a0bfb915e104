"""HAPPO: agents one after the other, each on what those before it have left of the advantages."""

import math
import re

import numpy as np
import pytest
import torch
from leaving_game import LeavingGame
from selection import slow_but
from torch import nn
from torch.distributions import Categorical, Normal

from gradlab.cli import run as main
from gradlab.run import open_run
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.envs.matrix_games import specialisation_reward
from trainers.finite import NotFinite
from trainers.happo import HAPPO
from trainers.loop import Trainer
from trainers.presets import load_preset
from trainers.train import train_run

AGENTS, COPIES, STEPS = 3, 4, 5
UPDATES = 8
SAMPLES = COPIES * STEPS
PPO = {
    "epochs": 3,
    "minibatches": 3,  # 20 samples: 7, 7 and 6
    "learning_rate": 0.02,
    "clip": 0.1,
    "entropy_coefficient": 0.03,
    "max_gradient_norm": 0.2,
}
SMALL = {
    "algorithm": "happo",
    "env": "specialisation-temporal",
    "agents": AGENTS,
    "copies": COPIES,
    "steps": STEPS,
    "network": {"hidden": [6, 5]},
    "ppo": PPO,
}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def trainer_of(**settings):
    return Trainer(TrainConfig.model_validate(SMALL | settings))


def double(trainer):
    """The trainer in float64."""
    for network in trainer.learner.networks.values():
        network.double()
    trainer.learner.prepare()
    return trainer


def case(env, *, leaving):
    """A trainer in float64, and a rollout that no environment gave."""
    trainer, random = double(trainer_of(env=env)), torch.Generator().manual_seed(1)
    for network in trainer.learner.networks.values():
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=random)

    def draw(*shape):
        return torch.randn(AGENTS, SAMPLES, *shape, generator=random, dtype=torch.float64)

    samples = {"observation": draw(trainer.spec.observation_size), "value": draw()}
    with torch.no_grad():
        theta = trainer.actor.all_agents()
        action, log_prob = trainer.policy.sample(theta, samples["observation"], random)
    samples |= {"action": action, "log_prob": log_prob + 0.1 * draw(), "advantage": 2 + draw()}
    samples["target"] = samples["advantage"] + samples["value"]
    if leaving:
        samples["active"] = torch.rand(AGENTS, SAMPLES, generator=random) < 0.7
    return trainer, samples


class Reference:
    """HAPPO written out: modules and an optimiser of each agent's own, ratios sample by sample."""

    def __init__(self, trainer):
        self.config = trainer.config.ppo
        theta = trainer.actor.all_agents()
        self.numbered = "log_std" not in theta
        self.actors = [self.network(trainer.actor.mlp, theta, agent) for agent in range(AGENTS)]
        self.log_std = [
            None if self.numbered else nn.Parameter(theta["log_std"][agent].detach().clone())
            for agent in range(AGENTS)
        ]
        self.critic = self.network(trainer.critic.mlp, trainer.critic.all_agents(), 0)
        self.trained = [
            [*net.parameters(), *([] if free is None else [free])]
            for net, free in zip(self.actors, self.log_std, strict=True)
        ] + [[*self.critic.parameters()]]
        self.optimisers = [
            torch.optim.Adam(of, lr=self.config.learning_rate, eps=self.config.adam_epsilon)
            for of in self.trained
        ]

    @staticmethod
    def network(mlp, theta, agent):
        made = []
        for layer, (outputs, inputs) in mlp.layers.items():
            linear = nn.Linear(inputs, outputs).double()
            with torch.no_grad():
                linear.weight.copy_(theta[f"{layer}.weight"][agent])
                linear.bias.copy_(theta[f"{layer}.bias"][agent])
            made += [linear, nn.Tanh()]
        return nn.Sequential(*made[:-1])

    def log_prob(self, agent, observation, action):
        output = self.actors[agent](observation)
        if self.numbered:
            density = Categorical(logits=output)
            return density.log_prob(action), density.entropy()
        density = Normal(output, self.log_std[agent].exp())
        return density.log_prob(action).sum(-1), density.entropy().sum(-1)

    def step(self, which, loss):
        self.optimisers[which].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained[which], self.config.max_gradient_norm)
        self.optimisers[which].step()

    def update(self, samples, random):
        config = self.config
        active = samples.get("active", torch.ones(AGENTS, SAMPLES, dtype=torch.bool))
        there = samples["advantage"][active]
        advantage = (samples["advantage"] - there.mean()) / (there.std() + 1e-8)
        weight = active.double() * SAMPLES / active.sum(1, keepdim=True)
        compounded = [1.0] * SAMPLES
        strayed = [0.0] * AGENTS
        for agent in torch.randperm(AGENTS, generator=random).tolist():
            weighed = torch.tensor(compounded, dtype=torch.float64) * advantage[agent]
            acted = active[agent].tolist()
            strayed[agent] = np.mean([
                abs(m - 1) for m, was in zip(compounded, acted, strict=True) if was
            ])
            seen, did, old = (samples[n][agent] for n in ("observation", "action", "log_prob"))
            for _ in range(config.epochs):
                for part in torch.randperm(SAMPLES, generator=random).split(7):
                    log_prob, entropy = self.log_prob(agent, seen[part], did[part])
                    ratio, gain = (log_prob - old[part]).exp(), weighed[part]
                    inside = ratio.clip(1 - config.clip, 1 + config.clip)
                    gain = torch.where(ratio * gain < inside * gain, ratio * gain, inside * gain)
                    loss = -gain - config.entropy_coefficient * entropy
                    self.step(agent, (weight[agent, part] * loss).sum() / len(part))
            for sample in range(SAMPLES):
                if acted[sample]:
                    new, _ = self.log_prob(agent, seen[sample], did[sample])
                    compounded[sample] *= math.exp(new.item() - old[sample].item())
        joint = torch.cat([*samples["observation"]], dim=-1)
        for _ in range(config.epochs):
            for part in torch.randperm(SAMPLES, generator=random).split(7):
                value = self.critic(joint[part])[:, 0]
                old, target = samples["value"][:, part], samples["target"][:, part]
                inside = old + (value - old).clip(-config.clip, config.clip)
                error = torch.maximum((value - target) ** 2, (inside - target) ** 2)
                mean = (weight[:, part] * error).sum() / (AGENTS * len(part))
                self.step(-1, config.value_coefficient * mean / 2)
        return strayed


ROLLOUTS = {
    "numbered": {"env": "specialisation-temporal", "leaving": False},
    "numbered, some leave": {"env": "specialisation-temporal", "leaving": True},
    "continuous": {"env": "vmas/navigation", "leaving": False},
    "continuous, some leave": {"env": "vmas/navigation", "leaving": True},
}


@pytest.mark.parametrize("rollout", slow_but(ROLLOUTS, "numbered, some leave", "continuous"))
def test_update_is_that_of_a_slow_reference(monkeypatch, rollout):
    monkeypatch.setattr("trainers.update.ROWS", 3)  # chunks
    monkeypatch.setattr("trainers.happo.ROWS", 6)
    trainer, samples = case(**ROLLOUTS[rollout])
    reference, random = Reference(trainer), torch.Generator()
    random.set_state(trainer.random.get_state())
    found = trainer._update(samples)
    strayed = reference.update(samples, random)
    np.testing.assert_allclose(found["compounding"].values, strayed, rtol=1e-9)
    assert sorted(np.array(strayed) > 0.01) == [False, True, True]  # the first agent's M is 1
    theta = trainer.actor.all_agents()
    for agent in range(AGENTS):
        made = reference.network(trainer.actor.mlp, theta, agent)
        for ours, plain in zip(
            made.parameters(), reference.actors[agent].parameters(), strict=True
        ):
            torch.testing.assert_close(ours, plain, **CLOSE)
        if not reference.numbered:
            torch.testing.assert_close(theta["log_std"][agent], reference.log_std[agent], **CLOSE)
    made = reference.network(trainer.critic.mlp, trainer.critic.all_agents(), 0)
    for ours, plain in zip(made.parameters(), reference.critic.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, **CLOSE)


def returns_of_steps(monkeypatch, agents, *, compounds):
    """Exact expected returns in the Specialisation game, first and after each agent's passes.

    The rollout holds every joint action once. Its advantages are multiplied by how likely it is,
    so that means over the rollout are expectations, and nothing is drawn.
    """
    joint = agents**agents
    ppo = {"learning_rate": 0.02, "epochs": 8, "clip": 0.5, "minibatches": 1}
    trainer = double(
        trainer_of(
            env="specialisation",
            agents=agents,
            copies=joint,
            steps=1,
            network={"hidden": [8]},
            ppo=ppo | {"entropy_coefficient": 0.0},
        )
    )
    with torch.no_grad():
        trainer.actor.theta["head/bias"][:, 0] += 1  # all begin with the same preference
    action = torch.cartesian_prod(*[torch.arange(agents)] * agents).mT.contiguous()
    reward = specialisation_reward(action, agents).double().mean(0)
    shape = (agents, joint, trainer.spec.observation_size)
    samples = {"observation": torch.ones(shape, dtype=torch.float64), "action": action}
    samples |= dict.fromkeys(("value", "target"), torch.zeros(agents, joint, dtype=torch.float64))

    def log_prob():
        with torch.no_grad():
            theta = trainer.actor.all_agents()
            return trainer.policy.evaluate(theta, samples["observation"], action)[0]

    def expected():
        return (log_prob().sum(0).exp() * reward).sum().item()

    moved, found = HAPPO.moved, [expected()]

    def watched(self, agent, own):
        found.append(expected())
        ratio = moved(self, agent, own)
        return ratio if compounds else torch.ones_like(ratio)

    monkeypatch.setattr(HAPPO, "moved", watched)
    for _ in range(UPDATES):
        samples["log_prob"] = log_prob()
        chance = samples["log_prob"].sum(0).exp()
        advantage = (reward - (chance * reward).sum()) * chance * joint
        trainer._update({**samples, "advantage": advantage.expand(agents, -1)})
    assert len(found) == 1 + UPDATES * agents
    return np.array(found)


@pytest.mark.parametrize("agents", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_agents_update_raises_the_exact_return_of_a_matrix_game(monkeypatch, agents):
    found = returns_of_steps(monkeypatch, agents, compounds=True)
    assert (np.diff(found) > 0).all()
    assert found[0] < 0.7
    assert found[-1] > 0.999
    monkeypatch.undo()
    # Blind to what the others have changed, agents leave the same action for the same other one.
    blind = returns_of_steps(monkeypatch, agents, compounds=False)
    assert np.diff(blind).min() < -0.01


def ends(folder):
    checkpoint, problems = newest_checkpoint(folder)
    assert not problems
    return checkpoint.tensors


RUNS = {
    "numbered, leaving": {},
    "continuous": {"env": "vmas/navigation", "env_args": {"max_steps": 5}},
    "recurrent": {"network": {"hidden": [6], "memory": "gru", "memory_size": 4}},
}


@pytest.mark.parametrize("run", slow_but(RUNS, "numbered, leaving"))
def test_diagnosed_run_is_exact_and_ends_with_the_weights_of_a_plain_one(
    tmp_path, monkeypatch, run
):
    def make(_name, *, copies, seed, **_):
        return LeavingGame(copies, seed=seed, garbage=torch.nan)

    if "leaving" in run:
        monkeypatch.setattr("trainers.loop.make_env", make)
    settings = {"frames": 4 * SAMPLES, "every": 2, "effects_every": 2, **RUNS[run]}
    settings["ppo"] = PPO | {"minibatches": 2, "target_kl": 0.002}
    for level in ("full", "off"):
        config = TrainConfig.model_validate(SMALL | settings | {"diagnostics": level})
        assert train_run(config, tmp_path / level, tell=lambda _: None)
    tensors, plain = ends(tmp_path / "full"), ends(tmp_path / "off")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tensors.items())
    assert sum(name.startswith("adam.") for name in tensors) > 3 * AGENTS
    found = open_run(tmp_path / "full")
    assert found.quantity("residual").sizes == {"update": 2, "network": 2}
    assert found.quantity("residual").max() < 1e-10
    coupling = found.quantity("coupling").sel(network="actor", layer="all")
    assert float(coupling.sel(agent=0, agent_other=1).max()) == 0
    compounding = found.quantity("compounding")
    assert ((compounding == 0).sum("agent") == 1).all()  # whoever came first
    assert len(set(compounding.argmin("agent").values.tolist())) > 1
    assert (found.method_of("actor"), found.method_of("critic")) == ("nops", "fups")


def test_ratio_is_1_before_an_update_also_with_a_memory():
    for network in ({}, {"memory": "gru", "memory_size": 4}):
        trainer = trainer_of(network=network, ppo=PPO | {"minibatches": 2})
        trainer._next_update()
        samples = trainer._collect().samples
        for agent in range(AGENTS):
            own = {name: tensor[agent : agent + 1] for name, tensor in samples.items()}
            ratio = trainer.learner.moved(agent, own)
            assert ratio.shape == samples["log_prob"].shape[1:]
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


def test_what_is_not_finite_is_told_of_its_agent():
    for name in ("log_prob", "advantage"):
        trainer = trainer_of()
        samples = trainer._collect().samples
        samples[name][2] = -torch.inf if name == "log_prob" else torch.nan
        before = [p.detach().clone() for p in trainer.critic.parameters()]
        with pytest.raises(NotFinite, match=r"^policy_loss is \S+ \(agent \d\)$") as error:
            trainer._update(samples)
        if name == "log_prob":  # of the advantages all agents have the same mean
            assert "agent 2" in str(error.value)
        assert all(map(torch.equal, before, trainer.critic.parameters()))


def test_defaults_are_those_of_the_algorithm_and_give_way():
    plain = TrainConfig(algorithm="happo")
    assert (plain.method, plain.reward, plain.scheme) == ("nops", "team", "nops+fups")
    again = TrainConfig.model_validate(plain.model_dump(mode="json"))
    assert again == plain
    assert TrainConfig(algorithm="happo", critic_method="nops").scheme == "nops"
    assert TrainConfig(algorithm="mappo").scheme == "hypermarl"
    assert "HAPPO" in load_preset("mamujoco-ant-4x2").algorithms
    games = load_preset("specialisation").under({"algorithm": "happo"})
    assert games["network"] == load_preset("specialisation").under({"method": "nops"})["network"]


BAD = {
    "shared policies": (["--method", "fups"], "`method` must be nops with --algorithm happo"),
    "shared actors": (["--actor-method", "hypermarl"], "`actor_method` must be nops with"),
    "own rewards": (["--reward", "agent"], "`reward` must be team with --algorithm happo"),
    "aggregated": (["--aggregate", "pcgrad"], "`aggregate` must be none with --algorithm happo"),
    "shared log_std": (["--network.log-std", "shared"], "`network.log_std` must be default or ag"),
    "preconditioned": (["--effects-preconditioned", "true"], "`effects_preconditioned` must be f"),
    "too few samples": (["--copies", "1", "--steps", "2"], "`ppo.minibatches` must be at most 2"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_settings_are_told_in_one_line(bad, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, said = BAD[bad]
    assert main(["train", "--algorithm", "happo", "--copies", "2", *options]) == 2
    printed = capsys.readouterr().err
    assert re.search(rf"^(gradlab: )?(error: )?{re.escape(said)}", printed, re.MULTILINE), printed
    assert "Traceback" not in printed

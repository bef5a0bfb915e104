"""GAE, the losses and one whole update against a plain implementation, agent by agent."""

import math

import numpy as np
import pytest
import torch

from trainers.config import TrainConfig
from trainers.gae import advantages
from trainers.loop import Trainer

AGENTS, COPIES, STEPS = 3, 4, 5
PPO = {
    "epochs": 3,
    "minibatches": 3,  # 20 samples: 7, 7 and 6
    "learning_rate": 0.01,
    "clip": 0.1,
    "entropy_coefficient": 0.03,
    "max_gradient_norm": 0.2,
}
A2C = {"learning_rate": 0.01, "entropy_coefficient": 0.03, "max_gradient_norm": 0.2}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def make(algorithm, method, env, **ppo):
    """A trainer in float64, and a rollout that no environment gave."""
    trainer = Trainer(
        TrainConfig.model_validate({
            "algorithm": algorithm,
            "method": method,
            "env": env,
            "agents": AGENTS,
            "copies": COPIES,
            "steps": STEPS,
            "network": {"hidden": [6, 5]},
            "ppo": PPO | ppo,
            "a2c": A2C,
        })
    )
    random = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(AGENTS, STEPS, COPIES, *shape, generator=random, dtype=torch.float64)

    for network in (trainer.actor.double(), trainer.critic.double()):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    rollout = {
        "observation": draw(trainer.spec.observation_size),
        "value": draw(),
        "next_value": draw(),
        "reward": draw(),
    }
    with torch.no_grad():
        seen = rollout["observation"].flatten(1, 2)
        action, log_prob = trainer.policy.sample(trainer.actor.policy_for(seen), seen, random)
    shape = (AGENTS, STEPS, COPIES)
    rollout["action"] = action.unflatten(1, shape[1:])
    rollout["log_prob"] = log_prob.unflatten(1, shape[1:]) + 0.1 * draw()
    ends = torch.rand(2, STEPS, COPIES, generator=random) < 0.2
    rollout["terminated"], rollout["truncated"] = ends[0], ends[1] & ~ends[0]
    return trainer, rollout


def plain_gae(rollout, discount, gae_lambda):
    found = np.zeros((AGENTS, STEPS, COPIES))
    for agent, copy in np.ndindex(AGENTS, COPIES):
        following = 0.0
        for t in reversed(range(STEPS)):
            ended = rollout["terminated"][t, copy] or rollout["truncated"][t, copy]
            bootstrap = 0.0 if rollout["terminated"][t, copy] else discount
            delta = rollout["reward"][agent, t, copy] - rollout["value"][agent, t, copy]
            delta += bootstrap * rollout["next_value"][agent, t, copy]
            following = float(delta) + (0.0 if ended else discount * gae_lambda * following)
            found[agent, t, copy] = following
    return torch.from_numpy(found)


class Plain:
    """Networks as lists of matrices, PPO and Adam written out."""

    def __init__(self, trainer):
        self.config, self.method = trainer.config, trainer.config.method
        self.psi = [
            {
                name.removeprefix("theta."): p.detach().clone().requires_grad_()
                for name, p in network.named_parameters()
            }
            for network in (trainer.actor, trainer.critic)
        ]
        self.first = [{n: torch.zeros_like(p) for n, p in psi.items()} for psi in self.psi]
        self.second = [{n: torch.zeros_like(p) for n, p in psi.items()} for psi in self.psi]
        self.steps = 0

    def output(self, which, agent, x):
        psi = self.psi[which]
        own = {n: p[agent] if self.method == "nops" else p for n, p in psi.items()}
        for layer in ("layer0", "layer1", "head"):
            x = x @ own[f"{layer}/weight"].mT + own[f"{layer}/bias"]
            if layer == "layer0" and self.method == "fups-id":
                x = x + psi["id_columns"][agent]
            if layer != "head":
                x = torch.tanh(x)
        return x, own.get("log_std")

    def critic_reads(self, observation, agent):
        if self.config.algorithm != "mappo":
            return observation[agent]
        return torch.cat([observation[other] for other in range(AGENTS)], dim=-1)

    def losses(self, batch):
        ppo = self.config.ppo
        advantage = batch["advantage"]
        centred = advantage - advantage.sum() / advantage.numel()
        deviation = (centred.square().sum() / (advantage.numel() - 1)).sqrt()
        advantage = centred / (deviation + 1e-8)
        policy, value, log_ratios = [], [], []
        for agent in range(AGENTS):
            x, action = batch["observation"][agent], batch["action"][agent]
            output, log_std = self.output(0, agent, x)
            if log_std is None:
                p = output.exp() / output.exp().sum(-1, keepdim=True)
                log_prob = torch.stack([row[a] for row, a in zip(p, action, strict=True)]).log()
                entropy = -(p * p.log()).sum(-1)
            else:
                density = torch.distributions.Normal(output, log_std.exp())
                log_prob, entropy = density.log_prob(action).sum(-1), density.entropy().sum(-1)
            log_ratio = log_prob - batch["log_prob"][agent]
            ratio, a = log_ratio.exp(), advantage[agent]
            inside = torch.where(ratio > 1 + ppo.clip, 1 + ppo.clip, ratio)
            inside = torch.where(ratio < 1 - ppo.clip, 1 - ppo.clip, inside)
            gain = torch.where(ratio * a < inside * a, ratio * a, inside * a)
            policy.append(-gain - ppo.entropy_coefficient * entropy)
            log_ratios.append(log_ratio.detach())
            new, _ = self.output(1, agent, self.critic_reads(batch["observation"], agent))
            old, target = batch["value"][agent], batch["target"][agent]
            step = torch.clip(new[:, 0] - old, -ppo.clip, ppo.clip)
            worse = torch.maximum((new[:, 0] - target) ** 2, (old + step - target) ** 2)
            value.append(ppo.value_coefficient * worse / 2)
        return torch.cat(policy).mean(), torch.cat(value).mean(), torch.cat(log_ratios)

    def step(self, which, loss):
        ppo, psi = self.config.on_policy, self.psi[which]
        gradients = dict(zip(psi, torch.autograd.grad(loss, list(psi.values())), strict=True))
        if self.method == "nops":  # each agent's own mean loss is `agents` times its share
            norms = [
                AGENTS * math.sqrt(sum(float((g[agent] ** 2).sum()) for g in gradients.values()))
                for agent in range(AGENTS)
            ]
            scale = [min(1, ppo.max_gradient_norm / (n + 1e-6)) for n in norms]
            scale = torch.tensor(scale, dtype=torch.float64)
            norms = [norm for norm in norms if norm > ppo.max_gradient_norm]
            gradients = {n: g * scale.view(-1, *[1] * (g.dim() - 1)) for n, g in gradients.items()}
        else:
            norms = [math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))]
            scale = min(1, ppo.max_gradient_norm / (norms[0] + 1e-6))
            norms = [norm for norm in norms if norm > ppo.max_gradient_norm]
            gradients = {n: g * scale for n, g in gradients.items()}
        with torch.no_grad():
            for name, g in gradients.items():
                m, v = self.first[which], self.second[which]
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g**2
                change = m[name] / (1 - 0.9**self.steps)
                size = (v[name] / (1 - 0.999**self.steps)).sqrt() + ppo.adam_epsilon
                psi[name] -= ppo.learning_rate * change / size
        return bool(norms)

    def update(self, samples, random):
        ppo = self.config.ppo
        found = {"policy_loss": [], "value_loss": []}
        clipped = 0
        epochs, stop = 0, False
        while epochs < ppo.epochs and not stop:
            kl, out = [], []
            order = torch.randperm(STEPS * COPIES, generator=random)
            for part in (order[:7], order[7:14], order[14:]):
                policy, value, log_ratio = self.losses({n: t[:, part] for n, t in samples.items()})
                self.steps += 1
                clipped += self.step(0, policy) + self.step(1, value)
                found["policy_loss"].append(policy.item())
                found["value_loss"].append(value.item())
                kl.append((log_ratio.exp() - 1 - log_ratio).mean().item())
                out.append(((log_ratio.exp() - 1).abs() > ppo.clip).double().mean().item())
            epochs += 1
            stop = ppo.target_kl is not None and np.mean(kl) > ppo.target_kl
        numbers = {name: np.mean(values) for name, values in found.items()}
        numbers |= {"approximate_kl": np.mean(kl), "clip_fraction": np.mean(out)}
        return numbers | {"epochs_done": epochs}, clipped


@pytest.mark.parametrize("rows", [6, 4096], ids=["chunks", "whole"])
@pytest.mark.parametrize("target_kl", [None, 1e-4], ids=["all passes", "stopped"])
@pytest.mark.parametrize("env", ["specialisation-temporal", "vmas/navigation"])
@pytest.mark.parametrize("method", ["fups", "fups-id", "nops"])
@pytest.mark.parametrize("algorithm", ["ippo", "mappo"])
def test_update_is_that_of_a_plain_implementation(
    monkeypatch, algorithm, method, env, target_kl, rows
):
    monkeypatch.setattr("trainers.update.ROWS", rows)  # 2, 2, 2 and 1 of a minibatch's 7 samples
    trainer, rollout = make(algorithm, method, env, target_kl=target_kl)
    ppo, plain = trainer.config.ppo, Plain(trainer)
    order = torch.Generator()
    order.set_state(trainer.random.get_state())
    expected = plain_gae(rollout, ppo.discount, ppo.gae_lambda)
    advantage = advantages(
        *(rollout[name] for name in ("reward", "value", "next_value", "terminated", "truncated")),
        discount=ppo.discount,
        gae_lambda=ppo.gae_lambda,
    )
    torch.testing.assert_close(advantage, expected, **CLOSE)
    names = ("observation", "action", "log_prob", "value")
    samples = {name: rollout[name].flatten(1, 2) for name in names}
    samples |= {"advantage": expected.flatten(1, 2)}
    samples |= {"target": samples["advantage"] + samples["value"]}
    before = [p.detach().clone() for p in trainer.actor.parameters()]
    found = trainer._update(samples)
    numbers, clipped = plain.update(samples, order)
    assert set(found) == set(numbers)
    for name, number in numbers.items():
        assert found[name].values == pytest.approx(number, rel=1e-10, abs=1e-12), name
    assert numbers["epochs_done"] == (3 if target_kl is None else 1)
    assert 0 < numbers["clip_fraction"] < 1
    assert clipped > 0
    for network, psi in zip((trainer.actor, trainer.critic), plain.psi, strict=True):
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter, psi[name.removeprefix("theta.")], **CLOSE)
    moved = [torch.dist(a, b) for a, b in zip(before, trainer.actor.parameters(), strict=True)]
    assert min(moved) > 1e-3


class PlainA2C(Plain):
    """One step along the policy gradient, sample by sample."""

    def losses(self, batch):
        policy, value = [], []
        for agent in range(AGENTS):
            for t in range(STEPS * COPIES):
                x, action = batch["observation"][agent, t], batch["action"][agent, t]
                output, log_std = self.output(0, agent, x)
                if log_std is None:
                    chosen = torch.distributions.Categorical(logits=output)
                    log_prob, entropy = chosen.log_prob(action), chosen.entropy()
                else:
                    chosen = torch.distributions.Normal(output, log_std.exp())
                    log_prob, entropy = chosen.log_prob(action).sum(), chosen.entropy().sum()
                policy.append(-batch["advantage"][agent, t] * log_prob - 0.03 * entropy)
                error = self.output(1, agent, x)[0] - batch["target"][agent, t]
                value.append(0.5 * 0.5 * error.square())
        return sum(policy) / len(policy), sum(value) / len(value)

    def update(self, samples):
        policy, value = self.losses(samples)
        self.steps = 1
        self.step(0, policy)
        self.step(1, value)
        return {"policy_loss": policy.item(), "value_loss": value.item()}


@pytest.mark.parametrize("env", ["specialisation-temporal", "vmas/navigation"])
@pytest.mark.parametrize("method", ["fups-id", "nops"])
def test_update_of_a2c_is_one_step_along_the_policy_gradient(monkeypatch, method, env):
    monkeypatch.setattr("trainers.update.ROWS", 18)  # chunks of 6, 6, 6 and 2 samples
    trainer, rollout = make("a2c", method, env)
    names = ("observation", "action", "log_prob", "value")
    samples = {name: rollout[name].flatten(1, 2) for name in names}
    samples |= {"advantage": 3 + plain_gae(rollout, 0.99, 1.0).flatten(1, 2)}
    samples |= {"target": samples["advantage"] + samples["value"]}
    plain = PlainA2C(trainer)
    numbers = plain.update(samples)
    found = trainer._update(samples)
    assert {name: of.values.item() for name, of in found.items()} == pytest.approx(
        numbers, rel=1e-10, abs=1e-12
    )
    for network, psi in zip((trainer.actor, trainer.critic), plain.psi, strict=True):
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter, psi[name.removeprefix("theta.")], **CLOSE)


@pytest.mark.parametrize("method", ["hypermarl", "hypermarl-coupled"])
def test_chunks_add_up_to_the_gradient_of_the_whole(monkeypatch, method):
    ends = []
    for rows in (6, 4096):
        monkeypatch.setattr("trainers.update.ROWS", rows)
        trainer, rollout = make("ippo", method, "vmas/navigation")
        names = ("observation", "action", "log_prob", "value")
        samples = {name: rollout[name].flatten(1, 2) for name in names}
        samples |= {"advantage": rollout["reward"].flatten(1, 2)}
        samples |= {"target": samples["advantage"] + samples["value"]}
        before = torch.cat([p.detach().flatten().clone() for p in trainer.actor.parameters()])
        trainer._update(samples)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.actor.parameters()]))
        assert torch.dist(before, ends[-1]) > 1e-3
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


def test_learning_rate_and_entropy_fall_linearly_over_the_run():
    config = {"frames": 40, "copies": 2, "steps": 4, "ppo": {"learning_rate": 0.5}}
    still = Trainer(TrainConfig.model_validate(config))
    ppo = {"learning_rate": 0.5, "anneal_learning_rate": True, "anneal_entropy": True}
    falling = Trainer(TrainConfig.model_validate(config | {"ppo": ppo}))
    seen = []
    for trainer in (still, falling):
        for _ in range(5):
            trainer._next_update()
            rates = {group["lr"] for group in trainer.learner.optimiser.param_groups}
            seen.append((*rates, trainer.learner.policy_loss.entropy_coefficient))
    assert seen[:5] == [(0.5, 0.01)] * 5
    expected = [(0.5 * left, 0.01 * left) for left in (1, 0.8, 0.6, 0.4, 0.2)]
    np.testing.assert_allclose(seen[5:], expected, rtol=1e-12)


def trained(**settings):
    small = {"env": "specialisation-temporal", "agents": 3, "copies": 4, "steps": 8, "frames": 96}
    trainer = Trainer(TrainConfig.model_validate(small | settings))
    for _ in range(3):
        trainer._next_update()
    return torch.cat([p.detach().flatten() for p in trainer.actor.parameters()])


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"ppo": {"target_kl": 1e9}, "normalise": {"clip": 1.0}}, True),
        ({"ppo": {"target_kl": 1e-9}}, False),
        ({"ppo": {"anneal_learning_rate": True}}, False),
        ({"ppo": {"anneal_entropy": True}}, False),
        ({"normalise": {"observations": True}}, False),
        ({"normalise": {"rewards": True}}, False),
        ({"reward": "team"}, False),
        ({"algorithm": "mappo"}, False),
        ({"algorithm": "a2c"}, False),
        ({"a2c": {"learning_rate": 1.0, "gae_lambda": 0.5}}, True),
        ({"algorithm": "a2c", "a2c": {"gae_lambda": 0.9}}, False),
    ],
    ids=str,
)
def test_option_changes_the_training_only_if_it_is_on(settings, same):
    assert torch.equal(trained(), trained(**settings)) == same

"""Kaleidoscope: masks, their diversity, what is drawn anew, and the ensemble of critics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from replayed import precise_learner

from gradlab.cli import run as main
from gradlab.decomposition import decompose
from gradlab.run import open_run
from trainers.agent_policy import load_policy
from trainers.checkpoints import newest_checkpoint
from trainers.config import KaleidoscopeConfig, SharingConfig, TrainConfig
from trainers.description import describe_networks
from trainers.generators import METHODS
from trainers.generators.kaleidoscope import Kaleidoscope, MaskedEnsemble
from trainers.loop import Trainer
from trainers.networks import MLP
from trainers.replay_learner import actor_batch, critic_batch
from trainers.train import train_run

FORM = {"activation": "relu", "head_gain": 0.01}
COPIES, STEPS, FRAMES = 4, 6, 24
SETTINGS = {
    "algorithm": "matd3",
    "method": "kaleidoscope",
    "env": "vmas/navigation",
    "env_args": {"max_steps": 5},
    "agents": 3,
    "copies": COPIES,
    "steps": STEPS,
    "frames": FRAMES * 6,
    "network": {"hidden": [6, 5], "activation": "relu"},
    "diagnostics": "off",
    "every": 2,
    "effects_every": 2,
    "matd3": {
        "batch_size": 10,
        "warmup_frames": FRAMES,
        "replay_frames": 40 * COPIES,
        "gradient_steps": 4,
        "n_step": 3,
    },
    "kaleidoscope": {
        "thresholds": [-4, 0],
        "critic_thresholds": [-4, 0],
        "critics": 3,
        "window": 3,
        "reset_frames": FRAMES,
        "critic_reset_frames": FRAMES,
    },
}


def config_of(**settings):
    masks = SETTINGS["kaleidoscope"] | settings.pop("kaleidoscope", {})
    return TrainConfig.model_validate(SETTINGS | settings | {"kaleidoscope": masks})


def random_of(seed=0):
    return torch.Generator().manual_seed(seed)


def make(*sizes, agents=3, seed=0, **settings):
    mlp = MLP(sizes=sizes or (4, 5, 6, 2), **FORM)
    settings = {"thresholds": (-4, 0)} | settings
    return Kaleidoscope(mlp, agents, random_of(seed), KaleidoscopeConfig(**settings)).double()


def looked_at(weight, threshold):
    """One weight through one mask, number by number."""
    weight, threshold = weight.detach(), threshold.detach()
    seen = torch.zeros_like(weight)
    for place in np.ndindex(*weight.shape):
        left = weight[place].abs() - 1 / (1 + torch.exp(-threshold[place]))
        if left > 0:
            seen[place] = left if weight[place] > 0 else -left
    return seen


def test_weights_are_those_of_loops_and_biases_are_shared():
    generator = make()
    theta = {name: tensor.detach() for name, tensor in generator.all_agents().items()}
    for layer, thresholds in generator.thresholds.items():
        weight = generator.theta[f"{layer}/weight"]
        for agent in range(3):
            expected = looked_at(weight, thresholds[agent])
            torch.testing.assert_close(theta[f"{layer}.weight"][agent], expected)
            some = generator(torch.tensor([agent]))[f"{layer}.weight"][0]
            torch.testing.assert_close(some, expected)
        assert len(theta[f"{layer}.bias"]) == 1
        masks = generator.mask(layer)
        torch.testing.assert_close(masks, theta[f"{layer}.weight"] != 0)
        assert all(not torch.equal(masks[i], masks[k]) for i in range(3) for k in range(i))


def test_masks_are_as_sparse_as_the_thresholds_start():
    low, high = -6.0, -1.0
    generator = make(64, 128, 64, 8, thresholds=(low, high))
    hidden, expected, variance = torch.zeros(3), 0.0, 0.0
    for layer in generator.thresholds:
        size = generator.theta[f"{layer}/weight"].detach().abs()
        # sigmoid(s) >= |w| where s >= logit |w|, with s uniform
        probability = ((high - size.logit().nan_to_num(high)) / (high - low)).clamp(0, 1)
        expected += probability.sum().item()
        variance += (probability * (1 - probability)).sum().item()
        hidden += (~generator.mask(layer)).flatten(1).sum(1)
    assert (hidden - expected).abs().max() < 4 * math.sqrt(variance)
    weights = sum(t[0].numel() for t in generator.thresholds.values())
    assert 0.2 < expected / weights < 0.8
    found = generator.account()["mask_sparsity"]
    np.testing.assert_allclose(found.values, hidden / weights)


def slow_diversity(generator, coefficients):
    """D and its derivatives by the masks, pair by pair."""
    masks, total = [], 0.0
    sizes = [generator.theta[f"{layer}/weight"].detach().abs() for layer in generator.thresholds]
    weights = sum(size.numel() for size in sizes)
    for layer, size, coefficient in zip(generator.thresholds, sizes, coefficients, strict=True):
        mask = generator.mask(layer).double().requires_grad_()
        masks.append(mask)
        for i in range(len(mask)):
            for k in range(len(mask)):
                total = total + coefficient * (size * mask[i] - size * mask[k]).abs().sum()
    count = generator.masks
    total = total / (count * (count - 1) * weights)
    return total, masks


@pytest.mark.parametrize("agents", [2, 5])
def test_diversity_and_its_straight_through_gradient_are_those_of_loops(agents):
    generator = make(agents=agents, diversity=0.3, window=2)
    losses, diversities = [], []
    for loss in (2.0, -5.0, 0.5):  # longer than the window
        expected, masks = slow_diversity(generator, (1, 2, 4))
        torch.testing.assert_close(generator.diversity(), expected.detach())
        losses, diversities = [*losses, loss][-2:], [*diversities, expected.item()][-2:]
        weight = abs(0.3 * np.mean(losses) / np.mean(diversities))
        generator.zero_grad()
        generator.regularise(loss)
        steps = torch.autograd.grad(-weight * expected, masks)
        for thresholds, step in zip(generator.thresholds.values(), steps, strict=True):
            sigmoid = 1 / (1 + torch.exp(-thresholds.detach()))
            torch.testing.assert_close(thresholds.grad, -step.tanh() * sigmoid * (1 - sigmoid))
        assert all(p.grad is None for p in generator.theta.values())
        with torch.no_grad():
            for thresholds in generator.thresholds.values():
                thresholds -= 0.1 * thresholds.grad.sign()


def test_alike_or_single_masks_have_no_diversity():
    alike = make(agents=2, diversity=0.3)
    for thresholds in alike.thresholds.values():
        with torch.no_grad():
            thresholds.copy_(thresholds[:1].expand_as(thresholds))
    assert alike.diversity() == 0
    alike.regularise(7.0)  # nothing to weigh it by, and no direction apart
    assert all(not t.grad.any() for t in alike.thresholds.values())
    single = make(agents=1)
    single.regularise(1.0)
    assert all(t.grad is None for t in single.thresholds.values())


def test_it_moves_masks_apart_that_differ_and_leaves_others():
    generator = make(agents=3, thresholds=(-2, -1))
    old = {n: t.detach().clone() for n, t in generator.thresholds.items()}
    masks = {layer: generator.mask(layer) for layer in old}
    for _ in range(20):
        generator.zero_grad()
        generator.regularise(1.0)
        with torch.no_grad():
            for thresholds in generator.thresholds.values():
                thresholds -= 10 * thresholds.grad
    for layer, thresholds in generator.thresholds.items():
        shown, before = masks[layer], old[layer]
        differ = shown.any(0) & ~shown.all(0)
        assert (~differ).any()
        assert differ.any()
        assert (thresholds < before)[shown & differ].all()
        assert (thresholds > before)[~shown & differ].all()
        assert torch.equal(thresholds[:, ~differ], before[:, ~differ])
        assert torch.equal(generator.mask(layer), shown)


def test_only_weights_that_nobody_sees_are_drawn_anew():
    generator = make(16, 32, 32, 4, thresholds=(-3, 0), reset_frames=100, reset_share=0.5)
    old = {n: p.detach().clone() for n, p in generator.named_parameters()}
    dead = {layer: ~generator.mask(layer).any(0) for layer in generator.thresholds}
    drawn = random_of(5)
    for before, after in ((0, 99), (100, 199), (899, 1000), (999, 1000)):  # not due; the last time
        generator.renew(before, after, 1000 if after < 1000 else 1100, drawn)
        assert all(torch.equal(p, old[n]) for n, p in generator.named_parameters())
    generator.renew(80, 120, 1000, drawn)
    changed, total = 0, 0
    for layer, unseen in dead.items():
        weight, thresholds = generator.theta[f"{layer}/weight"], generator.thresholds[layer]
        moved = weight != old[f"theta.{layer}/weight"]
        assert not (moved & ~unseen).any()
        assert torch.equal(thresholds != old[f"thresholds.{layer}"], moved.expand_as(thresholds))
        assert (weight[moved].abs() <= 1 / math.sqrt(weight.shape[1])).all()
        assert (thresholds >= -3).all()
        assert (thresholds <= 0).all()
        assert torch.equal(generator.theta[f"{layer}/bias"], old[f"theta.{layer}/bias"])
        changed += moved.sum().item()
        total += unseen.sum().item()
    assert total > 300
    assert abs(changed - total / 2) < 4 * math.sqrt(total) / 2


def test_critics_are_drawn_anew_in_turn():
    mlp = MLP(sizes=(4, 5, 1), **FORM)
    config = KaleidoscopeConfig(critics=3, critic_reset_frames=10)
    generator = MaskedEnsemble(mlp, 2, random_of(), config)
    turns = []
    for frames in range(0, 50, 5):
        old = {n: p.detach().clone() for n, p in generator.named_parameters()}
        generator.renew(frames, frames + 5, 100, random_of(frames))
        for name, parameter in generator.named_parameters():
            moved = (parameter != old[name]).flatten(1) if parameter.dim() == 3 else None
            if moved is None:
                assert torch.equal(parameter, old[name])
            elif name == "thresholds.head":
                turns += moved.any(1).nonzero().flatten().tolist()
                assert (moved.any(1) == moved.all(1)).all()
    assert turns == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("critics", [2, 5])
def test_an_ensemble_is_critics_of_their_own_on_shared_weights(critics):
    mlp = MLP(sizes=(4, 5, 6, 1), **FORM)
    config = SharingConfig(kaleidoscope={"critics": critics, "critic_thresholds": (-4, 0)})
    scheme = METHODS["kaleidoscope"].ensemble
    generator = scheme(mlp, 3, random_of(), config).double()
    assert scheme.parameters(mlp, 3, config) == sum(p.numel() for p in generator.parameters())
    x = torch.randn(1, 7, 4, generator=random_of(1), dtype=torch.float64)
    theta = generator.all_agents()
    expected = []
    for critic in range(critics):
        own = {n: t[None].detach() for n, t in generator.theta.items()}
        own = {n.replace("/", "."): t for n, t in own.items()}
        for layer, thresholds in generator.thresholds.items():
            own[f"{layer}.weight"] = looked_at(own[f"{layer}.weight"][0], thresholds[critic])[None]
        expected.append(mlp.forward(own, x))
    found = generator.mlp.forward(theta, x)
    torch.testing.assert_close(found, torch.cat(expected, -1))
    assert len({value.item() for value in found[0, 0]}) == critics


def test_targets_are_of_the_least_critic_and_actors_of_the_mean_one():
    learner = precise_learner(config_of(), spread=0.1)
    assert learner.critics == ("critic",)
    assert [*learner.networks] == [*learner.targets] == ["actor", "critic"]
    places = learner.replay.draw(10, random_of(3))
    batch = learner.view.of(learner.replay, places, random_of(4))
    held = learner.replay.take(places, steps=3, discount=0.99)
    actor, critic = learner.targets["actor"], learner.targets["critic"]
    following = held["following_observation"]
    made = actor.mlp.forward(actor.all_agents(), following).tanh()
    noise = (0.2 * torch.randn(made.shape, generator=random_of(4), dtype=torch.float32)).double()
    actions = (made + noise.clamp(-0.5, 0.5)).clamp(-1, 1)
    joint = torch.cat([*following, *actions], -1)
    values = critic.mlp.forward(critic.all_agents(), joint[None])[0]
    assert values.shape == (10, 3)
    expected = held["return"] + held["bootstrap"] * values.min(-1).values
    torch.testing.assert_close(batch["target"], expected, rtol=1e-6, atol=1e-7)

    own, online = learner.networks["actor"], learner.networks["critic"]
    losses = learner.actor_loss(
        own.all_agents(),
        {**actor_batch(batch), **{f"critic/{n}": t for n, t in online.all_agents().items()}},
    )
    made = own.mlp.forward(own.all_agents(), held["observation"]).tanh()
    for agent in range(3):
        actions = [held["action"][k] if k != agent else made[k] for k in range(3)]
        read = torch.cat([*held["observation"], *actions], -1)[None]
        mean = online.mlp.forward(online.all_agents(), read)[0].mean(-1)
        torch.testing.assert_close(losses[agent], -mean)


def test_a_step_has_the_gradient_of_the_losses_and_of_the_diversity():
    learner = precise_learner(
        config_of(matd3=SETTINGS["matd3"] | {"max_gradient_norm": 1e9}), spread=0.1
    )
    batch = learner.view.of(learner.replay, learner.replay.draw(10, random_of(3)), random_of(4))
    critic = learner.networks["critic"]
    joint = torch.cat([batch["read"][0], batch["action"][0]], -1)[None]
    values = critic.mlp.forward(critic.all_agents(), joint)
    loss = (values - batch["target"][..., None]).square().mean()
    diversity = critic.diversity()
    weight = abs(0.1 * loss.item() / diversity.item())
    named = dict(critic.named_parameters())
    plain = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    expected = torch.autograd.grad(loss - weight * diversity, list(named.values()))
    assert learner._critic_step(batch) == pytest.approx(loss.item())
    for (name, parameter), gradient, without in zip(named.items(), expected, plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert name.startswith("thresholds.") == (not torch.equal(gradient, without))


def test_parts_add_up_to_the_gradient_without_the_diversity():
    learner = precise_learner(config_of(), spread=0.1)
    batch = learner.view.of(learner.replay, learner.replay.draw(10, random_of(3)), random_of(4))
    critic = learner.networks["critic"]
    whole = {n: batch[n] for n in ("action", "target")} | {"observation": batch["read"]}
    d = decompose(critic, learner.critic_loss, whole)
    assert d.residual < 1e-12
    theta = critic.all_agents()
    losses = learner.critic_loss(theta, critic_batch(batch, theta))
    losses.mean(1).sum().backward()
    trained = torch.cat([p.grad.flatten() for p in critic.parameters()])
    torch.testing.assert_close(d.total, trained, rtol=1e-9, atol=1e-11)


def state_of(folder):
    checkpoint, problems = newest_checkpoint(folder)
    assert not problems
    return checkpoint


def test_a_diagnosed_run_is_a_plain_one_resumed_to_the_bit_and_loaded(tmp_path):
    config = config_of(diagnostics="full", frames=FRAMES * 4)
    train_run(config, tmp_path / "r", tell=pytest.fail)
    plain, done = config.model_copy(update={"diagnostics": "off"}), []
    again = {"progress": lambda frames, _: done.append(frames)}
    train_run(plain, tmp_path / "plain", **again, stop=lambda: len(done) == 2)
    train_run(plain, tmp_path / "plain", resume=True, **again)
    one, other = (state_of(tmp_path / name).tensors for name in ("r", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    run = open_run(tmp_path / "r")
    assert run.method == run.method_of("critic") == "kaleidoscope"
    assert run.quantity("residual").max() < 1e-4
    assert run.quantity("residual").sizes == {"update": 2, "network": 2}
    assert run.quantity("mask_sparsity").sizes == {"update": 4, "agent": 3}
    assert run.quantity("mask_diversity").min() > 0
    coupling = run.quantity("coupling").sel(network="actor", agent=0, agent_other=1)
    assert (coupling.sel(layer="all") < 0.9).all()
    assert (run.quantity("coupling").sel(network="critic", layer="all") > 1 - 1e-9).all()
    trainer = Trainer(config)
    trainer.load_networks(state_of(tmp_path / "r"))
    observation = torch.randn(3, 7, trainer.spec.observation_size, generator=random_of())
    expected = trainer.policy.distribution(trainer.actor.all_agents(), observation)["mean"]
    for agent in range(3):
        mean, _ = load_policy(run, agent=agent)(observation[agent])
        torch.testing.assert_close(mean, expected[agent])
    actor, critic = describe_networks(trainer)
    assert (actor.network, critic.network) == ("actor", "critic")
    assert critic.psi == sum(p.numel() for p in trainer.critic.parameters())
    assert critic.theta == trainer.critic.mlp.size_of_layers


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"aggregate": "pcgrad"}, marks=pytest.mark.slow)],
    ids=["sum", "aggregated"],
)
def test_on_policy_its_masks_are_trained_and_parted_too(settings, tmp_path):
    config = config_of(algorithm="ippo", diagnostics="full", frames=FRAMES * 3, **settings)
    train_run(config, tmp_path / "r", tell=lambda _: None)
    assert open_run(tmp_path / "r").quantity("residual").max() < 1e-4
    before, after = Trainer(config), Trainer(config)
    after.load_networks(state_of(tmp_path / "r"))
    assert isinstance(after.critic, Kaleidoscope)
    for name in ("actor", "critic"):
        old, new = (getattr(t, name).thresholds["head"] for t in (before, after))
        assert (old != new).flatten(1).any(1).all()
        assert getattr(after, name).steps == 3 * 16


def test_a_critics_form_can_be_another_schemes_and_the_twin_is_back():
    trainer = Trainer(config_of(critic_method="fups-id"))
    assert trainer.learner.critics == ("critic", "twin")
    assert trainer.config.scheme == "kaleidoscope+fups-id"
    matched = Trainer(config_of(network={"hidden": [6, 5], "match": "fups"}))
    sizes = [sum(p.numel() for p in matched.critic.parameters()), replace(matched.critic.mlp).sizes]
    assert sizes[1][1] < 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["thresholds", "-5", "-10"], "must be two numbers, the lower one first"),
        (["thresholds", "-5"], "`kaleidoscope.thresholds"),
        (["critics", "1"], "`kaleidoscope.critics`: Input should be greater than or equal to 2"),
        (["diversity", "-1"], "`kaleidoscope.diversity`: Input should be greater than or equal"),
        (["reset-share", "2"], "`kaleidoscope.reset_share`: Input should be less than or equal"),
        (["critc-thresholds", "0"], "critc-thresholds"),
    ],
    ids=lambda options: " ".join(options) if isinstance(options, list) else "",
)
def test_bad_settings_are_told_in_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *values = options
    assert main(["train", "--method", "kaleidoscope", f"--kaleidoscope.{name}", *values]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed

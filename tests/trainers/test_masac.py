import math
import re

import numpy as np
import pytest
import torch
from replayed import AGENTS, BATCH, CASES, CLOSE, COPIES, SMALL, STEPS, output, own, precise_learner

import gradlab
from gradlab.checks import UsageError
from gradlab.run import open_run
from trainers.acting import fixed_parameters
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.episodes import play_episodes
from trainers.evaluation import evaluate
from trainers.loop import Trainer
from trainers.replay_learner import CRITICS, gumbel
from trainers.train import train_run

SETTINGS = {
    "batch_size": BATCH,
    "warmup_frames": COPIES * STEPS,
    "replay_frames": 40 * COPIES,
    "gradient_steps": 4,
    "learning_rate": 0.01,
    "discount": 0.8,
    "temperature": 0.7,
    "alpha": 0.3,
    "alpha_learning_rate": 0.02,
}


def config_of(case="continuous", **settings):
    masac = SETTINGS | settings.pop("masac", {})
    return TrainConfig.model_validate(
        SMALL
        | {"algorithm": "masac", "frames": COPIES * STEPS * 5, "effects_every": 1000}
        | CASES[case]
        | settings
        | {"masac": masac}
    )


def learner_of(case, method, **masac):
    """See `precise_learner`; the alphas differ as well."""
    learner = precise_learner(config_of(case, method=method, masac=masac))
    learner.log_alpha.data = torch.tensor([0.2, -0.5, -1.0]).double()
    return learner


def drawn(learner, agent, observation, noise):
    """An action with its gradient, and the policy's entropy."""
    made = output(learner.networks["actor"], agent, observation)
    if "log_std" in learner.networks["actor"].all_agents():
        std = own(learner.networks["actor"].all_agents()["log_std"], agent).exp()
        normal = torch.distributions.Normal(torch.zeros_like(std), std)
        return (torch.tanh(made) + std * noise).clamp(-1, 1), normal.entropy().sum()
    soft = ((made + noise) / SETTINGS["temperature"]).softmax(-1)
    hard = torch.nn.functional.one_hot(soft.argmax(), len(soft)).double()
    return hard - soft.detach() + soft, torch.distributions.Categorical(logits=made).entropy()


def batch_of(learner, case):
    places = learner.replay.draw(BATCH, torch.Generator().manual_seed(3))
    random, same = (torch.Generator().manual_seed(4) for _ in range(2))
    batch = learner.view.of(learner.replay, places, random)
    held = learner.replay.take(places, steps=1, discount=SETTINGS["discount"])
    shape = (AGENTS, BATCH, learner.policy.network.sizes[-1])
    numbered = case == "numbered"
    noise = gumbel(shape, same) if numbered else torch.randn(shape, generator=same)
    return batch, held, noise


@pytest.mark.parametrize("method", ["hypermarl", "nops"])
@pytest.mark.parametrize("case", CASES)
def test_targets_and_gradients_are_those_of_slow_references(case, method):
    learner = learner_of(case, method, max_gradient_norm=1e9)
    batch, held, noise = batch_of(learner, case)
    alpha, networks = learner.log_alpha.detach().exp(), learner.networks
    policy_loss, above, size = 0.0, torch.zeros(AGENTS).double(), learner.policy.network.sizes[-1]
    for sample in range(BATCH):
        following, now = held["following_observation"][:, sample], held["observation"][:, sample]
        acts = [drawn(learner, i, following[i], noise[i, sample]) for i in range(AGENTS)]
        both = torch.cat([*following, *(action for action, _ in acts)])
        did = held["action"][:, sample]
        did = torch.nn.functional.one_hot(did, size).double() if case == "numbered" else did
        for i in range(AGENTS):
            least = min(output(learner.targets[name], i, both).item() for name in CRITICS)
            value = held["bootstrap"][i, sample] * (least + alpha[i] * acts[i][1])
            expected = held["return"][i, sample] + value
            torch.testing.assert_close(batch["target"][i, sample], expected.detach(), **CLOSE)
            action, entropy = drawn(learner, i, now[i], batch["noise"][i, sample])
            joint = torch.cat([*now, *did[:i], action, *did[i + 1 :]])
            values = torch.cat([output(networks[name], i, joint) for name in CRITICS])
            policy_loss = policy_loss - values.min() - alpha[i] * entropy
            wanted = 0.2 * math.log(size) if case == "numbered" else -size
            above[i] += (entropy.detach() - wanted) / BATCH
    parameters = [*networks["actor"].parameters()]
    expected = torch.autograd.grad(policy_loss / (AGENTS * BATCH), parameters)
    assert learner._actor_step(batch) == pytest.approx(policy_loss.item() / AGENTS / BATCH)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **CLOSE)
    torch.testing.assert_close(learner.log_alpha.grad, alpha * above, **CLOSE)
    assert all(p.grad is None for name in CRITICS for p in networks[name].parameters())


@pytest.mark.parametrize("target", [-8.0, 8.0])
def test_alpha_moves_the_entropy_towards_its_target(target):
    trainer = Trainer(config_of(masac={"target_entropy": target, "gradient_steps": 15}))
    learner = trainer.learner

    def entropy():
        theta = learner.networks["actor"].all_agents()
        return learner.policy.entropy(theta, torch.zeros(AGENTS, 1, 2))[0, 0].item()

    before, alpha = entropy(), SETTINGS["alpha"]
    for _ in range(3):
        _, found = trainer._next_update()
    risen = target > 0
    assert ((found["alpha"].values > alpha) == risen).all()
    assert found["alpha"].dims == ("agent",)
    if risen:
        assert entropy() > before + 0.1


def test_alpha_stays_where_it_is_put():
    trainer = Trainer(config_of(masac={"alpha_learning_rate": 0.0}))
    trainer._next_update()
    np.testing.assert_allclose(trainer._next_update()[1]["alpha"].values, 0.3, rtol=1e-6)


def end(config, folder):
    checkpoint, problems = newest_checkpoint(folder)
    assert not problems
    trainer = Trainer(config)
    trainer.load_state(checkpoint)
    return trainer, trainer.state().tensors


@pytest.mark.parametrize(("case", "method"), [("continuous", "hypermarl"), ("numbered", "nops")])
def test_diagnosed_and_resumed_runs_end_as_a_plain_one(tmp_path, case, method):
    ends = []
    for level, pauses in (("full", False), ("off", True)):
        config = config_of(case, method=method, diagnostics=level)
        if pauses:
            train_run(
                config,
                tmp_path / level,
                tell=lambda _: None,
                stop=iter((False, False, True)).__next__,
            )
            assert newest_checkpoint(tmp_path / level)[0].update == 2
        train_run(config, tmp_path / level, resume=pauses, tell=lambda _: None)
        ends.append(end(config, tmp_path / level))
    (trainer, one), (_, other) = ends
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (one["log_alpha"] != math.log(0.3)).all()
    run = open_run(tmp_path / "full")
    assert run.quantity("residual").sizes["network"] == 2
    assert run.quantity("residual").max() < 1e-4
    assert run.quantity("alpha").sizes == {"update": 5, "agent": AGENTS}
    observation = torch.randn(AGENTS, 7, trainer.spec.observation_size)
    theta = trainer.actor.all_agents()
    expected = trainer.policy.distribution(theta, observation)
    for agent in range(AGENTS):
        said = gradlab.load_policy(tmp_path / "full", agent=agent)(observation[agent])
        for found, values in zip(
            said if case == "continuous" else [said], expected.values(), strict=True
        ):
            torch.testing.assert_close(found, values[agent])


def test_agents_with_different_spaces_are_trained(tmp_path):
    game = {"env": "vmas/simple_world_comm", "pad": True, "agents": None}
    config = config_of(**game, diagnostics="full", frames=COPIES * STEPS * 2)
    train_run(config, tmp_path / "r", tell=lambda _: None)
    run = open_run(tmp_path / "r")
    assert run.quantity("residual").max() < 1e-4
    assert run.quantity("policy_loss").notnull().all()


BAD = {
    "replay smaller than a batch": (
        {"masac": {"replay_frames": 9}},
        "`masac.replay_frames` must have room for a batch: 10 frames (masac.batch_size)",
    ),
    "recurrent": ({"network": {"memory": "gru"}}, "`network.memory` must be none with --algorithm"),
    "aggregated": ({"aggregate": "pcgrad"}, "`aggregate` must be none with --algorithm masac"),
    "coupled": (
        {"method": "hypermarl-coupled"},
        "`method` must make parameters that hold for all observations, with --algorithm masac",
    ),
    "diversity of squashed policies": (
        {"method": "dico", "dico": {"snd": 0.5}},
        "`dico.snd` must be 0 or left out with continuous actions and --algorithm masac",
    ),
    "only warm-up": ({"frames": 24}, "`frames` must be above the 24 of masac.warmup_frames"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_told_in_one_line(case):
    settings, said = BAD[case]
    with pytest.raises(UsageError, match=f"^{re.escape(said)}") as error:
        Trainer(config_of(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_task_is_learned():
    """In a few minutes: docs/off-policy.md has the command line of the same."""
    settings = {
        "algorithm": "masac",
        "diagnostics": "off",
        "method": "hypermarl",
        "env": "vmas/navigation",
        "agents": 2,
        "copies": 32,
        "steps": 16,
        "frames": 61_440,
        "masac": {"batch_size": 256, "warmup_frames": 5120},
    }
    trainer = Trainer(TrainConfig.model_validate(settings))
    at_random = play_episodes(
        make_env(settings["env"], copies=32, agents=2, seed=1),
        trainer.learner._warm_up,
        fixed_parameters(trainer.actor),
        random=torch.Generator().manual_seed(1),
    ).quantities()
    for _ in range(trainer.config.updates):
        trainer._next_update()
    learned = evaluate(trainer, episodes=32, seed=1).metrics
    assert learned.evaluation_return_low > at_random["evaluation_return_high"].values + 1

import re

import numpy as np
import pytest
import torch
from replayed import AGENTS, BATCH, CASES, CLOSE, COPIES, SMALL, STEPS, output, precise_learner
from turns_game import use_turns

import gradlab
from analyses.conflict import conflict_table
from gradlab.checks import UsageError
from gradlab.decomposition import decompose
from gradlab.run import open_run
from trainers.acting import fixed_parameters
from trainers.checkpoints import newest_checkpoint
from trainers.config import TrainConfig
from trainers.description import describe_networks
from trainers.envs import make_env
from trainers.episodes import play_episodes
from trainers.evaluation import evaluate
from trainers.loop import Trainer
from trainers.off_policy import CRITIC, action_of, encoded
from trainers.policies import make_policy
from trainers.replay_learner import CRITICS, actor_batch, gumbel
from trainers.train import train_run

SETTINGS = {
    "batch_size": BATCH,
    "warmup_frames": COPIES * STEPS,
    "replay_frames": 40 * COPIES,
    "gradient_steps": 4,
    "n_step": 3,
    "polyak": 0.1,
    "learning_rate": 0.01,
    "critic_learning_rate": 0.02,
    "discount": 0.8,
    "logit_penalty": 0.05,
    "temperature": 0.7,
}


def config_of(**settings):
    matd3 = SETTINGS | settings.pop("matd3", {})
    return TrainConfig.model_validate(
        SMALL
        | {"algorithm": "matd3", "frames": COPIES * STEPS * 6, "effects_every": 2}
        | CASES["continuous"]
        | settings
        | {"matd3": matd3}
    )


def learner_of(**settings):
    """See `precise_learner`; what was paid differs as well."""
    learner = precise_learner(config_of(**settings))
    paid = learner.replay._held["paid"]
    paid += torch.randn(paid.shape, generator=torch.Generator().manual_seed(2)).double()
    return learner


def one_hot(values):
    return torch.nn.functional.one_hot(values.argmax(-1), len(values)).double()


def batch_of(learner, seed=3):
    """A batch; and the noise of its targets, and of its numbered actions."""
    places = learner.replay.draw(BATCH, torch.Generator().manual_seed(seed))
    random = torch.Generator().manual_seed(seed + 1)
    same = torch.Generator().manual_seed(seed + 1)
    batch = learner.view.of(learner.replay, places, random)
    held = learner.replay.take(places, steps=SETTINGS["n_step"], discount=SETTINGS["discount"])
    outputs = learner.policy.network.sizes[-1]
    shape = (AGENTS, BATCH, outputs)
    noise = gumbel(shape, same) if "noise" in batch else torch.randn(shape, generator=same)
    return batch, held, noise


@pytest.mark.parametrize("method", ["fups", "fups-id", "nops", "hypermarl"])
@pytest.mark.parametrize("case", CASES)
def test_targets_are_those_of_a_slow_reference(case, method):
    learner = learner_of(method=method, **CASES[case])
    batch, held, noise = batch_of(learner)
    numbered = case == "numbered"
    for sample in range(BATCH):
        actions = []
        for agent in range(AGENTS):
            made = output(
                learner.targets["actor"], agent, held["following_observation"][agent, sample]
            )
            if numbered:
                actions.append(one_hot(made + noise[agent, sample]))
            else:
                smoothing = (0.2 * noise[agent, sample]).clamp(-0.5, 0.5)
                actions.append((torch.tanh(made) + smoothing).clamp(-1, 1))
        seen = [held["following_observation"][agent, sample] for agent in range(AGENTS)]
        for agent in range(AGENTS):
            values = [
                output(learner.targets[name], agent, torch.cat([*seen, *actions])).item()
                for name in CRITICS
            ]
            expected = held["return"][agent, sample] + held["bootstrap"][agent, sample] * min(
                values
            )
            torch.testing.assert_close(batch["target"][agent, sample], expected.detach(), **CLOSE)
    assert batch["target"].std() > 0.1


@pytest.mark.parametrize("method", ["fups", "fups-id", "nops", "hypermarl"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_slow_losses(case, method):
    learner = learner_of(method=method, matd3={"max_gradient_norm": 1e9}, **CASES[case])
    batch, held, _ = batch_of(learner)
    numbered = case == "numbered"
    size = learner.policy.network.sizes[-1]

    def did(agent, sample):
        action = held["action"][agent, sample]
        return one_hot((torch.arange(size) == action).double()) if numbered else action

    critic_losses, actor_losses = dict.fromkeys(CRITICS, 0.0), 0.0
    for agent, sample in np.ndindex(AGENTS, BATCH):
        seen = [held["observation"][other, sample] for other in range(AGENTS)]
        actions = [did(other, sample) for other in range(AGENTS)]
        for name in CRITICS:
            value = output(learner.networks[name], agent, torch.cat([*seen, *actions]))
            critic_losses[name] += (value - batch["target"][agent, sample]).square().sum()
        made = output(learner.networks["actor"], agent, seen[agent])
        if numbered:
            drawn = (made + batch["noise"][agent, sample]) / SETTINGS["temperature"]
            soft = drawn.softmax(-1)
            action = one_hot(drawn) - soft.detach() + soft
        else:
            action = torch.tanh(made)
        actions[agent] = action
        value = output(learner.networks["critic"], agent, torch.cat([*seen, *actions]))
        actor_losses = actor_losses - value.sum()
        if numbered:
            actor_losses = actor_losses + SETTINGS["logit_penalty"] * made.square().mean()
    count = AGENTS * BATCH
    expected = {}
    for name, loss in {"actor": actor_losses, **critic_losses}.items():
        parameters = [*learner.networks[name].parameters()]
        expected[name] = torch.autograd.grad(loss / count, parameters)
    losses = [loss.item() / count for loss in critic_losses.values()]
    # The actors first: a critic's step would change what they are judged by.
    assert learner._actor_step(batch) == pytest.approx(actor_losses.item() / count, rel=1e-9)
    check_gradients(learner, expected, ["actor"])
    assert all(p.grad is None for name in CRITICS for p in learner.networks[name].parameters())
    assert learner._critic_step(batch) == pytest.approx(sum(losses) / 2, rel=1e-9)
    check_gradients(learner, expected, CRITICS)
    assert all(p.grad is None for p in learner.networks["actor"].parameters())


def check_gradients(learner, expected, names):
    for name in names:
        for parameter, gradient in zip(
            learner.networks[name].parameters(), expected[name], strict=True
        ):
            torch.testing.assert_close(parameter.grad, gradient, **CLOSE)
        assert max(g.abs().max() for g in expected[name]) > 1e-4


def copied(generators):
    return {
        name: [p.detach().clone() for p in generator.parameters()]
        for name, generator in generators.items()
    }


def moved(before, generators):
    after = copied(generators)
    return {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        for name in before
    }


def test_actors_and_targets_wait_for_their_step_and_follow_slowly():
    trainer = Trainer(config_of(matd3={"policy_delay": 3, "gradient_steps": 1}))
    learner = trainer.learner
    rollout = trainer._collect()
    for step in (1, 2, 3, 4, 5, 6):
        networks, targets = copied(learner.networks), copied(learner.targets)
        trainer._update(rollout.samples)
        acts = step % 3 == 0
        assert moved(networks, learner.networks) == {"actor": acts, "critic": True, "twin": True}
        if not acts:
            assert not any(moved(targets, learner.targets).values())
            continue
        now = copied(learner.networks)
        for name, old in targets.items():
            for before, network, after in zip(
                old, now[name], learner.targets[name].parameters(), strict=True
            ):
                torch.testing.assert_close(after, 0.9 * before + 0.1 * network)
    assert learner.gradient_steps == 6


def test_twin_critics_start_apart_and_targets_as_the_networks():
    learner = Trainer(config_of()).learner
    one, twin = (learner.networks[name].all_agents()["head.weight"] for name in CRITICS)
    assert not torch.allclose(one, twin)
    for name, generator in learner.networks.items():
        for a, b in zip(generator.parameters(), learner.targets[name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_nothing_is_learned_before_the_warm_up_is_over():
    trainer = Trainer(config_of(matd3={"warmup_frames": 2 * COPIES * STEPS}))
    before = copied(trainer.learner.networks)
    _, found = trainer._next_update()
    assert not any(moved(before, trainer.learner.networks).values())
    assert np.isnan(found["value_loss"].values)
    wide = trainer.learner.replay._held["action"][: COPIES * STEPS]
    assert (wide.abs() == 1).double().mean() > 0.1  # much noise, cut off at the range
    _, found = trainer._next_update()
    assert all(moved(before, trainer.learner.networks).values())
    assert found["value_loss"].values > 0
    trainer._next_update()
    narrow = trainer.learner.replay._held["action"][2 * COPIES * STEPS : 3 * COPIES * STEPS]
    assert (narrow.abs() == 1).double().mean() < 0.02


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("continuous", "hypermarl"),
        ("numbered", "fups-id"),
        *(
            pytest.param(case, method, marks=pytest.mark.slow)
            for case, method in (
                ("continuous", "fups"),
                ("continuous", "fups-id"),
                ("continuous", "nops"),
                ("numbered", "nops"),
                ("numbered", "hypermarl"),
            )
        ),
    ],
)
def test_diagnosed_run_ends_with_the_weights_of_a_plain_one(tmp_path, case, method):
    ends = []
    for level in ("full", "off"):
        config = config_of(method=method, diagnostics=level, **CASES[case])
        train_run(config, tmp_path / level, tell=lambda _: None)
        trainer = Trainer(config)
        trainer.load_state(saved(tmp_path / level))
        ends.append(copied(trainer.learner.networks))
    for name, parameters in ends[0].items():
        assert all(torch.equal(a, b) for a, b in zip(parameters, ends[1][name], strict=True))
    run = open_run(tmp_path / "full")
    assert run.quantity("residual").max() < 1e-4
    assert run.quantity("residual").sizes == {"update": 3, "network": 2}
    assert (run.quantity("samples") > 0).all()
    assert conflict_table([run])["samples"].tolist() == ["120 of 120"]
    assert run.quantity("transference").sizes["update"] == 2
    if case == "continuous":  # a numbered action stays as it was drawn, or flips
        # Critics are near their minimum here, where a step's change is of second order.
        assert run.quantity("transference_error").sel(network="actor").max() < 0.1
    assert run.quantity("snd")["update"].values.tolist() == [2, 4]
    assert run.quantity("gradient_steps").values.tolist() == [4, 8, 12, 16, 20, 24]


def saved(folder):
    checkpoint, problems = newest_checkpoint(folder)
    assert not problems
    return checkpoint


def test_diagnosed_parts_add_up_to_the_gradient_that_is_trained_on():
    trainer = Trainer(config_of(diagnostics="full", method="hypermarl"))
    rollout = trainer._collect()
    batches, copy, mask = trainer.diagnosis._batches(rollout)
    context = trainer.diagnosis._context()
    learner = trainer.learner
    assert mask is None
    assert sorted(set(copy.tolist())) == [*range(COPIES)]
    d = decompose(
        learner.networks["actor"], learner.actor_loss, batches["actor"], context=context["actor"]
    )
    learner.optimiser.zero_grad()
    held = {n: t for n, t in context["actor"].items() if n.startswith(CRITIC)}
    learner.actor_loss(learner.networks["actor"].all_agents(), {**batches["actor"], **held}).mean(
        1
    ).sum().backward()
    plain = {n: p.grad for n, p in learner.networks["actor"].named_parameters()}
    torch.testing.assert_close(d.total, d.psi_layout.flatten(plain), rtol=1e-4, atol=1e-6)
    assert actor_batch(batches["actor"]).keys() == batches["actor"].keys()


def test_straight_through_actions_are_drawn_and_have_the_gradient_of_the_softmax():
    policy = make_policy(
        2,
        make_env("specialisation", copies=1, agents=3).spec.action_space,
        hidden=(4,),
        activation="tanh",
    )
    logits = torch.tensor([1.0, 0.0, -1.0]).expand(20_000, 3).clone().requires_grad_()
    noise = gumbel((20_000, 3), torch.Generator().manual_seed(0))
    action = action_of(policy, logits, {"noise": noise}, 0.5)
    torch.testing.assert_close(action.sum(-1), torch.ones(20_000))
    shares = action.mean(0)
    torch.testing.assert_close(
        shares, torch.tensor([1.0, 0.0, -1.0]).softmax(0), atol=0.012, rtol=0
    )
    weights = torch.tensor([1.0, 2.0, 4.0])
    (found,) = torch.autograd.grad((action * weights).sum(), logits)
    soft = ((logits + noise) / 0.5).softmax(-1)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.testing.assert_close(found, expected)
    mask = torch.tensor([False, True, True])
    never = action_of(policy, logits, {"noise": noise, "action_mask": mask}, 0.5)
    assert never[:, 0].max() == 0
    assert encoded(policy, torch.tensor([2, 0])).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_policies_are_loaded_evaluated_and_described(tmp_path):
    config = config_of(method="nops", diagnostics="light")
    train_run(config, tmp_path / "r", tell=lambda _: None)
    found = evaluate(tmp_path / "r", episodes=2)
    assert found.episodes.lengths.tolist() == [5, 5]
    trainer = Trainer(config)
    trainer.load_networks(saved(tmp_path / "r"))
    observation = torch.randn(AGENTS, 7, trainer.spec.observation_size)
    theta = trainer.actor.all_agents()
    action, _ = trainer.policy.mode(theta, observation)
    expected = trainer.policy.distribution(theta, observation)
    for agent in range(AGENTS):
        mean, std = gradlab.load_policy(tmp_path / "r", agent=agent)(observation[agent])
        torch.testing.assert_close(mean, expected["mean"][agent])
        torch.testing.assert_close(std, expected["std"][agent])
        torch.testing.assert_close(mean, trainer.policy.to_env(action)[agent])
    assert [n.network for n in describe_networks(trainer)] == ["actor", "critic", "twin"]


PADDED = {
    "env": "vmas/simple_world_comm",
    "env_args": {"max_steps": 5},
    "pad": True,
    "agents": None,
}


@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "numbered"])
def test_agents_with_different_spaces_are_trained(continuous, tmp_path):
    settings = PADDED | {"env_args": {"max_steps": 5, "continuous_actions": continuous}}
    config = config_of(**settings, diagnostics="full", frames=COPIES * STEPS * 3)
    train_run(config, tmp_path / "r", tell=lambda _: None)
    run = open_run(tmp_path / "r")
    assert run.quantity("residual").max() < 1e-4
    assert run.quantity("value_loss").notnull().all()


def test_only_what_may_be_done_at_a_step_is_done_and_counted_on(monkeypatch):
    use_turns(monkeypatch)
    learner = learner_of(env="specialisation-temporal", env_args={"horizon": 5, "actions": 4})
    batch, held, noise = batch_of(learner)
    mask, following = held["action_mask"], held["following_action_mask"]
    assert mask.double().mean() == 0.5
    assert mask.gather(-1, held["action"][..., None]).all()
    goes_on = held["bootstrap"] > 0
    for sample in range(BATCH):
        seen = held["following_observation"][:, sample]
        made = [output(learner.targets["actor"], agent, seen[agent]) for agent in range(AGENTS)]
        actions = [
            one_hot((made[agent] + noise[agent, sample]).where(following[agent, sample], -1e30))
            for agent in range(AGENTS)
        ]
        for agent in range(AGENTS):
            values = [
                output(learner.targets[name], agent, torch.cat([*seen, *actions])).item()
                for name in CRITICS
            ]
            expected = held["return"][agent, sample] + held["bootstrap"][agent, sample] * min(
                values
            )
            torch.testing.assert_close(batch["target"][agent, sample], expected.detach(), **CLOSE)
    assert goes_on.any()
    made = learner.policy.network.forward(
        learner.networks["actor"].all_agents(), batch["observation"]
    )
    own = action_of(learner.policy, made, batch, 1.0)
    assert (own * ~mask).abs().max() < 1e-12
    assert learner._actor_step(batch) != 0


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("continuous", "adapters"),
        ("numbered", "dico"),
        pytest.param("continuous", "dico", marks=pytest.mark.slow),
        pytest.param("numbered", "adapters", marks=pytest.mark.slow),
        pytest.param("numbered", "kaleidoscope", marks=pytest.mark.slow),
    ],
)
def test_other_schemes_are_trained_too(case, method, tmp_path):
    settings = CASES[case] | {"frames": COPIES * STEPS * 3, "effects_every": 1000}
    config = config_of(method=method, diagnostics="full", **settings)
    train_run(config, tmp_path / "r", tell=lambda _: None)
    run = open_run(tmp_path / "r")
    assert run.quantity("residual").max() < 1e-4
    before, trainer = Trainer(config), Trainer(config)
    trainer.load_state(saved(tmp_path / "r"))
    own = {
        "adapters": "left.head",
        "dico": "theta.deviation_head/weight",
        "kaleidoscope": "thresholds.head",
    }[method]
    for name in ("networks", "targets"):
        old, new = (
            dict(getattr(some.learner, name)["actor"].named_parameters())[own]
            for some in (before, trainer)
        )
        assert (new != old).flatten(1).any(1).all()


BAD = {
    "replay smaller than a batch": (
        {"matd3": {"replay_frames": 9}},
        "`matd3.replay_frames` must have room for a batch: 10 frames",
    ),
    "recurrent": ({"network": {"memory": "gru"}}, "`network.memory` must be none with --algorithm"),
    "aggregated": ({"aggregate": "pcgrad"}, "`aggregate` must be none with --algorithm matd3"),
    "log_std": ({"network": {"log_std": "agent"}}, "`network.log_std` must be default with"),
    "coupled": (
        {"method": "hypermarl-coupled"},
        "`method` must make parameters that hold for all observations, with --algorithm matd3",
    ),
    "diversity of squashed policies": (
        {"method": "dico", "dico": {"snd": 0.5}},
        "`dico.snd` must be 0 or left out with continuous actions and --algorithm matd3",
    ),
    "only warm-up": ({"frames": 24}, "`frames` must be above the 24 of matd3.warmup_frames"),
    "world state": ({"critic_input": "state"}, "`critic_input` must be observations: vmas"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_told_in_one_line(case):
    settings, said = BAD[case]
    with pytest.raises(UsageError, match=f"^{re.escape(said)}") as error:
        Trainer(config_of(**settings))
    assert "\n" not in str(error.value)


CHEETAH = {
    "env": "mamujoco/halfcheetah-2x3",
    "env_args": {"agent_obsk": None},
    "copies": 8,
    "steps": 10,
    "frames": 60_000,
    "network": {"hidden": [128, 128], "activation": "relu"},
    "matd3": {"batch_size": 256, "warmup_frames": 5000},
}
LEARNED = {  # settings, and by how much the return is above that of actions at random
    "navigation": (
        {
            "method": "hypermarl",
            "env": "vmas/navigation",
            "agents": 2,
            "copies": 32,
            "steps": 16,
            "frames": 61_440,
            "matd3": {"batch_size": 256, "warmup_frames": 5120},
        },
        1,
    ),
    "halfcheetah": (CHEETAH | {"method": "fups-id"}, 200),
    "halfcheetah, masks": (CHEETAH | {"method": "kaleidoscope"}, 200),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", LEARNED)
def test_a_task_is_learned(task):
    """In a few minutes: docs/off-policy.md has what the same comes to on the command line."""
    settings, gain = LEARNED[task]
    config = {"algorithm": "matd3", "diagnostics": "off"} | settings
    trainer = Trainer(TrainConfig.model_validate(config))
    at_random = play_episodes(
        make_env(settings["env"], copies=32, agents=2, seed=1, args=settings.get("env_args", {})),
        trainer.learner._warm_up,
        fixed_parameters(trainer.actor),
        random=torch.Generator().manual_seed(1),
    ).quantities()
    for _ in range(trainer.config.updates):
        trainer._next_update()
    learned = evaluate(trainer, episodes=32, seed=1).metrics
    assert learned.evaluation_return_low > at_random["evaluation_return_high"].values + gain

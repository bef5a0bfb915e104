import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from selection import slow_but

from analyses.conflict import quantity_table
from analyses.curves import series
from gradlab.checks import UsageError
from gradlab.quantity import dataset
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.config import TrainConfig
from trainers.envs import make_env
from trainers.envs.matrix_games import chance_return, specialisation_reward, synchronisation_reward
from trainers.envs.vector_env import Box, Discrete
from trainers.gae import advantages
from trainers.generators import METHODS
from trainers.loop import Trainer, describe
from trainers.policies import make_policy


def train(folder, **settings):
    settings = {"frames": 1024, "copies": 16, "steps": 16, "every": 2, "agents": 3} | settings
    trainer = Trainer(TrainConfig.model_validate(settings))
    with RunWriter(folder) as writer:
        writer.describe(**describe(trainer), state="running")
        trainer.run(writer, lambda *_: None)
        writer.describe(state="done")
    return trainer, open_run(folder)


@pytest.mark.parametrize("method", slow_but(METHODS, "fups", "hypermarl", "hypermarl-coupled"))
def test_diagnosed_run_ends_with_the_weights_of_a_plain_one(tmp_path, method):
    often = {"effects_every": 2, "effects_preconditioned": True}
    often["seps"] = {"pretraining_frames": 256}  # one update: its optimisers begin anew then
    diagnosed, run = train(tmp_path / "a", method=method, **often)
    plain, _ = train(tmp_path / "b", method=method, diagnostics="off", seps=often["seps"])
    for one, other in zip(diagnosed.actor.parameters(), plain.actor.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(diagnosed.critic.parameters(), plain.critic.parameters(), strict=True):
        assert torch.equal(one, other)
    assert run.quantity("residual").max() < 1e-4
    assert run.quantity("residual").sizes == {"update": 2, "network": 2}
    assert set(run.embeddings) == {"actor", "critic"}
    assert run.quantity("snd")["update"].values.tolist() == [2]
    assert run.quantity("transference")["update"].values.tolist() == [2]
    assert run.state == "done"


def test_a2c_is_diagnosed_on_the_loss_that_it_trains_on(tmp_path):
    trainer, run = train(tmp_path / "r", algorithm="a2c", env="specialisation-temporal")
    assert run.info["algorithm"] == "a2c"
    assert run.quantity("residual").max() < 1e-4
    assert not {"approximate_kl", "clip_fraction", "epochs_done"} & set(run.quantities)
    rollout = trainer._collect()
    recorded = dataset(trainer.diagnosis.of(0, rollout))["norm"]
    recorded = recorded.sel(network="actor", space="theta", layer="all").values
    trainer.actor.double()
    for agent in range(3):
        theta = {n: t[agent].detach() for n, t in trainer.actor.all_agents().items()}
        leaves = {name: tensor.requires_grad_() for name, tensor in theta.items()}
        own = {name: tensor[agent] for name, tensor in rollout.samples.items()}
        logits = trainer.policy.network.forward(leaves, own["observation"].double())
        chosen = torch.distributions.Categorical(logits=logits)
        gain = own["advantage"] * chosen.log_prob(own["action"]) + 0.01 * chosen.entropy()
        gradient = torch.autograd.grad(-gain.mean(), list(leaves.values()))
        norm = torch.cat([part.flatten() for part in gradient]).norm().item()
        assert recorded[agent] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "diagnosed", "effects"),
    [
        ({"effects_every": 3}, [0, 2, 3], [3]),
        ({"every": 1, "frames": 256 * 6}, [*range(6)], [5]),
        ({"effects_every": 1, "diagnostics": "light"}, [0, 2], []),
        ({"effects_every": 1, "diagnostics": "off"}, [], []),
    ],
    ids=["own", "default", "light", "off"],
)
def test_effects_are_recorded_on_their_own_schedule(tmp_path, settings, diagnosed, effects):
    _, run = train(tmp_path / "r", **settings)
    for names, updates in ((("cosine",), diagnosed), (("transference", "snd", "mantel"), effects)):
        for name in names:
            recorded = run.quantity(name)["update"].values.tolist() if updates else []
            assert recorded == updates
            assert (name in run.quantities) == bool(updates)


def test_quantities_of_both_schedules_are_read_together(tmp_path):
    _, run = train(tmp_path / "r", effects_every=2)
    pairs = {"network": 2, "agent": 3, "agent_other": 3}
    assert run.quantity("embedding_distance").sizes == {"update": 1} | pairs
    assert run.metrics.embedding_distance.sizes == {"update": 4} | pairs
    assert run.metrics.snd.notnull().values.tolist() == [False, False, True, False]
    assert series(run, "mantel").columns.tolist() == [
        *("update", "frames", "network", "compared_with", "correlation", "value")
    ]
    where = {"network": "actor", "layer": "all", "space": "psi"}
    assert (
        quantity_table([run], "snd", where)["snd"].tolist() == run.quantity("snd").values.tolist()
    )


def behaviour_by_hand(trainer, observations):
    """Mean distance of all agents' action distributions, one observation at a time."""
    agents = trainer.spec.agents
    total = np.zeros((agents, agents))
    theta = trainer.actor.double().all_agents()
    for observation in observations.double():
        policies = []
        for agent in range(agents):
            own = {name: t[agent if len(t) > 1 else 0] for name, t in theta.items()}
            output = trainer.policy.network.forward(own, observation).detach()
            if isinstance(trainer.spec.action_space, Discrete):
                policies.append(output.softmax(-1))
            else:
                box = trainer.spec.action_space
                half = (box.high - box.low) / 2
                std = half * own["log_std"].detach().exp()
                policies.append(torch.cat([(box.high + box.low) / 2 + half * output, std]))
        for i, k in np.ndindex(agents, agents):
            if isinstance(trainer.spec.action_space, Discrete):
                total[i, k] += jensenshannon(policies[i], policies[k], base=2)
            else:
                total[i, k] += torch.dist(policies[i], policies[k])
    return total / len(observations)


@pytest.mark.parametrize("method", ["hypermarl", "fups", "fups-id"])
@pytest.mark.parametrize("env", ["specialisation-temporal", "vmas/navigation"])
def test_behaviour_is_compared_on_the_observations_of_all_agents(env, method):
    settings = {"method": method, "env": env, "copies": 8, "steps": 4, "agents": 3}
    trainer = Trainer(TrainConfig.model_validate(settings))
    rollout = trainer._collect()  # as many observations as are drawn at most, or fewer
    found = trainer.diagnosis.of(trainer.config.effects_period, rollout)
    expected = behaviour_by_hand(trainer, rollout.samples["observation"].flatten(0, 1))
    distance, snd = found["behavioural_distance"].values, found["snd"].values
    np.testing.assert_allclose(distance, expected, rtol=1e-6, atol=1e-9)
    assert float(snd) == pytest.approx(expected[np.triu_indices(3, k=1)].mean(), abs=1e-9)
    assert (snd < 1e-9) == (method == "fups")
    assert found["snd_low"].values <= snd <= found["snd_high"].values


@pytest.mark.parametrize("space", ["discrete", "continuous"])
def test_distribution_is_that_of_the_actions(space):
    random = torch.Generator().manual_seed(0)
    box = Box(low=torch.tensor([-3.0, 0.0]), high=torch.tensor([1.0, 0.5]))
    policy = make_policy(
        5, Discrete(n=4) if space == "discrete" else box, hidden=(6,), activation="tanh"
    )
    theta = {
        name: torch.randn(2, *shape, generator=random)
        for layer, (outputs, inputs) in policy.network.layers.items()
        for name, shape in ((f"{layer}.weight", (outputs, inputs)), (f"{layer}.bias", (outputs,)))
    }
    theta |= {"log_std": torch.randn(2, 2, generator=random)} if space == "continuous" else {}
    observation = torch.randn(2, 7, 5, generator=random)
    action, log_prob = policy.sample(theta, observation, random)
    found = policy.distribution(theta, observation)
    if space == "discrete":
        expected = torch.distributions.Categorical(logits=found["logits"]).log_prob(action)
    else:
        assert found["std"].shape == found["mean"].shape == action.shape
        half = torch.tensor([2.0, 0.25])
        taken = torch.tensor([-1.0, 0.25]) + half * action  # not clipped
        normal = torch.distributions.Normal(found["mean"], found["std"])
        expected = (normal.log_prob(taken) + half.log()).sum(-1)
    torch.testing.assert_close(log_prob, expected)


def test_diverged_network_is_named_and_the_other_one_measured():
    small = {"env": "vmas/navigation", "copies": 8, "steps": 4, "agents": 2}
    trainer = Trainer(TrainConfig.model_validate(small))
    rollout = trainer._collect()
    with torch.no_grad():
        next(iter(trainer.critic.parameters())).fill_(torch.nan)
    for name in ("value", "advantage", "target"):  # what comes from the critic
        rollout.samples[name].fill_(torch.nan)
    found = trainer.diagnosis.of(trainer.config.effects_period, rollout)
    told = trainer.diagnosis.findings
    assert sum("critic, transference: not measured" in sentence for sentence in told) == 1
    assert np.isnan(found["transference"].values).all()  # advantages come from the critic
    assert np.isfinite(found["snd"].values)
    assert np.isfinite(found["effective_rank"].values).tolist() == [True, False]


@pytest.mark.parametrize(
    "method",
    [
        "hypermarl",
        *(pytest.param(method, marks=pytest.mark.slow) for method in ("fups-id", "nops")),
    ],
)
def test_specialisation_is_learned(tmp_path, method):
    _, run = train(
        tmp_path / "r",
        method=method,
        agents=2,
        frames=60_000,
        copies=64,
        steps=32,
        diagnostics="off",
    )
    assert float(run.quantity("episode_return")[-1]) > 0.95


def test_policy_without_id_stays_at_chance(tmp_path):
    _, run = train(
        tmp_path / "r",
        method="fups",
        agents=2,
        frames=60_000,
        copies=64,
        steps=32,
        diagnostics="off",
    )
    late = float(run.quantity("episode_return")[-5:].mean())
    assert late == pytest.approx(chance_return(2, 2), abs=0.03)


def test_second_run_into_a_folder_is_refused(tmp_path):
    train(tmp_path / "r", diagnostics="off")
    with pytest.raises(UsageError, match="already holds a run; nothing was overwritten"):
        RunWriter(tmp_path / "r")


@pytest.mark.parametrize("method", ["hypermarl", "hypermarl-linear"])
def test_generated_layers_start_with_ppo_gains(method):
    trainer = Trainer(TrainConfig(method=method, agents=5))
    for name, weights in trainer.actor.all_agents().items():
        if name.endswith("weight"):
            gain = weights.detach().flatten(1).norm(dim=1) / min(weights.shape[1:]) ** 0.5
            expected = trainer.policy.network.gain(name.removesuffix(".weight"))
            torch.testing.assert_close(gain, torch.full_like(gain, expected), rtol=1e-3, atol=0)


def test_rewards_equal_the_papers_examples():
    action = torch.tensor([[1], [1], [2], [3]])
    assert specialisation_reward(action, 4)[:, 0].tolist() == [0.5, 0.5, 1, 1]
    expected = [1 / 3, 1 / 3, 1 / 4, 1 / 4]
    assert synchronisation_reward(action, 4)[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("agents", "expected"), [(2, 0.750), (4, 0.684), (8, 0.656)])
def test_chance_return_is_the_known_one(agents, expected):
    assert chance_return(agents, agents) == pytest.approx(expected, abs=5e-4)


def test_temporal_game_is_cut_off_at_its_horizon():
    env = make_env("specialisation-temporal", copies=2, agents=2, args={"horizon": 2})
    assert env.reset().eq(-1).all()
    first = env.step(torch.tensor([[0, 1], [1, 1]]))
    assert first.observation[0].tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    assert not first.truncated.any()
    last = env.step(torch.zeros(2, 2, dtype=torch.int64))
    assert last.truncated.all()
    assert not last.terminated.any()
    assert last.observation.eq(-1).all()
    assert last.final_observation[0].tolist() == [[1, 0, 1, 0]] * 2


def test_advantages_equal_a_loop():
    random = torch.Generator().manual_seed(0)
    reward, value, following = torch.randn(3, 1, 6, 1, generator=random, dtype=torch.float64)
    terminated = torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.bool)[:, None]
    truncated = torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.bool)[:, None]
    got = advantages(reward, value, following, terminated, truncated, discount=0.9, gae_lambda=0.8)[
        0, :, 0
    ]
    expected = np.zeros(7)
    for t in reversed(range(6)):
        bootstrap = 0 if terminated[t] else 0.9 * following[0, t, 0].item()
        delta = reward[0, t, 0].item() + bootstrap - value[0, t, 0].item()
        ended = bool(terminated[t] or truncated[t])
        expected[t] = delta + (0 if ended else 0.72 * expected[t + 1])
    np.testing.assert_allclose(got, expected[:6], rtol=1e-12)

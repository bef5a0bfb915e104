import copy
import pickle

import numpy as np
import pytest
import torch
from benchmarl.algorithms import IddpgConfig, IppoConfig, MaddpgConfig, MappoConfig, MasacConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models import GruConfig, MlpConfig

import gradlab
from gradlab.checks import UsageError
from gradlab.integrations.benchmarl import GradlabCallback
from gradlab.integrations.hypermarl import HyperMarlConfig

COPIES, STEPS, AGENTS = 8, 5, 3
MODELS = {"mlp": MlpConfig, "gru": GruConfig, "hypermarl": HyperMarlConfig}
ALGORITHMS = {
    "ippo": IppoConfig,
    "mappo": MappoConfig,
    "iddpg": IddpgConfig,
    "maddpg": MaddpgConfig,
    "masac": MasacConfig,
}


def model(name):
    made = MODELS[name].get_from_yaml()
    if name == "gru":
        made.hidden_size, made.mlp_num_cells = 4, [6]
    else:
        made.num_cells = [6]
    if name == "hypermarl":
        made.hidden = (6,)
    return made


def experiment(folder, callbacks, of="ippo", by="mlp", *, shared=True, task=None, **settings):
    config = ExperimentConfig.get_from_yaml()
    config.loggers, config.create_json, config.evaluation, config.render = [], False, False, False
    config.save_folder = str(folder)
    config.share_policy_params = shared
    config.max_n_frames, config.max_n_iters = None, 2
    for kind in ("on", "off"):
        setattr(config, f"{kind}_policy_collected_frames_per_batch", COPIES * STEPS)
        setattr(config, f"{kind}_policy_n_envs_per_worker", COPIES)
    config.on_policy_minibatch_size, config.on_policy_n_minibatch_iters = COPIES * STEPS // 2, 2
    config.off_policy_train_batch_size, config.off_policy_n_optimizer_steps = 4 * STEPS, 2
    config.off_policy_memory_size = 100
    for name, value in settings.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    algorithm = ALGORITHMS[of].get_from_yaml()
    algorithm.share_param_critic = shared and by != "hypermarl"
    if hasattr(algorithm, "entropy_coef"):
        # An entropy of a squashed normal is drawn anew at every call.
        algorithm.entropy_coef, algorithm.use_tanh_normal = (0.1, False) if shared else (0.0, True)
    if task is None:
        task = VmasTask.NAVIGATION.get_from_yaml()
        task.config |= {"n_agents": AGENTS, "max_steps": 3}
    return Experiment(task, algorithm, model(by), 0, config, callbacks=callbacks)


class Oracle(Callback):
    """Each agent's gradient, by autograd of BenchMARL's own loss on the same batch, in float64."""

    def on_batch_collected(self, batch):
        if self.experiment.on_policy:
            own = batch.exclude("info").clone()
            ready = self.experiment.algorithm.process_batch("agents", own)
            self.note(ready, {"actor": "loss_objective", "critic": "loss_critic"})

    def on_train_step(self, batch, group):  # noqa: ARG002
        if not self.experiment.on_policy and not hasattr(self, "found"):
            self.note(batch, {"actor": "loss_actor", "critic": "loss_value"})

    def note(self, batch, names):
        loss = copy.deepcopy(self.experiment.losses["agents"])
        loss.reduction = "none"
        # BenchMARL's GRUs begin with a memory in single precision, whatever their weights are.
        if not self.experiment.algorithm.has_rnn:
            loss = loss.double()
            batch = batch.clone().apply(lambda t: t.double() if t.is_floating_point() else t)
        of = loss(batch)
        if of.get("loss_entropy", None) is not None:
            of["loss_objective"] = of["loss_objective"] + of["loss_entropy"]
        self.found, self.samples = {}, batch.numel()
        params = [loss.actor_network_params, getattr(loss, "critic_network_params", None)]
        if params[1] is None:
            params[1] = loss.value_network_params
        for (network, name), tree in zip(names.items(), params, strict=True):
            leaves = [leaf for leaf in tree.values(True, True) if leaf.requires_grad]
            self.found[network] = torch.stack([
                torch.cat([
                    (torch.zeros_like(p) if g is None else g).flatten().double()
                    for g, p in zip(
                        torch.autograd.grad(
                            of[name][..., agent].mean(),
                            leaves,
                            retain_graph=True,
                            allow_unused=True,
                        ),
                        leaves,
                        strict=True,
                    )
                ])
                for agent in range(AGENTS)
            ])


CASES = [
    ("ippo", "mlp", True),
    ("ippo", "mlp", False),
    ("mappo", "mlp", True),
    ("iddpg", "mlp", False),
    ("ippo", "hypermarl", True),
    ("mappo", "gru", False),
]
MORE = [
    ("mappo", "mlp", False),
    ("iddpg", "mlp", True),
    ("mappo", "hypermarl", False),
    ("ippo", "gru", True),
    ("ippo", "gru", False),
    ("mappo", "gru", True),
    ("iddpg", "gru", True),
    ("iddpg", "gru", False),
]
METHODS = {True: "fups", False: "nops"}


@pytest.mark.parametrize(
    ("of", "by", "shared"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_recorded_numbers_are_those_of_the_experiments_own_loss(of, by, shared, tmp_path):
    oracle, level = Oracle(), "light" if of == "iddpg" else "full"
    callbacks = [GradlabCallback(every=1, level=level), oracle]
    made = experiment(tmp_path, callbacks, of, by, shared=shared, max_n_iters=1)
    made.run()
    run = gradlab.open_run(made.folder_name / "gradlab")
    assert (run.state, run.environment) == ("done", "vmas/navigation")
    assert run.method == (by if by == "hypermarl" else METHODS[shared])
    for network, g in oracle.found.items():
        place = {"network": network, "space": "psi", "layer": "all"}
        norm = run.quantity("norm", where=place)[0]
        np.testing.assert_allclose(norm, g.norm(dim=1), rtol=2e-4, err_msg=network)
        cosine = torch.nn.functional.cosine_similarity(g[:, None], g, dim=-1)
        off = ~np.eye(AGENTS, dtype=bool)
        of_pairs = run.quantity("cosine", where=place)[0].values[off]
        np.testing.assert_allclose(of_pairs, cosine[off], rtol=1e-3, atol=1e-4, err_msg=network)
    assert run.quantity("residual").max() < 1e-9
    segments = oracle.samples // STEPS
    drawn = segments if by == "gru" else 4 * STEPS
    assert run.config["copies"] == (drawn if of == "iddpg" else COPIES)


def trained(folder, callbacks, of, **settings):
    made = experiment(folder, callbacks, of, **settings)
    made.run()
    state = made.losses["agents"].state_dict()
    return {name: t.clone() for name, t in state.items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize(
    ("of", "by"),
    [
        ("ippo", "mlp"),
        ("iddpg", "mlp"),
        pytest.param("mappo", "gru", marks=pytest.mark.slow),
        pytest.param("ippo", "hypermarl", marks=pytest.mark.slow),
    ],
)
def test_a_watched_experiment_ends_with_bitwise_the_same_weights(of, by, tmp_path):
    plain = trained(tmp_path, [], of, by=by)
    random = torch.random.get_rng_state()
    callback = GradlabCallback(every=1, out=tmp_path / "run")
    watched = trained(tmp_path, [callback], of, by=by)
    assert plain.keys() == watched.keys()
    assert len(plain) > 8
    for name, tensor in plain.items():
        assert torch.equal(tensor, watched[name]), name
    assert torch.equal(random, torch.random.get_rng_state())
    run = gradlab.open_run(tmp_path / "run")
    assert run.updates("cosine") == [0, 1]
    assert run.updates("episode_return") == [0, 1]


class Ends(Callback):
    """Ends a training in its second iteration."""

    error: type[BaseException] = ZeroDivisionError

    def on_train_end(self, training_td, group):  # noqa: ARG002
        if self.experiment.n_iters_performed == 1:
            raise self.error("over")


class Stops(Ends):
    error = KeyboardInterrupt


@pytest.mark.parametrize(("ends", "state"), [(Ends, "failed"), (Stops, "stopped")])
def test_experiment_that_raises_leaves_a_closed_run(ends, state, tmp_path):
    made = experiment(tmp_path, [GradlabCallback(every=2), ends()])
    with pytest.raises(ends.error):
        made.run()
    run = gradlab.open_run(made.folder_name / "gradlab")
    assert (run.state, run.updates("cosine")) == (state, [0])
    assert run.updates("episode_return") == [0, 1]


def test_return_is_the_one_that_the_experiment_prints(tmp_path):
    made = experiment(tmp_path, [GradlabCallback(every=5)])
    made.run()
    run = gradlab.open_run(made.folder_name / "gradlab")
    assert run.quantity("episode_return").values[-1] == pytest.approx(made.mean_return, rel=1e-5)


def test_callback_is_pickled_as_it_was_configured(tmp_path):
    callback = GradlabCallback(every=3, out=tmp_path / "run", level="light")
    made = experiment(tmp_path, [callback])
    again = pickle.loads(pickle.dumps(callback))
    assert again.experiment is None
    assert made.callbacks == [callback]
    with pytest.raises(UsageError, match="another `out`, or restore the experiment"):
        experiment(tmp_path, [again])


def test_what_cannot_be_diagnosed_is_explained_before_the_training(tmp_path):
    for of, by, message in (
        ("masac", "mlp", "of ClipPPOLoss, DDPGLoss, .* Got (Discrete)?SACLoss"),
        ("maddpg", "mlp", "critics that read one agent alone"),
        ("iddpg", "hypermarl", "not generated by a hypernetwork"),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            experiment(tmp_path, [GradlabCallback()], of, by)
        assert "\n" not in str(raised.value)
    callback = GradlabCallback()
    made = experiment(tmp_path, [callback], "iddpg")
    made.config.off_policy_use_prioritized_replay_buffer = True
    with pytest.raises(UsageError, match="draw all samples alike"):
        callback.on_setup()
    with pytest.raises(UsageError, match="`level` must be"):
        experiment(tmp_path, [GradlabCallback(level="off")])
    with pytest.raises(UsageError, match="`every` must be at least 1"):
        experiment(tmp_path, [GradlabCallback(every=0)])


def test_settings_of_hypermarl_that_cannot_be_are_explained():
    for settings, message in (
        ({"activation": "gelu"}, "`activation` must be tanh or relu"),
        ({"embedding": "lerned"}, "Unknown embedding 'lerned'. Did you mean 'learned'"),
        ({"hidden": (0,)}, "`hidden` must hold widths above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            HyperMarlConfig(**settings)


def test_hypermarl_as_a_critic_of_all_agents_must_not_be_shared(tmp_path):
    algorithm = MappoConfig.get_from_yaml()
    algorithm.share_param_critic = True
    task = VmasTask.NAVIGATION.get_from_yaml()
    config = ExperimentConfig.get_from_yaml()
    config.save_folder, config.loggers = str(tmp_path), []
    with pytest.raises(UsageError, match="share_param_critic=True; set it to False"):
        Experiment(task, algorithm, HyperMarlConfig(), 0, config)


@pytest.mark.slow
def test_restored_experiment_goes_on_with_its_run(tmp_path):
    frames = COPIES * STEPS
    made = experiment(tmp_path, [GradlabCallback(every=1)], checkpoint_interval=frames)
    made.run()
    first = made.folder_name / "checkpoints" / f"checkpoint_{frames}.pt"
    found = gradlab.open_run(made.folder_name / "gradlab").quantity("norm").values
    Experiment.reload_from_file(str(first)).run()
    run = gradlab.open_run(made.folder_name / "gradlab")
    assert (run.state, run.updates("norm")) == ("done", [0, 1])
    np.testing.assert_array_equal(run.quantity("norm").values[0], found[0])


class Returns(Callback):
    """Notes what the experiment prints."""

    def __init__(self):
        super().__init__()
        self.of = []

    def on_batch_collected(self, batch):  # noqa: ARG002
        self.of.append(self.experiment.mean_return)


@pytest.mark.slow
def test_hypermarl_learns_to_navigate_as_a_model_of_benchmarl(tmp_path):
    config = ExperimentConfig.get_from_yaml()
    config.save_folder = str(tmp_path)
    config.loggers, config.create_json, config.evaluation = [], False, False
    config.max_n_frames, config.max_n_iters, config.lr = None, 25, 5e-4
    config.on_policy_n_envs_per_worker, config.on_policy_collected_frames_per_batch = 60, 6000
    config.on_policy_minibatch_size, config.on_policy_n_minibatch_iters = 1500, 8
    returns = Returns()
    Experiment(
        task=VmasTask.NAVIGATION.get_from_yaml(),
        algorithm_config=IppoConfig.get_from_yaml(),
        model_config=HyperMarlConfig(),
        seed=0,
        config=config,
        callbacks=[returns, GradlabCallback(every=10, out=tmp_path / "run")],
    ).run()
    start, end = np.mean(returns.of[:3]), np.mean(returns.of[-3:])
    assert end > start + 0.5
    run = gradlab.open_run(tmp_path / "run")
    assert (run.method, run.updates("cosine")) == (
        "hypermarl",
        [0, 10, 20],
    )


@pytest.mark.slow
@pytest.mark.parametrize("good", [1, 2])
def test_each_group_has_a_run_and_a_lone_agent_none(good, tmp_path):
    task = VmasTask.SIMPLE_TAG.get_from_yaml()
    task.config |= {"num_good_agents": good, "num_adversaries": 3, "max_steps": 3}
    if good == 1:
        with pytest.warns(UserWarning, match="group 'agent' has one agent"):
            made = experiment(tmp_path, [GradlabCallback(every=1)], task=task)
        runs = {"adversary": "gradlab"}
    else:
        made = experiment(tmp_path, [GradlabCallback(every=1)], task=task)
        runs = {"adversary": "gradlab/adversary", "agent": "gradlab/agent"}
    made.run()
    agents = {"adversary": 3, "agent": good}
    for group, folder in runs.items():
        run = gradlab.open_run(made.folder_name / folder)
        assert (run.state, run.info["agents"], run.config["group"]) == (
            "done",
            agents[group],
            group,
        )
        assert run.updates("cosine") == run.updates("episode_return") == [0, 1]
    returns = [
        gradlab.open_run(made.folder_name / folder).quantity("episode_return").values[-1]
        for folder in runs.values()
    ]
    if good == 2:
        assert np.mean(returns) == pytest.approx(made.mean_return, rel=1e-5)

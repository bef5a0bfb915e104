"""BenchMARL's side of bench_throughput.py, a process of its own."""

import json
import sys
import tempfile
import warnings

import torch
from benchmarl.algorithms import IppoConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models import MlpConfig
from throughput_gate import Gate

ALGORITHMS = {"ippo": IppoConfig, "mappo": MappoConfig}


class Timing(Callback):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def on_batch_collected(self, batch):  # noqa: ARG002
        self.gate.collected()

    def on_train_end(self, training_td, group):  # noqa: ARG002
        self.gate.updated()


def experiment(cell, folder, callbacks=()):
    """An experiment with a cell's settings, which keeps its files in a folder."""
    frames, ppo = cell["copies"] * cell["steps"], cell["ppo"]
    config = ExperimentConfig.get_from_yaml()
    config.on_policy_n_envs_per_worker = cell["copies"]
    config.on_policy_collected_frames_per_batch = frames
    config.on_policy_minibatch_size = frames // ppo["minibatches"]
    config.on_policy_n_minibatch_iters = ppo["epochs"]
    config.max_n_frames = cell.get("frames", 10**9)
    config.evaluation = config.render = config.create_json = False
    config.loggers = []
    config.share_policy_params = cell["method"] == "fups"
    config.lr, config.adam_eps = ppo["learning_rate"], ppo["adam_epsilon"]
    config.clip_grad_val, config.gamma = ppo["max_gradient_norm"], ppo["discount"]
    algorithm = ALGORITHMS[cell["algorithm"]].get_from_yaml()
    algorithm.lmbda, algorithm.clip_epsilon = ppo["gae_lambda"], ppo["clip"]
    algorithm.share_param_critic = cell["method"] == "fups"
    network = MlpConfig(
        num_cells=cell["hidden"], activation_class=torch.nn.Tanh, layer_class=torch.nn.Linear
    )
    task = VmasTask[cell["scenario"].upper()].get_task({
        "max_steps": cell["steps"],
        "n_agents": cell["agents"],
        **cell["args"],
    })
    config.save_folder = folder
    return Experiment(
        task=task,
        algorithm_config=algorithm,
        model_config=network,
        seed=cell["seed"],
        config=config,
        callbacks=list(callbacks),
    )


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        experiment(json.loads(sys.argv[1]), folder, [Timing(Gate())]).run()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()

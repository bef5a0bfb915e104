"""BenchMARL's own experiment with gradlab watching: IPPO or MAPPO, a shared policy or HyperMARL.

Run it, then `gradlab conflict` and `gradlab dashboard` on the folder that it prints.
"""

import argparse
import warnings
from pathlib import Path

from benchmarl.algorithms import IppoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models import MlpConfig

from gradlab.integrations.benchmarl import GradlabCallback
from gradlab.integrations.hypermarl import HyperMarlConfig


def settings(folder, iterations, copies, steps):
    config = ExperimentConfig.get_from_yaml()
    config.save_folder = str(folder)
    config.loggers, config.create_json, config.evaluation = [], False, False
    config.max_n_frames, config.max_n_iters = None, iterations
    config.on_policy_n_envs_per_worker = copies
    config.on_policy_collected_frames_per_batch = copies * steps
    config.on_policy_minibatch_size, config.on_policy_n_minibatch_iters = copies * steps // 4, 8
    config.lr = 5e-4
    return config


def main(folder, model, iterations=20, copies=64, steps=100, every=5):
    task = VmasTask.NAVIGATION.get_from_yaml()
    task.config |= {"n_agents": 4, "max_steps": steps}
    models = {"mlp": MlpConfig.get_from_yaml(), "hypermarl": HyperMarlConfig()}
    folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(
        task=task,
        algorithm_config=IppoConfig.get_from_yaml(),
        model_config=models[model],
        seed=0,
        config=settings(folder, iterations, copies, steps),
        callbacks=[GradlabCallback(every=every)],  # the one line
    )
    experiment.run()
    return Path(experiment.folder_name, "gradlab")


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # BenchMARL's, of TorchRL
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarl"))
    parser.add_argument("--model", choices=["mlp", "hypermarl"], default="mlp")
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    print(f"Run: {main(options.folder, options.model, options.iterations)}")

"""BenchMARL's side of compare_learning.py, a process of its own."""

import json
import sys
import tempfile
import warnings

import torch
from learning_evaluation import returns
from tensordict import TensorDict
from throughput_peer import experiment
from torchrl.envs.utils import ExplorationType, set_exploration_type


def main():
    cell = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trained = experiment(cell, folder)
        trained.run()
        policy = trained.policy

    def act(observation):
        group = TensorDict({"observation": observation}, observation.shape[:2])
        return policy(TensorDict({"agents": group}, observation.shape[:1]))["agents", "action"]

    found = {"frames": trained.total_frames}
    for name, kind in (
        ("mean", ExplorationType.DETERMINISTIC),
        ("sampled", ExplorationType.RANDOM),
    ):
        with set_exploration_type(kind):
            found[name] = returns(act, cell)
    print("found:", json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()

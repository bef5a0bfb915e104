"""What a training update takes with each sharing scheme, and algorithm, beside `fups` with PPO.

And with MATD3: Kaleidoscope, which has critics of its own there, beside `fups-id`. Whole updates,
rollout and all, without diagnostics, in vmas/navigation; an update of each in turn. Those of SePS
are in groups; one pass of the encoder that makes them is timed over as many frames.
"""

import torch
from measure import ratios, write

from trainers.agent_encoder import encode_agents
from trainers.config import SePSConfig, TrainConfig
from trainers.generators import METHODS
from trainers.loop import Trainer

COPIES, STEPS, ROUNDS = 128, 32, 8
SETTINGS = {
    "dico": {"dico": {"snd": 1.0}},
    "seps": {"seps": {"pretraining_frames": 1, "epochs": 1}},  # in groups after the first update
}
BASE, OFF_POLICY_BASE = "fups", "fups-id"


def trainer(**settings):
    common = {"env": "vmas/navigation", "agents": 4, "copies": COPIES, "steps": STEPS}
    return Trainer(TrainConfig.model_validate(common | {"diagnostics": "off"} | settings))


def encoder():
    """One pass over a rollout of 4 agents, of navigation's sizes."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(COPIES * STEPS, 4, *shape, generator=random)

    held = {"observation": draw(18), "following": draw(18), "action": draw(2), "reward": draw()}
    held |= {"left": draw() > 9, "active": draw() < 9}
    return lambda: encode_agents(held, SePSConfig(epochs=1), random)


def main():
    trainings = {
        method: trainer(method=method, **SETTINGS.get(method, {}))
        for method in METHODS
        if method != "hypermarl-coupled"  # its cost is another subject: parameters of each sample
    }
    trainings[f"{BASE}, a2c"] = trainer(method=BASE, algorithm="a2c")
    central = {"method": "nops", "critic_method": "fups", "reward": "team"}
    for algorithm in ("mappo", "happo"):  # of the same networks
        trainings[f"nops+fups, {algorithm}"] = trainer(algorithm=algorithm, **central)
    warm = {"warmup_frames": 1}
    off_policy = {
        f"{method}, matd3": trainer(method=method, algorithm="matd3", matd3=warm)
        for method in (OFF_POLICY_BASE, "hypermarl", "kaleidoscope")
    }
    on_policy = {name: of._next_update for name, of in trainings.items()}
    on_policy["seps, a pass of its encoder"] = encoder()
    turns = {name: of._next_update for name, of in off_policy.items()}
    rows = [
        {"training": name, "agents": 4, "frames": COPIES * STEPS, **row}
        for of, base in ((on_policy, BASE), (turns, f"{OFF_POLICY_BASE}, matd3"))
        for name, row in ratios(of, ROUNDS, base).items()
    ]
    for row in rows:
        print(f"| `{row['training']}` | {row['ms']:.0f} | {row['ratio']:.2f} |", flush=True)
    write("schemes", rows)


if __name__ == "__main__":
    main()

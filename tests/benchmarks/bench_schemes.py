"""What a training update takes with each sharing scheme, and with A2C, beside `fups` with PPO.

And with MATD3: Kaleidoscope, which has critics of its own there, beside `fups-id`. Whole updates,
rollout and all, without diagnostics, in vmas/navigation; an update of each in turn.
"""

from measure import ratios, write

from trainers.config import TrainConfig
from trainers.generators import METHODS
from trainers.loop import Trainer

COPIES, STEPS, ROUNDS = 128, 32, 8
BASE, OFF_POLICY_BASE = "fups", "fups-id"


def trainer(**settings):
    common = {"env": "vmas/navigation", "agents": 4, "copies": COPIES, "steps": STEPS}
    return Trainer(TrainConfig.model_validate(common | {"diagnostics": "off"} | settings))


def main():
    trainings = {
        method: trainer(method=method, dico={"snd": 1.0} if method == "dico" else {})
        for method in METHODS
        if method != "hypermarl-coupled"  # its cost is another subject: parameters of each sample
    }
    trainings[f"{BASE}, a2c"] = trainer(method=BASE, algorithm="a2c")
    warm = {"warmup_frames": 1}
    off_policy = {
        f"{method}, matd3": trainer(method=method, algorithm="matd3", matd3=warm)
        for method in (OFF_POLICY_BASE, "hypermarl", "kaleidoscope")
    }
    rows = [
        {"training": name, "agents": 4, "frames": COPIES * STEPS, **row}
        for of, base in ((trainings, BASE), (off_policy, f"{OFF_POLICY_BASE}, matd3"))
        for name, row in ratios({n: t._next_update for n, t in of.items()}, ROUNDS, base).items()
    ]
    for row in rows:
        print(f"| `{row['training']}` | {row['ms']:.0f} | {row['ratio']:.2f} |", flush=True)
    write("schemes", rows)


if __name__ == "__main__":
    main()

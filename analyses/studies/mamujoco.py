"""Do robots whose joints are agents walk better by one sharing scheme than by another?"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analyses.studies.chart import Line, Panel, chart, ticks_for
from analyses.studies.seeds import (
    difference,
    estimates,
    last,
    over_training,
    select,
    side_by_side,
    signal_to_noise,
)
from analyses.studies.study import Findings, Study
from analyses.studies.verdict import Estimate, Verdict, judge
from gradlab.run import Run

ON_POLICY = ("mappo fups-id", "mappo nops", "mappo hypermarl", "happo nops")
OFF_POLICY = ("matd3 fups-id", "matd3 kaleidoscope", "matd3 hypermarl")
"""Algorithms, each with the sharing scheme of its actors."""

HUMANOID = "humanoid-17x1"
ROBOTS = ("halfcheetah-2x3", "walker2d-2x3", "ant-4x2", HUMANOID)

_RETURN, _CONFLICT = "return", "conflict rate of g"
_FIGURES = {
    _RETURN: ",.0f",
    _CONFLICT: ".3f",
    "conflict rate of Z": ".3f",
    "mean cosine of g": "+.3f",
    "signal to noise of Z": ".3f",
    "coordinate variance": ".2e",
}
_BY = ("robot", "learner")


def _sweep(
    robots: Sequence[str],
    seeds: int,
    settings: Mapping[str, object],
    *,
    on_policy: Mapping[str, object],
    off_policy: Mapping[str, object],
) -> dict[str, Any]:
    """Every learner on every robot; the paper has no off-policy training of the humanoid."""
    runs = []
    for robot in robots:
        for learner in ON_POLICY if robot == HUMANOID else ON_POLICY + OFF_POLICY:
            algorithm, method = learner.split()
            own = off_policy if learner in OFF_POLICY else on_policy
            runs += [
                {"preset": f"mamujoco-{robot}", "algorithm": algorithm, "method": method}
                | {"seed": seed, **own}
                for seed in range(seeds)
            ]
    return {"settings": dict(settings), "runs": runs}


def _row(run: Run) -> dict[str, Any]:
    return {
        "robot": run.environment.removeprefix("mamujoco/"),
        "learner": f"{run.config['algorithm']} {run.config['method']}",
        "seed": int(run.info["seed"]),
        _RETURN: last(run, "evaluation_return"),
        _CONFLICT: over_training(run, "conflict_rate", "psi"),
        "conflict rate of Z": over_training(run, "conflict_rate", "theta"),
        "mean cosine of g": over_training(run, "mean_cosine", "psi"),
        "signal to noise of Z": signal_to_noise(run, "theta"),
        "coordinate variance": over_training(run, "coordinate_variance"),
    }


def read(runs: Sequence[Run]) -> Findings:
    """Read the study's runs.

    Args:
        runs: Those that are done.

    Returns:
        Returns, conflict and variance of every robot and learner.
    """
    found = pd.DataFrame([_row(run) for run in runs])
    table = estimates(found, _BY, _FIGURES)
    return Findings(
        shown=side_by_side(table, _BY[:1], "learner"),
        verdicts=_verdicts(found),
        tables={"mamujoco": table.drop(columns="text"), "mamujoco-runs": found},
        figures={"mamujoco": _figure(table)},
    )


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    robots = list(dict.fromkeys(found["robot"]))

    def gaps(
        figure: str, learner: str, other: str, among: Sequence[str] = robots
    ) -> dict[str, Estimate]:
        return {
            robot: difference(
                *(select(found, figure, robot=robot, learner=name) for name in (learner, other))
            )
            for robot in among
        }

    verdicts = []
    if HUMANOID in robots:
        verdicts += [
            judge(
                f"{HUMANOID}: {learner} returns more than mappo fups-id, which the paper finds not "
                "to learn there",
                gaps(_RETURN, learner, "mappo fups-id", [HUMANOID]),
                above=0,
                form="+,.0f",
            )
            for learner in ("mappo nops", "mappo hypermarl")
        ]
    trained = set(found["learner"])
    for own, others in (("mappo hypermarl", ON_POLICY), ("matd3 hypermarl", OFF_POLICY)):
        among = [robot for robot in robots if own.startswith("mappo") or robot != HUMANOID]
        verdicts += [
            judge(
                f"{own} returns more than {other}",
                gaps(_RETURN, own, other, among),
                above=0,
                form="+,.0f",
            )
            for other in others
            if other != own and among
        ]
    verdicts += [
        judge(
            f"there is more conflict in the trained parameters of {algorithm} fups-id than of "
            f"{algorithm} hypermarl",
            gaps(
                _CONFLICT,
                f"{algorithm} fups-id",
                f"{algorithm} hypermarl",
                [robot for robot in robots if algorithm == "mappo" or robot != HUMANOID],
            ),
            above=0,
            form="+.3f",
        )
        for algorithm in ("mappo", "matd3")
        if f"{algorithm} fups-id" in trained
    ]
    return verdicts


def _figure(table: pd.DataFrame) -> str:
    robots = list(dict.fromkeys(table["robot"]))
    panels = []
    for figure in (_RETURN, _CONFLICT):
        for kind, learners in (("on-policy", ON_POLICY), ("off-policy", OFF_POLICY)):
            lines, drawn = [], []
            for learner in learners:
                where = (table["learner"] == learner) & (table["figure"] == figure)
                rows = table[where].set_index("robot").reindex(robots)
                numbers = [Estimate(*row) for row in rows[["value", "low", "high"]].to_numpy()]
                drawn += numbers
                lines.append(Line.of(learner, numbers))
            panels.append(Panel(title=f"{kind}: {figure}", lines=lines, ticks=ticks_for(drawn)))
    return chart(panels, [robot.partition("-")[0] for robot in robots], "robot")


_COMMON = {"diagnostics": "full", "env_args": {"workers": 1}}

_SMALL_ON = {"copies": 8, "steps": 128, "network": {"hidden": [64, 64]}}
_SMALL_OFF = {
    "copies": 8,
    "steps": 16,
    "network": {"hidden": [64, 64]},
    "matd3": {"batch_size": 128, "warmup_frames": 2_000},
}
"""Settings that keep the smallest budget small, over the paper's."""

_FINAL = 1_000_000
"""Updates between evaluations: more than there are, so that only the last one is evaluated."""

MAMUJOCO = Study(
    name="mamujoco",
    question="Do robots whose joints are agents walk better by HyperMARL, on- and off-policy?",
    budgets={
        "quick": _sweep(
            ROBOTS[:1],
            5,
            {**_COMMON, "evaluation": {"every": _FINAL, "episodes": 4}},
            on_policy={**_SMALL_ON, "frames": 20_480, "every": 5},
            off_policy={**_SMALL_OFF, "frames": 5_120, "every": 10},
        ),
        "standard": _sweep(
            ROBOTS,
            5,
            {**_COMMON, "evaluation": {"every": _FINAL, "episodes": 16}},
            on_policy={"frames": 400_000, "every": 10},
            off_policy={"frames": 100_000, "every": 50, "matd3": {"batch_size": 256}},
        ),
        "full": _sweep(
            ROBOTS,
            5,
            {**_COMMON, "evaluation": {"every": _FINAL, "episodes": 40}},
            on_policy={"every": 50},
            off_policy={"every": 1_000},
        ),
    },
    about="Interquartile means over seeds with 95 % percentile bootstrap intervals (none for "
    "fewer than 5 seeds). Return: undiscounted, of the evaluation after the last update, whole "
    "episodes, each policy's mean as the action. The rest is of the actors, means over the "
    "diagnosed updates: shares of agent pairs told to be in conflict at a false discovery rate of "
    "5 %, of g_i in psi-space and of Z_i in theta-space; mean plug-in cosine over pairs; squared "
    "length of Z_i over its variance, without bias, ratio of means over updates and agents; "
    "coordinate variance, what the paper's code calls gradient variance (docs/variance.md). Two "
    "agents are one pair, so that its rate is a share of the diagnosed updates. Losses of PPO and "
    "of MATD3 are not of one kind: compare within an algorithm.\n\nAs published for 10 million "
    "frames (Tessera et al., 2025, tables 3 and 7, interquartile means; not gradlab's numbers): "
    "happo, fups-id, nops and hypermarl, the latter three by MAPPO, return 6501, 566, 6188 and "
    "6544 on humanoid-17x1; 4748, 4574, 4747 and 5065 on walker2d-2x3; 6752, 6771, 6650 and 7064 "
    "on halfcheetah-2x3; 6032, 6149, 6046 and 5940 on ant-4x2; by MATD3, kaleidoscope and "
    "hypermarl return 6161 and 5887 on ant-4x2, 6901 and 7057 on halfcheetah-2x3, 6664 and 7058 on "
    "walker2d-2x3. The smaller budgets are far from that many frames: their returns are of the "
    "beginning of learning. Other differences: docs/presets.md.",
    read=read,
)

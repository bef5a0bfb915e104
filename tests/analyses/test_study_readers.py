"""Readers of studies on runs that were made up, so that the answers are known."""

import numpy as np
import pytest

from analyses.studies import homogeneous, mamujoco, scaling
from gradlab.quantity import Quantity
from gradlab.run import open_run
from gradlab.run_writer import RunWriter
from trainers.config import TrainConfig
from trainers.presets import with_preset

AXES = {"network": ["actor"], "space": ["psi", "theta"], "layer": ["all"]}


def labelled(values, coords):
    shape = tuple(map(len, coords.values()))
    return Quantity(values=np.broadcast_to(values, shape), dims=tuple(coords), coords=coords)


def made_up(path, settings, updates):
    """A run with those settings; `updates` has for each what is recorded, arrays or scalars."""
    config = TrainConfig.model_validate(with_preset(settings))
    with RunWriter(path) as writer:
        writer.describe(
            method=config.scheme,
            environment=config.env,
            agents=config.agents,
            seed=config.seed,
            config=config.model_dump(mode="json"),
            state="done",
        )
        for number, found in enumerate(updates):
            quantities = {
                name: value if isinstance(value, Quantity) else Quantity.scalar(value)
                for name, value in found.items()
            }
            writer.write(number, quantities)
    return open_run(path)


def diagnosed(conflict, cosine=0.0, signal=1.0):
    return {
        "residual": labelled(0.0, {"network": ["actor"]}),
        "conflict_rate": labelled(np.array([[[conflict], [0.9]]]), AXES),
        "mean_cosine": labelled(np.array([[[cosine], [0.9]]]), AXES),
        "squared_norm_debiased": labelled(signal, {**AXES, "agent": [0, 1]}),
        "variance_mean": labelled(2.0, {**AXES, "agent": [0, 1]}),
        "coordinate_variance": labelled(0.5, {"network": ["actor"]}),
    }


def verdicts(findings):
    return {verdict.claim: verdict for verdict in findings.verdicts}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """Time that grows with the agents in nops, and not at all in fups-id."""
    top = tmp_path_factory.mktemp("scaling")
    runs = []
    for method, power in (("fups-id", 0), ("nops", 1)):
        for agents in (2, 4, 8):
            for seed in range(5):
                second = (1 + seed / 10) * agents**power
                pairs = np.full((agents, agents), 0.25)
                np.fill_diagonal(pairs, 1.0)
                names = {"agent": range(agents), "agent_other": range(agents)}
                coupling = labelled(pairs, {"network": ["actor"], "layer": ["all"], **names})
                conflict = agents / 16 if method == "fups-id" else 0.0
                plain = {"seconds": second, "reward_per_step": 0.5}
                found = plain | diagnosed(conflict) | {"seconds": 4 * second}
                effects = found | {"coupling": coupling, "snd": 0.0, "seconds": 1000.0}
                settings = {
                    "env": "specialisation",
                    "agents": agents,
                    "method": method,
                    "seed": seed,
                    "network": {"hidden": [8]},
                }
                path = top / f"{method}-{agents}-{seed}"
                runs.append(made_up(path, settings, [found, plain, effects, plain]))
    return runs


def test_scaling_tells_an_update_from_its_diagnosis(scaled):
    assert scaling.seconds(scaled[0]) == (1.0, 3.0)
    assert scaling.coupling(scaled[0]) == 0.25


def test_scaling_finds_exponents_ratios_and_what_they_say(scaled):
    findings = scaling.read(scaled)
    exponents = findings.tables["scaling-exponents"].set_index(["method", "figure"])
    for cost in ("seconds per update", "seconds per diagnosis"):
        for method, power in (("fups-id", 0), ("nops", 1)):
            row = exponents.loc[method, f"exponent of {cost}"]
            assert row["value"] == pytest.approx(power, abs=1e-9)
            assert row["seeds"] == 5
    # each agent has a critic of its own: 1 -> 8 -> 1
    assert exponents.loc["nops", "exponent of trained parameters of the critics"][
        "value"
    ] == pytest.approx(1)
    table = findings.tables["scaling"].set_index(["agents", "method", "figure"])
    assert table.loc[(8, "nops", "trained parameters of the critics"), "value"] == 8 * 25
    assert table.loc[(8, "fups-id", "trained parameters of the critics"), "value"] == 25 + 64
    ratio = table.loc[(8, "nops", "seconds per update, by that of fups-id")]
    assert (ratio["value"], ratio["low"], ratio["high"]) == pytest.approx((8, 8, 8))
    said = verdicts(findings)
    (growth,) = (v for claim, v in said.items() if claim.startswith("the more agents"))
    assert growth.outcome == "supported"
    # 2, 4 and 8 sixteenths over 1, 2 and 3 doublings
    assert "+0.188 (+0.188 to +0.188)" in growth.evidence
    (missing,) = (v for claim, v in said.items() if "longer than one of fups-id" in claim)
    assert missing.outcome == "undecided"  # hypermarl was not trained


def test_scaling_fits_no_slope_to_a_seed_that_lacks_a_size(scaled):
    found = scaling.with_ratios(scaling.read(scaled[:-1]).tables["scaling-runs"])
    fitted = scaling.slopes(found, "seconds per update", of_logarithm=True)
    assert [len(fitted[method]) for method in ("fups-id", "nops")] == [5, 4]


def test_mamujoco_judges_learners_of_the_same_robot(tmp_path):
    returns = {"mappo fups-id": 100, "mappo nops": 300, "mappo hypermarl": 300, "happo nops": 900}
    runs = [
        made_up(
            tmp_path / f"{learner}-{seed}",
            {
                "preset": "mamujoco-humanoid-17x1",
                "algorithm": learner.split()[0],
                "method": learner.split()[1],
                "seed": seed,
            },
            [
                {"evaluation_return": -5.0} | diagnosed(0.5),
                {"evaluation_return": float(mean + seed)} | diagnosed(0.25, signal=3.0),
            ],
        )
        for learner, mean in returns.items()
        for seed in range(5)
    ]
    findings = mamujoco.read(runs)
    table = findings.tables["mamujoco"].set_index(["learner", "figure"])
    for learner, mean in returns.items():
        assert table.loc[(learner, "return"), "value"] == mean + 2
    assert table.loc[("mappo nops", "conflict rate of g"), "value"] == 0.375
    assert table.loc[("mappo nops", "signal to noise of Z"), "value"] == 1.0
    said = {claim: v.outcome for claim, v in verdicts(findings).items()}
    learns = "humanoid-17x1: {} returns more than mappo fups-id, which the paper finds not to learn"
    for learner in ("mappo nops", "mappo hypermarl"):
        (outcome,) = (o for c, o in said.items() if c.startswith(learns.format(learner)))
        assert outcome == "supported"
    assert said["mappo hypermarl returns more than mappo nops"] == "undecided"
    assert said["mappo hypermarl returns more than happo nops"] == "not supported"
    assert not any("matd3" in claim for claim in said)


@pytest.mark.parametrize(
    ("wins", "outcome"),
    [((0.8, 0.85), "supported"), ((0.8, 0.5), "not supported"), ((0.0, 0.0), "undecided")],
    ids=["equal", "worse", "nobody-learned"],
)
def test_homogeneous_calls_methods_equal_only_where_the_first_has_learned(tmp_path, wins, outcome):
    win = {"outcome": ["win"]}
    runs = [
        made_up(
            tmp_path / f"{method}-{seed}",
            {"preset": "smax-2s3z", "method": method, "seed": seed},
            [
                {
                    "outcome_rate": labelled(rate, win),
                    "evaluation_outcome_rate": labelled(rate + seed / 1000, win),
                    "episode_return": 1.0,
                    **diagnosed(0.1),
                }
            ],
        )
        for method, rate in zip(("fups", "hypermarl"), wins, strict=True)
        for seed in range(5)
    ]
    findings = homogeneous.read(runs)
    (equal,) = (v for claim, v in verdicts(findings).items() if "wins as often" in claim)
    assert equal.outcome == outcome
    rates = findings.tables["homogeneous"].set_index(["method", "figure"])["value"]
    assert rates["hypermarl", "win rate"] == pytest.approx(wins[1] + 0.002)
    assert rates["hypermarl", "win rate while training"] == wins[1]

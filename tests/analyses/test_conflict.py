import numpy as np
import pytest

from analyses.conflict import conflict_table, explain
from analyses.noise import smoothed_noise_scale
from gradlab.checks import UsageError
from gradlab.quantity import Quantity
from gradlab.run import open_run
from gradlab.run_writer import RunWriter

PAIRS = {"network": ["actor"], "space": ["psi", "theta"], "layer": ["all"]}
AGENTS = {"agent": range(3), "agent_other": range(3)}


def symmetric(values):
    """A matrix of three agents from the values of the pairs 01, 02, 12."""
    matrix = np.full((3, 3), np.nan)
    matrix[np.triu_indices(3, 1)] = values
    return np.where(np.isnan(matrix), matrix.T, matrix)


def over_pairs(psi, theta):
    values = np.stack([symmetric(psi), symmetric(theta)])[None, :, None]
    return Quantity(values=values, dims=(*PAIRS, *AGENTS), coords=PAIRS | AGENTS)


@pytest.fixture
def run(tmp_path):
    nan = np.nan
    rates = Quantity(values=np.full((1, 2, 1), 1 / 3), dims=tuple(PAIRS), coords=PAIRS)
    per_agent = {"agent": range(3)}
    quantities = {
        "cosine": over_pairs([-0.05, 0.1, 0.2], [-0.5, 0.2, 0.3]),
        "cosine_debiased": over_pairs([-0.062, 0.4, nan], [-0.62, 0.5, nan]),
        "cosine_low": over_pairs([-0.1, 0.3, -1], [-0.67, 0.4, -1]),
        "cosine_high": over_pairs([-0.02, 0.5, 1], [-0.57, 0.6, 1]),
        "verdict": over_pairs([-1, 1, 0], [-1, 1, 0]),
        "copies_to_resolve": over_pairs([9, 9, nan], [9, 9, 1234]),
        "coupling": Quantity(
            values=symmetric([0.1, 0.8, 0.3])[None, None],
            dims=("network", "layer", *AGENTS),
            coords={"network": ["actor"], "layer": ["all"]} | AGENTS,
        ),
        **dict.fromkeys(("conflict_rate", "aligned_rate", "negative_rate", "mean_cosine"), rates),
        "residual": Quantity(values=np.zeros(1), dims=("network",), coords={"network": ["actor"]}),
    }
    with RunWriter(tmp_path / "r") as writer:
        writer.describe(method="hypermarl", config={"copies": 64}, state="done")
        for update, (noise, signal) in enumerate([(4.0, 1.0), (2.0, -0.5), (6.0, 3.0)]):
            more = {
                name: Quantity(
                    values=np.full((1, 2, 1, 3), value),
                    dims=(*PAIRS, *per_agent),
                    coords=PAIRS | per_agent,
                )
                for name, value in (("variance_mean", noise), ("squared_norm_debiased", signal))
            }
            writer.write(update, quantities | more)
    return open_run(tmp_path / "r")


def test_a_pair_in_conflict_is_read_in_words(run):
    assert explain(run, 0, 1) == (
        "r, actor, all, update 2: agents 0 and 1 want opposite changes (Z cosine -0.62, -0.67 to "
        "-0.57); the hypernetwork lets 10% of it through (FuPS: 100 %), coupling 0.10; in the "
        "trained parameters they are in conflict (g cosine -0.06, -0.10 to -0.02)."
    )
    assert "agents 2 and 0 want similar changes" in explain(run, 2, 0)


def test_an_undecided_pair_is_said_to_be_one(run):
    text = explain(run, 1, 2)
    assert "can't be told to want opposite or similar changes" in text
    assert "lost in noise" in text
    assert "lets" not in text
    assert text.endswith("About 1,234 environment copies would tell a Z cosine of 0.1 from 0.")


@pytest.mark.parametrize("pair", [(0, 0), (0, 3), (-1, 1)])
def test_only_pairs_that_exist_are_explained(run, pair):
    with pytest.raises(UsageError, match="`--explain` must name two agents from 0 to 2"):
        explain(run, *pair)


def test_the_summary_names_the_worst_pair_that_is_in_conflict(run):
    (row,) = conflict_table([run]).to_dict("records")
    assert row["worst_pair_g"] == "0, 1 (-0.06, -0.10 to -0.02)"
    assert row["conflict_rate_g"] == pytest.approx(1 / 3)


def test_noise_and_signal_are_smoothed_apart(run):
    found = smoothed_noise_scale(run, decay=0.5)
    one = found[found["agent"] == 1]["noise_scale"].to_numpy()
    noise, signal = [4.0, 3.0, 4.5], [1.0, 0.25, 1.625]
    np.testing.assert_allclose(one, 64 * np.divide(noise, signal), rtol=1e-12)
    plain = smoothed_noise_scale(run, decay=0.0)
    assert list(plain.columns) == ["update", "agent", "noise_scale"]
    of_one = plain[plain["agent"] == 1]["noise_scale"]
    np.testing.assert_allclose(of_one, [256, np.nan, 128])
    with pytest.raises(UsageError, match="`decay` must be from 0 to below 1"):
        smoothed_noise_scale(run, decay=1.0)

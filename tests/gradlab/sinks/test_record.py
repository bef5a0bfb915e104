import numpy as np
import pytest

from gradlab.quantity import Quantity
from gradlab.sinks.picture import heatmap
from gradlab.sinks.record import MOST_SERIES, Record

NETWORKS, LAYERS = ["actor", "critic"], ["layer0", "all"]


def over(values, **coords):
    return Quantity(values=np.asarray(values, dtype=float), dims=tuple(coords), coords=coords)


def record(**quantities):
    return Record(update=3, quantities=quantities)


def test_numbers_of_whole_networks_have_tags_by_heading_network_and_space():
    rate = np.arange(8.0).reshape(2, 2, 2)
    found = record(
        conflict_rate=over(rate, network=NETWORKS, space=["psi", "theta"], layer=LAYERS)
    ).scalars
    assert found == {
        "conflict/conflict_rate/actor/psi": 1.0,
        "conflict/conflict_rate/actor/theta": 3.0,
        "conflict/conflict_rate/critic/psi": 5.0,
        "conflict/conflict_rate/critic/theta": 7.0,
    }


def test_pairs_are_told_once_and_directed_ones_both_ways():
    matrix = np.arange(9.0).reshape(3, 3)
    pairs = {"agent": range(3), "agent_other": range(3)}
    found = record(cosine=over(matrix, **pairs), transference=over(matrix, **pairs)).scalars
    undirected = {tag.rpartition("/")[2]: v for tag, v in found.items() if tag.startswith("cos")}
    assert undirected == {"0-1": 1.0, "0-2": 2.0, "1-2": 5.0}
    assert found["transference/0-1"] == 1.0
    assert found["transference/1-0"] == 3.0
    assert "transference/1-1" not in found


def test_many_agents_become_mean_least_and_greatest():
    few, many = np.arange(MOST_SERIES), np.arange(MOST_SERIES + 1.0)
    assert len(record(norm=over(few, agent=range(len(few)))).scalars) == MOST_SERIES
    many[0] = np.nan
    found = record(norm=over(many, agent=range(len(many)))).scalars
    assert found == {
        "norm/mean": np.arange(1, MOST_SERIES + 1).mean(),
        "norm/min": 1.0,
        "norm/max": float(MOST_SERIES),
    }


def test_what_is_not_finite_is_left_out_and_own_numbers_keep_their_heading():
    found = record(
        episode_return=Quantity.scalar(np.nan),
        policy_loss=Quantity.scalar(0.5),
        mine=Quantity.scalar(1.0),
        **{"loss/mine": Quantity.scalar(2.0)},
    ).scalars
    assert found == {"training/policy_loss": 0.5, "other/mine": 1.0, "loss/mine": 2.0}


def test_all_of_it_is_labelled_and_embeddings_stand_apart():
    found = record(
        norm=over([1.0, 2.0], agent=[0, 1]),
        embedding_actor=over(np.eye(2), agent=[0, 1], feature=[0, 1]),
        embedding_critic=over(np.ones((2, 3)), agent=[0, 1], feature=[0, 1, 2]),
    )
    assert float(found.metrics["norm"].sel(agent=1)) == 2.0
    assert set(found.metrics.data_vars) == {"norm"}
    assert found.embeddings["critic"].shape == (2, 3)
    assert not any(tag.startswith("embedding") for tag in found.scalars)


@pytest.mark.parametrize("agents", [2, 30])
def test_heatmap_is_red_below_zero_blue_above_and_grey_where_undefined(agents):
    values = np.zeros((agents, agents))
    values[0, 1], values[1, 0], values[1, 1] = -1, 1, np.nan
    drawn = heatmap(values)
    cell = (len(drawn) - 20) // agents
    red, blue, grey, white = (
        drawn[20 + i * cell + cell // 2, 20 + k * cell + cell // 2].astype(int)
        for i, k in ((0, 1), (1, 0), (1, 1), (0, 0))
    )
    assert red[0] > red[2] + 100
    assert blue[2] > blue[0] + 100
    assert np.ptp(grey) < 20 < 255 - grey.max()
    assert white.min() > 240

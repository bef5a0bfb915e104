import json

import numpy as np
import pytest

from analyses.groups import agent_returns, goals, kinds
from analyses.similarity import clusters, similarity_order


def test_kinds_are_names_without_their_number():
    assert kinds(["adversary_0", "adversary_1", "agent_0"]) == ["adversary", "adversary", "agent"]
    assert kinds(["agent_0", "agent_1"]) == []
    assert kinds(["red", "blue"]) == []


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"agents_with_same_goal": 2}, ["goal 0", "goal 0", "goal 1", "goal 2"]),
        (
            {"agents_with_same_goal": 2, "split_goals": True},
            ["goal 0", "goal 0", "goal 1", "goal 1"],
        ),
        ({}, []),
    ],
    ids=["half", "split", "each its own"],
)
def test_goals_are_those_of_vmas_navigation(settings, found):
    from gradlab.run import Run

    run = object.__new__(Run)
    run.info = {"environment": "vmas/navigation", "config": {"env_args": settings}}
    assert goals(run, 4) == found
    run.info = {"environment": "specialisation"}
    assert goals(run, 4) == []


def test_returns_of_agents_are_read_from_the_evaluation(tmp_path):
    from gradlab.run import Run

    run = object.__new__(Run)
    run.path = tmp_path
    assert agent_returns(run) is None
    (tmp_path / "evaluations").mkdir()
    file = tmp_path / "evaluations" / "000000003-sampled-2-seed0.json"
    file.write_text(json.dumps({"returns": [[1, 3], [4, None]]}))
    np.testing.assert_allclose(agent_returns(run), [2, 4])
    file.write_text("{")
    assert agent_returns(run) is None


def test_agents_at_small_distance_stand_together():
    place = np.array([0.0, 5, 0.1, 5.2, 9])
    distance = np.abs(place[:, None] - place[None])
    order = similarity_order(distance)
    assert {frozenset(order[:2]), frozenset(order[-2:])} & {frozenset({0, 2})}
    assert abs(order.index(1) - order.index(3)) == 1
    assert clusters(distance).tolist() == [0, 1, 0, 1, 2]


def test_what_is_not_known_and_what_is_alike_do_not_stop_it():
    distance = np.full((4, 4), np.nan)
    assert sorted(similarity_order(distance)) == [0, 1, 2, 3]
    assert clusters(np.zeros((3, 3))).tolist() == [0, 0, 0]
    assert clusters(np.zeros((1, 1))).tolist() == [0]

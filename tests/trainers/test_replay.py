import numpy as np
import pytest
import torch

from trainers.replay import FOLLOWING, Replay, columns_of
from trainers.rollout import Played

AGENTS, COPIES, DISCOUNT = 2, 3, 0.9


def played(times, number):
    """Steps of which each observation is the step's own number; and what is seen afterwards."""
    random = torch.Generator().manual_seed(number)
    shape = (AGENTS, times, COPIES)
    seen = torch.arange(number, number + times, dtype=torch.float64).view(1, -1, 1, 1)
    ended = torch.rand(times, COPIES, generator=random) < 0.3
    truncated = ended & (torch.rand(times, COPIES, generator=random) < 0.5)
    gone = torch.rand(shape, generator=random) < 0.2
    columns = {
        "observation": seen.expand(*shape, 1).clone(),
        "action": torch.rand(*shape, 2, generator=random),
        "paid": torch.rand(shape, generator=random, dtype=torch.float64),
        "left": gone | (ended & ~truncated),
        "active": torch.rand(shape, generator=random) < 0.8,
    }
    final = {
        time: {"observation": torch.full((AGENTS, COPIES, 1), 1000.0 + number + time).double()}
        for time in range(times)
        if truncated[time].any()
    }
    steps = Played(
        columns=columns,
        final=final,
        truncated=truncated,
        ended=ended,
        episode_returns=[],
        episode_lengths=[],
        reward_per_step=0.0,
        outcomes={},
    )
    return steps, {"observation": torch.full((AGENTS, COPIES, 1), float(number + times)).double()}


def filled(rows, rollouts=(4, 3, 5, 6)):
    """A replay, and every step that was ever added: observation, following, reward, left, ended."""
    replay, history, number = Replay(rows * COPIES, COPIES), [], 0
    for times in rollouts:
        steps, seen = played(times, number)
        columns = columns_of(steps, seen, None)
        replay.add(columns)
        history += [{n: tensor[:, time] for n, tensor in columns.items()} for time in range(times)]
        number += times
    return replay, history


def slow_return(history, time, copy, agent, steps):
    """Reward summed step by step; how much of the bootstrap's value counts, and of what."""
    total, power = 0.0, 1.0
    for ahead in range(steps):
        row = history[time + ahead]
        total += power * row["paid"][agent, copy].item()
        power *= DISCOUNT
        following = row[FOLLOWING + "observation"][agent, copy].item()
        if row["left"][agent, copy]:
            return total, 0.0, None
        if row["ended"][0, copy] or time + ahead + 1 == len(history):
            break
    return total, power, following


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("rows", [7, 18, 40], ids=["overwritten", "just full", "room left"])
def test_returns_over_several_steps_are_those_of_a_slow_sum(rows, steps):
    replay, history = filled(rows)
    kept = min(rows, len(history))
    assert replay.frames == kept * COPIES
    places = torch.arange(replay.frames)
    found = replay.take(places, steps=steps, discount=DISCOUNT)
    seen = set()
    for place in places.tolist():
        time, copy = int(found["observation"][0, place, 0]), place % COPIES
        seen.add((time, copy))
        for agent in range(AGENTS):
            total, bootstrap, following = slow_return(history, time, copy, agent, steps)
            assert found["return"][agent, place] == pytest.approx(total, rel=1e-12)
            assert found["bootstrap"][agent, place] == pytest.approx(bootstrap, rel=1e-12)
            if following is not None:
                assert found[FOLLOWING + "observation"][agent, place].item() == following
            for name in ("action", "active"):
                expected = history[time][name][agent, copy]
                assert torch.equal(found[name][agent, place], expected)
    last = len(history)
    assert seen == set(np.ndindex(last, COPIES)) - set(np.ndindex(last - kept, COPIES))


def test_what_followed_a_cut_is_not_the_next_episode():
    _, history = filled(40)
    cut = [
        row[FOLLOWING + "observation"][0, copy].item()
        for row in history
        for copy in range(COPIES)
        if row["ended"][0, copy] and not row["left"][:, copy].any()
    ]
    assert cut
    assert min(cut) >= 1000


def test_a_rollout_longer_than_the_replay_leaves_its_end():
    replay, _ = filled(4, rollouts=(3, 9))
    found = replay.take(torch.arange(12), steps=1, discount=1.0)
    assert sorted(set(found["observation"][0, :, 0].tolist())) == [8.0, 9.0, 10.0, 11.0]


def test_copied_state_goes_on_alike():
    replay, _ = filled(7)
    other = Replay(7 * COPIES, COPIES)
    other.load_state({name: tensor.clone() for name, tensor in replay.state().items()})
    for each in (replay, other):
        each.add(columns_of(*played(2, 100), None))
    assert replay.state().keys() == other.state().keys()
    for name, tensor in replay.state().items():
        assert torch.equal(tensor, other.state()[name])


def test_spread_covers_all_copies_and_the_whole_time():
    replay, _ = filled(18)
    places = replay.spread(6)
    assert (places % COPIES).tolist() == [0, 1, 2] * 6
    assert (places // COPIES).unique().tolist() == [0, 3, 6, 9, 12, 15]


def test_drawn_places_are_equally_likely():
    replay, _ = filled(7)
    counts = replay.draw(21_000, torch.Generator().manual_seed(0)).bincount(minlength=21)
    assert len(counts) == 21
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()

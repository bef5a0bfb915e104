"""What the paper reports of its games, beside numbers of our own."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pandas as pd

from analyses.studies.seeds import estimate, select
from analyses.studies.study import Section
from analyses.studies.verdict import Estimate

_PRINTED, _READ_OFF = "Table 1", "Fig. 3a"
_ROUNDED = 0.005  # by as much a number with two digits may be off


class Published(NamedTuple):
    """Mean evaluation rewards of a method in a game.

    Attributes:
        game: Ours of that name.
        method: Ours of that kind.
        where: Where the paper has them.
        rewards: By number of agents, with 95 % intervals where there are some.
    """

    game: str
    method: str
    where: str
    rewards: Mapping[int, Estimate]


def _printed(*rewards: float) -> dict[int, Estimate]:
    return _by_size(*((reward, math.nan, math.nan) for reward in rewards))


def _by_size(*rewards: tuple[float, float, float]) -> dict[int, Estimate]:
    return {size: Estimate(*x) for size, x in zip((2, 4, 8, 16), rewards, strict=True)}


_APART = "specialisation-temporal"
PUBLISHED = (
    Published(_APART, "nops", _PRINTED, _printed(0.88, 0.74, 0.68, 0.64)),
    Published(_APART, "fups-id", _PRINTED, _printed(0.64, 0.40, 0.25, 0.13)),
    Published(
        _APART,
        "fups-id-nostate",
        _READ_OFF,
        _by_size(
            (0.700, 0.623, 0.778),
            (0.600, 0.562, 0.638),
            (0.600, 0.554, 0.646),
            (0.463, 0.428, 0.497),
        ),
    ),
    Published(
        _APART,
        "hypermarl",
        _READ_OFF,
        _by_size(
            (0.820, 0.750, 0.890),
            (0.687, 0.667, 0.707),
            (0.594, 0.580, 0.608),
            (0.568, 0.555, 0.583),
        ),
    ),
    Published("synchronisation-temporal", "fups", _PRINTED, _printed(1.0, 1.0, 1.0, 1.0)),
)
"""Means over 10 seeds of REINFORCE, evaluated greedily."""

_ABOUT = (
    "Published: mean reward in evaluations (Tessera et al., NeurIPS 2025). Table 1 is printed, "
    "with two digits and no interval that we know of; it is taken to be of the temporal games, as "
    "its numbers of the Specialisation Game are those of Fig. 3a. What is of Fig. 3a was read off "
    "that figure, with its intervals. Both were known from a written review of the paper, not from "
    "the paper itself. Here: reward as in the table above. Here less published: its interval takes "
    "the published number as known without error, and has only our seeds in it; higher and lower: "
    "it does not hold 0, nor, of what is printed, anything within its rounding.\n\n"
    "Why numbers differ, as far as it is known. (1) Evaluation: the official code takes each "
    "agent's most probable action, ours are drawn. Where all agents see the same, agents whose "
    "policies are nearly alike choose alike if they are greedy, down to the level *all the same*, "
    "and earn chance if they draw, if their policies are near uniform. As the mean reward is the "
    "number of different actions over that of agents, published fups-id chooses 1.3 to 2.1 "
    "different actions on average, however many agents there are; so a published number below "
    "chance need not be of a policy that drawing would find worse than a uniform one. (2) "
    "Training: REINFORCE without a baseline, by SGD (of HyperMARL the optimiser is not known) on a "
    "loss that is a sum over 32 transitions, against PPO with a learned baseline, normalised "
    "advantages and Adam. (3) In the official trainer the shared policies, but not nops, learn "
    "from returns over the rewards of all agents interleaved, and from a queue of which 32 "
    "transitions are taken per update while as many come for each agent, so that data lag the more "
    "the more agents there are. (4) Its HyperMARL multiplies each sample's weights with all "
    "samples' states. (5) Its nops has 64/N hidden units, 4 for 16 agents; so it is here by "
    "`--budget full`, while the smaller budgets give all methods the same network. (6) Its number "
    "of training steps and length of episodes are not known, and the smaller budgets are short. "
    "(2) to (4) were read in the official code; none of the six was tried by itself, so how much "
    "each makes is not known. The order of methods is to be compared rather than their levels."
)


def as_published(found: pd.DataFrame, levels: Callable[[str, int], tuple[float, float]]) -> Section:
    """Compare rewards with the published ones of the same method, game and number of agents.

    Args:
        found: One row for each run: game, agents, method and reward.
        levels: Rewards at random and if all act alike, of a game and number of agents.

    Returns:
        The numbers side by side, as far as there are runs, and why they differ.
    """
    rows, shown = [], []
    for game, method, where, rewards in PUBLISHED:
        for agents, published in rewards.items():
            values = select(found, "reward", game=game, agents=agents, method=method)
            if not values:
                continue
            here = estimate(values)
            gap = here.less(published.value)
            labels = {"game": game, "agents": agents, "method": method, "where": where}
            chance, same = levels(game, agents)
            rows.append(
                labels
                | {"seeds": len(values)}
                | {f"published {name}": x for name, x in published.numbers().items()}
                | {f"here {name}": x for name, x in here.numbers().items()}
                | {f"less {name}": x for name, x in gap.numbers().items()}
                | {"chance": chance, "all the same": same}
            )
            shown.append(
                labels
                | {
                    "published": published.text(".2f" if where == _PRINTED else ".3f"),
                    "here": here.text(),
                    "here less published": f"{gap.text('+.3f')}{_told(gap, where)}",
                    "chance": f"{chance:.3f}",
                    "all the same": f"{same:.3f}",
                }
            )
    title = "As published"
    if not rows:
        return Section(
            title=title,
            about="No run is of a method, game and number of agents whose reward is published.",
        )
    return Section(
        title=title,
        about=_ABOUT,
        shown=pd.DataFrame(shown),
        tables={"specialisation-published": pd.DataFrame(rows)},
    )


def _told(gap: Estimate, where: str) -> str:
    rounded = _ROUNDED if where == _PRINTED else 0.0
    if gap.low > rounded:
        return ", higher"
    return ", lower" if gap.high < -rounded else ""

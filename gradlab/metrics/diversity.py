r"""How differently agents behave: distances between their policies on the same observations.

System neural diversity (SND; Bettini, Shankar and Prorok, "System Neural Diversity", JMLR 26(163),
2025, arXiv 2305.02128) is the mean over pairs of agents of

.. math:: d_{ik} = \frac1{|O|} \sum_{o \in O} D(\pi_i(\cdot|o), \pi_k(\cdot|o))

with a distance D between two action distributions, taken at each observation by itself.
"""

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from gradlab.estimates import FEWEST, LEVEL
from gradlab.metrics.policy_distance import Distance, distance_between, policies
from gradlab.metrics.rows import Array
from gradlab.quantity import Quantity, dataset

Copies = Int[Tensor, " observation"] | Int[np.ndarray, " observation"]


def diversity(
    *,
    probabilities: Array | None = None,
    logits: Array | None = None,
    mean: Array | None = None,
    std: Array | None = None,
    distance: Distance | None = None,
    copy: Copies | None = None,
) -> xr.Dataset:
    r"""Distances between all agents' policies, and their mean over pairs (SND).

    Give the policies as `probabilities`, as `logits`, or as `mean` and `std`, every agent's on the
    same observations (not on its own). Distances:

    - "jensen-shannon", for numbered actions: the square root of the Jensen-Shannon divergence to
      base 2, a metric in [0, 1] (Endres and Schindelin, 2003)
    - "wasserstein", for Gaussians with independent dimensions: the 2-Wasserstein distance,
      :math:`\sqrt{\|\mu_i - \mu_k\|^2 + \|\sigma_i - \sigma_k\|^2}`, in units of the action
    - "hellinger", for the same: :math:`\sqrt{1 - BC}` in [0, 1] with the Bhattacharyya coefficient
      :math:`BC = \int \sqrt{p_i p_k}`

    Args:
        probabilities: Of the actions [agent, observation, action]; normalised to sum 1.
        logits: Unnormalised log-probabilities [agent, observation, action]; minus infinity for an
            action that is not available.
        mean: Of the actions [agent, observation, dim].
        std: Standard deviations [agent, observation, dim]; 0 for a deterministic policy.
        distance: "jensen-shannon" for probabilities and logits; "wasserstein" (default) or
            "hellinger" for Gaussians.
        copy: The environment copy that each observation comes from; the intervals' clusters, as
            observations of one copy depend on each other.

    Returns:
        Means over observations. Over (agent, agent_other): `behavioural_distance`, 0 on the
        diagonal; scalar: `snd`, its mean over pairs of different agents, NaN for a single agent.
        Of both `..._low` and `..._high`, the ends of a 95 % interval: delete-one-copy jackknife,
        Student t with one degree of freedom less than copies, cut to the distance's range; NaN
        without `copy` and with fewer than 8 different copies, which the estimator says.

    Raises:
        UsageError: If the policies are not given in exactly one of the three ways, differ in
            shape, or are not distributions; if the distance is not one for them; or if `copy` does
            not have a label for each observation.

    >>> certain = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> float(diversity(probabilities=certain).snd)
    1.0
    """
    return dataset(
        measure_diversity(
            probabilities=probabilities,
            logits=logits,
            mean=mean,
            std=std,
            distance=distance,
            copy=copy,
        )
    )


def measure_diversity(
    *,
    probabilities: Array | None = None,
    logits: Array | None = None,
    mean: Array | None = None,
    std: Array | None = None,
    distance: Distance | None = None,
    copy: Copies | None = None,
) -> dict[str, Quantity]:
    """What `diversity` labels.

    Args:
        probabilities: As for `diversity`.
        logits: As for `diversity`.
        mean: As for `diversity`.
        std: As for `diversity`.
        distance: As for `diversity`.
        copy: As for `diversity`.

    Returns:
        The quantities by name.

    Raises:
        UsageError: As for `diversity`.
    """
    given = {"probabilities": probabilities, "logits": logits, "mean": mean, "std": std}
    kind, parameters = policies({n: array for n, array in given.items() if array is not None})
    measure = distance_between(kind, distance)
    agents, observations = parameters[0].shape[:2]
    labels, codes = np.unique(_labels(copy, observations), return_inverse=True)
    counts = np.bincount(codes)
    first, second = np.triu_indices(agents, k=1)
    sums = np.empty((len(first), len(labels)))
    for pair, (i, k) in enumerate(zip(first, second, strict=True)):
        values = measure.between([p[i] for p in parameters], [p[k] for p in parameters])
        sums[pair] = np.bincount(codes, weights=values)

    interval = f"95 % interval: delete-one-copy jackknife over {len(labels)} copies, Student t"
    if copy is None:
        interval = "NaN: an interval needs `copy`"
    elif len(labels) < FEWEST:
        interval = f"NaN: an interval needs at least {FEWEST} copies, got {len(labels)}"
    plain = f"{measure.title}, mean over {observations} shared observations"
    of_team = f"mean over pairs of agents of the {plain}"
    interval_of_team = interval
    if agents == 1:
        of_team = interval_of_team = "NaN: one agent has no pair"

    team = sums.mean(0, keepdims=True) if len(sums) else np.full((1, len(labels)), np.nan)
    ends = _mean_and_interval(np.concatenate([sums, team]), counts, measure.most)
    found: dict[str, Quantity] = {}
    for end, values in zip(("", "_low", "_high"), ends, strict=True):
        *pairs, total = values
        matrix = np.zeros((agents, agents))
        matrix[first, second] = matrix[second, first] = pairs
        if end and len(labels) < FEWEST:
            np.fill_diagonal(matrix, np.nan)
        found[f"behavioural_distance{end}"] = Quantity(
            values=matrix,
            dims=("agent", "agent_other"),
            coords={"agent": range(agents), "agent_other": range(agents)},
            unit=measure.unit,
            estimator=interval if end else plain,
        )
        found[f"snd{end}"] = Quantity.scalar(
            float(total), unit=measure.unit, estimator=interval_of_team if end else of_team
        )
    return found


def shared_observations(
    observation: Float[Tensor, "agent sample obs"],
    most: int,
    random: RandomGenerator,
    *,
    copy: Int[Tensor, " sample"],
    mask: Bool[Tensor, "agent sample"] | None = None,
) -> tuple[Float[Tensor, "observation obs"], Int[Tensor, " observation"]]:
    """Pool what all agents observed, and draw from it without replacement.

    Args:
        observation: Every agent's observations.
        most: How many to draw; all of them, if there are no more.
        random: Source of the draw.
        copy: The environment copy of each sample, the same for all agents.
        mask: Which observations there are; all by default.

    Returns:
        The observations drawn, in the order of agents and samples, and the copy of each: what
        `diversity` takes as `copy`.

    Raises:
        UsageError: If none are to be drawn, a sample has no copy, or there is no observation.
    """
    check(most >= 1, "most", "be at least 1", most)
    agents, samples = observation.shape[:2]
    check(len(copy) == samples, "copy", f"label each of {samples} samples", tuple(copy.shape))
    exist = torch.arange(agents * samples, device=observation.device)
    if mask is not None:
        check(bool(mask.any()), "mask", "leave at least one observation", mask.sum(1).tolist())
        exist = exist[mask.flatten()]
    order = torch.randperm(len(exist), generator=random, device=random.device)
    drawn = exist[order[:most].sort().values.to(exist.device)]
    return observation.flatten(0, 1)[drawn], copy.to(drawn.device).repeat(agents)[drawn]


def _labels(copy: Copies | None, observations: int) -> NDArray[np.int64]:
    if copy is None:
        return np.zeros(observations, dtype=np.int64)
    labels = copy.cpu().numpy() if isinstance(copy, Tensor) else copy
    rule = f"label each of {observations} observations"
    check(labels.shape == (observations,), "copy", rule, labels.shape)
    return labels


def _mean_and_interval(
    sums: Float[np.ndarray, "pair copy"], counts: Int[np.ndarray, " copy"], most: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A mean over observations from sums by copy, and the ends of its interval."""
    total = sums.sum(-1)
    mean = total / counts.sum()
    copies = len(counts)
    if copies < FEWEST:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    without = (total[:, None] - sums) / (counts.sum() - counts)
    error = np.sqrt((copies - 1) * without.var(-1))
    reach = stdtrit(copies - 1, (1 + LEVEL) / 2) * error  # the quantile of Student's t
    return mean, np.clip(mean - reach, 0.0, None), np.clip(mean + reach, None, most)

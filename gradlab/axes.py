"""The axes of every quantity that gradlab records, by its name."""

from collections.abc import Mapping, Sequence
from typing import Any

_PAIR = ("agent", "agent_other")
_PLACE = ("network", "space", "layer")
_OF_LAYER = ("network", "layer", "agent")


def _each(*axes: str, of: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(of.split(), axes)


AXES: dict[str, tuple[str, ...]] = {
    **_each(of="frames seconds episode_return episode_length reward_per_step"),
    **_each(of="policy_loss value_loss approximate_kl clip_fraction epochs_done"),
    **_each(of="replay_frames gradient_steps encoder_loss mask_diversity"),
    **_each(of="evaluation_return evaluation_return_low evaluation_return_high evaluation_length"),
    **_each(of="snd snd_low snd_high"),
    **_each("agent", of="alpha compounding group mask_sparsity evaluation_agent_return"),
    **_each("agent", of="evaluation_agent_return_low evaluation_agent_return_high"),
    **_each("metric", "agent", of="evaluation_metric"),
    **_each("outcome", of="outcome_rate evaluation_outcome_rate"),
    **_each("outcome", of="evaluation_outcome_rate_low evaluation_outcome_rate_high"),
    **_each("network", of="residual factorisation_gap coordinate_variance"),
    **_each("network", of="aggregated_cosine aggregated_length aggregations_failed opposed_pairs"),
    **_each("network", of="effective_rank participation_ratio rank_ceiling"),
    **_each("network", of="transference_agreement transference_error transference_length"),
    **_each("network", "direction", of="opposed_agents worst_cosine"),
    **_each("network", "agent", of="samples"),
    **_each("network", *_PAIR, of="transference transference_predicted"),
    **_each("network", *_PAIR, of="embedding_distance embedding_cosine"),
    **_each("network", "compared_with", of="mantel_agents"),
    **_each("network", "compared_with", "correlation", of="mantel mantel_p_value"),
    **_each("network", "layer", of="variance_within variance_between"),
    **_each(*_OF_LAYER, of="variance_agent variance_jacobian design_effect non_finite"),
    **_each("network", "layer", "minibatches", "agent", of="variance_minibatch"),
    **_each("network", "layer", *_PAIR, of="coupling coupling_frobenius"),
    **_each(*_PLACE, of="conflict_rate aligned_rate negative_rate mean_cosine cancelled_norm"),
    **_each(*_PLACE, of="gradient_diversity gradient_diversity_debiased"),
    **_each(*_PLACE, "agent", of="norm squared_norm_debiased variance_mean"),
    **_each(*_PLACE, "agent", of="noise_scale normalised_variance"),
    **_each(*_PLACE, *_PAIR, of="cosine cosine_debiased cosine_low cosine_high verdict"),
    **_each(*_PLACE, *_PAIR, of="magnitude_similarity copies_to_resolve"),
    **_each(*_PAIR, of="behavioural_distance behavioural_distance_low behavioural_distance_high"),
    **_each("agent", "feature", of="embedding_actor embedding_critic"),
}
"""After `update`, in order. Whoever reads a quantity of such a name may rely on them."""


def misfit(name: str, labels: Mapping[str, Sequence[Any]]) -> str | None:
    """Tell whether a quantity could be one of gradlab's by its axes.

    Args:
        name: Its name.
        labels: Labels of its axes after `update`, in order.

    Returns:
        What is wrong, None if nothing is: gradlab records no quantity of that name, or with those
        axes; where pairs of agents are recorded both axes have the same labels.

    >>> misfit("snd", {"agent": [0, 1]})
    "axes ('agent',) where gradlab records ()"
    """
    known = AXES.get(name, tuple(labels))
    if tuple(labels) != known:
        return f"axes {tuple(labels)} where gradlab records {known}"
    if (
        name in AXES
        and set(_PAIR) <= labels.keys()
        and list(labels["agent"]) != list(labels["agent_other"])
    ):
        return "pairs of different agents on its two sides"
    return None

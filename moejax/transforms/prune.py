"""Expert pruning: which experts a layer can spare, and the layer without them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.statistics import ExpertStatistics
from moejax.formats import select_experts
from moejax.model.config import Config
from moejax.model.leaves import named_leaves
from moejax.model.moe import MoE

CRITERIA = ("frequency", "paper", "reap")


def expert_scores(statistics: ExpertStatistics, criterion: str, alpha: float = 0.5) -> np.ndarray:
    """How much a layer needs each expert, (E,), by one of CRITERIA.

    With count n_e, gate weights g and outputs f over the tokens that chose expert e:
    frequency f_e = n_e / sum n;
    paper (arXiv:2509.25689) alpha*f_e + (1-alpha)*s_e, s_e = sum g / n_e, both scaled to [0, 1] within the layer;
    reap (arXiv:2510.13999) sum g*|f| / n_e.
    """
    count_E = np.asarray(statistics.count_E, np.float64)
    chosen_E = np.maximum(count_E, 1.0)
    frequency_E = count_E / max(count_E.sum(), 1.0)
    if criterion == "frequency":
        return frequency_E
    if criterion == "paper":
        return alpha * _unit(frequency_E) + (1 - alpha) * _unit(np.asarray(statistics.weight_E) / chosen_E)
    if criterion == "reap":
        return np.asarray(statistics.weighted_norm_E, np.float64) / chosen_E
    raise ValueError(f"unknown pruning criterion {criterion!r}; accepted are {', '.join(CRITERIA)}")


def min_per_group(config: Config, experts_per_token: int) -> int:
    """Survivors every group needs so that routing always finds K experts: max(2, ceil(K / topk_group))."""
    needed = -(-experts_per_token // config.topk_group)
    return needed if config.n_group == 1 else max(2, needed)


def pruning_order(scores_E: np.ndarray, group_E: np.ndarray, keep_per_group: int) -> np.ndarray:
    """Experts in the order in which they go, least needed first; no group falls below `keep_per_group`.

    Its length is the number that can be pruned; pruning n experts is pruning the first n of it.
    """
    left = np.bincount(group_E)
    order = []
    for expert in np.argsort(scores_E, kind="stable"):
        if left[group_E[expert]] > keep_per_group:
            left[group_E[expert]] -= 1
            order.append(expert)
    return np.asarray(order, int)


def masked_bias(bias_E: jax.Array, pruned_E: np.ndarray) -> jax.Array:
    """A router bias under which the experts where pruned_E (E,) is true are never chosen.

    A layer with it computes what `prune` without them does: their choice is -inf before the top-K, so tokens route to
    other experts.
    """
    return jnp.where(jnp.asarray(pruned_E), -jnp.inf, bias_E)


def prune(moe: MoE, keep: Sequence[int]) -> MoE:
    """The layer with only the experts `keep`, in ascending order; survivors stay in their groups.

    E becomes len(keep) in the experts' weights, the router, its bias and `group_id`.
    """
    kept = np.asarray(keep, np.int32)
    leaves = named_leaves(moe)
    for name in ("router", "bias", "group_id"):
        leaves[name] = leaves[name][kept]
    for name in ("gate", "up", "down"):
        leaves[f"experts.{name}"] = select_experts(leaves[f"experts.{name}"], keep)
    return MoE(moe.config, leaves.__getitem__, moe.experts_per_token)


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)

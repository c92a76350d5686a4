"""Expert pruning: which experts a layer can spare, the layer without them, and the error that this makes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.expert_statistics import ExpertStatistics
from moejax.errors import InputError
from moejax.formats import ExpertWeights, select_experts
from moejax.model.config import Config
from moejax.model.leaves import Weight, named_leaves
from moejax.model.moe import MoE, Routing
from moejax.model.weights import IN_BLOCK

CRITERIA = ("frequency", "paper", "gate_mass", "reap", "msan")


def pruning_scores(statistics: ExpertStatistics, criterion: str, alpha: float = 0.5) -> np.ndarray:
    """How much a layer needs each expert, (E,), by one of CRITERIA.

    With count n_e, gate weights g and outputs f over the tokens that chose expert e:
    frequency f_e = n_e / sum n;
    paper (arXiv:2509.25689) alpha*f_e + (1-alpha)*s_e, s_e = sum g / n_e, both scaled to [0, 1] within the layer;
    gate_mass sum g, by which that paper's reference code prunes;
    reap (arXiv:2510.13999) sum g*|f| / n_e;
    msan (arXiv:2606.15716) sum |f|^2 / n_e.
    Raises InputError for any other criterion.
    """
    if criterion not in CRITERIA:
        raise InputError(f"unknown pruning criterion {criterion!r}; accepted are {', '.join(CRITERIA)}")
    sums = (statistics.count_E, statistics.weight_E, statistics.weighted_norm_E, statistics.norm2_E)
    count_E, weight_E, weighted_norm_E, norm2_E = (np.asarray(own, np.float64) for own in sums)
    chosen_E = np.maximum(count_E, 1.0)
    by_output = {"reap": weighted_norm_E / chosen_E, "msan": norm2_E / chosen_E}
    return (gate_scores(count_E, weight_E, alpha) | by_output)[criterion]


def gate_scores(count_E: np.ndarray, weight_E: np.ndarray, alpha: float = 0.5) -> dict[str, np.ndarray]:
    """The criteria of `pruning_scores` that gate weights alone decide, by name."""
    frequency_E = count_E / max(count_E.sum(), 1.0)
    mean_weight_E = weight_E / np.maximum(count_E, 1.0)
    return {
        "frequency": frequency_E,
        "paper": alpha * _unit(frequency_E) + (1 - alpha) * _unit(mean_weight_E),
        "gate_mass": weight_E,
    }


def super_experts(peaks: Mapping[int, np.ndarray], num_layers: int) -> dict[int, np.ndarray]:
    """Where the super experts (arXiv:2507.23279) are, which pruning should spare: by block, true or false, (E,).

    `peaks` are the experts' largest outputs a (`ExpertStatistics.peak_E`) by block; blocks from `num_layers` on are MTP
    blocks. With A the peaks of all experts of decoder layers, expert e of layer l is super if

        a_le > P99.5(A)  and  a_le > max(A) / 10  and  l < 3/4 * num_layers
    """
    of_layers = np.concatenate([[], *(peak_E for block, peak_E in peaks.items() if block < num_layers)])
    least = max(np.percentile(of_layers, 99.5), np.max(of_layers) / 10) if len(of_layers) else np.inf
    return {block: (peak_E > least) & (4 * block < 3 * num_layers) for block, peak_E in peaks.items()}


def min_per_group(config: Config, experts_per_token: int) -> int:
    """Survivors every group needs so that routing always finds K experts: max(2, ceil(K / topk_group))."""
    needed = -(-experts_per_token // config.topk_group)
    return needed if config.n_group == 1 else max(2, needed)


def pruning_order(
    scores_E: np.ndarray,
    group_E: np.ndarray,
    keep_per_group: int,
    protected_E: np.ndarray | None = None,
    equal_groups: bool = False,
) -> np.ndarray:
    """Experts in the order in which they go, least needed first; no group falls below `keep_per_group`.

    Its length is the number that can be pruned; pruning n experts is pruning the first n of it. Experts where
    protected_E (E,) is true never go, and count as survivors of their group.

    With `equal_groups` they go in rounds, in each the least needed expert of every group, until a group has none left
    to give: of G groups, pruning a multiple of G experts takes the same number from each, and only such numbers may be
    pruned for a runtime whose groups are equal.
    """
    ascending = np.argsort(scores_E, kind="stable")
    unprotected = ascending if protected_E is None else ascending[~protected_E[ascending]]
    going = []
    for group in np.unique(group_E):
        spare = max(np.count_nonzero(group_E == group) - keep_per_group, 0)
        going.append(unprotected[group_E[unprotected] == group][:spare])
    if equal_groups:
        rounds = min(map(len, going))
        return np.stack([own[:rounds] for own in going], axis=1).reshape(-1)
    return unprotected[np.isin(unprotected, np.concatenate(going))]


def masked_bias(bias_E: jax.Array, pruned_E: jax.Array | np.ndarray) -> jax.Array:
    """A router bias under which the experts where pruned_E (E,) is true are never chosen.

    A layer with it computes what `prune` without them does: their choice is -inf before the top-K, so tokens route to
    other experts.
    """
    return jnp.where(jnp.asarray(pruned_E), -jnp.inf, bias_E)


def prune(moe: MoE, keep: Sequence[int]) -> MoE:
    """The layer, or trunk, with only the experts `keep`, in ascending order; survivors stay in their groups.

    E becomes len(keep) in the experts' weights, the router, its bias and `group_id`.
    """
    kept = np.asarray(keep, np.int32)

    def survivors(own: Weight) -> Weight:
        return select_experts(own, keep) if isinstance(own, ExpertWeights) else jnp.take(own, kept, axis=0)

    leaves = named_leaves(moe).items()
    return moe.with_leaves({name: survivors(own) for name, own in leaves if IN_BLOCK[f"mlp.{name}"].is_per_expert})


class PruningError(NamedTuple):
    """Errors of a layer's routed output y_t = sum_k g_tk * f_tk relative to it, scalars; 0 if nothing was lost.

    rerouted: sum_t |y'_t - y_t|^2 / sum_t |y_t|^2, where y' routes past the pruned experts.
    dropped: the same where y' lacks the pruned experts' terms, with nothing in their place and the others' g unchanged.
    gate2_lost: sum of g^2 over the pairs (t, k) whose expert is pruned / sum of g^2 over all. It is `dropped` if all
    outputs f have one norm and a token's are orthogonal.
    gate_lost: the same of g.
    """

    rerouted: jax.Array
    dropped: jax.Array
    gate2_lost: jax.Array
    gate_lost: jax.Array


def lost(routing: Routing, pruned_E: jax.Array) -> Routing:
    """What goes to the experts where pruned_E (E,) is true; in place of others is -1, which no expert is, and 0."""
    is_lost_TK = pruned_E[routing.experts_TK]
    return Routing(jnp.where(is_lost_TK, routing.experts_TK, -1), jnp.where(is_lost_TK, routing.weights_TK, 0.0))


def rerouted(moe: MoE, x_TD: jax.Array, pruned_E: jax.Array) -> Routing:
    """Where tokens x (T, D) go without the experts where pruned_E (E,) is true. `moe` may be a trunk.

    Every group keeps at least `min_per_group` experts, or tokens find fewer than K.
    """
    return moe.with_leaves({"bias": masked_bias(moe.bias.get_value(), pruned_E)}).route(x_TD)


@jax.jit
def pruning_error(
    routing: Routing, pruned_E: jax.Array, y_TD: jax.Array, lost_TD: jax.Array, rerouted_TD: jax.Array
) -> PruningError:
    """The error of pruning the experts where pruned_E (E,) is true, from a layer's routed outputs (T, D): by its
    `routing`, by what is `lost`, and `rerouted`. The shared expert is left out."""
    lost_weights_TK = lost(routing, pruned_E).weights_TK
    return PruningError(
        rerouted=_share(jnp.sum((rerouted_TD - y_TD) ** 2), jnp.sum(y_TD**2)),
        dropped=_share(jnp.sum(lost_TD**2), jnp.sum(y_TD**2)),
        gate2_lost=_share(jnp.sum(lost_weights_TK**2), jnp.sum(routing.weights_TK**2)),
        gate_lost=_share(jnp.sum(lost_weights_TK), jnp.sum(routing.weights_TK)),
    )


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    return part / jnp.maximum(whole, 1e-30)


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)

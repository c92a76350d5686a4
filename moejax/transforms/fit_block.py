"""What gives hidden states in a compressed block (`o`, every `down`), fitted to the original's and rounded again, in an
order: `o` to what attention's outputs lack, the shared experts' `down`, or a dense block's, to what the block's do, and
the routed experts' to what is left of that."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.calibrate import BlockStatistics, ExpertStatistics
from moejax.calibrate.expert_statistics import expert_statistics
from moejax.formats import ExpertWeights, GroupedCodes, Leaf, experts_in_buckets, format_name, gather_experts
from moejax.kernels import expert_outer_products, product
from moejax.model import Config, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import Keep, Kept
from moejax.model.leaves import Taps
from moejax.model.moe import Experts, MoE, Routing
from moejax.model.rope import Angles
from moejax.model.sliced import Entered, SlicedBlock, entered, leave, onto, pieces, sliced, with_experts
from moejax.transforms.output_fit import Lacking, fitted, lacking
from moejax.transforms.rounder import Projection, Rounder, Wanted
from moejax.transforms.rounding import to_float32

# What each of a token's experts makes up for of what its outputs lack: if each did for all, it would be several times
# too much.
EXPERTS_SHARE = 0.5

# Bytes of experts' sums that are in memory together, about.
_BYTES_TOGETHER = 1 << 30


@dataclass(frozen=True)
class Passing:
    """Hidden states (B, T, D), batch by batch: of the compressed model before a block; of the original behind its own
    attention, and behind the block."""

    before: Sequence[Kept]
    attended: Sequence[Kept]
    behind: Sequence[Kept]
    by: Angles


def fit_block(
    block: SlicedBlock,
    compressed: Block,
    survivors: Sequence[int],
    passing: Passing,
    statistics: BlockStatistics,
    rounder: Rounder,
    name: str,
    kept: Keep,
) -> Block:
    """What `compressed`, made of `block`, called `name` in the model, becomes; formats stay.

    survivors: the original's number of every expert. statistics: those it was rounded by, of which damping, what
    outputs are weighed by and the layer's sums over experts count here. `kept` puts arrays of all tokens away.
    """
    own, fit, by = sliced(compressed), _Fit(named_leaves(block.trunk), statistics, rounder, name), passing.by
    attended, behind = (_pairs(passing.before, wanted) for wanted in (passing.attended, passing.behind))
    trunk = fit.matrix(own.trunk, "self_attn.o", (_behind_attention(own.trunk, *pair, by) for pair in attended))
    if not isinstance(trunk.mlp, MoE):
        return fit.matrix(trunk, "mlp.down", (_behind_block(trunk, *pair, by) for pair in behind))
    own = replace(own, trunk=trunk)
    every = [jax.tree.map(kept, _within(own, *pair, by)) for pair in behind]
    sums = (lacking(x_TF, r_TD) for x_TF, r_TD in _pairs([n.shared_TF for n in every], [n.r_TD for n in every]))
    trunk = fit.matrix(trunk, "mlp.shared.down", sums)
    change_DF = _change(own.trunk, trunk, "mlp.shared.down")
    every = [n._replace(r_TD=kept(_less(*map(jnp.asarray, (n.r_TD, n.shared_TF)), change_DF))) for n in every]
    experts = named_leaves(own.experts_of(range(own.num_experts)))
    experts["down"] = fit.experts(block, own, survivors, every)
    return with_experts(trunk, Experts(block.config, experts.__getitem__))


def _pairs(some: Sequence[Kept], others: Sequence[Kept]) -> Iterator[tuple[jax.Array, jax.Array]]:
    return ((jnp.asarray(x), jnp.asarray(y)) for x, y in zip(some, others, strict=True))


class _Within(NamedTuple):
    """Of a batch: what a block's routed experts take and the shared ones' `down`, and what the block's outputs lack."""

    normed_TD: Kept
    routing: Routing
    shared_TF: Kept
    r_TD: Kept


@dataclass(frozen=True)
class _Fit:
    """Weights of an original block's trunk, called `name`, by name; the block's statistics; what rounds."""

    original: dict[str, Any]
    statistics: BlockStatistics
    rounder: Rounder
    name: str

    def matrix(self, trunk: Block, name: str, batches: Iterable[Lacking]) -> Block:
        """The trunk with one weight fitted, by what is lacked in every batch, unless it is the original's."""
        leaf = named_leaves(trunk)[name]
        if not isinstance(leaf, GroupedCodes):
            return trunk
        means = _mean(batches, self.statistics.tokens)
        hessian = means.products_II
        inputs = self.statistics.inputs(name)._replace(second_moment=jnp.diagonal(hessian), hessian=hessian)
        target = fitted(to_float32(self.original[name]), to_float32(leaf), means, inputs)
        return trunk.with_leaves({name: self.rounder.matrix(f"{self.name}.{name}", target, inputs, format_name(leaf))})

    def experts(
        self, block: SlicedBlock, compressed: SlicedBlock, survivors: Sequence[int], batches: Sequence[_Within]
    ) -> ExpertWeights:
        """Every routed expert's `down`."""
        leaves: list[Leaf] = []
        for members, experts in replace(compressed, per_slice=experts_fitted_together(block.config)).slices():
            original = block.experts_of([survivors[e] for e in members]).down.get_value()
            leaves += self._of_slice(original, experts.down.get_value(), *_of_experts(members, experts, batches))
        return gather_experts(leaves)

    def _of_slice(
        self, original: ExpertWeights, rounded: ExpertWeights, statistics: ExpertStatistics, lacking_EDF: jax.Array
    ) -> list[Leaf]:
        known = self.statistics.experts
        assert known is not None
        statistics = replace(statistics, layer=known.layer, damping=known.damping, output_DD=known.output_DD)
        leaves = [rounded.expert(e) for e in range(rounded.num_experts)]
        fits = [e for e, leaf in enumerate(leaves) if isinstance(leaf, GroupedCodes)]
        if not fits:
            return leaves
        targets = [
            _fitted_expert(to_float32(original.expert(e)), to_float32(leaves[e]), statistics, lacking_EDF, e)
            for e in fits
        ]
        weights = experts_in_buckets([jnp.stack(targets)], [range(len(fits))])
        of = Projection(f"{self.name}.mlp.experts.down", fits, weights, statistics.of(fits))
        names = [format_name(leaves[e]) for e in fits]
        wanted = [Wanted(of, [k for k, own in enumerate(names) if own == to], to) for to in sorted(set(names))]
        for one, found in zip(wanted, self.rounder.experts(wanted), strict=True):
            for k, leaf in zip(one.some, found, strict=True):
                leaves[fits[k]] = leaf
        return leaves


@jax.jit
def _fitted_expert(
    weight_DF: jax.Array, rounded_DF: jax.Array, statistics: ExpertStatistics, lacking_EDF: jax.Array, e: jax.Array
) -> jax.Array:
    (products_EFF,) = statistics.hidden_EFF
    weight = statistics.hessian_weight("down", e)
    means = Lacking(products_EFF[e] / weight, lacking_EDF[e] / weight)
    return fitted(weight_DF, rounded_DF, means, statistics.inputs("down", e), EXPERTS_SHARE)


@jax.jit
def _behind_attention(trunk: Block, x_BTD: jax.Array, wanted_BTD: jax.Array, by: Angles) -> Lacking:
    taps: Taps = {}
    r_BTD = wanted_BTD - trunk.attended(x_BTD, by, taps)
    return lacking(taps["self_attn.o"], r_BTD)


@jax.jit
def _behind_block(trunk: Block, x_BTD: jax.Array, wanted_BTD: jax.Array, by: Angles) -> Lacking:
    taps: Taps = {}
    r_BTD = wanted_BTD - trunk(x_BTD, by, taps=taps)
    return lacking(taps["mlp.down"], r_BTD)


def _within(block: SlicedBlock, x_BTD: jax.Array, wanted_BTD: jax.Array, by: Angles) -> _Within:
    inside, shared_TF = _enter(block.trunk, x_BTD, by)
    routed_TD = inside.nothing_TD
    for members, experts in block.slices():
        routed_TD = onto(experts, members, inside.normed_TD, inside.routing, routed_TD)
    r_TD = (wanted_BTD - leave(inside, routed_TD)).reshape(inside.normed_TD.shape)
    return _Within(inside.normed_TD, inside.routing, shared_TF, r_TD)


@jax.jit
def _enter(trunk: Block, x_BTD: jax.Array, by: Angles) -> tuple[Entered, jax.Array]:
    taps: Taps = {}
    inside = entered(trunk, x_BTD, by, taps)
    return inside, taps["mlp.shared.down"]


@jax.jit
def _less(r_TD: jax.Array, x_TF: jax.Array, change_DF: jax.Array) -> jax.Array:
    """What outputs lack when a weight that takes x has changed."""
    return r_TD - product("tf,df->td", x_TF, change_DF)


def _change(trunk: Block, other: Block, name: str) -> jax.Array:
    before, after = (to_float32(named_leaves(own)[name]) for own in (trunk, other))
    return after - before


def _mean(batches: Iterable[Lacking], tokens: jax.Array) -> Lacking:
    total: Lacking | None = None
    for own in batches:
        total = own if total is None else _plus(total, own)
    assert total is not None
    return jax.tree.map(lambda a: a / tokens, total)


# In place: `o` of DeepSeek-V3 has sums of 1.5 GB.
_plus = partial(jax.jit, donate_argnums=0)(partial(jax.tree.map, jnp.add))


def _of_experts(
    members: Sequence[int], experts: Experts, batches: Sequence[_Within]
) -> tuple[ExpertStatistics, jax.Array]:
    """Of some experts: statistics, and sums over tokens of g r x^T (E, D, F), x what `down` takes and g its weight."""
    total: tuple[ExpertStatistics, jax.Array] | None = None
    for own in batches:
        normed_TD, routing, r_TD = jax.tree.map(jnp.asarray, (own.normed_TD, own.routing, own.r_TD))
        every = list(pieces(routing, members, normed_TD.shape[-1])) or [(0, 1)] * (total is None)
        for start, rows in every:
            found = _of_piece(experts, members[0], start, normed_TD, routing, r_TD, rows=rows)
            total = found if total is None else _merged(total, found)
    assert total is not None
    return total


@partial(jax.jit, static_argnames="rows")
def _of_piece(
    experts: Experts,
    first: int,
    start: int,
    normed_TD: jax.Array,
    routing: Routing,
    r_TD: jax.Array,
    rows: int,
) -> tuple[ExpertStatistics, jax.Array]:
    run, number = experts.run(normed_TD, routing, rows, first, start), experts.num_experts
    rows_E = jnp.bincount(run.expert_R, length=number + 1)[:number]
    r_RD = r_TD.at[run.token_R].get(mode="fill", fill_value=0) * run.weight_R[:, None].astype(r_TD.dtype)
    products = 4 * experts.config.moe_intermediate_size**2  # those of `down`'s inputs
    return expert_statistics(run, number, products), expert_outer_products(r_RD, run.hidden_RF, rows_E)


@partial(jax.jit, donate_argnums=0)
def _merged(
    total: tuple[ExpertStatistics, jax.Array], own: tuple[ExpertStatistics, jax.Array]
) -> tuple[ExpertStatistics, jax.Array]:
    return total[0].merged(own[0]), total[1] + own[1]


def experts_fitted_together(config: Config) -> int:
    """Of how many experts sums are in memory at once."""
    each = 4 * config.moe_intermediate_size * (config.moe_intermediate_size + config.hidden_size)
    return max(1, _BYTES_TOGETHER // each)

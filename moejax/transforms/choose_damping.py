"""How much error feedback damps Hessians of few tokens, chosen matrix by matrix on tokens that calibration left out.

Inputs that lie in few directions want less damping than others. Where tokens are many that is worth nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics, ExpertStatistics, Inputs, Statistics
from moejax.calibrate.expert_statistics import PRIOR_TOKENS_PER_INPUT
from moejax.formats import ExpertWeights, Leaf
from moejax.model import Config, DeepseekV3, Layout, named_leaves
from moejax.model.sliced import SlicedBlock, SlicedMtp, sliced, sliced_mtp
from moejax.model.weights import IN_BLOCK, row_of
from moejax.planning.plan import PROJECTIONS
from moejax.progress import Progress, counted, silent
from moejax.transforms.hessian import DAMPING, damping_for
from moejax.transforms.rounder import AFRESH, Projection, Wanted, few_experts, requantize, some_rows
from moejax.transforms.rounding import rounding_error, to_float32

# Multiples of `damping_for` that are tried.
MULTIPLES = (0.1, 0.3, 1.0, 3.0)

# What every matrix is rounded to for this, and how many of its rows, spread evenly.
_FORMAT, _MOST_ROWS = "int2g128", 4096


def has_few_tokens(config: Config, tokens: int) -> bool:
    """Whether damping may be worth choosing for a weight of a model that is calibrated on so many tokens: of a routed
    expert, which sees its share of them, or of another."""
    shapes = Layout(config).shapes().items()
    of_experts = tokens * config.num_experts_per_tok / config.n_routed_experts
    matrices = ((row_of(name).role, shape[-1]) for name, shape in shapes if row_of(name).is_matrix)
    return any(
        _are_few(of_experts + PRIOR_TOKENS_PER_INPUT * width if role == "routed experts" else tokens, width)
        for role, width in matrices
    )


def choose_damping(
    model: DeepseekV3, statistics: Statistics, held_out: Statistics, progress: Progress = silent
) -> Statistics:
    """The same `statistics` with the damping that loses least: of MULTIPLES the one whose rounded Q has the least
    E|(W - Q) x|^2 over the tokens of `held_out`, matrix by matrix, by 4,096 of its rows at most.

    The routed experts of a projection share one: the geometric mean counts, over those with most such tokens. Both
    statistics have Hessians. Weights whose tokens are many, so that `damping_for` is DAMPING, keep that.
    """
    blocks: list[SlicedBlock | SlicedMtp] = [*map(sliced, model.layers), *map(sliced_mtp, model.mtp)]
    cases = list(zip(blocks, statistics.blocks, held_out.blocks, strict=True))
    steps = sum(len(_matrices(sums)) + len(PROJECTIONS) * (sums.experts is not None) for sums in statistics.blocks)
    with counted(progress, steps + 1, "choosing damping") as tick:
        chosen = tuple(choose_damping_of_block(*case, tick) for case in cases)
        tick()
        head = choose_damping_of_matrix(model.head.get_value(), statistics.head_inputs(), held_out.head_inputs())
    return replace(statistics, blocks=chosen, head_damping=head)


def _matrices(sums: BlockStatistics) -> list[str]:
    return [name for name in sums.input2 if IN_BLOCK[name].may_be_rounded]


def choose_damping_of_block(
    part: SlicedBlock | SlicedMtp,
    sums: BlockStatistics,
    held_out: BlockStatistics,
    tick: Callable[[], object] = lambda: None,
) -> BlockStatistics:
    """One block's statistics as `choose_damping` has them; `tick` is called before every matrix and projection."""
    block = part if isinstance(part, SlicedBlock) else part.block
    outside = {} if isinstance(part, SlicedBlock) else named_leaves(part.outer)
    leaves, own = outside | named_leaves(block.trunk), {}
    for name in _matrices(sums):
        tick()
        own[name] = choose_damping_of_matrix(leaves[name], sums.inputs(name), held_out.inputs(name))
    experts = sums.experts
    if experts is not None and held_out.experts is not None:
        experts = replace(experts, damping=_known(_of_experts(block, experts, held_out.experts, tick)))
    return replace(sums, damping=_known(own), experts=experts)


def choose_damping_of_matrix(leaf: Leaf, inputs: Inputs, held_out: Inputs) -> jax.Array | None:
    """The multiple for one weight outside the routed experts, as `choose_damping` chooses it; None where tokens are
    many."""
    if not _are_few(inputs.tokens, leaf.shape[-1]):
        return None

    num_rows = math.prod(leaf.shape[:-1])
    row_R = np.linspace(0, num_rows - 1, min(num_rows, _MOST_ROWS)).round().astype(int)
    some = leaf if len(row_R) == num_rows else some_rows(leaf, row_R)

    def rounded(multiple: jax.Array) -> list[Leaf]:
        return [requantize(some, inputs._replace(damping=multiple, output_hessian=None), _FORMAT)]

    return _best(rounded, [some], [held_out])


def _of_experts(
    block: SlicedBlock, sums: ExpertStatistics, held_out: ExpertStatistics, tick: Callable[[], object]
) -> dict[str, jax.Array | None]:
    """By projection; the experts with most tokens are asked for once."""
    wide = (block.num_experts, block.config.moe_intermediate_size, block.config.hidden_size)
    most = max(map(few_experts, (wide, (wide[0], wide[2], wide[1]))))
    members = np.argsort(-np.asarray(held_out.count_E), kind="stable")[:most]
    few = {projection: _experts_have_few(sums, projection) for projection in PROJECTIONS}
    experts = named_leaves(block.experts_of(members.tolist())) if any(few.values()) else {}
    sums, held_out = sums.of(members), held_out.of(members)
    chosen = {}
    for projection in PROJECTIONS:
        tick()
        own = _of_projection(experts[projection], sums, held_out, projection) if few[projection] else None
        chosen[projection] = own
    return chosen


def _of_projection(
    weights: ExpertWeights, sums: ExpertStatistics, held_out: ExpertStatistics, projection: str
) -> jax.Array | None:
    members = range(min(weights.num_experts, few_experts(weights.shape)))

    def rounded(multiple: jax.Array) -> list[Leaf]:
        damped = replace(sums, damping={projection: multiple}, output_DD=None)
        of = Projection(projection, members, weights, damped)
        (leaves,) = AFRESH.experts([Wanted(of, members, _FORMAT)])
        return leaves

    return _best(rounded, [weights.expert(e) for e in members], [held_out.inputs(projection, e) for e in members])


def _experts_have_few(sums: ExpertStatistics, projection: str) -> bool:
    return _are_few(jnp.mean(sums.input_tokens(projection)), sums.input_second_moment(projection).shape[-1])


def _are_few(tokens: jax.Array | float, inputs: int) -> bool:
    return float(damping_for(tokens, inputs)) > DAMPING


def _best(rounded: Callable[[jax.Array], list[Leaf]], leaves: Sequence[Leaf], held_out: Sequence[Inputs]) -> jax.Array:
    """The multiple of least error for matrices of one shape."""
    matrices, ones = [to_float32(leaf) for leaf in leaves], jnp.ones(leaves[0].shape[:-1])
    multiples = [jnp.float32(multiple) for multiple in MULTIPLES]
    error_MB = [
        [
            float(rounding_error(matrix, to_float32(leaf), inputs, ones))
            for matrix, leaf, inputs in zip(matrices, rounded(multiple), held_out, strict=True)
        ]
        for multiple in multiples
    ]
    return multiples[int(np.argmin(np.log(np.maximum(error_MB, 1e-300)).mean(axis=1)))]


def _known(chosen: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
    return {name: multiple for name, multiple in chosen.items() if multiple is not None}

"""How long a job takes whose prices come from a sample: seconds of every phase, before they are spent.

Pieces of the job are done and timed on one layer with a few slices of its experts, and counted:

    seconds of a phase = sum over kinds of pieces of seconds of one * how many there are

Where a layer's experts are several slices, of two numbers of slices and of runs the seconds per slice and run follow;
where they are one, what a run takes is shared out between it and the trunk.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import BlockStatistics
from moejax.calibrate.calibration import Calibration
from moejax.evaluate.divergence import head_log_probabilities
from moejax.model import Config, Layout, named_leaves
from moejax.model.moe import Experts
from moejax.model.sliced import SlicedBlock, experts_in_slice, slices_of
from moejax.model.source import Source
from moejax.model.weights import block_and_name, row_of
from moejax.pipeline.activated_experts import candidates
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.crossing import AlternativeOf
from moejax.pipeline.measured_layer import tried_counts
from moejax.pipeline.options import allowed_counts, order_of_pruning
from moejax.pipeline.probes import EMBEDDING, EXPERTS_DOWN, EXPERTS_WIDE, Change, changes_of
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.room import BATCH, Room
from moejax.pipeline.rounded import experts_in_formats
from moejax.pipeline.sampled import EXPERTS as LOOKED_AT
from moejax.pipeline.sampled import ROWS, Sampled, seen_by_variants
from moejax.pipeline.variants import Changed, Variants
from moejax.pipeline.working_copy import dense_experts, dense_trunk
from moejax.planning.fit import PRUNING_WEIGHTS
from moejax.sharding import ALONE, Crew
from moejax.transforms.rounder import Afresh, Wanted

# Slices, and runs through them, of which the pieces are timed: enough slices to tell them from what the trunk takes.
_CASES = ((4, 1), (24, 1), (24, 4))
_RUNS = (1, 4)
# What of a layer's experts a family is.
_SHARES = {EXPERTS_WIDE: 2 / 3, EXPERTS_DOWN: 1 / 3}


@dataclass(frozen=True)
class Pieces:
    """Seconds of one of each.

    read: a slice of experts is read. run, trunk_run: the chunks that variants see go through a slice, and through the
    rest of a layer. observed, trunk_observed: a batch that is calibrated on does. imitated, rounded: per number of a
    weight. head: the predictions of one chunk.
    """

    read: float
    run: float
    trunk_run: float
    observed: float
    trunk_observed: float
    imitated: float
    rounded: float
    head: float


def expected(
    source: Source, recipe: Recipe, calibrated: Calibrated, room: Room, evaluated: int, crew: Crew = ALONE
) -> dict[str, float]:
    """Seconds of every phase, by what its progress is called, of a job that evaluates so many chunks, and rounds
    experts on a crew's devices."""
    config = source.config
    seen_BT = seen_by_variants(calibrated.held_out, Sampled(recipe.formats, {}))
    together = room.runs_within(4 * seen_BT.size * config.hidden_size)
    pieces = timed_pieces(source, recipe, calibrated, seen_BT, room, crew)
    return expected_seconds(pieces, config, recipe, len(calibrated.chunks), len(seen_BT), evaluated, together)


def timed_pieces(
    source: Source, recipe: Recipe, calibrated: Calibrated, seen_BT: np.ndarray, room: Room, crew: Crew = ALONE
) -> Pieces:
    """Of a model's first layer with experts, or its last, on the chunks that variants see and on one batch to
    calibrate on. Each is done once before it is timed, so that compiling does not count; embedding, layer and head are
    in memory one after another."""
    config = source.config
    index = min(config.first_k_dense_replace, config.num_hidden_layers - 1)
    most = len(slices_of(config.n_routed_experts, experts_in_slice(config))) if config.is_moe(index) else 0
    cases = [(min(slices, most), runs) for slices, runs in _CASES]
    variants = [Variants(config, seen_BT, room) for _ in (*_RUNS, *cases)]  # some go through untimed
    one = Calibration(
        config, calibrated.chunks[:BATCH], hessians=recipe.error_feedback, kept=room.kept, within=room.within
    )
    embedding = source.embedding()
    for own in variants:
        own.embedding(embedding)
    one.embedding(embedding)
    del embedding
    pieces = _of_layer(index, source.block(index), variants, one, cases, recipe, crew)
    head, normed_1TD = source.head(), jnp.asarray(one.states[0][:1])
    predicted = partial(head_log_probabilities, normed_1TD, head)
    _seconds(predicted)
    return replace(pieces, head=_seconds(predicted))


def _of_layer(
    index: int,
    whole: SlicedBlock,
    variants: Sequence[Variants],
    one: Calibration,
    cases: Sequence[tuple[int, int]],
    recipe: Recipe,
    crew: Crew,
) -> Pieces:
    """Of a layer, nothing of the head."""
    block = replace(whole, trunk=dense_trunk(whole.trunk))
    part = partial(_first_slices, block)

    def run(own: Variants, slices: int, runs: int) -> float:
        others = [(str(n), Changed()) for n in range(runs - 1)]
        return _seconds(lambda: own.block(index, part(slices), others, _dense))

    for own, runs in zip(variants, _RUNS, strict=False):
        run(own, cases[0][0], runs)
    seconds = [run(own, *case) for own, case in zip(variants[len(_RUNS) :], cases, strict=True)]
    read, through, trunk = _fitted([(slices, slices * runs, runs) for slices, runs in cases], seconds)
    numbers = sorted({slices for slices, _ in cases})
    sums = one.observe(index, part(numbers[0]))
    seconds = [_seconds(partial(one.observe, index, part(own))) for own in numbers]
    both, trunk_observed = _fitted([(own, 1) for own in numbers], seconds)
    weights = _of_weights(index, block, sums, recipe, crew)
    return Pieces(read, through, trunk, max(0.0, both - read), trunk_observed, *weights, head=0.0)


def expected_seconds(
    pieces: Pieces, config: Config, recipe: Recipe, chunks: int, seen: int, evaluated: int, together: int
) -> dict[str, float]:
    """Of every phase, by what its progress is called: of a job that calibrates on so many chunks, whose variants see so
    many, `together` of them within a layer at a time, and that evaluates so many."""
    sizes, drafts = _sizes(config), config.num_nextn_predict_layers
    moe = sum(map(config.is_moe, range(config.num_hidden_layers)))
    per_layer = len(slices_of(config.n_routed_experts, experts_in_slice(config)))
    # Dense layers count by their numbers.
    layers = moe + (config.num_hidden_layers - moe) * sizes.dense / sizes.trunk
    batches, changes = math.ceil(chunks / BATCH), changes_of(config, recipe.formats)
    calibrating = (layers + drafts) * batches * pieces.trunk_observed
    # So many batches in the memory of so many runs (`Room.runs_within`, `Calibration`), of which slices are read anew.
    groups = math.ceil(batches / max(1, 3 * together * seen // (2 * BATCH)))
    calibrating += (moe + drafts) * per_layer * (groups * pieces.read + batches * pieces.observed)

    def passing(runs: float, whole: float, through_trunk: float) -> float:
        """Of so many runs a layer, which are so many of all chunks, through its experts and through its trunk."""
        reads = moe * per_layer * math.ceil(runs / together) * pieces.read
        return reads + moe * per_layer * whole * pieces.run + layers * through_trunk * pieces.trunk_run

    order = order_of_pruning(np.zeros(config.n_routed_experts), config, recipe)
    pruned = 2 * len(tried_counts(allowed_counts(order, config, recipe)))
    begun = 1 + float(np.mean([_begun(changes, layer) for layer in range(config.num_hidden_layers)]))
    tried = sizes.matrices + 3  # each matrix, and projection of the experts, on one chunk, as pruning
    looked_at = ROWS * config.hidden_size * (3 * LOOKED_AT * moe + sizes.matrices * layers)
    shares = moe + sum(len(own.layers) * sum(_SHARES.get(family, 0.0) for family in own.families) for own in changes)
    measuring = (
        calibrating
        + passing(begun + tried + pruned, begun + (tried + pruned) / seen, begun + tried / seen)
        + (moe + drafts * (1 + per_layer)) * pieces.read
        + pieces.rounded * (len(recipe.formats) * looked_at + 4 * sizes.outer)
        + pieces.imitated * shares * sizes.experts
        + pieces.head * seen * (1 + len(changes))
    )
    again = calibrating if recipe.error_feedback else 0.0  # Hessians are not kept
    numbers = (moe + drafts) * sizes.experts + (layers + drafts) * sizes.trunk
    plans, scalings = len(PRUNING_WEIGHTS) - 1, 1 + recipe.fit_routing_scale
    # The first walk has tried the best plan with the model's own number of experts per token.
    fewer = [
        own for own in candidates(recipe, config, [config.n_routed_experts]) if own != (config.num_experts_per_tok,)
    ]
    trying = 0.0
    for tries, different in ((plans, plans), (len(fewer), 1)) if fewer else ((plans, plans),):
        through = 1 + tries * scalings
        fits = tries * (scalings - 1)
        trying += again + passing(through + fits, through + fits, through) + pieces.head * seen * through
        trying += different * (pieces.imitated * numbers + pieces.rounded * sizes.outer)
    compressing = again + (moe + drafts) * per_layer * pieces.read + pieces.rounded * (numbers + sizes.outer)

    def walked(times: float, reads: int) -> float:
        """Of all that is calibrated on, through every layer, whose experts are read so often."""
        rounds = times * chunks / seen
        return moe * per_layer * (reads * pieces.read + rounds * pieces.run) + layers * rounds * pieces.trunk_run

    # The original's states, and the compressed model's up to attention, up to what gives outputs, and out; every `down`
    # is rounded again.
    fitting = walked(4, 2) + pieces.rounded * moe * sizes.experts / 3 if recipe.output_fit else 0.0
    # Forwards; and back, where every block is computed once more and differentiated twice, by weights' inputs alone.
    weighing = {"weighing outputs": walked(4, 2) + 3 * chunks * pieces.head} if recipe.row_feedback else {}
    rounds = evaluated / seen
    evaluating = moe * per_layer * (pieces.read + rounds * pieces.run) + layers * rounds * pieces.trunk_run
    evaluating = 2 * (evaluating + evaluated * pieces.head)  # the original, and what has become of it
    phases = {"measuring": measuring, "trying plans": trying, "compressing": compressing + fitting}
    return weighing | phases | {"evaluating": evaluating}


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights: of a layer's experts, of the matrices around them, of a dense layer's, of embedding and head;
    and how many matrices are around experts."""

    experts: int
    trunk: int
    dense: int
    outer: int
    matrices: int


def _sizes(config: Config) -> _Sizes:
    found: dict[tuple[int | None, bool], list[int]] = {}
    for name, shape in Layout(config).shapes().items():
        row, (block, _) = row_of(name), block_and_name(name, config.num_hidden_layers)
        if row.may_be_rounded or row.role == "routed experts":
            found.setdefault((block, row.role == "routed experts"), []).append(math.prod(shape))
    last = config.num_hidden_layers - 1
    trunk = found[last, False]
    return _Sizes(
        sum(found.get((last, True), [])), sum(trunk), sum(found[0, False]), sum(found[None, False]), len(trunk)
    )


def _begun(changes: list[Change], layer: int) -> int:
    """How many variants differ from the model within a layer or before it."""
    return sum(EMBEDDING in own.families or any(n <= layer for n in own.layers) for own in changes)


def _of_weights(
    index: int, block: SlicedBlock, sums: BlockStatistics, recipe: Recipe, crew: Crew
) -> tuple[float, float]:
    """Seconds per number to imitate and to round, of an expert's projections, in the format whose bits are in the
    middle; 0 where there are no experts."""
    formats = sorted(recipe.formats, key=lambda own: own.bits)
    if not formats or sums.experts is None:
        return 0.0, 0.0
    to, name = formats[len(formats) // 2], f"layers.{index}"
    members = block.ranges[0]
    experts = block.experts_of(members)
    relative = {f"{name}.mlp.experts.{own}": np.full(1, 0.1) for own in named_leaves(experts)}
    of = experts_in_formats(name, members, experts, sums.experts, [to], Sampled([to], relative))
    wanted = [Wanted(own.of, range(len(members)), to.name) for own in of.values()]
    numbers = sum(math.prod(own.of.weights.shape) for own in of.values())
    jobs: list[Callable[[], object]] = [
        lambda: [own.rounded(0) for own in of.values()],
        partial(Afresh(crew).experts, wanted),  # a slice's, over as many devices as it has groups for
    ]
    seconds = []
    for job in jobs:
        _seconds(job)  # compiling does not count
        seconds.append(_seconds(job) / numbers)
    return seconds[0], seconds[1]


def _first_slices(block: SlicedBlock, count: int) -> SlicedBlock:
    return replace(block, num_experts=min(block.num_experts, count * block.per_slice))


def _dense(members: object, experts: Experts) -> AlternativeOf:
    return lambda alternative: dense_experts(experts)


def _seconds(do: Callable[[], object]) -> float:
    """Until what it gives is there."""
    started = time.monotonic()
    jax.block_until_ready(do())
    return time.monotonic() - started


def _fitted(counts: list[tuple[int, ...]], seconds: list[float]) -> list[float]:
    """What one of each takes, none less than nothing, that fits the seconds of so many best."""
    found, *_ = np.linalg.lstsq(np.asarray(counts, float), np.asarray(seconds), rcond=None)
    return np.maximum(found, 0.0).tolist()

"""Running a model over calibration text and summing what its weights see, block after block."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.expert_statistics import (
    EXPERT_PRODUCTS_BYTES,
    PRODUCTS,
    ExpertStatistics,
    expert_statistics,
    joined,
)
from moejax.calibrate.products import Inputs, input_products, products
from moejax.calibrate.statistics import BlockStatistics, Statistics
from moejax.model.config import Config, require_tokens
from moejax.model.deepseek_v3 import Block, DeepseekV3, MtpBlock
from moejax.model.finite import require_finite_block, require_finite_mtp
from moejax.model.hidden_states import WITHIN, HiddenStates, Keep, Kept, as_it_is
from moejax.model.leaves import Taps
from moejax.model.moe import Experts, MoE, Routing, wide_dtype
from moejax.model.rope import Angles
from moejax.model.sliced import Entered, SlicedBlock, SlicedMtp, entered, leave, pieces, there, unjoin
from moejax.model.source import Source, source_of, walk
from moejax.model.steps import run_norm
from moejax.progress import Progress, counted, silent


def calibrate(
    model: DeepseekV3 | Source,
    chunks: np.ndarray,
    batch: int = 8,
    progress: Progress = silent,
    *,
    hessians: bool = False,
    expert_bytes: int = EXPERT_PRODUCTS_BYTES,
) -> Statistics:
    """Statistics of every weight's input over token chunks (N, T), in float32.

    Layer after layer over all chunks, so that one block at a time is needed; the hidden states of all chunks are kept.
    With `hessians` they include E[x x^T] of every input; experts have their own where a block's take no more than
    `expert_bytes`, else share their layer's.

    Raises InputError for tokens that are not the model's, and at the first block whose output is not finite.
    """
    source = source_of(model)
    calibration = Calibration(source.config, chunks, batch, hessians=hessians, expert_bytes=expert_bytes)
    with counted(progress, source.config.num_blocks, "calibrating") as tick:
        walk(source, calibration, mtp=source.config.num_nextn_predict_layers, tick=tick)
    return calibration.statistics()


class Calibration(HiddenStates):
    """How far calibration has come; `calibrate` has the arguments, and says what is raised.

    A walk takes it through every block and it keeps what it saw. Where others take the blocks' places for those behind
    them (`observe`, then `run`), calibration follows compression. `kept` puts away states, and sums of outer products.
    About `within` bytes of what a block's experts take and put out are in memory; of more, a few batches go through
    all experts, which are read anew for the next ones.
    """

    def __init__(
        self,
        config: Config,
        chunks: np.ndarray,
        batch: int = 8,
        *,
        hessians: bool = False,
        expert_bytes: int = EXPERT_PRODUCTS_BYTES,
        kept: Keep = as_it_is,
        within: int = WITHIN,
    ):
        require_tokens(chunks, config)
        batches = [jnp.asarray(chunks[i : i + batch]) for i in range(0, len(chunks), batch)]
        super().__init__(config, batches, jnp.float32, drafts=config.num_nextn_predict_layers > 0, kept=kept)
        self._chunks, self._hessians = chunks, hessians
        self._together = max(1, within // (2 * 4 * batch * chunks.shape[1] * config.hidden_size))
        self._max_bytes_each = expert_bytes // config.n_routed_experts if hessians else None
        self._observed: list[BlockStatistics] = []

    def block(self, index: int, block: SlicedBlock) -> None:
        self._observed.append(self.through(index, block))

    def norm(self, gain_D: jax.Array) -> None:
        eps = self.config.rms_norm_eps
        self.states = [self._kept(run_norm(jnp.asarray(x_BTD), gain_D, eps=eps)) for x_BTD in self.states]

    def mtp(self, depth: int, mtp: SlicedMtp) -> None:
        self._observed.append(self.observe_mtp(depth, mtp))

    def observe(self, index: int, block: SlicedBlock) -> BlockStatistics:
        """Of decoder block `index`, before which the states lie; they stay there."""
        return self._observe(index, block)[0]

    def through(self, index: int, block: SlicedBlock) -> BlockStatistics:
        """Of decoder block `index`; the states lie behind it afterwards."""
        statistics, self.states = self._observe(index, block)
        return statistics

    def observe_mtp(self, depth: int, mtp: SlicedMtp) -> BlockStatistics:
        """Of MTP block `depth`, behind the final norm."""
        taken = list(self.mtp_inputs())
        joined, total = [], None
        for own in taken:
            joined_BTD, statistics = _observe_joined(mtp.outer, *own, self._hessians)
            joined.append(joined_BTD)
            total = _plus(total, statistics)
        assert total is not None
        of_block, drafted = self._through(mtp.block, joined, self.mtp_by)
        for own, y_BTD in zip(taken, map(jnp.asarray, drafted), strict=True):
            require_finite_mtp(f"mtp.{depth}", mtp, *own, self.mtp_by, unjoin(mtp.outer, y_BTD))
        return total.beside(of_block)

    def head_inputs(self) -> Inputs:
        """Of the head, behind the final norm."""
        return self.statistics().head_inputs()

    def statistics(self) -> Statistics:
        """Of the blocks that the walk took it through, and, behind the final norm, of the head."""
        zeros_D = jnp.zeros(self.config.hidden_size)
        return Statistics(
            blocks=tuple(self._observed),
            tokens=jnp.asarray(self._chunks.size, jnp.float32),
            head_input2=sum((jnp.sum(x_BTD**2, axis=(0, 1)) for x_BTD in self._arrays()), zeros_D),
            count_C=jnp.bincount(jnp.asarray(self._chunks.reshape(-1)), length=self.config.vocab_size),
            head_products=functools.reduce(jnp.add, map(products, self._arrays())) if self._hessians else None,
        )

    def _observe(self, index: int, block: SlicedBlock) -> tuple[BlockStatistics, list[jax.Array]]:
        """The block's statistics, over all batches, and its outputs."""
        statistics, outputs = self._through(block, self._arrays(), self.by)
        for x_BTD, y_BTD in zip(self._arrays(), map(jnp.asarray, outputs), strict=True):
            require_finite_block(f"layers.{index}", block, x_BTD, self.by, y_BTD)
        return statistics, outputs

    def _arrays(self) -> Iterator[jax.Array]:
        """The states, one after another."""
        return map(jnp.asarray, self.states)

    def _through(
        self, block: SlicedBlock, states: Iterable[jax.Array], by: Angles
    ) -> tuple[BlockStatistics, list[Kept]]:
        """Up to the routed experts, batch by batch; slice by slice through those; and out. What is within the block
        is kept as states are."""
        total, insides = None, []
        for x_BTD in states:
            inside, statistics = _observe_trunk(block.trunk, x_BTD, by, self._hessians)
            insides.append(jax.tree.map(self._kept, inside))
            total = _plus(total, statistics)
        assert total is not None
        if total.products is not None:
            total = replace(total, products={name: self._kept(own) for name, own in total.products.items()})
        if not block.is_moe:
            return total, insides
        slices, outputs = self._slices(block, insides)
        return replace(total, experts=joined(slices, total.tokens)), outputs

    def _slices(self, block: SlicedBlock, insides: Sequence[Entered]) -> tuple[Iterator[ExpertStatistics], list[Kept]]:
        """Of every slice of the experts, over all batches, asked for one by one; and the block's outputs, which are
        there behind the last."""
        outputs: list[Kept] = []
        groups = [insides[n : n + self._together] for n in range(0, len(insides), self._together)]
        so_far: list[Any] = [None] * len(block.ranges)
        for group in groups[:-1]:
            for n, own in enumerate(self._of_group(block, group, so_far, outputs)):
                so_far[n] = jax.tree.map(self._kept, own)
        return map(self._products_kept, self._of_group(block, groups[-1], so_far, outputs)), outputs

    def _products_kept(self, of: ExpertStatistics) -> ExpertStatistics:
        kept: dict[str, Any] = {name: tuple(map(self._kept, getattr(of, name))) for name in PRODUCTS}
        return replace(of, **kept)

    def _of_group(
        self, block: SlicedBlock, group: Sequence[Entered], so_far: Sequence[Any], outputs: list[Kept]
    ) -> Iterator[ExpertStatistics]:
        """Of every slice, over a few batches and those before, whose statistics `so_far` are."""
        # What experts take, and no more of what may lie on the disk.
        taken = [jax.tree.map(jnp.asarray, (own.normed_TD, own.routing)) for own in group]
        sums = [jnp.zeros_like(normed_TD, wide_dtype(normed_TD)) for normed_TD, _ in taken]
        for (members, experts), before in zip(block.slices(), so_far, strict=True):
            total = None if before is None else jax.tree.map(jnp.array, before)
            yield self._observe_slice(members, experts, taken, sums, total)
        del taken
        outputs += [self._kept(leave(there(inside), own)) for inside, own in zip(group, sums, strict=True)]

    def _observe_slice(
        self,
        members: Sequence[int],
        experts: Experts,
        taken: Sequence[tuple[jax.Array, Routing]],
        sums: list[jax.Array],
        total: ExpertStatistics | None,
    ) -> ExpertStatistics:
        """Of some experts, beside what there is; what they put out comes to the `sums`."""
        for n, (normed_TD, routing) in enumerate(taken):
            # One piece at least, though it may have no rows, so that there are statistics.
            every = list(pieces(routing, members, self.config.hidden_size)) or [(0, 1)] * (total is None)
            for start, rows in every:
                given = (normed_TD, routing, sums[n])
                sums[n], own = _observe_piece(
                    experts, members[0], start, *given, rows=rows, max_bytes_each=self._max_bytes_each
                )
                total = own if total is None else _merged_experts(total, own)
        assert total is not None
        jax.block_until_ready(total)  # before the next slice is read
        return total


def _plus(total: BlockStatistics | None, own: BlockStatistics) -> BlockStatistics:
    return own if total is None else _merged(total, own)


# In place: Hessians can be most of what is in memory.
_merged = partial(jax.jit, donate_argnums=0)(BlockStatistics.merged)
_merged_experts = partial(jax.jit, donate_argnums=0)(ExpertStatistics.merged)


@partial(jax.jit, static_argnames="hessians")
def _observe_trunk(
    trunk: Block, x_BTD: jax.Array, by: Angles, hessians: bool
) -> tuple[jax.Array | Entered, BlockStatistics]:
    """A dense block's output, or a block's states before its routed experts."""
    taps: Taps = {}
    inside = entered(trunk, x_BTD, by, taps) if isinstance(trunk.mlp, MoE) else trunk(x_BTD, by, taps=taps)
    return inside, _summed(taps, x_BTD, hessians)


@partial(jax.jit, static_argnames="hessians")
def _observe_joined(
    outer: MtpBlock, h_BTD: jax.Array, next_BTD: jax.Array, hessians: bool
) -> tuple[jax.Array, BlockStatistics]:
    taps: Taps = {}
    joined_BTD = outer.joined(h_BTD, next_BTD, taps)
    return joined_BTD, _summed(taps, h_BTD, hessians)


@partial(jax.jit, static_argnames=("rows", "max_bytes_each"), donate_argnames="routed_TD")
def _observe_piece(
    experts: Experts,
    first: int,
    start: int,
    normed_TD: jax.Array,
    routing: Routing,
    routed_TD: jax.Array,
    rows: int,
    max_bytes_each: int | None,
) -> tuple[jax.Array, ExpertStatistics]:
    run = experts.run(normed_TD, routing, rows, first, start)
    return run.onto(routed_TD), expert_statistics(run, experts.num_experts, max_bytes_each)


def _summed(taps: Taps, x_BTD: jax.Array, hessians: bool) -> BlockStatistics:
    tokens = jnp.asarray(x_BTD.shape[0] * x_BTD.shape[1], jnp.float32)
    input2 = {name: jnp.sum(x.astype(jnp.float32) ** 2, axis=tuple(range(x.ndim - 1))) for name, x in taps.items()}
    return BlockStatistics(tokens, input2, None, input_products(taps) if hessians else None)

"""Running a model over calibration text and summing what its weights see, block after block."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.products import input_products, products
from moejax.calibrate.statistics import EXPERT_PRODUCTS_BYTES, BlockStatistics, Inputs, Statistics, expert_statistics
from moejax.model.config import Config, require_tokens
from moejax.model.deepseek_v3 import Block, DeepseekV3, MtpBlock
from moejax.model.finite import require_finite_block, require_finite_mtp
from moejax.model.hidden_states import HiddenStates
from moejax.model.leaves import Taps
from moejax.model.moe import MoE
from moejax.model.norm import rms_norm
from moejax.model.rope import Angles
from moejax.model.source import Source, source_of, walk
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
    them (`observe`, then `run`), calibration follows compression.
    """

    def __init__(
        self,
        config: Config,
        chunks: np.ndarray,
        batch: int = 8,
        *,
        hessians: bool = False,
        expert_bytes: int = EXPERT_PRODUCTS_BYTES,
    ):
        require_tokens(chunks, config)
        batches = [jnp.asarray(chunks[i : i + batch]) for i in range(0, len(chunks), batch)]
        super().__init__(config, batches, jnp.float32, drafts=config.num_nextn_predict_layers > 0)
        self._chunks, self._max_bytes = chunks, expert_bytes if hessians else None
        self._observed: list[BlockStatistics] = []

    def block(self, index: int, block: Block) -> None:
        self._observed.append(self.through(index, block))

    def norm(self, gain_D: jax.Array) -> None:
        self.states = [rms_norm(x_BTD, gain_D, self.config.rms_norm_eps) for x_BTD in self.states]

    def mtp(self, depth: int, mtp: MtpBlock) -> None:
        self._observed.append(self.observe_mtp(depth, mtp))

    def observe(self, index: int, block: Block) -> BlockStatistics:
        """Of decoder block `index`, before which the states lie; they stay there."""
        return self._observe(index, block)[0]

    def through(self, index: int, block: Block) -> BlockStatistics:
        """Of decoder block `index`; the states lie behind it afterwards."""
        statistics, self.states = self._observe(index, block)
        return statistics

    def observe_mtp(self, depth: int, mtp: MtpBlock) -> BlockStatistics:
        """Of MTP block `depth`, behind the final norm."""
        total = None
        for taken in self.mtp_inputs():
            y_BTD, statistics = _observe_mtp(mtp, *taken, self._max_bytes)
            require_finite_mtp(f"mtp.{depth}", mtp, *taken, y_BTD)
            total = statistics if total is None else _merged(total, statistics)
        assert total is not None
        return total

    def head_inputs(self) -> Inputs:
        """Of the head, behind the final norm."""
        return self.statistics().head_inputs()

    def statistics(self) -> Statistics:
        """Of the blocks that the walk took it through, and, behind the final norm, of the head."""
        hessians = self._max_bytes is not None
        zeros_D = jnp.zeros(self.config.hidden_size)
        return Statistics(
            blocks=tuple(self._observed),
            tokens=jnp.asarray(self._chunks.size, jnp.float32),
            head_input2=sum((jnp.sum(x_BTD**2, axis=(0, 1)) for x_BTD in self.states), zeros_D),
            count_C=jnp.bincount(jnp.asarray(self._chunks.reshape(-1)), length=self.config.vocab_size),
            head_products=sum(map(products, self.states[1:]), products(self.states[0])) if hessians else None,
        )

    def _observe(self, index: int, block: Block) -> tuple[BlockStatistics, list[jax.Array]]:
        """The block's statistics, merged over the batches, and its outputs."""
        total, outputs = None, []
        for x_BTD in self.states:
            y_BTD, statistics = _observe_block(block, x_BTD, self.by, self._max_bytes)
            require_finite_block(f"layers.{index}", block, x_BTD, self.by, y_BTD)
            outputs.append(y_BTD)
            total = statistics if total is None else _merged(total, statistics)
        assert total is not None
        return total, outputs


# In place: experts' Hessians can be most of what is in memory.
_merged = partial(jax.jit, donate_argnums=0)(BlockStatistics.merged)


@partial(jax.jit, static_argnames="max_bytes")
def _observe_block(
    block: Block, x_BTD: jax.Array, by: Angles, max_bytes: int | None
) -> tuple[jax.Array, BlockStatistics]:
    taps: Taps = {}
    y_BTD = block(x_BTD, by, taps=taps)
    return y_BTD, _summed(taps, block, x_BTD, max_bytes)


@partial(jax.jit, static_argnames="max_bytes")
def _observe_mtp(
    mtp: MtpBlock, h_BTD: jax.Array, next_BTD: jax.Array, by: Angles, max_bytes: int | None
) -> tuple[jax.Array, BlockStatistics]:
    taps: Taps = {}
    y_BTD = mtp(h_BTD, next_BTD, by, taps)
    return y_BTD, _summed({name.removeprefix("block."): x for name, x in taps.items()}, mtp.block, h_BTD, max_bytes)


def _summed(taps: Taps, block: Block, x_BTD: jax.Array, max_bytes: int | None) -> BlockStatistics:
    """Hessians left out where `max_bytes`, an upper bound to what experts' own take, is None."""
    experts, tokens = None, x_BTD.shape[0] * x_BTD.shape[1]
    if isinstance(block.mlp, MoE):
        experts = expert_statistics(taps.pop("mlp.experts"), tokens, block.mlp.num_experts, max_bytes)
    input2 = {name: jnp.sum(x.astype(jnp.float32) ** 2, axis=tuple(range(x.ndim - 1))) for name, x in taps.items()}
    hessians = None if max_bytes is None else input_products(taps)
    return BlockStatistics(jnp.asarray(tokens, jnp.float32), input2, experts, hessians)

"""Running the model over calibration text and summing what its weights see."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.statistics import BlockStatistics, Statistics, expert_statistics
from moejax.model.deepseek_v3 import Block, DeepseekV3, MtpBlock
from moejax.model.leaves import Taps
from moejax.model.moe import MoE
from moejax.model.rope import Rotation
from moejax.model.steps import embed
from moejax.progress import Progress, silent

Observer = Callable[[jax.Array, jax.Array], tuple[jax.Array, BlockStatistics]]


def calibrate(model: DeepseekV3, chunks: np.ndarray, batch: int = 8, progress: Progress = silent) -> Statistics:
    """Statistics of every weight's input over token chunks (N, T), in float32.

    Layer after layer over all chunks, so that one block at a time is needed; the hidden states of all chunks are kept.
    """
    batches = [jnp.asarray(chunks[i : i + batch]) for i in range(0, len(chunks), batch)]
    embedded = [embed(model, tokens, jnp.float32) for tokens in batches]
    states, by = [x_BTD for x_BTD, _ in embedded], embedded[0][1]
    blocks = []
    for layer in progress(model.layers, "calibrating"):
        states, statistics = _observe_all(_layer_observer(layer, by), states, batches)
        blocks.append(statistics)
    normed = [model.normed(x_BTD) for x_BTD in states]
    for mtp in model.mtp:
        _, statistics = _observe_all(_mtp_observer(mtp, model, by), normed, batches)
        blocks.append(statistics)
    return Statistics(
        blocks=tuple(blocks),
        tokens=jnp.asarray(chunks.size, jnp.float32),
        head_input2=sum((jnp.sum(x_BTD**2, axis=(0, 1)) for x_BTD in normed), jnp.zeros(normed[0].shape[-1])),
        count_C=jnp.bincount(jnp.asarray(chunks.reshape(-1)), length=model.config.vocab_size),
    )


def _layer_observer(layer: Block, by: Rotation) -> Observer:
    return lambda x_BTD, _: _observe_block(layer, x_BTD, by)


def _mtp_observer(mtp: MtpBlock, model: DeepseekV3, by: Rotation) -> Observer:
    return lambda x_BTD, tokens_BT: _observe_mtp(mtp, x_BTD, model.embedded(tokens_BT), by)


def _observe_all(
    observe: Observer, states: Sequence[jax.Array], batches: Sequence[jax.Array]
) -> tuple[list[jax.Array], BlockStatistics]:
    """One block over all batches: its outputs, and its statistics merged."""
    outputs, total = [], None
    for x_BTD, tokens_BT in zip(states, batches, strict=True):
        y_BTD, statistics = observe(x_BTD, tokens_BT)
        outputs.append(y_BTD)
        total = statistics if total is None else total.merged(statistics)
    assert total is not None
    return outputs, total


@jax.jit
def _observe_block(block: Block, x_BTD: jax.Array, by: Rotation) -> tuple[jax.Array, BlockStatistics]:
    taps: Taps = {}
    y_BTD = block(x_BTD, by, taps=taps)
    return y_BTD, _summed(taps, block, x_BTD)


@jax.jit
def _observe_mtp(
    mtp: MtpBlock, h_BTD: jax.Array, embedded_BTD: jax.Array, by: Rotation
) -> tuple[jax.Array, BlockStatistics]:
    taps: Taps = {}
    h_BTD, by = h_BTD[:, :-1], jax.tree.map(lambda angle: angle[:-1], by)
    y_BTD = mtp(h_BTD, embedded_BTD[:, 1:], by, taps)
    return y_BTD, _summed({name.removeprefix("block."): x for name, x in taps.items()}, mtp.block, h_BTD)


def _summed(taps: Taps, block: Block, x_BTD: jax.Array) -> BlockStatistics:
    experts = expert_statistics(taps.pop("mlp.experts"), block.mlp.num_experts) if isinstance(block.mlp, MoE) else None
    input2 = {name: jnp.sum(x.astype(jnp.float32) ** 2, axis=tuple(range(x.ndim - 1))) for name, x in taps.items()}
    return BlockStatistics(jnp.asarray(x_BTD.shape[0] * x_BTD.shape[1], jnp.float32), input2, experts)

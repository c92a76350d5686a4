"""Running the model over calibration text and summing what its weights see."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.products import input_products, products
from moejax.calibrate.statistics import EXPERT_PRODUCTS_BYTES, BlockStatistics, Statistics, expert_statistics
from moejax.formats import Leaf
from moejax.kernels import take
from moejax.model.deepseek_v3 import Block, DeepseekV3, MtpBlock
from moejax.model.finite import require_finite, require_finite_block, require_finite_mtp
from moejax.model.leaves import Taps
from moejax.model.moe import MoE
from moejax.model.rope import Rotation
from moejax.model.steps import embed
from moejax.progress import Progress, silent

Observer = Callable[[jax.Array, jax.Array], tuple[jax.Array, BlockStatistics]]


def calibrate(
    model: DeepseekV3,
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
    batches = [jnp.asarray(chunks[i : i + batch]) for i in range(0, len(chunks), batch)]
    embedded = [embed(model, tokens, jnp.float32) for tokens in batches]
    states, by = [x_BTD for x_BTD, _ in embedded], embedded[0][1]
    for x_BTD in states:
        require_finite("embed", x_BTD)
    max_bytes = expert_bytes if hessians else None
    blocks = []
    for i, layer in enumerate(progress(model.layers, "calibrating")):
        states, statistics = observe_all(layer_observer(f"layers.{i}", layer, by, max_bytes), states, batches)
        blocks.append(statistics)
    normed = [model.normed(x_BTD) for x_BTD in states]
    for depth, mtp in enumerate(model.mtp):
        observer = mtp_observer(f"mtp.{depth}", mtp, model.embed.get_value(), by, max_bytes)
        blocks.append(observe_all(observer, normed, batches)[1])
    return Statistics(
        blocks=tuple(blocks),
        tokens=jnp.asarray(chunks.size, jnp.float32),
        head_input2=sum((jnp.sum(x_BTD**2, axis=(0, 1)) for x_BTD in normed), jnp.zeros(normed[0].shape[-1])),
        count_C=jnp.bincount(jnp.asarray(chunks.reshape(-1)), length=model.config.vocab_size),
        head_products=sum(map(products, normed[1:]), products(normed[0])) if hessians else None,
    )


def layer_observer(name: str, layer: Block, by: Rotation, max_bytes: int | None) -> Observer:
    """Observes the decoder block called `name`; without Hessians where `max_bytes` is None."""

    def observe(x_BTD: jax.Array, _: jax.Array) -> tuple[jax.Array, BlockStatistics]:
        y_BTD, statistics = _observe_block(layer, x_BTD, by, max_bytes)
        require_finite_block(name, layer, x_BTD, by, y_BTD)
        return y_BTD, statistics

    return observe


def mtp_observer(name: str, mtp: MtpBlock, embedding: Leaf, by: Rotation, max_bytes: int | None) -> Observer:
    """Observes the MTP block called `name` on the model's normed output."""

    def observe(x_BTD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, BlockStatistics]:
        h_BTD, next_BTD = x_BTD[:, :-1], take(embedding, tokens_BT[:, 1:], x_BTD.dtype)
        own_by = jax.tree.map(lambda angle: angle[:-1], by)
        y_BTD, statistics = _observe_mtp(mtp, h_BTD, next_BTD, own_by, max_bytes)
        require_finite_mtp(name, mtp, h_BTD, next_BTD, own_by, y_BTD)
        return y_BTD, statistics

    return observe


def observe_all(
    observe: Observer, states: Sequence[jax.Array], batches: Sequence[jax.Array]
) -> tuple[list[jax.Array], BlockStatistics]:
    """One block over all batches: its outputs, and its statistics merged.

    Raises InputError, naming the matrix, at the first batch of which an output is not finite.
    """
    outputs, total = [], None
    for x_BTD, tokens_BT in zip(states, batches, strict=True):
        y_BTD, statistics = observe(x_BTD, tokens_BT)
        outputs.append(y_BTD)
        total = statistics if total is None else _merged(total, statistics)
    assert total is not None
    return outputs, total


# In place: experts' Hessians can be most of what is in memory.
_merged = partial(jax.jit, donate_argnums=0)(BlockStatistics.merged)


@partial(jax.jit, static_argnames="max_bytes")
def _observe_block(
    block: Block, x_BTD: jax.Array, by: Rotation, max_bytes: int | None
) -> tuple[jax.Array, BlockStatistics]:
    taps: Taps = {}
    y_BTD = block(x_BTD, by, taps=taps)
    return y_BTD, _summed(taps, block, x_BTD, max_bytes)


@partial(jax.jit, static_argnames="max_bytes")
def _observe_mtp(
    mtp: MtpBlock, h_BTD: jax.Array, next_BTD: jax.Array, by: Rotation, max_bytes: int | None
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

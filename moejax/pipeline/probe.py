"""Probes: the true KL divergence that a change to one block causes, all other blocks original."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.evaluate.divergence import compare, head_log_probabilities
from moejax.formats import dense
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import Block
from moejax.model.finite import require_finite, require_finite_block
from moejax.model.leaves import Taps
from moejax.model.rope import Rotation
from moejax.model.steps import embed, run_block, run_blocks
from moejax.pipeline.working_copy import dense_block
from moejax.progress import Progress, silent


@dataclass(frozen=True)
class Probe:
    """The original model on a few chunks: dense blocks, what each of them takes in, and the original's predictions."""

    model: DeepseekV3
    tokens_BT: jax.Array
    rotation: Rotation
    blocks: tuple[Block, ...]
    inputs: tuple[jax.Array, ...]
    output: jax.Array
    head: jax.Array
    base: jax.Array

    def divergence_of_block(self, index: int, changed: Block) -> float:
        """Mean KL(original | model with block `index` replaced), nats."""
        x_BTD = run_block(changed, self.inputs[index], self.rotation)
        return self.divergence_of_output(run_blocks(self.blocks[index + 1 :], x_BTD, self.rotation))

    def experts_input(self, index: int) -> jax.Array:
        """What the experts and the router of block `index` take in, (B*T, D)."""
        return _experts_input(self.blocks[index], self.inputs[index], self.rotation)

    def divergence_of_model(self, blocks: Sequence[Block], embedding: jax.Array, head: jax.Array) -> float:
        """Mean KL with everything replaced."""
        return self.divergence_of_output(run_blocks(blocks, embedding[self.tokens_BT], self.rotation), head)

    def divergence_of_embedding(self, embedding: jax.Array) -> float:
        """Mean KL with another embedding (C, D)."""
        return self.divergence_of_output(run_blocks(self.blocks, embedding[self.tokens_BT], self.rotation))

    def divergence_of_head(self, head: jax.Array) -> float:
        """Mean KL with another head (C, D)."""
        return self.divergence_of_output(self.output, head)

    def divergence_of_output(self, x_BTD: jax.Array, head: jax.Array | None = None) -> float:
        """Mean KL of the last block's output x, through another head if one is given."""
        log_probs = head_log_probabilities(self.model.normed(x_BTD), self.head if head is None else head)
        divergence = float(jnp.mean(compare(self.base, log_probs, self.tokens_BT).kld))
        if not math.isfinite(divergence):
            raise InputError(
                f"a divergence of {divergence} was measured on the calibration text; a checkpoint whose weights are "
                "sound is needed"
            )
        return divergence


def probe(model: DeepseekV3, chunks: np.ndarray, progress: Progress = silent) -> Probe:
    """Prepare probes on token chunks (B, T), taken at once. Raises InputError where an output is not finite."""
    tokens_BT = jnp.asarray(chunks)
    x_BTD, by = embed(model, tokens_BT, jnp.float32)
    require_finite("embed", x_BTD)
    blocks, inputs = [], []
    for layer in progress(model.layers, "preparing probes"):
        blocks.append(dense_block(layer))
        inputs.append(x_BTD)
        x_BTD = run_block(blocks[-1], x_BTD, by)
        require_finite_block(f"layers.{len(blocks) - 1}", blocks[-1], inputs[-1], by, x_BTD)
    head = dense(model.head.get_value(), jnp.float32)
    base = head_log_probabilities(model.normed(x_BTD), head)
    return Probe(model, tokens_BT, by, tuple(blocks), tuple(inputs), x_BTD, head, base)


@jax.jit
def _experts_input(block: Block, x_BTD: jax.Array, by: Rotation) -> jax.Array:
    taps: Taps = {}
    block(x_BTD, by, taps=taps)
    return taps["mlp.router"]

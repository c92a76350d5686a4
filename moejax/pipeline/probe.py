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
from moejax.model import Config, DeepseekV3, require_tokens
from moejax.model.deepseek_v3 import Block
from moejax.model.hidden_states import HiddenStates
from moejax.model.leaves import Taps
from moejax.model.rope import Angles
from moejax.model.source import ModelSource, walk
from moejax.model.steps import run_block, run_blocks
from moejax.pipeline.working_copy import dense_block
from moejax.progress import Progress, counted, silent


@dataclass(frozen=True)
class Probe:
    """The original model on a few chunks: dense blocks, what each of them takes in, and the original's predictions."""

    model: DeepseekV3
    tokens_BT: jax.Array
    angles: Angles
    blocks: tuple[Block, ...]
    inputs: tuple[jax.Array, ...]
    output: jax.Array
    head: jax.Array
    base: jax.Array

    def divergence_of_block(self, index: int, changed: Block) -> float:
        """Mean KL(original | model with block `index` replaced), nats."""
        x_BTD = run_block(changed, self.inputs[index], self.angles)
        return self.divergence_of_output(run_blocks(self.blocks[index + 1 :], x_BTD, self.angles))

    def experts_input(self, index: int) -> jax.Array:
        """What the experts and the router of block `index` take in, (B*T, D)."""
        return _experts_input(self.blocks[index], self.inputs[index], self.angles)

    def divergence_of_model(self, blocks: Sequence[Block], embedding: jax.Array, head: jax.Array) -> float:
        """Mean KL with everything replaced."""
        return self.divergence_of_output(run_blocks(blocks, embedding[self.tokens_BT], self.angles), head)

    def divergence_of_embedding(self, embedding: jax.Array) -> float:
        """Mean KL with another embedding (C, D)."""
        return self.divergence_of_output(run_blocks(self.blocks, embedding[self.tokens_BT], self.angles))

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
    require_tokens(chunks, model.config)
    tokens_BT = jnp.asarray(chunks)
    step = _Preparing(model.config, [tokens_BT], jnp.float32)
    with counted(progress, len(model.layers), "preparing probes") as tick:
        walk(ModelSource(model), step, tick=tick)
    (x_BTD,), head = step.states, dense(model.head.get_value(), jnp.float32)
    base = head_log_probabilities(model.normed(x_BTD), head)
    return Probe(model, tokens_BT, step.by, tuple(step.blocks), tuple(step.inputs), x_BTD, head, base)


class _Preparing(HiddenStates):
    """Dense blocks, and what each of them takes in."""

    def __init__(self, config: Config, batches: Sequence[jax.Array], dtype: jax.typing.DTypeLike):
        super().__init__(config, batches, dtype)
        self.blocks: list[Block] = []
        self.inputs: list[jax.Array] = []

    def block(self, index: int, block: Block) -> None:
        self.blocks.append(dense_block(block))
        self.inputs += self.states
        super().block(index, self.blocks[-1])


@jax.jit
def _experts_input(block: Block, x_BTD: jax.Array, by: Angles) -> jax.Array:
    taps: Taps = {}
    block(x_BTD, by, taps=taps)
    return taps["mlp.router"]

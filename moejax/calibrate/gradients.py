"""By how much a model's predictions depend on errors in the residual stream, in every direction: what the outputs of
`o` and `down` are weighed by when they are rounded.

Errors d of the hidden states h of a token, which the predictions p follow, cost a divergence of

    KL(p(h) | p(h + d)) = 1/2 d^T E[g g^T] d + ...,    g = dL/dh, L = -log p(y), y drawn from p

so E[g g^T], the Fisher information, weighs directions as Hessians of inputs do (as in YAQA, arXiv:2505.22988).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.products import products
from moejax.calibrate.statistics import OutputWeights, Statistics
from moejax.errors import InputError
from moejax.formats import Leaf
from moejax.model.config import Config, require_tokens
from moejax.model.deepseek_v3 import Block, DeepseekV3, head_logits
from moejax.model.hidden_states import HiddenStates, Keep, Kept, as_it_is
from moejax.model.norm import rms_norm
from moejax.model.rope import Angles
from moejax.model.sliced import SlicedBlock
from moejax.model.source import Source, source_of, walk
from moejax.progress import Progress, counted, silent


def output_weights(
    model: DeepseekV3 | Source,
    chunks: np.ndarray,
    batch: int = 8,
    *,
    seed: int = 0,
    kept: Keep = as_it_is,
    progress: Progress = silent,
) -> tuple[OutputWeights, ...]:
    """Of every decoder layer, over token chunks (N, T): E[g g^T] of hidden states behind attention and behind the
    block, in float32.

    Forwards, then backwards block by block, each whole in memory and computed again; the hidden states before all of
    them, and what is found, are put away by `kept`. Raises InputError for tokens that are not the model's, and at the
    first block whose output, or gradient, is not finite.
    """
    source = source_of(model)
    require_tokens(chunks, source.config)
    batches = [jnp.asarray(chunks[i : i + batch]) for i in range(0, len(chunks), batch)]
    forwards = _Forwards(source.config, batches, kept)
    layers = source.config.num_hidden_layers
    with counted(progress, 2 * layers, "weighing outputs") as tick:
        walk(source, forwards, head=True, tick=tick)
        gain_D, head, eps = source.norm(), source.head(), source.config.rms_norm_eps
        keys = [jax.random.fold_in(jax.random.key(seed), n) for n in range(len(batches))]
        gradients: list[Kept] = [
            kept(_of_predictions(jnp.asarray(x_BTD), gain_D, head, key, eps))
            for x_BTD, key in zip(forwards.before.pop(), keys, strict=True)
        ]
        found = []
        for index in reversed(range(layers)):
            block, total = source.block(index).whole(), None
            for n, x_BTD in enumerate(forwards.before.pop()):
                given = jnp.asarray(x_BTD), forwards.by, jnp.asarray(gradients[n])
                before_BTD, own = _of_block(block, *given)
                gradients[n] = kept(before_BTD)
                total = own if total is None else jax.tree.map(jnp.add, total, own)
            assert total is not None
            for name, own in zip(OutputWeights._fields, total, strict=True):
                _require_finite(f"layers.{index}", name.removesuffix("_DD"), own)
            found.append(OutputWeights(*(kept(own / chunks.size) for own in total)))
            tick()
    return tuple(reversed(found))


def weighing_outputs(statistics: Statistics, weights: Sequence[OutputWeights]) -> Statistics:
    """The statistics with what every layer's outputs are weighed by; MTP blocks have nothing of the kind."""
    layers, behind = statistics.blocks[: len(weights)], statistics.blocks[len(weights) :]
    weighed = [own.weighing_outputs(by) for own, by in zip(layers, weights, strict=True)]
    return replace(statistics, blocks=(*weighed, *behind))


class _Forwards(HiddenStates):
    """Keeps what comes before every block, and before the final norm last."""

    def __init__(self, config: Config, batches: Sequence[jax.Array], kept: Keep):
        super().__init__(config, batches, jnp.float32, kept=kept)
        self.before: list[list[Kept]] = []

    def block(self, index: int, block: SlicedBlock) -> None:
        self.before.append(list(self.states))
        super().block(index, block)

    def norm(self, gain_D: jax.Array) -> None:
        self.before.append(list(self.states))


@jax.jit
def _of_block(block: Block, x_BTD: jax.Array, by: Angles, g_BTD: jax.Array) -> tuple[jax.Array, OutputWeights]:
    """From the gradient behind a block that before it; and sums of g g^T behind attention and behind the block."""

    def fed_forward(x_BTD: jax.Array) -> jax.Array:
        return x_BTD + block.mlp(block.normed(x_BTD))

    attended_BTD, through_attention = jax.vjp(lambda x_BTD: block.attended(x_BTD, by), x_BTD)
    _, through_mlp = jax.vjp(fed_forward, attended_BTD)
    (attended_g_BTD,) = through_mlp(g_BTD)
    (before_BTD,) = through_attention(attended_g_BTD)
    return before_BTD, OutputWeights(products(attended_g_BTD), products(g_BTD))


def _require_finite(block: str, where: str, products_DD: jax.Array) -> None:
    if not bool(jnp.all(jnp.isfinite(products_DD))):
        raise InputError(
            f"{block}: the gradient of the loss, {where}, is not finite; a checkpoint whose weights are sound is needed"
        )


@partial(jax.jit, static_argnames="eps")
def _of_predictions(x_BTD: jax.Array, gain_D: jax.Array, head: Leaf, key: jax.Array, eps: float) -> jax.Array:
    """dL/dx of states x before the final norm, L summed over tokens; logits are those of one sequence at a time."""

    def loss(x_TD: jax.Array, key: jax.Array) -> jax.Array:
        logits_TC = head_logits(rms_norm(x_TD, gain_D, eps), head)
        drawn_T = jax.random.categorical(key, jax.lax.stop_gradient(logits_TC))
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits_TC), drawn_T[:, None], axis=-1))

    return jax.lax.map(lambda own: jax.grad(loss)(*own), (x_BTD, jax.random.split(key, len(x_BTD))))

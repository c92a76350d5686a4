"""Calibration that follows compression: every block is observed on what the compressed parts before it put out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.observe import layer_observer, mtp_observer, observe_all
from moejax.calibrate.products import products
from moejax.calibrate.statistics import EXPERT_PRODUCTS_BYTES, BlockStatistics, Inputs
from moejax.formats import Leaf
from moejax.kernels import take
from moejax.model.config import require_tokens
from moejax.model.deepseek_v3 import Block, DeepseekV3, MtpBlock
from moejax.model.finite import require_finite, require_finite_block
from moejax.model.leaves import named_leaves
from moejax.model.moe import MoE
from moejax.model.rope import Rotation
from moejax.model.steps import run_block


@dataclass(frozen=True)
class Following:
    """How far compression has come: the hidden states (B, T, D) of every batch of calibration tokens (B, T) behind the
    parts that are compressed. A value: each step gives a new one. max_bytes: None where no Hessians are wanted. done:
    how many decoder blocks are compressed."""

    model: DeepseekV3
    batches: Sequence[jax.Array]
    max_bytes: int | None
    embed: Leaf
    states: Sequence[jax.Array]
    done: int = 0

    @staticmethod
    def of(
        model: DeepseekV3,
        chunks: np.ndarray,
        batch: int = 8,
        *,
        hessians: bool = False,
        expert_bytes: int = EXPERT_PRODUCTS_BYTES,
    ) -> "Following":
        """Before anything is compressed; arguments as those of `calibrate`, whose errors it raises."""
        require_tokens(chunks, model.config)
        batches = [jnp.asarray(chunks[i : i + batch]) for i in range(0, len(chunks), batch)]
        return Following(model, batches, expert_bytes if hessians else None, model.embed.get_value(), [])

    def behind_embedding(self, embed: Leaf) -> Self:
        """With the compressed embedding."""
        states = [take(embed, tokens_BT, jnp.float32) for tokens_BT in self.batches]
        for x_BTD in states:
            require_finite("embed", x_BTD)
        return replace(self, embed=embed, states=states)

    def behind_block(self, compressed: Block) -> Self:
        """With the next block compressed."""
        by, index = self._rotation(), self.done
        states = []
        for x_BTD in self.states:
            states.append(run_block(compressed, x_BTD, by))
            require_finite_block(f"layers.{index}", compressed, x_BTD, by, states[-1])
        return replace(self, states=states, done=index + 1)

    def block_statistics(self, block: Block) -> BlockStatistics:
        """Of the next block, as it is before it is rounded."""
        observer = layer_observer(f"layers.{self.done}", block, self._rotation(), self.max_bytes)
        return observe_all(observer, self.states, self.batches)[1]

    def mtp_statistics(self, depth: int, block: Block) -> BlockStatistics:
        """Of MTP block `depth` with the decoder block `block` in it, behind all layers."""
        mtp = self.model.mtp[depth]
        leaves = named_leaves(mtp) | {f"block.{name}": leaf for name, leaf in named_leaves(block).items()}
        per_token = block.mlp.experts_per_token if isinstance(block.mlp, MoE) else None
        as_planned = MtpBlock(mtp.config, leaves.__getitem__, isinstance(block.mlp, MoE), per_token)
        observer = mtp_observer(f"mtp.{depth}", as_planned, self.embed, self._rotation(), self.max_bytes)
        return observe_all(observer, self._normed(), self.batches)[1]

    def head_inputs(self) -> Inputs:
        """The head's input, behind all layers."""
        normed = self._normed()
        tokens = sum(tokens_BT.size for tokens_BT in self.batches)
        second_moment = sum((jnp.sum(x_BTD**2, axis=(0, 1)) for x_BTD in normed[1:]), jnp.sum(normed[0] ** 2, (0, 1)))
        if self.max_bytes is None:
            return Inputs(second_moment / tokens, None, tokens)
        return Inputs(second_moment / tokens, sum(map(products, normed[1:]), products(normed[0])) / tokens, tokens)

    def _rotation(self) -> Rotation:
        return self.model.rotation(jnp.arange(self.batches[0].shape[1]), jnp.dtype(jnp.float32))

    def _normed(self) -> list[jax.Array]:
        return [self.model.normed(x_BTD) for x_BTD in self.states]

"""A checkpoint's model part by part, read from disk whenever a part is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from moejax import machine
from moejax.checkpoint.load import Checkpoint
from moejax.formats import Leaf
from moejax.model import Config
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.leaves import under
from moejax.model.moe import Experts, MoE
from moejax.model.sliced import SlicedBlock, SlicedMtp


@dataclass(frozen=True)
class CheckpointSource:
    """`Source` of a checkpoint larger than memory: block(i).whole() is load_model(checkpoint).layers[i], and so on.

    Nothing is kept: a part's memory is free once the caller lets go of it, and asked again it is read again. Programs
    that were compiled for other blocks are forgotten where they are too many.
    """

    checkpoint: Checkpoint

    @property
    def config(self) -> Config:
        return self.checkpoint.config

    def embedding(self) -> Leaf:
        return self.checkpoint.leaf("embed")

    def block(self, index: int) -> SlicedBlock:
        leaves, per_token = under(self.checkpoint.leaf, f"layers.{index}"), self.checkpoint.experts_per_token[index]
        trunk = Block(self.config, leaves, self.config.is_moe(index), per_token, has_experts=False)
        return self._sliced(trunk, f"layers.{index}")

    def norm(self) -> jax.Array:
        return self.checkpoint.leaf("norm")

    def head(self) -> Leaf:
        return self.checkpoint.leaf("head")

    def mtp(self, depth: int) -> SlicedMtp:
        layer = self.config.num_hidden_layers + depth
        leaves, per_token = under(self.checkpoint.leaf, f"mtp.{depth}"), self.checkpoint.experts_per_token[layer]
        outer = MtpBlock(self.config, leaves, self.config.is_moe(layer), per_token, has_experts=False)
        return SlicedMtp(outer, self._sliced(outer.block, f"mtp.{depth}.block"))

    def _sliced(self, trunk: Block, name: str) -> SlicedBlock:
        machine.bound_programs()

        def experts_of(members: Sequence[int]) -> Experts:
            return Experts(self.config, lambda own: self.checkpoint.experts(f"{name}.mlp.experts.{own}", members))

        experts = trunk.mlp.num_experts if isinstance(trunk.mlp, MoE) else 0
        return SlicedBlock(
            trunk, experts_of, experts, self.checkpoint.experts_in_slice or max(1, experts), is_read=True
        )

"""A checkpoint's model part by part, read from disk whenever a part is asked for."""

from dataclasses import dataclass

import jax

from moejax.checkpoint.load import Checkpoint
from moejax.formats import Leaf
from moejax.model import Config
from moejax.model.deepseek_v3 import Block, MtpBlock
from moejax.model.leaves import under


@dataclass(frozen=True)
class CheckpointSource:
    """`Source` of a checkpoint larger than memory: block(i) is load_model(checkpoint).layers[i], and the others alike.

    Nothing is kept: a part's memory is free once the caller lets go of it, and asked again it is read again.
    """

    checkpoint: Checkpoint

    @property
    def config(self) -> Config:
        return self.checkpoint.config

    def embedding(self) -> Leaf:
        return self.checkpoint.leaf("embed")

    def block(self, index: int) -> Block:
        leaves = under(self.checkpoint.leaf, f"layers.{index}")
        return Block(self.config, leaves, self.config.is_moe(index), self.checkpoint.experts_per_token[index])

    def norm(self) -> jax.Array:
        return self.checkpoint.leaf("norm")

    def head(self) -> Leaf:
        return self.checkpoint.leaf("head")

    def mtp(self, depth: int) -> MtpBlock:
        layer = self.config.num_hidden_layers + depth
        leaves = under(self.checkpoint.leaf, f"mtp.{depth}")
        return MtpBlock(self.config, leaves, self.config.is_moe(layer), self.checkpoint.experts_per_token[layer])

"""A model of which one part at a time is asked for, so that it need not be in memory whole."""

from dataclasses import dataclass
from typing import Protocol

import jax

from moejax.formats import Leaf
from moejax.model.config import Config
from moejax.model.deepseek_v3 import Block, DeepseekV3, MtpBlock


class Parts(Protocol):
    """The parts of a model, in memory or read anew from a checkpoint whenever they are asked for.

    What takes one block after another asks for it, runs it, waits for the result (JAX computes while Python goes on)
    and lets go of it before it asks for the next.
    """

    @property
    def config(self) -> Config: ...

    def embedding(self) -> Leaf:
        """(C, D)."""
        ...

    def block(self, index: int) -> Block:
        """Decoder layer `index`, with its own K."""
        ...

    def norm(self) -> jax.Array:
        """The final norm's gain, (D,)."""
        ...

    def head(self) -> Leaf:
        """(C, D)."""
        ...

    def mtp(self, index: int) -> MtpBlock:
        """MTP block `index`, with its own K."""
        ...


@dataclass(frozen=True)
class PartsInMemory:
    """`Parts` of a model that is in memory, or of an abstract one."""

    model: DeepseekV3

    @property
    def config(self) -> Config:
        return self.model.config

    def embedding(self) -> Leaf:
        return self.model.embed.get_value()

    def block(self, index: int) -> Block:
        return self.model.layers[index]

    def norm(self) -> jax.Array:
        return self.model.norm.get_value()

    def head(self) -> Leaf:
        return self.model.head.get_value()

    def mtp(self, index: int) -> MtpBlock:
        return self.model.mtp[index]

"""Where a model's parts come from, one at a time, and the walk that takes a job over all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax

from moejax.formats import Leaf
from moejax.model.config import Config
from moejax.model.deepseek_v3 import Block, DeepseekV3, MtpBlock
from moejax.model.leaves import Weight, named_leaves, prefixed
from moejax.model.sliced import SlicedBlock, SlicedMtp, sliced, sliced_mtp


class Source(Protocol):
    """The parts of a model: in memory, in shapes alone, or read anew from a checkpoint whenever they are asked for."""

    @property
    def config(self) -> Config: ...

    def embedding(self) -> Leaf:
        """(C, D)."""
        ...

    def block(self, index: int) -> SlicedBlock:
        """Decoder layer `index`, with its own K. Its routed experts are read when they are asked for."""
        ...

    def norm(self) -> jax.Array:
        """The final norm's gain, (D,)."""
        ...

    def head(self) -> Leaf:
        """(C, D)."""
        ...

    def mtp(self, depth: int) -> SlicedMtp:
        """MTP block `depth`, with its own K."""
        ...


@dataclass(frozen=True)
class ModelSource:
    """The parts of a model that is in memory, or of an abstract one."""

    model: DeepseekV3

    @property
    def config(self) -> Config:
        return self.model.config

    def embedding(self) -> Leaf:
        return self.model.embed.get_value()

    def block(self, index: int) -> SlicedBlock:
        return sliced(self.model.layers[index])

    def norm(self) -> jax.Array:
        return self.model.norm.get_value()

    def head(self) -> Leaf:
        return self.model.head.get_value()

    def mtp(self, depth: int) -> SlicedMtp:
        return sliced_mtp(self.model.mtp[depth])


def source_of(model: DeepseekV3 | Source) -> Source:
    """Where the parts of a model come from, which may be such a source already."""
    return ModelSource(model) if isinstance(model, DeepseekV3) else model


class Step:
    """What a job does with every part of a model, in the order of the methods. What it keeps of them is its own affair,
    but it waits for what it computes: JAX goes on while Python asks for the next part."""

    def embedding(self, embedding: Leaf) -> None:
        """What `Source.embedding` gives."""

    def block(self, index: int, block: SlicedBlock) -> None:
        """What `Source.block` gives."""

    def norm(self, gain_D: jax.Array) -> None:
        """What `Source.norm` gives."""

    def mtp(self, depth: int, mtp: SlicedMtp) -> None:
        """What `Source.mtp` gives."""

    def head(self, head: Leaf) -> None:
        """What `Source.head` gives."""


def walk(
    source: Source, step: Step, *, mtp: int = 0, head: bool = False, tick: Callable[[], object] = lambda: None
) -> None:
    """Take a job over a model: each part is asked for, given to the step and let go of before the next.

    The first `mtp` MTP blocks and the head are left out unless asked for. `tick` is called before every block.
    """
    step.embedding(source.embedding())
    for index in range(source.config.num_hidden_layers):
        tick()
        step.block(index, source.block(index))
    step.norm(source.norm())
    for depth in range(mtp):
        tick()
        step.mtp(depth, source.mtp(depth))
    if head:
        step.head(source.head())


def model_of(source: Source, tick: Callable[[], object] = lambda: None) -> DeepseekV3:
    """The model that a source has the parts of. `tick` is called before every block."""
    step = _Collecting()
    walk(source, step, mtp=source.config.num_nextn_predict_layers, head=True, tick=tick)
    return DeepseekV3(source.config, step.leaves.__getitem__, step.experts_per_token)


class _Collecting(Step):
    def __init__(self) -> None:
        self.leaves: dict[str, Weight] = {}
        self.experts_per_token: list[int] = []

    def embedding(self, embedding: Leaf) -> None:
        self.leaves["embed"] = embedding

    def block(self, index: int, block: SlicedBlock) -> None:
        self._add(f"layers.{index}", block.whole())

    def norm(self, gain_D: jax.Array) -> None:
        self.leaves["norm"] = gain_D

    def mtp(self, depth: int, mtp: SlicedMtp) -> None:
        self._add(f"mtp.{depth}", mtp.whole())

    def head(self, head: Leaf) -> None:
        self.leaves["head"] = head

    def _add(self, name: str, part: Block | MtpBlock) -> None:
        self.leaves |= prefixed(name, named_leaves(part))
        self.experts_per_token.append((part if isinstance(part, Block) else part.block).experts_per_token)

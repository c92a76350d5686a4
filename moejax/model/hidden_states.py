"""Tokens on their way through a model: the step that every walk over hidden states is made of."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.formats import Leaf
from moejax.model.config import Config
from moejax.model.finite import require_finite, require_finite_block
from moejax.model.rope import Angles, angles
from moejax.model.sliced import SlicedBlock, through
from moejax.model.source import Source, Step, walk
from moejax.sharding import take

# An array, a `jax.Array` or what a `Keep` makes of one: `jnp.asarray` and an index give numbers of both.
Kept = Any

# Puts an array away until it is needed again.
Keep = Callable[[jax.Array], Kept]

# Bytes of states within a block that are in memory, unless told otherwise.
WITHIN = 4 << 30


def as_it_is(array: jax.Array) -> Kept:
    """Keeps an array where it is."""
    return array


class HiddenStates(Step):
    """Hidden states (B, T, D) of batches of tokens (B, T), which are of one length, behind the last part walked over.

    states: one per batch. embedded: what the embedding gave, if MTP blocks will take it (`drafts`), else empty. by: the
    angles of all positions. What `kept` makes of states lies between two blocks: `np.asarray` puts them into the
    host's memory. `tick` is called before every batch of every block.
    """

    def __init__(
        self,
        config: Config,
        batches: Sequence[jax.Array | np.ndarray],
        dtype: jax.typing.DTypeLike,
        *,
        drafts: bool = False,
        kept: Keep = as_it_is,
        tick: Callable[[], object] = lambda: None,
    ):
        self.config, self.batches, self.dtype = config, batches, dtype
        self.states: list[Kept] = []
        self.embedded: list[Kept] = []
        self.by = angles(config, jnp.arange(batches[0].shape[1]), jnp.promote_types(dtype, jnp.float32))
        self._drafts, self._kept, self.tick = drafts, kept, tick

    def embedding(self, embedding: Leaf) -> None:
        """Raises InputError if a row of a token is not finite."""
        for tokens_BT in self.batches:
            x_BTD = take(embedding, jnp.asarray(tokens_BT), self.dtype)
            require_finite("embed", x_BTD)
            self.states.append(self._kept(x_BTD))
        if self._drafts:
            self.embedded = list(self.states)

    def block(self, index: int, block: SlicedBlock) -> None:
        """Raises InputError as `run` does."""
        self.run(index, block)

    def run(self, index: int, block: SlicedBlock) -> None:
        """The states through decoder block `index`. Raises InputError, naming the matrix, where an output is not
        finite."""
        for n, y_BTD in enumerate(through(block, self._begun(), self.by)):
            require_finite_block(f"layers.{index}", block, jnp.asarray(self.states[n]), self.by, y_BTD)
            self.states[n] = self._kept(y_BTD)

    def _begun(self) -> Iterator[jax.Array]:
        for state_BTD in list(self.states):
            self.tick()
            yield jnp.asarray(state_BTD)

    def mtp_inputs(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """What an MTP block takes behind the final norm, batch by batch: the states of tokens t and the embeddings of
        tokens t+1, (B, T-1, D)."""
        for h_BTD, e_BTD in zip(self.states, self.embedded, strict=True):
            yield jnp.asarray(h_BTD[:, :-1]), jnp.asarray(e_BTD[:, 1:])

    @property
    def mtp_by(self) -> Angles:
        """The angles of the positions t of `mtp_inputs`."""
        return jax.tree.map(lambda angle_TR: angle_TR[:-1], self.by)


def require_finite_blocks(source: Source, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> None:
    """Raise InputError, naming the matrix, at the first part of a model whose output on tokens (B, T) is not finite."""
    walk(source, HiddenStates(source.config, [tokens_BT], dtype))

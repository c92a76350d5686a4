"""Models that differ from one in some of their weights, run beside it: all of them through a block before the next."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.evaluate.divergence import compare, head_log_probabilities
from moejax.formats import Leaf, payload_bytes, take_rows
from moejax.kernels import take
from moejax.machine import return_freed
from moejax.model import Config, require_tokens
from moejax.model.deepseek_v3 import Block
from moejax.model.finite import require_finite, require_finite_block
from moejax.model.hidden_states import Kept
from moejax.model.rope import angles
from moejax.model.sliced import Entered, SlicedBlock, leave
from moejax.model.steps import run_norm
from moejax.pipeline.crossing import Alternative, Alternatives, Inside, Run, cross, run_of, unchanged
from moejax.pipeline.room import NO_ROOM, Room

# How the name begins that rounders know the embedding's rows by which variants look up; other tokens' are others.
USED_ROWS = "embed's rows"

# Of the model itself, among its variants.
_ORIGINAL = ""


@dataclass(frozen=True)
class Changed:
    """How a variant's block differs: what makes its trunk, dense, which alternative of the experts it has, and what the
    sum over them is multiplied by, asked for once they are through."""

    trunk: Callable[[], Block] | None = None
    alternative: Alternative = None
    scale: Callable[[], float] = lambda: 1.0


class Variants:
    """Hidden states (B, T, D) in float32 of a model, and of variants of it by name, on the same tokens (B, T).

    A variant that has not differed so far has the model's own states. While they pass a block with experts in several
    slices, what is within it takes about `room.within` bytes. Raises InputError for tokens that are not the model's,
    and where what the model puts out is not finite.

    within, routed_TD, output: of the model itself, in the block that is passed: what its experts take, once its run has
    begun; their sum, and what the block puts out, once it has ended. rows_name: what rounders know `used_rows` by.
    """

    within: Inside
    routed_TD: jax.Array | None
    output: jax.Array

    def __init__(self, config: Config, tokens_BT: np.ndarray, room: Room = NO_ROOM):
        require_tokens(tokens_BT, config)
        self.config, self.tokens_BT = config, jnp.asarray(tokens_BT)
        used_U, place_BT = np.unique(tokens_BT, return_inverse=True)
        self.rows_name = f"{USED_ROWS} of {sha256(used_U.tobytes()).hexdigest()[:16]}"
        self._used_U, self._place_BT = jnp.asarray(used_U), jnp.asarray(place_BT.reshape(tokens_BT.shape))
        self.by = angles(config, jnp.arange(tokens_BT.shape[1]), jnp.float32)
        self.original: jax.Array = jnp.zeros(())
        self._room, self._kept = room, room.kept
        self.changed: dict[str, Kept] = {}

    def used_rows(self, embedding: Leaf) -> Leaf:
        """The rows of an embedding (C, D) that these tokens look up."""
        return take_rows(embedding, self._used_U)

    def embedding(self, embedding: Leaf, changed: Iterable[tuple[str, Leaf]] = ()) -> None:
        """From the embedding (C, D), and from what variants have in place of its `used_rows`, asked for one by one."""
        self.original = take(embedding, self.tokens_BT, jnp.float32)
        require_finite("embed", self.original)
        self.changed = {name: self._kept(take(own, self._place_BT, jnp.float32)) for name, own in changed}

    def block(
        self,
        index: int,
        block: SlicedBlock,
        changed: Iterable[tuple[str, Changed] | Run] = (),
        alternatives: Alternatives = unchanged,
    ) -> None:
        """Through decoder block `index`, whose trunk is dense, and through those that variants have in its place, asked
        for one by one behind the model's own run; runs of others among them take part."""
        behind: dict[str, Kept] = {}
        runs = chain([self._own(block)], self._others(block.trunk, changed, behind))
        cross(block, runs, alternatives, self._room.runs_within(payload_bytes(self.original)), self._kept)
        require_finite_block(f"layers.{index}", block, self.original, self.by, self.output)
        self.original, self.changed = self.output, behind
        del self.within, self.routed_TD, self.output
        return_freed()  # the states before this block, and what rounding and running it took

    def run(self, x_BTD: Kept, change: Changed, trunk: Block, end: Callable[[jax.Array], object]) -> Run:
        """Of states x (B, T, D), through a block with that trunk changed."""
        return run_of(change.trunk or (lambda: trunk), x_BTD, self.by, end, change.alternative, change.scale)

    def _own(self, block: SlicedBlock) -> Run:
        """The model's."""
        plain = self.run(self.original, Changed(), block.trunk, lambda y_BTD: None)

        def begin() -> Inside:
            self.within = plain.begin()
            return self.within

        def end(inside: Inside, routed_TD: jax.Array | None) -> None:
            self.routed_TD = routed_TD
            self.output = leave(inside, routed_TD) if isinstance(inside, Entered) else inside

        return Run(begin, end)

    def _others(
        self, trunk: Block, changed: Iterable[tuple[str, Changed] | Run], behind: dict[str, Kept]
    ) -> Iterator[Run]:
        """Those that differ from the model here, then the variants that have before."""
        for own in changed:
            yield own if isinstance(own, Run) else self._variant(trunk, *own, behind)
        for name in list(self.changed):
            yield self._variant(trunk, name, Changed(), behind)

    def _variant(self, trunk: Block, name: str, change: Changed, behind: dict[str, Kept]) -> Run:
        return self.run(self.changed.pop(name, self.original), change, trunk, partial(self._put, behind, name))

    def _put(self, behind: dict[str, Kept], name: str, y_BTD: jax.Array) -> None:
        behind[name] = self._kept(y_BTD.block_until_ready())

    def arrays(self) -> dict[str, np.ndarray]:
        """What `restore` goes on from."""
        return {_ORIGINAL: np.asarray(self.original), **{name: np.asarray(own) for name, own in self.changed.items()}}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on behind the part after which `arrays` were those."""
        self.original = jnp.asarray(arrays[_ORIGINAL])
        self.changed = {name: self._kept(jnp.asarray(own)) for name, own in arrays.items() if name != _ORIGINAL}

    def divergences(self, gain_D: jax.Array, head: Leaf, changed: Iterable[tuple[str, Leaf]] = ()) -> dict[str, float]:
        """Mean KL(model | variant) in nats over the scored positions, behind the last block, by the final norm's gain
        and the head (C, D), or those that variants have in its place. Raises InputError where one is not finite."""
        heads = dict(changed)
        names = [*self.changed, *(own for own in heads if own not in self.changed)]
        kld: dict[str, list[jax.Array]] = {name: [] for name in names}
        for b in range(len(self.tokens_BT)):  # of one sequence after another: a head's outputs are many

            def log_probabilities(x_BTD: Kept, head: Leaf, own: slice = slice(b, b + 1)) -> jax.Array:
                normed_1TD = run_norm(jnp.asarray(x_BTD[own]), gain_D, eps=self.config.rms_norm_eps)
                return head_log_probabilities(normed_1TD, head)

            base = log_probabilities(self.original, head)
            for name in names:
                own = log_probabilities(self.changed.get(name, self.original), heads.get(name, head))
                kld[name].append(jnp.mean(compare(base, own, self.tokens_BT[b : b + 1]).kld).block_until_ready())
        found = {name: float(np.mean(own, dtype=np.float64)) for name, own in kld.items()}
        if wrong := next((own for own in found.values() if not math.isfinite(own)), None):
            raise InputError(
                f"a divergence of {wrong} was measured on the calibration text; a checkpoint whose weights are sound "
                "is needed"
            )
        return found

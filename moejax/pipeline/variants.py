"""Models that differ from one in some of their weights, run beside it: all of them through a block before the next."""

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.evaluate.divergence import compare, head_log_probabilities
from moejax.formats import Leaf
from moejax.kernels import take
from moejax.machine import return_freed
from moejax.model import Config, require_tokens
from moejax.model.deepseek_v3 import Block
from moejax.model.finite import require_finite, require_finite_block
from moejax.model.leaves import Taps
from moejax.model.rope import Angles, angles
from moejax.model.steps import run_block, run_norm
from moejax.transforms.rounding import to_float32

# Of the model itself, among its variants.
_ORIGINAL = ""


class Variants:
    """Hidden states (B, T, D) in float32 of a model, and of variants of it by name, on the same tokens (B, T).

    A variant that has not differed so far has the model's own states. Raises InputError for tokens that are not the
    model's, and where what the model puts out is not finite.
    """

    def __init__(self, config: Config, tokens_BT: np.ndarray):
        require_tokens(tokens_BT, config)
        self.config, self.tokens_BT = config, jnp.asarray(tokens_BT)
        self.by = angles(config, jnp.arange(tokens_BT.shape[1]), jnp.float32)
        self.original: jax.Array = jnp.zeros(())
        self.changed: dict[str, jax.Array] = {}

    def embedding(self, embedding: Leaf, changed: Iterable[tuple[str, Leaf]] = ()) -> None:
        """From the embedding (C, D), and from those that variants have in its place, asked for one by one."""
        self.original = take(embedding, self.tokens_BT, jnp.float32)
        require_finite("embed", self.original)
        self.changed = {name: take(own, self.tokens_BT, jnp.float32).block_until_ready() for name, own in changed}

    def block(self, index: int, block: Block, changed: Iterable[tuple[str, Block]] = ()) -> None:
        """Through decoder block `index`, and through those that variants have in its place, asked for one by one."""
        x_BTD, behind = self.original, {}
        self.original = run_block(block, x_BTD, self.by)
        require_finite_block(f"layers.{index}", block, x_BTD, self.by, self.original)
        for name, own in changed:
            behind[name] = run_block(own, self.changed.pop(name, x_BTD), self.by).block_until_ready()
        for name in list(self.changed):
            behind[name] = run_block(block, self.changed.pop(name), self.by).block_until_ready()
        self.changed = behind
        return_freed()  # the states before this block, and what rounding and running it took

    def arrays(self) -> dict[str, np.ndarray]:
        """What `restore` goes on from."""
        return {_ORIGINAL: np.asarray(self.original), **{name: np.asarray(own) for name, own in self.changed.items()}}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on behind the part after which `arrays` were those."""
        states = {name: jnp.asarray(own) for name, own in arrays.items()}
        self.original = states.pop(_ORIGINAL)
        self.changed = states

    def experts_input(self, block: Block) -> jax.Array:
        """What the router and the experts of the block that comes next take in, of the model, (B*T, D)."""
        return _experts_input(block, self.original, self.by)

    def divergences(self, gain_D: jax.Array, head: Leaf, changed: Iterable[tuple[str, Leaf]] = ()) -> dict[str, float]:
        """Mean KL(model | variant) in nats over the scored positions, behind the last block, by the final norm's gain
        and the head (C, D), or those that variants have in its place. Raises InputError where one is not finite."""
        base = self._log_probabilities(self.original, gain_D, head)
        heads = dict(changed)
        found = {}
        for name in [*self.changed, *(heads.keys() - self.changed.keys())]:
            own = self._log_probabilities(self.changed.get(name, self.original), gain_D, heads.get(name, head))
            found[name] = float(jnp.mean(compare(base, own, self.tokens_BT).kld))
            if not math.isfinite(found[name]):
                raise InputError(
                    f"a divergence of {found[name]} was measured on the calibration text; a checkpoint whose weights "
                    "are sound is needed"
                )
        return found

    def _log_probabilities(self, x_BTD: jax.Array, gain_D: jax.Array, head: Leaf) -> jax.Array:
        normed_BTD = run_norm(x_BTD, gain_D, eps=self.config.rms_norm_eps)
        return head_log_probabilities(normed_BTD, to_float32(head))


@jax.jit
def _experts_input(block: Block, x_BTD: jax.Array, by: Angles) -> jax.Array:
    taps: Taps = {}
    block(x_BTD, by, taps=taps)
    return taps["mlp.router"]

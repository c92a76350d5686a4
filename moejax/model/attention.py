"""Multi-head latent attention (MLA): keys and values are linear in a small latent c_kv, which is all that is cached."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.formats import Leaf, reshape_outputs
from moejax.kernels import matmul, matmul_transposed
from moejax.model.config import Config
from moejax.model.leaves import Leaves, Taps, linear
from moejax.model.norm import LATENT_EPS, rms_norm
from moejax.model.rope import Rotation, rotate


class LatentCache(NamedTuple):
    """One layer's cache: c_kv (B, S, L) and the rotated k_rope (B, S, R), L+R numbers a token."""

    c_kv: jax.Array
    k_rope: jax.Array


class Attention(nnx.Module):
    """MLA as DeepSeek-V3 computes it (arXiv:2412.19437, section 2.1.1).

        c_q = norm(x W_qa), [q_nope | q_rope] = c_q W_qb        (or x W_q where q_lora_rank is null)
        [c_kv | k_rope] = x W_kva, c_kv = norm(c_kv)
        k_nope = c_kv W_kb, v = c_kv W_vb
        y = softmax((q_nope k_nope + rot(q_rope) rot(k_rope)) * scale) v W_o

    kv_b is kept as two weights, k_b (H, N, L) and v_b (H, V, L): `attend_cached` contracts them from the other side.
    """

    def __init__(self, config: Config, leaves: Leaves):
        self.config = config
        if config.q_lora_rank is None:
            self.q = nnx.Param(leaves("q"))
        else:
            self.q_a = nnx.Param(leaves("q_a"))
            self.q_a_norm = nnx.Param(leaves("q_a_norm"))
            self.q_b = nnx.Param(leaves("q_b"))
        self.kv_a = nnx.Param(leaves("kv_a"))
        self.kv_a_norm = nnx.Param(leaves("kv_a_norm"))
        self.k_b = nnx.Param(leaves("k_b"))
        self.v_b = nnx.Param(leaves("v_b"))
        self.o = nnx.Param(leaves("o"))

    def __call__(self, x_BTD: jax.Array, by: Rotation, taps: Taps | None = None) -> jax.Array:
        """Causal attention among the T tokens of each row, keys and values expanded per head."""
        q_nope, q_rope = self._queries(x_BTD, by, taps)
        c_kv, k_rope = self._latents(x_BTD, by, taps)
        k_nope = self._expand(c_kv, self.k_b, taps, "k_b")
        v = self._expand(c_kv, self.v_b, taps, "v_b")
        scores = jnp.einsum("bthn,bshn->bhts", q_nope, k_nope) + jnp.einsum("bthr,bsr->bhts", q_rope, k_rope)
        length = x_BTD.shape[1]
        weights = self._softmax(scores, jnp.tril(jnp.ones((length, length), bool)))
        return self._output(jnp.einsum("bhts,bshv->bthv", weights, v), taps)

    def attend_cached(
        self, x_BTD: jax.Array, by: Rotation, cache: LatentCache, start: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """The same for T tokens at positions start, start+1, ... behind a cache, entirely in the latent space.

        q_nope k_b -> L, attend to c_kv, then v_b. Returns the output and the cache with the T tokens written into it.
        """
        q_nope, q_rope = self._queries(x_BTD, by, None)
        cache = LatentCache(
            *(_write(old, new, start) for old, new in zip(cache, self._latents(x_BTD, by, None), strict=True))
        )
        c_kv, k_rope = (part.astype(x_BTD.dtype) for part in cache)
        q_latent = matmul_transposed(q_nope, self.k_b.get_value())
        scores = jnp.einsum("bthl,bsl->bhts", q_latent, c_kv) + jnp.einsum("bthr,bsr->bhts", q_rope, k_rope)
        last_visible_T = start + jnp.arange(x_BTD.shape[1])
        weights = self._softmax(scores, jnp.arange(c_kv.shape[1]) <= last_visible_T[:, None])
        out_latent = jnp.einsum("bhts,bsl->bthl", weights, c_kv)
        return self._output(matmul(out_latent, self.v_b.get_value()), None), cache

    def _queries(self, x: jax.Array, by: Rotation, taps: Taps | None) -> tuple[jax.Array, jax.Array]:
        c = self.config
        if c.q_lora_rank is None:
            q = linear(x, self.q, taps, "q")
        else:
            latent = rms_norm(linear(x, self.q_a, taps, "q_a"), self.q_a_norm.get_value(), LATENT_EPS)
            q = linear(latent, self.q_b, taps, "q_b")
        q = q.reshape(*x.shape[:2], c.num_attention_heads, -1)
        nope, rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        per_head = Rotation(by.cos[..., None, :], by.sin[..., None, :])
        return nope, rotate(rope, per_head, c.rope_interleave)

    def _latents(self, x: jax.Array, by: Rotation, taps: Taps | None) -> LatentCache:
        c = self.config
        c_kv, k_rope = jnp.split(linear(x, self.kv_a, taps, "kv_a"), [c.kv_lora_rank], axis=-1)
        return LatentCache(
            rms_norm(c_kv, self.kv_a_norm.get_value(), LATENT_EPS), rotate(k_rope, by, c.rope_interleave)
        )

    def _expand(self, c_kv: jax.Array, weight: nnx.Param[Leaf], taps: Taps | None, name: str) -> jax.Array:
        """c_kv (B, T, L) through a weight (H, X, L) to (B, T, H, X)."""
        if taps is not None:
            taps[name] = c_kv
        leaf = weight.get_value()
        heads, width = leaf.shape[:2]
        return matmul(c_kv, reshape_outputs(leaf, heads * width)).reshape(*c_kv.shape[:2], heads, width)

    def _softmax(self, scores: jax.Array, visible: jax.Array) -> jax.Array:
        wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32)) * self.config.softmax_scale
        return jax.nn.softmax(jnp.where(visible, wide, -jnp.inf), axis=-1).astype(scores.dtype)

    def _output(self, out_BTHV: jax.Array, taps: Taps | None) -> jax.Array:
        return linear(out_BTHV.reshape(*out_BTHV.shape[:2], -1), self.o, taps, "o")


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=1)

"""Multi-head latent attention (MLA): keys and values are linear in a small latent c_kv, which is all that is cached."""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.formats import Leaf, reshape_outputs
from moejax.kernels import product
from moejax.model.config import Config
from moejax.model.latent_cache import LatentCache, Latents, append, attend
from moejax.model.leaves import Leaves, Taps, linear
from moejax.model.norm import LATENT_EPS, rms_norm
from moejax.model.rope import Angles, turn
from moejax.sharding import gathered, matmul, matmul_transposed

# How many queries of a row attend at once, without a cache.
QUERIES = 512


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

    def __call__(self, x_BTD: jax.Array, by: Angles, taps: Taps | None = None) -> jax.Array:
        """Causal attention among the T tokens of each row, keys and values expanded per head.

        No more than QUERIES of them attend at once: their scores take H * QUERIES * T numbers a row.
        """
        q_nope, q_rope = self._queries(x_BTD, by, taps)
        latents = self._latents(x_BTD, by, taps)
        k_nope = self._expand(latents.c_kv, self.k_b, taps, "k_b")
        v = self._expand(latents.c_kv, self.v_b, taps, "v_b")
        length = x_BTD.shape[1]

        def attend_from(first: jax.Array | int, q_nope: jax.Array, q_rope: jax.Array) -> jax.Array:
            scores = self._scaled(product("bthn,bshn->bhts", q_nope, k_nope), q_rope, latents)
            visible = first + jnp.arange(q_nope.shape[1])[:, None] >= jnp.arange(length)
            weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
            return product("bhts,bshv->bthv", weights, v).astype(v.dtype)

        if length <= QUERIES:
            return self._output(attend_from(0, q_nope, q_rope), taps)
        firsts = jnp.arange(0, length, QUERIES)
        out = jax.lax.map(lambda block: attend_from(*block), (firsts, _in_blocks(q_nope), _in_blocks(q_rope)))
        return self._output(jnp.moveaxis(out, 0, 1).reshape(len(x_BTD), -1, *out.shape[3:])[:, :length], taps)

    @jax.jit
    def attend_cached(
        self, x_BTD: jax.Array, by: Angles, cache: LatentCache, start_B: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """The same for T tokens at positions start, start+1, ... of each sequence, behind a cache.

        Returns the output and the cache with the T tokens written into it.
        """
        q_nope, q_rope = self._queries(x_BTD, by, None)
        cache = append(cache, self._latents(x_BTD, by, None), start_B)
        last_visible_BT = start_B[:, None] + jnp.arange(x_BTD.shape[1])
        if self._expanding_pays(x_BTD.shape[1]):
            return self._output(self._attend_expanded(q_nope, q_rope, cache, last_visible_BT), None), cache
        return self._output(self._attend_absorbed(q_nope, q_rope, cache, last_visible_BT), None), cache

    def _expanding_pays(self, tokens: int) -> bool:
        """Whether keys and values are worth expanding per head, for that many queries: products per cached token."""
        c = self.config
        narrow = c.qk_nope_head_dim + c.v_head_dim
        absorbed = tokens * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        return tokens * (narrow + c.qk_rope_head_dim) + c.kv_lora_rank * narrow < absorbed

    def _attend_absorbed(
        self, q_nope: jax.Array, q_rope: jax.Array, cache: LatentCache, last_visible_BT: jax.Array
    ) -> jax.Array:
        """In the latent space: q_nope k_b -> L, attend to c_kv, then v_b."""
        q_latent = matmul_transposed(q_nope, self.k_b.get_value())

        def score(keys: Latents) -> jax.Array:
            return self._scaled(product("bthl,bsl->bhts", q_latent, keys.c_kv), q_rope, keys)

        def mix(weights: jax.Array, values: Latents) -> jax.Array:
            return product("bhts,bsl->bthl", weights, values.c_kv)

        mixed = jax.ShapeDtypeStruct(q_latent.shape, _wide(q_latent))
        out_latent = attend(cache, last_visible_BT, score, mix, mixed, q_nope.dtype)
        return matmul(out_latent, self.v_b.get_value())

    def _attend_expanded(
        self, q_nope: jax.Array, q_rope: jax.Array, cache: LatentCache, last_visible_BT: jax.Array
    ) -> jax.Array:
        """Block by block of cached tokens, keys and values expanded per head."""

        def score(keys: Latents) -> jax.Array:
            k_nope = self._expand(keys.c_kv, self.k_b, None, "k_b")
            return self._scaled(product("bthn,bshn->bhts", q_nope, k_nope), q_rope, keys)

        def mix(weights: jax.Array, values: Latents) -> jax.Array:
            return product("bhts,bshv->bthv", weights, self._expand(values.c_kv, self.v_b, None, "v_b"))

        mixed = jax.ShapeDtypeStruct((*q_nope.shape[:3], self.config.v_head_dim), _wide(q_nope))
        return attend(cache, last_visible_BT, score, mix, mixed, q_nope.dtype)

    def _scaled(self, nope: jax.Array, q_rope: jax.Array, keys: Latents) -> jax.Array:
        return (nope + product("bthr,bsr->bhts", q_rope, keys.k_rope)) * self.config.softmax_scale

    def _queries(self, x: jax.Array, by: Angles, taps: Taps | None) -> tuple[jax.Array, jax.Array]:
        c = self.config
        if c.q_lora_rank is None:
            q = linear(x, self.q, taps, "q")
        else:
            latent = rms_norm(linear(x, self.q_a, taps, "q_a"), self.q_a_norm.get_value(), LATENT_EPS)
            q = linear(latent, self.q_b, taps, "q_b")
        q = q.reshape(*x.shape[:2], c.num_attention_heads, -1)
        nope, rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        per_head = Angles(by.cos[..., None, :], by.sin[..., None, :])
        return nope, turn(rope, per_head, c.rope_interleave)

    def _latents(self, x: jax.Array, by: Angles, taps: Taps | None) -> Latents:
        c = self.config
        c_kv, k_rope = jnp.split(gathered(linear(x, self.kv_a, taps, "kv_a")), [c.kv_lora_rank], axis=-1)
        return Latents(rms_norm(c_kv, self.kv_a_norm.get_value(), LATENT_EPS), turn(k_rope, by, c.rope_interleave))

    def _expand(self, c_kv: jax.Array, weight: nnx.Param[Leaf], taps: Taps | None, name: str) -> jax.Array:
        """c_kv (B, T, L) through a weight (H, X, L) to (B, T, H, X)."""
        if taps is not None:
            taps[name] = c_kv
        leaf = weight.get_value()
        heads, width = leaf.shape[:2]
        return matmul(c_kv, reshape_outputs(leaf, heads * width)).reshape(*c_kv.shape[:2], heads, width)

    def _output(self, out_BTHV: jax.Array, taps: Taps | None) -> jax.Array:
        return gathered(linear(out_BTHV.reshape(*out_BTHV.shape[:2], -1), self.o, taps, "o"))


def _in_blocks(q_BTHN: jax.Array) -> jax.Array:
    """Queries (n, B, QUERIES, H, N) in n blocks, zeros behind the last."""
    padded = jnp.pad(q_BTHN, ((0, 0), (0, -q_BTHN.shape[1] % QUERIES), (0, 0), (0, 0)))
    return jnp.moveaxis(padded.reshape(len(padded), -1, QUERIES, *padded.shape[2:]), 1, 0)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)

"""The model: decoder blocks, embedding and head, MTP blocks. Start reading here."""

from collections.abc import Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.formats import Leaf
from moejax.kernels import hadamard
from moejax.model.attention import Attention
from moejax.model.config import Config, require_tokens
from moejax.model.latent_cache import LatentCache, empty_caches
from moejax.model.leaves import Leaves, Taps, Weight, linear, named_leaves, prefixed, under
from moejax.model.moe import Mlp, MoE
from moejax.model.norm import rms_norm
from moejax.model.rope import Angles, angles
from moejax.sharding import gathered, matmul, take


class Block(nnx.Module):
    """x + attention(norm(x)), then + mlp(norm(.)): one decoder layer, dense or with experts."""

    def __init__(
        self,
        config: Config,
        leaves: Leaves,
        is_moe: bool,
        experts_per_token: int | None = None,
        *,
        has_experts: bool = True,
    ):
        self.config = config
        self.input_norm = nnx.Param(leaves("input_norm"))
        self.self_attn = Attention(config, under(leaves, "self_attn"))
        self.post_attention_norm = nnx.Param(leaves("post_attention_norm"))
        mlp = under(leaves, "mlp")
        self.mlp = MoE(config, mlp, experts_per_token, has_experts=has_experts) if is_moe else Mlp(config, mlp)

    @property
    def experts_per_token(self) -> int:
        """K; the config's in a dense block."""
        return self.mlp.experts_per_token if isinstance(self.mlp, MoE) else self.config.num_experts_per_tok

    def with_leaves(self, changed: Mapping[str, Weight], experts_per_token: int | None = None) -> Self:
        """The block, or trunk, with some other weights, by name within it, and another K if one is given."""
        is_moe, has_experts = isinstance(self.mlp, MoE), isinstance(self.mlp, MoE) and self.mlp.experts is not None
        leaves, per_token = named_leaves(self) | dict(changed), experts_per_token or self.experts_per_token
        return type(self)(self.config, leaves.__getitem__, is_moe, per_token, has_experts=has_experts)

    def __call__(
        self, x_BTD: jax.Array, by: Angles, choice_TK: jax.Array | None = None, taps: Taps | None = None
    ) -> jax.Array:
        """x (B, T, D) to (B, T, D). `choice_TK` replays expert choices; `taps` receives every weight's input."""
        x_BTD = self.attended(x_BTD, by, taps)
        mlp_taps: Taps | None = None if taps is None else {}
        x_BTD = x_BTD + self._feed_forward(x_BTD, choice_TK, mlp_taps)
        if taps is not None:
            taps |= prefixed("mlp", mlp_taps)
        return x_BTD

    def attended(self, x_BTD: jax.Array, by: Angles, taps: Taps | None = None) -> jax.Array:
        """x + attention(norm(x)), which the feed-forward part takes."""
        normed = rms_norm(x_BTD, self.input_norm.get_value(), self.config.rms_norm_eps)
        attention_taps: Taps | None = None if taps is None else {}
        x_BTD = x_BTD + self.self_attn(normed, by, attention_taps)
        if taps is not None:
            taps |= prefixed("self_attn", attention_taps)
        return x_BTD

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """What the feed-forward part makes of `attended`'s output first: norm(x)."""
        return rms_norm(x_BTD, self.post_attention_norm.get_value(), self.config.rms_norm_eps)

    def attend_cached(
        self,
        x_BTD: jax.Array,
        by: Angles,
        cache: LatentCache,
        start_B: jax.Array,
        choice_TK: jax.Array | None = None,
    ) -> tuple[jax.Array, LatentCache]:
        """The same for T tokens of each sequence behind a cache; returns the output and the new cache."""
        normed = rms_norm(x_BTD, self.input_norm.get_value(), self.config.rms_norm_eps)
        attended, cache = self.self_attn.attend_cached(normed, by, cache, start_B)
        x_BTD = x_BTD + attended
        return x_BTD + self._feed_forward(x_BTD, choice_TK, None), cache

    def _feed_forward(self, x: jax.Array, choice_TK: jax.Array | None, taps: Taps | None) -> jax.Array:
        if isinstance(self.mlp, MoE):
            return self.mlp(self.normed(x), choice_TK, taps)
        return self.mlp(self.normed(x), taps)


class MtpBlock(nnx.Module):
    """Multi-token prediction (arXiv:2412.19437, section 2.2): a block that drafts the token after the next.

        h' = block([norm_e(embed(token_{t+1})) | norm_h(h_t)] W_eh), logits_{t+2} = head(norm(h'))

    Embedding and head are the model's own and passed in, because a Param of two modules becomes two under jit.

    In a rotated model (`Config.residual_rotation`) the final norm's gain g lies in the head, so the block takes
    n = norm(x) R and its head wants out R / g. Gains act in the original basis, and R is undone for them:

        h = (n R^T) * input_gain, out = (norm(h' R^T) * norm_gain) R, with input_gain = g, norm_gain = own gain / g
    """

    def __init__(
        self,
        config: Config,
        leaves: Leaves,
        is_moe: bool,
        experts_per_token: int | None = None,
        *,
        has_experts: bool = True,
    ):
        self.config = config
        self.enorm = nnx.Param(leaves("enorm"))
        self.hnorm = nnx.Param(leaves("hnorm"))
        self.eh_proj = nnx.Param(leaves("eh_proj"))
        self.block = Block(config, under(leaves, "block"), is_moe, experts_per_token, has_experts=has_experts)
        self.norm = nnx.Param(leaves("norm"))
        if config.residual_rotation:
            self.signs = nnx.Param(leaves("signs"))
            self.input_gain = nnx.Param(leaves("input_gain"))

    def __call__(self, h_BTD: jax.Array, next_BTD: jax.Array, by: Angles, taps: Taps | None = None) -> jax.Array:
        """h_t after the model's final norm and the next token's embedding, both (B, T, D), to the normed h'."""
        joined = self.joined(h_BTD, next_BTD, taps)
        block_taps: Taps | None = None if taps is None else {}
        drafted = self.block(joined, by, taps=block_taps)
        if taps is not None:
            taps |= prefixed("block", block_taps)
        return self.normed(drafted)

    def attend_cached(
        self, h_BTD: jax.Array, next_BTD: jax.Array, by: Angles, cache: LatentCache, start_B: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """The same for T tokens of each sequence behind a cache of the block's own."""
        drafted, cache = self.block.attend_cached(self.joined(h_BTD, next_BTD), by, cache, start_B)
        return self.normed(drafted), cache

    def joined(self, h_BTD: jax.Array, next_BTD: jax.Array, taps: Taps | None = None) -> jax.Array:
        """What the block inside takes."""
        eps = self.config.rms_norm_eps
        if self.config.residual_rotation:
            h_BTD = unrotated(h_BTD, self.signs.get_value()) * self.input_gain.get_value().astype(h_BTD.dtype)
        both = [rms_norm(next_BTD, self.enorm.get_value(), eps), rms_norm(h_BTD, self.hnorm.get_value(), eps)]
        return gathered(linear(jnp.concatenate(both, axis=-1), self.eh_proj, taps, "eh_proj"))

    def normed(self, drafted_BTD: jax.Array) -> jax.Array:
        """h' of what the block inside puts out."""
        gain, eps = self.norm.get_value(), self.config.rms_norm_eps
        if not self.config.residual_rotation:
            return rms_norm(drafted_BTD, gain, eps)
        signs = self.signs.get_value()
        return rotated(rms_norm(unrotated(drafted_BTD, signs), gain, eps), signs)


class DeepseekV3(nnx.Module):
    """Token ids to logits.

    `leaves` gives every weight by name (see `weights.Layout`), `experts_per_token` K per block where it is not the
    config's. Everything is computed in `dtype`, sums in at least float32.
    """

    def __init__(self, config: Config, leaves: Leaves, experts_per_token: Sequence[int] | None = None):
        self.config = config
        per_block = experts_per_token or [config.num_experts_per_tok] * config.num_blocks
        self.embed = nnx.Param(leaves("embed"))
        self.layers = nnx.List(
            Block(config, under(leaves, f"layers.{i}"), config.is_moe(i), per_block[i])
            for i in range(config.num_hidden_layers)
        )
        self.norm = nnx.Param(leaves("norm"))
        self.head = nnx.Param(leaves("head"))
        self.mtp = nnx.List(
            MtpBlock(config, under(leaves, f"mtp.{m}"), config.is_moe(i), per_block[i])
            for m, i in enumerate(range(config.num_hidden_layers, config.num_blocks))
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        dtype: jax.typing.DTypeLike = jnp.float32,
        choices: Sequence[jax.Array | None] | None = None,
    ) -> jax.Array:
        """Logits (B, T, C); `choices` replays each layer's experts (B*T, K), None for dense layers."""
        return self.logits(self.hidden(tokens_BT, dtype, choices))

    def hidden(
        self,
        tokens_BT: jax.Array,
        dtype: jax.typing.DTypeLike = jnp.float32,
        choices: Sequence[jax.Array | None] | None = None,
    ) -> jax.Array:
        """The output of the last layer before the final norm, (B, T, D)."""
        x_BTD = self.embedded(tokens_BT, dtype)
        by = self.angles(jnp.arange(tokens_BT.shape[1]), x_BTD.dtype)
        for layer, choice_TK in zip(self.layers, choices or [None] * len(self.layers), strict=True):
            x_BTD = layer(x_BTD, by, choice_TK)
        return x_BTD

    def embedded(self, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Embedding rows, (B, T, D). Raises InputError for tokens that are not the model's, unless they are traced."""
        require_tokens(tokens_BT, self.config)
        return take(self.embed.get_value(), tokens_BT, dtype)

    def angles(self, positions: jax.Array, dtype: jnp.dtype) -> Angles:
        """RoPE's angles of positions (T,) or (B, T)."""
        return angles(self.config, positions, jnp.promote_types(dtype, jnp.float32))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Final norm and head: hidden states (B, T, D) to logits (B, T, C), in at least float32."""
        return head_logits(self.normed(x_BTD), self.head.get_value())

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm."""
        return rms_norm(x_BTD, self.norm.get_value(), self.config.rms_norm_eps)

    def draft_logits(self, tokens_BT: jax.Array, hidden_BTD: jax.Array, depth: int = 0) -> jax.Array:
        """MTP block `depth`'s logits for the token after the next, (B, T-1, C), from `hidden`'s output."""
        following = self.embedded(tokens_BT[:, 1:], hidden_BTD.dtype)
        by = self.angles(jnp.arange(following.shape[1]), hidden_BTD.dtype)
        drafted = self.mtp[depth](self.normed(hidden_BTD)[:, :-1], following, by)
        return head_logits(drafted, self.head.get_value())

    def empty_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> list[LatentCache]:
        """Zeroed latent caches of all layers, for `batch` sequences of `length` tokens."""
        return empty_caches(self.config, batch, length, dtype)

    def extend(
        self,
        tokens_BT: jax.Array,
        cache: Sequence[LatentCache],
        start_B: jax.Array,
        dtype: jax.typing.DTypeLike = jnp.float32,
        choices: Sequence[jax.Array | None] | None = None,
    ) -> tuple[jax.Array, list[LatentCache]]:
        """Hidden states (B, T, D) of T tokens at positions start, start+1, ... of each sequence, and the cache that now
        holds them. The cache must have room for them; `choices` as in `hidden`."""
        x_BTD = self.embedded(tokens_BT, dtype)
        by = self.angles(start_B[:, None] + jnp.arange(tokens_BT.shape[1]), x_BTD.dtype)
        new_cache = []
        for layer, own, choice_TK in zip(self.layers, cache, choices or [None] * len(self.layers), strict=True):
            x_BTD, own = layer.attend_cached(x_BTD, by, own, start_B, choice_TK)
            new_cache.append(own)
        return x_BTD, new_cache

    def extend_draft(
        self, following_BT: jax.Array, hidden_BTD: jax.Array, cache: LatentCache, start_B: jax.Array, depth: int = 0
    ) -> tuple[jax.Array, LatentCache]:
        """MTP block `depth`'s normed states (B, T, D) behind its own cache, whose head gives the token after the next.

        `hidden_BTD` is `extend`'s output at positions start, start+1, ..., `following_BT` the token behind each.
        """
        by = self.angles(start_B[:, None] + jnp.arange(following_BT.shape[1]), hidden_BTD.dtype)
        following = self.embedded(following_BT, hidden_BTD.dtype)
        return self.mtp[depth].attend_cached(self.normed(hidden_BTD), following, by, cache, start_B)


def head_logits(x: jax.Array, head: Leaf) -> jax.Array:
    """Normed hidden states (..., D) to logits (..., C), in at least float32."""
    return matmul(x.astype(jnp.promote_types(x.dtype, jnp.float32)), head)


def rotated(x: jax.Array, signs: jax.Array) -> jax.Array:
    """x R along the last axis, R = diag(signs) H / sqrt(n) orthogonal (n, n) (QuaRot, arXiv:2404.00456)."""
    return hadamard(x * signs.astype(x.dtype))


def unrotated(x: jax.Array, signs: jax.Array) -> jax.Array:
    """x R^T: the inverse of `rotated`."""
    return hadamard(x, inverse=True) * signs.astype(x.dtype)

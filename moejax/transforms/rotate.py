"""Rotating a model's hidden states: weights become incoherent, and the model computes the same.

Rows convention: a hidden state x (..., n) becomes x R with R = diag(signs) H / sqrt(n), orthogonal. A weight W (O, I)
with y = W x becomes R_O^T W R_I. RMSNorm commutes with R once its gain is folded into its consumers' inputs (QuaRot,
arXiv:2404.00456; SliceGPT, arXiv:2401.15024; signs as in QuIP#, arXiv:2402.04396). Every matrix is turned by itself,
compiled once per shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import InputError
from moejax.formats import ExpertWeights, Leaf, dense, matrix, take_rows
from moejax.model import Config, DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block, MtpBlock, rotated
from moejax.model.leaves import Weight, prefixed
from moejax.model.moe import Experts
from moejax.model.sliced import SlicedBlock, SlicedMtp
from moejax.model.source import ModelSource, Source, model_of
from moejax.model.weights import IN_BLOCK

# Rows of embedding and head that are dense in the wide dtype at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Signs:
    """The signs of every site's rotation, the same in all layers and heads: of the residual stream, the two latents,
    values, and the parts of queries and keys without position. q_latent_Q is None in models without that latent."""

    residual_D: jax.Array
    q_latent_Q: jax.Array | None
    kv_latent_L: jax.Array
    value_V: jax.Array
    nope_N: jax.Array


def draw_signs(config: Config, seed: int) -> Signs:
    """Random signs, in bfloat16, which holds them exactly and takes no more than a format of weights does."""
    random = np.random.default_rng(seed)

    def draw(size: int) -> jax.Array:
        return jnp.asarray(random.choice([-1.0, 1.0], size), jnp.bfloat16)

    return Signs(
        residual_D=draw(config.hidden_size),
        q_latent_Q=draw(config.q_lora_rank) if config.q_lora_rank else None,
        kv_latent_L=draw(config.kv_lora_rank),
        value_V=draw(config.v_head_dim),
        nope_N=draw(config.qk_nope_head_dim),
    )


def rotate(
    model: DeepseekV3, seed: int, *, down: bool = False, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> DeepseekV3:
    """The same function of the tokens with every site of `Signs` rotated; its matrices are dense in `dtype`.

        embed' = embed R, head' = head diag(g) R, in between as `rotate_block` says; all norms' gains become ones

    With `down`, every `down` takes its input times H / sqrt(F), which the model computes as it runs. What MTP blocks
    need to undo R is kept in leaves of theirs. Computed in at least float32; routers and gains stay in that. Pure:
    `jax.eval_shape` of it is the rotated model's shape.

    Raises InputError if the model is rotated already, a size is odd, or the model has MTP blocks and its final norm's
    gain an entry that is zero (which a trace does not see).
    """
    return model_of(rotated_source(ModelSource(model), seed, down=down, dtype=dtype))


def rotated_source(
    source: Source, seed: int, *, down: bool = False, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> "RotatedSource":
    """The parts of `rotate`'s model, each turned when it is asked for. Raises InputError as `rotate` does."""
    config = source.config
    if config.residual_rotation or config.down_input_transform:
        raise InputError("the model is rotated already; one that is not is accepted")
    if config.num_nextn_predict_layers:
        _check_invertible(source.norm())
    config = replace(config, residual_rotation="hadamard", down_input_transform="hadamard" if down else None)
    return RotatedSource(source, config, draw_signs(config, seed), jnp.dtype(dtype))


@dataclass(frozen=True)
class RotatedSource:
    """`Source` of a rotated model: the parts of `source`, turned by `signs` and dense in `dtype`. `config` is the
    rotated model's."""

    source: Source
    config: Config
    signs: Signs
    dtype: jnp.dtype

    def embedding(self) -> Leaf:
        return _turn_rows(self.source.embedding(), None, self.signs.residual_D, self.dtype)

    def block(self, index: int) -> SlicedBlock:
        return rotate_block(self.source.block(index), self.config, self.signs, self.dtype)

    def norm(self) -> jax.Array:
        return _ones(self.source.norm(), self.dtype)

    def head(self) -> Leaf:
        return _turn_rows(self.source.head(), self.source.norm(), self.signs.residual_D, self.dtype)

    def mtp(self, depth: int) -> SlicedMtp:
        return rotate_mtp(self.source.mtp(depth), self.config, self.source.norm(), self.signs, self.dtype)


def rotate_block(block: SlicedBlock, config: Config, signs: Signs, dtype: jnp.dtype) -> SlicedBlock:
    """A block that takes and gives x R where `block` takes and gives x. `config` is the rotated model's."""
    trunk = block.trunk
    gain_D = trunk.post_attention_norm.get_value()
    leaves = named_leaves(trunk) | _attention(trunk, signs, dtype)
    leaves |= prefixed("mlp", _feed_forward(named_leaves(trunk.mlp), "mlp", gain_D, config, signs, dtype))
    for norm in ("input_norm", "post_attention_norm"):
        leaves[norm] = _ones(leaves[norm], dtype)

    def experts_of(members: Sequence[int]) -> Experts:
        own = named_leaves(block.experts_of(members))
        turned = _feed_forward(own, "mlp.experts", gain_D, config, signs, dtype)
        return Experts(config, turned.__getitem__)

    per_token = trunk.experts_per_token
    turned = Block(config, leaves.__getitem__, block.is_moe, per_token, has_experts=False)
    return replace(block, trunk=turned, experts_of=experts_of)


def rotate_mtp(mtp: SlicedMtp, config: Config, gain_D: jax.Array, signs: Signs, dtype: jnp.dtype) -> SlicedMtp:
    """The same for an MTP block, whose `MtpBlock` says how it undoes R; `gain_D` is the model's final norm's."""
    block, outer = rotate_block(mtp.block, config, signs, dtype), mtp.outer
    enorm_D, hnorm_D, norm_D = (own.get_value() for own in (outer.enorm, outer.hnorm, outer.norm))
    wide = _wide(dtype)
    leaves = prefixed("block", named_leaves(block.trunk)) | {
        "eh_proj": _turn_eh_proj(outer.eh_proj.get_value(), enorm_D, hnorm_D, signs.residual_D, dtype),
        "enorm": _ones(enorm_D, dtype),
        "hnorm": _ones(hnorm_D, dtype),
        "norm": norm_D.astype(wide) / gain_D.astype(wide),
        "signs": signs.residual_D,
        "input_gain": gain_D.astype(wide),
    }
    turned = MtpBlock(config, leaves.__getitem__, block.is_moe, block.experts_per_token, has_experts=False)
    return SlicedMtp(turned, block)


def _attention(block: Block, signs: Signs, dtype: jnp.dtype) -> dict[str, Leaf]:
    own, gain_D, heads = block.self_attn, block.input_norm.get_value(), block.config.num_attention_heads
    turn = partial(_turn, dtype=dtype)
    if signs.q_latent_Q is None:
        queries = {"q": _turn_queries(own.q.get_value(), heads, gain_D, signs.residual_D, signs.nope_N, dtype)}
    else:
        q_gain_Q = own.q_a_norm.get_value()
        queries = {
            "q_a": turn(own.q_a.get_value(), gain_D, signs.residual_D, signs.q_latent_Q),
            "q_a_norm": _ones(q_gain_Q, dtype),
            "q_b": _turn_queries(own.q_b.get_value(), heads, q_gain_Q, signs.q_latent_Q, signs.nope_N, dtype),
        }
    kv_gain_L = own.kv_a_norm.get_value()
    leaves = queries | {
        "kv_a": turn(own.kv_a.get_value(), gain_D, signs.residual_D, signs.kv_latent_L),
        "kv_a_norm": _ones(kv_gain_L, dtype),
        "k_b": turn(own.k_b.get_value(), kv_gain_L, signs.kv_latent_L, signs.nope_N),
        "v_b": turn(own.v_b.get_value(), kv_gain_L, signs.kv_latent_L, signs.value_V),
        "o": turn(own.o.get_value(), None, signs.value_V, signs.residual_D),
    }
    return {f"self_attn.{name}": leaf for name, leaf in leaves.items()}


def _feed_forward(
    leaves: Mapping[str, Weight], part: str, gain_D: jax.Array, config: Config, signs: Signs, dtype: jnp.dtype
) -> dict[str, Weight]:
    """Of the weights of a feed-forward layer, or of some experts, those that are turned; by their names within."""
    turned: dict[str, Weight] = {}
    for name, leaf in leaves.items():
        row, turn = IN_BLOCK[f"{part}.{name}"], _turn_experts if isinstance(leaf, ExpertWeights) else _turn
        if row.takes_hidden:
            to = _wide(dtype) if row.role == "router" else dtype
            turned[name] = turn(leaf, gain_D, signs.residual_D, None, to)
        elif row.takes_product:
            inputs = jnp.ones(leaf.shape[-1], jnp.bfloat16) if config.down_input_transform else None
            turned[name] = turn(leaf, None, inputs, signs.residual_D, dtype)
    return turned


@partial(jax.jit, static_argnames="dtype")
def _turn(
    leaf: Leaf, gain_I: jax.Array | None, signs_I: jax.Array | None, signs_O: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """R_O^T W diag(gain) R_I of every matrix W (..., O, I), without the factors that are None.

    R_I stands along the diagonal as often as I holds its signs; R_O turns the first outputs, as many as it has signs.
    """
    w = dense(leaf, _wide(dtype))
    if gain_I is not None:
        w = w * gain_I.astype(w.dtype)
    if signs_I is not None:
        w = rotated(w.reshape(*w.shape[:-1], -1, len(signs_I)), signs_I).reshape(w.shape)
    if signs_O is not None:
        first, rest = jnp.split(w, [len(signs_O)], axis=-2)
        w = jnp.concatenate([rotated(first.swapaxes(-2, -1), signs_O).swapaxes(-2, -1), rest], axis=-2)
    return w.astype(dtype)


@partial(jax.jit, static_argnames=("heads", "dtype"))
def _turn_queries(
    leaf: Leaf, heads: int, gain_I: jax.Array, signs_I: jax.Array, nope_N: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """A projection to queries (H*(N+R), I), of whose rows each head's first N are turned."""
    w_OI = dense(leaf, _wide(dtype))
    return _turn(w_OI.reshape(heads, -1, w_OI.shape[-1]), gain_I, signs_I, nope_N, dtype).reshape(w_OI.shape)


@partial(jax.jit, static_argnames="dtype")
def _turn_rows(leaf: Leaf, gain_I: jax.Array | None, signs_I: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """W diag(gain) R_I, a few rows of W (O, I) at a time."""

    def turn(row: jax.Array) -> jax.Array:
        return _turn(take_rows(*_tied(leaf, row[None])), gain_I, signs_I, None, dtype)[0]

    return jax.lax.map(turn, jnp.arange(leaf.shape[0]), batch_size=_ROWS)


def _turn_experts(
    weights: ExpertWeights,
    gain_I: jax.Array | None,
    signs_I: jax.Array | None,
    signs_O: jax.Array | None,
    dtype: jnp.dtype,
) -> ExpertWeights:
    """Every expert's matrix by `_turn`, all in one bucket."""
    buckets = [_turn_each(bucket, gain_I, signs_I, signs_O, dtype) for bucket in weights.buckets]
    first_slot = np.cumsum([0, *(len(bucket) for bucket in buckets)], dtype=np.int32)
    index_E = jnp.asarray(first_slot)[weights.bucket_E] + weights.index_E
    return ExpertWeights((jnp.concatenate(buckets),), jnp.zeros_like(index_E), index_E)


@partial(jax.jit, static_argnames="dtype")
def _turn_each(
    bucket: Leaf, gain_I: jax.Array | None, signs_I: jax.Array | None, signs_O: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """One matrix of a bucket after another, so that no more than one of them is wide at a time."""

    def turn(index: jax.Array) -> jax.Array:
        return _turn(matrix(*_tied(bucket, index)), gain_I, signs_I, signs_O, dtype)

    return jax.lax.map(turn, jnp.arange(bucket.shape[0]))


def _tied(leaf: Leaf, index: jax.Array) -> tuple[Leaf, jax.Array]:
    """The same. XLA would see that the leaf does not change in the loop, and widen it all ahead of it."""
    tied: tuple[Leaf, jax.Array] = jax.lax.optimization_barrier((leaf, index))
    return tied


@partial(jax.jit, static_argnames="dtype")
def _turn_eh_proj(
    leaf: Leaf, enorm_D: jax.Array, hnorm_D: jax.Array, signs_D: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Of [W_e | W_h] (D, 2D), which takes a rotated embedding and a hidden state that is not."""
    of_embedding, of_hidden = jnp.split(dense(leaf, _wide(dtype)), 2, axis=-1)
    halves = _turn(of_embedding, enorm_D, signs_D, signs_D, dtype), _turn(of_hidden, hnorm_D, None, signs_D, dtype)
    return jnp.concatenate(halves, axis=-1)


def _check_invertible(gain_D: jax.Array) -> None:
    if not isinstance(gain_D, jax.core.Tracer) and not np.all(np.asarray(gain_D, np.float64)):
        raise InputError(
            "norm, the final norm's gain, has an entry that is zero, which MTP blocks of a rotated model would divide "
            "by; --drop-mtp leaves them out"
        )


def _ones(gain: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.ones(gain.shape, _wide(dtype))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """What is computed in."""
    return jnp.promote_types(dtype, jnp.float32)

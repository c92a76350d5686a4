"""A model's weights as the tensors of a Hugging Face checkpoint: the inverse of `HuggingFaceLeaves`."""

from collections.abc import Callable, Iterator
from itertools import repeat

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.hf_names import K_B, MTP_COPIES, SCALE, V_B, hf_name
from moejax.errors import InputError
from moejax.formats import ExpertWeights, Fp8Blocks, Leaf, PackedTensor, format_name
from moejax.model import Config, Layout
from moejax.model.leaves import Leaves
from moejax.model.weights import row_of

Array = jax.Array | np.ndarray
Block = tuple[int, int]
# What a matrix becomes before it is written, by its leaf's name; of experts, one at a time.
Convert = Callable[[str, Leaf], Leaf]


def as_it_is(_: str, leaf: Leaf) -> Leaf:
    """The leaf."""
    return leaf


def hf_tensors(
    config: Config, leaf: Leaves, block: Block | None, convert: Convert = as_it_is
) -> Iterator[tuple[str, Array]]:
    """Every tensor by its name, such that HuggingFaceLeaves(config, tensors, block)(name) is convert(name, leaf(name)).

    Leaves that follow from the config (groups, routing scales) are not asked for; `block` is the size of FP8 blocks
    that the config names. Lazy, one leaf and one expert after the other, and concrete experts are not copied. Under
    `jax.eval_shape` too, where an expert's place in its bucket is not known: each stands for all, as their shapes are
    equal; scales that would have to be equal are then not checked.

    Raises InputError, once it is a weight's turn, for what no such checkpoint can hold: integer formats, experts of
    several formats, another shape than the config's, FP8 blocks of another size.
    """
    for name, shape in Layout(config).shapes().items():
        tensor, row = hf_name(name, config), row_of(name)
        if tensor is None or row.name == K_B:
            continue
        own = leaf(name)
        if own.shape != shape:
            raise InputError(f"{name} has shape {own.shape}; a checkpoint of the model's config has {shape} there")
        if isinstance(own, ExpertWeights):
            for e, expert in enumerate(_experts(name, own, convert)):
                yield from _tensors(name, tensor.format(e), expert, block)
        elif row.name == V_B:
            k_name = name.removesuffix(V_B) + K_B
            joined = _join_kv_b(name, convert(k_name, leaf(k_name)), convert(name, own), block)
            yield from _tensors(name, tensor, joined, block)
        else:
            yield from _tensors(name, tensor, convert(name, own), block)
    for layer in range(config.num_hidden_layers, config.num_blocks):
        for copy, original in MTP_COPIES.items():
            own = convert(original, leaf(original))
            yield from _tensors(original, f"model.layers.{layer}.{copy}", own, block)


def _tensors(name: str, tensor: str, leaf: Leaf, block: Block | None) -> Iterator[tuple[str, Array]]:
    if not isinstance(leaf, Fp8Blocks):
        yield tensor, _dense(name, leaf)
        return
    if leaf.block != block:
        accepted = f"names blocks of {block[0]} x {block[1]}" if block else "names no FP8 blocks"
        raise InputError(f"{name} is {leaf.format_name}; its config {accepted}")
    yield tensor, leaf.values
    yield tensor + SCALE, leaf.scale_inv


def _dense(name: str, leaf: Leaf) -> jax.Array:
    if isinstance(leaf, PackedTensor):
        raise InputError(
            f"{name} is {format_name(leaf)}; a Hugging Face checkpoint holds dense weights and FP8 blocks, "
            "which --dequantize bfloat16 makes of it"
        )
    return leaf


def _experts(name: str, experts: ExpertWeights, convert: Convert) -> Iterator[Leaf]:
    """Every expert's matrix in order, made of a view of its bucket where that is concrete."""
    buckets = [jax.tree.map(_viewed, bucket) for bucket in experts.buckets]

    def one(bucket: int, index: int) -> Leaf:
        return convert(name, jax.tree.map(lambda a: a[index], buckets[bucket]))

    firsts = [one(bucket, 0) for bucket in range(len(buckets))]
    if len({format_name(first) for first in firsts}) > 1:
        formats = ", ".join(map(format_name, firsts))
        raise InputError(
            f"{name} has experts in {formats}; a Hugging Face checkpoint holds them in one format, "
            "which --dequantize bfloat16 makes of them"
        )
    if _is_traced(experts.bucket_E):
        yield from repeat(firsts[0], experts.num_experts)
        return
    for bucket, index in zip(np.asarray(experts.bucket_E), np.asarray(experts.index_E), strict=True):
        yield one(bucket, index)


def _join_kv_b(name: str, k_b: Leaf, v_b: Leaf, block: Block | None) -> Leaf:
    """kv_b_proj (H*(N+V), L) of k_b (H, N, L) and v_b (H, V, L)."""
    if format_name(k_b) != format_name(v_b):
        raise InputError(f"{name} is {format_name(v_b)} and its k_b {format_name(k_b)}; kv_b_proj needs one format")
    if isinstance(k_b, Fp8Blocks) and isinstance(v_b, Fp8Blocks):
        return v_b if block is None else _join_fp8_kv_b(name, k_b, v_b, block)
    return _join_heads(_dense(name, k_b), _dense(name, v_b))


def _join_fp8_kv_b(name: str, k_b: Fp8Blocks, v_b: Fp8Blocks, block: Block) -> Fp8Blocks:
    """The scales of finer blocks become one for each of kv_b_proj's, whose borders need not be those of heads."""
    rows, inputs = k_b.block
    if block[0] % rows or block[1] != inputs or k_b.shape[1] % rows or v_b.shape[1] % rows:
        raise InputError(f"{name} is {v_b.format_name}, which is no part of blocks of {block[0]} x {block[1]}")
    finer = _join_heads(k_b.scale_inv, v_b.scale_inv)
    scale_inv = finer[:: block[0] // rows]
    repeated = jnp.repeat(scale_inv, block[0] // rows, axis=0)[: finer.shape[0]]
    if not _is_traced(finer) and not np.array_equal(finer, repeated):
        raise InputError(f"{name} cannot be written as Hugging Face tensors: a block of {block[0]} rows has one scale")
    return Fp8Blocks(_join_heads(k_b.values, v_b.values), scale_inv, block)


def _join_heads(k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.concatenate([k, v], axis=1).reshape(-1, k.shape[-1])


def _viewed(array: jax.Array) -> Array:
    return array if _is_traced(array) else np.asarray(array)


def _is_traced(array: jax.Array) -> bool:
    return isinstance(array, jax.core.Tracer)

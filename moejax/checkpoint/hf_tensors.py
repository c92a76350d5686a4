"""A model's weights as the tensors of a Hugging Face checkpoint: the inverse of `HuggingFaceLeaves`."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.hf_leaves import derived_leaf
from moejax.checkpoint.hf_names import MTP_COPIES, SCALE, hf_name
from moejax.errors import InputError
from moejax.formats import ExpertWeights, Fp8Blocks, Leaf, PackedTensor, format_name
from moejax.model import DeepseekV3, Layout, named_leaves
from moejax.model.leaves import Weight

Array = jax.Array | np.ndarray
Block = tuple[int, int]

# Jitted for its cache: layers of equal shape are traced once.
_unstack = jax.jit(jnp.unstack)


def hf_tensors(model: DeepseekV3) -> Iterator[tuple[str, Array]]:
    """Every tensor by its name, such that HuggingFaceLeaves(model.config, tensors)(name) is the model's leaf `name`.

    Lazy, one tensor after the other, and a concrete model's experts are not copied. Works under `jax.eval_shape` too;
    values of slot tables, derived leaves and scales are then not checked. A block's K is not among the tensors.

    Raises InputError, once it is a weight's turn, for what no such checkpoint can hold: integer formats, experts of
    several formats or out of order, another number of experts than the config's, routing that the config does not
    imply, FP8 blocks of several sizes.
    """
    config, leaves = model.config, named_leaves(model)
    block = _common_block(leaves)
    for name, shape in Layout(config).shapes().items():
        tensor, leaf = hf_name(name, config), leaves[name]
        if leaf.shape != shape:
            raise InputError(f"{name} has shape {leaf.shape}; a checkpoint of the model's config has {shape} there")
        if tensor is None:
            _require_equal(name, leaf, derived_leaf(name, config), "its config implies another value")
        elif isinstance(leaf, ExpertWeights):
            for e, expert in enumerate(_experts(name, leaf)):
                yield from _tensors(name, tensor.format(e), expert)
        elif name.endswith("v_b"):
            yield from _tensors(name, tensor, _join_kv_b(name, leaves[f"{name.removesuffix('v_b')}k_b"], leaf, block))
        elif not name.endswith("k_b"):
            yield from _tensors(name, tensor, leaf)
    for layer in range(config.num_hidden_layers, config.num_blocks):
        for copy, original in MTP_COPIES.items():
            yield from _tensors(original, f"model.layers.{layer}.{copy}", leaves[original])


def _tensors(name: str, tensor: str, leaf: Leaf) -> Iterator[tuple[str, Array]]:
    if isinstance(leaf, Fp8Blocks):
        yield tensor, leaf.values
        yield tensor + SCALE, leaf.scale_inv
    else:
        yield tensor, _dense(name, leaf)


def _dense(name: str, leaf: Leaf) -> jax.Array:
    if isinstance(leaf, PackedTensor):
        raise InputError(f"{name} is {format_name(leaf)}; a Hugging Face checkpoint holds dense weights and FP8 blocks")
    return leaf


def _experts(name: str, experts: ExpertWeights) -> Iterator[Leaf]:
    """Every expert's matrix in order: views of a concrete bucket."""
    if len(experts.buckets) > 1:
        formats = ", ".join(format_name(bucket) for bucket in experts.buckets)
        raise InputError(f"{name} has experts in {formats}; a Hugging Face checkpoint holds them in one format")
    _require_equal(name, experts.index_E, np.arange(experts.num_experts), "its experts are out of order")
    arrays, structure = jax.tree.flatten(experts.buckets[0])
    for expert in zip(*(_unstack(a) if _is_traced(a) else np.asarray(a) for a in arrays), strict=True):
        yield jax.tree.unflatten(structure, expert)


def _join_kv_b(name: str, k_b: Leaf, v_b: Leaf, common: Block | None) -> Leaf:
    """kv_b_proj (H*(N+V), L) of k_b (H, N, L) and v_b (H, V, L)."""
    if format_name(k_b) != format_name(v_b):
        raise InputError(f"{name} is {format_name(v_b)} and its k_b {format_name(k_b)}; kv_b_proj needs one format")
    if isinstance(k_b, Fp8Blocks) and isinstance(v_b, Fp8Blocks):
        return _join_fp8_kv_b(name, k_b, v_b, common or k_b.block)
    return _join_heads(_dense(name, k_b), _dense(name, v_b))


def _join_fp8_kv_b(name: str, k_b: Fp8Blocks, v_b: Fp8Blocks, block: Block) -> Fp8Blocks:
    """The scales of finer blocks become one for each of kv_b_proj's, whose borders need not be those of heads."""
    rows, inputs = k_b.block
    if block[0] % rows or block[1] != inputs or k_b.shape[1] % rows or v_b.shape[1] % rows:
        raise InputError(f"{name} is {v_b.format_name}, which is no part of blocks of {block[0]} x {block[1]}")
    finer = _join_heads(k_b.scale_inv, v_b.scale_inv)
    scale_inv = finer[:: block[0] // rows]
    repeated = jnp.repeat(scale_inv, block[0] // rows, axis=0)[: finer.shape[0]]
    _require_equal(name, finer, repeated, f"a block of {block[0]} rows has one scale")
    return Fp8Blocks(_join_heads(k_b.values, v_b.values), scale_inv, block)


def _join_heads(k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.concatenate([k, v], axis=1).reshape(-1, k.shape[-1])


def _common_block(leaves: Mapping[str, Weight]) -> Block | None:
    """The one size of FP8 blocks that a config can name; kv_b's, split finer, apart."""
    common: Block | None = None
    for name, leaf in leaves.items():
        part = leaf.buckets[0] if isinstance(leaf, ExpertWeights) else leaf
        if not isinstance(part, Fp8Blocks) or name.endswith(("k_b", "v_b")):
            continue
        if common is not None and part.block != common:
            raise InputError(f"{name} is {part.format_name}; others have blocks of {common[0]} x {common[1]}")
        common = part.block
    return common


def _require_equal(name: str, found: jax.Array, wanted: jax.Array | np.ndarray, why: str) -> None:
    """Raise InputError where concrete values differ."""
    if not _is_traced(found) and not np.array_equal(found, wanted):
        raise InputError(f"{name} cannot be written as Hugging Face tensors: {why}")


def _is_traced(array: jax.Array) -> bool:
    return isinstance(array, jax.core.Tracer)

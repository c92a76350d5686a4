"""A leaf's format and shape in one short text, and back: how manifests describe what they hold."""

import re

import jax.numpy as jnp

from moejax.errors import InputError, brief
from moejax.formats.arrays import abstract_array
from moejax.formats.dense import DENSE_NAMES, Leaf, format_name
from moejax.formats.experts import ExpertWeights
from moejax.formats.families import parse_format
from moejax.formats.fp8_blocks import Fp8Blocks

_DENSE_DTYPES = {short: jnp.dtype(name) for name, short in DENSE_NAMES.items()}
# Bounded, because specs come from files: up to 8 axes of up to 15 digits.
_LEAF = re.compile(r"(\w{1,40})\[((?:\d{1,15}(?:,\d{1,15}){0,7})?)\]", re.ASCII)
_MAX_BUCKETS = 100  # there are 85 formats apart from FP8's blocks


def describe(leaf: Leaf | ExpertWeights) -> str:
    """`int3g64[256,128]`; experts are their buckets joined by `+`."""
    if isinstance(leaf, ExpertWeights):
        return "+".join(describe(bucket) for bucket in leaf.buckets)
    return f"{format_name(leaf)}[{','.join(map(str, leaf.shape))}]"


def abstract_leaf(spec: str) -> Leaf:
    """The inverse of `describe` for one leaf: its arrays as `jax.ShapeDtypeStruct`."""
    match = _LEAF.fullmatch(spec)
    if not match:
        raise InputError(f"{brief(spec)} describes no leaf: expected a format and a shape, such as bf16[256,128]")
    name, shape = match[1], tuple(int(n) for n in match[2].split(",") if n)
    if name in _DENSE_DTYPES:
        return abstract_array(shape, _DENSE_DTYPES[name])
    if len(shape) < 2:
        raise InputError(
            f"{brief(spec)} describes no leaf: a packed one has two dimensions or more, as in int4g64[256,128]"
        )
    if fp8 := re.fullmatch(r"fp8b([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", name):
        return _abstract_fp8(shape, (int(fp8[1]), int(fp8[2])))
    return parse_format(name).abstract(shape)


def abstract_experts(spec: str) -> ExpertWeights:
    """The inverse of `describe` for experts."""
    buckets = tuple(abstract_leaf(part) for part in spec.split("+", _MAX_BUCKETS))
    if len({bucket.shape[1:] for bucket in buckets}) > 1 or len(buckets[0].shape) != 3:
        raise InputError(
            f"{brief(spec)} describes no experts: expected buckets of equal matrices, as in int4g64[8,256,128]"
        )
    slots = abstract_array((sum(bucket.shape[0] for bucket in buckets),), jnp.int32)
    return ExpertWeights(buckets, slots, slots)


def _abstract_fp8(shape: tuple[int, ...], block: tuple[int, int]) -> Fp8Blocks:
    blocks = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return Fp8Blocks(abstract_array(shape, jnp.float8_e4m3fn), abstract_array(blocks, jnp.float32), block)

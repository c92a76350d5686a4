"""A leaf's format and shape in one short text, and back: how manifests describe what they hold."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp

from moejax.errors import InputError
from moejax.formats import planar
from moejax.formats.dense import DENSE_NAMES, Leaf, format_name
from moejax.formats.experts import ExpertWeights
from moejax.formats.fp8_blocks import Fp8Blocks
from moejax.formats.grouped_int import SCALE_DTYPE, GroupedInt

_DENSE_DTYPES = {short: jnp.dtype(name) for name, short in DENSE_NAMES.items()}


@dataclass(frozen=True)
class IntFormat:
    """Integers of `bits` bits with one scale for every `group_size` inputs; its name is `int<bits>g<group_size>`."""

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"int{self.bits}g{self.group_size}"

    def fits(self, inputs: int) -> bool:
        """Whether rows of that many inputs fill whole words and whole groups."""
        return inputs % self.group_size == 0 and inputs % planar.inputs_multiple(self.bits) == 0

    def require_fit(self, inputs: int) -> None:
        """Raise InputError where `fits` is false."""
        if not self.fits(inputs):
            raise InputError(
                f"format {self.name} cannot hold rows of {inputs} inputs: they must be a multiple of "
                f"{self.group_size} and of {planar.inputs_multiple(self.bits)}"
            )

    def abstract(self, shape: Sequence[int]) -> GroupedInt:
        """The packed leaf of a weight (..., O, I), shapes only."""
        *outer, inputs = shape
        self.require_fit(inputs)
        words = _abstract((*outer, inputs * self.bits // planar.WORD_BITS), jnp.uint32)
        return GroupedInt(words, _abstract((*outer, inputs // self.group_size), SCALE_DTYPE), self.bits)


def parse_int_format(name: str) -> IntFormat:
    """`int3g64` to IntFormat(3, 64)."""
    match = re.fullmatch(r"int([1-8])g(32|64|128|256)", name)
    if not match:
        raise InputError(f"unknown format {name!r}: a format is int<1 to 8>g<32, 64, 128 or 256>, such as int3g64")
    return IntFormat(int(match[1]), int(match[2]))


def describe(leaf: Leaf | ExpertWeights) -> str:
    """`int3g64[256,128]`; experts are their buckets joined by `+`."""
    if isinstance(leaf, ExpertWeights):
        return "+".join(describe(bucket) for bucket in leaf.buckets)
    return f"{format_name(leaf)}[{','.join(map(str, leaf.shape))}]"


def abstract_leaf(spec: str) -> Leaf:
    """The inverse of `describe` for one leaf: its arrays as `jax.ShapeDtypeStruct`."""
    match = re.fullmatch(r"(\w+)\[((?:\d+(?:,\d+)*)?)\]", spec)
    if not match:
        raise InputError(f"{spec!r} describes no leaf: expected a format and a shape, such as bf16[256,128]")
    name, shape = match[1], tuple(int(n) for n in match[2].split(",") if n)
    if name in _DENSE_DTYPES:
        return _abstract(shape, _DENSE_DTYPES[name])
    if len(shape) < 2:
        raise InputError(f"{spec!r} describes no leaf: a packed one has two dimensions or more, as in int4g64[256,128]")
    if fp8 := re.fullmatch(r"fp8b([1-9]\d*)x([1-9]\d*)", name):
        return _abstract_fp8(shape, (int(fp8[1]), int(fp8[2])))
    return parse_int_format(name).abstract(shape)


def abstract_experts(spec: str) -> ExpertWeights:
    """The inverse of `describe` for experts."""
    buckets = tuple(abstract_leaf(part) for part in spec.split("+"))
    if len({bucket.shape[1:] for bucket in buckets}) > 1 or len(buckets[0].shape) != 3:
        raise InputError(f"{spec!r} describes no experts: expected buckets of equal matrices, as in int4g64[8,256,128]")
    slots = _abstract((sum(bucket.shape[0] for bucket in buckets),), jnp.int32)
    return ExpertWeights(buckets, slots, slots)


def _abstract_fp8(shape: tuple[int, ...], block: tuple[int, int]) -> Fp8Blocks:
    blocks = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return Fp8Blocks(_abstract(shape, jnp.float8_e4m3fn), _abstract(blocks, jnp.float32), block)


def _abstract(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Stands where an array of that shape will stand."""
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype))

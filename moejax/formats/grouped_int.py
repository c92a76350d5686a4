"""Integers of 1 to 8 bits in groups along the input axis, one scale a group."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from moejax.formats import planar
from moejax.formats.packed import PackedTensor
from moejax.formats.slices import slice_axis

SCALE_DTYPE = jnp.bfloat16


@partial(jax.tree_util.register_dataclass, data_fields=["words", "scale"], meta_fields=["bits"])
@dataclass(frozen=True)
class GroupedInt(PackedTensor):
    """weight[..., o, i] = (code[..., o, i] - (2^bits - 1)/2) * scale[..., o, i // group_size].

    Levels lie symmetrically about zero and none is zero: at 1 bit -+s/2, at 2 bits -+s/2 and -+3s/2. The scale is
    bfloat16: codes are chosen after it is rounded, so mantissa bits would buy nothing where range does, and TPUs have
    no float16.

    words: uint32 (..., O, I*bits/32), planar (see `planar`). scale: bfloat16 (..., O, I/group_size).
    """

    words: jax.Array
    scale: jax.Array
    bits: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-1], self.words.shape[-1] * planar.WORD_BITS // self.bits)

    @property
    def group_size(self) -> int:
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def format_name(self) -> str:
        return f"int{self.bits}g{self.group_size}"

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        levels = planar.unpack(self.words, self.bits).astype(dtype) - centre(self.bits)
        return ungroup(group(levels, self.group_size) * self.scale[..., None].astype(dtype))

    def rows(self, start: jax.Array | int, size: int) -> "GroupedInt":
        return jax.tree.map(lambda a: slice_axis(a, start, size, a.ndim - 2), self)

    def take(self, index: jax.Array) -> "GroupedInt":
        return jax.tree.map(lambda a: a[index], self)

    def reshape_outputs(self, *shape: int) -> "GroupedInt":
        return jax.tree.map(lambda a: a.reshape(*shape, a.shape[-1]), self)


def centre(bits: int | jax.Array) -> float | jax.Array:
    """The code, half-way between two integers, that stands for zero."""
    return (2**bits - 1) / 2


def group(x: jax.Array, group_size: int) -> jax.Array:
    """(..., I) to (..., I/group_size, group_size)."""
    return x.reshape(*x.shape[:-1], -1, group_size)


def ungroup(x: jax.Array) -> jax.Array:
    """(..., I/group_size, group_size) to (..., I)."""
    return x.reshape(*x.shape[:-2], -1)


def encode(weight: jax.Array, scale: jax.Array, bits: int) -> GroupedInt:
    """Round every weight (..., O, I) to the nearest level of its group's scale (..., O, I/group_size), and pack."""
    scale = scale.astype(SCALE_DTYPE)
    weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    group_size = weight.shape[-1] // scale.shape[-1]
    codes = round_to_codes(group(weight, group_size), scale[..., None].astype(weight.dtype), bits)
    return GroupedInt(planar.pack(ungroup(codes).astype(jnp.uint32), bits), scale, bits)


def round_to_codes(weight: jax.Array, scale: jax.Array, bits: int | jax.Array) -> jax.Array:
    """The nearest code of each weight under its scale, as floats; any code where the scale is zero."""
    safe = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    return jnp.clip(jnp.round(weight / safe + centre(bits)), 0, 2 * centre(bits))

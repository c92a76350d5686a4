"""What packed codes in groups along the input axis share, whatever their layout: one scale a group, even levels."""

import abc
from typing import Self

import jax
import jax.numpy as jnp

from moejax.formats.arrays import slice_axis
from moejax.formats.packed import PackedTensor
from moejax.formats.scales import ScaleKind, decode_scales, kind_of


class GroupedCodes(PackedTensor):
    """weight[..., o, i] = (code[..., o, i] - (levels - 1)/2) * scale[..., o, i // group_size], 0 <= code < levels.

    The last group of a row is shorter where `group_size` does not divide its length.

    Levels are evenly spaced and lie symmetrically about zero. Codes are chosen after the scale is rounded, so range
    buys more than precision does: scales are bfloat16 (TPUs have no float16) or floats of eight bits (see `scales`).

    words: uint32 (..., O, W), each row packed by itself. scale: bfloat16 or uint8 (..., O, ceil(I/group_size)), which
    `decoded_scale` reads. inputs: I, which neither says where words are padded; nothing cuts or joins rows.
    """

    words: jax.Array
    scale: jax.Array
    group_size: int
    inputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.words.shape[:-1], self.inputs)

    @property
    @abc.abstractmethod
    def levels(self) -> int:
        """How many values a weight can take under its scale."""

    @abc.abstractmethod
    def codes(self) -> jax.Array:
        """int32 (..., O, I)."""

    @property
    def scale_kind(self) -> ScaleKind:
        """How scales are stored."""
        return kind_of(self.scale)

    def decoded_scale(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The scale of every group, (..., O, ceil(I/group_size))."""
        return decode_scales(self.scale, dtype)

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        steps = self.codes().astype(dtype) - centre(self.levels)
        return ungroup(group(steps, self.group_size) * self.decoded_scale(dtype)[..., None], self.inputs)

    def rows(self, start: jax.Array | int, size: int) -> Self:
        return jax.tree.map(lambda a: slice_axis(a, start, size, a.ndim - 2), self)

    def take(self, index: jax.Array) -> Self:
        return jax.tree.map(lambda a: a[index], self)

    def reshape_outputs(self, *shape: int) -> Self:
        return jax.tree.map(lambda a: a.reshape(*shape, a.shape[-1]), self)


def centre(levels: int | jax.Array) -> float | jax.Array:
    """The code, half-way between two integers where levels are even, that stands for zero."""
    return (levels - 1) / 2


def groups_per_row(inputs: int, group_size: int) -> int:
    """How many groups hold a row, a shorter last one among them."""
    return -(-inputs // group_size)


def group(x: jax.Array, group_size: int) -> jax.Array:
    """(..., I) to (..., ceil(I/group_size), group_size), zeros behind a shorter last group."""
    *outer, inputs = x.shape
    if more := -inputs % group_size:
        x = jnp.concatenate([x, jnp.zeros((*outer, more), x.dtype)], axis=-1)
    return x.reshape(*outer, -1, group_size)


def ungroup(x: jax.Array, inputs: int) -> jax.Array:
    """The inverse of `group`: (..., ceil(I/group_size), group_size) to (..., I)."""
    return x.reshape(*x.shape[:-2], -1)[..., :inputs]


def round_to_codes(weight: jax.Array, scale: jax.Array, levels: int | jax.Array) -> jax.Array:
    """The nearest code of each weight under its scale, as floats; any code where the scale is zero."""
    safe = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    return jnp.clip(jnp.round(weight / safe + centre(levels)), 0, 2 * centre(levels))

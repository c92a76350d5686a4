"""What packed codes in groups along the input axis share, whatever their layout: one scale a group, even levels."""

import abc
from typing import Self

import jax
import jax.numpy as jnp

from moejax.formats.packed import PackedTensor
from moejax.formats.scales import ScaleKind, decode_scales, kind_of
from moejax.formats.slices import slice_axis


class GroupedCodes(PackedTensor):
    """weight[..., o, i] = (code[..., o, i] - (levels - 1)/2) * scale[..., o, i // group_size], 0 <= code < levels.

    Levels are evenly spaced and lie symmetrically about zero. Codes are chosen after the scale is rounded, so range
    buys more than precision does: scales are bfloat16 (TPUs have no float16) or floats of eight bits (see `scales`).

    words: uint32 (..., O, W), each row packed by itself. scale: bfloat16 or uint8 (..., O, I/group_size), which
    `decoded_scale` reads.
    """

    words: jax.Array
    scale: jax.Array

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
        """The scale of every group, (..., O, I/group_size)."""
        return decode_scales(self.scale, dtype)

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        steps = self.codes().astype(dtype) - centre(self.levels)
        return ungroup(group(steps, self.shape[-1] // self.scale.shape[-1]) * self.decoded_scale(dtype)[..., None])

    def rows(self, start: jax.Array | int, size: int) -> Self:
        return jax.tree.map(lambda a: slice_axis(a, start, size, a.ndim - 2), self)

    def take(self, index: jax.Array) -> Self:
        return jax.tree.map(lambda a: a[index], self)

    def reshape_outputs(self, *shape: int) -> Self:
        return jax.tree.map(lambda a: a.reshape(*shape, a.shape[-1]), self)


def centre(levels: int | jax.Array) -> float | jax.Array:
    """The code, half-way between two integers where levels are even, that stands for zero."""
    return (levels - 1) / 2


def group(x: jax.Array, group_size: int) -> jax.Array:
    """(..., I) to (..., I/group_size, group_size)."""
    return x.reshape(*x.shape[:-1], -1, group_size)


def ungroup(x: jax.Array) -> jax.Array:
    """(..., I/group_size, group_size) to (..., I)."""
    return x.reshape(*x.shape[:-2], -1)


def round_to_codes(weight: jax.Array, scale: jax.Array, levels: int | jax.Array) -> jax.Array:
    """The nearest code of each weight under its scale, as floats; any code where the scale is zero."""
    safe = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    return jnp.clip(jnp.round(weight / safe + centre(levels)), 0, 2 * centre(levels))

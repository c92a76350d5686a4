"""What packed codes in groups along the input axis share, whatever their layout: one scale a group, even levels."""

import abc
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from moejax.formats.arrays import array_bytes, slice_axis
from moejax.formats.packed import PackedTensor
from moejax.formats.scales import ScaleKind, decode_scales, kind_of


class Levels(NamedTuple):
    """The values (code - zero) * scale, 0 <= code <= highest; zero is a whole number or half-way between two. Traced,
    one program serves all formats."""

    highest: int | jax.Array
    zero: float | jax.Array


def about_zero(number: int) -> Levels:
    """So many levels, as far above zero as below."""
    return Levels(number - 1, (number - 1) / 2)


class GroupedCodes(PackedTensor):
    """weight[..., o, i] = (code[..., o, i] - zero) * scale[..., o, i // group_size] (see `Levels`).

    The last group of a row is shorter where `group_size` does not divide its length.

    Codes are chosen after the scale is rounded, so range buys more than precision does: scales are bfloat16 or floats
    of eight bits, unless others' are to be held (see `scales`).

    words: uint32 (..., O, W), each row packed by itself. scale: (..., O, ceil(I/group_size)), which `decoded_scale`
    reads. inputs: I, which neither says where words are padded; nothing cuts or joins rows.
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
    def levels(self) -> Levels:
        """The values that a weight can take under its scale."""

    @abc.abstractmethod
    def codes(self) -> jax.Array:
        """int32 (..., O, I)."""

    @property
    def scale_bytes(self) -> int:
        return array_bytes(self.scale)

    @property
    def num_rows(self) -> int:
        """Of all matrices."""
        return self.size // self.inputs

    @property
    def scale_kind(self) -> ScaleKind:
        """How scales are stored."""
        return kind_of(self.scale)

    def decoded_scale(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The scale of every group, (..., O, ceil(I/group_size))."""
        return decode_scales(self.scale, dtype)

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        # A scale in float16 that were rounded to bfloat16 would shift its whole group.
        wide = jnp.promote_types(dtype, jnp.float32) if self.scale_kind == "f16" else dtype
        steps = self.codes().astype(wide) - self.levels.zero
        weight = group(steps, self.group_size) * self.decoded_scale(wide)[..., None]
        return ungroup(weight, self.inputs).astype(dtype)

    def rows(self, start: jax.Array | int, size: int) -> Self:
        return jax.tree.map(lambda a: slice_axis(a, start, size, a.ndim - 2), self)

    def take(self, index: jax.Array) -> Self:
        return jax.tree.map(lambda a: a[index], self)

    def reshape_outputs(self, *shape: int) -> Self:
        return jax.tree.map(lambda a: a.reshape(*shape, a.shape[-1]), self)


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


def round_to_codes(weight: jax.Array, scale: jax.Array, levels: Levels) -> jax.Array:
    """The nearest code of each weight under its scale, as floats; any code where the scale is zero."""
    safe = jnp.where(scale == 0, jnp.ones_like(scale), scale)
    return jnp.clip(jnp.round(weight / safe + levels.zero), 0, levels.highest)

"""DeepSeek's native FP8: e4m3 values with one float32 scale per block."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from moejax.formats.arrays import array_bytes, slice_axis
from moejax.formats.packed import PackedTensor


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale_inv"], meta_fields=["block"])
@dataclass(frozen=True)
class Fp8Blocks(PackedTensor):
    """weight[..., o, i] = values[..., o, i] * scale_inv[..., o // block[0], i // block[1]].

    Blocks start at the corner and the last ones are partial, so the block size is stored: it cannot be derived from the
    shapes (576 rows with 5 block rows are blocks of 128, not of 116).

    values: float8_e4m3fn (..., O, I). scale_inv: float32 (..., ceil(O/block[0]), ceil(I/block[1])).
    """

    values: jax.Array
    scale_inv: jax.Array
    block: tuple[int, int] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def format_name(self) -> str:
        return f"fp8b{self.block[0]}x{self.block[1]}"

    @property
    def scale_bytes(self) -> int:
        return array_bytes(self.scale_inv)

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        outputs, inputs = self.shape[-2:]
        scale = _expand(_expand(self.scale_inv, self.block[0], outputs, -2), self.block[1], inputs, -1)
        wide = jnp.promote_types(dtype, scale.dtype)  # a scale rounded to bfloat16 would shift its whole block
        return (self.values.astype(wide) * scale.astype(wide)).astype(dtype)

    def rows(self, start: jax.Array | int, size: int) -> "Fp8Blocks":
        block_of_row = (start + jnp.arange(size)) // self.block[0]
        scale_inv = jnp.take(self.scale_inv, block_of_row, axis=-2, mode="clip")
        return Fp8Blocks(slice_axis(self.values, start, size, self.ndim - 2), scale_inv, (1, self.block[1]))

    def take(self, index: jax.Array) -> "Fp8Blocks":
        return Fp8Blocks(self.values[index], self.scale_inv[index // self.block[0]], (1, self.block[1]))

    def reshape_outputs(self, *shape: int) -> "Fp8Blocks":
        """Raises ValueError where a matrix's rows are no whole number of blocks, unless they stay together."""
        together = shape[-1] == self.shape[-2]
        if not together and (self.shape[-2] % self.block[0] or shape[-1] % self.block[0]):
            raise ValueError(
                f"rows {self.shape[:-1]} cannot become {shape}: they would split {self.format_name} blocks"
            )
        block_rows = -(-shape[-1] // self.block[0])
        scale_inv = self.scale_inv.reshape(*shape[:-1], block_rows, self.scale_inv.shape[-1])
        return Fp8Blocks(self.values.reshape(*shape, self.shape[-1]), scale_inv, self.block)


def _expand(scale: jax.Array, block: int, length: int, axis: int) -> jax.Array:
    """One scale an element along `axis`, the last block cut at `length`."""
    repeated = jnp.repeat(scale, block, axis=axis)
    return jax.lax.slice_in_dim(repeated, 0, length, axis=axis % scale.ndim)

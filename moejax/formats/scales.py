"""How the scale of a group is stored: as a bfloat16, or as an unsigned float of eight bits, "e8".

With e8, a byte u = 8 e + m of five bits of exponent and three of mantissa stands for

    0 if u = 0, else (1 + m/8) * 2^(e - 28)

UE5M3, as proposed for blocks of four-bit floats, but without subnormal numbers. Its 32 binades end at 15: scales of
weights lie between 2^-24 (small ones at 8 bits) and 4 (large ones at 1 bit, with gains of norms folded in). Above, a
scale is clamped, and its whole group is lost; below 2^-28 weights are too small to matter.

Every value is a bfloat16 too, one whose bits are u << 4 plus the difference of the exponents' biases.
"""

from typing import Literal

import jax
import jax.numpy as jnp

ScaleKind = Literal["bf16", "e8"]

# What it appends to the names of formats, and what arrays hold.
SUFFIXES: dict[ScaleKind, str] = {"bf16": "", "e8": "e8"}
DTYPES: dict[ScaleKind, jnp.dtype] = {"bf16": jnp.dtype(jnp.bfloat16), "e8": jnp.dtype(jnp.uint8)}

_BIAS, _MANTISSA_BITS = 28, 3
_FLOAT32_BIAS, _FLOAT32_MANTISSA_BITS = 127, 23
_SHIFT = _FLOAT32_MANTISSA_BITS - _MANTISSA_BITS
_SMALLEST = (1 + 2.0**-_MANTISSA_BITS) * 2.0**-_BIAS  # but for 0


def kind_of(stored: jax.Array) -> ScaleKind:
    """What stored scales are, concrete or abstract, by their dtype."""
    return "e8" if stored.dtype == DTYPES["e8"] else "bf16"


def encode_scales(scale: jax.Array, kind: ScaleKind) -> jax.Array:
    """Each scale as it is stored: the nearest that there is, 0 for less than 0 and the largest for more, with e8."""
    if kind == "bf16":
        return scale.astype(DTYPES[kind])
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.int32)
    rounded = (bits + (1 << (_SHIFT - 1))) >> _SHIFT  # a carry out of the mantissa is the next binade
    code = jnp.clip(rounded - ((_FLOAT32_BIAS - _BIAS) << _MANTISSA_BITS), 1, 255)
    return jnp.where(scale < _SMALLEST / 2, 0, code).astype(DTYPES[kind])


def decode_scales(stored: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The inverse of `encode_scales`."""
    if kind_of(stored) == "bf16":
        return stored.astype(dtype)
    code = stored.astype(jnp.int32)
    bits = (code << _SHIFT) + ((_FLOAT32_BIAS - _BIAS) << _FLOAT32_MANTISSA_BITS)
    return jnp.where(code == 0, 0, jax.lax.bitcast_convert_type(bits, jnp.float32)).astype(dtype)


def as_stored(scale: jax.Array, kind: ScaleKind) -> jax.Array:
    """Each scale as it will be read again, in float32: codes are chosen under these."""
    return decode_scales(encode_scales(scale, kind), jnp.float32)

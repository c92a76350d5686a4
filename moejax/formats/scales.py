"""How the scale of a group is stored: as a bfloat16, as an unsigned float of eight bits, "e8", or as a float16.

With e8, a byte u = 8 e + m of five bits of exponent and three of mantissa stands for

    0 if u = 0, else (1 + m/8) * 2^(e - 28)

UE5M3, as proposed for blocks of four-bit floats, but without subnormal numbers. Its 32 binades end at 15: scales of
weights lie between 2^-24 (small ones at 8 bits) and 4 (large ones at 1 bit, with gains of norms folded in). Above, a
scale is clamped, and its whole group is lost; below 2^-28 weights are too small to matter.

Every value is a bfloat16 too, one whose bits are u << 4 plus the difference of the exponents' biases.

Float16, of either sign, is there to hold what others have rounded. TPUs compute in no float16, so that its bits are
kept and made a float32 by integers.
"""

from typing import Literal

import jax
import jax.numpy as jnp

ScaleKind = Literal["bf16", "e8", "f16"]

# What it appends to the names of formats, and what arrays hold.
SUFFIXES: dict[ScaleKind, str] = {"bf16": "", "e8": "e8", "f16": "f16"}
DTYPES: dict[ScaleKind, jnp.dtype] = {
    "bf16": jnp.dtype(jnp.bfloat16),
    "e8": jnp.dtype(jnp.uint8),
    "f16": jnp.dtype(jnp.uint16),
}

_BIAS, _MANTISSA_BITS = 28, 3
_FLOAT32_BIAS, _FLOAT32_MANTISSA_BITS = 127, 23
_SHIFT = _FLOAT32_MANTISSA_BITS - _MANTISSA_BITS
_FLOAT16_BIAS, _FLOAT16_MANTISSA_BITS, _FLOAT16_MAX = 15, 10, 65504.0
_SMALLEST = (1 + 2.0**-_MANTISSA_BITS) * 2.0**-_BIAS  # but for 0


def kind_of(stored: jax.Array) -> ScaleKind:
    """What stored scales are, concrete or abstract, by their dtype."""
    return next(kind for kind, dtype in DTYPES.items() if stored.dtype == dtype)


def encode_scales(scale: jax.Array, kind: ScaleKind) -> jax.Array:
    """Each scale as it is stored: the nearest that there is, 0 for less than 0 and the largest for more, with e8."""
    if kind == "bf16":
        return scale.astype(DTYPES[kind])
    if kind == "f16":
        return jax.lax.bitcast_convert_type(
            jnp.clip(scale, -_FLOAT16_MAX, _FLOAT16_MAX).astype(jnp.float16), DTYPES[kind]
        )
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.int32)
    rounded = (bits + (1 << (_SHIFT - 1))) >> _SHIFT  # a carry out of the mantissa is the next binade
    code = jnp.clip(rounded - ((_FLOAT32_BIAS - _BIAS) << _MANTISSA_BITS), 1, 255)
    return jnp.where(scale < _SMALLEST / 2, 0, code).astype(DTYPES[kind])


def decode_scales(stored: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The inverse of `encode_scales`."""
    kind = kind_of(stored)
    if kind == "bf16":
        return stored.astype(dtype)
    if kind == "f16":
        return _float16(stored).astype(dtype)
    code = stored.astype(jnp.int32)
    bits = (code << _SHIFT) + ((_FLOAT32_BIAS - _BIAS) << _FLOAT32_MANTISSA_BITS)
    return jnp.where(code == 0, 0, jax.lax.bitcast_convert_type(bits, jnp.float32)).astype(dtype)


def _float16(bits: jax.Array) -> jax.Array:
    """The numbers whose bits as float16 these are, in float32."""
    code = bits.astype(jnp.int32)
    unsigned = (code & 0x7FFF) << (_FLOAT32_MANTISSA_BITS - _FLOAT16_MANTISSA_BITS)
    normal = jax.lax.bitcast_convert_type(
        unsigned + ((_FLOAT32_BIAS - _FLOAT16_BIAS) << _FLOAT32_MANTISSA_BITS), jnp.float32
    )
    subnormal = (code & 0x3FF).astype(jnp.float32) * 2.0 ** (1 - _FLOAT16_BIAS - _FLOAT16_MANTISSA_BITS)
    size = jnp.where((code & 0x7C00) != 0, normal, subnormal)
    return jnp.where((code & 0x8000) != 0, -size, size)


def as_stored(scale: jax.Array, kind: ScaleKind) -> jax.Array:
    """Each scale as it will be read again, in float32: codes are chosen under these."""
    return decode_scales(encode_scales(scale, kind), jnp.float32)

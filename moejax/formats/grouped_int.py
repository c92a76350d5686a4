"""Integers in groups along the input axis, one scale a group: of 1 to 8 bits about zero, of 4 and 8 with a sign."""

import re
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Self

import jax

from moejax.formats import planar
from moejax.formats.group_format import GroupFormat, parse_groups
from moejax.formats.grouped import GroupedCodes, Levels, about_zero
from moejax.formats.scales import SUFFIXES, ScaleKind


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scale"],
    meta_fields=["bits", "group_size", "inputs", "is_signed"],
)
@dataclass(frozen=True)
class GroupedInt(GroupedCodes):
    """weight[..., o, i] = (code[..., o, i] - zero) * scale[..., o, i // group_size].

    zero = (2^bits - 1)/2, so that no level is zero: at 1 bit -+s/2, at 2 bits -+s/2 and -+3s/2. Signed, it is
    2^(bits-1), and weights are the integers -2^(bits-1) to 2^(bits-1) - 1 times their scale.

    words: uint32 (..., O, `planar.words_per_row`), planar (see `planar`).
    scale: (..., O, ceil(I/group_size)), see `scales`.
    """

    words: jax.Array
    scale: jax.Array
    bits: int = field(metadata={"static": True})
    group_size: int = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    is_signed: bool = field(default=False, metadata={"static": True})

    @property
    def levels(self) -> Levels:
        return _levels(self.bits, self.is_signed)

    @property
    def format_name(self) -> str:
        return _name(self)

    def codes(self) -> jax.Array:
        return planar.unpack(self.words, self.bits, self.inputs)

    @property
    def padding_bytes(self) -> int:
        return self.num_rows * (planar.padded(self.inputs, self.bits) - self.inputs) * self.bits // 8


@dataclass(frozen=True)
class IntFormat(GroupFormat):
    """Integers of `bits` bits about zero with one scale for every `group_size` inputs.

    Its name is `int<bits>g<group_size>`, with `e8` behind it where scales have eight bits.
    """

    accepted: ClassVar[str] = "int<1 to 8>g<32, 64, 128 or 256>, such as int3g64, with e8 behind it for 8-bit scales"
    is_signed: ClassVar[bool] = False

    bits: int
    group_size: int
    scale_kind: ScaleKind = "bf16"

    @property
    def name(self) -> str:
        return _name(self)

    @property
    def levels(self) -> Levels:
        return _levels(self.bits, self.is_signed)

    def words_per_row(self, inputs: int) -> int:
        return planar.words_per_row(inputs, self.bits)

    def pack(self, codes: jax.Array) -> jax.Array:
        return planar.pack(codes, self.bits)

    def leaf(self, words: jax.Array, scale: jax.Array, inputs: int) -> GroupedInt:
        return GroupedInt(words, scale, self.bits, self.group_size, inputs, self.is_signed)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"int([1-8])(g.*)", name)
        groups = parse_groups(match[2]) if match else None
        return cls(int(match[1]), *groups) if match and groups and groups[1] != "f16" else None


@dataclass(frozen=True)
class SignedIntFormat(IntFormat):
    """Integers of 4 or 8 bits with their sign, one scale for every 32 or 128 inputs: what GGUF's Q4_0 and Q8_0 (groups
    of 32, scales in float16, of either sign) and compressed-tensors' symmetric integers (scales in bfloat16) hold,
    weight for weight.

    Its name is `sint<bits>g<group_size>`, with `f16` behind it where scales are float16.
    """

    accepted: ClassVar[str] = "sint<4 or 8>g<32 or 128>, such as sint4g32, with f16 behind it for float16 scales"
    is_signed: ClassVar[bool] = True

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"sint([48])(g(?:32|128)(?!\d).*)", name)
        groups = parse_groups(match[2]) if match else None
        return cls(int(match[1]), *groups) if match and groups and groups[1] != "e8" else None


def _name(of: GroupedInt | IntFormat) -> str:
    return f"{'s' * of.is_signed}int{of.bits}g{of.group_size}{SUFFIXES[of.scale_kind]}"


def _levels(bits: int, is_signed: bool) -> Levels:
    return Levels(2**bits - 1, 2 ** (bits - 1)) if is_signed else about_zero(2**bits)

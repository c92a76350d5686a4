"""Integers of 1 to 8 bits in groups along the input axis, one scale a group."""

from dataclasses import dataclass, field
from functools import partial

import jax

from moejax.formats import planar
from moejax.formats.grouped import GroupedCodes
from moejax.formats.scales import SUFFIXES


@partial(jax.tree_util.register_dataclass, data_fields=["words", "scale"], meta_fields=["bits", "group_size", "inputs"])
@dataclass(frozen=True)
class GroupedInt(GroupedCodes):
    """weight[..., o, i] = (code[..., o, i] - (2^bits - 1)/2) * scale[..., o, i // group_size].

    No level is zero: at 1 bit -+s/2, at 2 bits -+s/2 and -+3s/2.

    words: uint32 (..., O, `planar.words_per_row`), planar (see `planar`).
    scale: bfloat16 or uint8 (..., O, ceil(I/group_size)).
    """

    words: jax.Array
    scale: jax.Array
    bits: int = field(metadata={"static": True})
    group_size: int = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def format_name(self) -> str:
        return f"int{self.bits}g{self.group_size}{SUFFIXES[self.scale_kind]}"

    def codes(self) -> jax.Array:
        return planar.unpack(self.words, self.bits, self.inputs)

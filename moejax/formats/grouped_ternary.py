"""Ternary weights in groups along the input axis, one scale a group."""

from dataclasses import dataclass, field
from functools import partial

import jax

from moejax.formats import trits
from moejax.formats.grouped import GroupedCodes
from moejax.formats.scales import SUFFIXES


@partial(jax.tree_util.register_dataclass, data_fields=["words", "scale"], meta_fields=["group_size", "inputs"])
@dataclass(frozen=True)
class GroupedTernary(GroupedCodes):
    """weight[..., o, i] = (code[..., o, i] - 1) * scale[..., o, i // group_size]: -s, 0 or s.

    words: uint32 (..., O, ceil(I/20)), planar (see `trits`).
    scale: bfloat16 or uint8 (..., O, ceil(I/group_size)).
    """

    words: jax.Array
    scale: jax.Array
    group_size: int = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})

    @property
    def levels(self) -> int:
        return 3

    @property
    def format_name(self) -> str:
        return f"ternaryg{self.group_size}{SUFFIXES[self.scale_kind]}"

    def codes(self) -> jax.Array:
        return trits.unpack(self.words, self.inputs)

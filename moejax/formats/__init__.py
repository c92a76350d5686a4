"""What a packed weight is: bit layout, pack and unpack, exact bytes. Nothing outside this folder knows bit layouts."""

from moejax.formats.dense import Leaf, dense, format_name, matrix, payload_bytes, reshape_outputs, rows, take_rows
from moejax.formats.experts import ExpertWeights, gather_experts, select_experts
from moejax.formats.fp8_blocks import Fp8Blocks
from moejax.formats.grouped_int import GroupedInt
from moejax.formats.packed import PackedTensor
from moejax.formats.spec import IntFormat, abstract_experts, abstract_leaf, describe, parse_int_format

__all__ = [
    "ExpertWeights",
    "Fp8Blocks",
    "GroupedInt",
    "IntFormat",
    "Leaf",
    "PackedTensor",
    "abstract_experts",
    "abstract_leaf",
    "dense",
    "describe",
    "format_name",
    "gather_experts",
    "matrix",
    "parse_int_format",
    "payload_bytes",
    "reshape_outputs",
    "rows",
    "select_experts",
    "take_rows",
]

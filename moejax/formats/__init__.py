"""What a packed weight is: bit layout, pack and unpack, exact bytes. Nothing outside this folder knows bit layouts."""

from moejax.formats.dense import (
    Leaf,
    dense,
    format_name,
    matrix,
    payload_bytes,
    reshape_outputs,
    row_parts,
    rows,
    take_rows,
)
from moejax.formats.experts import ExpertWeights, experts_in_buckets, gather_experts, select_experts
from moejax.formats.fp8_blocks import Fp8Blocks
from moejax.formats.group_format import GroupFormat, IntFormat, TernaryFormat, parse_group_format
from moejax.formats.grouped import GroupedCodes
from moejax.formats.grouped_int import GroupedInt
from moejax.formats.grouped_ternary import GroupedTernary
from moejax.formats.packed import PackedTensor
from moejax.formats.parts import ByteParts, byte_parts
from moejax.formats.scales import ScaleKind
from moejax.formats.spec import abstract_experts, abstract_leaf, describe

__all__ = [
    "ByteParts",
    "ExpertWeights",
    "Fp8Blocks",
    "GroupFormat",
    "GroupedCodes",
    "GroupedInt",
    "GroupedTernary",
    "IntFormat",
    "Leaf",
    "PackedTensor",
    "ScaleKind",
    "TernaryFormat",
    "abstract_experts",
    "abstract_leaf",
    "byte_parts",
    "dense",
    "describe",
    "experts_in_buckets",
    "format_name",
    "gather_experts",
    "matrix",
    "parse_group_format",
    "payload_bytes",
    "reshape_outputs",
    "row_parts",
    "rows",
    "select_experts",
    "take_rows",
]

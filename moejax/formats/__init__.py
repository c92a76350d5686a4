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
from moejax.formats.families import parse_format
from moejax.formats.format import Format
from moejax.formats.fp8_blocks import Fp8Blocks
from moejax.formats.group_format import GroupFormat
from moejax.formats.grouped import GroupedCodes, Levels
from moejax.formats.grouped_int import GroupedInt, IntFormat, SignedIntFormat
from moejax.formats.grouped_ternary import GroupedTernary, TernaryFormat
from moejax.formats.packed import PackedTensor
from moejax.formats.parts import ByteParts, byte_parts
from moejax.formats.scales import ScaleKind
from moejax.formats.spec import abstract_experts, abstract_leaf, describe

__all__ = [
    "ByteParts",
    "ExpertWeights",
    "Format",
    "Fp8Blocks",
    "GroupFormat",
    "GroupedCodes",
    "GroupedInt",
    "GroupedTernary",
    "IntFormat",
    "Leaf",
    "Levels",
    "PackedTensor",
    "ScaleKind",
    "SignedIntFormat",
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
    "parse_format",
    "payload_bytes",
    "reshape_outputs",
    "row_parts",
    "rows",
    "select_experts",
    "take_rows",
]

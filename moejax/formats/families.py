"""The families of formats that weights are rounded to, by what their names begin with."""

from collections.abc import Mapping
from types import MappingProxyType

from moejax.errors import InputError
from moejax.formats.format import Format
from moejax.formats.grouped_int import IntFormat, SignedIntFormat
from moejax.formats.grouped_ternary import TernaryFormat

FAMILIES: Mapping[str, type[Format]] = MappingProxyType(
    {"int": IntFormat, "sint": SignedIntFormat, "ternary": TernaryFormat}
)


def parse_format(name: str) -> Format:
    """`int3g64` to IntFormat(3, 64), `ternaryg128e8` to TernaryFormat(128, "e8")."""
    for prefix, family in FAMILIES.items():
        if name.startswith(prefix) and (found := family.parse(name)) is not None:
            return found
    accepted = "; or ".join(family.accepted for family in FAMILIES.values())
    raise InputError(f"unknown format {name!r}: a format is {accepted}")

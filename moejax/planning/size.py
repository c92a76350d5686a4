"""Sizes as users write them."""

import re
from fractions import Fraction

from moejax.errors import InputError

_UNITS = {"b": 1} | {
    prefix + suffix: base ** (n + 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
    for n, prefix in enumerate("kmgtpe")
}
_NUMBER = r"([0-9]{1,20}(?:\.[0-9]{1,20})?|\.[0-9]{1,20})"


def parse_size(text: str) -> int:
    """Bytes of `103GB` (10^9), `96GiB` (2^30), `1.5MB`, `4096B`; case of the unit does not matter."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([a-zA-Z]+)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise InputError(f"{text!r} is no size; accepted are sizes such as 103GB, 96GiB or 1.5MB")
    # Not a float, in which 1.001 KB would be 1000 bytes.
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])


def parse_budget(text: str, elements: int) -> int:
    """Bytes of a size, or of `6x`: two bytes for each of `elements`, divided by 6."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*[xX]\s*", text)
    if not match:
        try:
            return parse_size(text)
        except InputError:
            raise InputError(f"{text!r} is no budget; accepted are sizes such as 103GB and ratios such as 6x") from None
    ratio = Fraction(match[1])
    if ratio == 0:
        raise InputError(f"{text!r} is no budget; a ratio must be above 0")
    return int(2 * elements / ratio)


def format_size(size: int) -> str:
    """`10.12 MB`, in powers of ten."""
    value, unit = float(size), "B"
    for unit in ("B", "KB", "MB", "GB", "TB", "PB"):
        if value < 1000 or unit == "PB":
            break
        value /= 1000
    return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"

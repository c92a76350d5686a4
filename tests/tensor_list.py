"""The tensors of a large checkpoint in a few rows, as `tools/list_tensors.py` writes them under `tests/golden`."""

import itertools
import re
from collections.abc import Iterable
from typing import Any


def expand(rows: Iterable[list[Any]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name to shape and safetensors' dtype, of rows [pattern, shape, dtype] whose ranges `{3-61}` include both ends."""
    return {name: (tuple(shape), dtype) for pattern, shape, dtype in rows for name in _names(pattern)}


def _names(pattern: str) -> Iterable[str]:
    parts = re.split(r"\{(\d+)-(\d+)\}", pattern)
    ranges = [range(int(first), int(last) + 1) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    return ("{}".join(parts[::3]).format(*numbers) for numbers in itertools.product(*ranges))

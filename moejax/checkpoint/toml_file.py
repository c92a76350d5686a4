"""TOML from files that may be missing, damaged or huge, and to files."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from moejax.checkpoint.atomic import write_text
from moejax.checkpoint.json_file import read_bounded
from moejax.errors import InputError

MAX_TOML_BYTES = 10_000_000
"""The largest TOML text read, in bytes; the plan of a 671B checkpoint takes 100 thousand."""


def read_toml(file: Path) -> dict[str, Any]:
    """Reads `file`. Raises InputError if it cannot be read, is larger than `MAX_TOML_BYTES`, or is no TOML."""
    content = read_bounded(file, MAX_TOML_BYTES, "TOML")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # ValueError includes wrong UTF-8
        raise InputError(f"{file}: is not valid TOML ({error}); a TOML file is needed") from error


def write_toml(file: Path, values: Mapping[str, Any]) -> None:
    """Writes `file`, whole or not at all."""
    write_text(file, tomli_w.dumps(values))

"""JSON objects, and bytes, from files that may be missing, damaged or huge."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from moejax.errors import InputError

MAX_JSON_BYTES = 100_000_000
"""The largest JSON text read, in bytes; the tensor index of a 671B checkpoint takes 9 million."""


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads `file` as one JSON object.

    Raises InputError if the file cannot be read, is larger than `MAX_JSON_BYTES`, or is no JSON object.
    """
    return parse_json_object(read_bounded(file, MAX_JSON_BYTES, "JSON"), file)


def read_bounded(file: Path, most: int, kind: str) -> bytes:
    """Reads `file`. Raises InputError, naming its `kind`, if it cannot be read or has more than `most` bytes."""
    try:
        size = file.stat().st_size
        if size > most:
            raise InputError(f"{file}: {size} bytes of {kind} are more than the {most} that are accepted")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); a readable {kind} file is needed") from error


def parse_json_object(text: bytes, file: Path) -> dict[str, Any]:
    """Parses `text`, found in `file`, as one JSON object in which no object has a key twice; else raises InputError."""
    try:
        value = json.loads(text, object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError includes wrong UTF-8
        raise InputError(f"{file}: is not valid JSON ({error}); a JSON object is needed") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds a JSON {type(value).__name__} where a JSON object is needed")
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds one JSON object; of a key that stands there twice, readers pick different values, so it is refused."""
    result = dict(pairs)
    if len(result) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands twice in one object")
    return result

"""JSON objects, and bytes, from files that may be missing, damaged, huge, or no files at all."""

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from moejax.errors import InputError, brief

MAX_JSON_BYTES = 64_000_000
"""The largest JSON text read, in bytes; the tensor index of a 671B checkpoint takes 9 million."""

MAX_JSON_VALUES = 1_000_000
"""The most values a JSON text may hold: parsed, one takes up to 300 bytes, and the text of one can be 3 bytes long.

A safetensors header has 8 for a tensor and an index has 1; the whole of a 671B checkpoint has 91 thousand tensors.
"""


POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS left in place of the real one (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads `file` as one JSON object.

    Raises InputError if it is no regular file, cannot be read, or holds no JSON object as `parse_json_object` needs it.
    """
    return parse_json_object(read_bounded(file, MAX_JSON_BYTES, "JSON"), file)


def read_bounded(file: Path, most: int, kind: str) -> bytes:
    """Reads `file`. Raises InputError, naming its `kind`, if it cannot be read, has more than `most` bytes, or is what
    Git LFS puts in its place.

    Only regular files, and links to them, are opened: a pipe would wait for a writer, a device may never end.
    """
    try:
        status = file.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise InputError(f"{file}: is a pipe, socket or device; a readable {kind} file is needed")
        if status.st_size > most:
            raise InputError(f"{file}: {status.st_size} bytes of {kind} are more than the {most} that are accepted")
        with file.open("rb") as stream:
            content = stream.read(status.st_size)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); a readable {kind} file is needed") from error
    refuse_pointer(content, file)
    return content


def refuse_pointer(content: bytes, file: Path) -> None:
    """Raises InputError if what `file` begins with is a pointer of Git LFS."""
    if content.startswith(POINTER):
        raise InputError(
            f"{file}: is a Git LFS pointer in place of the file itself; `git lfs pull` in its folder fetches it"
        )


def parse_json_object(text: bytes, file: Path) -> dict[str, Any]:
    """Parses `text`, found in `file`, as one JSON object in which no object has a key twice; else raises InputError.

    So it does for text of more than `MAX_JSON_VALUES` values, before it is parsed.
    """
    # Every value but the first of its object or list follows a comma; commas and brackets within strings count too.
    values = 1 + sum(map(text.count, (b",", b"[", b"{")))
    if values > MAX_JSON_VALUES:
        raise InputError(f"{file}: up to {values} values of JSON are more than the {MAX_JSON_VALUES} that are accepted")
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
        raise ValueError(f"the key {brief(key)} stands twice in one object")
    return result

"""Which items of a folder are finished, in a file of JSON lines beside them: for the same job, run again.

{"job": "..."}                                                    whose journal it is
{"item": "layer_3", "checksums": {"input_norm": "89abcdef"}}      for every item, once it is on the disk
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.checkpoint.atomic import sync


@dataclass(frozen=True)
class Journal:
    """The file that one job, which a text names, adds a line to whenever an item is finished."""

    file: Path
    job: str

    def finished(self) -> dict[str, dict[str, str]]:
        """The items that are finished, and their arrays' checksums: none if there is no file, or another job's."""
        first, *others = self.file.read_bytes().split(b"\n") if self.file.is_file() else [b""]
        items: dict[str, dict[str, str]] = {}
        if _parsed(first) == {"job": self.job}:
            for line in others:
                match _parsed(line):
                    case {"item": str(item), "checksums": dict(checksums)}:
                        items[item] = checksums
        return items

    def add(self, item: str, checksums: Mapping[str, str]) -> None:
        """Note that an item is finished. When this returns, the line is on the disk."""
        line = "\n" + json.dumps({"item": item, "checksums": checksums})
        with self.file.open("ab") as stream:  # a line break comes first: after a line that was cut short, it ends that
            stream.write(((json.dumps({"job": self.job}) if stream.tell() == 0 else "") + line).encode())
        sync(self.file)
        sync(self.file.parent)


def _parsed(line: bytes) -> Any:
    """What stands in a line, or None if a process was killed while it wrote it."""
    try:
        return json.loads(line)
    except ValueError:
        return None

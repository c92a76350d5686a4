"""What a job has finished, in a file of JSON lines: for the same job, run again.

{"job": "..."}                      whose journal it is
{"name": "layer_3", "value": ...}   for everything that is finished, once it is on the disk
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.checkpoint.atomic import sync


@dataclass(frozen=True)
class Journal:
    """The file that one job, which a text names, adds a line to whenever something is finished."""

    file: Path
    job: str

    def whose(self) -> str | None:
        """The job whose journal the file is; None if it is none's yet."""
        match self._lines()[0]:
            case {"job": str(job)}:
                return job
        return None

    def finished(self) -> dict[str, Any]:
        """What is finished, by name, as it was added: nothing if there is no file, or it is another job's."""
        values: dict[str, Any] = {}
        first, *others = self._lines()
        if first == {"job": self.job}:
            for line in others:
                match line:
                    case {"name": str(name), "value": value}:
                        values[name] = value
        return values

    def add(self, name: str, value: Any) -> None:
        """Note that something is finished, with a value that JSON can hold. When this returns, the line is on the
        disk."""
        line = "\n" + json.dumps({"name": name, "value": value}, allow_nan=False)
        with self.file.open("ab") as stream:  # a line break comes first: after a line that was cut short, it ends that
            stream.write(((json.dumps({"job": self.job}) if stream.tell() == 0 else "") + line).encode())
        sync(self.file)
        sync(self.file.parent)

    def _lines(self) -> list[Any]:
        """At least one; None where a process was killed while it wrote."""
        return [_parsed(line) for line in (self.file.read_bytes() if self.file.is_file() else b"").split(b"\n")]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None

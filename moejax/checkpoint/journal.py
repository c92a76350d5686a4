"""What a job has finished, in a file of JSON lines: for the same job, run again.

{"job": "..."}                      whose journal it is
{"name": "layer_3", "value": ...}   for everything that is finished, once it is on the disk
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.checkpoint.atomic import naming, sync


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

    def begin(self) -> None:
        """Make it this job's journal, with nothing finished."""
        self._write("wb", json.dumps({"job": self.job}))

    def add(self, name: str, value: Any) -> None:
        """Note that something is finished, with a value that JSON can hold; the journal has been begun. When this
        returns, the line is on the disk. Raises ValueError for numbers that are not finite."""
        line = json.dumps({"name": name, "value": value}, allow_nan=False)
        self._write("ab", "\n" + line)  # the line break comes first: it ends a line that was cut short

    def _write(self, mode: str, text: str) -> None:
        with naming(self.file):
            with self.file.open(mode) as stream:
                stream.write(text.encode())
            sync(self.file)
            sync(self.file.parent)

    def _lines(self) -> list[Any]:
        """At least one; None where a process was killed while it wrote."""
        return [_parsed(line) for line in (self.file.read_bytes() if self.file.is_file() else b"").split(b"\n")]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

"""Two processes that run a command together."""

import os
import socket
import subprocess
import sys
from pathlib import Path


class Processes:
    """Two of so many devices each, which run a program together; each has its output in a file of its own."""

    def __init__(self, folder: Path, devices: int = 4) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.folder = folder
        self.join = [f"coordinator=127.0.0.1:{port},processes=2,process={k}" for k in (0, 1)]
        # As a shell has it: without what JAX has set in the tests' own process.
        own = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
        self.environment = own | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}

    def start(self, number: int, *words: object) -> subprocess.Popen[bytes]:
        with (self.folder / f"out{number}").open("wb") as out, (self.folder / f"err{number}").open("wb") as err:
            return subprocess.Popen([sys.executable, *map(str, words)], stdout=out, stderr=err, env=self.environment)

    def run(self, *arguments: object) -> list[int]:
        """The exit codes of a command that both run."""
        started = [self.start(n, "-m", "moejax", *arguments, "--distributed", join) for n, join in enumerate(self.join)]
        return [own.wait(timeout=300) for own in started]

    def said(self, number: int) -> tuple[str, str]:
        out, err = ((self.folder / f"{kind}{number}").read_text() for kind in ("out", "err"))
        return out, err

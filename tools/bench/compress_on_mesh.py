"""A checkpoint compressed by one device, by several of one process, and by as many processes.

    python tools/bench/compress_on_mesh.py CHECKPOINT FOLDER [--devices 2] [--port 12345] -- OPTIONS OF moejax compress

Prints the seconds of every phase, and whether the files are those of one device. On GPUs every process has one by
`CUDA_VISIBLE_DEVICES`; of a CPU, every process has so many by `XLA_FLAGS`, since the order of sums depends on them.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--port", type=int, default=12345)
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, given = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    options.folder.mkdir(parents=True, exist_ok=True)
    count = options.devices
    mesh = ["--mesh", f"tensor={count}"]
    of_all = ["--mesh", f"tensor={count**2 if jax.default_backend() == 'cpu' else count}"]
    joins = [f"coordinator=127.0.0.1:{options.port},processes={count},process={n}" for n in range(count)]
    runs: dict[str, list[list[str]]] = {
        "one": [[]],
        f"{count} devices": [mesh],
        f"{count} processes": [[*of_all, "--distributed", join] for join in joins],
    }
    first = None
    for name, each in runs.items():
        output = options.folder / name.replace(" ", "-")
        seconds = compressed(options.checkpoint, output, given, each, count)
        first = first or output
        phases = ", ".join(f"{phase} {took:.0f} s" for phase, took in seconds.items())
        print(f"{name}: {phases}; {'the same files' if same(first, output) else 'OTHER FILES'}", flush=True)


def compressed(checkpoint: Path, output: Path, given: list[str], runs: list[list[str]], count: int) -> dict[str, float]:
    """Seconds by phase of processes that compress together."""
    shutil.rmtree(output, ignore_errors=True)
    told = output.with_suffix(".json")
    command = [sys.executable, "-m", "moejax", "compress", str(checkpoint), "--output", str(output), *given]
    started = [
        subprocess.Popen(
            [*command, "--json", str(told), *own],
            env=environment(n if len(runs) > 1 else None, count),
            stdout=subprocess.DEVNULL,
        )
        for n, own in enumerate(runs)
    ]
    if any([own.wait() for own in started]):
        sys.exit(f"{' '.join(command)} failed")
    figures: dict[str, Any] = json.loads(told.read_text())
    return {**figures["seconds_by_phase"], "all": figures["seconds"]}


def environment(device: int | None, count: int) -> dict[str, str]:
    """Of a process that has all devices, or of a CPU as many, or one."""
    if jax.default_backend() == "cpu":
        return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    return {**os.environ} if device is None else os.environ | {"CUDA_VISIBLE_DEVICES": str(device)}


def same(one: Path, other: Path) -> bool:
    names = [{file.relative_to(own) for file in own.rglob("*") if file.is_file()} for own in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


if __name__ == "__main__":
    main()

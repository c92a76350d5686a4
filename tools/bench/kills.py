"""A job that is stopped again and again ends in the bytes of one that was not.

usage: python tools/bench/kills.py [CHECKPOINT] --folder DIR [--budget 6x] [--kills 50] [--seed 0] [--full-disk]
           [-- MORE OPTIONS]

`moejax compress --work` is started, killed by SIGKILL at a random moment of what a run takes, and started again, until
so many kills have hit; a run that comes to its end first is compared, and the next begins anew. Prints every kill, what
the run after it took over, and whether all folders were equal. With JAX_COMPILATION_CACHE_DIR set, JAX compiles once.

With `--full-disk` no run is killed: the file system of DIR is filled up, and emptied again once the run has ended. Give
it a small one of its own, such as `mount -t tmpfs -o size=300M tmpfs DIR`.
"""

import argparse
import filecmp
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# With which a failure of the machine ends.
FAILED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--budget", default="6x")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-disk", action="store_true")
    own, more = split_at_dashes(sys.argv[1:])
    options = parser.parse_args(own, argparse.Namespace(more=more))
    options.folder.mkdir(parents=True, exist_ok=True)
    whole, output, work = (options.folder / name for name in ("whole", "out", "work"))
    started = time.monotonic()
    subprocess.run(command(options, whole), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    takes = time.monotonic() - started
    print(f"a run takes {takes:.1f} s", flush=True)
    moments, hits, runs = random.Random(options.seed), 0, 0
    while hits < options.kills:
        runs += 1
        stop = partial(fill_disk, options.folder / "ballast") if options.full_disk else subprocess.Popen.kill
        told, stopped = run_until(command(options, output, "--work", work), moments.uniform(0, takes), stop)
        hits += stopped
        stopped = stopped and not output.exists()  # what is stopped behind that has its figures alone to tell
        print(f"run {runs}: {'stopped' if stopped else 'done'}; {'; '.join(told) or 'nothing taken over'}", flush=True)
        if not stopped:
            compare(whole, output)
            shutil.rmtree(work)
            shutil.rmtree(output)
    subprocess.run(command(options, output, "--work", work), check=True, stdout=subprocess.DEVNULL)
    compare(whole, output)
    print(f"stopped {hits} times in {runs} runs; every folder that was finished is equal to the first")


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Those of this program, and those for every run."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def command(options: argparse.Namespace, output: Path, *more: object) -> list[str]:
    given = [] if options.checkpoint is None else [options.checkpoint]
    fixed = [*given, "--budget", options.budget, "--output", output, *more, *options.more]
    return [sys.executable, "-m", "moejax", "compress", *map(str, fixed)]


def run_until(
    command: list[str], seconds: float, stop: Callable[[subprocess.Popen[str]], object]
) -> tuple[list[str], bool]:
    """What a run says that it takes over, and by which sentence it ended if it did before its time; whether it was
    stopped."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, told = process.communicate(timeout=seconds)
        if process.returncode:
            sys.exit(f"a run failed: {told}")
    except subprocess.TimeoutExpired:
        stop(process)
        _, told = process.communicate()
    lines = told.splitlines()
    sentences = [line.rpartition(": ")[2] for line in lines if "taken over" in line]
    if process.returncode == FAILED:
        if not lines[-1].startswith("moejax: "):
            sys.exit(f"a run ended without a sentence: {told}")
        sentences.append(lines[-1])
    return sentences, process.returncode != 0


def fill_disk(ballast: Path, process: subprocess.Popen[str]) -> None:
    """Nothing is left of the disk until the process ends."""
    with ballast.open("wb", buffering=0) as file:
        while process.poll() is None:
            try:
                file.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.01)
    ballast.unlink()


def compare(one: Path, other: Path) -> None:
    """Ends with an error unless both folders hold the same files with the same bytes."""
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    if files != sorted(file.relative_to(other) for file in other.rglob("*") if file.is_file()):
        sys.exit(f"{other} has other files than {one}")
    _, differing, errors = filecmp.cmpfiles(one, other, map(str, files), shallow=False)
    if differing or errors:
        sys.exit(f"{other} differs from {one} in {', '.join([*differing, *errors])}")


if __name__ == "__main__":
    main()

"""What memory the machine has, and what of it this process holds."""

import os
import resource
import sys
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory() -> int:
    """What this process holds and what it can have beside: of the machine, and of every cgroup that it is in."""
    free = [_cgroup_free(group) for group in _own_cgroups()]
    machine = _fields(_PROC / "meminfo").get("MemAvailable")
    if machine is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return resident_memory() + min([machine, *(size for size in free if size is not None)])


def resident_memory() -> int:
    """What this process holds now; where the system does not tell, the most it has held."""
    own = _fields(_PROC / "self" / "status").get("VmRSS")
    return peak_memory() if own is None else own


def peak_memory() -> int:
    """The most memory that this process has held so far.

    Not `ru_maxrss` where the system has better: that begins at what the process held that started this one.
    """
    own = _fields(_PROC / "self" / "status").get("VmHWM")
    if own is not None:
        return own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _fields(file: Path) -> dict[str, int]:
    """`Name:   12 kB` lines of a file of the kernel's, in bytes; none where there is no such file."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}


def _own_cgroups() -> list[Path]:
    """This process's cgroup (version 2) and those around it; none where there are none."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    own = [_CGROUPS / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return [group for path in own for group in (path, *path.parents) if group.is_relative_to(_CGROUPS)]


def _cgroup_free(group: Path) -> int | None:
    """What a cgroup may still take, its file cache given up; None if it has no limit."""
    try:
        limit, current = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - int(current) + int(stat.get("inactive_file", 0)))

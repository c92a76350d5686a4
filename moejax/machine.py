"""What memory the machine has, what of it this process holds, and how some is given back."""

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

# Of the mappings that a process may have, before programs are forgotten: what one block compiles fits the rest.
_SHARE_OF_MAPPINGS = 0.6

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory() -> int:
    """What this process holds and what it can have beside: of the machine, and of every cgroup that it is in."""
    free = [_cgroup_free(group, files) for group, files in _own_cgroups()]
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


def accelerator_memory() -> int | None:
    """What JAX may hold of its device's own memory; None where it computes in this process's."""
    import jax  # which takes seconds, and not every command needs

    told = jax.local_devices()[0].memory_stats()
    return None if jax.default_backend() == "cpu" or told is None else told.get("bytes_limit")


def return_freed() -> None:
    """Give the system back what this process has freed: glibc keeps it, scattered over its heaps, unless asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def with_large_pages() -> None:
    """Begin the process anew, with the same arguments, so that glibc asks for pages of 2 MB where the system gives them
    on demand: it does so only if told before it begins. A block's arrays are new memory each time, a page of 4 KB of
    which takes the system a microsecond: a fifth of a large job."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


def forget_programs() -> None:
    """Drop every program that JAX has compiled: between parts of a job that share hardly any. Half a gigabyte behind
    everything that measuring compiles."""
    import jax  # which takes seconds, and not every command needs

    jax.clear_caches()
    return_freed()


def bound_programs() -> None:
    """`forget_programs` where there are so many that XLA would soon crash: one for a CPU takes about twelve mappings of
    memory, of which Linux gives a process 65,530."""
    most = _lines(_PROC / "sys" / "vm" / "max_map_count")
    if most and len(_lines(_PROC / "self" / "maps")) > _SHARE_OF_MAPPINGS * int(most[0]):
        forget_programs()


def _lines(file: Path) -> list[bytes]:
    """Those of a file of the kernel's; none where there is no such file."""
    try:
        return file.read_bytes().splitlines()
    except OSError:
        return []


def _fields(file: Path) -> dict[str, int]:
    """`Name:   12 kB` lines of a file of the kernel's, in bytes; none where there is no such file."""
    lines = [line.split() for line in _lines(file)]
    return {words[0].rstrip(b":").decode(): int(words[1]) * 1024 for words in lines if words[2:] == [b"kB"]}


@dataclass(frozen=True)
class _Files:
    """Where a version of cgroups tells what a group may hold, what it holds, and what of that is file cache that can
    be given up, of it and the groups in it."""

    limit: str
    current: str
    inactive_file: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def _own_cgroups() -> list[tuple[Path, _Files]]:
    """The cgroups that limit this process's memory and those around them, of both versions; none where there are none.

    Version 2 is mounted by itself, or as `unified` beside version 1, whose controllers have a folder each. In a
    container the mount may begin at the process's own group: then the path, as the machine sees it, is not there.
    """
    try:
        lines = [line.split(":", 2) for line in (_PROC / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        return []
    own = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:
            own += [(_CGROUPS, path, _V2), (_CGROUPS / "unified", path, _V2)]
        elif "memory" in controllers.split(","):
            own += [(_CGROUPS / "memory", path, _V1)]
    return [(group, files) for mount, path, files in own for group in _around(mount, path)]


def _around(mount: Path, path: str) -> list[Path]:
    group = mount / path.removeprefix("/")
    return [own for own in (group, *group.parents) if own.is_relative_to(mount)]


def _cgroup_free(group: Path, files: _Files) -> int | None:
    """What a cgroup may still take, its file cache given up; None if it has no limit."""
    try:
        limit, current = ((group / name).read_text().strip() for name in (files.limit, files.current))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Without a limit version 1 has the largest number of pages, which is above what any machine has.
        return None if limit == "max" else max(0, int(limit) - int(current) + int(stat.get(files.inactive_file, 0)))
    except (OSError, ValueError):
        return None

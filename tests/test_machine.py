import mmap
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moejax import machine
from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.source import CheckpointSource

MEMINFO = "MemTotal:       1000 kB\nMemFree:        100 kB\nMemAvailable:    600 kB\nHugePages_Total:       0\n"
STATUS = "Name:\tpython\nVmHWM:\t     50 kB\nVmRSS:\t     40 kB\nThreads:\t2\n"
KB = 1024


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up /proc and /sys/fs/cgroup: a cgroup two levels down, none of which has a limit."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    (tmp_path / "proc" / "self" / "status").write_text(STATUS)
    (tmp_path / "proc" / "self" / "cgroup").write_text("1:name=systemd:/x\n0::/outer/inner\n")
    write_cgroup(tmp_path / "cgroup" / "outer", "max", 0, 0)
    write_cgroup(tmp_path / "cgroup" / "outer" / "inner", "max", 0, 0)
    return tmp_path


def write_cgroup(folder: Path, limit: int | str, current: int, inactive_file: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")


def test_what_this_process_holds_and_has_held(system: Path) -> None:
    assert (machine.resident_memory(), machine.peak_memory()) == (40 * KB, 50 * KB)


def test_what_is_free_is_the_machines_without_limits(system: Path) -> None:
    assert machine.available_memory() == (600 + 40) * KB


@pytest.mark.parametrize("group", ["outer", "outer/inner"])
def test_the_tightest_cgroup_counts_and_its_file_cache_can_go(system: Path, group: str) -> None:
    write_cgroup(system / "cgroup" / group, 300 * KB, 250 * KB, 70 * KB)
    assert machine.available_memory() == (300 - 250 + 70 + 40) * KB
    write_cgroup(system / "cgroup" / group, 300 * KB, 400 * KB, 0)
    assert machine.available_memory() == 40 * KB


def write_v1_cgroup(folder: Path, limit: int, usage: int, inactive_file: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"cache 1\ninactive_file 1\ntotal_inactive_file {inactive_file}\n")


NO_LIMIT = 2**63 - 4096


@pytest.mark.parametrize("group", ["", "docker", "docker/abc"])
@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_version_1_counts_likewise(system: Path, group: str, controllers: str) -> None:
    lines = f"12:cpuset:/other\n4:{controllers}:/docker/abc\n1:name=systemd:/docker/abc\n"
    (system / "proc" / "self" / "cgroup").write_text(lines)
    for own in ("", "docker", "docker/abc"):
        write_v1_cgroup(system / "cgroup" / "memory" / own, NO_LIMIT, 100 * KB, 0)
    assert machine.available_memory() == (600 + 40) * KB
    write_v1_cgroup(system / "cgroup" / "memory" / group, 300 * KB, 250 * KB, 70 * KB)
    assert machine.available_memory() == (300 - 250 + 70 + 40) * KB


def test_version_1_in_a_container_whose_mount_begins_at_its_own_group(system: Path) -> None:
    (system / "proc" / "self" / "cgroup").write_text("4:memory:/docker/abc\n")
    write_v1_cgroup(system / "cgroup" / "memory", 300 * KB, 250 * KB, 0)
    assert machine.available_memory() == (300 - 250 + 40) * KB


@pytest.mark.parametrize("tighter", ["memory", "unified"])
def test_both_versions_side_by_side(system: Path, tighter: str) -> None:
    (system / "proc" / "self" / "cgroup").write_text("4:memory:/a\n0::/b\n")
    tight, wide = 300 * KB, 400 * KB
    write_v1_cgroup(system / "cgroup" / "memory" / "a", tight if tighter == "memory" else wide, 250 * KB, 0)
    write_cgroup(system / "cgroup" / "unified" / "b", tight if tighter == "unified" else wide, 250 * KB, 0)
    assert machine.available_memory() == (300 - 250 + 40) * KB


@pytest.mark.parametrize("lines", ["", "no colons\n", "0::\n", "4:memory\n"])
def test_a_list_of_cgroups_of_another_kind(system: Path, lines: str) -> None:
    (system / "proc" / "self" / "cgroup").write_text(lines)
    assert machine.available_memory() == (600 + 40) * KB


def test_a_system_without_these_files_has_all_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    assert machine.available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10_000_000 < machine.resident_memory() == machine.peak_memory() < 1e12


def test_this_process_holds_what_it_fills() -> None:
    before = machine.resident_memory()
    # Pages of its own: a bytearray may get memory that this process holds already.
    filled = mmap.mmap(-1, 50_000_000)
    for start in range(0, len(filled), mmap.PAGESIZE):
        filled[start] = 1
    assert before + 40_000_000 < machine.resident_memory() <= machine.peak_memory()
    assert machine.resident_memory() <= machine.available_memory()
    filled.close()


def test_what_was_freed_in_the_midst_of_what_is_held_goes_back_to_the_system() -> None:
    """Blocks that are too small to be mapped by themselves; every other stays, so that no end of the heap is free."""
    size, blocks = 64 * KB, 4096
    before = machine.resident_memory()
    held = [bytearray(size) for _ in range(blocks)]
    del held[::2]
    machine.return_freed()
    assert machine.resident_memory() - before < 0.75 * size * blocks
    assert len(held) == blocks // 2


def test_programs_that_are_forgotten_are_compiled_anew() -> None:
    traced = []

    @jax.jit
    def twice(x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        return 2 * x

    twice(jnp.ones(3))
    twice(jnp.ones(3))
    assert len(traced) == 1
    machine.forget_programs()
    twice(jnp.ones(3))
    assert len(traced) == 2


@pytest.mark.parametrize(("mappings", "times"), [(600, 0), (601, 1), (None, 0)])
def test_programs_are_forgotten_before_mappings_run_out(
    mappings: int | None, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's limit and this process's mappings are those of files; where there are none, nothing is known."""
    forgotten: list[None] = []
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "forget_programs", lambda: forgotten.append(None))
    if mappings is not None:
        for file, content in (("sys/vm/max_map_count", "1000\n"), ("self/maps", "7f00-7f01 r-xp\n" * mappings)):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(content)
    machine.bound_programs()
    assert len(forgotten) == times


def test_reading_a_block_bounds_the_programs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[None] = []
    monkeypatch.setattr(machine, "bound_programs", lambda: looked.append(None))
    CheckpointSource(open_checkpoint(tiny)).block(0)
    assert len(looked) == 1


def test_a_cpu_is_no_accelerator() -> None:
    assert machine.accelerator_memory() is None


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize("own", [None, "glibc.malloc.check=0"])
def test_a_process_begins_anew_for_large_pages_unless_told_otherwise(own: str | None) -> None:
    program = """
import os, sys
from moejax.machine import with_large_pages
print("begun")
with_large_pages()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], sys.flags.dev_mode)
"""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if own is None else {"GLIBC_TUNABLES": own}
    command = [sys.executable, "-u", "-X", "dev", "-c", program, "--a", "b c"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    begun = ["begun"] * (2 if own is None else 1)
    assert ran.stdout.splitlines() == [*begun, f"{own or 'glibc.malloc.hugetlb=1'} ['--a', 'b c'] True"]

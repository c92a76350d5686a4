"""Jobs that are spread over devices and processes give what they give on one; what one process says, all hear."""

import json
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moejax.sharding import ALONE, Crew, crew_of, mesh_of
from processes import Processes

# What two processes find, each in a file of its own.
TOGETHER = """
import json, sys
import jax, numpy as np
from moejax.commands.devices import mesh_from
from moejax.commands.ending import in_sentences
from moejax.sharding import crew_of
file, mesh, join = sys.argv[1:]
with in_sentences(), mesh_from(mesh, join) as own:
    crew, process = crew_of(own), jax.process_index()
    like = [(np.zeros((n, 3), np.uint16), np.zeros(2, np.float32)) for n in range(1, 12)]
    made = []
    def job(n, device):
        made.append(n)
        return np.full((n + 1, 3), n, np.uint16), np.asarray([n, device.process_index], np.float32)
    rows, where = zip(*crew.spread(job, like))
    found = {
        "made": sorted(made), "all": [own[0, 0].item() for own in rows], "where": [own[1].item() for own in where],
        "told": crew.told(["first" * 300_000, 2.5] if crew.is_first else None)[1], "is first": crew.is_first,
        "least": crew.least(5 * 10**12 + process), "local": crew.local_devices,
        "none": len(crew.spread(job, [])),
    }
    with open(file, "w") as stream:
        json.dump(found, stream)
    crew.meet()
    crew.agree({"same": "a"})
    crew.agree({"number": str(process)})
    crew.meet()
"""


def test_every_job_runs_once_on_the_next_device_and_none_beside_another_of_its_device() -> None:
    crew, busy, ran = crew_of(mesh_of("tensor=3")), [], []
    lock = threading.Lock()

    def job(n: int, device: jax.Device | None) -> jax.Array:
        with lock:
            assert device not in busy
            busy.append(device)
        found = jax.jit(lambda x: 2 * x)(jax.device_put(jnp.asarray(n), device))
        with lock:
            busy.remove(device)
            ran.append((n, device))
        return found

    found = crew.spread(job, [jnp.zeros((), jnp.int32)] * 8)
    assert list(map(int, found)) == [2 * n for n in range(8)]
    assert dict(ran) == {n: jax.devices()[n % 3] for n in range(8)} and len(ran) == 8
    assert [own.devices() for own in found] == [{jax.devices()[n % 3]} for n in range(8)]


def test_without_devices_jobs_run_where_they_would() -> None:
    assert ALONE.spread(lambda n, device: (n, device), [(0, None)] * 2) == [(0, None), (1, None)]
    assert crew_of(None) is ALONE and ALONE.is_first and ALONE.local_devices == 1


def test_what_a_job_raises_is_raised() -> None:
    def fails(n: int, device: object) -> int:
        raise ValueError(f"job {n}")

    with pytest.raises(ValueError, match="job 0"):
        Crew(tuple(jax.devices()[:2])).spread(fails, [0])


def test_jobs_behind_one_that_fails_are_not_begun() -> None:
    begun, failed = [], threading.Event()

    def job(n: int, device: object) -> int:
        begun.append(n)
        if n == 1:
            failed.set()
            raise ValueError("job 1")
        failed.wait(timeout=30)
        time.sleep(0.2)
        return n

    with pytest.raises(ValueError, match="job 1"):
        Crew(tuple(jax.devices()[:2])).spread(job, [0] * 40)
    assert sorted(begun) == [0, 1]


def test_one_process_hears_itself() -> None:
    crew = crew_of(mesh_of("tensor=2,data=2"))
    assert crew.told({"a": [1]}) == {"a": [1]} and crew.least(10**15) == 10**15 and crew.local_devices == 4
    crew.agree({"thing": "a"})
    crew.meet()


def test_two_processes_share_out_and_tell(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    started = [
        processes.start(n, "-c", TOGETHER, tmp_path / f"found{n}", "tensor=8", join)
        for n, join in enumerate(processes.join)
    ]
    assert [own.wait(timeout=300) for own in started] == [1, 2], processes.said(0) + processes.said(1)
    first, second = (json.loads((tmp_path / f"found{n}").read_text()) for n in (0, 1))
    for own in (first, second):
        assert own["all"] == list(range(11)) and own["where"] == [n % 2 for n in range(11)]
        assert own["told"] == 2.5 and own["least"] == 5 * 10**12 and own["local"] == 4 and own["none"] == 0
    assert (first["made"], second["made"]) == (list(range(0, 11, 2)), list(range(1, 11, 2)))
    assert first["is first"] and not second["is first"]
    assert "process 1 has another number than process 0; the same command, files" in processes.said(1)[1]

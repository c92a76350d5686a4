"""Devices, of one process or several, that share out jobs none of which needs another; and what processes tell each
other.

Processes of a crew do the same in the same order, but for the jobs that are spread: each runs those of its own devices,
and has what the others made of theirs.
"""

import json
import math
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.errors import InputError

T = TypeVar("T")

_ALIKE = "the same command, files and versions, on machines of one kind, are needed"

# Lengths are told as two numbers, because JAX has 32 bits for one.
_LOW = 1 << 20


@dataclass(frozen=True)
class Crew:
    """devices: in the order in which jobs go to them; with none, jobs run where they would anyway."""

    devices: tuple[jax.Device, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes, and whose word counts."""
        return not self._are_several or jax.process_index() == 0

    @property
    def local_devices(self) -> int:
        """How many devices compute in this process's own memory: all of its own, or one that stands for what is in it
        on the way to accelerators."""
        own = [device for device in self.devices if device.process_index == jax.process_index()]
        return max(1, len(own)) if jax.default_backend() == "cpu" else 1

    def spread(self, job: Callable[[int, jax.Device | None], T], like: Sequence[T]) -> list[T]:
        """job(n, device) of n = 0, 1, ...: each on one device, which all take in turn, one at a time.

        like: trees of the shapes and dtypes of what each gives; where there are several processes, results come as
        arrays of NumPy's. Where a job fails, others that have not begun are not.
        """
        if not self.devices:
            return [job(n, None) for n in range(len(like))]
        places = [self.devices[n % len(self.devices)] for n in range(len(like))]
        own = [device for device in self.devices if device.process_index == jax.process_index()]
        found: dict[int, T] = {}
        is_over = threading.Event()

        def run(device: jax.Device) -> None:
            for n in [n for n, place in enumerate(places) if place == device]:
                if is_over.is_set():
                    return
                found[n] = job(n, device)

        with ThreadPoolExecutor(max_workers=len(own)) as pool:
            try:
                for running in as_completed([pool.submit(run, device) for device in own]):
                    running.result()
            finally:
                is_over.set()  # where one has failed, or all are interrupted
        if self._are_several:
            found |= _exchanged(found, [place.process_index for place in places], like)
        return [found[n] for n in range(len(like))]

    def told(self, value: Any) -> Any:
        """What the first process has here, in all of them; JSON can hold it."""
        return json.loads(told_bytes(json.dumps(value).encode())) if self._are_several else value

    def heard(self, value: Any) -> list[Any]:
        """What every process has here, in their order; JSON can hold it."""
        if not self._are_several:
            return [value]
        content = json.dumps(value).encode()
        each = _gathered(content, max(_numbers(len(content))))
        return [json.loads(own.tobytes().rstrip(b"\0")) for own in each]

    def least(self, value: int) -> int:
        """Of the values, none below 0, that the processes have here."""
        return min(_numbers(value)) if self._are_several else value

    def meet(self) -> None:
        """Wait until all processes are here."""
        self.least(0)

    def agree(self, values: Mapping[str, str]) -> None:
        """Raise InputError, naming what differs, in a process that has other values than the first."""
        first: dict[str, str] = self.told(dict(values))
        for name in sorted(first.keys() | values.keys()):
            if first.get(name) != values.get(name):
                _refuse(name)

    @property
    def _are_several(self) -> bool:
        return len({device.process_index for device in self.devices}) > 1


# The device on which everything is computed anyway.
ALONE = Crew()


def crew_of(mesh: Mesh | None) -> Crew:
    """All devices of a mesh, so that those of different processes alternate; `ALONE` without one."""
    if mesh is None:
        return ALONE
    devices = sorted(mesh.devices.flat, key=lambda own: own.id)
    before = [sum(other.process_index == own.process_index for other in devices[:n]) for n, own in enumerate(devices)]
    in_turn = sorted(zip(before, devices, strict=True), key=lambda own: (own[0], own[1].process_index))
    return Crew(tuple(device for _, device in in_turn))


def _refuse(what: str) -> NoReturn:
    raise InputError(f"process {jax.process_index()} has another {what} than process 0; {_ALIKE}")


def told_bytes(content: bytes) -> bytes:
    """What the first of all processes gives here, in all of them."""
    length, *_ = _numbers(len(content))
    return _gathered(content[:length], length)[0, :length].tobytes()


def _exchanged(own: dict[int, T], process: Sequence[int], like: Sequence[T]) -> dict[int, T]:
    """What this process has made and what the others have, of all of which the shapes are known."""
    if len(set(_numbers(zlib.crc32(repr(like).encode())))) > 1:
        raise InputError(f"the processes have different jobs to share out; {_ALIKE}")
    sizes = [sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(one)) for one in like]
    jobs = [[n for n, made_by in enumerate(process) if made_by == p] for p in _processes()]
    longest = max(sum(sizes[n] for n in theirs) for theirs in jobs)
    content = b"".join(np.asarray(array).tobytes() for n in sorted(own) for array in jax.tree.leaves(own[n]))
    found: dict[int, T] = {}
    for theirs, told in zip(jobs, _gathered(content, longest), strict=True):
        starts = [0, *accumulate(sizes[n] for n in theirs)]
        found |= {n: _tree(told[start:], like[n]) for n, start in zip(theirs, starts, strict=False)}
    return found


def _numbers(own: int) -> list[int]:
    """That of every process."""
    each = _in_all(np.asarray(divmod(own, _LOW), np.int32))
    return [int(high) * _LOW + int(low) for high, low in each]


def _gathered(content: bytes, longest: int) -> np.ndarray:
    """The bytes of every process, of which none has more than the longest, filled up with zeros."""
    padded = np.zeros(_padded(longest), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return _in_all(padded)


def _in_all(own: np.ndarray) -> np.ndarray:
    """The arrays of all processes, side by side; each is on one device of its own process."""
    firsts = [min((d for d in jax.devices() if d.process_index == p), key=lambda d: d.id) for p in _processes()]
    mesh = Mesh(np.asarray(firsts), "processes")
    (local,) = mesh.local_devices
    parts = [jax.device_put(own[None], local)]
    cut = NamedSharding(mesh, PartitionSpec("processes"))
    every = jax.make_array_from_single_device_arrays((len(firsts), *own.shape), cut, parts)
    return np.asarray(jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(every).addressable_data(0))


def _same(array: jax.Array) -> jax.Array:
    return array


def _processes() -> range:
    return range(jax.process_count())


def _tree(content: np.ndarray, like: T) -> T:
    """Arrays of those shapes and dtypes, whose bytes come one after another."""
    arrays, start = [], 0
    leaves, structure = jax.tree.flatten(like)
    for one in leaves:
        size = math.prod(one.shape) * one.dtype.itemsize
        arrays.append(content[start : start + size].view(one.dtype).reshape(one.shape))
        start += size
    tree: T = jax.tree.unflatten(structure, arrays)
    return tree


def _padded(size: int) -> int:
    """A length of few, since each is compiled."""
    return 1 << max(10, (size - 1).bit_length())

"""`--mesh` and `--distributed`: the devices that a command's model lies on, of this process and of others.

Several processes run the same command, each on its own devices; all that they compute, they compute together. The first
one alone prints and writes. One that ends too early would leave the others waiting for its part for ever: so each of
them holds a connection to the first, and stops where that breaks.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from moejax.errors import InputError, brief
from moejax.sharding import DATA, mesh_of

_DONE = b"."
# Seconds that a process has for an end of its own: what ended another one may be wrong for all.
_OWN_END = 5.0
# Bytes that the first process's address is told in: a host's name of up to 253, a port, a secret.
_ADDRESS = 512
_WHOLE = PartitionSpec()
_OUT, _ERRORS = 1, 2
_FORM = re.compile(
    r"coordinator=(?P<coordinator>[^,\s]+:\d{1,5}),processes=(?P<processes>\d{1,6}),process=(?P<process>\d{1,6})"
)


@contextmanager
def mesh_from(mesh: str | None, distributed: str | None) -> Iterator[Mesh | None]:
    """The mesh that is asked for, its devices those of all processes; None if none is.

    distributed: `auto`, where a cluster tells JAX who they are, or `coordinator=HOST:PORT,processes=2,process=0`.
    Raises InputError for other texts, and as `mesh_of` does.
    """
    if distributed is None:
        yield None if mesh is None else mesh_of(mesh)
        return
    if mesh is None:
        raise InputError("--distributed spreads a model over the devices of several processes; --mesh says how")
    host = _join(distributed)
    with _quiet() as errors, _watching(host, errors):
        own = mesh_of(mesh)
        _meet(own)
        yield own


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def in_first(path: Path | None) -> Path | None:
    """Where something is to be written, if it is this process that writes."""
    return path if is_first() else None


def require_one_sequence(mesh: Mesh | None) -> None:
    """Raise InputError for a mesh over which several sequences are spread, where there is one."""
    if mesh is not None and mesh.shape[DATA] > 1:
        raise InputError(f"--mesh has data={mesh.shape[DATA]}; one sequence is decoded, so data=1 is accepted")


def _join(distributed: str) -> str:
    """Makes this one of the processes; returns the first one's host, which in a cluster is what it calls itself."""
    # Else JAX ends a process whose fellow has, with a stack of its own instead of a sentence, or waits at its end.
    jax.config.update("jax_enable_recoverability", True)
    match = _FORM.fullmatch(distributed)
    if distributed != "auto" and (match is None or not int(match["process"]) < int(match["processes"])):
        raise InputError(
            f"--distributed is {brief(distributed)}; auto, or coordinator=HOST:PORT,processes=2,process=0 with the "
            "process's own number, are accepted"
        )
    try:
        if match is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(match["coordinator"], int(match["processes"]), int(match["process"]))
    except ValueError as error:
        raise InputError(f"--distributed auto: no cluster tells who the processes are ({error})") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            errno.ECONNREFUSED, f"--distributed {distributed}: the processes cannot be joined ({reason})"
        ) from error
    return socket.gethostname() if match is None else match["coordinator"].rsplit(":", 1)[0]


def _meet(mesh: Mesh) -> None:
    """Something that all processes compute together along every axis, as long as they are at the same place still: it
    connects them, for which they wait no longer than half a minute for each other."""
    for axes in (mesh.axis_names, *mesh.axis_names):
        added = jax.shard_map(partial(jax.lax.psum, axis_name=axes), mesh=mesh, in_specs=_WHOLE, out_specs=_WHOLE)
        jax.block_until_ready(jax.jit(added)(np.ones(1, np.float32)))


@contextmanager
def _quiet() -> Iterator[int]:
    """What libraries print, of whom connected to whom, goes nowhere, and so does what any process but the first says
    itself, unless it goes to the descriptor that this gives."""
    streams = (sys.stdout, sys.stderr)
    kept, nowhere = [os.dup(own) for own in (_OUT, _ERRORS)], os.open(os.devnull, os.O_WRONLY)
    with os.fdopen(os.dup(kept[0] if is_first() else nowhere), "w") as out:
        try:
            _redirect(streams, [nowhere, kept[1] if is_first() else nowhere])
            with contextlib.redirect_stdout(out):
                yield kept[1]
        finally:
            out.flush()
            _redirect(streams, kept)
            for own in (*kept, nowhere):
                os.close(own)


def _redirect(streams: Sequence[TextIO], to: Sequence[int]) -> None:
    """Standard output and error to other descriptors."""
    for stream in streams:
        stream.flush()
    ctypes.CDLL(None).fflush(None)  # what libraries written in C have not handed on yet
    for own, other in zip((_OUT, _ERRORS), to, strict=True):
        os.dup2(other, own)


@contextmanager
def _watching(host: str, errors: int) -> Iterator[None]:
    """While the block runs, an end of another process before its own block's is this one's: raises OSError, or, where
    the block waits for the other's part and nothing interrupts it, says so to a descriptor and ends the process."""
    watches = [_Watch(*own, errors) for own in _connections(host).items()]
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        time.sleep(_OWN_END / 5)  # it may be that a connection has broken that is not watched
        if gone := next((own for own in watches if own.ended_early.is_set()), None):
            raise OSError(errno.ECONNABORTED, gone.sentence) from error
        raise
    else:
        for own in watches:
            own.tell_done()
    finally:
        for own in watches:
            own.leave()


class _Watch(threading.Thread):
    """Looks whether another process ends early; `connection` is with it."""

    def __init__(self, process: int, connection: socket.socket, errors: int):
        super().__init__(daemon=True)
        self._process, self._connection, self._errors = process, connection, errors
        self._is_leaving = threading.Event()
        self.ended_early = threading.Event()
        self.start()

    @property
    def sentence(self) -> str:
        return f"process {self._process} ended before all was done, so process {jax.process_index()} does"

    def tell_done(self) -> None:
        """That this process's block has come to its end."""
        with contextlib.suppress(OSError):  # a process that is done may have gone
            self._connection.sendall(_DONE)

    def leave(self) -> None:
        """Another one's end is not this one's any more. The first process, whom JAX needs until the others have gone,
        waits for that."""
        self._is_leaving.set()
        if is_first():
            self.join(_OWN_END)

    def run(self) -> None:
        is_done = self._received() == _DONE
        while is_done and self._received():
            pass
        if is_done or self._is_leaving.is_set():
            return
        self.ended_early.set()
        # Where the first has gone, JAX is about to end this one with a stack of its own. Any other may have failed by
        # what this one fails by too, in a sentence of its own.
        if not self._is_leaving.wait(_OWN_END if self._process else 0):
            os.write(self._errors, f"moejax: {self.sentence}\n".encode())
            os._exit(1)

    def _received(self) -> bytes:
        """A byte; none where the connection has ended."""
        with contextlib.suppress(OSError):
            return self._connection.recv(1)
        return b""


def _connections(host: str) -> dict[int, socket.socket]:
    """Of the first process, on that host as itself has it, with every other one, and of every other one with it."""
    if not is_first():
        host, port, secret = _told(b"").decode().split()
        try:
            connection = socket.create_connection((host, int(port)))
        except OSError as error:
            own = f"process {jax.process_index()} cannot reach process 0 at {host}, port {port}"
            raise OSError(error.errno, f"{own}: {error.strerror}") from error
        connection.sendall(f"{secret}{jax.process_index():08}".encode())
        return {0: connection}
    found: dict[int, socket.socket] = {}
    secret = secrets.token_hex()
    with socket.create_server(("", 0), backlog=jax.process_count()) as server:
        _told(f"{host} {server.getsockname()[1]} {secret}".encode())
        while len(found) < jax.process_count() - 1:
            connection, _ = server.accept()
            connection.settimeout(_OWN_END)
            with contextlib.suppress(OSError):
                words = connection.recv(len(secret) + 8, socket.MSG_WAITALL).decode(errors="replace")
                if words.startswith(secret):
                    connection.settimeout(None)
                    found[int(words.removeprefix(secret))] = connection
    return found


def _told(address: bytes) -> bytes:
    """What the first process gives, in all of them."""
    padded = np.frombuffer(address.ljust(_ADDRESS), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip()

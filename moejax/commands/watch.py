"""Several processes that compute together: one that ends too early would leave the others waiting for its part for
ever, so each of them holds a connection to the first, and stops where that breaks."""

import contextlib
import errno
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

from moejax.sharding import told_bytes

_DONE, _FAILED = b".", b"!"
# Seconds that a process has for an end of its own: what ended another one may be wrong for all.
_OWN_END = 5.0
# Seconds that processes wait for each other at the beginning and at the end; between signs of life of a host.
_LONGEST_END, _KEPT_ALIVE = 60.0, 30


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


@contextmanager
def watching(host: str, errors: int) -> Iterator[None]:
    """While the block runs, an end of another process before its own block's is this one's: raises OSError, or, where
    the block waits for the other's part and nothing interrupts it, says so to a descriptor and ends the process."""
    watches = [_Watch(*own, errors) for own in _connections(host).items()]
    try:
        yield
    except BaseException as error:
        if _is_of_the_runtime(error):
            time.sleep(_OWN_END / 5)  # its cause may be told a little later
        gone = next((own for own in watches if own.ended_early.is_set()), None)
        _leave(watches, _FAILED, _OWN_END)
        if gone is not None and _is_of_the_runtime(error):
            raise OSError(errno.ECONNABORTED, gone.sentence) from error
        raise
    _leave(watches, _DONE, _LONGEST_END)
    for own in () if is_first() else watches:
        own.wait()  # it may have more to do, and JAX needs it until then


def _is_of_the_runtime(error: BaseException) -> bool:
    """Whether XLA has failed, whose sentences begin by a status in capitals: what is computed meanwhile tells it by a
    ValueError when its numbers are asked for."""
    is_told_late = isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error)) is not None
    return is_told_late or isinstance(error, jax.errors.JaxRuntimeError)


def _leave(watches: "Sequence[_Watch]", how: bytes, seconds: float) -> None:
    """Tell the others how this process's block has ended. The first process, whom JAX needs until the others have gone,
    waits for that, but not longer than so many seconds."""
    for own in watches:
        own.tell(how)
    deadline = time.monotonic() + seconds
    for own in watches if is_first() else ():
        own.join(max(0.0, deadline - time.monotonic()))


class _Watch(threading.Thread):
    """Looks whether another process ends early; `connection` is with it."""

    def __init__(self, process: int, connection: socket.socket, errors: int):
        super().__init__(daemon=True)
        self._process, self._connection, self._errors = process, connection, errors
        self._is_leaving, self._has_told = threading.Event(), threading.Event()
        self.ended_early = threading.Event()
        self.start()

    @property
    def sentence(self) -> str:
        return f"process {self._process} ended before all was done, so process {jax.process_index()} does"

    def tell(self, how: bytes) -> None:
        """How this process's block has ended; another one's end is not this one's any more."""
        self._is_leaving.set()
        with contextlib.suppress(OSError):  # who is told may have gone
            self._connection.sendall(how)

    def wait(self) -> None:
        """Until the other process's block has ended. Raises OSError if it ended early."""
        self._has_told.wait()
        if self.ended_early.is_set():
            raise OSError(errno.ECONNABORTED, self.sentence)

    def run(self) -> None:
        told = self._received()
        if told != _DONE:
            self.ended_early.set()
        self._has_told.set()
        if told != _DONE:
            # Who fails may do so by what this one fails by too, in a sentence of its own. Where the first process was
            # killed, JAX is about to end this one with a stack.
            has_time = told == _FAILED or self._process
            if not self._is_leaving.wait(_OWN_END / 2 if has_time else 0):
                os.write(self._errors, f"moejax: {self.sentence}\n".encode())
                os._exit(1)
        while told:
            told = self._received()

    def _received(self) -> bytes:
        """A byte; none where the connection has ended."""
        with contextlib.suppress(OSError):
            return self._connection.recv(1)
        return b""


def _connections(host: str) -> dict[int, socket.socket]:
    """Of the first process, on that host as itself has it, with every other one, and of every other one with it."""
    try:
        found = _with_others(host) if is_first() else _with_first()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OSError(errno.ECONNABORTED, f"the processes could not meet ({reason})") from error
    for own in found.values():
        own.settimeout(None)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # a host that has lost its power says nothing
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEPT_ALIVE)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEPT_ALIVE)
    return found


def _with_first() -> dict[int, socket.socket]:
    host, port, secret = told_bytes(b"").decode().split()
    try:
        connection = socket.create_connection((host, int(port)), _LONGEST_END)
        connection.sendall(f"{secret}{jax.process_index():08}".encode())
    except OSError as error:
        own = f"process {jax.process_index()} cannot reach process 0 at {host}, port {port}"
        raise OSError(error.errno, f"{own}: {error.strerror or error}") from error
    return {0: connection}


def _with_others(host: str) -> dict[int, socket.socket]:
    found: dict[int, socket.socket] = {}
    secret = secrets.token_hex()
    with socket.create_server(("", 0), backlog=jax.process_count()) as server:
        server.settimeout(_LONGEST_END)
        told_bytes(f"{host} {server.getsockname()[1]} {secret}".encode())
        while missing := set(range(1, jax.process_count())) - found.keys():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise OSError(
                    errno.ETIMEDOUT,
                    f"process {min(missing)} has not reached process 0 at {host} in {_LONGEST_END:.0f} s",
                ) from None
            connection.settimeout(_OWN_END)
            with contextlib.suppress(OSError), connection.makefile("rb") as stream:
                words = stream.read(len(secret) + 8).decode(errors="replace")
                if words.startswith(secret):
                    found[int(words.removeprefix(secret))] = connection
    return found

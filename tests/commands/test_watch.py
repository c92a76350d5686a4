"""What a process that computes with others says where another one ends; whole commands are in `test_mesh_option`."""

import os
import socket
from collections.abc import Iterator

import jax
import pytest

from moejax.commands import watch


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The other process's end of the connection with this one, the first of two."""
    own, other = socket.socketpair()
    monkeypatch.setattr(watch, "_connections", lambda host: {1: own})
    monkeypatch.setattr(watch, "_OWN_END", 1.0)
    with own, other:
        yield other


def watched(error: Exception, other_ends: socket.socket | None) -> None:
    """A block that fails by the error, behind the other process's end if there is one."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        with watch.watching("here", nowhere):
            if other_ends is not None:
                other_ends.shutdown(socket.SHUT_RDWR)
            raise error
    finally:
        os.close(nowhere)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INTERNAL: Gloo AllReduce failed"),
        ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
    ],
)
def test_an_exchange_that_the_others_end_breaks_is_told_as_such(other: socket.socket, error: Exception) -> None:
    with pytest.raises(OSError, match="process 1 ended before all was done, so process 0 does"):
        watched(error, other)


def test_errors_of_its_own_are_its_own(other: socket.socket) -> None:
    with pytest.raises(ValueError, match="a bug"):
        watched(ValueError("a bug"), other)


def test_what_the_runtime_fails_by_alone_is_told_to_the_others(other: socket.socket) -> None:
    with pytest.raises(ValueError, match=r"UNKNOWN: of its own"):
        watched(ValueError("UNKNOWN: of its own"), None)
    assert other.recv(1) == watch._FAILED

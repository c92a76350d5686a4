"""`--mesh` and `--distributed`: the devices that a command's model lies on, of this process and of others.

Several processes run the same command, each on its own devices; all that they compute, they compute together. The first
one alone prints and writes, and all stop where one ends too early (see `watch`).
"""

import contextlib
import ctypes
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moejax.commands.watch import is_first, watching
from moejax.errors import InputError, brief
from moejax.sharding import DATA, mesh_of

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
    with _quiet() as errors, watching(host, errors):
        own = mesh_of(mesh)
        _meet(own)
        yield own


def in_first(path: Path | None) -> Path | None:
    """Where something is to be written, if it is this process that writes."""
    return path if is_first() else None


def require_one_sequence(mesh: Mesh | None) -> None:
    """Raise InputError for a mesh over which several sequences are spread, where there is one."""
    if mesh is not None and mesh.shape[DATA] > 1:
        raise InputError(f"--mesh has data={mesh.shape[DATA]}; one sequence is decoded, so data=1 is accepted")


def _join(distributed: str) -> str:
    """Makes this one of the processes; returns the first one's host, which in a cluster is what it calls itself."""
    # Else JAX ends a process whose fellow has, with a stack of its own instead of a sentence, or waits at its end; and
    # takes SIGTERM for a sign to save something.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
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
    own, form = os.dup(kept[0] if is_first() else nowhere), sys.stdout
    with os.fdopen(own, "w", encoding=form.encoding, errors=form.errors) as out:
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

"""The largest plan whose model a device of so much memory decodes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from moejax.errors import InputError
from moejax.formats import payload_bytes
from moejax.model import Config
from moejax.pipeline.shapes import Shapes
from moejax.planning.fit import Problem
from moejax.planning.memory import DeviceMemory, check_context, device_memory, weight_bytes
from moejax.planning.size import format_size

# Tokens of context where none are asked for, if the model has been made for so many.
DEFAULT_CONTEXT = 4096

Planned = TypeVar("Planned")


@dataclass(frozen=True)
class Device:
    """A device that is to decode `batch` sequences of `context` tokens within `memory` bytes."""

    memory: int
    context: int
    batch: int

    @property
    def sequences(self) -> str:
        """What it is to decode, in words."""
        return f"{self.batch} x {self.context} tokens"


def context_for(context: int | None, batch: int, config: Config) -> int:
    """The context that is asked for, or the default. Raises InputError as `check_context`."""
    longest = config.max_position_embeddings
    asked = min(DEFAULT_CONTEXT, longest) if context is None else context
    check_context(asked, batch, longest)
    return asked


def check_device(device: Device, problem: Problem, shapes: Shapes) -> DeviceMemory:
    """What the smallest plan's model takes. Raises InputError if that is too much for the device, or if the model as it
    is fits."""
    least = device_memory(shapes.compressed(problem.smallest().plan), device.context, device.batch)
    if least.total > device.memory:
        raise _too_small(device, least)
    whole = device_memory(shapes.model, device.context, device.batch)
    if whole.total <= device.memory:
        raise InputError(
            f"{format_size(device.memory)} leave nothing to do: the original decodes {device.sequences} in "
            f"{format_size(whole.total)} ({whole.total} bytes), a memory below that is needed"
        )
    return least


def fit_device(
    device: Device,
    problem: Problem,
    shapes: Shapes,
    planned: Callable[[Problem, int], Planned],
    memory_of: Callable[[Planned], DeviceMemory],
) -> Planned:
    """What `planned` makes of the problem of a device's weights, and of the bytes that they may take.

    The weights that a device holds are all but MTP blocks'. The workspace of a decode step depends on the plan, a
    little, so the bytes that are left for weights are corrected by what a plan was found to take. Raises as
    `check_device`.
    """
    least = check_device(device, problem, shapes)
    # As many bytes more may the solver give to all weights; too many, because MTP blocks become smaller, too.
    beside = payload_bytes(shapes.model.mtp)
    on_device = replace(problem, size_of=lambda plan: weight_bytes(shapes.compressed(plan)), overhead=-beside)
    room = device.memory - least.cache - least.workspace
    while True:
        found = planned(on_device, room)
        taken = memory_of(found).total
        if taken <= device.memory:
            return found
        if room == least.weights:  # not even the smallest plan, once it was adjusted
            raise _too_small(device, least)
        room = max(room - (taken - device.memory), least.weights)


def _too_small(device: Device, least: DeviceMemory) -> InputError:
    return InputError(
        f"no plan decodes {device.sequences} in {format_size(device.memory)}; {format_size(least.total)} "
        f"({least.total} bytes) would do"
    )

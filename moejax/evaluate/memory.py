"""What an evaluation takes of memory, from shapes; how checkpoints are read within a limit, whole or part by part."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.checkpoint.load import Checkpoint, load_model
from moejax.checkpoint.source import CheckpointSource
from moejax.errors import note
from moejax.evaluate.divergence import compare, log_probabilities
from moejax.formats import Leaf, payload_bytes
from moejax.formats.arrays import abstract_array
from moejax.ledger import Ledger
from moejax.model import Config, DeepseekV3
from moejax.model.rope import Angles, angles
from moejax.model.sliced import join, unjoin
from moejax.model.source import Source
from moejax.model.workspace import (
    largest_of_each_kind,
    reading_bytes,
    reading_bytes_of_block,
    sliced_step_bytes,
    step_bytes,
    waiting_bytes,
    with_margin,
)
from moejax.progress import Progress
from moejax.sharding import crew_of, local_bytes, on_mesh

Read = Callable[[Checkpoint], DeepseekV3 | Source]


@dataclass(frozen=True)
class Needs:
    """Bytes that an evaluation takes beside what the process holds already.

    whole: the models, and the step that takes most beside. part: the part, read from a checkpoint, that takes most with
    the step it is read for. per_chunk: states that are kept of every chunk of a wave; chunks go in batches of `batch`.
    """

    whole: int
    part: int
    per_chunk: int
    batch: int

    @property
    def in_memory(self) -> int:
        """With all models in memory, batch after batch."""
        return with_margin(self.whole) + self.per_chunk * self.batch

    def part_by_part(self, chunks: int) -> int:
        """With so many chunks in a wave."""
        return with_margin(self.part) + self.per_chunk * chunks

    def chunks_per_wave(self, free: int) -> int:
        """How many chunks, in whole batches, `free` bytes are enough for; 0 if not for one batch."""
        left = free - self.part_by_part(0)
        return max(0, left // (self.per_chunk * self.batch)) * self.batch


def needs(
    model: DeepseekV3,
    base: DeepseekV3 | Leaf | None,
    length: int,
    batch: int,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
) -> Needs:
    """Of an abstract model and its original, or the head of its original's `Predictions`, on chunks of `length` tokens;
    on a mesh, what this process takes for its own devices with the models in memory.

    Compiles a step of every kind, which then need not be compiled again.
    """
    if mesh is not None:
        return _needs_on(mesh, model, base, length, batch, dtype)
    models = [own for own in (model, base) if isinstance(own, DeepseekV3)]
    steps = [step for own in models for step in _steps(own, length, batch, dtype)]
    heads = [own.head.get_value() for own in models]
    kept = [] if base is None or isinstance(base, DeepseekV3) else [base]
    scoring = _scoring_bytes([*heads, *kept], length, batch, dtype)
    states = length * max(own.config.hidden_size for own in models) * jnp.dtype(dtype).itemsize
    drafts = model.config.num_nextn_predict_layers > 0
    return Needs(
        whole=payload_bytes([model, base]) + max(scoring, *(workspace for _, workspace in steps)),
        part=payload_bytes(kept)
        + max(payload_bytes(heads) + scoring, *(weights + workspace for weights, workspace in steps)),
        # A block's outputs, what the MTP block needs of embeddings, and of scored positions: what the base's head
        # takes, the model's, and the MTP block's; and what waits for a next slice of experts.
        per_chunk=states * (1 + drafts)
        + states // 2 * (1 + (base is not None) + drafts)
        + max(-(-_waiting_bytes(own, length, batch, dtype) // batch) for own in models),
        batch=batch,
    )


def _needs_on(
    mesh: Mesh,
    model: DeepseekV3,
    base: DeepseekV3 | Leaf | None,
    length: int,
    batch: int,
    dtype: jax.typing.DTypeLike,
) -> Needs:
    with jax.set_mesh(mesh):
        device = needs(on_mesh(model, mesh), None if base is None else on_mesh(base, mesh), length, batch, dtype)
    steps = device.whole - payload_bytes([model, base])
    return replace(device, whole=local_bytes([model, base], mesh) + crew_of(mesh).local_devices * steps)


def _steps(model: DeepseekV3, length: int, batch: int, dtype: jax.typing.DTypeLike) -> Iterator[tuple[int, int]]:
    """Of the parts that are asked for one by one: bytes while they are read, and of the step each is read for."""
    config = model.config
    x_BTD = abstract_array((batch, length, config.hidden_size), dtype)
    by = _abstract_rotation(config, length, dtype)
    yield reading_bytes(model.embed.get_value()), 2 * _array_bytes(x_BTD)
    workspace = max(sliced_step_bytes(block, x_BTD, by) for block in largest_of_each_kind(list(model.layers)))
    yield from ((reading_bytes_of_block(block), workspace) for block in model.layers)
    if config.num_nextn_predict_layers:
        h_BTD = abstract_array((batch, length - 1, config.hidden_size), dtype)
        mtp, by = model.mtp[0], _abstract_rotation(config, length - 1, dtype)
        outside = payload_bytes(mtp) - payload_bytes(mtp.block)
        around = max(step_bytes(join, mtp, h_BTD, h_BTD), step_bytes(unjoin, mtp, h_BTD))
        yield outside + reading_bytes_of_block(mtp.block), max(around, sliced_step_bytes(mtp.block, h_BTD, by))


def _waiting_bytes(model: DeepseekV3, length: int, batch: int, dtype: jax.typing.DTypeLike) -> int:
    x_BTD = abstract_array((batch, length, model.config.hidden_size), dtype)
    by = _abstract_rotation(model.config, length, dtype)
    return max(waiting_bytes(block, x_BTD, by) for block in largest_of_each_kind(list(model.layers)))


def _scoring_bytes(heads: Sequence[Any], length: int, batch: int, dtype: jax.typing.DTypeLike) -> int:
    """Of log-probabilities through every head, and of comparing them."""
    scored = length - 1 - length // 2
    states = [abstract_array((batch, scored, head.shape[-1]), dtype) for head in heads]
    making = max(step_bytes(log_probabilities, own, head) for own, head in zip(states, heads, strict=True))
    if len(heads) == 1:
        return making
    log_probs = abstract_array((batch, scored, heads[0].shape[0]), jnp.float32)
    comparing = step_bytes(compare, log_probs, log_probs, abstract_array((batch, length), jnp.int32))
    return _array_bytes(log_probs) + max(making, _array_bytes(log_probs) + comparing)


def _abstract_rotation(config: Config, length: int, dtype: jax.typing.DTypeLike) -> Angles:
    wide = jnp.promote_types(dtype, jnp.float32)
    return jax.eval_shape(lambda: angles(config, jnp.arange(length), wide))


def _array_bytes(array: jax.Array) -> int:
    return payload_bytes([array])


def require_in_memory(ledger: Ledger, asked: Needs, path: Path) -> None:
    """Raise InputError, naming the checkpoint's path, if an evaluation with the models in memory does not fit."""
    if not ledger.fits(asked.in_memory):
        ledger.refuse(f"{path} cannot be evaluated on a mesh, which needs all of it in memory,", asked.in_memory)


def read_within(ledger: Ledger, asked: Needs, path: Path, chunks: int, progress: Progress) -> tuple[Read, int]:
    """How the checkpoints of an evaluation on so many chunks are read so that it fits, and the chunks of a wave (see
    `evaluate`). A note says so where they are read part by part.

    Raises InputError, naming the checkpoint's path, if not even that fits.
    """
    if ledger.fits(asked.in_memory):
        return partial(load_model, progress=progress), asked.batch
    wave = min(asked.chunks_per_wave(ledger.left), -(-chunks // asked.batch) * asked.batch)
    if not wave:
        ledger.refuse(f"{path} cannot be evaluated, not even block by block,", asked.part_by_part(asked.batch))
    passes = -(-chunks // wave)
    note(
        f"{ledger.sentence_of(asked.in_memory)}: read block by block from disk, {passes} time{'s' * (passes > 1)} over"
    )
    return CheckpointSource, wave

"""`moejax evaluate`."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from moejax.checkpoint.load import Checkpoint, abstract_model, load_model, open_checkpoint
from moejax.checkpoint.placed import spread
from moejax.checkpoint.predictions import BaseOrigin, SavedPredictions, open_predictions, saved_predictions
from moejax.checkpoint.source import CheckpointSource
from moejax.checkpoint.store import folder_bytes
from moejax.commands.common import cost_of_the_run, evaluation_text, tokenize
from moejax.commands.devices import in_first
from moejax.errors import InputError
from moejax.evaluate.divergence import Predictions, evaluate
from moejax.evaluate.memory import Needs, Read, needs, read_within, require_in_memory
from moejax.evaluate.text import Text
from moejax.formats import Leaf, abstract_leaf
from moejax.ledger import ledger_of
from moejax.model import DeepseekV3
from moejax.model.source import Source
from moejax.report import figures
from moejax.report.console import print_table, progress_bar
from moejax.sharding import DATA, around
from moejax.tokenizer import load_tokenizer

_BATCH = 8

Original = Checkpoint | SavedPredictions | None


def run_evaluate(
    name: str | None,
    against: str | None,
    save_base: Path | None,
    text: Path | None,
    memory: str | None,
    dtype: str,
    mesh: Mesh | None,
    json: Path | None,
) -> None:
    """Perplexity and divergence."""
    started = time.monotonic()
    json = in_first(json)
    figures.require_writable(json, in_first(save_base))
    ledger = ledger_of(memory)
    checkpoint = open_checkpoint(name)
    source = evaluation_text(text)
    chunks = tokenize(source, load_tokenizer(checkpoint.path), checkpoint.config)
    original = _original(against, checkpoint, source, chunks, dtype)
    if save_base is not None and isinstance(original, SavedPredictions):
        raise InputError(f"{against} holds predictions already; --save-base takes them from a checkpoint")
    batch = _batch(mesh, len(chunks))
    asked = _needs(checkpoint, original, chunks.shape[1], batch, dtype, mesh)
    if mesh is None:
        read, wave = read_within(ledger, asked, checkpoint.path, len(chunks), progress_bar)
    else:
        require_in_memory(ledger, asked, checkpoint.path)
        read, wave = partial(load_model, mesh=mesh, progress=progress_bar), batch
    with _saving(in_first(save_base), original or checkpoint, source, chunks, dtype) as keep:
        model, base = read(checkpoint), _base(original, read, mesh)
        with around(mesh):
            evaluation = evaluate(
                model, chunks, base, dtype=dtype, batch=batch, wave=wave, keep=keep, progress=progress_bar
            )
    print_table(f"{checkpoint.path} on {source.source}", ("figure", "value"), figures.evaluation_rows(evaluation))
    size = figures.size_figures(folder_bytes(checkpoint.path), checkpoint.num_elements)
    written = {**size, **figures.evaluation_figures(evaluation, source), **cost_of_the_run(started)}
    figures.write_json(json, written)


def _original(against: str | None, checkpoint: Checkpoint, text: Text, chunks: np.ndarray, dtype: str) -> Original:
    """What --against names: a checkpoint, or predictions of the same chunks in the same dtype."""
    if against is None:
        return None
    if not Path(against).is_file():
        original = open_checkpoint(against)
        _require_one_vocabulary(against, original.config.vocab_size, checkpoint)
        return original
    saved = open_predictions(Path(against))
    _require_one_vocabulary(against, abstract_leaf(saved.head_spec).shape[0], checkpoint)
    if not np.array_equal(saved.tokens_NT, chunks):
        raise InputError(
            f"{against} holds predictions of {saved.origin.text} (SHA-256 {saved.origin.text_sha256}) in "
            f"{len(saved.tokens_NT)} chunks of {saved.tokens_NT.shape[1]} tokens; {text.source} ({text.sha256}) gives "
            f"others, and the same text and tokenizer are needed"
        )
    if saved.dtype != dtype:
        raise InputError(f"{against} holds predictions in {saved.dtype}; --dtype {saved.dtype} compares with them")
    return saved


def _require_one_vocabulary(against: str, found: int, checkpoint: Checkpoint) -> None:
    own = checkpoint.config.vocab_size
    if found != own:
        raise InputError(
            f"{against} has {found} tokens and {checkpoint.path} {own}; two models of one vocabulary are needed"
        )


def _batch(mesh: Mesh | None, chunks: int) -> int:
    """Chunks at once: about _BATCH, and as many in every part of them."""
    parts = 1 if mesh is None else mesh.shape[DATA]
    if chunks < parts:
        raise InputError(f"--mesh has data={parts} and the text {chunks} chunks; up to data={chunks} is accepted")
    return min(-(-_BATCH // parts), chunks // parts) * parts


def _needs(checkpoint: Checkpoint, original: Original, length: int, batch: int, dtype: str, mesh: Mesh | None) -> Needs:
    base: DeepseekV3 | Leaf | None = None
    if isinstance(original, SavedPredictions):
        base = abstract_leaf(original.head_spec)
    elif original is not None:
        base = abstract_model(original)
    return needs(abstract_model(checkpoint), base, length, batch, dtype, mesh)


def _base(original: Original, read: Read, mesh: Mesh | None) -> DeepseekV3 | Source | Predictions | None:
    if isinstance(original, SavedPredictions):
        head = original.head()
        return Predictions(original.states_NSD, head if mesh is None else spread(head, mesh))
    return None if original is None else read(original)


def _saving(
    path: Path | None, saved: Checkpoint | SavedPredictions, text: Text, chunks: np.ndarray, dtype: str
) -> AbstractContextManager[Callable[[np.ndarray], None] | None]:
    """The file of a checkpoint's predictions, if one is wanted."""
    if path is None or isinstance(saved, SavedPredictions):
        return nullcontext()
    origin = BaseOrigin(str(saved.path), text.source, text.sha256)
    return saved_predictions(path, origin, chunks, CheckpointSource(saved).head, dtype)

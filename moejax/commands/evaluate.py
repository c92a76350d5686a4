"""`moejax evaluate`."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from moejax.checkpoint.load import Checkpoint, abstract_model, open_checkpoint
from moejax.checkpoint.predictions import BaseOrigin, SavedPredictions, open_predictions, saved_predictions
from moejax.checkpoint.source import CheckpointSource
from moejax.checkpoint.store import folder_bytes
from moejax.commands.common import cost_of_the_run, evaluation_text, tokenize
from moejax.errors import InputError
from moejax.evaluate.divergence import Predictions, evaluate
from moejax.evaluate.memory import Needs, Read, needs, read_within
from moejax.evaluate.text import Text
from moejax.formats import Leaf, abstract_leaf
from moejax.ledger import ledger_of
from moejax.model import DeepseekV3
from moejax.model.source import Source
from moejax.report import figures
from moejax.report.console import print_table, progress_bar
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
    json: Path | None,
) -> None:
    """Perplexity and divergence."""
    started = time.monotonic()
    figures.require_writable(json, save_base)
    ledger = ledger_of(memory)
    checkpoint = open_checkpoint(name)
    source = evaluation_text(text)
    chunks = tokenize(source, load_tokenizer(checkpoint.path), checkpoint.config)
    original = _original(against, checkpoint, source, chunks, dtype)
    if save_base is not None and isinstance(original, SavedPredictions):
        raise InputError(f"{against} holds predictions already; --save-base takes them from a checkpoint")
    asked = _needs(checkpoint, original, chunks, dtype)
    read, wave = read_within(ledger, asked, checkpoint.path, len(chunks), progress_bar)
    with _saving(save_base, original or checkpoint, source, chunks, dtype) as keep:
        evaluation = evaluate(
            read(checkpoint),
            chunks,
            _base(original, read),
            dtype=dtype,
            batch=_BATCH,
            wave=wave,
            keep=keep,
            progress=progress_bar,
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


def _needs(checkpoint: Checkpoint, original: Original, chunks: np.ndarray, dtype: str) -> Needs:
    base: DeepseekV3 | Leaf | None = None
    if isinstance(original, SavedPredictions):
        base = abstract_leaf(original.head_spec)
    elif original is not None:
        base = abstract_model(original)
    return needs(abstract_model(checkpoint), base, chunks.shape[1], min(_BATCH, len(chunks)), dtype)


def _base(original: Original, read: Read) -> DeepseekV3 | Source | Predictions | None:
    if isinstance(original, SavedPredictions):
        return Predictions(original.states_NSD, original.head())
    return None if original is None else read(original)


def _saving(
    path: Path | None, saved: Checkpoint | SavedPredictions, text: Text, chunks: np.ndarray, dtype: str
) -> AbstractContextManager[Callable[[np.ndarray], None] | None]:
    """The file of a checkpoint's predictions, if one is wanted."""
    if path is None or isinstance(saved, SavedPredictions):
        return nullcontext()
    origin = BaseOrigin(str(saved.path), text.source, text.sha256)
    return saved_predictions(path, origin, chunks, CheckpointSource(saved).head, dtype)

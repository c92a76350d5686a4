"""`moejax evaluate`."""

import time
from pathlib import Path

from moejax.checkpoint.hf_names import num_elements
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.tokenizer import load_tokenizer
from moejax.commands.common import cost_of_the_run, evaluation_text, tokenize
from moejax.errors import InputError
from moejax.evaluate import divergence
from moejax.report import figures
from moejax.report.console import print_table, progress_bar


def run_evaluate(name: str | None, against: str | None, text: Path | None, dtype: str, json: Path | None) -> None:
    """Perplexity and divergence."""
    started = time.monotonic()
    figures.require_writable(json)
    checkpoint = open_checkpoint(name)
    tokenizer = load_tokenizer(checkpoint.path)
    source = evaluation_text(text)
    evaluated = tokenize(source, tokenizer)
    original = open_checkpoint(against) if against else None
    if original is not None and original.config.vocab_size != checkpoint.config.vocab_size:
        raise InputError(
            f"{against} has {original.config.vocab_size} tokens and {checkpoint.path} "
            f"{checkpoint.config.vocab_size}; two models of one vocabulary are needed"
        )
    base = load_model(original) if original is not None else None
    evaluation = divergence.evaluate(load_model(checkpoint), evaluated, base, dtype=dtype, progress=progress_bar)
    print_table(f"{checkpoint.path} on {source.source}", ("figure", "value"), figures.evaluation_rows(evaluation))
    size = figures.size_figures(folder_bytes(checkpoint.path), num_elements(checkpoint.config))
    written = {**size, **figures.evaluation_figures(evaluation, source), **cost_of_the_run(started)}
    figures.write_json(json, written)

"""What each command does: opens files, calls the library, prints and writes the figures."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.hf_names import num_elements
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import Checkpoint, load_model, open_checkpoint
from moejax.checkpoint.native import NativeCheckpoint
from moejax.checkpoint.store import folder_bytes, require_free
from moejax.checkpoint.summary import summarize
from moejax.checkpoint.tokenizer import Tokenizer, load_tokenizer
from moejax.errors import InputError
from moejax.evaluate import divergence
from moejax.evaluate.generate import generate
from moejax.evaluate.text import Text, chunks, default_calibration_text, default_evaluation_text, read_text
from moejax.pipeline import compress as job
from moejax.pipeline.options import Settings
from moejax.planning.size import format_size, parse_budget
from moejax.report import figures
from moejax.report.console import print_table, progress_bar

# Enough of the default texts for stable figures in a minute on two cores.
_CALIBRATION_BYTES, _EVALUATION_BYTES = 1_500_000, 200_000
# Chunks on which plans are tried out.
_PROBED_CHUNKS = 8


def run_compress(
    name: str | None,
    budget: str,
    output: Path,
    calibration: Path | None,
    calibration_chunks: int,
    text: Path | None,
    json: Path | None,
) -> None:
    """The main job. Everything that can be refused is, before the long part begins."""
    started = time.monotonic()
    require_free(output)
    figures.require_writable(json)
    if calibration_chunks < 1:
        raise InputError(f"--calibration-chunks is {calibration_chunks}; at least 1 is needed")
    checkpoint = job.require_original(open_checkpoint(name))
    tokenizer, settings = load_tokenizer(checkpoint.path), Settings()
    source = read_text(calibration) if calibration else default_calibration_text(_CALIBRATION_BYTES)
    evaluation = _evaluation_text(text)
    if source.sha256 == evaluation.sha256:
        raise InputError(f"{text}: is the calibration text; a text that calibration does not see is needed")
    budget_bytes = parse_budget(budget, checkpoint.num_elements)
    job.check(checkpoint, budget_bytes, settings, job.provenance(source, calibration_chunks, settings))
    evaluated = _tokenize(evaluation, tokenizer)
    calibrated, probed = job.split_calibration(_tokenize(source, tokenizer), calibration_chunks, _PROBED_CHUNKS)
    made = job.provenance(source, len(calibrated), settings)
    bf16 = format_size(2 * checkpoint.num_elements)
    print(f"budget {format_size(budget_bytes)} ({budget_bytes} bytes), from {bf16} in BF16")
    print(f"calibrating on {source.source}; evaluating on {evaluation.source}")
    prepared = job.prepare(checkpoint, calibrated, probed, settings, made, progress_bar)
    result = job.compress_checkpoint(prepared, output, budget_bytes, evaluated, progress_bar)
    _report_compressed(checkpoint, output, budget_bytes, result, evaluation, _cost_of_the_run(started), json)


def _report_compressed(
    checkpoint: HuggingFaceCheckpoint,
    output: Path,
    budget: int,
    result: job.Result,
    text: Text,
    cost: dict[str, Any],
    json: Path | None,
) -> None:
    kinds = summarize(open_checkpoint(output).abstract_leaves())
    print_table("weights", ("kind", "numbers", "bytes", "bits each"), figures.kind_rows(kinds))
    size = figures.size_figures(result.bytes, checkpoint.num_elements)
    rows = [
        *figures.size_rows(size),
        *figures.plan_rows(result.planned, checkpoint.config),
        *figures.evaluation_rows(result.evaluation),
        *figures.cost_rows(cost),
    ]
    print_table(str(output), ("figure", "value"), rows)
    written = {
        **size,
        "budget_bytes": budget,
        **figures.evaluation_figures(result.evaluation, text),
        **figures.plan_figures(result.planned),
        **figures.kind_figures(kinds),
        **cost,
    }
    figures.write_json(json, written)


def run_evaluate(name: str | None, against: str | None, text: Path | None, dtype: str, json: Path | None) -> None:
    """Perplexity and divergence."""
    started = time.monotonic()
    figures.require_writable(json)
    checkpoint = open_checkpoint(name)
    tokenizer = load_tokenizer(checkpoint.path)
    source = _evaluation_text(text)
    evaluated = _tokenize(source, tokenizer)
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
    written = {**size, **figures.evaluation_figures(evaluation, source), **_cost_of_the_run(started)}
    figures.write_json(json, written)


def run_generate(name: str | None, prompt: str, tokens: int, temperature: float, seed: int, dtype: str) -> None:
    """Text, as it comes."""
    if tokens < 1:
        raise InputError(f"--tokens is {tokens}; at least 1 is needed")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"--temperature is {temperature}; 0 or a positive number is needed")
    checkpoint = open_checkpoint(name)
    tokenizer = load_tokenizer(checkpoint.path)
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_token_id is not None:
        ids = np.concatenate([[tokenizer.bos_token_id], ids])
    stop = tokenizer.eos_token_ids
    continuation = generate(
        load_model(checkpoint), ids, tokens, temperature=temperature, seed=seed, stop=stop, dtype=dtype
    )
    print(prompt, end="", flush=True)
    for piece in _pieces(tokenizer, continuation):
        print(piece, end="", flush=True)
    print()


def run_inspect(name: str | None, json: Path | None) -> None:
    """What a checkpoint holds."""
    figures.require_writable(json)
    checkpoint = open_checkpoint(name)
    kinds, config = summarize(checkpoint.abstract_leaves()), checkpoint.config
    size = folder_bytes(checkpoint.path)
    print(f"{checkpoint.path}: {checkpoint.raw_config['model_type']}, {format_size(size)} ({size} bytes)")
    facts: dict[str, Any] = {
        "model_type": checkpoint.raw_config["model_type"],
        "bytes": size,
        "layers": config.num_hidden_layers,
        "mtp_blocks": config.num_nextn_predict_layers,
        "experts_per_layer": _experts_per_layer(checkpoint),
        "experts_per_token": sorted(set(checkpoint.experts_per_token)),
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
    }
    if isinstance(checkpoint, NativeCheckpoint):
        facts["made_by"] = checkpoint.provenance
    print_table("checkpoint", ("fact", "value"), [(key, str(value)) for key, value in facts.items()])
    print_table("weights", ("kind", "numbers", "bytes", "bits each"), figures.kind_rows(kinds))
    figures.write_json(json, {**facts, **figures.kind_figures(kinds)})


def _evaluation_text(path: Path | None) -> Text:
    return read_text(path) if path else default_evaluation_text(_EVALUATION_BYTES)


def _tokenize(text: Text, tokenizer: Tokenizer) -> np.ndarray:
    try:
        return chunks(tokenizer.encode(text.content), bos_token_id=tokenizer.bos_token_id)
    except InputError as error:
        raise InputError(f"{text.source}: {error}") from None


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes whole: a character may take several tokens, and until the last it decodes to U+FFFD."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


def _experts_per_layer(checkpoint: Checkpoint) -> list[int]:
    return [leaf.shape[0] for name, leaf in checkpoint.abstract_leaves() if name.endswith("mlp.bias")]


def _cost_of_the_run(started: float) -> dict[str, Any]:
    return {"seconds": time.monotonic() - started, "peak_memory_bytes": figures.peak_memory_bytes()}

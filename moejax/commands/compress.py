"""`moejax compress`."""

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.atomic import partial_path, require_free, require_space
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.load import Checkpoint, abstract_model, open_checkpoint
from moejax.checkpoint.native_writer import require_no_other_job
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.summary import summarize
from moejax.checkpoint.toml_file import read_toml
from moejax.commands.common import cost_of_the_run, evaluation_text, read_recipe, tokenize
from moejax.errors import InputError, note
from moejax.evaluate.divergence import note_length
from moejax.evaluate.text import Text, default_calibration_text, read_text
from moejax.ledger import ledger_of
from moejax.model import DeepseekV3
from moejax.pipeline import job
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.check import Limit, check_limit, check_plan_bytes, require_original
from moejax.pipeline.fit_device import Device, context_for
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.room import room_in
from moejax.pipeline.shapes import shapes_of
from moejax.pipeline.work import Work, work_in
from moejax.planning import Method
from moejax.planning.memory import device_memory
from moejax.planning.plan import Plan, digest, from_json
from moejax.planning.size import format_size, parse_budget, parse_size
from moejax.report import figures
from moejax.report.console import print_table, progress_bar
from moejax.report.pruning import pruning_figures, pruning_rows
from moejax.tokenizer import load_tokenizer
from moejax.version import __version__

# Enough of the default text for stable figures in a minute on two cores.
_CALIBRATION_BYTES = 1_500_000
# Chunks on which plans are tried out.
_PROBED_CHUNKS = 8


@dataclass(frozen=True)
class _Texts:
    """What is calibrated on and what is evaluated on."""

    calibration: Text
    calibrated: Calibrated
    evaluation: Text
    evaluated: np.ndarray


def run_compress(
    name: str | None,
    budget: str | None,
    fit: str | None,
    context: int | None,
    batch: int | None,
    output: Path,
    recipe: str | None,
    plan: Path | None,
    calibration: Path | None,
    calibration_chunks: int,
    text: Path | None,
    drop_mtp: bool,
    work: Path | None,
    memory: str | None,
    json: Path | None,
) -> None:
    """The main job. Everything that can be refused is, before the long part begins."""
    started = time.monotonic()
    if work is None:
        require_no_other_job(output)
    elif _is_within(work, output) or _is_within(work, partial_path(output)):
        raise InputError(f"--work {work} lies in the output {output}; another folder is needed")
    require_free(output, is_resumable=lambda _: work is not None)
    figures.require_writable(json, output)
    if calibration_chunks < 1:
        raise InputError(f"--calibration-chunks is {calibration_chunks}; at least 1 is needed")
    if recipe is not None and plan is not None:
        raise InputError("--recipe says how a plan is made and --plan gives one; only one of them is accepted")
    checkpoint, own_recipe = require_original(open_checkpoint(name, drop_mtp)), read_recipe(recipe or "fast")
    dropped = checkpoint.dropped_mtp
    given = None if plan is None else from_json(read_toml(plan))
    asked = _asked(checkpoint, budget, fit, context, batch)
    limit, most_bytes = _checked(checkpoint, own_recipe, given, asked)
    require_space(output.absolute(), most_bytes - folder_bytes(partial_path(output)))
    texts = _read_texts(checkpoint, calibration, calibration_chunks, text)
    bf16 = format_size(2 * checkpoint.num_elements)
    if isinstance(limit, Device):
        print(f"as much as decodes in {format_size(limit.memory)}, from {bf16} in BF16")
    else:
        print(f"budget {format_size(most_bytes)} ({most_bytes} bytes), from {bf16} in BF16")
    if dropped:
        print(f"MTP blocks dropped: {dropped}")
    print(f"calibrating on {texts.calibration.source}; evaluating on {texts.evaluation.source}")
    made = job.provenance(
        texts.calibration, len(texts.calibrated.chunks), own_recipe if given is None else None, dropped
    )
    by, ledger = own_recipe if given is None else given, ledger_of(memory)
    with (
        room_in(ledger, *_working_on(checkpoint, by.method, texts), output) as room,
        _kept(work, output, checkpoint, texts, by, drop_mtp) as kept,
    ):
        own, told = texts.calibrated, (ledger, progress_bar)
        if given is not None:
            put = room.kept
            result = job.carry_out(checkpoint, given, own, made, output, most_bytes, texts.evaluated, *told, kept, put)
        else:
            prepared = job.prepare(checkpoint, own, own_recipe, made, progress_bar, kept, room)
            result = job.compress_checkpoint(prepared, output, limit, texts.evaluated, *told)
    cost = cost_of_the_run(started)
    if memory is not None:
        cost["memory_limit_bytes"] = ledger.limit
        if cost["peak_memory_bytes"] > ledger.limit:
            note(f"{format_size(cost['peak_memory_bytes'])} were held for a while, more than --memory {memory}")
    _report(checkpoint, output, limit, result, texts.evaluation, dropped, cost, json)


def _working_on(checkpoint: HuggingFaceCheckpoint, method: Method, texts: _Texts) -> tuple[DeepseekV3, int, bool]:
    """What is compressed, in shapes alone, the tokens of a chunk, and whether there are Hessians."""
    return shapes_of(checkpoint, method).model, texts.calibrated.chunks.shape[1], method.error_feedback


def _is_within(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


@contextmanager
def _kept(
    folder: Path | None,
    output: Path,
    checkpoint: HuggingFaceCheckpoint,
    texts: _Texts,
    by: Recipe | Plan,
    drop_mtp: bool,
) -> Iterator[Work]:
    """What the job has found out, kept in a folder if one is given; if it is stopped, how it goes on is said."""
    calibrated = sha256(b"".join(own.tobytes() for own in texts.calibrated)).hexdigest()
    made_of = {
        "version of moejax": __version__,
        "checkpoint": checkpoint.fingerprint(),
        "calibration": calibrated,
        "plan" if isinstance(by, Plan) else "recipe": digest(by) if isinstance(by, Plan) else repr(by),
        "--drop-mtp": str(drop_mtp),
    }
    with work_in(folder, made_of) as work:
        try:
            yield work
        except (KeyboardInterrupt, OSError, MemoryError, RuntimeError):  # the last is XLA's out of memory, too
            if output.exists():
                figures_of = ["moejax", "evaluate", str(output), "--against", str(checkpoint.path)]
                note(f"{output} is complete; its figures are told by: {shlex.join(figures_of)}")
            elif folder is not None:
                places = " and ".join(str(own) for own in (folder, partial_path(output)) if own.exists())
                note(f"what is finished is kept in {places}; this goes on: {shlex.join(['moejax', *sys.argv[1:]])}")
            raise


def _asked(
    checkpoint: HuggingFaceCheckpoint, budget: str | None, fit: str | None, context: int | None, batch: int | None
) -> Limit | None:
    """What a plan is to keep within, if that is given. Raises InputError for options that do not go together."""
    if fit is None:
        if context is not None or batch is not None:
            raise InputError("--context and --batch say what a device is to decode; its memory, --fit, is needed")
        return None if budget is None else parse_budget(budget, checkpoint.num_elements)
    if budget is not None:
        raise InputError("--budget and --fit each say how large the result may be; only one of them is accepted")
    sequences = 1 if batch is None else batch
    return Device(parse_size(fit), context_for(context, sequences, checkpoint.config), sequences)


def _checked(
    checkpoint: HuggingFaceCheckpoint, recipe: Recipe, plan: Plan | None, asked: Limit | None
) -> tuple[Limit, int]:
    """The limit, a plan's own bytes if nothing else is asked for, and about the bytes that the folder takes at most.
    Raises InputError for what cannot be done."""
    if plan is not None:
        if isinstance(asked, Device):
            raise InputError("--fit says how large a plan is to be and --plan gives one; only one of them is accepted")
        size = check_plan_bytes(checkpoint, plan, asked)
        return size, size
    if asked is None:
        raise InputError("neither --budget nor --fit nor --plan is given; a budget such as 6x or a plan is needed")
    return asked, check_limit(checkpoint, asked, recipe)


def _read_texts(checkpoint: HuggingFaceCheckpoint, calibration: Path | None, chunks: int, text: Path | None) -> _Texts:
    tokenizer = load_tokenizer(checkpoint.path)
    source = read_text(calibration) if calibration else default_calibration_text(_CALIBRATION_BYTES)
    evaluation = evaluation_text(text)
    if source.sha256 == evaluation.sha256:
        raise InputError(f"{text}: is the calibration text; a text that calibration does not see is needed")
    evaluated = tokenize(evaluation, tokenizer, checkpoint.config)
    note_length(checkpoint.config, evaluated)
    of_source = tokenize(source, tokenizer, checkpoint.config)
    calibrated = job.split_calibration(of_source, chunks, _PROBED_CHUNKS)
    return _Texts(source, calibrated, evaluation, evaluated)


def _report(
    checkpoint: HuggingFaceCheckpoint,
    output: Path,
    limit: Limit,
    result: job.Result,
    text: Text,
    dropped_mtp: int,
    cost: dict[str, Any],
    json: Path | None,
) -> None:
    written = open_checkpoint(output)
    kinds = summarize(written.abstract_leaves())
    print_table("weights", ("kind", "numbers", "bytes", "bits each"), figures.kind_rows(kinds))
    if result.pruning:
        columns, rows = pruning_rows(result.pruning, checkpoint.config)
        print_table("pruning, layer by layer", columns, rows)
    size = figures.size_figures(result.bytes, checkpoint.num_elements)
    device_rows, device_figures = _on_device(limit, written) if isinstance(limit, Device) else ([], {})
    rows = [
        *figures.size_rows(size),
        *device_rows,
        *figures.plan_rows(result.plan, checkpoint.config),
        *figures.search_rows(result.planned),
        *figures.evaluation_rows(result.evaluation, result.predicted),
        *figures.cost_rows(cost),
    ]
    print_table(str(output), ("figure", "value"), rows)
    told = {
        **size,
        "budget_bytes": None if isinstance(limit, Device) else limit,
        **device_figures,
        "dropped_mtp_blocks": dropped_mtp,
        **figures.evaluation_figures(result.evaluation, text),
        **figures.plan_figures(result.plan),
        **figures.search_figures(result.planned),
        **pruning_figures(result.pruning),
        **figures.kind_figures(kinds),
        **cost,
    }
    figures.write_json(json, told)


def _on_device(device: Device, written: Checkpoint) -> tuple[figures.Rows, dict[str, Any]]:
    """What the checkpoint takes of its device."""
    memory = device_memory(abstract_model(written), device.context, device.batch)
    given = device.memory, memory.longest_context(device.memory, written.config.max_position_embeddings)
    return figures.memory_rows(memory, given), {"memory": figures.memory_figures(memory, given)}

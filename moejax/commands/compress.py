"""`moejax compress`."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moejax.checkpoint.atomic import partial_path, require_free, require_space
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint
from moejax.checkpoint.json_file import read_json_object
from moejax.checkpoint.load import open_checkpoint
from moejax.checkpoint.source import CheckpointSource
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.toml_file import read_toml
from moejax.commands.common import cost_of_the_run, evaluation_text, read_recipe, tokenize
from moejax.commands.devices import in_first
from moejax.commands.work_option import kept_work, require_work_beside
from moejax.errors import InputError, note
from moejax.evaluate.divergence import note_length
from moejax.evaluate.text import Text, default_calibration_text, read_text
from moejax.ledger import Ledger, ledger_of
from moejax.pipeline import job
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.check import Limit, check_limit, check_plan_bytes, require_original
from moejax.pipeline.duration import expected
from moejax.pipeline.fit_device import Device, context_for
from moejax.pipeline.outlook import plan_by_scores
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.room import Room, room_in
from moejax.pipeline.sampled import EXPERTS, ROWS, is_sampled
from moejax.pipeline.shapes import Shapes, ready, shapes_of
from moejax.pipeline.work import Work
from moejax.planning import Method
from moejax.planning.expert_scores import ExpertScores, expert_scores_from_json
from moejax.planning.plan import Plan, digest, from_json
from moejax.planning.size import format_size, parse_budget, parse_size
from moejax.report import figures
from moejax.report.compression import report_compression
from moejax.report.console import Phases
from moejax.sharding import Crew, crew_of
from moejax.tokenizer import load_tokenizer

# Enough of the default text for stable figures in a minute on two cores.
_CALIBRATION_BYTES = 1_500_000
_CALIBRATION_CHUNKS = 128
# Chunks on which plans are tried out.
_PROBED_CHUNKS = 8


@dataclass(frozen=True)
class _Texts:
    """What is calibrated on and what is evaluated on."""

    calibration: Text
    calibrated: Calibrated
    evaluation: Text
    evaluated: np.ndarray


@dataclass(frozen=True)
class _Asked:
    """What is compressed, to what, within which bytes and memory. limit: what a plan is to keep within; most_bytes:
    about what the folder takes at most."""

    checkpoint: HuggingFaceCheckpoint
    output: Path
    limit: Limit
    most_bytes: int
    drop_mtp: bool
    work: Path | None
    ledger: Ledger
    phases: Phases
    crew: Crew

    def shapes(self, method: Method) -> Shapes:
        """Of what is compressed by a method."""
        return shapes_of(self.checkpoint, method)


def run_compress(
    name: str | None,
    budget: str | None,
    fit: str | None,
    context: int | None,
    batch: int | None,
    output: Path,
    recipe: str | None,
    plan: Path | None,
    expert_scores: Path | None,
    calibration: Path | None,
    calibration_chunks: int | None,
    text: Path | None,
    drop_mtp: bool,
    work: Path | None,
    memory: str | None,
    mesh: Mesh | None,
    json: Path | None,
) -> None:
    """The main job. Everything that can be refused is, before the long part begins."""
    started, json, crew = time.monotonic(), in_first(json), crew_of(mesh)
    if crew.is_first:
        require_work_beside(work, output)
        require_free(output, is_resumable=lambda _: work is not None)
    figures.require_writable(json, in_first(output))
    if calibration_chunks is not None and calibration_chunks < 1:
        raise InputError(f"--calibration-chunks is {calibration_chunks}; at least 1 is needed")
    if recipe is not None and plan is not None:
        raise InputError("--recipe says how a plan is made and --plan gives one; only one of them is accepted")
    beside = {"plan": plan, "calibration": calibration, "calibration-chunks": calibration_chunks, "text": text}
    if expert_scores is not None and (given_too := [name for name, own in beside.items() if own is not None]):
        raise InputError(
            f"--expert-scores plans with nothing going through the model; --{given_too[0]} beside it is not accepted"
        )
    checkpoint, own_recipe = require_original(open_checkpoint(name, drop_mtp)), read_recipe(recipe or "fast")
    given = None if plan is None else from_json(read_toml(plan))
    scores = None if expert_scores is None else _read_scores(expert_scores, checkpoint, own_recipe)
    limit, most_bytes = _checked(checkpoint, own_recipe, given, _limit(checkpoint, budget, fit, context, batch))
    if crew.is_first:
        require_space(output.absolute(), most_bytes - folder_bytes(partial_path(output)))
    crew.agree({"budget, --fit or --plan": f"{limit} {most_bytes} {given is None} {scores is None}"})
    texts = None if scores is not None else _read_texts(checkpoint, calibration, calibration_chunks, text)
    bf16 = format_size(2 * checkpoint.num_elements)
    if isinstance(limit, Device):
        print(f"as much as decodes in {format_size(limit.memory)}, from {bf16} in BF16")
    else:
        print(f"budget {format_size(most_bytes)} ({most_bytes} bytes), from {bf16} in BF16")
    if checkpoint.dropped_mtp:
        print(f"MTP blocks dropped: {checkpoint.dropped_mtp}")
    asked = _Asked(checkpoint, output, limit, most_bytes, drop_mtp, work, ledger_of(memory), Phases(), crew)
    if texts is None:
        assert scores is not None
        print(f"planning by {scores.source}; nothing goes through the model, so its figures are not known")
        result = _by_scores(asked, own_recipe, scores)
    else:
        print(f"calibrating on {texts.calibration.source}; evaluating on {texts.evaluation.source}")
        result = _by_recipe(asked, own_recipe, texts) if given is None else _by_plan(asked, given, texts)
    cost = cost_of_the_run(started) | {"seconds_by_phase": asked.phases.seconds}
    if asked.phases.expected:
        cost["expected_seconds_by_phase"] = asked.phases.expected
    if memory is not None:
        cost["memory_limit_bytes"] = asked.ledger.limit
        if cost["peak_memory_bytes"] > asked.ledger.limit:
            note(f"{format_size(cost['peak_memory_bytes'])} were held for a while, more than --memory {memory}")
    if not crew.is_first:
        return
    written = open_checkpoint(output)
    told = report_compression(checkpoint, limit, written, result, None if texts is None else texts.evaluation, cost)
    figures.write_json(json, told)


def _by_recipe(asked: _Asked, recipe: Recipe, texts: _Texts) -> job.Result:
    """Measured, planned, written, evaluated."""
    own, told = texts.calibrated, (asked.ledger, asked.phases)
    sampled = is_sampled(recipe, asked.shapes(recipe.method).model)
    if sampled:
        print(f"prices come from a sample: {EXPERTS} experts of a layer, {ROWS} rows of a matrix")
    with _room(asked, recipe.method, texts, not sampled) as room, _kept(asked, texts, {"recipe": repr(recipe)}) as kept:
        made = _provenance(asked, texts, recipe)
        if sampled:
            source = ready(CheckpointSource(asked.checkpoint), recipe.method)
            asked.phases.expected = expected(source, recipe, own, room, len(texts.evaluated), asked.crew)
        prepared = job.prepare(asked.checkpoint, own, recipe, made, asked.phases, kept, room)
        return job.compress_checkpoint(prepared, asked.output, asked.limit, texts.evaluated, *told)


def _by_plan(asked: _Asked, plan: Plan, texts: _Texts) -> job.Result:
    """Written and evaluated."""
    own, told = texts.calibrated, (asked.ledger, asked.phases)
    with _room(asked, plan.method, texts) as room, _kept(asked, texts, {"plan": digest(plan)}) as kept:
        to, made = (asked.output, asked.most_bytes, texts.evaluated), _provenance(asked, texts, None)
        return job.carry_out(asked.checkpoint, plan, own, made, *to, *told, kept, room)


def _by_scores(asked: _Asked, recipe: Recipe, scores: ExpertScores) -> job.Result:
    """Planned and written."""
    shapes = asked.shapes(recipe.method)
    plan = plan_by_scores(asked.checkpoint.abstract_model(), shapes, recipe, scores, asked.limit).plan
    budget = asked.limit if isinstance(asked.limit, int) else asked.most_bytes
    made = job.provenance_by_scores(scores, asked.checkpoint.dropped_mtp)
    made_of = {"recipe": repr(recipe), "plan": digest(plan), "--drop-mtp": str(asked.drop_mtp)}
    with _room(asked, recipe.method, None), _work(asked, made_of) as kept:
        return job.carry_out_unseen(asked.checkpoint, plan, made, asked.output, budget, asked.phases, kept)


def _room(
    asked: _Asked, method: Method, texts: _Texts | None, keeps_rounded: bool = False
) -> AbstractContextManager[Room]:
    """For chunks of the texts, or for none."""
    tokens = 0 if texts is None else texts.calibrated.chunks.shape[1]
    model = asked.shapes(method).model
    return room_in(asked.ledger, model, tokens, method, asked.output, keeps_rounded, asked.most_bytes, asked.crew)


def _kept(asked: _Asked, texts: _Texts, by: Mapping[str, str]) -> AbstractContextManager[Work]:
    calibrated = sha256(b"".join(own.tobytes() for own in texts.calibrated)).hexdigest()
    made_of = {"calibration": calibrated, **by, "--drop-mtp": str(asked.drop_mtp)}
    return _work(asked, made_of)


def _work(asked: _Asked, made_of: Mapping[str, str]) -> AbstractContextManager[Work]:
    return kept_work(asked.work, asked.output, asked.checkpoint, made_of, asked.crew)


def _provenance(asked: _Asked, texts: _Texts, recipe: Recipe | None) -> dict[str, Any]:
    return job.provenance(texts.calibration, len(texts.calibrated.chunks), recipe, asked.checkpoint.dropped_mtp)


def _read_scores(path: Path, checkpoint: HuggingFaceCheckpoint, recipe: Recipe) -> ExpertScores:
    if recipe.error_feedback or recipe.sequential:
        raise InputError(
            "with --expert-scores nothing goes through the model, which error_feedback and sequential ask for; "
            "a recipe with neither, such as fast, is needed"
        )
    return expert_scores_from_json(read_json_object(path), checkpoint.config, str(path))


def _limit(
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


def _read_texts(
    checkpoint: HuggingFaceCheckpoint, calibration: Path | None, chunks: int | None, text: Path | None
) -> _Texts:
    tokenizer = load_tokenizer(checkpoint.path)
    source = read_text(calibration) if calibration else default_calibration_text(_CALIBRATION_BYTES)
    evaluation = evaluation_text(text)
    if source.sha256 == evaluation.sha256:
        raise InputError(f"{text}: is the calibration text; a text that calibration does not see is needed")
    evaluated = tokenize(evaluation, tokenizer, checkpoint.config)
    note_length(checkpoint.config, evaluated)
    of_source = tokenize(source, tokenizer, checkpoint.config)
    calibrated = job.split_calibration(of_source, chunks or _CALIBRATION_CHUNKS, _PROBED_CHUNKS)
    return _Texts(source, calibrated, evaluation, evaluated)

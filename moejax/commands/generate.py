"""`moejax generate`."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moejax.checkpoint.load import Checkpoint, abstract_model, load_model, open_checkpoint
from moejax.checkpoint.source import CheckpointSource
from moejax.commands.devices import in_first, require_one_sequence
from moejax.commands.watch import is_first
from moejax.errors import InputError, note
from moejax.generate.decode import Decoding, Runner, check_request, generate
from moejax.generate.from_disk import PartByPart
from moejax.generate.memory import ample_bytes, bytes_on_mesh, decoding_needs
from moejax.generate.sampling import Sampling, check_sampling
from moejax.generate.speculative import Speculation, require_mtp
from moejax.generate.speed import Timed
from moejax.ledger import Ledger, ledger_of
from moejax.machine import peak_memory
from moejax.model import DeepseekV3
from moejax.report import figures
from moejax.sharding import around
from moejax.tokenizer import ChatTemplate, Tokenizer, encode_chat, load_chat_template, load_tokenizer, text_pieces


@dataclass(frozen=True)
class Request:
    """What is asked for.

    prompt: what a user says, or, if `raw` or where the checkpoint has no chat template, the text to continue. system:
    what is said before it. stop: texts of single tokens that end the continuation, beside the checkpoint's own.
    """

    prompt: str
    system: str | None
    raw: bool
    tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    speculate: bool


def run_generate(
    name: str | None,
    request: Request,
    decoding: Decoding,
    memory: str | None,
    mesh: Mesh | None,
    json: Path | None,
) -> None:
    """Text, as it comes."""
    json = in_first(json)
    figures.require_writable(json)
    require_one_sequence(mesh)
    ledger = ledger_of(memory)
    _check(request)
    checkpoint = open_checkpoint(name)
    if request.speculate:
        require_mtp(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint.path)
    stop = [*tokenizer.eos_token_ids, *(_single_token(tokenizer, text) for text in request.stop)]
    template = None if request.raw else load_chat_template(checkpoint.path)
    ids = _prompt_ids(request, template, tokenizer)
    check_request(checkpoint.config, [ids], request.tokens)
    model = _within(ledger, checkpoint, len(ids), request, decoding, mesh)
    if template is None:
        print(request.prompt, end="", flush=True)
    with around(mesh):
        continuation = _continuation(model, ids, request, stop, decoding)
        timed = Timed(continuation)
        for piece in text_pieces(tokenizer, timed):
            print(piece, end="", flush=True)
    print()
    facts = _facts(timed, len(ids), continuation)
    if is_first():
        print(_summary(facts), file=sys.stderr)
    figures.write_json(json, facts)


def _check(request: Request) -> None:
    if request.tokens < 1:
        raise InputError(f"--tokens is {request.tokens}; at least 1 is needed")
    check_sampling(request.sampling)
    if request.speculate and request.sampling.temperature != 0:
        raise InputError(
            f"--speculate gives the likeliest tokens, --temperature {request.sampling.temperature} draws them; "
            "one of them is needed"
        )


def _single_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise InputError(f"--stop {text!r} is {len(ids)} tokens; the text of a single one is needed")
    return int(ids[0])


def _prompt_ids(request: Request, template: ChatTemplate | None, tokenizer: Tokenizer) -> np.ndarray:
    if template is not None:
        said = {"system": request.system, "user": request.prompt}
        messages = [{"role": role, "content": content} for role, content in said.items() if content is not None]
        return encode_chat(tokenizer, template, messages)
    if request.system is not None:
        raise InputError("--system needs a chat template, which the checkpoint does not have or --raw leaves out")
    ids = tokenizer.encode(request.prompt)
    return ids if tokenizer.bos_token_id is None else np.concatenate([[tokenizer.bos_token_id], ids])


def _continuation(
    model: DeepseekV3 | Runner, ids: np.ndarray, request: Request, stop: list[int], decoding: Decoding
) -> Iterable[int]:
    if request.speculate and isinstance(model, DeepseekV3):
        return Speculation(model, ids, request.tokens, stop, decoding)
    return generate(
        model, ids, request.tokens, sampling=request.sampling, seed=request.seed, stop=stop, decoding=decoding
    )


def _within(
    ledger: Ledger,
    checkpoint: Checkpoint,
    prompt_tokens: int,
    request: Request,
    decoding: Decoding,
    mesh: Mesh | None,
) -> DeepseekV3 | Runner:
    """The model, in memory if it fits, else part by part; on a mesh in memory."""
    model = abstract_model(checkpoint)
    if mesh is not None:
        needed = bytes_on_mesh(mesh, model, prompt_tokens, request.tokens, decoding)
        if not ledger.fits(needed):
            ledger.refuse(f"{checkpoint.path} cannot be run on a mesh, which needs all of it in memory,", needed)
        return load_model(checkpoint, mesh)
    if ledger.fits(ample_bytes(model, prompt_tokens, request.tokens, decoding)):
        return load_model(checkpoint)
    needs = decoding_needs(model, prompt_tokens, request.tokens, decoding)
    if ledger.fits(needs.whole):
        return load_model(checkpoint)
    if request.speculate:
        ledger.refuse(f"{checkpoint.path} cannot be run with --speculate, which needs it in memory,", needs.whole)
    if not ledger.fits(needs.part):
        ledger.refuse(f"{checkpoint.path} cannot be run, not even block by block,", needs.part)
    note(f"{ledger.sentence_of(needs.whole)}: read block by block from disk for every token, which is slow")
    return PartByPart(CheckpointSource(checkpoint))


def _facts(timed: Timed, prompt_tokens: int, continuation: Iterable[int]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "tokens": timed.count,
        "seconds_to_first_token": timed.first_seconds,
        "decode_tokens_per_s": timed.decode_tokens_per_s,
        "peak_memory_bytes": peak_memory(),
    }
    if isinstance(continuation, Speculation):
        facts |= {"drafted": continuation.drafted, "accepted": continuation.accepted}
    return facts


def _summary(facts: dict[str, Any]) -> str:
    """One line behind the text."""
    parts = [f"{facts['prompt_tokens']} prompt tokens, {facts['tokens']} generated"]
    if facts["seconds_to_first_token"] is not None:
        parts.append(f"the first after {facts['seconds_to_first_token']:.2f} s (compiling included)")
    if facts["decode_tokens_per_s"] is not None:
        parts.append(f"then {facts['decode_tokens_per_s']:.1f} tokens/s")
    if "drafted" in facts:
        rate = 100 * facts["accepted"] / max(facts["drafted"], 1)
        parts.append(f"{rate:.0f} % of {facts['drafted']} drafts accepted")
    return "; ".join(parts)

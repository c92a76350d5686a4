"""`moejax generate` and `moejax bench`, on the small checkpoint, which has an MTP block."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import moejax, refused, run
from moejax import ledger
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.commands import generate as command
from moejax.generate.decode import generate
from moejax.generate.memory import DecodingNeeds, decoding_needs
from moejax.tokenizer import load_tokenizer
from small_checkpoint import words

PROMPT = words(seed=5, count=6)
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def greedy(small: Path) -> str:
    return run("generate", small, "--prompt", PROMPT, "--tokens", 8)


@pytest.fixture
def chatty(small: Path, tmp_path: Path) -> Path:
    """The small checkpoint with a chat template."""
    folder = tmp_path / "chatty"
    shutil.copytree(small, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_speculation_prints_the_same_text_and_its_acceptance_rate(small: Path, greedy: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    ran = moejax("generate", small, "--prompt", PROMPT, "--tokens", 8, "--speculate", "--json", file)
    assert (ran.code, ran.out) == (0, greedy)
    facts = json.loads(file.read_text())
    assert 4 <= facts["drafted"] <= 8 and 0 <= facts["accepted"] <= facts["drafted"]
    rate = round(100 * facts["accepted"] / facts["drafted"])
    assert f"{rate} % of {facts['drafted']} drafts accepted" in ran.err


def test_the_last_line_says_how_fast_it_was(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    ran = moejax("generate", small, "--prompt", PROMPT, "--tokens", 8, "--json", file)
    facts = json.loads(file.read_text())
    assert re.search(r"\d+ prompt tokens, 8 generated; the first after .* s .*; then .* tokens/s\n$", ran.err)
    assert facts["tokens"] == 8 and facts["decode_tokens_per_s"] > 0 and facts["peak_memory_bytes"] > 10**8


@pytest.mark.parametrize("options", [["--prefill-chunk", 3], ["--cache-dtype", "int8"], ["--top-k", 1]], ids=str)
def test_options_that_change_nothing_of_the_likeliest_text(small: Path, greedy: str, options: list[object]) -> None:
    assert run("generate", small, "--prompt", PROMPT, "--tokens", 8, *options) == greedy


def test_a_model_beyond_memory_is_read_from_disk(
    small: Path, greedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is taken to hold nothing, so that the limit lies between a part and the whole on any machine."""
    monkeypatch.setattr(ledger, "resident_memory", lambda: 0)
    asked: list[DecodingNeeds] = []

    def asking(*arguments: Any) -> DecodingNeeds:
        asked.append(decoding_needs(*arguments))
        return asked[-1]

    monkeypatch.setattr(command, "decoding_needs", asking)
    options = ["generate", small, "--prompt", PROMPT, "--tokens", 8]
    too_little = refused(tmp_path, *options, "--memory", "1MB")
    assert re.search(r"cannot be run, not even block by block, in 1\.00 MB; 0\.\d\dGB would do$", too_little.strip())
    ran = moejax(*options, "--memory", f"{asked[0].part}B")
    assert (ran.code, ran.out) == (0, greedy)
    assert "read block by block from disk for every token, which is slow" in ran.err
    message = refused(tmp_path, *options, "--memory", f"{asked[0].part}B", "--speculate")
    assert "cannot be run with --speculate, which needs it in memory, in" in message


def test_a_chat_template_is_used_unless_raw(chatty: Path, greedy: str) -> None:
    options = ["generate", chatty, "--tokens", 8]
    assert run(*options, "--prompt", PROMPT, "--raw") == greedy
    said = run(*options, "--prompt", PROMPT, "--system", "be brief")
    rendered = f"system: be brief user: {PROMPT} "
    assert f"{rendered}{said}" == run(*options, "--prompt", rendered, "--raw")


def test_a_stop_token_ends_the_text(small: Path, greedy: str) -> None:
    checkpoint, tokenizer = open_checkpoint(small), load_tokenizer(small)
    ids = np.concatenate([[tokenizer.bos_token_id], tokenizer.encode(PROMPT)])
    tokens = list(generate(load_model(checkpoint), ids, 8))
    assert greedy == f"{PROMPT}{tokenizer.decode(tokens)}\n"
    # The last one that its text alone stands for.
    end = max(n for n, token in enumerate(tokens) if tokenizer.encode(tokenizer.decode([token])).tolist() == [token])
    first = tokens.index(tokens[end])
    stopped = run("generate", small, "--prompt", PROMPT, "--tokens", 8, "--stop", tokenizer.decode([tokens[end]]))
    assert stopped == f"{PROMPT}{tokenizer.decode(tokens[:first])}\n" != greedy


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--stop", "two words"], "--stop 'two words' is"),
        (["--system", "be brief"], "--system needs a chat template"),
        (["--speculate", "--temperature", "0.5"], "one of them is needed"),
        (["--top-p", "0"], "top_p is 0.0; a number above 0, at most 1 is needed"),
        (["--prefill-chunk", "0"], "prefill_chunk is 0; at least 1 token is needed"),
        (["--memory", "much"], "'much' is no size"),
    ],
)
def test_requests_that_cannot_be(small: Path, tmp_path: Path, options: list[str], reason: str) -> None:
    assert reason in refused(tmp_path, "generate", small, "--prompt", "a", *options)


def test_speculation_needs_an_mtp_block(tiny: Path, tmp_path: Path) -> None:
    assert "has no MTP block" in refused(tmp_path, "generate", tiny, "--prompt", "a", "--speculate")


def test_bench_prints_and_writes_its_figures(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = ["--prompt", 5, "--tokens", 3, "--repeats", 1, "--cache-dtype", "int8"]
    printed = run("bench", small, *options, "--json", file)
    facts = json.loads(file.read_text())
    assert facts["cache_bytes_per_token"] == 3 * (128 + 32 + 4)
    assert {"bytes", "decode_tokens_per_s", "prefill_tokens_per_s", "peak_memory_bytes", "seconds"} <= facts.keys()
    assert f"{facts['decode_tokens_per_s']:.1f} tokens/s" in printed and "492 bytes a token" in printed


def test_nothing_to_measure(small: Path, tmp_path: Path) -> None:
    assert "tokens is 0; at least 1 is needed" in refused(tmp_path, "bench", small, "--tokens", 0)

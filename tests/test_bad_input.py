"""What no command takes: one sentence on standard error, exit code 2, and nothing left behind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from command_line import refused
from moejax.checkpoint.store import folder_bytes
from small_checkpoint import words

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint to damage."""
    return Path(shutil.copytree(small, tmp_path / "own"))


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_shard(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of the first shard, and the index with them."""
    file, index_file = folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"
    with safe_open(file, framework="numpy") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}
    index = json.loads(index_file.read_text())
    for name in tensors:
        del index["weight_map"][name]
    change(tensors)
    save_file(tensors, file)
    index["weight_map"] |= dict.fromkeys(tensors, file.name)
    index_file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "budget", ["", "6", "6y", "x", "-6x", "0x", "nanx", "1e3GB", "0.5.5MB", "9 parsecs", "9" * 400 + "TB"]
)
def test_a_malformed_budget(small: Path, text_options: list[object], tmp_path: Path, budget: str) -> None:
    arguments = ["compress", small, f"--budget={budget}", "--output", tmp_path / "out", *text_options]
    assert f"{budget!r} is no budget" in refused(tmp_path, *arguments)


@pytest.mark.parametrize("budget", ["1GB", "0.5x", "99999999EiB"])
def test_a_budget_above_the_original(small: Path, text_options: list[object], tmp_path: Path, budget: str) -> None:
    message = refused(tmp_path, "compress", small, "--budget", budget, "--output", tmp_path / "out", *text_options)
    assert "the original takes 5.1" in message and f"({folder_bytes(small)} bytes)" in message


def test_a_budget_that_needs_formats_the_recipe_lacks(small: Path, text_options: list[object], tmp_path: Path) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text('formats = ["int2g128"]')
    options = ["--recipe", recipe, "--output", tmp_path / "out", *text_options]
    message = refused(tmp_path, "compress", small, "--budget", "60KB", *options)
    assert re.search(
        r"cannot be met; .*; the recipe has no format that .* for embed, head, layers\.2\.mlp\.shared", message
    )


def test_a_token_beyond_the_vocabulary(own: Path, text_options: list[object], tmp_path: Path) -> None:
    """Tokenizers know tokens that were added after the model was made."""
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    added = {"id": 320, "content": "<|user|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append(added | flags)
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tmp_path / "said.txt"
    text.write_text(words(seed=3, count=450) + "<|user|>" + words(seed=4, count=450))
    known = "token 320 is none of the model's 320; 0 to 319 are accepted\n"
    assert refused(tmp_path, "evaluate", own, "--text", text) == f"moejax: said.txt: {known}"
    output = ["--budget", "4x", "--output", tmp_path / "out"]
    assert refused(tmp_path, "compress", own, *output, *text_options[:2], "--text", text).endswith(f"said.txt: {known}")
    assert refused(tmp_path, "compress", own, *output, "--calibration", text, *text_options[2:]).endswith(known)
    assert refused(tmp_path, "generate", own, "--raw", "--prompt", "a <|user|>").endswith(known)


def test_an_output_that_exists(small: Path, text_options: list[object], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "link"):
        message = refused(tmp_path, "compress", small, "--budget", "4x", "--output", tmp_path / name, *text_options)
        assert f"{tmp_path / name}: exists already" in message


def test_places_that_cannot_be_written_to(small: Path, text_options: list[object], tmp_path: Path) -> None:
    arguments = ["compress", small, "--budget", "4x", *text_options]
    message = refused(tmp_path, *arguments, "--output", tmp_path / "no" / "out")
    assert f"no folder can be made in {tmp_path / 'no'}" in message
    figures = tmp_path / "no" / "figures.json"
    message = refused(tmp_path, *arguments, "--output", tmp_path / "out", "--json", figures)
    assert f"{figures}: cannot be written" in message


def test_calibration_and_evaluation_text_are_not_the_same(small: Path, calibration_text: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.txt").write_bytes(calibration_text.read_bytes())
    texts = ["--calibration", calibration_text, "--text", tmp_path / "copy.txt"]
    message = refused(tmp_path, "compress", small, "--budget", "4x", "--output", tmp_path / "out", *texts)
    assert f"{tmp_path / 'copy.txt'}: is the calibration text" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is not a file"),
        (b"", "is empty"),
        (b"\xff" * 5000, "is not UTF-8"),
        (words(seed=3, count=100).encode(), "at least 512 are needed for one chunk"),
    ],
)
@pytest.mark.parametrize("option", ["--calibration", "--text"])
def test_a_text_that_cannot_be_used(
    small: Path, text_options: list[object], tmp_path: Path, option: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "short.txt").write_bytes(content)
    texts = [*text_options, option, tmp_path / "short.txt"]
    message = refused(tmp_path, "compress", small, "--budget", "4x", "--output", tmp_path / "out", *texts)
    assert "short.txt" in message and reason in message


def test_a_calibration_text_of_one_chunk(small: Path, heldout_text: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(words(seed=3, count=180))
    texts = ["--calibration", tmp_path / "one.txt", "--text", heldout_text]
    message = refused(tmp_path, "compress", small, "--budget", "4x", "--output", tmp_path / "out", *texts)
    assert "the calibration text has 1 chunk of 512 tokens; 2 are needed" in message


def test_too_few_calibration_chunks(small: Path, text_options: list[object], tmp_path: Path) -> None:
    arguments = ["compress", small, "--budget", "4x", "--output", tmp_path / "out", *text_options]
    message = refused(tmp_path, *arguments, "--calibration-chunks", 0)
    assert "--calibration-chunks is 0; at least 1 is needed" in message


def test_what_is_compressed_already(compressed: Path, text_options: list[object], tmp_path: Path) -> None:
    arguments = ["compress", compressed, "--budget", "20x", "--output", tmp_path / "out"]
    assert "compressed already" in refused(tmp_path, *arguments, *text_options)


def test_a_nan(own: Path, text_options: list[object], tmp_path: Path) -> None:
    def set_nan(tensors: dict[str, Any]) -> None:
        tensors[EXPERT] = tensors[EXPERT].copy()
        tensors[EXPERT][5, 7] = np.nan

    edit_shard(own, set_nan)
    message = refused(tmp_path, "compress", own, "--budget", "4x", "--output", tmp_path / "out", *text_options)
    assert f"model-00001-of-00002.safetensors: the tensor {EXPERT} holds a NaN or an infinity" in message


def assert_refused(checkpoint: object, text_options: list[object], folder: Path, *parts: str) -> None:
    commands = [
        ["compress", checkpoint, "--budget", "4x", "--output", folder / "out", *text_options],
        ["evaluate", checkpoint, *text_options[2:]],
        ["generate", checkpoint, "--prompt", "a"],
        ["inspect", checkpoint, "--json", folder / "figures.json"],
    ]
    for arguments in commands:
        message = refused(folder, *arguments)
        assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; accepted are deepseek_v3"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"n_group": 5}, "n_group 5 must divide n_routed_experts 12"),
    ],
)
def test_a_config_of_something_else(
    own: Path, text_options: list[object], tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    edit_config(own, **fields)
    assert_refused(own, text_options, tmp_path, str(own / "config.json"), reason)


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"\xff" * 16 + data[16:], lambda data: data[:-1000], lambda data: data[:5], lambda data: b""],
    ids=["corrupt", "truncated", "stump", "empty"],
)
def test_a_damaged_shard(
    own: Path, text_options: list[object], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    shard = own / "model-00002-of-00002.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    assert_refused(own, text_options, tmp_path, f"{shard}: is not a sound safetensors file")


def test_a_missing_shard(own: Path, text_options: list[object], tmp_path: Path) -> None:
    (own / "model-00002-of-00002.safetensors").unlink()
    assert_refused(own, text_options, tmp_path, "names the file model-00002-of-00002.safetensors, which is not")


def test_a_missing_tensor(own: Path, text_options: list[object], tmp_path: Path) -> None:
    edit_shard(own, lambda tensors: tensors.pop(EXPERT))
    assert_refused(own, text_options, tmp_path, f"the tensor {EXPERT} is missing")


def test_a_tensor_too_many(own: Path, text_options: list[object], tmp_path: Path) -> None:
    extra = {"model.layers.1.mlp.experts.12.up_proj.weight": np.zeros((128, 128), ml_dtypes.bfloat16)}
    edit_shard(own, lambda tensors: tensors.update(extra))
    assert_refused(own, text_options, tmp_path, f"the tensor {next(iter(extra))} is none of a deepseek_v3 model")


def test_no_checkpoint_at_all(text_options: list[object], tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", text_options, tmp_path, f"{tmp_path / 'nowhere'}: is neither a folder")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", text_options, tmp_path, f"{tmp_path / 'empty' / 'config.json'}: cannot be read")


def test_a_native_checkpoint_with_a_damaged_manifest(
    compressed: Path, text_options: list[object], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    # Blanks at its end, which set provenance's bytes aside, are none of it.
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text().rstrip()[:-100])
    assert_refused(copy, text_options, tmp_path, f"{copy / 'manifest.json'}: is not valid JSON")


def test_a_native_checkpoint_with_a_flipped_bit(compressed: Path, heldout_text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(compressed, tmp_path / "copy"))
    chunk = copy / "items" / "layer_1" / "self_attn.o.words" / "0.0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    for arguments in (["evaluate", copy, "--text", heldout_text], ["generate", copy, "--prompt", "a"]):
        assert "the bytes of layers.1.self_attn.o are not those" in refused(tmp_path, *arguments)


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_a_tokenizer_that_cannot_be_read(
    own: Path, text_options: list[object], tmp_path: Path, content: str | None
) -> None:
    (own / "tokenizer.json").unlink()
    if content is not None:
        (own / "tokenizer.json").write_text(content)
    for arguments in (
        ["compress", own, "--budget", "4x", "--output", tmp_path / "out", *text_options],
        ["evaluate", own, *text_options[2:]],
        ["generate", own, "--prompt", "a"],
    ):
        assert str(own / "tokenizer.json") in refused(tmp_path, *arguments)


def test_a_model_of_another_vocabulary(small: Path, heldout_text: Path, tiny: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, "evaluate", small, "--against", tiny, "--text", heldout_text)
    assert "4096 tokens" in message and "320" in message and "one vocabulary" in message


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--tokens=0", "--tokens is 0; at least 1 is needed"),
        ("--tokens=-3", "--tokens is -3; at least 1 is needed"),
        ("--temperature=-1", "temperature is -1.0; 0 or a positive number is needed"),
        ("--temperature=nan", "temperature is nan; 0 or a positive number is needed"),
        ("--temperature=inf", "temperature is inf; 0 or a positive number is needed"),
        ("--tokens=3000", "and 3000 more exceed the context of 2048 tokens"),
    ],
)
def test_bad_numbers(small: Path, tmp_path: Path, option: str, reason: str) -> None:
    assert reason in refused(tmp_path, "generate", small, "--prompt", "a", option)


def test_a_prompt_longer_than_the_context(small: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, "generate", small, "--prompt", words(seed=5, count=700))
    assert "prompt tokens and 128 more exceed the context of 2048 tokens" in message


def test_a_prompt_without_tokens(own: Path, tmp_path: Path) -> None:
    (own / "tokenizer_config.json").unlink()
    assert "the prompt has no tokens" in refused(tmp_path, "generate", own, "--prompt", "")

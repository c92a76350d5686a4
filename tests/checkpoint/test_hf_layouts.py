"""Layouts that are not read: each is named by what it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from fp8_checkpoint import CONFIG
from model_cases import Tensors, random_tensors, write_hf_checkpoint
from moejax.checkpoint.load import open_checkpoint
from moejax.errors import InputError
from moejax.tokenizer import load_tokenizer

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(CONFIG, seed=35)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        open_checkpoint(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("endings", "reason"),
    [
        (
            (".weight_packed", ".weight_scale", ".weight_shape"),
            "integers that compressed-tensors packed (pack-quantized)",
        ),
        ((".weight", ".weight_scale"), "scales of compressed-tensors, one a row or one a tensor"),
        ((".qweight", ".qzeros", ".scales", ".g_idx"), "integers that GPTQ or AWQ packed"),
        ((".weight", ".weight.absmax", ".weight.quant_map"), "scales of bitsandbytes"),
        ((".weight", ".SCB"), "scales of bitsandbytes"),
    ],
)
def test_other_quantizations(tmp_path: Path, tensors: Tensors, endings: tuple[str, ...], reason: str) -> None:
    rest = {name: tensor for name, tensor in tensors.items() if name != f"{KV_A}.weight"}
    write_hf_checkpoint(tmp_path, CONFIG, rest | {KV_A + ending: np.zeros((4, 2), np.int8) for ending in endings})
    message = refusal(tmp_path)
    assert f"the tensor {KV_A}{endings[0] if endings[0] != '.weight' else endings[1]} holds {reason}; " in message
    assert message.endswith("weights in bfloat16, float16, float32, or FP8 with float32 scales of blocks "
                            "(weight_scale_inv) are accepted")  # fmt: skip


def test_a_language_model_within_another(tmp_path: Path, tensors: Tensors) -> None:
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    write_hf_checkpoint(tmp_path / "tensors", CONFIG, wrapped)
    assert "of a language model within another model; tensors without the prefix language_model., and" in refusal(
        tmp_path / "tensors"
    )
    write_hf_checkpoint(tmp_path / "config", {"model_type": "kimi_vl", "text_config": CONFIG}, wrapped)
    assert "config.json: model_type is 'kimi_vl', with a language model in its text_config; a" in refusal(
        tmp_path / "config"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert f"holds a PEFT adapter ({name}) and no model; a checkpoint that it has been merged into" in refusal(tmp_path)


def test_an_adapter_beside_a_model_does_not_matter(tmp_path: Path, tensors: Tensors) -> None:
    write_hf_checkpoint(tmp_path, CONFIG, tensors)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    assert open_checkpoint(tmp_path).path == tmp_path


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "model.pt", "model.Q4_K_M.gguf"])
def test_weights_in_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert f"has weights in {name} and no safetensors file; safetensors files are accepted" in refusal(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


def test_a_hub_cache_is_told_from_its_snapshots(tmp_path: Path, tensors: Tensors) -> None:
    cache = tmp_path / "models--org--name"
    for revision in ("0a1b", "2c3d"):
        write_hf_checkpoint(cache / "snapshots" / revision, CONFIG, tensors)
    for name in ("refs", "blobs"):
        (cache / name).mkdir()
    snapshots = cache / "snapshots"
    assert refusal(cache).endswith(f"is the hub's cache of a model; give its snapshot {snapshots / '0a1b'} or "
                                   f"{snapshots / '2c3d'}")  # fmt: skip
    assert open_checkpoint(snapshots / "0a1b").path == snapshots / "0a1b"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4000000000\n"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"])
def test_pointers_of_git_lfs(tmp_path: Path, tensors: Tensors, file: str) -> None:
    write_hf_checkpoint(tmp_path, CONFIG, tensors)
    (tmp_path / file).write_text(POINTER)
    assert f"{tmp_path / file}: is a Git LFS pointer in place of the file itself; `git lfs pull`" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model"])
def test_pointers_of_git_lfs_in_place_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=rf"{name}: is a Git LFS pointer in place of the file itself"):
        load_tokenizer(tmp_path)

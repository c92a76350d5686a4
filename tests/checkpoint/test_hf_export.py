import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from exported_case import SCALES, build, write_native_of
from fp8_checkpoint import fp8_config
from golden_files import as_choice, load_golden, relative_error
from leaf_oracle import random_leaf, to_numpy
from model_cases import Tensors, write_hf_checkpoint
from moejax.calibrate import calibrate
from moejax.checkpoint.hf_export import Dtype, write_huggingface
from moejax.checkpoint.huggingface import HuggingFaceCheckpoint, open_huggingface
from moejax.checkpoint.load import load_model
from moejax.checkpoint.native import open_native
from moejax.checkpoint.store import folder_bytes
from moejax.errors import InputError, Note
from moejax.formats import ExpertWeights, select_experts
from moejax.model import Config, DeepseekV3, Layout, named_leaves
from moejax.model.source import ModelSource
from moejax.pipeline.calibrated import Calibrated
from moejax.pipeline.shapes import copied_files, shapes_for
from moejax.pipeline.write import write_plan
from moejax.planning import KEEP, BlockPlan, Method, Plan
from moejax.planning.plan import PROJECTIONS
from moejax.progress import silent
from small_checkpoint import FP8_CONFIG
from small_models import CONFIG, FP8_BLOCK, RAW_CONFIG, small_model

# By block of the small checkpoints: three of four experts of every group, other ones in every block.
EQUAL = {1: (0, 1, 2, 5, 6, 7, 8, 10, 11), 2: (1, 2, 3, 4, 6, 7, 8, 9, 11), 3: (0, 2, 3, 4, 5, 7, 8, 9, 10)}
TOKENS = np.random.RandomState(0).randint(FP8_CONFIG["vocab_size"], size=(1, 9))


@jax.jit
def both_logits(model: DeepseekV3, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The model's logits and its MTP block's."""
    hidden = model.hidden(tokens_BT)
    return model.logits(hidden), model.draft_logits(tokens_BT, hidden)


@jax.jit
def replayed_logits(model: DeepseekV3, tokens_BT: jax.Array, choices: list[jax.Array | None]) -> jax.Array:
    return model(tokens_BT, choices=choices)


def write_pruned(
    checkpoint: HuggingFaceCheckpoint, output: Path, keep: Mapping[int, tuple[int, ...]], per_token: int, scale: float
) -> None:
    """The checkpoint without some experts and with nothing rounded, as `compress` writes it."""
    blocks = [BlockPlan()] + [
        BlockPlan(keep=own, experts={name: (KEEP,) * len(own) for name in PROJECTIONS}, experts_per_token=per_token)
        for own in keep.values()
    ]
    plan = Plan(KEEP, KEEP, tuple(replace(block, routing_scale=scale) if block.keep else block for block in blocks))
    copied = copied_files(checkpoint.path)
    chunks, model = np.zeros((1, 8), np.int32), load_model(checkpoint)
    shapes = shapes_for(model, Method(), checkpoint.raw_config, copied)
    # What is not rounded needs no statistics.
    statistics = jax.eval_shape(lambda m: calibrate(m, chunks), shapes.model)
    statistics = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), statistics)
    source, calibrated = ModelSource(model), Calibrated(chunks, chunks)
    write_plan(source, shapes, plan, calibrated, output, sys.maxsize, silent, statistics)


def read_all(folder: Path) -> Tensors:
    opened = open_huggingface(folder).folder
    return {name: opened.tensors[name].load() for name in opened.tensors}


def tensors_of(folder: Path) -> dict[str, tuple[tuple[int, ...], Any, bytes]]:
    return {name: (array.shape, array.dtype, array.tobytes()) for name, array in read_all(folder).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_an_fp8_checkpoint_with_an_mtp_block_comes_back_through_the_native_one(small_fp8: Path, tmp_path: Path) -> None:
    native, output = tmp_path / "native", tmp_path / "out"
    write_pruned(open_huggingface(small_fp8), native, dict.fromkeys((1, 2, 3), tuple(range(12))), 3, 1.0)
    written = write_huggingface(open_native(native), output, copied=copied_files(native))
    assert tensors_of(output) == tensors_of(small_fp8)
    assert config_of(output) == config_of(small_fp8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (small_fp8 / name).read_bytes()
    assert written == folder_bytes(output)


def test_the_tiny_checkpoint_comes_back_in_other_shards(tiny: Path, tmp_path: Path) -> None:
    write_huggingface(open_huggingface(tiny), tmp_path / "out", shard_bytes=3_000_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 10
    assert tensors_of(tmp_path / "out") == tensors_of(tiny) and config_of(tmp_path / "out") == config_of(tiny)


def test_a_pruned_model_keeps_the_bytes_of_its_survivors_and_its_logits(small_fp8: Path, tmp_path: Path) -> None:
    native, output = tmp_path / "native", tmp_path / "out"
    write_pruned(open_huggingface(small_fp8), native, EQUAL, per_token=2, scale=1.5)
    write_huggingface(open_native(native), output)
    changed = {"n_routed_experts": 9, "num_experts_per_tok": 2, "routed_scaling_factor": 2.5 * 1.5}
    assert config_of(output) == FP8_CONFIG | changed
    before, after = open_huggingface(small_fp8).folder, tensors_of(output)
    expected = {name: before.tensors[name].load() for name in before.tensors if ".mlp.experts." not in name}
    for block, kept in EQUAL.items():
        mlp = f"model.layers.{block}.mlp"
        for name in (f"{mlp}.gate.weight", f"{mlp}.gate.e_score_correction_bias"):
            expected[name] = expected[name][list(kept)]
        for new, old in enumerate(kept):
            for part in (f"{name}_proj.weight{scale}" for name in PROJECTIONS for scale in ("", "_scale_inv")):
                expected[f"{mlp}.experts.{new}.{part}"] = before.tensors[f"{mlp}.experts.{old}.{part}"].load()
    assert after == {name: (array.shape, array.dtype, array.tobytes()) for name, array in expected.items()}
    exported, compressed = load_model(open_huggingface(output)), load_model(open_native(native))
    for own, wanted in zip(both_logits(exported, TOKENS), both_logits(compressed, TOKENS), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-5)


def test_a_dequantized_export_is_what_hugging_face_computes(tmp_path: Path) -> None:
    """The golden file is transformers' run of such an export; its weights are the compressed model's."""
    golden, model = load_golden("exported"), build()
    choices = [None, *map(as_choice, golden["experts"])]
    logits = replayed_logits(model, golden["tokens"], choices)
    assert relative_error(np.asarray(logits), golden["logits"]) < 1e-3
    write_native_of(model, tmp_path / "native")
    write_huggingface(open_native(tmp_path / "native"), tmp_path / "out", "float32")
    exported = open_huggingface(tmp_path / "out")
    assert json.loads(str(golden["config"])) == exported.raw_config
    for name, leaf in named_leaves(model).items():
        if name.endswith("routing_scale"):
            assert leaf == SCALES[int(name.split(".")[1])] and exported.leaf(name) == 1
        elif isinstance(leaf, ExpertWeights):
            scale = SCALES[int(name.split(".")[1])] if name.endswith("down") else 1.0
            expected = np.stack([scale * to_numpy(leaf.expert(e)) for e in range(leaf.num_experts)])
            np.testing.assert_allclose(exported.leaf(name).buckets[0], expected, rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_allclose(exported.leaf(name), to_numpy(leaf), rtol=1e-6, err_msg=name)


def test_a_dequantized_export_holds_every_matrix_but_the_routers_in_its_dtype(small_fp8: Path, tmp_path: Path) -> None:
    original = open_huggingface(small_fp8)
    write_huggingface(original, tmp_path / "out", "bfloat16")
    assert config_of(tmp_path / "out") == {
        name: value for name, value in FP8_CONFIG.items() if name != "quantization_config"
    }
    exported = open_huggingface(tmp_path / "out")
    for name in Layout(original.config).shapes():
        before, after = original.leaf(name), exported.leaf(name)
        if isinstance(before, ExpertWeights):
            before, after = before.buckets[0], after.buckets[0]
        if before.ndim < 2 or name.endswith(".router"):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(after, before)
        else:
            rounded = to_numpy(before).astype(np.float32).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(after, rounded, err_msg=name)
    write_huggingface(replace(original, raw_config=FP8_CONFIG | {"dtype": "bfloat16"}), tmp_path / "new", "float32")
    assert config_of(tmp_path / "new")["dtype"] == "float32"


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_a_quantization_that_is_true_of_no_tensor_is_not_copied(small: Path, tmp_path: Path, method: str) -> None:
    config = config_of(small) | {"quantization_config": {"quant_method": method, "weight_block_size": [128, 128]}}
    dense = Path(shutil.copytree(small, tmp_path / "dense"))
    (dense / "config.json").write_text(json.dumps(config))
    write_huggingface(open_huggingface(dense), tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(small)
    assert tensors_of(tmp_path / "out") == tensors_of(small)


def test_mtp_layers_that_the_files_lack_are_not_exported(small: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in read_all(small).items() if not name.startswith("model.layers.3.")}
    write_hf_checkpoint(tmp_path / "lacking", config_of(small), tensors)
    with pytest.warns(Note, match="the model is taken without them"):
        checkpoint = open_huggingface(tmp_path / "lacking")
    write_huggingface(checkpoint, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(small) | {"num_nextn_predict_layers": 0}
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()


@dataclass(frozen=True)
class InMemory:
    """A checkpoint that lies in no folder."""

    raw_config: dict[str, Any]
    config: Config
    leaves: dict[str, Any]
    experts_per_token: tuple[int, ...] = (3, 3, 3, 3)
    path: Path = Path("nowhere")
    num_elements: int = 0
    experts_in_slice: int | None = None

    def leaf(self, name: str, like: Any = None) -> Any:
        return self.leaves[name]

    def experts(self, name: str, members: Sequence[int]) -> ExpertWeights:
        return select_experts(self.leaves[name], members)

    def abstract_leaves(self) -> Iterable[tuple[str, Any]]:
        return self.leaves.items()


def kept(model: InMemory, block: str, experts: Iterable[int]) -> InMemory:
    """With only those experts in one block."""
    keep, own = list(experts), dict(model.leaves)
    for name in ("router", "bias", "group_id"):
        own[f"{block}.mlp.{name}"] = own[f"{block}.mlp.{name}"][np.array(keep)]
    for name in PROJECTIONS:
        own[f"{block}.mlp.experts.{name}"] = select_experts(own[f"{block}.mlp.experts.{name}"], keep)
    return replace(model, leaves=own)


def kept_in_all(model: InMemory, experts: Iterable[int]) -> InMemory:
    for block in ("layers.1", "layers.2", "mtp.0.block"):
        model = kept(model, block, experts)
    return model


def scaled(model: InMemory) -> InMemory:
    return replace(model, leaves=model.leaves | {"layers.2.mlp.routing_scale": jnp.float32(1.25)})


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        (
            lambda m: kept(m, "layers.2", range(9)),
            None,
            "layers.2 keeps 9 experts and layers.1 12 experts; .*: share_kept = 0.75 in a recipe",
        ),
        (lambda m: kept(m, "mtp.0.block", range(9)), "float32", "mtp.0.block keeps 9 experts and layers.1 12 experts"),
        (
            lambda m: replace(m, experts_per_token=(3, 3, 2, 2)),
            "float32",
            "layers.2 activates 2 experts per token and layers.1 3 experts per token; .*: experts_per_token = 2 in a",
        ),
        (
            lambda m: replace(m, experts_per_token=(3, 3, 3, 2)),
            None,
            "mtp.0.block activates 2 experts per token and layers.1 3",
        ),
        (
            lambda m: kept_in_all(m, range(9)),
            "float32",
            'layers.1 keeps 4, 4, 1 experts of its groups; .* groups = "equal"',
        ),
        (lambda m: kept_in_all(m, range(10)), None, "layers.1 keeps 4, 4, 2 experts of its groups"),
        (
            lambda m: kept_in_all(m, range(11, -1, -1)),
            None,
            "layers.1 has its experts out of the order of their groups",
        ),
        (
            scaled,
            None,
            "layers.2 has routing scale 1.25 and layers.1 routing scale 1; .*: --dequantize bfloat16 multiplies "
            "weights by it, fit_routing_scale = false in a recipe",
        ),
    ],
)
def test_what_a_hugging_face_config_cannot_say(
    change: Callable[[InMemory], InMemory], dtype: Dtype | None, reason: str, tmp_path: Path
) -> None:
    model = InMemory(fp8_config(RAW_CONFIG, list(FP8_BLOCK)), CONFIG, named_leaves(small_model()))
    with pytest.raises(InputError, match=reason):
        write_huggingface(change(model), tmp_path / "out", dtype)
    assert not list(tmp_path.iterdir())


def test_integers_are_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    """Whatever comes before them."""
    model = InMemory(fp8_config(RAW_CONFIG, list(FP8_BLOCK)), CONFIG, named_leaves(small_model()))
    model.leaves["head"] = random_leaf("int6g32[97,64]")
    with pytest.raises(InputError, match=r"head is int6g32; .* --dequantize bfloat16"):
        write_huggingface(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_and_a_job_that_fails_midway(tmp_path: Path) -> None:
    leaves = named_leaves(small_model())
    model = InMemory(fp8_config(RAW_CONFIG, list(FP8_BLOCK)), CONFIG, leaves)
    with pytest.raises(InputError, match="exists already"):
        write_huggingface(model, tmp_path)

    class Failing(InMemory):
        def leaf(self, name: str, like: Any = None) -> Any:
            if name == "norm":
                raise InputError("the norm cannot be read")
            return super().leaf(name, like)

    with pytest.raises(InputError, match="the norm cannot be read"):
        write_huggingface(Failing(model.raw_config, CONFIG, leaves), tmp_path / "out")
    assert not list(tmp_path.iterdir())

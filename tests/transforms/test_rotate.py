"""A rotated model computes what the model computes: in float64 to 1e-9, in float32 with its expert choices replayed."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden_files import relative_error
from leaf_oracle import shapes_and_dtypes, to_numpy
from model_cases import BASE, Tensors, random_tensors
from moejax.checkpoint.huggingface import open_huggingface
from moejax.checkpoint.load import load_model
from moejax.errors import InputError
from moejax.formats import ExpertWeights, format_name, gather_experts
from moejax.kernels.hadamard_matrix import hadamard_matrix, hadamard_order
from moejax.model import DeepseekV3, Layout, named_leaves
from moejax.model.deepseek_v3 import Block, head_logits
from moejax.model.latent_cache import empty_cache
from moejax.model.leaves import Taps
from moejax.model.moe import MoE
from moejax.model.rope import Angles
from moejax.transforms.rotate import draw_signs, rotate
from native_checkpoint import assert_equal_bits
from small_models import CONFIG, RAW_CONFIG, model_of, small_model

SHALLOW = BASE | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "n_routed_experts": 8, "n_group": 2}
# D = 28 * 2, F = 12 * 4 (shared 12 * 8), dense 36 * 2, L = 20, V = 28, N = 12, without a query latent.
AWKWARD = SHALLOW | {
    "hidden_size": 56,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "intermediate_size": 72,
    "q_lora_rank": None,
    "kv_lora_rank": 20,
    "v_head_dim": 28,
    "qk_nope_head_dim": 12,
}
CASES = {"ordinary": SHALLOW, "awkward": AWKWARD}
SEED = 5
TOKENS = np.random.RandomState(0).randint(BASE["vocab_size"], size=(2, 8))
PROMPT = 7


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def uneven(tensors: Tensors) -> Tensors:
    """Every norm's gain far from one, of either sign."""
    random, out = np.random.RandomState(3), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            signs = random.choice([-1.0, 1.0], tensor.shape)
            out[name] = (signs * np.exp2(random.uniform(-1, 1, tensor.shape))).astype(np.float32)
    return out


@functools.cache
def original(case: str) -> DeepseekV3:
    return model_of(CASES[case], uneven(random_tensors(CASES[case], seed=2)))


@jax.jit
def whole_sequences(model: DeepseekV3, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits in float64, of the model and of its MTP block."""
    hidden = model.hidden(tokens_BT, jnp.float64)
    return model.logits(hidden), model.draft_logits(tokens_BT, hidden)


@jax.jit
def behind_a_cache(model: DeepseekV3, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same of a prompt and the token after it; the MTP block's only of the last position."""
    batch, length = tokens_BT.shape
    first, then, following = jnp.zeros(batch, int), jnp.full(batch, PROMPT), tokens_BT[:, 1:]
    cache = model.empty_cache(batch, length, jnp.float64)
    prompt, cache = model.extend(tokens_BT[:, :PROMPT], cache, first, jnp.float64)
    last, _ = model.extend(tokens_BT[:, PROMPT:], cache, then, jnp.float64)
    own_cache = empty_cache(model.config, batch, PROMPT, jnp.float64)
    _, own_cache = model.extend_draft(following[:, :-1], prompt[:, :-1], own_cache, first)
    drafted, _ = model.extend_draft(following[:, -1:], prompt[:, -1:], own_cache, then - 1)
    return model.logits(jnp.concatenate([prompt, last], axis=1)), head_logits(drafted, model.head.get_value())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "down"), [("ordinary", False), ("awkward", True)])
def test_float64_logits_and_drafts_are_the_originals_to_1e_9(case: str, down: bool) -> None:
    model = original(case)
    logits, drafts = whole_sequences(model, TOKENS)
    rotated = rotate(model, SEED, down=down, dtype=jnp.float64)
    for own, expected in zip(whole_sequences(rotated, TOKENS), (logits, drafts), strict=True):
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-9)
    for own, expected in zip(behind_a_cache(rotated, TOKENS), (logits, drafts[:, -1:]), strict=True):
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_every_weight_is_what_dense_rotations_make_of_it() -> None:
    """R_O^T W diag(gain) R_I in numpy, R as whole matrices, at every site."""
    model = original("awkward")
    rotated, config = rotate(model, SEED, down=True, dtype=jnp.float64), model.config
    before = {name: numpy_of(leaf) for name, leaf in named_leaves(model).items()}
    after = {name: numpy_of(leaf) for name, leaf in named_leaves(rotated).items()}
    signs, heads = draw_signs(config, SEED), config.num_attention_heads
    D, L, V, N = (whole(own) for own in (signs.residual_D, signs.kv_latent_L, signs.value_V, signs.nope_N))
    F, shared_F, dense_F = (whole(np.ones(size)) for size in (48, 96, 72))
    rope = np.eye(config.qk_rope_head_dim)
    gain = before["norm"]
    expected = {"embed": before["embed"] @ D, "head": before["head"] * gain @ D}
    for prefix in ("layers.0", "layers.1", "mtp.0.block"):
        own = {name.removeprefix(f"{prefix}."): leaf for name, leaf in before.items()}
        attention, mlp = own["input_norm"], own["post_attention_norm"]
        latent = own["self_attn.kv_a_norm"]
        turned = {
            "self_attn.q": block_diagonal([N, rope] * heads).T @ (own["self_attn.q"] * attention) @ D,
            "self_attn.kv_a": block_diagonal([L, rope]).T @ (own["self_attn.kv_a"] * attention) @ D,
            "self_attn.k_b": N.T @ (own["self_attn.k_b"] * latent) @ L,
            "self_attn.v_b": V.T @ (own["self_attn.v_b"] * latent) @ L,
            "self_attn.o": D.T @ own["self_attn.o"] @ block_diagonal([V] * heads),
        }
        if prefix == "layers.0":
            turned |= {f"mlp.{name}": own[f"mlp.{name}"] * mlp @ D for name in ("gate", "up")}
            turned["mlp.down"] = D.T @ own["mlp.down"] @ dense_F
        else:
            inputs = ("router", "experts.gate", "experts.up", "shared.gate", "shared.up")
            turned |= {f"mlp.{name}": own[f"mlp.{name}"] * mlp @ D for name in inputs}
            turned["mlp.experts.down"] = D.T @ own["mlp.experts.down"] @ F
            turned["mlp.shared.down"] = D.T @ own["mlp.shared.down"] @ shared_F
            turned |= {f"mlp.{name}": own[f"mlp.{name}"] for name in ("bias", "group_id", "routing_scale")}
        expected |= {f"{prefix}.{name}": leaf for name, leaf in turned.items()}
    of_embedding, of_hidden = np.split(before["mtp.0.eh_proj"], 2, axis=1)
    halves = D.T @ (of_embedding * before["mtp.0.enorm"]) @ D, D.T @ (of_hidden * before["mtp.0.hnorm"])
    expected |= {
        "mtp.0.eh_proj": np.concatenate(halves, axis=1),
        "mtp.0.norm": before["mtp.0.norm"] / gain,
        "mtp.0.input_gain": gain,
        "mtp.0.signs": np.asarray(signs.residual_D, np.float64),
    }
    for name in after.keys() - expected.keys():
        assert name.endswith("norm"), name
        np.testing.assert_array_equal(after[name], 1.0, err_msg=name)
    for name, leaf in expected.items():
        np.testing.assert_allclose(after[name], leaf, rtol=0, atol=1e-12, err_msg=name)


def numpy_of(leaf: Any) -> np.ndarray:
    if isinstance(leaf, ExpertWeights):
        return np.stack([to_numpy(leaf.expert(e)) for e in range(leaf.num_experts)])
    return to_numpy(leaf)


def whole(signs: Any) -> np.ndarray:
    """R = diag(signs) H / sqrt(n)."""
    n = len(signs)
    return np.asarray(signs, np.float64)[:, None] * hadamard_matrix(n).astype(np.float64) / hadamard_order(n) ** 0.5


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    sizes = [len(block) for block in blocks]
    out, ends = np.zeros((sum(sizes), sum(sizes))), np.cumsum(sizes)
    for block, size, end in zip(blocks, sizes, ends, strict=True):
        out[end - size : end, end - size : end] = block
    return out


def test_an_fp8_model_becomes_dense_of_the_shapes_that_its_trace_says() -> None:
    """Whose FP8 blocks have ragged edges; routers, gains and biases stay in float32."""
    turn = functools.partial(rotate, seed=SEED, down=True)
    abstract, rotated = jax.eval_shape(turn, small_model()), turn(small_model())
    leaves = named_leaves(rotated)
    assert shapes_and_dtypes(named_leaves(abstract)) == shapes_and_dtypes(leaves)
    expected = replace(CONFIG, residual_rotation="hadamard", down_input_transform="hadamard")
    assert abstract.config == rotated.config == expected
    assert {name: leaf.shape for name, leaf in leaves.items()} == Layout(rotated.config).shapes()
    for name, leaf in leaves.items():
        is_matrix = len(leaf.shape) > 1 and not name.endswith("router")
        if not name.endswith(("group_id", "signs")):
            weight = leaf.buckets[0] if isinstance(leaf, ExpertWeights) else leaf
            assert format_name(weight) == ("bf16" if is_matrix else "f32"), name


def test_a_seed_draws_the_same_signs_again_and_another_draws_others() -> None:
    model = small_model(mtp=False)
    first, again, other = (named_leaves(rotate(model, seed)) for seed in (1, 1, 2))
    assert_equal_bits(first, again)
    assert not np.array_equal(first["embed"], other["embed"])


@jax.jit
def run_block(
    block: Block, x_BTD: jax.Array, by: Angles, choice_TK: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The block's output and the experts that its router would choose."""
    taps: Taps = {}
    y_BTD = block(x_BTD, by, choice_TK, taps)
    return y_BTD, block.mlp.route(taps["mlp.router"]).experts_TK if isinstance(block.mlp, MoE) else None


def run(
    model: DeepseekV3, tokens_BT: np.ndarray, choices: list[jax.Array | None] | None = None
) -> tuple[np.ndarray, list[jax.Array | None]]:
    """Logits, and the experts that every layer's router would choose."""
    x_BTD = model.embedded(jnp.asarray(tokens_BT))
    by, chosen = model.angles(jnp.arange(tokens_BT.shape[1]), x_BTD.dtype), []
    for layer, choice_TK in zip(model.layers, choices or [None] * len(model.layers), strict=True):
        x_BTD, experts_TK = run_block(layer, x_BTD, by, choice_TK)
        chosen.append(experts_TK)
    return np.asarray(model.logits(x_BTD)), chosen


def test_the_tiny_checkpoint_in_float32(tiny: Path) -> None:
    """A trained FP8 checkpoint: with its expert choices replayed to 1e-4, and nearly all choices are its own."""
    model = load_model(open_huggingface(tiny))
    tokens_BT = np.random.RandomState(1).randint(model.config.vocab_size, size=(2, 128))
    logits, chosen = run(model, tokens_BT)
    rotated = rotate(model, SEED, down=True, dtype=jnp.float32)
    replayed, _ = run(rotated, tokens_BT, chosen)
    assert relative_error(replayed, logits) < 1e-4
    _, chosen_freely = run(rotated, tokens_BT)
    own, others = (
        np.stack([experts for experts in all_layers if experts is not None]) for all_layers in (chosen, chosen_freely)
    )
    is_shared = (others[..., :, None] == own[..., None, :]).any(axis=-1)
    assert is_shared.shape == (4, 256, model.config.num_experts_per_tok)
    assert np.count_nonzero(~is_shared) <= 0.001 * is_shared.size


def test_a_rotation_changes_no_norm_and_spreads_outliers() -> None:
    """A residual stream with one large channel, as trained models have."""
    tensors = random_tensors(RAW_CONFIG | {"num_nextn_predict_layers": 0}, seed=4)
    tensors["model.embed_tokens.weight"][:, 9] *= 100
    model = model_of(RAW_CONFIG | {"num_nextn_predict_layers": 0}, tensors)
    rotated = rotate(model, SEED, down=True)
    before, after = ({name: numpy_of(leaf) for name, leaf in named_leaves(own).items()} for own in (model, rotated))
    norms = [np.linalg.norm(own["embed"], axis=1) for own in (after, before)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-2)
    assert np.max(np.abs(before["embed"])) > 4 * np.max(np.abs(after["embed"]))
    for name in ("layers.0.mlp.down", "layers.1.self_attn.o", "layers.1.mlp.shared.down", "layers.1.mlp.experts.down"):
        assert np.linalg.norm(after[name]) == pytest.approx(np.linalg.norm(before[name]), rel=1e-2)


def test_experts_of_several_formats_land_in_one_bucket() -> None:
    model = small_model(mtp=False)
    leaves = named_leaves(model)
    name = "layers.1.mlp.experts.down"
    odd_ones_dense = [
        jnp.asarray(to_numpy(leaves[name].expert(e)), jnp.float32) if e % 2 else leaves[name].expert(e)
        for e in range(leaves[name].num_experts)
    ]
    mixed = DeepseekV3(model.config, (leaves | {name: gather_experts(odd_ones_dense)}).__getitem__)
    own, expected = (named_leaves(rotate(m, SEED, down=True))[name] for m in (mixed, model))
    assert len(own.buckets) == 1
    np.testing.assert_allclose(numpy_of(own), numpy_of(expected), rtol=0, atol=2e-3)


def test_what_is_rotated_already_is_refused() -> None:
    rotated = rotate(small_model(mtp=False), SEED)
    with pytest.raises(InputError, match="the model is rotated already"):
        rotate(rotated, SEED)


def test_a_final_gain_of_zero_is_refused_where_mtp_blocks_would_divide_by_it() -> None:
    def with_zero(model: DeepseekV3) -> DeepseekV3:
        leaves = named_leaves(model)
        return DeepseekV3(model.config, (leaves | {"norm": leaves["norm"].at[3].set(0)}).__getitem__)

    with pytest.raises(InputError, match="norm, the final norm's gain, has an entry that is zero"):
        rotate(with_zero(small_model()), SEED)
    head = rotate(with_zero(small_model(mtp=False)), SEED).head.get_value()
    assert np.all(np.isfinite(np.asarray(head, np.float32)))


def test_an_odd_size_is_refused() -> None:
    raw = SHALLOW | {"v_head_dim": 7}
    with pytest.raises(InputError, match="7 numbers cannot be rotated"):
        rotate(model_of(raw, random_tensors(raw, seed=1)), SEED)

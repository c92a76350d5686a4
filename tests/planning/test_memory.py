"""Memory while decoding, on the tiny checkpoint's model in shapes alone; everything that is compiled is small."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moejax.checkpoint.abstract import abstract_original
from moejax.errors import InputError
from moejax.formats import payload_bytes
from moejax.kernels import xla
from moejax.model import DeepseekV3
from moejax.model.latent_cache import LatentCache
from moejax.planning import memory
from moejax.planning.memory import DeviceMemory, check_context, device_memory
from moejax.resources import tiny_checkpoint

MADE_UP = DeviceMemory(weights=1000, cache_per_token=7, workspace=100, context=6, batch=1)


@pytest.fixture(scope="module", autouse=True)
def small_tiles() -> Iterator[None]:
    """Tiles as small beside the matrices as a real model's are; with larger ones XLA unpacks whole layers ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "TILE_BYTES", 1 << 16)
        yield


@pytest.fixture(scope="module")
def model(small_tiles: None) -> DeepseekV3:
    """The tiny checkpoint's model with one layer of each kind and an MTP block. No other test traces one like it: what
    is traced here stays in JAX's cache, and its tiles are small."""
    raw = json.loads((tiny_checkpoint() / "config.json").read_text())
    changes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "vocab_size": 4000}
    return abstract_original(raw | changes)


@pytest.fixture(scope="module")
def found(model: DeepseekV3) -> DeviceMemory:
    return device_memory(model, 1000, 1)


def test_what_a_token_of_context_takes(model: DeepseekV3, found: DeviceMemory) -> None:
    c = model.config
    assert found.cache == (c.kv_lora_rank + c.qk_rope_head_dim) * 2 * 2 * 1000
    cache = jax.eval_shape(lambda: model.empty_cache(1, 1000, memory.DTYPE))
    assert found.cache == payload_bytes(cache)
    assert found.total == found.weights + found.cache + found.workspace


def test_weights_are_those_that_decode(model: DeepseekV3, found: DeviceMemory) -> None:
    assert found.weights == payload_bytes(model) - payload_bytes(model.mtp) > 0


@pytest.mark.parametrize("context", [1024, 50_000])
def test_the_workspace_does_not_grow_with_the_context(model: DeepseekV3, context: int) -> None:
    dense = model.layers[0]
    probed = memory._block_workspace(model, dense, memory._PROBED_CONTEXT, 1)
    assert memory._block_workspace(model, dense, context, 1) == pytest.approx(probed, rel=0.001) != 0


def test_the_whole_decode_step_takes_its_widest_layers_workspace_at_least_and_all_of_theirs_at_most(
    model: DeepseekV3, found: DeviceMemory
) -> None:
    """XLA unpacks matrices of a single tile ahead, so that layers as small as these do not share theirs."""
    cache = jax.eval_shape(lambda: model.empty_cache(1, 4096, memory.DTYPE))
    token, start = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    step = jax.jit(logits_behind, donate_argnames="cache").lower(model, token, cache, start).compile()
    analysis = step.memory_analysis()
    assert analysis is not None
    blocks = [memory._block_workspace(model, block, 4096, 1) for block in model.layers]
    assert found.workspace <= analysis.temp_size_in_bytes <= sum(blocks) + memory._head_workspace(model, 1)


def logits_behind(
    model: DeepseekV3, tokens_BT: jax.Array, cache: list[LatentCache], start_B: jax.Array
) -> tuple[jax.Array, list[LatentCache]]:
    x_BTD, cache = model.extend(tokens_BT, cache, start_B, memory.DTYPE)
    return model.logits(x_BTD), cache


def test_several_sequences_have_a_cache_each(
    model: DeepseekV3, found: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def step_bytes(step: Any, *arguments: Any) -> int:  # what is compiled is another test's matter
        x = next(argument for argument in arguments if isinstance(argument, jax.ShapeDtypeStruct))
        batches.append(x.shape[0])
        return 7

    monkeypatch.setattr(memory, "step_bytes", step_bytes)
    both = device_memory(model, 1000, 2)
    assert (both.weights, both.cache) == (found.weights, 2 * found.cache)
    assert (both.context, both.batch, both.workspace) == (1000, 2, 7)
    assert batches == [2] * 3, "a step of each kind of layer, and the head's"


def test_the_head_takes_the_logits_of_all_sequences(model: DeepseekV3) -> None:
    assert memory._head_workspace(model, 2) >= 2 * 4000 * 4


@pytest.mark.parametrize(("memory_bytes", "longest"), [(1155, 7), (1156, 8), (1162, 8), (1106, 0), (1107, 1)])
def test_the_longest_context_at_its_edge(memory_bytes: int, longest: int) -> None:
    """7 bytes a token behind 1100."""
    assert MADE_UP.longest_context(memory_bytes, limit=10**6) == longest
    fits = dataclasses.replace(MADE_UP, context=longest)
    assert fits.total <= memory_bytes or longest == 0
    assert dataclasses.replace(MADE_UP, context=longest + 1).total > memory_bytes


@pytest.mark.parametrize("share", [0.0, 0.3, 0.77])
def test_the_longest_context_fits_and_one_token_more_does_not(found: DeviceMemory, share: float) -> None:
    least = dataclasses.replace(found, context=1).total
    available = least + int(share * 10**7)
    longest = found.longest_context(available, limit=10**6)
    assert dataclasses.replace(found, context=longest).total <= available
    assert dataclasses.replace(found, context=longest + 1).total > available


def test_the_longest_context_has_limits() -> None:
    assert MADE_UP.longest_context(10**9, limit=4096) == 4096
    assert MADE_UP.longest_context(999, limit=4096) == MADE_UP.longest_context(0, limit=4096) == 0


@pytest.mark.parametrize("context", [0, -1, 4097])
def test_a_context_beyond_the_model_is_named(model: DeepseekV3, context: int) -> None:
    message = f"a context of {context} tokens is beyond the model; 1 to 4096 are accepted"
    for action in (lambda: check_context(context, 1, 4096), lambda: device_memory(model, context, 1)):
        with pytest.raises(InputError, match=message):
            action()


@pytest.mark.parametrize("batch", [0, -2])
def test_a_batch_of_none_is_named(model: DeepseekV3, batch: int) -> None:
    for action in (lambda: check_context(1, batch, 4096), lambda: device_memory(model, 1, batch)):
        with pytest.raises(InputError, match=f"a batch of {batch} is none; at least 1 is needed"):
            action()


def test_contexts_that_are_accepted() -> None:
    check_context(1, 1, 4096)
    check_context(4096, 9, 4096)

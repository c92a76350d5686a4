"""Memory predicted from shapes, against sizes added up by hand and the compiler's word for what is compiled."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.evaluate.memory import Needs, needs
from moejax.formats import ExpertWeights, payload_bytes
from moejax.formats.arrays import abstract_array
from moejax.model import DeepseekV3, sliced
from small_models import CHUNKS, CONFIG, first_layers, small_model

T = CHUNKS.shape[1]
# float32 states of a chunk.
STATES = 4 * T * CONFIG.hidden_size
LOG_PROBS = 4 * 2 * (T // 2 - 1) * CONFIG.vocab_size


def abstract(model: DeepseekV3) -> DeepseekV3:
    return jax.eval_shape(lambda: model)


def needs_of(model: DeepseekV3, base: DeepseekV3 | jax.Array | None = None) -> Needs:
    return needs(model, base, T, 2, jnp.float32)


def test_everything_in_memory_is_the_models_and_the_widest_step() -> None:
    model = abstract(small_model())
    alone, compared = needs_of(model), needs_of(model, model)
    workspace = alone.whole - payload_bytes(model)
    assert 2 * STATES < workspace < 300 * STATES
    assert compared.whole == pytest.approx(alone.whole + payload_bytes(model), abs=workspace)


def test_part_by_part_it_is_the_largest_part_and_not_the_model() -> None:
    model = abstract(small_model())
    found = needs_of(model)
    experts = [leaf for leaf in jax.tree.leaves(model, is_leaf=is_experts) if is_experts(leaf)]
    largest = max(payload_bytes(part) for part in (model.embed, model.head, *model.layers, *model.mtp))
    workspace = found.whole - payload_bytes(model)
    assert payload_bytes(experts[:3]) < largest < found.part < largest * 1.3 + workspace
    assert needs_of(model, model).part == pytest.approx(found.part, abs=LOG_PROBS + payload_bytes(model.head))


def is_experts(leaf: object) -> bool:
    return isinstance(leaf, ExpertWeights)


def test_a_kept_head_is_there_all_the_time() -> None:
    model = abstract(first_layers(1))
    head = abstract_array((CONFIG.vocab_size, CONFIG.hidden_size), jnp.float32)
    alone, compared = needs_of(model), needs_of(model, head)
    for own, other in ((compared.whole, alone.whole), (compared.part, alone.part)):
        assert payload_bytes(head) <= own - other <= payload_bytes(head) + 4 * LOG_PROBS
    assert compared.per_chunk == alone.per_chunk + STATES // 2


def test_states_are_kept_of_every_chunk() -> None:
    assert needs_of(abstract(first_layers(1))).per_chunk == STATES + STATES // 2
    assert needs_of(abstract(small_model())).per_chunk == 2 * STATES + 2 * (STATES // 2)


def test_of_every_chunk_waits_what_is_within_a_block_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """States behind attention, normed, of the shared experts, and the sum so far; of the routing an index and a
    weight."""
    model = abstract(small_model())
    whole = needs_of(model).per_chunk
    monkeypatch.setattr(sliced, "MOST_NUMBERS", 1)
    assert needs_of(model).per_chunk == whole + 4 * STATES + T * CONFIG.num_experts_per_tok * 8


@given(st.integers(0, 10**12), st.integers(1, 10**9), st.integers(1, 8), st.integers(0, 10**12))
def test_a_wave_is_the_most_whole_batches_that_fit(part: int, per_chunk: int, batch: int, free: int) -> None:
    found = Needs(whole=2 * part, part=part, per_chunk=per_chunk, batch=batch)
    chunks = found.chunks_per_wave(free)
    assert chunks % batch == 0
    assert chunks == 0 or found.part_by_part(chunks) <= free
    assert found.part_by_part(chunks + batch) > free

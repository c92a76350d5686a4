"""A block whose experts come a few at a time, against the block with all of them."""

from collections.abc import Sequence
from dataclasses import replace
from threading import Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model import named_leaves, sliced
from moejax.model.moe import Experts, Routing
from moejax.model.sliced import SlicedBlock, pieces, slices_of, through, through_mtp
from moejax.model.steps import run_block
from small_models import CHUNKS, CONFIG, small_model

E, D = CONFIG.n_routed_experts, CONFIG.hidden_size
EACH = 3 * D * CONFIG.moe_intermediate_size
SIZES = pytest.mark.parametrize("per_slice", [1, 5, E])
BY = small_model().angles(jnp.arange(CHUNKS.shape[1]), jnp.dtype(jnp.float32))


def states(count: int = 2) -> list[jax.Array]:
    model = small_model()
    return [run_block(model.layers[0], model.embedded(jnp.asarray(CHUNKS[n : n + 2])), BY) for n in range(count)]


@SIZES
def test_slices_make_no_difference(per_slice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last bits of products of other sizes: experts' terms come to a sum one by one, in their order."""
    monkeypatch.setattr(sliced, "MOST_NUMBERS", per_slice * EACH)
    block = sliced.sliced(small_model().layers[1])
    assert [len(own) for own in block.ranges][:1] == [per_slice]
    found = list(through(block, states(), BY))
    monkeypatch.setattr(sliced, "MOST_NUMBERS", E * EACH)
    expected = through(sliced.sliced(small_model().layers[1]), states(), BY)
    for y_BTD, whole_BTD in zip(found, expected, strict=True):
        np.testing.assert_allclose(y_BTD, whole_BTD, rtol=1e-5, atol=1e-6)


def test_all_in_slices_is_the_block_itself() -> None:
    for layer in small_model().layers:
        block = sliced.sliced(layer)
        for x_BTD, y_BTD in zip(states(), through(block, states(), BY), strict=True):
            np.testing.assert_allclose(y_BTD, run_block(layer, x_BTD, BY), rtol=1e-5, atol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, named_leaves(block.whole()), named_leaves(layer))


def test_an_mtp_block_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "MOST_NUMBERS", 5 * EACH)
    own, (h_BTD, next_BTD) = small_model().mtp[0], states()
    mtp = sliced.sliced_mtp(own)
    assert len(mtp.block.ranges) == 3
    (found,) = through_mtp(mtp, [(h_BTD, next_BTD)], BY)
    np.testing.assert_allclose(found, jax.jit(type(own).__call__)(own, h_BTD, next_BTD, BY), rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, named_leaves(mtp.whole()), named_leaves(own))


@pytest.mark.parametrize("per_slice", [4, E])
def test_every_slice_is_asked_for_once_whatever_the_number_of_batches(per_slice: int) -> None:
    block, asked = sliced.sliced(small_model().layers[1]), list[int]()

    def watched(members: Sequence[int]) -> Experts:
        asked.extend(members)
        return block.experts_of(members)

    own = replace(block, experts_of=watched, per_slice=per_slice)
    list(through(own, states(2), BY))
    assert asked == list(range(E))


@pytest.mark.parametrize("most_rows", [1, 4, 7, 100])
def test_pieces_are_all_rows_of_their_experts_and_of_few_sizes(most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "MOST_STATES", most_rows * D)
    experts_TK = np.random.RandomState(0).randint(E, size=(23, 3))
    routing = Routing(jnp.asarray(experts_TK), jnp.ones((23, 3)))
    for members in (range(2), range(3, 9), range(E)):
        count = int(np.isin(experts_TK, members).sum())
        found = list(pieces(routing, members, D))
        starts, sizes = zip(*found, strict=True)
        assert list(starts) == list(range(0, count, sizes[0])) and len(set(sizes)) == 1
        assert sizes[0] <= most_rows and starts[-1] + sizes[0] >= count
    assert list(pieces(Routing(routing.experts_TK * 0, routing.weights_TK), range(5, 7), D)) == []


@pytest.mark.parametrize("most_rows", [3, 16])
def test_a_slice_may_come_in_pieces(most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x_BTD = sliced.sliced(small_model().layers[1]), states(1)
    (expected,) = through(block, x_BTD, BY)
    monkeypatch.setattr(sliced, "MOST_STATES", most_rows * D)
    (found,) = through(replace(block, per_slice=5), x_BTD, BY)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_trunk_by_itself_is_no_block() -> None:
    trunk = sliced.sliced(small_model().layers[1]).trunk
    assert not any("experts." in name for name in named_leaves(trunk))
    with pytest.raises(AssertionError, match="a trunk is not run by itself"):
        trunk(states(1)[0], BY)


def test_slices_follow_from_shapes() -> None:
    assert [list(own) for own in slices_of(5, 2)] == [[0, 1], [2, 3], [4]]
    dense: SlicedBlock = sliced.sliced(small_model().layers[0])
    assert not dense.is_moe and dense.ranges == []
    large = replace(CONFIG, hidden_size=7168, moe_intermediate_size=2048, n_routed_experts=256)
    assert sliced.experts_in_slice(large) == 3  # half a gigabyte in float32
    assert sliced.experts_in_slice(CONFIG) == E


def reading(asked: list[int], begun: dict[int, Event]) -> SlicedBlock:
    """A block whose experts are told, not read; expert 4's cannot be."""
    block = sliced.sliced(small_model().layers[1])

    def experts_of(members: Sequence[int]) -> Experts:
        asked.append(members[0])
        begun.setdefault(members[0], Event()).set()
        if members[0] == 4:
            raise OSError("expert 4 cannot be read")
        return block.experts_of(members)

    return replace(block, experts_of=experts_of, per_slice=2, is_read=True)


def test_a_slice_that_is_read_is_asked_for_while_the_one_before_is_at_work() -> None:
    asked: list[int] = []
    begun = {first: Event() for first in range(0, E, 2)}
    slices = reading(asked, begun).slices()
    members, _ = next(slices)
    assert members == range(2) and begun[2].wait(60)
    assert not begun[4].is_set()
    members, _ = next(slices)
    assert members == range(2, 4) and begun[4].wait(60)
    with pytest.raises(OSError, match="expert 4 cannot be read"):
        next(slices)
    assert asked == [0, 2, 4]


def test_slices_may_be_left_before_their_end() -> None:
    asked: list[int] = []
    slices = reading(asked, {}).slices()
    next(slices)
    slices.close()  # type: ignore[attr-defined]
    assert set(asked) <= {0, 2}


def test_an_accelerator_takes_larger_slices_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, hidden_size=7168, moe_intermediate_size=2048, n_routed_experts=256)
    assert sliced.experts_in_slice(config) == 3
    monkeypatch.setattr(sliced, "accelerator_memory", lambda: 100 * 10**9)
    assert sliced.experts_in_slice(config) == 35
    monkeypatch.setattr(sliced, "accelerator_memory", lambda: 10**9)
    assert sliced.experts_in_slice(config) == 3

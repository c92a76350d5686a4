"""A model read part by part draws what the same model draws in memory."""

from dataclasses import dataclass, field

import pytest

from moejax.formats import Leaf
from moejax.generate import from_disk
from moejax.generate.decode import Decoding, generate, generate_batch
from moejax.generate.from_disk import PartByPart
from moejax.generate.sampling import Sampling
from moejax.model.sliced import SlicedBlock
from moejax.model.source import ModelSource
from small_models import first_layers

PROMPT = [5, 80, 13, 60, 2, 41]


@dataclass(frozen=True)
class Counted(ModelSource):
    """Source that count how often they are read."""

    reads: dict[str, int] = field(default_factory=dict)

    def embedding(self) -> Leaf:
        self.reads["embedding"] = self.reads.get("embedding", 0) + 1
        return super().embedding()

    def block(self, index: int) -> SlicedBlock:
        self.reads[f"block {index}"] = self.reads.get(f"block {index}", 0) + 1
        return super().block(index)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 20, 0.9)], ids=["greedy", "drawn"])
def test_the_same_tokens_as_in_memory(sampling: Sampling) -> None:
    model = first_layers(2)
    runner, decoding = PartByPart(ModelSource(model)), Decoding(prefill_chunk=4)
    expected = list(generate(model, PROMPT, 8, sampling=sampling, seed=2, decoding=decoding))
    assert list(generate(runner, PROMPT, 8, sampling=sampling, seed=2, decoding=decoding)) == expected


def test_a_batch_of_prompts() -> None:
    model, prompts = first_layers(2), [PROMPT, PROMPT[:3]]
    assert list(generate_batch(PartByPart(ModelSource(model)), prompts, 5)) == list(generate_batch(model, prompts, 5))


def test_every_step_reads_every_part_once() -> None:
    source = Counted(first_layers(2))
    list(generate(PartByPart(source), PROMPT, 5))
    assert source.reads == {"embedding": 5, "block 0": 5, "block 1": 5}


def test_one_compilation_for_all_steps_of_a_kind() -> None:
    runner = PartByPart(ModelSource(first_layers(2)))
    list(generate(runner, PROMPT, 3))
    before = from_disk.run_block_cached._cache_size()  # type: ignore[attr-defined]
    list(generate(runner, PROMPT[:5], 9))
    assert from_disk.run_block_cached._cache_size() == before  # type: ignore[attr-defined]

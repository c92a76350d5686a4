import pytest

from moejax.checkpoint.summary import KINDS, kind_of, summarize
from moejax.formats import abstract_experts, abstract_leaf, payload_bytes
from moejax.model import Layout, config_from_hf
from small_checkpoint import CONFIG


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("embedding", ["embed"]),
        ("head", ["head"]),
        ("norms", ["norm", "layers.0.input_norm", "layers.2.self_attn.kv_a_norm", "layers.1.post_attention_norm"]),
        ("attention", ["layers.0.self_attn.q_a", "layers.2.self_attn.k_b", "layers.1.self_attn.o"]),
        ("dense mlp", ["layers.0.mlp.gate", "layers.0.mlp.up", "layers.0.mlp.down"]),
        ("shared experts", ["layers.1.mlp.shared.gate", "layers.1.mlp.shared.down"]),
        ("routed experts", ["layers.1.mlp.experts.gate", "layers.2.mlp.experts.down"]),
        ("router", [f"layers.1.mlp.{name}" for name in ("router", "bias", "group_id", "routing_scale")]),
        ("mtp", ["mtp.0.eh_proj", "mtp.0.enorm", "mtp.0.block.input_norm", "mtp.0.block.mlp.experts.up"]),
    ],
)
def test_kinds(kind: str, names: list[str]) -> None:
    shapes = Layout(config_from_hf(CONFIG)).shapes()
    assert set(names) <= set(shapes)
    assert {kind_of(name) for name in names} == {kind}


def test_every_weight_of_a_model_has_a_kind() -> None:
    assert {kind_of(name) for name in Layout(config_from_hf(CONFIG)).shapes()} == set(KINDS)


def test_numbers_bytes_and_bits_of_each_kind() -> None:
    leaves = [
        ("layers.1.mlp.experts.up", abstract_experts("int2g32[3,64,32]+bf16[1,64,32]")),
        ("embed", abstract_leaf("int4g32[10,32]")),
        ("layers.0.self_attn.o", abstract_leaf("f32[8,4]")),
        ("layers.1.self_attn.o", abstract_leaf("bf16[8,4]")),
    ]
    embedding, attention, experts = summarize(leaves)
    assert [kind.kind for kind in (embedding, attention, experts)] == ["embedding", "attention", "routed experts"]
    assert (embedding.elements, embedding.bytes) == (320, 320 // 2 + 10 * 2)
    assert embedding.bits_per_weight == 4.5
    assert (attention.elements, attention.bytes) == (64, 32 * 4 + 32 * 2)
    slots = 2 * 4 * 4
    assert (experts.elements, experts.bytes) == (4 * 2048, 3 * (512 + 64 * 2) + 4096 + slots)
    assert sum(kind.bytes for kind in (embedding, attention, experts)) == sum(payload_bytes(leaf) for _, leaf in leaves)


def test_a_kind_that_is_not_there_has_no_row() -> None:
    assert summarize([]) == []

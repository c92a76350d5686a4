import jax
import pytest

from leaf_oracle import random_leaf
from moejax.formats import ByteParts, abstract_leaf, byte_parts, gather_experts, payload_bytes

FORMATS = [*(f"int{bits}g{size}" for bits in range(1, 9) for size in (32, 128)), "ternaryg32", "ternaryg128"]
FORMATS += ["int2g128e8", "sint4g32", "sint8g128f16", "ternaryg32e8", "fp8b32x64", "bf16", "f16", "f32"]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("shape", ["40,256", "3,40,384"])
def test_parts_add_up(format_name: str, shape: str) -> None:
    leaf = abstract_leaf(f"{format_name}[{shape}]")
    parts = byte_parts(leaf)
    assert sum(parts) == payload_bytes(leaf)
    assert min(parts) >= 0 and parts.codes > 0
    assert parts == byte_parts(random_leaf(f"{format_name}[{shape}]"))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("int4g32[10,128]", ByteParts(10 * 64, 10 * 4 * 2, 0)),
        ("int3g128[10,128]", ByteParts(10 * 48, 10 * 2, 0)),
        ("int3g32e8[10,128]", ByteParts(10 * 48, 10 * 4, 0)),
        ("sint4g32f16[10,128]", ByteParts(10 * 64, 10 * 4 * 2, 0)),
        ("fp8b32x64[40,100]", ByteParts(40 * 100, 2 * 2 * 4, 0)),
        ("bf16[10,3]", ByteParts(60, 0, 0)),
        ("f32[]", ByteParts(4, 0, 0)),
        # Seven words hold 140 codes, of which 12 are no input's; a code takes a fifth of a byte.
        ("ternaryg64[10,128]", ByteParts(10 * 28 - 24, 10 * 2 * 2, 24)),
        ("ternaryg64e8[10,128]", ByteParts(10 * 28 - 24, 10 * 2, 24)),
        ("ternaryg32[2,5,128]", ByteParts(10 * 28 - 24, 10 * 4 * 2, 24)),
        ("ternaryg32[1,128]", ByteParts(28 - 2, 4 * 2, 2)),
        # Two words hold 40, of which 8 are none's.
        ("ternaryg32[10,32]", ByteParts(10 * 8 - 16, 10 * 2, 16)),
        ("ternaryg64[10,640]", ByteParts(10 * 128, 10 * 10 * 2, 0)),
    ],
)
def test_parts_by_hand(spec: str, parts: ByteParts) -> None:
    assert byte_parts(abstract_leaf(spec)) == parts


def test_a_tree_s_parts_are_its_leaves_together() -> None:
    """Experts' slot tables count as codes."""
    leaves = [random_leaf(f"{name}[10,128]") for name in ("int4g32", "ternaryg64", "fp8b32x64", "bf16", "ternaryg64")]
    experts = gather_experts(leaves)
    alone = [byte_parts(leaf) for leaf in leaves]
    together = ByteParts(*(sum(part) for part in zip(*alone, strict=True)))
    assert byte_parts(leaves) == byte_parts({"a": leaves[:2], "b": (leaves[2:],)}) == together
    assert byte_parts(experts) == together._replace(codes=together.codes + 2 * 5 * 4)
    assert byte_parts(jax.eval_shape(lambda own: own, experts)) == byte_parts(experts)
    assert byte_parts([]) == ByteParts(0, 0, 0)

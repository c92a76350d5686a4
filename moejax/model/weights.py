"""The table of a model's weights: what each is called, what its axes are, what it is for and whose input it takes.

Weights are named by module path: `embed`, `layers.3.self_attn.q_a`, `mtp.0.block.mlp.router`, `mtp.0.eh_proj`. Blocks
are counted with the MTP blocks behind the layers, and a weight's name within its block is what follows the path of the
decoder block, or of the MTP block around it: `self_attn.q_a`, `mlp.router`, `eh_proj`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from moejax.model.config import Config

Role = Literal[
    "embedding", "head", "attention", "dense mlp", "shared experts", "routed experts", "router", "norms", "mtp"
]
Where = Literal["every block", "with q latent", "without q latent", "dense", "with experts", "mtp", "rotated mtp"]


@dataclass(frozen=True)
class Row:
    """What is said of a weight, whichever block it is in.

    axes: names of its dimensions, a matrix's outputs before its inputs; experts of one projection count as one weight.
    same_input: the weight of its block whose input it takes too, under whose name that input is known.
    where: the blocks that have it. dtype: where it is fixed, whatever the config's is.
    is_derived: it follows from the config in an original, and no tensor holds it.
    """

    name: str
    axes: tuple[str, ...]
    role: Role
    same_input: str | None = None
    where: Where = "every block"
    dtype: str | None = None
    is_derived: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies; attention's are one matrix per head where heads are an axis."""
        return len(self.axes) >= 2

    @property
    def is_per_expert(self) -> bool:
        """Whether pruning shortens its first axis, and nothing else."""
        return self.axes[:1] == ("experts",)

    @property
    def may_be_rounded(self) -> bool:
        """Whether it gets a format of its own: all matrices but the routers, and the experts, which get one each."""
        return self.is_matrix and self.role not in ("router", "routed experts")

    @property
    def is_fp8(self) -> bool:
        """Whether DeepSeek stores it in FP8 where it quantizes: the matrices of attention and of every MLP. Embedding,
        head, router, norms and eh_proj stay dense (arXiv:2412.19437, section 3.3, and the published checkpoint)."""
        return self.role in ("attention", "dense mlp", "shared experts", "routed experts")

    @property
    def takes_hidden(self) -> bool:
        """Whether its input is the hidden states."""
        return self.is_matrix and self.axes[-1] == "hidden"

    @property
    def gives_hidden(self) -> bool:
        """Whether its outputs are added to the hidden states."""
        return self.is_matrix and self.axes[-2] == "hidden" and self.role != "mtp"

    @property
    def takes_product(self) -> bool:
        """Whether its input is an MLP's product of gate and up, which `Config.down_input_transform` rotates."""
        return self.axes[-1:] in (("intermediate",), ("shared_intermediate",), ("expert_intermediate",))


_OUTER = (
    Row("embed", ("vocabulary", "hidden"), "embedding"),
    Row("norm", ("hidden",), "norms"),
    Row("head", ("vocabulary", "hidden"), "head"),
)

# In the order in which a model's weights are listed.
_BLOCK = (
    Row("input_norm", ("hidden",), "norms"),
    Row("self_attn.q", ("queries", "hidden"), "attention", "self_attn.kv_a", "without q latent"),
    Row("self_attn.q_a", ("q_latent", "hidden"), "attention", "self_attn.kv_a", "with q latent"),
    Row("self_attn.q_a_norm", ("q_latent",), "norms", None, "with q latent"),
    Row("self_attn.q_b", ("queries", "q_latent"), "attention", None, "with q latent"),
    Row("self_attn.kv_a", ("kv_latent_and_rope", "hidden"), "attention"),
    Row("self_attn.kv_a_norm", ("kv_latent",), "norms"),
    Row("self_attn.k_b", ("heads", "nope", "kv_latent"), "attention"),
    Row("self_attn.v_b", ("heads", "value", "kv_latent"), "attention", "self_attn.k_b"),
    Row("self_attn.o", ("hidden", "values"), "attention"),
    Row("post_attention_norm", ("hidden",), "norms"),
    Row("mlp.gate", ("intermediate", "hidden"), "dense mlp", None, "dense"),
    Row("mlp.up", ("intermediate", "hidden"), "dense mlp", "mlp.gate", "dense"),
    Row("mlp.down", ("hidden", "intermediate"), "dense mlp", None, "dense"),
    Row("mlp.router", ("experts", "hidden"), "router", None, "with experts"),
    Row("mlp.bias", ("experts",), "router", None, "with experts", "float32"),
    Row("mlp.group_id", ("experts",), "router", None, "with experts", "int32", is_derived=True),
    Row("mlp.routing_scale", (), "router", None, "with experts", "float32", is_derived=True),
    # Calibration knows the inputs of routed experts by the expert, not by a weight's name.
    Row("mlp.experts.gate", ("experts", "expert_intermediate", "hidden"), "routed experts", None, "with experts"),
    Row("mlp.experts.up", ("experts", "expert_intermediate", "hidden"), "routed experts", None, "with experts"),
    Row("mlp.experts.down", ("experts", "hidden", "expert_intermediate"), "routed experts", None, "with experts"),
    Row("mlp.shared.gate", ("shared_intermediate", "hidden"), "shared experts", "mlp.router", "with experts"),
    Row("mlp.shared.up", ("shared_intermediate", "hidden"), "shared experts", "mlp.router", "with experts"),
    Row("mlp.shared.down", ("hidden", "shared_intermediate"), "shared experts", None, "with experts"),
)

# What an MTP block has around its decoder block; of rotated models, what it undoes the rotation by.
_MTP = (
    Row("enorm", ("hidden",), "norms", None, "mtp"),
    Row("hnorm", ("hidden",), "norms", None, "mtp"),
    Row("norm", ("hidden",), "norms", None, "mtp"),
    Row("signs", ("hidden",), "mtp", None, "rotated mtp"),
    Row("input_gain", ("hidden",), "mtp", None, "rotated mtp"),
    Row("eh_proj", ("hidden", "embedding_and_hidden"), "mtp", None, "mtp"),
)

_OUTSIDE: Mapping[str, Row] = MappingProxyType({row.name: row for row in _OUTER})
# By name within the block.
IN_BLOCK: Mapping[str, Row] = MappingProxyType({row.name: row for row in (*_BLOCK, *_MTP)})
PER_EXPERT = tuple(row for row in _BLOCK if row.is_per_expert)


def row_of(name: str) -> Row:
    """The row of the weight `name` of a model."""
    return _OUTSIDE[name] if name in _OUTSIDE else IN_BLOCK[_split(name)[2]]


def in_mtp_block(name: str) -> bool:
    """Whether the weight `name` of a model is an MTP block's, on which the model's own predictions do not depend."""
    return name not in _OUTSIDE and _split(name)[0] == "mtp"


def block_and_name(name: str, num_layers: int) -> tuple[int | None, str]:
    """The block of the weight `name` of a model of so many layers, and its name within: (61, "self_attn.o") is
    `mtp.0.block.self_attn.o` of 61 layers. What is in no block keeps its name: (None, "embed")."""
    if name in _OUTSIDE:
        return None, name
    kind, index, own = _split(name)
    return index + (num_layers if kind == "mtp" else 0), own


def block_name(index: int, num_layers: int) -> str:
    """The path of a decoder block in a model of so many layers: `layers.3`, or `mtp.0.block` for the first behind."""
    return f"layers.{index}" if index < num_layers else f"mtp.{index - num_layers}.block"


def _split(name: str) -> tuple[str, int, str]:
    kind, index, own = name.split(".", 2)
    return kind, int(index), own.removeprefix("block.")


@dataclass(frozen=True)
class Layout:
    """The weights of one model: what its config says that they must be."""

    config: Config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight's name and logical shape, in the order of the table, layer by layer, MTP blocks last."""
        return dict(_shapes(self.config))

    def is_outer(self, name: str) -> bool:
        """Whether predictions feel the weight's errors most: embedding, head and the last layer's shared experts."""
        role, last = row_of(name).role, self.config.num_hidden_layers - 1
        is_last = block_and_name(name, self.config.num_hidden_layers)[0] == last
        return role in ("embedding", "head") or (role == "shared experts" and is_last)


@lru_cache(maxsize=8)
def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    sizes = axis_sizes(config)
    return {name: tuple(sizes[axis] for axis in row.axes) for name, row in _rows(config)}


def axis_sizes(config: Config) -> dict[str, int]:
    """The size of every axis that a weight of this config may have."""
    c = config
    return {
        "vocabulary": c.vocab_size,
        "hidden": c.hidden_size,
        "embedding_and_hidden": 2 * c.hidden_size,
        "queries": c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim),
        "values": c.num_attention_heads * c.v_head_dim,
        "heads": c.num_attention_heads,
        "nope": c.qk_nope_head_dim,
        "value": c.v_head_dim,
        **({} if c.q_lora_rank is None else {"q_latent": c.q_lora_rank}),
        "kv_latent": c.kv_lora_rank,
        "kv_latent_and_rope": c.kv_lora_rank + c.qk_rope_head_dim,
        "intermediate": c.intermediate_size,
        "experts": c.n_routed_experts,
        "expert_intermediate": c.moe_intermediate_size,
        "shared_intermediate": c.moe_intermediate_size * c.n_shared_experts,
    }


def _rows(config: Config) -> Iterator[tuple[str, Row]]:
    """Every weight of a model by its name."""
    embed, *behind = _OUTER
    yield embed.name, embed
    for layer in range(config.num_hidden_layers):
        yield from _rows_of_block(config, layer)
    yield from ((row.name, row) for row in behind)
    for m in range(config.num_nextn_predict_layers):
        yield from _rows_of_block(config, config.num_hidden_layers + m)
        where = {"mtp", "rotated mtp" if config.residual_rotation else "mtp"}
        yield from ((f"mtp.{m}.{row.name}", row) for row in _MTP if row.where in where)


def _rows_of_block(config: Config, block: int) -> Iterator[tuple[str, Row]]:
    where = {
        "every block",
        "without q latent" if config.q_lora_rank is None else "with q latent",
        "with experts" if config.is_moe(block) else "dense",
    }
    prefix = block_name(block, config.num_hidden_layers)
    yield from ((f"{prefix}.{row.name}", row) for row in _BLOCK if row.where in where)

"""Quick proof that an installed moejax works on this Python; `.ci/run` starts it on one newer than the tests' own."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from moejax.calibrate import calibrate
from moejax.checkpoint.load import load_model, open_checkpoint
from moejax.checkpoint.native_bytes import Description, native_bytes
from moejax.checkpoint.native_writer import write_native
from moejax.evaluate.divergence import evaluate
from moejax.evaluate.text import chunks, default_evaluation_text
from moejax.model import DeepseekV3
from moejax.planning import BlockPlan, Plan
from moejax.planning.plan import PROJECTIONS, to_json
from moejax.resources import config_path, tiny_checkpoint
from moejax.tokenizer import load_tokenizer
from moejax.transforms.compress import compress

# One block: a quarter of its experts pruned, the others and the attention's output rounded.
BLOCK = BlockPlan(
    formats={"self_attn.o": "int6g128"},
    keep=tuple(e for e in range(32) if e % 4),
    experts={projection: ("int4g128",) * 24 for projection in PROJECTIONS},
    experts_per_token=3,
)


def main() -> None:
    tokenizer = load_tokenizer(tiny_checkpoint())
    text = default_evaluation_text(max_bytes=10_000)
    token_ids = tokenizer.encode(text.content)
    assert tokenizer.decode(token_ids) == text.content
    assert config_path("models", "deepseek_v3").is_file()
    tokens = chunks(token_ids, bos_token_id=tokenizer.bos_token_id)[:1]
    model = load_model(open_checkpoint())
    ppl = evaluate(model, tokens).ppl
    assert ppl < 100
    divergence = compressed_divergence(model, tokens)
    assert 0 < divergence < 0.5
    print(f"jax {jax.__version__} on {jax.default_backend()}: perplexity {ppl:.2f}, KL divergence {divergence:.4f}")


def compressed_divergence(model: DeepseekV3, tokens: np.ndarray) -> float:
    """One block compressed, the model written and read back: its divergence from the original."""
    plan = Plan("keep", "keep", (BlockPlan(), BLOCK, *[BlockPlan()] * (model.config.num_blocks - 2)))
    compressed = compress(model, plan, calibrate(model, tokens))
    description = Description(open_checkpoint().raw_config, to_json(plan), {})
    size = native_bytes(compressed, description, []).total
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        assert write_native(compressed, output, description, [], budget=size) == size
        kld_mean = evaluate(load_model(open_checkpoint(output)), tokens, model).kld_mean
    assert kld_mean is not None
    return kld_mean


if __name__ == "__main__":
    main()

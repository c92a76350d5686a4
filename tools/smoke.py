"""Quick proof that an installed moejax works on this Python; `.ci/run` starts it on one newer than the tests' own."""

import jax

from moejax.checkpoint.tokenizer import load_tokenizer
from moejax.evaluate.text import chunks, default_evaluation_text
from moejax.resources import config_path, tiny_checkpoint


def main() -> None:
    tokenizer = load_tokenizer(tiny_checkpoint())
    text = default_evaluation_text(max_bytes=10_000)
    token_ids = tokenizer.encode(text.content)
    assert tokenizer.decode(token_ids) == text.content
    assert chunks(token_ids, bos_token_id=tokenizer.bos_token_id).shape[1] == 512
    assert config_path("models", "deepseek_v3").is_file()
    print(f"jax {jax.__version__} on {jax.default_backend()}: {len(token_ids)} tokens of {text.source}")


if __name__ == "__main__":
    main()

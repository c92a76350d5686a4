"""Make configs/expert_scores/ and configs/sensitivity/ for DeepSeek-V3 from what others have measured and published.

usage: python tools/make_facts.py EXPERT_SCORES.json SENSITIVITY_KLD.csv

EXPERT_SCORES.json: routing scores of DeepSeek-V3-0324 over 1.6M tokens, from CC-MoE (github.com/moxin-org/CC-MoE, MIT).
SENSITIVITY_KLD.csv: mean KL divergence of DeepSeek-V3.1-Terminus with one tensor at a time in llama.cpp's IQ1_M, from
GGUF-Tool-Suite (github.com/Thireus/GGUF-Tool-Suite, MIT); tensors by llama.cpp's names, which are translated to ours.
"""

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"
OUTER = {"token_embd": "embed", "output": "head"}
OURS = {
    "attn_q_a": "self_attn.q_a",
    "attn_q_b": "self_attn.q_b",
    "attn_kv_a_mqa": "self_attn.kv_a",
    "attn_k_b": "self_attn.k_b",
    "attn_v_b": "self_attn.v_b",
    "attn_output": "self_attn.o",
    **{f"ffn_{name}": f"mlp.{name}" for name in ("gate", "up", "down")},
    **{f"ffn_{name}_shexp": f"mlp.shared.{name}" for name in ("gate", "up", "down")},
    **{f"ffn_{name}_exps": f"mlp.experts.{name}" for name in ("gate", "up", "down")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expert_scores", type=Path)
    parser.add_argument("sensitivity", type=Path)
    options = parser.parse_args()
    write(CONFIGS / "expert_scores" / "deepseek_v3.json", expert_scores(json.loads(options.expert_scores.read_text())))
    write(CONFIGS / "sensitivity" / "deepseek_v3.json", sensitivity(options.sensitivity))


def expert_scores(raw: dict[str, Any]) -> dict[str, Any]:
    """Rounded to whole units of gate mass, a relative change of 1e-4 for the rarest expert."""
    layers = {
        layer: {"scores": [round(score) for score in own["scores"]], "activations": own["activations"]}
        for layer, own in raw.items()
    }
    return {"source": "DeepSeek-V3-0324 on 1.6M tokens, by CC-MoE (github.com/moxin-org/CC-MoE, MIT)", **layers}


def sensitivity(file: Path) -> dict[str, Any]:
    """KL by our names: a number for embedding and head, by layer for the rest."""
    names, values = list(csv.reader(file.open()))
    kl: dict[str, Any] = {}
    for name, value in zip(names[1:], map(float, values[1:]), strict=True):
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
            kl.setdefault(OURS[match[2]], {})[match[1]] = value
        else:
            kl[OUTER[name.removesuffix(".weight")]] = value
    source = "DeepSeek-V3.1-Terminus, one tensor at a time in IQ1_M, by GGUF-Tool-Suite (github.com/Thireus, MIT)"
    return {"source": source, "kl": kl}


def write(file: Path, facts: dict[str, Any]) -> None:
    """JSON, one entry of the two outermost levels a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {_entry(value)}" for key, value in facts.items())
    file.write_text(f"{{\n{lines}\n}}\n")


def _entry(value: Any) -> str:
    compact = json.dumps(value, separators=(",", ":"))
    if not isinstance(value, dict):
        return compact
    return (
        "{"
        + ",\n ".join(f"{json.dumps(key)}:{json.dumps(own, separators=(',', ':'))}" for key, own in value.items())
        + "}"
    )


if __name__ == "__main__":
    main()

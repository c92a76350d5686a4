"""Decoding as Hugging Face transformers does it, for the cases of `DECODE_CASES`, in float64.

A batch of prompts, left-padded under an attention mask where their lengths differ, goes through the model at once; then
every row gets one token at a time, behind transformers' own cache. In the files rows begin at position 0; behind a
row's last token logits are NaN, tokens and experts 0.

    config, seed  the config as JSON and the seed of the weights
    prompts       (B,) how many tokens of each row are its prompt
    tokens        (B, T) random ones: `prompts` and as many more as there are steps
    logits        (B, T, C)
    experts       (M, B, T, K) the chosen experts in ascending order

and where the model has an MTP block, stepped behind a cache of its own:

    mtp_logits    (B, T-1, C)
"""

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DeepseekV3ForCausalLM, DynamicCache
from transformers.cache_utils import MtpCache

from model_cases import DecodeCase
from tools.golden.hugging_face import Golden, RouterRecorder, check_float64, load_mtp, loaded_in_float64


def make_decode_case(case: DecodeCase) -> Golden:
    """The arrays of one case."""
    prompts, config = np.array(case.prompts), case.model.config
    tokens = np.random.RandomState(case.model.seed).randint(
        config["vocab_size"], size=(len(prompts), case.steps + max(prompts))
    )
    for row, prompt in enumerate(prompts):
        tokens[row, prompt + case.steps :] = 0
    with loaded_in_float64(case.model) as model:
        golden, last = decode(model, tokens, prompts, case.steps)
        if config["num_nextn_predict_layers"]:
            golden["mtp_logits"] = decode_mtp(model, torch.tensor(tokens), last, int(prompts.max()))
    check_float64(golden)
    inputs = {"prompts": prompts.astype(np.int32), "tokens": tokens.astype(np.int32)}
    return {"config": np.array(json.dumps(config)), "seed": np.array(case.model.seed), **inputs, **golden}


def decode(
    model: DeepseekV3ForCausalLM, tokens: NDArray[Any], prompts: NDArray[Any], steps: int
) -> tuple[Golden, torch.Tensor]:
    """Run prompts, then tokens; return the arrays and the final-norm output of the left-padded rows."""
    pads = prompts.max() - prompts
    left_padded = torch.tensor(np.stack([np.roll(row, pad) for row, pad in zip(tokens, pads, strict=True)]))
    columns = torch.arange(tokens.shape[1])
    mask = (columns >= torch.tensor(pads)[:, None]).long()
    positions = (columns - torch.tensor(pads)[:, None]).clamp(min=0)
    cache, calls = DynamicCache(config=model.config), [range(prompts.max())]
    calls += [range(column, column + 1) for column in range(prompts.max(), tokens.shape[1])]
    states, experts = [], []
    for call in calls:
        with RouterRecorder(model) as routers:
            output = model.model(
                left_padded[:, call.start : call.stop],
                attention_mask=mask[:, : call.stop] if pads.any() else None,
                position_ids=positions[:, call.start : call.stop],
                past_key_values=cache,
                use_cache=True,
            )
        states.append(output.last_hidden_state)
        experts.append(routers.arrays()["experts"])
    last = torch.cat(states, dim=1)
    logits, chosen = model.lm_head(last).numpy().copy(), np.concatenate(experts, axis=2)
    for row, pad in enumerate(pads):
        logits[row] = np.roll(logits[row], -pad, axis=0)
        chosen[:, row] = np.roll(chosen[:, row], -pad, axis=1)
        logits[row, prompts[row] + steps :] = np.nan
        chosen[:, row, prompts[row] + steps :] = 0
    return {"logits": logits, "experts": chosen}, last


def decode_mtp(model: DeepseekV3ForCausalLM, tokens: torch.Tensor, last: torch.Tensor, prompt: int) -> NDArray[Any]:
    """Logits of the MTP block (see `run_mtp`) behind its cache: `prompt` - 1 positions at once, then one at a time.

    transformers pads no batch here, so prompts are of one length.
    """
    mtp, cache = load_mtp(model), MtpCache(config=model.config.get_mtp_config())
    starts = [0, *range(prompt - 1, tokens.shape[1] - 1)]
    hidden = [
        mtp.forward_layer(
            0,
            last[:, start:stop],
            torch.arange(start + 1, stop + 1)[None],
            cache,
            input_ids=tokens[:, start + 1 : stop + 1],
        )
        for start, stop in zip(starts, [*starts[1:], tokens.shape[1] - 1], strict=True)
    ]
    return model.lm_head(torch.cat(hidden, dim=1)).numpy()

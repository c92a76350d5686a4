"""The command line: thin, typed, no logic of its own."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from moejax.commands.ending import in_sentences

app = tyro.extras.SubcommandApp()

CheckpointArg = Annotated[
    Positional[str | None],
    arg(help="a folder or hub name; without it, the tiny trained checkpoint that comes with moejax"),
]
JsonArg = Annotated[Path | None, arg(help="write every printed figure to this file")]
TextArg = Annotated[Path | None, arg(help="UTF-8 text to evaluate on; without it, the test files that numpy ships")]
BudgetArg = Annotated[str | None, arg(help="bytes of the whole output folder: 103GB, 96GiB, or 6x less than BF16")]
FitArg = Annotated[
    str | None, arg(help="memory of the device that is to decode the result, 128GB: without --budget, all it can hold")
]
ContextArg = Annotated[
    int | None, arg(help="tokens in the latent cache of every sequence; without it 4096, or the model's limit")
]
BatchArg = Annotated[int, arg(help="sequences decoded at once")]
RecipeArg = Annotated[str, arg(help="a recipe that comes with moejax (fast, best, paper, equal_groups) or a TOML file")]
PlanArg = Annotated[Path | None, arg(help="carry out this plan, written by `moejax plan`, instead of measuring one")]
MemoryArg = Annotated[
    str | None,
    arg(help="the most memory to take: 1.5GB, 96GiB; a larger model is read block by block; without it, what is free"),
]
DropMtpArg = Annotated[bool, FlagCreatePairsOff, arg(help="leave the blocks of multi-token prediction out")]
DtypeArg = Annotated[Literal["float32", "bfloat16"], arg(help="what is computed in")]
MeshArg = Annotated[
    str | None,
    arg(help="devices to lie on: tensor=8, or tensor=4,data=2; weights are cut over tensor, sequences over data"),
]
DistributedArg = Annotated[
    str | None,
    arg(help="be one of several processes: coordinator=HOST:PORT,processes=2,process=0, or auto on a cluster"),
]
CacheDtypeArg = Annotated[
    Literal["float32", "bfloat16", "int8"] | None, arg(help="what the latent cache is kept in; without it, --dtype")
]
PrefillChunkArg = Annotated[int, arg(help="tokens of a prompt that go through the model at once")]


@app.command
def compress(
    checkpoint: CheckpointArg = None,
    *,
    budget: BudgetArg = None,
    fit: FitArg = None,
    context: ContextArg = None,
    batch: Annotated[int | None, arg(help="sequences decoded at once; without it 1")] = None,
    output: Annotated[Path, arg(help="the folder to write; it must not exist")],
    recipe: Annotated[
        str | None, arg(help="a recipe that comes with moejax (fast, best, paper, equal_groups) or a TOML file")
    ] = None,
    plan: PlanArg = None,
    expert_scores: Annotated[
        Path | None,
        arg(help="plan by these routing statistics (JSON) and round with nothing going through the model: no figures"),
    ] = None,
    calibration: Annotated[
        Path | None, arg(help="UTF-8 text to calibrate on; without it, the Python sources of installed packages")
    ] = None,
    calibration_chunks: Annotated[
        int | None, arg(help="chunks of 512 tokens to calibrate on, spread over the text; without it 128")
    ] = None,
    text: TextArg = None,
    drop_mtp: DropMtpArg = False,
    work: Annotated[
        Path | None, arg(help="keep what is finished in this folder: stopped and begun again, the job goes on")
    ] = None,
    memory: Annotated[
        str | None,
        arg(help="the most memory to take: 8GB; what does not fit lies on the disk; without it, what is free"),
    ] = None,
    mesh: Annotated[str | None, arg(help="round experts on several devices, one on each: tensor=8")] = None,
    distributed: DistributedArg = None,
    json: JsonArg = None,
) -> None:
    """Prune, adjust the activated experts, quantize and pack a checkpoint within a budget, and measure what it cost."""
    from moejax.commands.compress import run_compress
    from moejax.commands.devices import mesh_from

    by, texts = (recipe, plan, expert_scores), (calibration, calibration_chunks, text)
    with mesh_from(mesh, distributed) as devices:
        run_compress(
            checkpoint, budget, fit, context, batch, output, *by, *texts, drop_mtp, work, memory, devices, json
        )


@app.command
def evaluate(
    checkpoint: CheckpointArg = None,
    *,
    against: Annotated[
        str | None, arg(help="the original, to measure the divergence from: a checkpoint, or what --save-base wrote")
    ] = None,
    save_base: Annotated[
        Path | None,
        arg(help="write the predictions of the original (of the checkpoint, without --against) for a later --against"),
    ] = None,
    text: TextArg = None,
    memory: MemoryArg = None,
    dtype: DtypeArg = "float32",
    mesh: MeshArg = None,
    distributed: DistributedArg = None,
    json: JsonArg = None,
) -> None:
    """Perplexity of a checkpoint, and how far its predictions are from another's."""
    from moejax.commands.devices import mesh_from
    from moejax.commands.evaluate import run_evaluate

    with mesh_from(mesh, distributed) as devices:
        run_evaluate(checkpoint, against, save_base, text, memory, dtype, devices, json)


@app.command
def generate(
    checkpoint: CheckpointArg = None,
    *,
    prompt: Annotated[str, arg(help="what the user says; the text to continue where there is no chat template")],
    system: Annotated[str | None, arg(help="what the chat template's system says before the prompt")] = None,
    raw: Annotated[
        bool, FlagCreatePairsOff, arg(help="continue the prompt as it is, without the chat template")
    ] = False,
    tokens: Annotated[int, arg(help="how many tokens to generate at most")] = 128,
    temperature: Annotated[float, arg(help="0 takes the likeliest token; above 0 tokens are drawn")] = 0.0,
    top_k: Annotated[int, arg(help="draw from this many of the likeliest tokens; 0 from all")] = 0,
    top_p: Annotated[float, arg(help="draw from the fewest likeliest tokens whose probabilities reach this")] = 1.0,
    min_p: Annotated[float, arg(help="draw from tokens of this share of the likeliest one's probability")] = 0.0,
    seed: Annotated[int, arg(help="the same seed draws the same tokens")] = 0,
    stop: Annotated[
        tuple[str, ...], arg(help="texts of single tokens that end the text, beside the checkpoint's")
    ] = (),
    speculate: Annotated[
        bool, FlagCreatePairsOff, arg(help="draft with the MTP block; the text is that of temperature 0")
    ] = False,
    memory: MemoryArg = None,
    dtype: DtypeArg = "float32",
    cache_dtype: CacheDtypeArg = None,
    prefill_chunk: PrefillChunkArg = 512,
    mesh: MeshArg = None,
    distributed: DistributedArg = None,
    json: JsonArg = None,
) -> None:
    """Continue a prompt."""
    from moejax.commands.devices import mesh_from
    from moejax.commands.generate import Request, run_generate
    from moejax.generate.decode import Decoding
    from moejax.generate.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p)
    request = Request(prompt, system, raw, tokens, sampling, seed, stop, speculate)
    with mesh_from(mesh, distributed) as devices:
        run_generate(checkpoint, request, Decoding(dtype, cache_dtype, prefill_chunk), memory, devices, json)


@app.command
def bench(
    checkpoint: CheckpointArg = None,
    *,
    prompt: Annotated[int, arg(help="tokens of a prompt")] = 256,
    tokens: Annotated[int, arg(help="tokens decoded behind it")] = 64,
    repeats: Annotated[int, arg(help="runs whose median counts, after one that compiles")] = 3,
    dtype: DtypeArg = "float32",
    cache_dtype: CacheDtypeArg = None,
    prefill_chunk: PrefillChunkArg = 512,
    mesh: MeshArg = None,
    distributed: DistributedArg = None,
    json: JsonArg = None,
) -> None:
    """How fast a checkpoint reads and writes on this machine, and what memory it takes."""
    from moejax.commands.bench import run_bench
    from moejax.commands.devices import mesh_from
    from moejax.generate.decode import Decoding

    with mesh_from(mesh, distributed) as devices:
        run_bench(checkpoint, prompt, tokens, repeats, Decoding(dtype, cache_dtype, prefill_chunk), devices, json)


@app.command
def plan(
    config: Annotated[Positional[str], arg(help="deepseek_v3, kimi_k2, moonlight_16b_a3b, or a config.json")],
    *,
    budget: BudgetArg = None,
    fit: FitArg = None,
    expert_scores: Annotated[
        Path | None, arg(help="routing statistics (JSON); without it, those that come with moejax for this model")
    ] = None,
    context: ContextArg = None,
    batch: BatchArg = 1,
    recipe: RecipeArg = "fast",
    drop_mtp: DropMtpArg = False,
    output: Annotated[Path | None, arg(help="write the plan to this TOML file, for `moejax compress --plan`")] = None,
    json: JsonArg = None,
) -> None:
    """What would fit, and what would it cost: a plan for a model from its config alone, exact in bytes."""
    from moejax.commands.plan import run_plan

    run_plan(config, budget, fit, expert_scores, context, batch, recipe, drop_mtp, output, json)


@app.command
def inspect(
    checkpoint: CheckpointArg = None,
    *,
    verify: Annotated[bool, arg(help="read every byte, and compare it with the checksums in the manifest")] = False,
    json: JsonArg = None,
) -> None:
    """What a checkpoint holds: its config, its bytes and bits by kind of weight, how it was made."""
    from moejax.commands.inspect import run_inspect

    run_inspect(checkpoint, verify, json)


@app.command
def export(
    checkpoint: CheckpointArg = None,
    *,
    to: Annotated[Literal["hf"], arg(help="hf: config.json and safetensors, as Hugging Face's loaders read them")],
    output: Annotated[Path, arg(help="the folder to write; it must not exist")],
    dequantize: Annotated[
        Literal["bfloat16", "float32"] | None,
        arg(help="write every matrix in this dtype; without it weights stay as they are, FP8 too"),
    ] = None,
) -> None:
    """Write a checkpoint, compressed or not, for other runtimes."""
    from moejax.commands.export import run_export

    run_export(checkpoint, output, dequantize)


def main() -> None:
    """Run a command, which ends `in_sentences`."""
    with in_sentences():
        app.cli(prog="moejax", description="Compress DeepSeek-V3-class models to a byte budget.")

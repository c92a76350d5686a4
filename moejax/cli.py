"""The command line: thin, typed, no logic of its own."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from moejax.errors import InputError

app = tyro.extras.SubcommandApp()

CheckpointArg = Annotated[
    Positional[str | None],
    arg(help="a folder or hub name; without it, the tiny trained checkpoint that comes with moejax"),
]
JsonArg = Annotated[Path | None, arg(help="write every printed figure to this file")]
TextArg = Annotated[Path | None, arg(help="UTF-8 text to evaluate on; without it, the test files that numpy ships")]
BudgetArg = Annotated[str | None, arg(help="bytes of the whole output folder: 103GB, 96GiB, or 6x less than BF16")]
RecipeArg = Annotated[str, arg(help="a recipe that comes with moejax (default, equal_groups) or a TOML file")]
PlanArg = Annotated[Path | None, arg(help="carry out this plan, written by `moejax plan`, instead of measuring one")]
DtypeArg = Annotated[Literal["float32", "bfloat16"], arg(help="what is computed in")]


@app.command
def compress(
    checkpoint: CheckpointArg = None,
    *,
    budget: BudgetArg = None,
    output: Annotated[Path, arg(help="the folder to write; it must not exist")],
    recipe: Annotated[
        str | None, arg(help="a recipe that comes with moejax (default, equal_groups) or a TOML file")
    ] = None,
    plan: PlanArg = None,
    calibration: Annotated[
        Path | None, arg(help="UTF-8 text to calibrate on; without it, the Python sources of installed packages")
    ] = None,
    calibration_chunks: Annotated[int, arg(help="chunks of 512 tokens to calibrate on, spread over the text")] = 128,
    text: TextArg = None,
    json: JsonArg = None,
) -> None:
    """Prune, adjust the activated experts, quantize and pack a checkpoint within a budget, and measure what it cost."""
    from moejax.commands.compress import run_compress

    run_compress(checkpoint, budget, output, recipe, plan, calibration, calibration_chunks, text, json)


@app.command
def evaluate(
    checkpoint: CheckpointArg = None,
    *,
    against: Annotated[str | None, arg(help="the original, to measure the divergence from")] = None,
    text: TextArg = None,
    dtype: DtypeArg = "float32",
    json: JsonArg = None,
) -> None:
    """Perplexity of a checkpoint, and how far its predictions are from another's."""
    from moejax.commands.evaluate import run_evaluate

    run_evaluate(checkpoint, against, text, dtype, json)


@app.command
def generate(
    checkpoint: CheckpointArg = None,
    *,
    prompt: Annotated[str, arg(help="the text to continue")],
    tokens: Annotated[int, arg(help="how many tokens to generate at most")] = 128,
    temperature: Annotated[float, arg(help="0 takes the likeliest token; above 0 tokens are drawn")] = 0.0,
    seed: Annotated[int, arg(help="the same seed draws the same tokens")] = 0,
    dtype: DtypeArg = "float32",
) -> None:
    """Continue a prompt."""
    from moejax.commands.generate import run_generate

    run_generate(checkpoint, prompt, tokens, temperature, seed, dtype)


@app.command
def plan(
    config: Annotated[Positional[str], arg(help="deepseek_v3, kimi_k2, moonlight_16b_a3b, or a config.json")],
    *,
    budget: Annotated[str, arg(help="bytes of the whole output folder: 103GB, 96GiB, or 6x less than BF16")],
    expert_scores: Annotated[
        Path | None, arg(help="routing statistics (JSON); without it, those that come with moejax for this model")
    ] = None,
    memory: Annotated[str | None, arg(help="the device's memory: 128GB, 96GiB")] = None,
    context: Annotated[
        int | None, arg(help="tokens in the latent cache of every sequence; without it 4096, or the model's limit")
    ] = None,
    batch: Annotated[int, arg(help="sequences decoded at once")] = 1,
    recipe: RecipeArg = "default",
    output: Annotated[Path | None, arg(help="write the plan to this TOML file, for `moejax compress --plan`")] = None,
    json: JsonArg = None,
) -> None:
    """What would fit, and what would it cost: a plan for a model from its config alone, exact in bytes."""
    from moejax.commands.plan import run_plan

    run_plan(config, budget, expert_scores, memory, context, batch, recipe, output, json)


@app.command
def inspect(checkpoint: CheckpointArg = None, *, json: JsonArg = None) -> None:
    """What a checkpoint holds: its config, its bytes and bits by kind of weight, how it was made."""
    from moejax.commands.inspect import run_inspect

    run_inspect(checkpoint, json)


def main() -> None:
    """Run a command; bad input is one sentence and exit code 2, a failure of the machine one sentence and 1."""
    try:
        app.cli(prog="moejax", description="Compress DeepSeek-V3-class models to a byte budget.")
    except InputError as error:
        _leave(str(error), 2)
    except (OSError, MemoryError) as error:
        _leave(str(error) or type(error).__name__, 1)
    except KeyboardInterrupt:
        _leave("interrupted", 1)


def _leave(message: str, code: int) -> None:
    print(f"moejax: {message}", file=sys.stderr)
    sys.exit(code)

"""The commands of `pipelines` that use a trained model: `generate`, `serve` and `rlvr`.

What they import is imported when they run.
"""

from pathlib import Path
from typing import Annotated

import typer

from moe.use import HELP, Use

Device = Annotated[str, typer.Option(help=HELP["device"])]
Dtype = Annotated[str, typer.Option(help=HELP["dtype"])]
Speculate = Annotated[int, typer.Option(min=0, help=HELP["speculate"])]
Compiled = Annotated[bool, typer.Option("--compiled/--no-compiled", help=HELP["compiled"])]
Fused = Annotated[bool | None, typer.Option("--fused/--no-fused", help=HELP["fused"])]


def generate(
    checkpoint: Annotated[Path, typer.Option(help="a folder written by `train`, or a hub folder")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_tokens: Annotated[int, typer.Option(min=1, help=HELP["max_tokens"])] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help=HELP["temperature"])] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help=HELP["top_k"])] = None,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help=HELP["top_p"])] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help=HELP["repetition_penalty"])] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help=HELP["stop"])] = None,
    seed: Annotated[int, typer.Option(help=HELP["seed"])] = 0,
    device: Device = Use.device,
    dtype: Dtype = Use.dtype,
    speculate: Speculate = Use.speculate,
    compiled: Compiled = Use.compiled,
    fused: Fused = Use.fused,
) -> None:
    """Continue a prompt with a trained model; the text appears as it is made.

    Example: `pipelines generate --checkpoint demo/root/models/pretrain-0123456789ab --prompt "The history of"`
    """
    from moe.generate import write
    from moe.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()), seed=seed,
    )  # fmt: skip
    write(checkpoint, prompt, sampling, Use(device, dtype, speculate, compiled, fused))


def serve(
    folder: Annotated[Path, typer.Argument(help="a folder written by `train`, or a hub folder")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="the model's name for clients; default: the folder's")] = None,
    slots: Annotated[int, typer.Option(min=1, help="requests that are answered at once")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait; beyond, 429")] = 64,
    context: Annotated[int | None, typer.Option(min=2, help="tokens a request may have; default: the model's")] = None,
    device: Device = Use.device,
    dtype: Dtype = Use.dtype,
    speculate: Speculate = Use.speculate,
    compiled: Compiled = Use.compiled,
    fused: Fused = Use.fused,
) -> None:
    """Answer OpenAI's completions and chat completions with a trained model; MOE_API_KEY asks clients for a key.

    Example: `pipelines serve demo/root/models/pretrain-0123456789ab --port 8000`
    """
    from moe.server.__main__ import Options
    from moe.server.__main__ import serve as serve_model

    serve_model(
        Options(folder, host, port, name, slots, queue, context, Use(device, dtype, speculate, compiled, fused))
    )


def rlvr(
    config: Annotated[Path, typer.Option("--config", "-c", help="the run file, YAML or JSON", show_default=False)],
    root: Annotated[
        str | None, typer.Option(help="root with the records; default: the file that `tasks` names")
    ] = None,
    stage: Annotated[str, typer.Option(help="instance of the stage `rl` that wrote them")] = "rl",
    dataset: Annotated[list[str] | None, typer.Option(help="only this dataset's; may be repeated")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a value over the file's; may be repeated")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what the run would be, and train nothing")] = False,
) -> None:
    """Train a model on the records of the stage `rl`: reinforcement learning with verifiable rewards, by MIS-PO.

    Answers are sampled, judged (code in a sandbox) and trained on, generation after generation; `--dry-run` says how many.

    Example: `pipelines rlvr -c rl.yaml --root demo/root --dry-run`

    Example: `pipelines rlvr -c rl.yaml --root demo/root --set steps=50 --set "trajectory_ratio=[0.9, 1.1]"`
    """
    from mixtures.posttrain.verify import walls
    from pipelines.rlvr import rlvr as run

    for warning in walls():
        typer.echo(f"warning: {warning}", err=True)
    for line in run(config, root, stage, dataset or (), change or (), dry_run):
        typer.echo(line)

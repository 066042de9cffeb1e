"""The commands of `pipelines` that use a trained model: `generate` and `serve`. What they import is imported when they run."""

from pathlib import Path
from typing import Annotated

import typer


def generate(
    checkpoint: Annotated[Path, typer.Option(help="a folder written by `train`")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Continue a prompt with a trained model."""
    from pipelines.model import continue_prompt

    typer.echo(continue_prompt(checkpoint, prompt, max_tokens, temperature, top_p, seed))


def serve(
    folder: Annotated[Path, typer.Argument(help="a folder written by `train`, or a hub folder")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="the model's name for clients; default: the folder's")] = None,
    slots: Annotated[int, typer.Option(min=1, help="requests that are answered at once")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait; beyond, 429")] = 64,
    context: Annotated[int | None, typer.Option(min=2, help="tokens a request may have; default: the model's")] = None,
    speculate: Annotated[bool, typer.Option("--speculate", help="draft with the model's MTP heads")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU if there is one")] = "auto",
) -> None:
    """Answer OpenAI's completions and chat completions with a trained model; MOE_API_KEY asks clients for a key.

    Example: `pipelines serve demo/root/models/pretrain-0123456789ab --port 8000`
    """
    from moe.server.__main__ import Options
    from moe.server.__main__ import serve as serve_model

    serve_model(Options(folder, host, port, name, slots, queue, context, speculate, device))

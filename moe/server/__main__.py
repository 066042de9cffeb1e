"""Serve a model: `python -m moe.server FOLDER [--port 8000]`; FOLDER is a run that `moe.train` wrote, or a hub folder.

    python -m moe.server models/pretrain-0123456789ab --port 8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
         -d '{"model": "pretrain-0123456789ab", "prompt": "The function returns", "max_tokens": 32}'
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from core.errors import ConfigError, StepwellError
from moe.use import Use, add_options

KEY = "MOE_API_KEY"  # empty: none
LEAVE_S = 10  # that open answers get to end after a signal
CONNECTIONS = 1024  # beyond, 503; chosen, above what slots and queue hold by far


@dataclass(frozen=True)
class Options:
    """What is served, and how; the command line's options in their order."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    slots: int = 8
    queue: int = 64
    context: int | None = None
    use: Use = field(default_factory=Use)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM. The API key, if any, comes from the environment: MOE_API_KEY."""
    parser = argparse.ArgumentParser(
        prog="python -m moe.server", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a run folder of training, or a hub folder with tokenizer.json")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and says which")
    parser.add_argument("--name", help="the model's name for clients (default: the folder's)")
    parser.add_argument("--slots", type=int, default=8, help="requests that are answered at once (default 8)")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait; beyond, 429 (default 64)")
    parser.add_argument("--context", type=int, help="tokens a request may have (default: the model's context)")
    add_options(parser, ("device", "dtype", "speculate", "compiled", "fused"))
    args = parser.parse_args(argv)
    try:
        own = {f.name: getattr(args, f.name) for f in fields(Options) if f.name != "use"}
        serve(Options(**own, use=Use.of(args)))
    except StepwellError as e:
        print(f"serve: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    return 0


def serve(options: Options) -> None:
    """Loads the model and listens; the server says its address once it answers."""
    try:
        import uvicorn

        from moe.server.app import Serving
    except ModuleNotFoundError as e:
        raise ConfigError(f"{e.name} is not installed; install the extra: pip install 'stepwell[serve]'") from e
    from moe.batching import Batcher
    from moe.generate import load_tokenizer
    from moe.memory import memory_named
    from moe.server.chat import chat_template
    from moe.server.service import Service

    use, tokenizer = options.use, load_tokenizer(options.folder)
    model = use.load(options.folder)
    context = model.config.context if options.context is None else options.context
    with memory_named(
        f"out of memory with --slots {options.slots} x --context {context} tokens", "lower either, or --dtype bfloat16"
    ):
        batcher = Batcher(
            model, tokenizer, slots=options.slots, queue=options.queue, context=context, speculate=use.speculate,
            compiled=use.compiled, fused=use.fused,
        )  # fmt: skip
    name = options.name or options.folder.resolve().name
    serving = Serving(Service(batcher), tokenizer, chat_template(options.folder), name, os.environ.get(KEY) or None)
    config = uvicorn.Config(
        serving.app(), host=options.host, port=options.port, log_level="info",
        timeout_graceful_shutdown=LEAVE_S, limit_concurrency=CONNECTIONS,
    )  # fmt: skip
    uvicorn.Server(config).run()


if __name__ == "__main__":
    sys.exit(main())

"""Serve a model: `python -m moe.server FOLDER [--port 8000]`; FOLDER is a run that `moe.train` wrote, or a hub folder.

    python -m moe.server models/pretrain-0123456789ab --port 8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
         -d '{"model": "pretrain-0123456789ab", "prompt": "The function returns", "max_tokens": 32}'
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError, StepwellError

KEY = "MOE_API_KEY"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a run folder of training, or a hub folder with tokenizer.json")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and says which")
    parser.add_argument("--name", help="the model's name for clients (default: the folder's)")
    parser.add_argument("--slots", type=int, default=8, help="requests that are answered at once (default 8)")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait; beyond, 429 (default 64)")
    parser.add_argument("--context", type=int, help="tokens a request may have (default: the model's context)")
    parser.add_argument("--speculate", action="store_true", help="draft with the MTP heads")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM. The API key, if any, comes from the environment: MOE_API_KEY."""
    parser = argparse.ArgumentParser(
        prog="moe.server", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options(parser)
    args = parser.parse_args(argv)
    try:
        serve(args)
    except ConfigError as e:
        print(f"serve: {e}", file=sys.stderr)
        return 2
    except StepwellError as e:
        print(f"serve: {e}", file=sys.stderr)
        return 1
    return 0


def serve(args: argparse.Namespace) -> None:
    """Loads the model and listens. The address is printed once the server answers."""
    try:
        import uvicorn

        from moe.server.app import Serving
    except ModuleNotFoundError as e:
        raise ConfigError(f"{e.name} is not installed; install the extra: pip install 'stepwell[serve]'") from e
    import moe
    from moe.batching import Batcher
    from moe.checkpoint import load_tokenizer
    from moe.devices import pick
    from moe.server.chat import chat_template
    from moe.server.service import Service

    model = moe.load(args.folder).to(pick(args.device))
    tokenizer = load_tokenizer(args.folder)
    batcher = Batcher(
        model, tokenizer, slots=args.slots, queue=args.queue, context=args.context, speculate=args.speculate
    )
    name = args.name or args.folder.resolve().name
    serving = Serving(Service(batcher), tokenizer, chat_template(args.folder), name, os.environ.get(KEY))
    config = uvicorn.Config(serving.app(), host=args.host, port=args.port, log_level="info")
    uvicorn.Server(config).run()


if __name__ == "__main__":
    sys.exit(main())

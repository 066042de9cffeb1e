"""What the GPU benchmarks share: timing by events, the count of floating-point operations, result lines.

MFU here: (6 x the active parameters of matrix products, LM head included and embedding not, + 12 x query heads x head
width x keys seen a token) x tokens/s / 989e12, the same for every contender.
"""

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.experts import ExpertLinear
from moe.model import Decoder

PEAK_FLOPS = 989e12  # dense bf16 of H100 and H200 SXM, NVIDIA's data sheets


class Drawn(Decoder):
    """A decoder whose weights are drawn where they lie: a billion numbers take ten seconds on a CPU."""

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.Linear | ExpertLinear):
                module.weight.normal_(0, module.weight.shape[-1] ** -0.5)
            elif isinstance(module, torch.nn.Embedding):
                module.weight.normal_(0, 0.02)


def drawn(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Drawn:
    """A model on the GPU."""
    with torch.device("cuda"):
        return Drawn(config).to(dtype)


class Results:
    """Lines of figures, on the terminal and in a file."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.environment = folder / f"{name}.jsonl", environment()

    def add(self, what: str, **figures: Any) -> None:
        """One line, at once: a later contender may take the process down."""
        line = {"what": what, **{k: _rounded(v) for k, v in figures.items()}}
        print(json.dumps(line), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **self.environment}) + "\n")

    def attempt(self, what: str, body: Callable[[], dict[str, Any]]) -> None:
        """The figures of a contender, or its error; memory is given back afterwards."""
        begin = time.perf_counter()
        try:
            figures = body()
        except Exception as error:  # noqa: BLE001 - a contender that fails is a line of its own, and the others still run
            import traceback

            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        self.add(what, **figures, wall_s=time.perf_counter() - begin)
        release()


def environment() -> dict[str, Any]:
    """Date, machine, versions, command."""
    import triton

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": "python -m " + " ".join([f"benchmarks.gpu.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def arguments(name: str, text: str | None, **options: dict[str, Any]) -> argparse.Namespace:
    """`--out` and the given options of the script `name`, whose docstring is `text`. Without a GPU the command ends here."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu.{name}",
        description=text,
        epilog=f"example:\n  python -m benchmarks.gpu.{name} --out results\nTakes minutes on one GPU; nothing is fetched.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("."), help=f"folder of {name}.jsonl, to which lines are added")
    for option, settings in options.items():
        parser.add_argument(f"--{option}", **settings)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here, expected one H100 or another of compute capability 8 or higher")
    return args


def release() -> None:
    """Gives memory and compiled code back between contenders."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def timed_ms(body: Callable[[], Any], repeats: int = 20, warm: int = 5) -> list[float]:
    """Milliseconds of each call by device events, after a warm-up."""
    for _ in range(warm):
        body()
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        body()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def median_ms(body: Callable[[], Any], repeats: int = 20, warm: int = 5) -> float:
    """The median of `timed_ms`."""
    return statistics.median(timed_ms(body, repeats, warm))


def graphed(body: Callable[[], Any]) -> Callable[[], Any]:
    """The body as a graph: what it takes where launches do not wait for Python, as between the layers of a model.

    Each replay gives the same memory.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def kernels(body: Callable[[], Any], runs: int = 3, most: int = 45) -> list[tuple[str, float, int]]:
    """The device's kernels of one call by time: name, milliseconds, launches."""
    for _ in range(3):
        body()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(runs):
            body()
        torch.cuda.synchronize()
    rows = [(e.key[:110], e.self_device_time_total / 1000 / runs, e.count // runs) for e in seen.key_averages()]
    return [(n, float(f"{t:.4g}"), c) for n, t, c in sorted(rows, key=lambda row: -row[1])[:most]]


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in fp64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def flops_per_token(config: ModelConfig, context: int, shared: bool = True) -> float:
    """Of a training step, see the module's text. `shared`: whether there is a shared expert; MTP heads not counted."""
    c, total = config, config.dim * config.vocab_size * 6.0
    for layer in range(c.layers):
        heads, keys = c.heads_of(layer), (context + 1) / 2
        if not c.full(layer) and context > c.window:
            keys = (c.window * (c.window + 1) / 2 + (context - c.window) * c.window) / context
        width = c.head_dim * (2 * heads + 2 * c.kv_heads) + (heads if c.gate else 0)
        if layer < c.dense_layers:
            width += 3 * c.dense_dim
        else:
            width += 3 * c.top_k * c.expert_dim + (3 * c.shared_dim if shared else 0) + c.experts
        total += 6 * c.dim * width + 12 * heads * c.head_dim * keys
    return total


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value

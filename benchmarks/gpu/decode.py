"""Decoding of the preset `1b` at random weights: tokens a second of one row, plain and with drafts, beside Hugging Face.

Greedy, 256 new tokens behind a prompt of 128; what a time covers differs, and stands in each line as `covers`:

    plain_steps_*                steps of moe/decode.py, one CUDA graph a token: no prefill, no requests, nothing read back
    plain_generate_batch_*       moe.generate.generate_batch, what a caller has: a call's new tokens, the capture of its graph
                                 included; a call for one token, which is prefill and setting up, subtracted
    plain_batcher_*              the same through one moe.batching.Batcher that stays, as in a server: its graph is captured
                                 before; one token subtracted likewise
    plain_hf_generate_static     Hugging Face's generate of Qwen3-MoE (`train_step.qwen_shape`) with a static cache, which
                                 compiles by itself; compiled before, one token subtracted likewise

Steps run by the fused kernels (moe/fused.py), as they do for whoever sets nothing; `layers` in a name: by the model's own layers,
`compiled`: those by torch.compile; `unchained`: no kernel begins before the last one has ended (moe/kernels_chain.py).

`rounds_*`: one step that verifies K drafts and makes new ones, as a graph; with random weights drafts are hardly ever right, so
the speed-up at an acceptance length A is A x plain ms / round ms, which is shown for A from 1 to K + 1. `several_*`: the
verification alone.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.train_step import qwen_shape, step_shape
from core.errors import StageError
from moe.batching import Batcher
from moe.cache import Cache
from moe.config import ModelConfig
from moe.decode import Decode, Kind
from moe.generate import generate_batch
from moe.graphs import Replay
from moe.sampling import Sampling

PROMPT, NEW = 128, 256
KINDS: tuple[Kind, ...] = ("plain", "round")


def error(config: ModelConfig, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Logits of fused steps and of the model's own cached forward beside those in fp32; T at once beside one by one."""
    from moe.fused import FusedDecoder

    torch.manual_seed(0)
    model = timing.drawn(config, dtype).eval()
    exact = timing.drawn(config, torch.float32).eval()
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    caches = [_cache(config, 1, t, 600 + PROMPT, 3) for t in (dtype, dtype, dtype, torch.float32)]
    fused = FusedDecoder(model, caches[0].capacity)
    prompt = torch.randint(1, config.vocab_size, (1, PROMPT), device="cuda")
    errors: list[tuple[float, float]] = []
    same, flips = True, [0, 0]
    with torch.inference_mode():
        for m, cache in zip((model, model, model, exact), caches, strict=True):
            m.states(prompt, cache=cache)
        for _ in range(520 // tokens):  # past the window
            new = torch.randint(1, config.vocab_size, (1, tokens), device="cuda")
            got = fused.logits(fused.states(new, caches[0]))
            own, want = (
                m.lm_head(m.norm(m.states(new, cache=c)))[0] for m, c in ((model, caches[1]), (exact, caches[3]))
            )
            single = torch.cat([fused.logits(fused.states(t, caches[2])) for t in new.split(1, 1)])
            errors.append((timing.relative(got, want), timing.relative(own, want)))
            same = same and torch.equal(got, single)
            for i, logits in enumerate((got, own)):
                flips[i] += int((logits.argmax(-1) != want.argmax(-1)).sum())
    medians = [sorted(e)[len(e) // 2] for e in zip(*errors, strict=True)]
    return {
        "error_fused": medians[0], "error_model": medians[1], "same_bits_at_once": same,
        "argmax_flips_fused": flips[0], "argmax_flips_model": flips[1],
    }  # fmt: skip


def plain(
    config: ModelConfig, rows: int = 1, context: int = 4096, fused: bool = True, chained: bool = True
) -> dict[str, Any]:
    """Greedy decoding by one graph a token."""
    state = _state(config, rows=rows, context=context, fused=fused, chained=chained)
    ms = _step_ms(state, "plain", NEW)
    return {
        "covers": "replayed steps, no prefill",
        "rows": rows,
        "ms": ms,
        "tokens_per_s": rows / ms * 1000,
        "kernels": timing.kernels(lambda: state.step("plain", rows, "greedy"), 10, 16),
        **_memory(),
    }


def several(config: ModelConfig, tokens: int) -> dict[str, Any]:
    """A step of T tokens of one row: what a verification costs."""
    from moe.fused import FusedDecoder

    torch.manual_seed(0)
    model = timing.drawn(config).eval()
    cache = _cache(config, 1, torch.bfloat16, 4096, 3)
    fused = FusedDecoder(model, cache.capacity)
    tokens_BT = torch.ones(1, tokens, dtype=torch.int64, device="cuda")
    with torch.inference_mode():
        model.states(torch.randint(1, config.vocab_size, (1, PROMPT), device="cuda"), cache=cache)
        replay = Replay(lambda: fused.logits(fused.states(tokens_BT, cache)))
        replay.prepare()
        return {"tokens": tokens, "ms": timing.median_ms(replay, 50)}


def rounds(config: ModelConfig, drafts: int, fused: bool = True, chained: bool = True) -> dict[str, Any]:
    """moe/decode.py's greedy steps: plain, and verifying `drafts` drafts."""
    shape = dataclasses.replace(config, mtp_heads=drafts)
    state = _state(shape, context=2048, drafts=drafts, fused=fused, chained=chained)
    figures: dict[str, Any] = {f"{kind}_ms": _step_ms(state, kind, 100) for kind in KINDS}
    ratio = figures["plain_ms"] / figures["round_ms"]
    figures |= {f"speedup_at_{a}": a * ratio for a in range(1, drafts + 2)}
    return figures | {"kernels": timing.kernels(lambda: state.step("round", 1, "greedy"), 10, 24), **_memory()}


def _state(config: ModelConfig, *, rows: int = 1, context: int, drafts: int = 0, fused: bool, chained: bool) -> Decode:
    """Rows behind a prompt, ready for steps."""
    if fused:
        from moe import kernels_chain

        kernels_chain.CHAINS = chained
    torch.manual_seed(0)
    state = Decode(timing.drawn(config).eval(), rows=rows, context=context, drafts=drafts, fused=fused)
    prompt = torch.randint(1, config.vocab_size, (PROMPT,)).tolist()
    for row in range(rows):
        state.admit(row, prompt, Sampling(temperature=0.0))
    state.prefill(range(rows), [prompt] * rows, [None] * rows, PROMPT, "greedy")
    return state


def _step_ms(state: Decode, kind: Kind, steps: int) -> float:
    for _ in range(3):
        state.step(kind, state.rows, "greedy")
    state.wait()
    begin = time.perf_counter()
    for _ in range(steps):
        state.step(kind, state.rows, "greedy")
    state.wait()
    return (time.perf_counter() - begin) / steps * 1000


def generated(config: ModelConfig) -> dict[str, Any]:
    """A call of `generate_batch` with one prompt."""
    torch.manual_seed(0)
    model = timing.drawn(config).eval()
    prompt = torch.randint(1, config.vocab_size, (PROMPT,)).tolist()

    def run(new: int) -> int:
        return len(generate_batch(model, [prompt], Sampling(temperature=0.0, max_tokens=new))[0].tokens)

    return {"covers": "a call: new tokens and capture, less a call for 1"} | _new_tokens(run) | _memory()


def batched(config: ModelConfig, *, fused: bool | None = None, compiled: bool = False) -> dict[str, Any]:
    """One request at a time through a `Batcher` that stays."""
    torch.manual_seed(0)
    model = timing.drawn(config).eval()
    prompt = torch.randint(1, config.vocab_size, (PROMPT,)).tolist()
    batcher = Batcher(model, slots=1, context=PROMPT + NEW + 1, fused=fused, compiled=compiled)

    def run(new: int) -> int:
        batcher.submit(prompt, Sampling(temperature=0.0, max_tokens=new))
        made = 0
        while not batcher.idle:
            made += sum(len(event.tokens) for event in batcher.step())
        return made

    return {"covers": "a request: new tokens, less a request for 1"} | _new_tokens(run) | _memory()


def _new_tokens(run: Callable[[int], int]) -> dict[str, Any]:
    """Milliseconds of each token behind the first: medians of seven calls for `NEW` and for one, in turn, after two each.

    In turn, since a call for one is the host's work and drifts: 57 and 82 ms were measured a few seconds apart.
    """
    times: dict[int, list[float]] = {1: [], NEW: []}
    for new in (1, NEW) * 9:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        made = run(new)
        torch.cuda.synchronize()
        times[new].append(time.perf_counter() - begin)
        if made != new:  # an EOS among random weights
            raise StageError(f"decode: the answer ended early, got {made} tokens, expected {new}; change the seed")
    seconds = {new: statistics.median(found[2:]) for new, found in times.items()}
    ms = (seconds[NEW] - seconds[1]) / (NEW - 1) * 1000
    return {"rows": 1, "ms": ms, "tokens_per_s": 1000 / ms, "first_token_ms": seconds[1] * 1000}


def hf_static(config: ModelConfig) -> dict[str, Any]:
    """Hugging Face's generate with a static cache, which compiles by itself."""
    from benchmarks.gpu.train_step import hf_qwen_model

    model = hf_qwen_model(config).eval()
    prompt = torch.randint(1, config.vocab_size, (1, PROMPT), device="cuda")

    def run(new: int) -> int:
        whole = model.generate(
            prompt,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        return int(whole.shape[1]) - PROMPT

    return {"covers": "a call: new tokens, less a call for 1"} | _new_tokens(run)


def _cache(config: ModelConfig, rows: int, dtype: torch.dtype, capacity: int, slack: int) -> Cache:
    return Cache(config, range(config.layers), rows=rows, capacity=capacity, slack=slack, device="cuda", dtype=dtype)


def _memory() -> dict[str, float]:
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def main() -> None:
    """All, or those whose names begin with one of `--only`."""
    args = timing.arguments(
        "decode", __doc__, only={"nargs": "*", "default": [""], "help": "beginnings of names (default: all)"}
    )
    results = timing.Results("decode", args.out)
    small, large, tiny = step_shape(32_768), step_shape(128_896), step_shape(512, layers=5)
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "error_bf16": lambda: error(tiny, torch.bfloat16, 4),
        "error_fp32": lambda: error(tiny, torch.float32, 4),
        "plain_steps_v32k": lambda: plain(small),
        "plain_steps_v129k": lambda: plain(large),
        "plain_steps_rows8_v32k": lambda: plain(small, rows=8),
        "plain_steps_rows16_v32k": lambda: plain(small, rows=16, context=2048),
        "plain_steps_rows32_v32k": lambda: plain(small, rows=32, context=2048),
        "plain_steps_layers_rows32_v32k": lambda: plain(small, rows=32, context=2048, fused=False),
        "plain_steps_unchained_v32k": lambda: plain(small, chained=False),
        "plain_steps_layers_v32k": lambda: plain(small, fused=False),
        "plain_generate_batch_v32k": lambda: generated(small),
        "plain_batcher_v32k": lambda: batched(small),
        "plain_batcher_layers_v32k": lambda: batched(small, fused=False),
        "plain_batcher_compiled_v32k": lambda: batched(small, fused=False, compiled=True),
        "several_2": lambda: several(small, 2),
        "several_4": lambda: several(small, 4),
        "rounds_1": lambda: rounds(small, 1),
        "rounds_3": lambda: rounds(small, 3),
        "rounds_1_unchained": lambda: rounds(small, 1, chained=False),
        "rounds_3_unchained": lambda: rounds(small, 3, chained=False),
        "rounds_layers_1": lambda: rounds(small, 1, fused=False),
        "rounds_layers_3": lambda: rounds(small, 3, fused=False),
        "plain_hf_generate_static": lambda: hf_static(qwen_shape(32_768)),
    }
    for name, body in known.items():
        if name.startswith(tuple(args.only)):
            results.attempt(name, body)


if __name__ == "__main__":
    main()

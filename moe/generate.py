"""Continues prompts: one or many, whole or as they come, by plain decoding or with the model's own drafts.

In: a decoder and token ids, or a folder and a text. Out: new token ids without EOS, or the new text. A prompt starts
from EOS like every document. Same model, prompt, settings and seed: same output, whatever prompts stand beside it
(moe/batching.py says how far that holds in floating point).

    python -m moe.generate FOLDER --prompt "Once upon" --max-tokens 50 --temperature 0.8

FOLDER is a run, a checkpoint or a hub folder.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moe
from core.errors import ConfigError, StepwellError
from moe import checkpoint
from moe.batching import Batcher, Event, Finish, TokenLogprobs
from moe.memory import memory_named
from moe.model import Decoder
from moe.sampling import Sampling
from moe.speculative import Acceptance

SLOTS = 16  # prompts of a batch that are decoded at once
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Answer:
    """The continuation of one prompt. `text` is empty without a tokenizer."""

    tokens: tuple[int, ...]
    text: str
    finished: Finish | None
    logprobs: tuple[TokenLogprobs, ...] | None
    acceptance: Acceptance | None  # None where no draft was made


def generate_text(
    folder: Path,
    prompt: str,
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    speculate: bool = False,
) -> str:
    """The continuation of `prompt`, without it. `max_tokens` None: as far as the model's context reaches."""
    tokenizer = load_tokenizer(Path(folder))
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, seed=seed, stop=tuple(stop)
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    return generate_batch(moe.load(folder), [ids], sampling, tokenizer=tokenizer, speculate=speculate)[0].text


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    speculate: bool = False,
) -> Iterator[int]:
    """Yields new tokens until EOS or `max_tokens`.

    `temperature` 0 takes the likeliest token. EOS, prompt and new tokens must fit the context.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens, seed=seed)
    events = stream(model, [prompt], sampling, speculate=speculate)
    return (token for event in events for token in event.tokens)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    tokenizer: Any = None,
    speculate: bool = False,
    slots: int = SLOTS,
    fused: bool | None = None,
) -> list[Answer]:
    """The prompts' continuations, in their order; `sampling` for all of them, or one each. `fused` is that of `Decode`."""
    events: list[list[Event]] = [[] for _ in prompts]
    for event in stream(model, prompts, sampling, tokenizer=tokenizer, speculate=speculate, slots=slots, fused=fused):
        events[event.id].append(event)
    return [_answer(part) for part in events]


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    tokenizer: Any = None,
    speculate: bool = False,
    slots: int = SLOTS,
    fused: bool | None = None,
) -> Iterator[Event]:
    """Events of all prompts as they come; an event's `id` is the prompt's index. Settings are checked at once."""
    each = [sampling or Sampling()] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else sampling
    slots, context = max(1, min(slots, len(prompts))), _context(model, prompts, each)
    with memory_named(*_memory(slots, context)):
        batcher = Batcher(
            model, tokenizer, slots=slots, speculate=speculate, queue=max(1, len(prompts)), context=context, fused=fused
        )
    for prompt, settings in zip(prompts, each, strict=True):
        batcher.submit(prompt, settings)
    return _drain(batcher)


def load_for_use(folder: Path, device: str = "auto", dtype: str = "auto") -> Decoder:
    """The folder's model where and as it shall run; "auto": a GPU if there is one, bfloat16 there and float32 on a CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"no GPU here, got device {device!r}, expected one that torch sees; use --device cpu")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    with memory_named(
        f"moe: out of memory while {folder} is loaded in {dtype} on {device}",
        "use --dtype bfloat16, a device with more memory, or a smaller model",
    ):
        return moe.load(folder).to(device, getattr(torch, dtype)).eval()


def load_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a run, or the tokenizer.json of a hub folder."""
    hub = folder / checkpoint.TOKENIZER
    if hub.is_file() and not (folder / checkpoint.LATEST).is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(hub))
    return checkpoint.load_tokenizer(folder)


def _context(model: Decoder, prompts: Sequence[Sequence[int]], each: Sequence[Sampling]) -> int:
    """No more than these prompts can fill: every step reads the whole capacity of the cache."""
    context = model.config.context
    needs = (context if s.max_tokens is None else len(p) + s.max_tokens for p, s in zip(prompts, each, strict=True))
    return min(context, max(needs, default=context))


def _drain(batcher: Batcher) -> Iterator[Event]:
    while not batcher.idle:
        with memory_named(*_memory(batcher.slots, batcher.limit)):
            events = batcher.step()
        yield from events


def _memory(slots: int, context: int) -> tuple[str, str]:
    """What is said where a batch does not fit."""
    return (
        f"generate: out of memory with {slots} prompts at once of up to {context} tokens each",
        "lower max_tokens or slots, decode without drafts, or in bfloat16",
    )


def _answer(events: list[Event]) -> Answer:
    logprobs = [lp for e in events for lp in (e.logprobs or ())[: len(e.tokens)]]
    return Answer(
        tokens=tuple(t for e in events for t in e.tokens),
        text="".join(e.text for e in events),
        finished=events[-1].finished,
        logprobs=tuple(logprobs) if any(e.logprobs is not None for e in events) else None,
        acceptance=events[-1].acceptance,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.generate", description="Continues a text.")
    parser.add_argument("folder", type=Path, help="a run, a checkpoint or a hub folder")
    parser.add_argument("--prompt", default="", help="the text to continue; -: standard input")
    parser.add_argument("--max-tokens", type=int, help="new tokens at most; default: as far as the context reaches")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="no drafts by MTP heads")
    parser.add_argument("--device", default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, help="steps by fused kernels; default: if they can"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; texts go to standard output as they come, figures to standard error."""
    args = _parser().parse_args(arguments)
    try:
        return _run(args)
    except StepwellError as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def _run(args: argparse.Namespace) -> int:
    sampling = Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop), max_tokens=args.max_tokens, seed=args.seed,
    )  # fmt: skip
    tokenizer = load_tokenizer(args.folder)
    model = load_for_use(args.folder, args.device, args.dtype)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    last = None
    for last in stream(model, [ids], sampling, tokenizer=tokenizer, speculate=not args.plain, fused=args.fused):
        sys.stdout.write(last.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if last is not None and last.acceptance is not None:
        sys.stderr.write(f"{last.acceptance.length:.2f} tokens a round over {last.acceptance.rounds} rounds\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

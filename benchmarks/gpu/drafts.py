"""Drafts of a trained model: continuations of held-out documents, plain and with one draft a round or more, by domain.

    python -m benchmarks.gpu.drafts ROOT RUN_FOLDER [--out OUT]

ROOT is a pipeline's root (its mixture `held_out` and its tokenizer), RUN_FOLDER a run of training with MTP heads, such as
`study --part run` leaves. Up to eight documents a domain of more than 200 tokens are continued behind their first 128 by up to
128 new ones, one request at a time in bf16, by Batchers that take turns; a domain without such documents has no line. Out, for
each domain and number of drafts, with the model's parameters in millions:

    drafts_<parameters>m_<domain>_<drafts>            at temperature 0. Small models repeat themselves, which flatters drafts
    drafts_<parameters>m_<domain>_<drafts>_sampled    at temperature 1, where plain and drafted answers are different texts

Rates count the tokens behind each answer's first and the time that they took. Drafts stay on where they lose, so `speed_up` may
lie below 1. The line `samples` has continuations of a few prompts.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.study import DEVICE, TOKENIZER
from benchmarks.gpu.timing import Results
from mixtures.reader import MixtureSource
from moe.batching import Batcher
from moe.model import Decoder
from moe.sampling import Sampling
from moe.speculative import Acceptance, Pace

TEMPERATURES = {"": 0.0, "_sampled": 1.0}  # by the end of a line's name
DOCS, LEAST, PROMPT, NEW = 8, 200, 128, 128
PROMPTS = ("The function returns", "In the nineteenth century", "def ", "Usage: ")
Answer = tuple[int, float, Acceptance | None]


def drafts(args: argparse.Namespace, results: Results) -> None:
    """All domains at both temperatures, then the samples."""
    import moe

    held_out = MixtureSource(args.root, "held_out")
    model = moe.load(args.run).to(DEVICE).bfloat16().eval()
    prompts = {domain: _prompts(held_out, d) for d, domain in enumerate(held_out.domains)}
    print(json.dumps({"run": str(args.run), "prompts": {domain: len(own) for domain, own in prompts.items()}}))
    batchers = [
        Batcher(model, slots=1, speculate=count, pace=Pace(count, window=10**6))
        for count in range(1 + model.config.mtp_heads)
    ]
    for domain in (domain for domain, own in prompts.items() if own):
        for end, temperature in TEMPERATURES.items():
            _race(batchers, domain, prompts[domain], end, temperature, results)
    results.add("samples", texts=_samples(args.root, model))


def _prompts(held_out: MixtureSource, domain: int) -> list[list[int]]:
    """Beginnings of the domain's first long documents."""
    docs = [i for i in range(len(held_out)) if held_out.domain(i) == domain and held_out.length(i) > LEAST]
    return [held_out.tokens(i)[:PROMPT].tolist() for i in docs[:DOCS]]


def _race(
    batchers: Sequence[Batcher],
    domain: str,
    prompts: Sequence[Sequence[int]],
    end: str,
    temperature: float,
    results: Results,
) -> None:
    """The batchers in turn, the first without drafts: a line for each of the others."""
    asked = [
        (prompt, Sampling(temperature=temperature, max_tokens=NEW, seed=seed)) for seed, prompt in enumerate(prompts)
    ]
    # The first prompt goes twice: its first answers, which capture graphs and measure what a round costs, do not count.
    answers = [[_answered(b, prompt, sampling) for b in batchers] for prompt, sampling in [asked[0], *asked]][1:]
    by_batcher, parameters = list(zip(*answers, strict=True)), sum(p.numel() for p in batchers[0].model.parameters())
    rates = [_rate(own) for own in by_batcher]
    for count, own in enumerate(by_batcher[1:], 1):
        name = f"drafts_{parameters // 10**6}m_{domain}_{count}{end}"
        made = [a[2] for a in own if a[2] is not None]
        if not made or not rates[0]:
            why = "a round costs more than all its drafts could save" if rates[0] else "every answer ended at once"
            results.add(name, error=why)
            continue
        rounds = sum(m.rounds for m in made)
        results.add(
            name, domain=domain, drafts=count, temperature=temperature, prompts=len(prompts),
            parameters=parameters,
            plain_tokens_per_s=rates[0], drafted_tokens_per_s=rates[count], speed_up=rates[count] / rates[0],
            tokens_a_round=1 + sum(sum(m.accepted) for m in made) / rounds,
            accepted=(np.sum([m.accepted for m in made], axis=0) / rounds).round(4).tolist(), rounds=rounds,
        )  # fmt: skip


def _rate(answers: Sequence[Answer]) -> float:
    """Tokens a second over all answers; 0 where none has a second token."""
    tokens = sum(a[0] for a in answers)
    return tokens / sum(a[1] for a in answers) if tokens else 0.0


def _answered(batcher: Batcher, prompt: Sequence[int], sampling: Sampling) -> Answer:
    """Tokens behind the first ones, the seconds that they took, and how drafts fared, of one request alone."""
    batcher.submit(prompt, sampling)
    made = 0
    began: float | None = None
    acceptance: Acceptance | None = None
    while not batcher.idle:
        for event in batcher.step():
            if began is not None:
                made += len(event.tokens)
            elif event.tokens:
                began = time.perf_counter()
            acceptance = event.acceptance or acceptance
    return made, 0.0 if began is None else time.perf_counter() - began, acceptance


def _samples(root: str, model: Decoder) -> dict[str, str]:
    """Continuations by prompt."""
    from tokenizers import Tokenizer

    from moe.generate import generate_batch, token_ids

    tokenizer = Tokenizer.from_file(str(Path(root, TOKENIZER)))
    ids = [token_ids(tokenizer, prompt) for prompt in PROMPTS]
    sampled = generate_batch(model, ids, Sampling(temperature=0.8, top_p=0.95, max_tokens=48), tokenizer=tokenizer)
    return {prompt: answer.text for prompt, answer in zip(PROMPTS, sampled, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.drafts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", help="a pipeline's root")
    parser.add_argument("run", type=Path, help="a run folder of training, with MTP heads")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of drafts.jsonl, to which lines are added")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    drafts(args, Results("drafts", args.out))


if __name__ == "__main__":
    main()

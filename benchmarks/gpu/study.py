"""Models trained on a GPU over a root's shards: arms that differ in one thing, over seeds; and one longer run.

    python -m benchmarks.gpu.study ROOT --part arms [--seeds 3] [--steps 300] [--processes 4]
    python -m benchmarks.gpu.study ROOT --part run  [--steps 800] [--preset 1b]

ROOT is a pipeline's root (its mixtures `pretrain` and `held_out`, their token shards and tokenizer). Every arm sees the same
rows in the same order from the same seeds, at equal tokens. `dense` has the base's operations a token (all five layers 672
wide: 0.1% fewer) and no experts. Learning rates of the base, of AdamW and of `dense` are chosen on one half of the held-out
documents, on a seed of their own; every figure that is reported is of the other half. The other arms use the base's rate
untuned, which favours the base. Held-out bits per byte are compared by `mixtures.compare`: paired by document, runs as the
second source of noise; with the baseline trained again on another order as the A/A arm, which gives the least effect that this
study could have found. Lines are written as runs finish and the comparison after every seed, so a call that is cut off keeps
them.
The longer run trains one MTP head, then all three from where that one ended, and leaves FOLDER/one-head and FOLDER/three-heads,
with the root's tokenizer: what `benchmarks.gpu.drafts` and `benchmarks.gpu.serving` measure. Not compiled, as compiling took
80 s of each run.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.timing import Results
from core.errors import StageError
from core.hashing import seeded
from mixtures.compare import Losses, compare
from mixtures.reader import MixtureSource
from moe.config import OptimConfig, TrainConfig
from moe.presets import preset

BASE = "muon_s3f1_heads_gate"
CONTEXT, ROWS = 1024, 32
# What each arm changes. The rates of `TUNED` are looked for first.
ARMS: Mapping[str, dict[str, Any]] = {
    BASE: {},
    "aa": {"train": {"order_seed": 1000}},
    "adamw": {"optim": {"optimizer": "adamw"}},
    "dense": {"model": {"dense_layers": 5, "dense_dim": 672}},
    "full_attention": {"model": {"full_every": 1}},
    "no_gate": {"model": {"gate": False}},
    "s3f1_equal_heads": {"model": {"swa_heads": 4}},
}
TUNED = (BASE, "adamw", "dense")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of (3e-4, 1e-3, 3e-3) the best lay at the upper edge
RATES_SEED = 90
Run = dict[str, Any]
DEVICE = os.environ.get("STUDY_DEVICE", "cuda")  # cpu: to see that it runs
TOKENIZER = "models/tokenizer/tokenizer.json"  # below a root


def plan(source: MixtureSource, steps: int, seed: int, arm: Mapping[str, Any], lr: float) -> TrainConfig:
    """One run of an arm: the preset `30m` at a context of 1,024 and a window of 256."""
    shape = preset("30m", vocab_size=source.vocab_size, eos=source.eos)
    model = dataclasses.replace(shape, context=CONTEXT, window=256, **arm.get("model", {}))
    train = arm.get("train", {})
    order = {"order_seed": train["order_seed"] + seed} if "order_seed" in train else {}
    warmup = max(10, steps // 20)
    return TrainConfig(
        model=model, optim=OptimConfig(lr=lr, warmup_steps=warmup, **arm.get("optim", {})), steps=steps, rows=ROWS,
        seed=seed, shuffle=True, repeat=True, precision="bfloat16", device=DEVICE, deterministic=False,
        checkpoint_steps=steps, keep=1, **order,
    )  # fmt: skip


def trial(work: tuple[str, str, int, float, int, str]) -> Run:
    """Trains one run and measures it on the held-out documents, in a process of its own. One that diverges says so."""
    root, arm, seed, lr, steps, folder = work
    import moe
    from moe.evaluate import document_losses
    from moe.trainer import train

    source, held_out = MixtureSource(root, "pretrain"), MixtureSource(root, "held_out")
    place = Path(folder, f"{arm}-{seed}-{lr:g}")
    began = time.perf_counter()
    try:
        summary = train(plan(source, steps, seed, ARMS[arm], lr), source, place)
    except StageError as error:
        return {"arm": arm, "seed": seed, "lr": lr, "error": str(error)[:400]}
    seconds = time.perf_counter() - began
    losses = document_losses(moe.load(place).to(DEVICE), held_out)
    return {
        "arm": arm, "seed": seed, "lr": lr, "seconds": seconds, "loss": summary.loss, "bits": losses.bits,
        "bytes": losses.bytes, "domain": losses.domain, "parameters": summary.parameters,
        "active": summary.active_parameters, "tokens": summary.tokens,
    }  # fmt: skip


def arms(args: argparse.Namespace, results: Results) -> None:
    """The best rate of each of `TUNED` on one seed, then all arms over the seeds."""
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        tuned = [(args.root, arm, RATES_SEED, lr, args.steps, args.folder) for arm in TUNED for lr in RATES]
        best = _chosen(list(pool.imap_unordered(trial, tuned)), results)
        work = [
            (args.root, arm, seed, best.get(arm, best[BASE]), args.steps, args.folder)
            for seed in range(args.seeds)
            for arm in ARMS
        ]
        runs: list[Run] = []
        for run in pool.imap_unordered(trial, work):
            runs.append(run)
            shown = {k: v for k, v in run.items() if not isinstance(v, np.ndarray)}
            bpb = {} if "error" in run else {"bpb": _bpb(run, tuning=False)}
            results.add(f"run_{run['arm']}_{run['seed']}", **bpb, **shown)
            mine = {r["arm"] for r in runs if r["seed"] == run["seed"] and "error" not in r}
            if mine == set(ARMS):
                _compare(args, runs, results)


def _chosen(tried: Sequence[Run], results: Results) -> dict[str, float]:
    """The best rate of each of `TUNED` by the tuning half. With no run left of one there is nothing to compare."""
    best: dict[str, float] = {}
    for arm in TUNED:
        mine = sorted((r for r in tried if r["arm"] == arm), key=lambda r: r["lr"])
        bpb = {r["lr"]: _bpb(r, tuning=True) for r in mine if "error" not in r}
        if not bpb:
            raise StageError(f"study: every run of {arm} diverged, got rates {RATES}; give lower ones")
        best[arm] = min(bpb, key=lambda lr: bpb[lr])
        results.add(
            f"rates_{arm}", bpb={f"{lr:g}": round(v, 4) for lr, v in bpb.items()}, chosen=best[arm],
            diverged=[r["lr"] for r in mine if "error" in r], at_edge=best[arm] in (RATES[0], RATES[-1]),
        )  # fmt: skip
    return best


def _compare(args: argparse.Namespace, runs: Sequence[Run], results: Results) -> None:
    """All arms on the reporting half, over the seeds for which every arm has finished."""
    done = [r for r in runs if "error" not in r]
    seeds = [s for s in range(args.seeds) if {r["arm"] for r in done if r["seed"] == s} == set(ARMS)]
    found = {(r["arm"], r["seed"]): r for r in done}
    half = ~_tuning(len(done[0]["bits"]))
    bits = {arm: np.stack([found[arm, s]["bits"][half] for s in seeds]) for arm in ARMS}
    text_bytes, domain = done[0]["bytes"][half], done[0]["domain"][half]
    domains = MixtureSource(args.root, "held_out").domains
    by_domain = compare(Losses(bits, text_bytes, domain, domains, BASE, "aa"))
    whole = compare(Losses(bits, text_bytes, np.zeros_like(domain), ["all"], BASE, "aa"))
    for c in [*whole, *by_domain]:
        results.add(f"compare_{c.arm}_{c.domain}", seeds=len(seeds), **dataclasses.asdict(c))


def _tuning(docs: int) -> np.ndarray:
    """bool [docs]: the held-out documents on which rates are chosen, about half, by a hash of the index."""
    return np.array([seeded(0, str(i)) < 0.5 for i in range(docs)])


def _bpb(run: Run, *, tuning: bool) -> float:
    half = _tuning(len(run["bits"])) == tuning
    return float(run["bits"][half].sum() / run["bytes"][half].sum())


def long_run(args: argparse.Namespace, results: Results) -> None:
    """One shape with one MTP head, then with three; curves, experts, held-out figures."""
    import moe
    from moe.checkpoint import weights_digest
    from moe.evaluate import evaluate
    from moe.trainer import read_metrics, train

    source, held_out = MixtureSource(args.root, "pretrain"), MixtureSource(args.root, "held_out")
    shape = dataclasses.replace(
        preset(args.preset, vocab_size=source.vocab_size, eos=source.eos), context=CONTEXT, window=256, mtp_heads=1
    )
    common: dict[str, Any] = {
        "rows": ROWS, "shuffle": True, "repeat": True, "precision": "bfloat16", "device": DEVICE,
        "deterministic": False, "checkpoint_steps": args.steps, "keep": 1,
        "micro_rows": ROWS // 2,  # `1b` without compiled layers has to fit into 80 GB
        "tokenizer": str(Path(args.root, TOKENIZER)),
    }  # fmt: skip
    first, second = Path(args.folder, "one-head"), Path(args.folder, "three-heads")
    whole = train(TrainConfig(model=shape, optim=OptimConfig(lr=3e-3), steps=args.steps, **common), source, first)
    three = dataclasses.replace(shape, mtp_heads=3)
    tail = OptimConfig(lr=1e-3, warmup_steps=10, bias_rate=0.0)
    config = TrainConfig(model=three, optim=tail, steps=max(1, args.steps // 4), init=weights_digest(first), **common)
    train(config, source, second, start=first)
    for name, folder in (("one_head", first), ("three_heads", second)):
        rows = read_metrics(folder)
        steady = [r["tokens_per_s"] for r in rows[20:]] or [rows[-1]["tokens_per_s"]]
        curve = [(r["step"], round(r["loss"], 4)) for r in rows[:: max(1, len(rows) // 20)]]
        experts: dict[str, Any] = next((r["experts"] for r in reversed(rows) if "experts" in r), {})
        results.add(
            f"long_{args.preset}_{name}", preset=args.preset, steps=len(rows), tokens_per_s=statistics.median(steady),
            curve=curve, last=_last(rows[-1]), experts={k: v for k, v in experts.items() if k != "load"},
        )  # fmt: skip
    held = evaluate(moe.load(second).to(DEVICE), held_out)
    results.add(
        f"long_{args.preset}_held_out",
        preset=args.preset,
        parameters=whole.parameters,
        active=whole.active_parameters,
        domains=held,
    )


def _last(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "experts"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="a pipeline's root")
    parser.add_argument("--part", choices=("arms", "run"), required=True, help="see above")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm (default 3)")
    parser.add_argument("--steps", type=int, default=300, help="updates of a run (default 300)")
    parser.add_argument("--preset", default="150m", help="shape of the longer run (default 150m)")
    parser.add_argument("--processes", type=int, default=4, help="runs at once on the GPU")
    parser.add_argument("--folder", default="study", help="where runs keep their checkpoints")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of study_arms.jsonl or study_run.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    results = Results(f"study_{args.part}", args.out)
    print(json.dumps({"root": args.root, "steps": args.steps}))
    (arms if args.part == "arms" else long_run)(args, results)


if __name__ == "__main__":
    main()

"""The section on GPUs of docs/benchmarks.md, from kept result lines.

    python -m benchmarks.gpu.tables FOLDER ...

In: folders with the `.jsonl` files that the scripts beside this one wrote, in any depth; of lines with one name the latest with
figures counts, and a contender whose last call failed is named under its table. Out: the text between `<!-- gpu -->` and
`<!-- /gpu -->`, rewritten, so that no figure there is typed by hand.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.result import DOCS

Line = Mapping[str, Any]


def over_layers(pick: Callable[[list[float]], float], statistic: str, form: str) -> Callable[[Line], str]:
    """Shows one statistic of the experts (moe/balance.py), picked from the routed layers' numbers; null is none."""

    def show(experts: Line) -> str:
        values = [v for v in experts.get(statistic, []) if v is not None]
        return format(pick(values), form) if values else ""

    return show


PLAN: tuple[tuple[str, str, tuple[tuple[str, str, Callable[[Any], str]], ...]], ...] = (
    (
        "Training steps (`train_step`): tokens a second, model FLOPs over 989 TFLOP/s, peak memory",
        r"^(ours|hf)_(step|qwen)",
        (
            ("contender", "what", str),
            ("rows", "rows", str),
            ("ms", "ms", lambda v: f"{v:.1f}"),
            ("tokens/s", "tokens_per_s", lambda v: f"{v:,.0f}"),
            ("MFU", "mfu", lambda v: f"{v:.1%}"),
            ("GiB", "peak_gib", lambda v: f"{v:.1f}"),
            ("first step s", "first_step_s", lambda v: f"{v:.0f}"),
        ),
    ),
    (
        "One MoE layer, 32k tokens, width 1,024 (`layer`): forward and backward, called and as one graph",
        r"^moe_",
        (
            ("layer", "what", str),
            ("forward ms", "forward_ms", lambda v: f"{v:.2f}"),
            ("both ms", "ms", lambda v: f"{v:.2f}"),
            ("as a graph ms", "graph_ms", lambda v: f"{v:.2f}"),
            ("products alone ms", "products_ms", lambda v: f"{v:.2f}"),
            ("products as a graph ms", "products_graph_ms", lambda v: f"{v:.2f}"),
            ("held GiB", "held_gib", lambda v: f"{v:.2f}"),
        ),
    ),
    (
        "Attention kernels (`layer --part attention`), 8 rows of 4,096: 8 heads of 128 over the whole row, 12 over a window of "
        "512; deviation of the outputs from fp32",
        r"^attention_",
        (
            ("kernel", "what", str),
            ("forward ms", "forward_ms", lambda v: f"{v:.2f}"),
            ("both ms", "ms", lambda v: f"{v:.2f}"),
            ("TFLOP/s of both", "tflops", lambda v: f"{v:.0f}"),
            ("deviation", "deviation", lambda v: f"{v:.1e}"),
        ),
    ),
    (
        "Greedy decoding without drafts (`decode`), preset `1b` beside Qwen3-MoE; what each time covers stands in its row",
        r"^plain_",
        (
            ("contender", "what", str),
            ("time of", "covers", str),
            ("rows", "rows", str),
            ("ms a token", "ms", lambda v: f"{v:.3f}"),
            ("tokens/s", "tokens_per_s", lambda v: f"{v:,.0f}"),
        ),
    ),
    (
        "Drafts by MTP heads (`decode`): a plain step, a step that verifies K drafts and makes K anew, and their ratio by "
        "tokens a round",
        r"^rounds_",
        (
            ("heads", "what", str),
            ("plain ms", "plain_ms", lambda v: f"{v:.3f}"),
            ("round ms", "round_ms", lambda v: f"{v:.3f}"),
            ("ratio at 2 tokens a round", "speedup_at_2", lambda v: f"{v:.2f}"),
            ("at 3", "speedup_at_3", lambda v: f"{v:.2f}"),
            ("at 4", "speedup_at_4", lambda v: f"{v:.2f}"),
        ),
    ),
    (
        "The longer run (`study --part run`): 32 rows of 1,024 tokens an update; first one MTP head, then three from there",
        r"^long_.*_heads?$",
        (
            ("run", "what", str),
            ("preset", "preset", str),
            ("updates", "steps", str),
            ("tokens/s", "tokens_per_s", lambda v: f"{v:,.0f}"),
            ("first loss", "curve", lambda v: f"{v[0][1]:.3f}"),
            ("last loss", "last", lambda v: f"{v['loss']:.3f}"),
            (
                "last loss of each MTP head",
                "last",
                lambda v: ", ".join(f"{loss:.3f}" for loss in v.get("mtp_loss", [])),
            ),
            ("dead experts, worst layer", "experts", over_layers(max, "dead_fraction", ".1%")),
            ("load entropy, worst layer", "experts", over_layers(min, "load_entropy", ".3f")),
            ("RMS of the loudest expert over the median", "experts", over_layers(max, "rms_max_median", ".2f")),
            ("of the quietest", "experts", over_layers(min, "rms_min_median", ".2f")),
        ),
    ),
    (
        "Held-out bits per byte of the longer run (`study --part run`), with three MTP heads",
        r"^long_.*_held_out$",
        (
            ("preset", "preset", str),
            ("parameters", "parameters", lambda v: f"{v / 1e6:,.0f} M"),
            ("active", "active", lambda v: f"{v / 1e6:,.0f} M"),
            (
                "by domain (documents)",
                "domains",
                lambda v: ", ".join(f"{n}: {d['bpb']:.3f} ({d['docs']})" for n, d in v.items() if d["bpb"] is not None),
            ),
        ),
    ),
    (
        "Continuations of held-out documents with drafts (`drafts`) beside plain decoding in turn, greedy and sampled",
        r"^drafts_",
        (
            ("parameters", "parameters", lambda v: f"{v / 1e6:,.0f} M"),
            ("domain", "domain", str),
            ("temperature", "temperature", lambda v: f"{v:g}"),
            ("drafts a round", "drafts", str),
            ("plain tokens/s", "plain_tokens_per_s", lambda v: f"{v:,.0f}"),
            ("drafted tokens/s", "drafted_tokens_per_s", lambda v: f"{v:,.0f}"),
            ("speed-up", "speed_up", lambda v: f"{v:.2f}"),
            ("tokens a round", "tokens_a_round", lambda v: f"{v:.2f}"),
            ("each draft stood", "accepted", lambda v: ", ".join(f"{share:.0%}" for share in v)),
        ),
    ),
    (
        "The server under streams of OpenAI's client (`serving`), 32 slots, prompts of 100 tokens, up to 128 new ones at "
        "temperature 0.8; gaps are between parts of a stream",
        r"^serving_\d",
        (
            ("clients", "clients", str),
            ("drafts at most", "speculate", str),
            ("answers", "requests", str),
            ("tokens/s", "tokens_per_s", lambda v: f"{v:,.0f}"),
            ("first token ms", "first_ms", lambda v: f"{v:.0f}"),
            ("95%", "first_p95_ms", lambda v: f"{v:.0f}"),
            ("ms a token", "token_ms", lambda v: f"{v:.2f}"),
            ("gap ms", "gap_ms", lambda v: f"{v:.2f}"),
            ("95%", "gap_p95_ms", lambda v: f"{v:.2f}"),
            ("busiest client's core", "client_cpu_fraction", lambda v: f"{v:.0%}"),
        ),
    ),
    (
        "Two ranks beside one (`ranks`): preset `1b`, 8 rows a rank, Muon and all",
        r"^throughput",
        (
            ("ranks", "ranks", str),
            ("ms an update", "ms", lambda v: f"{v:.1f}"),
            ("tokens/s", "tokens_per_s", lambda v: f"{v:,.0f}"),
        ),
    ),
    (
        "Arms of `study`, three seeds: held-out bits per byte of the half that chose nothing; effects below zero are "
        "better",
        r"^compare_.*_all$",
        (
            ("arm", "arm", str),
            ("base", "baseline_bpb", lambda v: f"{v:.4f}"),
            ("arm's", "arm_bpb", lambda v: f"{v:.4f}"),
            ("effect", "effect", lambda v: f"{v:+.4f}"),
            ("from", "low", lambda v: f"{v:+.4f}"),
            ("to", "high", lambda v: f"{v:+.4f}"),
            ("least effect to be found", "least_effect", lambda v: f"{v:.4f}"),
            ("verdict", "verdict", str),
        ),
    ),
    (
        "Learning rates on one seed (`study`), bits per byte of the held-out half on which they are chosen",
        r"^rates_",
        (
            ("optimiser", "what", str),
            ("by rate", "bpb", lambda v: ", ".join(f"{rate}: {bpb:.3f}" for rate, bpb in v.items())),
            ("best", "chosen", str),
        ),
    ),
)


def lines(folders: Iterable[Path]) -> tuple[dict[str, Line], dict[str, Line]]:
    """By name: the latest line that has figures, and the latest that failed where none with figures is as late."""
    found: dict[str, Line] = {}
    failed: dict[str, Line] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*.jsonl"))):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            kept = failed if "error" in line else found
            name = f"{line.get('what')}_{line['ranks']}" if "ranks" in line else line.get("what")
            if name is not None and line["date"] >= kept.get(name, line)["date"]:
                kept[name] = line
    return found, {n: line for n, line in failed.items() if n not in found or line["date"] > found[n]["date"]}


def section(found: Mapping[str, Line], failed: Mapping[str, Line]) -> str:
    """Markdown of every table that has rows, where each was measured, and what failed."""
    out: list[str] = []
    for title, names, columns in PLAN:
        rows = [found[name] for name in sorted(found, key=_order) if re.search(names, name)]
        wrong = [f"`{n}` ({failed[n]['error'].splitlines()[0][:80]})" for n in sorted(failed) if re.search(names, n)]
        if not rows and not wrong:
            continue
        places = [f"{place}, {' and '.join(dates)}" for place, dates in _places(rows).items()]
        out += [f"{title}. {'; '.join(places)}." if rows else f"{title}.", ""]
        if rows:
            out += [f"| {' | '.join(c[0] for c in columns)} |", "| --- " * len(columns) + "|"]
        out += [f"| {' | '.join(show(r[key]) if key in r else '' for _, key, show in columns)} |" for r in rows]
        out += [*([""] if rows else []), f"Failed at the last call: {'; '.join(wrong)}."] if wrong else []
        out.append("")
    return "\n".join(out)


def _places(rows: Iterable[Line]) -> dict[str, list[str]]:
    """Days by machine and versions."""
    found: dict[str, set[str]] = {}
    for r in rows:
        found.setdefault(f"{r['gpu']}, torch {r['torch']}, Triton {r['triton']}", set()).add(r["date"][:10])
    return {place: sorted(found[place]) for place in sorted(found)}


def _order(name: str) -> list[tuple[str, int]]:
    """By letters, and by number where a name has one: serving_8 before serving_32."""
    return [(letters, int(number or 0)) for letters, number in re.findall(r"(\D*)(\d*)", name)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="with .jsonl files, in any depth")
    folders = parser.parse_args().folders
    text, new = DOCS.read_text(), section(*lines(folders))
    if not new:
        parser.error(f"no line of a known name below {', '.join(map(str, folders))}; the page is left as it is")
    DOCS.write_text(re.sub(r"(<!-- gpu -->\n).*?(<!-- /gpu -->)", lambda m: f"{m[1]}\n{new}\n{m[2]}", text, flags=re.S))


if __name__ == "__main__":
    main()

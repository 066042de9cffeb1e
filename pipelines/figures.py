"""The figures of README.md, written from a root's manifests so that none is typed by hand.

In: a pipeline all of whose steps are committed. Out: Markdown by name; in a page a block stands between `<!-- figures: NAME -->`
and `<!-- /figures: NAME -->`. Reads manifests, one layer's reasons, and what the commands print; changes nothing in the root.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError
from core.storage import Root
from pipelines.ablation.config import AA
from pipelines.ablation.result import read_result
from pipelines.ablation.trials import result_name
from pipelines.config import Pipeline
from pipelines.docs import REPO, table
from pipelines.plan import plan
from pipelines.report.accounts import Facts, gather, levels, tokens
from pipelines.report.contamination import canaries

BAR = 30  # characters of the funnel's longest bar
REASONS = 3  # reasons named beside a step of the funnel


def figures(pipeline: Pipeline, root: Root) -> dict[str, str]:
    """The README's blocks by name, from what is committed in a root. ConfigError where a step is not up to date."""
    facts = gather(pipeline, root)
    waiting = [p.step.name for p in plan(pipeline, root) if p.run]
    if waiting:
        raise ConfigError(
            f"docs: {', '.join(waiting)} not up to date in {root.url}; run the whole pipeline, then try again"
        )
    return {
        "demo": "\n".join([_occasion(facts), "", *_funnel(facts), "", *_results(facts)]),
        "stages": "\n".join(_speeds(facts)),
        "cli": "\n".join(_commands(facts)),
    }


def _occasion(facts: Facts) -> str:
    """When and on what: the machine's cores only where this is the machine."""
    first = facts.done[0].manifest.observed
    cores = f", {os.cpu_count()} cores" if first["host"] == socket.gethostname() else ""
    return (
        f"Measured {first['began'][:10]}: engine {first['engine']}, {facts.pipeline.engine.workers} workers{cores}, "
        f"Python {first['python']}."
    )


def _funnel(facts: Facts) -> Iterator[str]:
    """The way of the documents as text: a bar, a count, and what fell for which reasons."""
    found = levels(facts)
    yield "```text"
    for level in found:
        bar = "#" * round(BAR * level.total / max(found[0].total, 1))
        yield f"{level.name:<10}{level.total:>9,}  {bar:<{BAR}}  {_lost(level.lost)}".rstrip()
    yield "```"


def _lost(reasons: Mapping[str, int]) -> str:
    """The commonest reasons with their counts, and the sum of the others."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{reason} {n:,}" for reason, n in ordered[:REASONS]]
    if rest := ordered[REASONS:]:
        parts.append(f"{len(rest)} others {sum(n for _, n in rest):,}")
    return f"-{sum(reasons.values()):,}: {', '.join(parts)}" if parts else ""


def _results(facts: Facts) -> Iterator[str]:
    """Tokens, mixtures and the model, one line each, as far as the pipeline makes them."""
    if made := tokens(facts):
        by = ", ".join(f"{name} {n:,}" for name, n in made["tokens"].items())
        yield f"- {sum(made['tokens'].values()):,} tokens in shards ({by})."
    mix, train, evaluate = facts.of("mix"), facts.of("train"), facts.of("evaluate")
    if mix:
        a = mix.manifest.accounts
        by = ", ".join(f"`{p}` {a[f'{p}_tokens']:,} in {a[f'{p}_docs']:,} documents" for p in mix.config.phases)
        yield f"- Tokens by phase, repeats counted: {by}."
    yield from _judged(facts)
    if train:
        o = train.manifest.observed
        yield (
            f"- A mixture-of-experts model of {o['parameters']:,} parameters ({o['active_parameters']:,} active a token), "
            f"{o['steps']:,} updates, {o['tokens']:,} tokens, {o['tokens_per_s']:,.0f} tokens/s."
        )
    if evaluate:
        bits = evaluate.manifest.observed["bits_per_byte"]
        docs = evaluate.manifest.accounts["held_out_docs"]
        by = ", ".join(f"{name} {value:.2f}" for name, value in bits.items() if value is not None)
        yield f"- Bits per byte on {docs} held-out documents: {by}."
    yield from _compared(facts)


def _judged(facts: Facts) -> Iterator[str]:
    """What the stages between extraction and tokens found, one line each, as far as the pipeline has them."""
    if done := facts.of("decontaminate"):
        a, planted = done.manifest.accounts, canaries(facts, done.instance)
        by = ", ".join(f"{kind} {caught} of {docs}" for kind, (caught, docs) in planted.items())
        yield f"- {a['hit_docs']:,} documents hold benchmark items or repeat held-out text; planted canaries found: {by}."
    if done := facts.of("rebalance"):
        a, o = done.manifest.accounts, done.manifest.observed
        yield (
            f"- {a['clustered']:,} documents in {o['clusters']:,} clusters, {a['within_quota']:,} within the quotas; "
            f"Gini {o['gini']:.2f} before, {o['kept_gini']:.2f} after."
        )
    made = {
        s.stage: m for name, s in facts.pipeline.sources.items() if s.kind == "made" and (m := facts.documents(name))
    }
    if made:
        by = ", ".join(f"`{s}` {m.accounts['documents']:,} of {m.accounts['records']:,}" for s, m in made.items())
        yield f"- Documents of the next generation, of the records they were tried from: {by}."
    exports = {stage: done.manifest.accounts for stage in ("sft", "rl") if (done := facts.of(stage))}
    if exports:
        by = ", ".join(f"`{s}` {a['records']:,} of {a['considered']:,}" for s, a in exports.items())
        yield f"- Records for post-training, of the conversations considered: {by}."


def _compared(facts: Facts) -> Iterator[str]:
    """What each ablation of the root found, a line an arm."""
    for name in sorted(facts.root.names("ablations")):
        if not facts.root.exists(result_name(name)):
            continue
        result = read_result(facts.root, name)
        for arm in dict.fromkeys(c["arm"] for c in result["comparisons"]):
            rows = [c for c in result["comparisons"] if c["arm"] == arm]
            by = ", ".join(
                f"{c['domain']} {c['effect']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}] {c['verdict']}" for c in rows
            )
            label = "A/A" if arm == AA else f"`{arm}`"
            yield f"- Ablation `{name}`, {label} against the baseline, bits per byte and 95% interval: {by}."


def _speeds(facts: Facts) -> Iterator[str]:
    """One row for each pass over the data: its datasets summed, and stages that shared the pass together. Of passes that bring
    no stage that is not in a row above, as a second `minhash`, none is shown."""
    passes: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    for done in facts.done:
        observed = done.manifest.observed
        group = observed.get("fused", [done.instance])
        stages = {instance.partition("@")[0] for instance in group}
        name = " + ".join(group)
        if group[0] == done.instance and (name in passes or stages - seen):
            passes.setdefault(name, []).append(observed)
            seen |= stages
    columns = ("stage", "documents", "MB", "seconds", "docs/s", "MB/s", "peak memory of a process, MB")
    yield from table(columns, (_speed(name, runs) for name, runs in passes.items()), numbers=6)


def _speed(name: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    seconds = sum(o["seconds"] for o in runs)
    docs, mb = sum(o.get("docs", 0) for o in runs), sum(o.get("bytes", 0) for o in runs) / 1e6
    memory = max(o.get("peak_memory_bytes", 0) for o in runs) / 1e6
    cells = [docs, mb, seconds, docs / max(seconds, 1e-9), mb / max(seconds, 1e-9), memory]
    return [name, *(_number(n) if n else "" for n in cells)]


def _number(n: float) -> str:
    return f"{n:,.{0 if n >= 100 or n == int(n) else 1 if n >= 10 else 2}f}"


def _commands(facts: Facts) -> Iterator[str]:
    """What the commands that only look print about this root, cut where the shown command cuts it."""
    fallen = _a_fallen_document(facts)
    yield "```text"
    for arguments, shown, keep in (
        (["plan"], "plan -c demo/pipeline.yaml | tail -n 2", lambda lines: lines[-2:]),
        (
            ["status"],
            "status -c demo/pipeline.yaml | grep tokenize",
            lambda lines: [x for x in lines if "tokenize" in x],
        ),
        (["check"], "check -c demo/pipeline.yaml", lambda lines: lines),
        (
            ["explain", fallen],
            f"explain {fallen[:8]} -c demo/pipeline.yaml | grep -E '^url|FALLS|fate:'",
            lambda lines: [x for x in lines if re.search("^url|FALLS|fate:", x)],
        ),
    ):
        command = [sys.executable, "-m", "pipelines", *arguments, "-c", str(facts.pipeline.path)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO).stdout
        yield f"$ pipelines {shown}"
        yield from keep(out.splitlines())
    yield "```"


def _a_fallen_document(facts: Facts) -> str:
    """The first document that fell to a rule, else the first of all."""
    for dataset in facts.datasets:
        for shard in dataset.shards:
            reasons = dataset.read_layer(str(facts.fate), shard, ["reason"]).column("reason")
            rows = pc.indices_nonzero(
                pc.is_in(reasons, value_set=pa.array(sorted(facts.rules), pa.large_string()))
            ).to_pylist()
            if rows:
                ids = facts.root.read_table(dataset.documents_name(shard), ["doc_id"]).column("doc_id")
                return str(ids[rows[0]].as_py())
    raise ConfigError(f"docs: no document fell to a rule in {facts.root.url}; use a root whose policy has rules")


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """`page` with each block between its marks. Raises ConfigError for a block that has none."""
    for name, text in blocks.items():
        begin, end = f"<!-- figures: {name} -->\n", f"<!-- /figures: {name} -->"
        before, opened, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ConfigError(f"docs: no block for {name!r}, expected lines `{begin.strip()}` and `{end}`; add them")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page

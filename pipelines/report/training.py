"""Sections on what was made of the documents: mixtures as asked and as they are, the model's curve and what it says."""

import math
from typing import Any

import numpy as np

from pipelines.report import svg
from pipelines.report.accounts import Facts
from pipelines.report.markup import Html, count, div, figure, join, paragraph, percent, section, short, span, table, tag
from pipelines.report.samples import metrics

SMOOTH_FRACTION = 0.04  # of the updates, the span of the drawn mean


def mixtures(facts: Facts) -> Html:
    """For each phase: shares asked beside shares got, epochs, what is missing."""
    done = facts.of("mix")
    phases = []
    written = done.manifest.outputs if done else {}
    asked = [phase for phase in (done.config.phases if done else ()) if phase in written]
    for phase in [*asked, *sorted(written.keys() - asked)]:
        name = f"mixtures/{phase}/report.json"
        if facts.root.exists(name):
            phases.append(_phase(facts, facts.root.read_json(name)))
    return section("mixtures", "Mixtures", *phases) if phases else Html("")


def _phase(facts: Facts, report: dict[str, Any]) -> Html:
    rows, made = report.get("components", []), sum(c.get("actual_tokens", 0) for c in report.get("components", []))
    asked = report.get("requested_tokens")
    said = f"{count(report.get('actual_tokens', made))} tokens" + (f" of {count(asked)} asked for" if asked else "")
    head = ["component", "asked", "got", "tokens", "short of", "epochs", "most", "available", "documents used"]
    body = [
        [
            join([c["name"], " ", span("soft", c.get("where") or "")]),
            percent(c["requested_fraction"], 1) if "requested_fraction" in c else "",
            percent(c.get("actual_tokens", 0), made),
            count(c.get("actual_tokens", 0)),
            count(c["shortfall_tokens"]) if c.get("shortfall_tokens") else "",
            figure(c["epochs"]) if "epochs" in c else "",
            figure(c["max_epochs"]) if "max_epochs" in c else "",
            count(c["available_tokens"]) if "available_tokens" in c else "",
            f"{count(c.get('used_docs'))} of {count(c.get('available_docs'))}",
        ]
        for c in rows
    ]
    used = [i for i in range(len(head)) if i == 0 or any(row[i] for row in body)]
    head, body = [head[i] for i in used], [[row[i] for i in used] for row in body]
    bars = svg.bars([bar for i, c in enumerate(rows) for bar in _share_bars(facts, i, c, made)], 760)
    return join([tag("h3", None, report.get("phase", "phase"), " ", span("soft", said)), bars, table(head, body)])


def _share_bars(facts: Facts, i: int, c: dict[str, Any], made: int) -> list[Any]:
    """Two bars of a component: asked, got."""
    kind = svg.colour(facts.names.index(c["dataset"]) if c.get("dataset") in facts.names else i)
    got = c.get("actual_tokens", 0) / made if made else 0.0
    note = f"got {percent(got, 1)}"
    if "requested_fraction" not in c:
        return [(c["name"], [(kind, got, note)], note)]
    asked = f"asked {percent(c['requested_fraction'], 1)}"
    return [(c["name"], [("asked", c["requested_fraction"], asked)], asked), ("", [(kind, got, note)], note)]


def evaluation(facts: Facts) -> dict[str, Any]:
    """`evaluation.json` of the trained model, or nothing."""
    done = facts.of("evaluate")
    name = done.manifest.outputs["evaluation"]["file"] if done else ""
    found: dict[str, Any] = facts.root.read_json(name) if name and facts.root.exists(name) else {}
    return found


def bits_per_byte(evaluated: dict[str, Any]) -> float | None:
    """Over all held-out bytes."""
    parts = [d for d in evaluated.get("held_out", {}).values() if d["bytes"] and math.isfinite(d["bpb"])]
    total = sum(d["bytes"] for d in parts)
    return sum(d["bpb"] * d["bytes"] for d in parts) / total if total else None


def model(facts: Facts, evaluated: dict[str, Any]) -> Html:
    """Loss curve, held-out bits per byte by source, continuations."""
    done = facts.of("train")
    if done is None:
        return Html("")
    m = done.manifest
    rows = metrics(facts, m.outputs["weights"]["folder"])
    o = m.observed
    said = [
        f"{short(m.accounts['parameters'])} parameters"
        + (f", {short(o['active_parameters'])} of them active" if o.get("active_parameters") else ""),
        f"{count(m.accounts['steps'])} updates",
        f"{short(m.accounts['train_tokens'])} tokens",
        f"{short(o['tokens_per_s'])} tokens/s" if o.get("tokens_per_s") else "",
        f"last loss {figure(rows[-1]['loss'], 3)} nats" if rows else "",
    ]
    parts: list[str] = [paragraph(", ".join(s for s in said if s))]
    if rows:
        parts += _curves(facts, rows)
    parts += _held_out(facts, evaluated)
    samples = evaluated.get("samples", [])
    if samples:
        parts.append(tag("h3", None, "Continuations"))
        parts.append(div("cards", *(_continuation(s) for s in samples)))
    return section("model", "Model", *parts)


def _curves(facts: Facts, rows: list[dict[str, Any]]) -> list[str]:
    """Loss over tokens, its running mean, and the loss of each source."""
    x = np.array([r["tokens"] for r in rows], float)
    loss = np.array([r["loss"] for r in rows], float)
    domains = sorted({name for r in rows for name in r.get("domain_loss", {})})
    curves = [svg.Curve("raw", "loss of an update", x, loss), svg.Curve("mean", "running mean", x, smooth(loss))]
    by_domain = []
    kinds = _kinds(facts, domains)
    for name in domains:
        y = np.array([r.get("domain_loss", {}).get(name, np.nan) for r in rows], float)
        by_domain.append(svg.Curve(kinds[name], name, x, smooth(y)))
    left = [tag("h3", None, "Loss"), svg.legend([(c.kind, c.name) for c in curves])]
    right = [tag("h3", None, "Loss by source, running mean"), svg.legend([(c.kind, c.name) for c in by_domain])]
    first = div("column", *left, svg.lines(curves, "tokens", "nats a token", 545, 260))
    second = div("column", *right, svg.lines(by_domain, "tokens", "nats a token", 545, 260)) if len(domains) > 1 else ""
    return [div("columns", first, second)]


def _kinds(facts: Facts, domains: list[str]) -> dict[str, str]:
    """A colour for each domain: the datasets' own where all domains are datasets."""
    names = facts.names if set(domains) <= set(facts.names) else domains
    return {name: svg.colour(names.index(name)) for name in domains}


def smooth(y: np.ndarray) -> np.ndarray:
    """Mean of each value and those before it, over a span of SMOOTH_FRACTION of all; NaN where the span holds none."""
    span_steps = max(1, round(len(y) * SMOOTH_FRACTION))
    sums = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(y), y, 0.0))])
    known = np.concatenate([[0], np.cumsum(np.isfinite(y))])
    start = np.maximum(np.arange(len(y)) + 1 - span_steps, 0)
    end = np.arange(len(y)) + 1
    held = known[end] - known[start]
    return np.where(held > 0, (sums[end] - sums[start]) / np.maximum(held, 1), np.nan)


def _held_out(facts: Facts, evaluated: dict[str, Any]) -> list[str]:
    held = evaluated.get("held_out", {})
    if not held:
        return []
    rows = []
    kinds = _kinds(facts, sorted(held))
    for name, d in sorted(held.items()):
        value = d["bpb"] if math.isfinite(d["bpb"]) else 0.0
        note = f"{figure(d['bpb'], 3)}, {count(d['docs'])} docs"
        rows.append((name, [(kinds[name], value, f"{count(d['tokens'])} tokens, {count(d['bytes'])} bytes")], note))
    return [tag("h3", None, "Held-out bits per byte, by source"), svg.bars(rows, 640)]


def _continuation(sample: dict[str, Any]) -> Html:
    prompt, text = sample["prompt"], sample["continuation"]
    rest = text[len(prompt) :] if text.startswith(prompt) else text
    return tag("article", {"class": "doc"}, tag("p", {"dir": "auto"}, tag("b", None, prompt), rest))

"""Sections on what was made of the documents: mixtures as asked and as they are, the model's curves and what it says."""

import math
from typing import Any

import numpy as np

from pipelines.report import svg
from pipelines.report.accounts import Done, Facts
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
    """What `evaluate` found of the trained model, or nothing."""
    done = facts.of("evaluate")
    name = done.manifest.outputs["evaluation"]["file"] if done else ""
    found: dict[str, Any] = facts.root.read_json(name) if name and facts.root.exists(name) else {}
    return found


def bits_per_byte(evaluated: dict[str, Any]) -> float | None:
    """Over all held-out bytes."""
    parts = [d for d in evaluated.get("held_out", {}).values() if d["bytes"] and _known(d["bpb"])]
    total = sum(d["bytes"] for d in parts)
    return sum(d["bpb"] * d["bytes"] for d in parts) / total if total else None


def model(facts: Facts, evaluated: dict[str, Any]) -> Html:
    """The course of each run, held-out bits per byte by source, continuations."""
    runs = [d for d in facts.done if d.step.entry.stage.name == "train"]
    if not runs:
        return Html("")
    parts: list[str] = []
    for done in runs:
        parts += [*([tag("h3", None, done.instance)] if len(runs) > 1 else []), *_run(facts, done)]
    parts += _held_out(facts, evaluated)
    samples = evaluated.get("samples", [])
    if samples:
        parts.append(tag("h3", None, "Continuations"))
        parts.append(div("cards", *(_continuation(s) for s in samples)))
    return section("model", "Model", *parts)


def _run(facts: Facts, done: Done) -> list[str]:
    """What one run was, and its curves."""
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
    return [*parts, *_curves(facts, rows), *_course(rows), *_experts(rows), *_alarms(rows)] if rows else parts


def _curves(facts: Facts, rows: list[dict[str, Any]]) -> list[str]:
    """Loss over tokens, its running mean, and the loss of each source."""
    x = np.array([r["tokens"] for r in rows], float)
    loss = np.array([r["loss"] for r in rows], float)
    domains = sorted({name for r in rows for name in r.get("domain_loss", {})})
    curves = [svg.Curve("raw", "loss of an update", x, loss), svg.Curve("mean", "running mean", x, smooth(loss))]
    curves += [
        svg.Curve(svg.colour(h + 1), f"token {h + 2} ahead, running mean", x, smooth(y))
        for h, y in enumerate(_by_entry(rows, "mtp_loss"))
    ]
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


def _course(rows: list[dict[str, Any]]) -> list[str]:
    """Speed and gradient over the run."""
    x = np.array([r["tokens"] for r in rows], float)
    speed = np.array([r.get("tokens_per_s", np.nan) for r in rows], float)
    norm = np.array([r.get("grad_norm", np.nan) for r in rows], float)
    charts = [
        _chart("Tokens a second", [svg.Curve("mean", "tokens/s, running mean", x, smooth(speed))], "tokens/s"),
        _chart(
            "Gradient norm before clipping",
            [svg.Curve("raw", "of an update", x, norm), svg.Curve("mean", "running mean", x, smooth(norm))],
            "norm",
        ),
    ]
    return [div("columns", *drawn)] if (drawn := [c for c in charts if c]) else []


def _experts(rows: list[dict[str, Any]]) -> list[str]:
    """How even the routed layers' loads are, how far their weakest and strongest experts lie apart, and the last loads."""
    x = np.array([r["tokens"] for r in rows], float)
    read = [r for r in rows if r.get("experts")]
    at = np.array([r["tokens"] for r in read], float)
    found = [r["experts"] for r in read]
    charts = [
        _chart(
            "Load violation by routed layer", _layers(x, _by_entry(rows, "load_violation")), "greatest load / mean - 1"
        ),
        _chart(
            "Weakest expert by routed layer", _layers(at, _by_entry(found, "rms_min_median")), "RMS, least / median"
        ),
        _chart(
            "Strongest expert by routed layer", _layers(at, _by_entry(found, "rms_max_median")), "RMS, most / median"
        ),
        _chart("Router confidence by routed layer", _layers(at, _by_entry(found, "confidence")), "mass of the chosen"),
    ]
    loads = found[-1].get("load", []) if found else []
    strips = [
        div("", span("soft", f"layer {i} "), svg.strip([_load(e, share) for e, share in enumerate(layer)], 1.0, 480))
        for i, layer in enumerate(loads)
    ]
    last = div("column", tag("h3", None, "Load of each expert at the last reading"), *strips) if strips else ""
    drawn = [c for c in (*charts, last) if c]
    return [div("columns", *drawn[i : i + 2]) for i in range(0, len(drawn), 2)]


def _load(expert: int, share: float) -> tuple[str, float, str]:
    return svg.colour(expert), share, f"expert {expert}: {percent(share, 1)}"


def _alarms(rows: list[dict[str, Any]]) -> list[str]:
    """Each alarm's span of updates, and what was found when it was last raised."""
    held: dict[str, list[tuple[int, str]]] = {}
    for row in rows:
        for alarm in row.get("alarms", []):
            held.setdefault(alarm["name"], []).append((row["step"], alarm["found"]))
    if not held:
        return []
    head = ["alarm", "last found", "updates", "first at", "last at"]
    body = [
        [name, seen[-1][1], count(len(seen)), count(seen[0][0]), count(seen[-1][0])]
        for name, seen in sorted(held.items())
    ]
    return [tag("h3", None, "Alarms"), table(head, body, 2)]


def _chart(title: str, curves: list[svg.Curve], y_name: str) -> Html:
    """A titled chart with its legend, or nothing where nothing was measured."""
    drawn = svg.lines(curves, "tokens", y_name, 545, 220)
    legend = svg.legend([(c.kind, c.name) for c in curves]) if len(curves) > 1 else ""
    return div("column", tag("h3", None, title), legend, drawn) if drawn else Html("")


def _layers(x: np.ndarray, values: list[np.ndarray]) -> list[svg.Curve]:
    return [svg.Curve(svg.colour(i), f"layer {i}", x, y) for i, y in enumerate(values)]


def _by_entry(rows: list[dict[str, Any]], name: str) -> list[np.ndarray]:
    """The lists of a field, by entry: one array over the rows each; NaN where a row has none."""
    size = max((len(r.get(name, [])) for r in rows), default=0)
    filled = [[*r.get(name, []), *[np.nan] * (size - len(r.get(name, [])))] for r in rows]
    return list(np.array(filled, float).T) if size else []


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
        value = d["bpb"] if _known(d["bpb"]) else 0.0
        note = f"{figure(d['bpb'], 3)}, {count(d['docs'])} docs"
        rows.append((name, [(kinds[name], value, f"{count(d['tokens'])} tokens, {count(d['bytes'])} bytes")], note))
    return [tag("h3", None, "Held-out bits per byte, by source"), svg.bars(rows, 640)]


def _known(bpb: float | None) -> bool:
    """Of documents without text it is null, and was NaN in older files."""
    return bpb is not None and math.isfinite(bpb)


def _continuation(sample: dict[str, Any]) -> Html:
    prompt, text = sample["prompt"], sample["continuation"]
    rest = text[len(prompt) :] if text.startswith(prompt) else text
    return tag("article", {"class": "doc"}, tag("p", {"dir": "auto"}, tag("b", None, prompt), rest))

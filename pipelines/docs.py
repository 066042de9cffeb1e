"""The documentation that code can write: `docs/stages.md` from the stages themselves.

    python -m pipelines.docs                    write docs/stages.md
    python -m pipelines.docs --figures CONFIG   fill the blocks of README.md from that config's root (pipelines/figures.py)

In: `Stage` objects and the pydantic models of their knobs. Out: Markdown that depends on the code alone, neither on time nor on
the machine, so that a test can compare the page with it.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:  # `--help` loads none of these
    import pyarrow as pa
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from core.stage import Stage
    from pipelines.stages import Line

REPO = Path(__file__).resolve().parents[1]
STAGES_PAGE = REPO / "docs" / "stages.md"
README = REPO / "README.md"

INTRODUCTION = """\
# Stages

Written by `python -m pipelines.docs` from the code; a test fails when it is out of date. What a config file looks like stands in
[config.md](config.md), what the files look like in [format.md](format.md).

Every stage takes the knobs of the first table below; a stage's own table repeats one only where its default differs. *Execution*
knobs say how to run, never enter a stage's identity, and may change without anything being computed again; where one names an
input or a model, its content enters instead. A stage's identity is its version, its other knobs, the content of everything it
reads, and the versions of the libraries listed with it."""
BOUNDS = {
    "ge": "≥ {}",
    "gt": "> {}",
    "le": "≤ {}",
    "lt": "< {}",
    "min_length": "at least {}",
    "pattern": "matches `{}`",
}


# Tables of knobs


def fields_table(model: "type[BaseModel]", besides: "type[BaseModel] | None" = None) -> Iterator[str]:
    """One row a field; a tag, and what `besides` has with the same default, are left out."""
    inherited = besides.model_fields if besides else {}
    fields = {
        name: f
        for name, f in model.model_fields.items()
        if not (is_tag(f) or (name in inherited and f.default == inherited[name].default))
    }
    if fields:
        yield from table(
            ("knob", "type", "default", "execution", "what it does"),
            (
                [f"`{n}`", _type(f), _default(f), "yes" if _execution(f) else "", described(f)]
                for n, f in fields.items()
            ),
        )


def described(f: "FieldInfo") -> str:
    """What a field is for: its description, or for a part of its own the first sentence of that part. Empty: nobody said."""
    if f.description or not (parts := models_in(f.annotation)):
        return (f.description or "").replace("|", "\\|")
    return f"{_about(parts[0]).partition('. ')[0].rstrip('.')}. See [{parts[0].__name__}](#{parts[0].__name__.lower()})"


def is_tag(f: "FieldInfo") -> bool:
    """Whether a field can hold one value only: the `kind` that tells sources apart."""
    return get_origin(f.annotation) is Literal and len(get_args(f.annotation)) == 1


def models_in(annotation: Any) -> "list[type[BaseModel]]":
    """Models inside an annotation, such as `Phase` in `dict[str, Phase]`."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in models_in(part)]


def parts_of(models: "Iterable[type[BaseModel]]") -> "list[type[BaseModel]]":
    """Models that stand inside others, at any depth, each once and in order."""
    found: dict[Any, None] = {}
    for model in models:
        for f in model.model_fields.values():
            inner = models_in(f.annotation)
            found.update(dict.fromkeys([*inner, *parts_of(inner)]))
    return list(found)


def _type(f: "FieldInfo") -> str:
    bounds = [
        text.format(getattr(m, name))
        for m in f.metadata
        for name, text in BOUNDS.items()
        if getattr(m, name, None) is not None
    ]
    is_path = any(getattr(getattr(m, "func", None), "__name__", "") == "_beside_config" for m in f.metadata)
    return ", ".join(["path or URL" if is_path else _type_name(f.annotation), *bounds]).replace("|", "\\|")


def _type_name(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:  # the only annotated type in configs is ConfigPath
        return "path or URL"
    if origin is Literal:
        return " or ".join(f"`{v}`" for v in inside)
    if origin in (Union, UnionType):
        return " or ".join([*(_type_name(a) for a in inside if a is not NoneType), "null"])
    if origin is tuple:
        return f"list of {_type_name(inside[0])}"
    if origin is dict:
        return "mapping" if inside[1] is Any else f"mapping to {_type_name(inside[1])}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


def _default(f: "FieldInfo") -> str:
    if f.is_required():
        return "required"
    value = f.get_default(call_default_factory=True)
    if models_in(type(value)):
        return "its defaults"
    if isinstance(value, tuple) and len(value) > 4:
        return f"{', '.join(f'`{v}`' for v in value[:2])} and {len(value) - 2} more"
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


def _execution(f: "FieldInfo") -> bool:
    return bool(isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get("execution"))


# docs/stages.md


def documented() -> "list[type[BaseModel]]":
    """Every model whose fields stand on the page."""
    from classifiers.rules import PRESETS
    from core.stage import StageConfig
    from pipelines.config import EngineConfig, Rule

    outer: list[type[BaseModel]] = [
        StageConfig,
        *_configs(),
        *_sources(),
        EngineConfig,
        Rule,
        *(thresholds for thresholds, _ in PRESETS.values()),
    ]
    return [*outer, *parts_of(outer)]


def _configs() -> "list[type[BaseModel]]":
    from pipelines.stages import STAGES, load

    return [load(line.name).config for line in STAGES]


def _sources() -> "list[type[BaseModel]]":
    from crawl.sources import Source

    return list(get_args(get_args(Source)[0]))


def stages_page() -> str:
    """The whole of docs/stages.md."""
    from classifiers.rules import PRESETS
    from core.stage import StageConfig
    from pipelines.config import EngineConfig, Rule
    from pipelines.stages import STAGES, load

    lines = [INTRODUCTION, "", *fields_table(StageConfig), ""]
    lines += table(("stage", "kind", "version", "what it does"), (_overview(x, load(x.name)) for x in STAGES))
    for line in STAGES:
        lines += ["", f"## {line.name}", "", *_stage(line, load(line.name))]
    lines += [
        "",
        "## Sources",
        "",
        "Each entry of `sources` has a `kind`; relative paths are meant from the config file's folder.",
    ]
    for model in _sources():
        lines += ["", f"### {model.model_fields['kind'].default}", "", _about(model), "", *fields_table(model)]
    lines += ["", "## Parts", "", "Mappings that stand inside the ones above."]
    for model in parts_of([*_configs(), *_sources()]):
        lines += ["", f"### {model.__name__}", "", _about(model), "", *fields_table(model)]
    lines += ["", "## Engine", "", _about(EngineConfig), "", *fields_table(EngineConfig)]
    lines += ["", "## Policy rules", "", _about(Rule), "", *fields_table(Rule)]
    for name, (thresholds, _) in PRESETS.items():
        lines += ["", f"### {name}", "", _about(thresholds), "", *fields_table(thresholds), "", *_preset_rules(name)]
    return "\n".join(lines) + "\n"


def _overview(line: "Line", stage: "Stage") -> list[str]:
    return [f"[{line.name}](#{line.name})", line.kind.value, str(stage.version), line.about]


def _stage(line: "Line", stage: "Stage") -> Iterator[str]:
    from core.stage import Kind, StageConfig

    yield f"{line.about[0].upper()}{line.about[1:]}. Kind {line.kind.value}, version {stage.version}."
    reads = [f"`{r}`" for r in stage.columns(_with_defaults(stage.config))]
    if stage.kind is Kind.DECIDE:
        reads.append("every column that a rule of its policy names")
    if reads:
        yield f"\nReads {', '.join(reads)}{'; its knobs may change that' if callable(stage.reads) else ''}."
    libraries = ", ".join(f"`{name}`" for name in stage.libraries)
    yield f"\nLibraries in the identity: {libraries or 'none'}."
    for what, schema in _written(stage):
        yield f"\nWrites {what}:\n"
        yield from table(("column", "type"), ([f"`{f.name}`", f"`{f.type}`"] for f in schema))
    yield f"\n{_about(stage.config)}"
    rows = list(fields_table(stage.config, StageConfig))
    if rows:
        yield ""
        yield from rows


def _written(stage: "Stage") -> "Iterator[tuple[str, pa.Schema]]":
    """What a stage writes for each dataset, with its columns."""
    from core.schema import DOCUMENTS, FATE
    from core.stage import Kind

    if stage.kind is Kind.INGEST:
        yield "the documents", DOCUMENTS
    if stage.kind is Kind.DECIDE:
        from mixtures.select import SURVIVORS

        yield "the layer `fate@LABEL`", FATE
        yield "and, with `duplicates`, the layer `duplicates@LABEL`", SURVIVORS
    if stage.layer is not None:
        yield f"the layer `{stage.name}`, after `computed` and `error`", stage.layer


def _with_defaults(model: "type[BaseModel]") -> "BaseModel":
    """A config of defaults only; required texts and mappings are empty."""
    fields = model.model_fields.items()
    required: dict[str, Any] = {n: get_origin(f.annotation) or f.annotation for n, f in fields if f.is_required()}
    return model.model_construct(**{name: empty() for name, empty in required.items()})


def _preset_rules(name: str) -> Iterator[str]:
    from classifiers.rules import preset

    yield "Rules in order, with these thresholds (as the float32 values that signals are compared with):\n"
    yield from table(("reason", "dropped where"), ([f"`{r.reason}`", f"`{r.when}`"] for r in preset(name)))


def _about(model: type) -> str:
    return " ".join((model.__doc__ or "").split())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> Iterator[str]:
    """A Markdown table; its last `numbers` columns are set to the right."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * (len(columns) - numbers)}{'---:|' * numbers}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Write docs/stages.md, or with --figures the README's blocks."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", type=Path, metavar="CONFIG", help="fill README.md from this config's root")
    chosen = parser.parse_args(argv).figures
    if chosen is None:
        STAGES_PAGE.write_text(stages_page(), "utf-8")
        return
    from core.errors import StepwellError
    from core.storage import Root
    from pipelines.config import load_pipeline
    from pipelines.figures import figures, fill

    try:
        pipeline = load_pipeline(chosen)
        README.write_text(fill(README.read_text("utf-8"), figures(pipeline, Root(pipeline.root))), "utf-8")
    except StepwellError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

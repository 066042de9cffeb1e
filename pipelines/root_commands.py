"""The commands of `pipelines` that look at a root, at files or at answers, and `forget`, which takes documents back.

What they import is imported when they run.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import Config, load, root_of, takedowns


def status(config: Config) -> None:
    """Show what is committed: documents, accounts, speed and memory by stage. Reads manifests only.

    Example: `pipelines status -c configs/demo.yaml`
    """
    from pipelines.inspect import status_lines

    pipeline = load(config, None, None)
    for line in status_lines(pipeline, root_of(pipeline)):
        typer.echo(line)


def check(
    config: Config,
    content: Annotated[
        bool, typer.Option("--content", help="read documents and layers, compare hashes (slow)")
    ] = False,
) -> None:
    """Check the config, the accounts of every stage, and that each shard of documents and layers is there.

    Relations, token shards, mixtures and models are not looked at; their manifests are.

    Example: `pipelines check -c configs/demo.yaml --content`
    """
    from core.errors import StageError
    from pipelines.inspect import check_root

    pipeline = load(config, None, None)
    problems, said = check_root(pipeline, root_of(pipeline), content)
    if problems:
        raise StageError("\n".join(problems))
    typer.echo(said)


def explain(
    doc_id: Annotated[str, typer.Argument(help="32 hex digits, or a unique beginning")], config: Config
) -> None:
    """Show one document's every score, rule, duplicate and the reason for its fate. Looks for the id in every shard.

    Example: `pipelines explain 5909fb24 -c configs/demo.yaml`
    """
    from pipelines.inspect import explain_lines

    pipeline = load(config, None, None)
    for line in explain_lines(pipeline, root_of(pipeline), doc_id):
        typer.echo(line)


def report(
    config: Config,
    out: Annotated[Path | None, typer.Option(help="where to write; default: report.html in the root")] = None,
) -> None:
    """Write one self-contained HTML page about everything in the root, with samples of its texts.

    Example: `pipelines report -c configs/demo.yaml --out report.html`
    """
    from pipelines.report import write_report

    pipeline = load(config, None, None)
    typer.echo(f"report: {write_report(pipeline, root_of(pipeline), out)}")


def extract(paths: Annotated[list[Path], typer.Argument(help="HTML, PDF, ePub, text or WARC files")]) -> None:
    """Print what each file would become, as JSON lines. Needs no config; writes and fetches nothing.

    Example: `pipelines extract page.html book.epub crawl.warc.gz`
    """
    from pipelines.inspect import extract_lines

    for line in extract_lines(paths):
        typer.echo(line)


def verify(
    file: Annotated[Path, typer.Argument(help="JSONL: records of the stage `rl`, each with `response` or `responses`")],
) -> None:
    """Score responses to RL records: maths by value, code by its tests in a sandbox, one after the other.

    A line that cannot be judged gets an `error` in the place of rewards; where none can be, the exit code is 1.

    Example: `pipelines verify sampled.jsonl > rewards.jsonl`
    """
    import json

    from core.errors import InputError
    from mixtures.posttrain.verify import verify_lines, walls

    for warning in walls():
        typer.echo(f"warning: {warning}", err=True)
    lines = judged = 0
    for found in verify_lines(file):
        lines, judged = lines + 1, judged + ("error" not in found)
        typer.echo(json.dumps(found, ensure_ascii=False))
    if not judged:
        raise InputError(
            f"verify: nothing to judge, got {lines} lines in {file}, expected records of `rl` with responses"
        )
    if judged < lines:
        typer.echo(f"warning: {lines - judged} of {lines} lines could not be judged; their `error` says why", err=True)


def forget(
    config: Config,
    doc_id: Annotated[list[str] | None, typer.Option(help="32 hex digits; may be repeated")] = None,
    url: Annotated[list[str] | None, typer.Option(help="as it stands in the documents; may be repeated")] = None,
    host: Annotated[list[str] | None, typer.Option(help="such as example.org; may be repeated")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be affected")] = False,
) -> None:
    """Withdraw documents: every fate drops them from now on. Prints the shards and mixtures that hold them today.

    Example: `pipelines forget -c configs/demo.yaml --host example.org --dry-run`
    """
    from pipelines.inspect import forget_lines

    wanted = takedowns(doc_id or (), url or (), host or ())
    pipeline = load(config, None, None)
    for line in forget_lines(pipeline, root_of(pipeline), wanted, dry_run):
        typer.echo(line)

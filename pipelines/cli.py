"""The `pipelines` command. Every command imports what it needs when it runs, so that `--help` is instant.

Exit codes: 0 done, 1 a run failed, 2 usage or config, 143 stopped by SIGTERM, 130 by Ctrl-C. A traceback only with `--debug`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import model_commands, root_commands
from pipelines.options import MOST_GROUPS, Config, known_dataset, load, new_run_id, root_of, shard_range, with_engine

app = typer.Typer(
    name="pipelines",
    help="From seed URLs, WARCs, PDFs and repositories to token shards, mixtures and a small model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
run_app = typer.Typer(help="Run one stage or the whole pipeline.", no_args_is_help=True)
app.add_typer(run_app, name="run")

Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@app.callback()
def _main(debug: Debug = False) -> None:
    if debug:
        os.environ["STEPWELL_DEBUG"] = "1"


@run_app.command("all")
def run_all(
    config: Config,
    engine: Annotated[str | None, typer.Option(help="local, ray or spark; default: the config's")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="worker processes; 0: one per core")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="begin at this stage")] = None,
    until: Annotated[str | None, typer.Option("--until", help="end with this stage")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would run, and run nothing")] = False,
    run_id: Annotated[str | None, typer.Option(help="name of this run; the same name re-enters its locks")] = None,
) -> None:
    """Run every stage that is not up to date. `plan` says before which those are.

    The network is used by `crawl`, by a `harvest` of an API and by `answers`, which may cost money: `python -m
    pipelines.estimate` says how much. Most time goes into `train`. `--until` ends before a stage that is not wanted.

    Example: `pipelines run all -c configs/demo.yaml --until mix`
    """
    from pipelines.plan import plan
    from pipelines.scope import between

    pipeline = load(config, engine, workers)
    chosen = between(pipeline, from_, until)
    if dry_run:
        _print_plan(plan(pipeline, root_of(pipeline), chosen))
        return
    _run(pipeline, chosen, run_id, None, None)


@run_app.command("stage")
def run_stage(
    name: Annotated[str, typer.Argument(help="a stage of the config, such as `language` or `select@final`")],
    config: Config,
    engine: Annotated[str | None, typer.Option(help="local, ray or spark; default: the config's")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="worker processes; 0: one per core")] = None,
    dataset: Annotated[str | None, typer.Option(help="only this dataset")] = None,
    shards: Annotated[str | None, typer.Option(help="A:B, only these shards (annotate stages)")] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="collect what `--shards` committed, compute the rest (annotate stages)")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="remove what it wrote and run it anew, up to date or not")
    ] = False,
    up_to_date_code: Annotated[
        int, typer.Option(min=0, max=255, help="exit code where nothing had to run, such as a scheduler's for a skip")
    ] = 0,
    run_id: Annotated[str | None, typer.Option(help="name of this run; the same name re-enters its locks")] = None,
) -> None:
    """Run one stage if it is not up to date. It costs what it costs in `run all`; `--force` pays again.

    Example: `pipelines run stage signals -c configs/demo.yaml --dataset web`
    """
    from pipelines.scope import steps
    from pipelines.shard_groups import check_options, ran

    pipeline = load(config, engine, workers)
    entry = pipeline.entry(name)
    check_options(entry, shard_range(shards), finish, force)
    chosen = [s for s in steps(pipeline) if s.entry is entry]
    run_id = run_id or new_run_id()
    planned = _run(pipeline, chosen, run_id, dataset, shard_range(shards), force)
    if not ran(root_of(pipeline), planned, run_id):
        raise typer.Exit(up_to_date_code)


@run_app.command("ablation")
def run_ablation(
    config: Annotated[Path, typer.Option("--config", "-c", help="the ablation's YAML file", show_default=False)],
    engine: Annotated[str | None, typer.Option(help="local, ray or spark; default: the base's")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="trials side by side; 0: one per core")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would run and for how long; run nothing")
    ] = False,
    run_id: Annotated[str | None, typer.Option(help="name of this run; the same name re-enters its locks")] = None,
) -> None:
    """Train small models on mixtures that differ in one thing, and say what the difference is worth.

    Takes one training for each arm and seed; `--dry-run` says how many tokens and how long.

    Example: `pipelines run ablation -c configs/ablations/reference.yaml --dry-run`
    """
    from dataclasses import replace

    from pipelines.ablation.config import load_ablation
    from pipelines.ablation.design import derived
    from pipelines.ablation.result import print_result, read_result
    from pipelines.ablation.run import dry_run as rehearse
    from pipelines.ablation.run import write_page
    from pipelines.scope import steps

    ablation = load_ablation(config)
    ablation = replace(ablation, base=with_engine(ablation.base, engine, workers))
    pipeline, root = derived(ablation), root_of(ablation.base)
    if dry_run:
        for line in rehearse(ablation, root):
            typer.echo(line)
        return
    _run(pipeline, steps(pipeline), run_id, None, None)
    print_result(read_result(root, ablation.name))
    typer.echo(f"page: {write_page(root, ablation.name)}")


@app.command()
def stages() -> None:
    """List all stages in order, with what they do.

    Example: `pipelines stages`
    """
    from pipelines.stages import STAGES

    for line in STAGES:
        typer.echo(f"{line.name:<14}{line.kind.value:<10}{line.about}")


@app.command()
def plan(
    config: Config,
    json: Annotated[bool, typer.Option("--json", help="machine-readable, for schedulers")] = False,
) -> None:
    """Say what would run, what is skipped, and why. Runs nothing; reads manifests, and of input files names and sizes.

    Example: `pipelines plan -c configs/demo.yaml`
    """
    from pipelines.plan import plan as make_plan

    pipeline = load(config, None, None)
    planned = make_plan(pipeline, root_of(pipeline))
    if json:
        import json as json_module

        from pipelines.plan import plan_json

        typer.echo(json_module.dumps(plan_json(pipeline, planned), indent=1))
    else:
        _print_plan(planned)


@app.command("shards")
def show_shards(
    name: Annotated[str, typer.Argument(help="an annotate stage of the config, such as `language`")],
    config: Config,
    dataset: Annotated[str, typer.Option(help="the dataset whose shards it works on", show_default=False)],
    groups: Annotated[int, typer.Option(min=1, max=MOST_GROUPS, help="at most so many parts")] = MOST_GROUPS,
) -> None:
    """Print the parts into which a step may be cut, as a JSON list for `--shards`; an empty one if it is up to date.

    Example: `pipelines shards language -c configs/demo.yaml --dataset web --groups 8`
    """
    import json

    from pipelines.shard_groups import parts_to_run

    pipeline = load(config, None, None)
    known_dataset(pipeline, dataset)
    typer.echo(json.dumps(parts_to_run(pipeline, root_of(pipeline), name, dataset, groups)))


for command in (
    root_commands.status,
    root_commands.check,
    root_commands.explain,
    root_commands.report,
    root_commands.extract,
    model_commands.generate,
    model_commands.serve,
    model_commands.rlvr,
    root_commands.verify,
    root_commands.forget,
):
    app.command()(command)


def _run(
    pipeline: Any,
    chosen: Any,
    run_id: str | None,
    dataset: str | None,
    shards: tuple[int, int] | None,
    force: bool = False,
) -> Any:
    """What was planned for each step, once all have run."""
    from core import stopping
    from core.progress import terminal
    from pipelines.runner import Runner, RunOptions

    if dataset is not None:
        known_dataset(pipeline, dataset)
    options = RunOptions(run_id or new_run_id(), dataset, shards, force)
    runner = Runner(pipeline, options, terminal(), typer.echo)
    with stopping.listening():
        try:
            return runner.run(chosen)
        except KeyboardInterrupt as e:  # said here: typer turns it into a silent exit before `main` would see it
            raise _stopped(runner.position(), str(e)) from None
        except Exception as e:
            if not stopping.asked():
                raise
            raise _stopped(runner.position(), str(e).partition("\n")[0]) from None  # its processes got the signal too


def _stopped(position: str, units: str) -> typer.Exit:
    """The way out of a run that was asked to stop, once a line has said how far it was."""
    from core import stopping

    number = stopping.asked() or signal.SIGINT
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    more = f" ({units})" if units else ""
    typer.echo(f"stopped by {by}: {position}{more}; the same command goes on from there", err=True)
    return typer.Exit(128 + number)


def _print_plan(planned: Any) -> None:
    for p in planned:
        typer.echo(f"{'run ' if p.run else 'skip'}  {p.step.name:<28}{'; '.join(p.why) if p.run else 'up to date'}")


def main() -> None:
    """Entry point: errors of ours as one line each, others with their traceback."""
    from core.errors import ConfigError, StepwellError

    try:
        app()
    except StepwellError as e:
        if os.environ.get("STEPWELL_DEBUG"):
            raise
        for line in str(e).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2 if isinstance(e, ConfigError) else 1)


if __name__ == "__main__":
    main()

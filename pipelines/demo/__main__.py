"""The demo: corpus, servers, every stage, an ablation, report.

    python -m pipelines.demo --folder demo

In: packages by pip, npm and apt-get on the first run, nothing from outside afterwards. Out, under the folder: `corpus/`,
`chats/`, `seeds-*.txt`, `resolver.json` (host -> address), `pipeline.yaml` (the template configs/demo.yaml, which reads
DEMO_FOLDER from the environment) and the root that the pipeline writes. A second run does the same and every stage finds its
work done: the port is no part of any stage's identity.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from core.errors import ConfigError, StepwellError
from pipelines.demo import releases
from pipelines.demo.chats import write_chats
from pipelines.demo.corpus import MOVED_HOST, build, summary
from pipelines.demo.model_server import ENDPOINT, model_file, serve_model
from pipelines.demo.server import serve

TEMPLATE = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
ABLATION = TEMPLATE.parent / "ablations" / "reference.yaml"  # on top of the template, which reads DEMO_FOLDER too
LAST_WITHOUT_TRAINING = "rl"
SOURCES = ("web", "reference", "code")


def template_text(path: Path = TEMPLATE) -> str:
    """The pipeline file's template. ConfigError where it is not: a package installed without its clone."""
    if not path.exists():
        raise ConfigError(f"demo: no template, got {path}; run from a clone of the repository")
    return path.read_text(encoding="utf-8")


def prepare(folder: Path, resolver: dict[str, str], template: str) -> Path:
    """Write what the pipeline reads and return the pipeline file. A file whose content stands is not touched."""
    seeds: dict[str, list[str]] = {source: [] for source in SOURCES}
    for host in sorted(resolver):
        mine = seeds[source_of(host)]
        mine.append(f"http://{host}/")
        if (folder / "corpus" / "hosts" / host / "contents.html").exists():
            mine.append(f"http://{host}/contents.html")
    pipeline = folder / "pipeline.yaml"
    for source, urls in seeds.items():
        releases.write_text(folder / f"seeds-{source}.txt", "\n".join(urls) + "\n")
    releases.write_text(folder / "resolver.json", json.dumps(resolver, indent=1, sort_keys=True) + "\n")
    releases.write_text(pipeline, template)
    return pipeline


def source_of(host: str) -> str:
    """The pipeline's source that crawls a host: program source, encyclopedias and declarations, or the rest of the web."""
    if host.startswith("source."):
        return "code"
    return "reference" if host.endswith((".encyclopedia.example", ".rights.example")) else "web"


def commands(folder: Path, pipeline: Path, train: bool) -> list[list[str]]:
    """What a person would type for the same run, in order: the pipeline, an ablation on top of it, the report."""
    until = [] if train else ["--until", LAST_WITHOUT_TRAINING]
    ablation = [["run", "ablation", "-c", str(ABLATION)]] if train else []
    report = ["report", "-c", str(pipeline), "--out", str(folder / "report.html")]
    return [["run", "all", "-c", str(pipeline), *until], *ablation, report]


@contextmanager
def language_model() -> Iterator[str]:
    """The base URL of a small model on loopback; empty, after a word of why, where its packages are not there."""
    try:
        model_file()
    except ConfigError as error:
        print(f"{error}; nothing will be augmented")
        yield ""
        return
    with serve_model() as url:
        yield url


def demo(folder: Path, large: bool, train: bool) -> int:
    """The whole demo; the exit status of its first command that failed."""
    template = template_text()  # before the first download
    folder = folder.resolve()
    manifest = build(folder / "corpus", large, print)
    print(summary(manifest))
    chats = write_chats(folder / "corpus" / "unpacked", folder / "chats")
    print(f"demo: conversations made of documentation: {', '.join(f'{n} {name}' for name, n in chats.items())}")
    releases.build(folder / "releases", print)
    with serve(folder / "corpus" / "hosts") as (port, resolver), language_model() as endpoint:
        print(f"demo: {len(resolver)} hosts, {MOVED_HOST} among them, on 127.0.0.1:{port}")
        pipeline = prepare(folder, resolver, template)
        environment = os.environ | {"DEMO_FOLDER": str(folder), ENDPOINT: endpoint}
        for command in commands(folder, pipeline, train):
            done = subprocess.run([sys.executable, "-m", "pipelines", *command], env=environment, check=False)
            if done.returncode:
                return done.returncode
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="default: demo")
    parser.add_argument("--large", action="store_true", help="the 200 MB set")
    parser.add_argument("--no-train", dest="train", action="store_false", help="stop before training")
    given = parser.parse_args(arguments)
    try:
        return demo(given.folder, given.large, given.train)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except StepwellError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Pairs of releases for the demo's harvest.

    python -m pipelines.demo.releases --folder demo/releases

In: source archives of two versions of six small Python packages, from pip. None is made from a repository of SWE-bench.
Out, under the folder:

    unpacked/<package key>/    both versions
    releases.json              what a harvest's `release_list` reads; paths are relative to it
    manifest.json              what was absent and why, and each package's licence

A pair of which a version cannot be had is named in the manifest and left out. Cost: 2.1 MB and 50 s of one core, most of
it the build backends that pip asks for metadata.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crawl.harvest.licences import named
from pipelines.demo.download import fetch, license_of
from pipelines.demo.sites import Package


class Pair(NamedTuple):
    """Two versions of one package, older first."""

    base: Package
    head: Package


def _pair(name: str, base: tuple[str, int], head: tuple[str, int]) -> Pair:
    return Pair(Package("pip", name, *base), Package("pip", name, *head))


# (version, bytes) of patch releases whose archives carry a changelog, measured on 2026-11-22. Of 15 pairs tried, 5 were
# larger than 15 files or 1,000 lines, 4 had no entry in their archive.
PAIRS = (
    _pair("cachetools", ("5.3.2", 26_510), ("5.3.3", 26_522)),
    _pair("h11", ("0.13.0", 100_165), ("0.14.0", 100_418)),
    _pair("httpcore", ("1.0.4", 83_096), ("1.0.5", 83_234)),
    _pair("itsdangerous", ("2.1.1", 56_217), ("2.1.2", 56_143)),
    _pair("markupsafe", ("2.1.4", 19_288), ("2.1.5", 19_384)),
    _pair("werkzeug", ("3.0.5", 804_673), ("3.0.6", 805_170)),
)


def build(folder: Path, say: Callable[[str], None], pairs: Sequence[Pair] = PAIRS) -> dict[str, Any]:
    """Fetch what `folder` lacks and write the list. Returns the manifest. Files whose content stands are not touched."""
    folder = folder.resolve()  # the clients run in folders of their own
    absent = fetch([package for pair in pairs for package in pair], folder, say)
    for key, why in absent.items():
        say(f"demo: goes on without {key}: {why}")
    here = [pair for pair in pairs if not absent.keys() & {pair.base.key, pair.head.key}]
    licenses = {pair.head.name: license_of(pair.head, folder / "unpacked" / pair.head.key) for pair in here}
    rows = [
        {
            "name": pair.head.name,
            "base": f"unpacked/{pair.base.key}",
            "head": f"unpacked/{pair.head.key}",
            "version": pair.head.version,
            "license": named(licenses[pair.head.name]),
        }
        for pair in here
    ]
    manifest = {"absent": absent, "licenses": licenses, "pairs": len(rows)}
    for name, value in (("releases.json", rows), ("manifest.json", manifest)):
        write_text(folder / name, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return manifest


def write_text(path: Path, text: str) -> None:
    """Write a file whole; one whose content stands is not touched."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo.releases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("demo/releases"), help="default: demo/releases")
    manifest = build(parser.parse_args(arguments).folder, print)
    print(f"demo: {manifest['pairs']} of {len(PAIRS)} release pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())

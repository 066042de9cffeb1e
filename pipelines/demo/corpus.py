"""Builds the demo's hosts.

    python -m pipelines.demo.corpus --folder demo/corpus

In: packages from pip, apt and npm (`sites`, `download`). Out, under the folder:

    hosts/<host name>/...     pages, books and texts as a web server would have them; index.html, robots.txt
    hosts/<host>/.answers.json    path -> {"status", "location"} for answers that are no file
    manifest.json             identity of what was asked for; pages and bytes per host and kind; what was absent and why
    licenses.json             host -> licence, from each package's metadata

The manifest is written last: its presence, with the same identity, means that nothing is left to do, offline too.
Modification times come from the archives, so Last-Modified is the date on which a text was really changed.
Cost: about a minute on two cores for the default set once downloaded, most of it docutils.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from core.hashing import digest
from pipelines.demo import render
from pipelines.demo.canaries import canaries
from pipelines.demo.download import fetch, license_of, read_text
from pipelines.demo.sites import Package, Site, chosen

VERSION = 2  # moves when the same packages give other pages
MOVED_HOST = "moved.example"
NAVIGATION_LINKS = 12  # pages before and after in the site's order, chosen, untested
# Indexes and search pages of a manual are lists of words; `_static`, `_templates` and the like are not pages.
SKIPPED = re.compile(r"/(?:genindex|search|py-modindex)\.html$|/_[^_/]")


def build(folder: Path, large: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the corpus in `folder` unless it is there. Returns the manifest, which names what could not be had.

    What apt and npm lack is settled by the first run; what pip should have brought is tried again by the next one.
    """
    folder = folder.resolve()  # the clients run in folders of their own
    packages, sites = chosen(large)
    identity = identity_of(packages, sites)
    path = folder / "manifest.json"
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = before.get("identity") == identity
    if same and not any(key.startswith("pip-") for key in before["absent"]):
        return before
    absent = fetch(packages, folder, say)
    for key, why in absent.items():
        say(f"demo: goes on without {key}: {why}")
    if same and absent.keys() == before["absent"].keys():
        return before
    path.unlink(missing_ok=True)
    manifest = {"identity": identity, "absent": absent} | lay_out(packages, sites, folder / "unpacked", folder)
    _write(path, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    return manifest


def identity_of(packages: Sequence[Package], sites: Sequence[Site]) -> str:
    """Hash of what is asked for. Two corpora with the same one may differ by what their machines' registries lacked."""
    return digest({"version": VERSION, "packages": [p.key for p in packages], "sites": [repr(s) for s in sites]})


def lay_out(packages: Sequence[Package], sites: Sequence[Site], unpacked: Path, folder: Path) -> dict[str, Any]:
    """Write `hosts/` and `licenses.json` from unpacked packages, and count what was written.

    A site whose package is absent, or whose globs find nothing, is left out.
    """
    building = folder / "hosts.building"
    shutil.rmtree(building, ignore_errors=True)
    by_key = {p.key: p for p in packages}
    present = [s for s in sites if (unpacked / s.package / s.folder).is_dir()]
    licenses = {s.host: license_of(by_key[s.package], unpacked / s.package) for s in present}
    jobs = [(s, unpacked / s.package / s.folder, building / s.host, licenses[s.host]) for s in present]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        # The largest sites first, so that the last worker does not sit on one alone.
        counts = dict(pool.map(_one_site, sorted(jobs, key=lambda j: -_weight(j[0], j[1]))))
    hosts = {host: found for host, found in sorted(counts.items()) if found}
    if hosts:
        write_moved(building / MOVED_HOST, sorted(hosts)[0])
    shutil.rmtree(folder / "hosts", ignore_errors=True)
    building.mkdir(exist_ok=True)
    building.rename(folder / "hosts")
    licenses = {host: licenses[host] for host in hosts} | ({MOVED_HOST: "CC0-1.0"} if hosts else {})
    _write(folder / "licenses.json", json.dumps(licenses, indent=1, sort_keys=True).encode())
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for found in hosts.values():
        for suffix, (files, size) in found.items():
            kinds[suffix].update(files=files, bytes=size)
    return {"hosts": hosts, "kinds": {k: dict(v) for k, v in sorted(kinds.items())}}


def _weight(site: Site, source: Path) -> int:
    return sum(path.stat().st_size for path in sources(site, source))


def sources(site: Site, folder: Path) -> list[Path]:
    """The files of a site, by name, links and empty files left out."""
    found = {path for glob in site.globs for path in folder.glob(glob)}
    names = {p.relative_to(folder).as_posix(): p for p in found if p.is_file() and not p.is_symlink()}
    return [p for name, p in sorted(names.items()) if p.stat().st_size and not SKIPPED.search(f"/{name}")]


def _one_site(job: tuple[Site, Path, Path, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """Write one host. Returns (host, suffix -> (files, bytes))."""
    site, source, target, license = job
    pages = list(_pages(site, source, license))
    if not pages:
        return site.host, {}
    for name, data, changed_s in pages:
        _write(target / name, data, changed_s)
    found: dict[str, list[int]] = defaultdict(list)
    for name, data, _ in pages:
        found[PurePosixPath(name).suffix.lstrip(".")].append(len(data))
    newest = max(changed_s for _, _, changed_s in pages)
    if not (target / "index.html").exists():
        _write(target / "index.html", index_page(site, [name for name, _, _ in pages], license).encode(), newest)
    else:
        # The package's own index may not name its books and texts; one more page does.
        _write(target / "contents.html", index_page(site, [name for name, _, _ in pages], license).encode(), newest)
    _write(target / "robots.txt", robots_text(site).encode(), newest)
    return site.host, {suffix: (len(sizes), sum(sizes)) for suffix, sizes in sorted(found.items())}


def _pages(site: Site, source: Path, license: str) -> Iterator[tuple[str, bytes, float]]:
    """(path on the host, bytes, modification time) of every page."""
    files = sources(site, source)
    if site.make == "copy":
        for path in files[: site.most]:
            name = path.relative_to(source).as_posix()
            data = path.read_bytes()
            if name.endswith(".gz"):
                name, data = name[: -len(".gz")], gzip.decompress(data)
            yield name, data, path.stat().st_mtime
    elif site.make in render.RENDERERS:
        yield from _rendered(site, source, files[: site.most], license)
    else:
        for path in files:
            yield from _records(site, path, license)


def _rendered(site: Site, source: Path, files: Sequence[Path], license: str) -> Iterator[tuple[str, bytes, float]]:
    names = [path.relative_to(source).with_suffix(".html").as_posix() for path in files]
    for i, path in enumerate(files):
        title, article = render.RENDERERS[site.make](read_text(path))
        frame = render.Frame(site.host, site.language, _neighbours(names, i), license)
        name = path.relative_to(source).as_posix()
        yield names[i], render.page(frame, title or name, article).encode(), path.stat().st_mtime


def _records(site: Site, path: Path, license: str) -> Iterator[tuple[str, bytes, float]]:
    """Pages made of records: an encyclopedia's longest articles, solved exercises, or canaries made of them."""
    text = read_text(path)
    if site.make == "encyclopedia":
        articles = encyclopedia(text, site.most)
    else:
        articles = exercises(text) if site.make == "exercises" else canaries(text)
    names = [f"{folder}/{i:04d}.html" for i, (folder, _, _) in enumerate(articles)]
    for i, (_, title, article) in enumerate(articles):
        frame = render.Frame(site.host, site.language, _neighbours(names, i), license)
        yield names[i], render.page(frame, title, article).encode(), path.stat().st_mtime


def encyclopedia(text: str, most: int | None) -> list[tuple[str, str, str]]:
    """(folder, title, article HTML) of the `most` longest summaries; equal lengths by title."""
    records = sorted(json.loads(text).values(), key=lambda r: (-len(r["extract"]), r["title"]))
    return [
        (
            "articles",
            r["title"],
            render.from_record(r["title"], [r.get("description") or "", *r["extract"].split("\n")]),
        )
        for r in records[:most]
    ]


def exercises(text: str) -> list[tuple[str, str, str]]:
    """(folder, title, article HTML) of each task: what is asked and its solution, as an answer site shows them."""
    found = []
    for line in text.splitlines():
        task = json.loads(line)
        title = f"How do I write {task['entry_point']}?"
        asked, answer = (
            render.from_code(task["prompt"])[1],
            render.from_code(task["prompt"] + task["canonical_solution"])[1],
        )
        found.append(("questions", title, f"<h1>{title}</h1>\n<h2>Question</h2>\n{asked}\n<h2>Answer</h2>\n{answer}"))
    return found


def _neighbours(names: Sequence[str], i: int) -> list[tuple[str, str]]:
    start = max(0, i - NAVIGATION_LINKS // 2)
    near = names[start : start + NAVIGATION_LINKS + 1]
    return [("/", "Contents"), *((f"/{name}", _label(name)) for name in near if name != names[i])]


def _label(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix().replace("-", " ").replace("_", " ").replace("/", ", ")


def index_page(site: Site, names: Sequence[str], license: str) -> str:
    """The page that links to everything of a site."""
    items = "\n".join(f'<li><a href="/{name}">{_label(name)}</a></li>' for name in names)
    frame = render.Frame(site.host, site.language, [("/", "Contents")], license)
    return render.page(frame, f"Contents of {site.host}", f"<h1>Contents of {site.host}</h1>\n<ul>\n{items}\n</ul>")


def robots_text(site: Site) -> str:
    """robots.txt as RFC 9309 has it; Crawl-delay is the common extension."""
    lines = ["User-agent: *", *(f"Disallow: {path}" for path in site.disallow)]
    if not site.disallow:
        lines.append("Disallow:")
    if site.crawl_delay_s is not None:
        lines.append(f"Crawl-delay: {site.crawl_delay_s}")
    return "\n".join(lines) + "\n"


def write_moved(target: Path, goal: str) -> None:
    """A host whose links fail in the usual ways: moved, moved in a circle, gone, missing, forbidden."""
    answers = {
        "/moved.html": {"status": 301, "location": f"http://{goal}/"},
        "/found.html": {"status": 302, "location": "/moved.html"},
        "/circle.html": {"status": 302, "location": "/circle.html"},
        "/gone.html": {"status": 410},
        "/forbidden.html": {"status": 403},
    }
    site = Site(MOVED_HOST, "", "", (), disallow=("/private/",))
    names = [*(path.lstrip("/") for path in answers), "missing.html", "private/never.html"]
    _write(target / ".answers.json", json.dumps(answers).encode(), 0)
    _write(target / "index.html", index_page(site, names, "CC0-1.0").encode(), 0)
    _write(target / "robots.txt", robots_text(site).encode(), 0)


def _write(path: Path, data: bytes, changed_s: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(data)
    if changed_s is not None:
        os.utime(temporary, (changed_s, changed_s))
    temporary.rename(path)


def summary(manifest: dict[str, Any]) -> str:
    """One line: hosts, and files and bytes of each kind."""
    kinds = ", ".join(f"{v['files']} {k} ({v['bytes'] / 1e6:.1f} MB)" for k, v in manifest["kinds"].items())
    return f"demo: {len(manifest['hosts'])} hosts: {kinds}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.demo.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("demo/corpus"), help="default: demo/corpus")
    parser.add_argument("--large", action="store_true", help="the 200 MB set")
    arguments = parser.parse_args()
    manifest = build(arguments.folder, arguments.large, print)
    print(summary(manifest))
    return 0 if manifest["hosts"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""The stage `harvest`: every input of a source as base records (`crawl.harvest.record`), `captures/<source>/<unit>.jsonl.zst`.

A unit is one clone, dump, archive, release pair, or repository of an API. Beside its file lies `<unit>.json`, written last: the
identity of what it was made from and its counts. A killed run does not make a unit again that has one, and equal inputs give
equal bytes. An input that cannot be read is one dropped record that says why; a missing one, or no `git`, ends the stage before
any work. Units run on the engine's workers; the API is asked by one process alone, whose rate limit it is.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from core.engines.contract import Note, Report, Unit
from core.errors import ConfigError, InputError
from core.hashing import CHUNK_BYTES, digest, file_digest
from core.job import Job, Outcome, total
from core.stage import Kind, Stage, StageConfig
from core.storage import Root
from crawl.harvest.archives import Seen, index_digest, read_index, united
from crawl.harvest.config import ARCHIVE_FILES, Dump, HarvestConfig, ReleasePair, Repository
from crawl.harvest.dumps import dump_records
from crawl.harvest.forge import forge_records
from crawl.harvest.git import open_repository, require_git
from crawl.harvest.github import GitHub
from crawl.harvest.history import history
from crawl.harvest.record import Record, line_of
from crawl.harvest.releases import release_record
from crawl.harvest.swebench import read_base_commits
from crawl.harvest.trees import read_tree
from crawl.sources.listing import Folder

SUFFIX = ".jsonl.zst"
ZSTD_LEVEL = 9  # trees of one repository's records repeat: chosen, untested
FORMAT = 1  # of a record's line; a new one makes every unit anew


@dataclass(frozen=True)
class Asked:
    """What an API is to be asked: a repository and the pull requests wanted of it (None: all that are closed)."""

    repo: str
    numbers: tuple[int, ...] | None


@dataclass(frozen=True)
class Archive:
    """One GH Archive file."""

    folder: str
    path: str  # within the folder


@dataclass(frozen=True)
class HarvestUnits:
    """Makes one unit's file. `value` = what lies beside it."""

    root: Root
    folder: str  # captures/<source>
    config: HarvestConfig
    repositories: tuple[Repository, ...]
    benchmark: frozenset[str]

    def __call__(self, unit: Unit, note: Note) -> Report:
        try:
            identity = digest([FORMAT, self._settings(), self._content(unit.payload)])
        except (InputError, OSError) as e:
            identity = digest([FORMAT, self._settings(), str(e)])
        done = committed(self.root, self.folder, unit.name, identity)
        if done is not None:
            return Report(unit.name, docs=done["records"], resumed=True, value=done)
        value = write_unit(self.root, self.folder, unit.name, identity, self._records(unit.payload), note)
        return Report(unit.name, docs=value["records"], bytes=value["bytes"], value=value)

    def _settings(self) -> Any:
        """What of the config decides the records of a unit."""
        config = self.config.model_dump(mode="json", include={"take", "rules", "tree_paths"})
        return {**config, "benchmark": sorted(self.benchmark)}

    def _content(self, payload: Any) -> Any:
        """Digest of a unit's input."""
        if isinstance(payload, Archive):
            running = hashlib.sha256()
            with Folder(payload.folder).open(payload.path) as f:
                while chunk := f.read(CHUNK_BYTES):
                    running.update(chunk)
            return running.hexdigest()
        said = payload.model_dump(mode="json")
        if isinstance(payload, Repository):
            return [said, open_repository(payload.path, self.config.git_timeout_s).state()]
        if isinstance(payload, Dump):
            clone = self._clone(payload)
            state = open_repository(clone.path, self.config.git_timeout_s).state() if clone else None
            return [said, file_digest(payload.path), state]
        return [said, _tree_digest(payload.base), _tree_digest(payload.head)]

    def _clone(self, dump: Dump) -> Repository | None:
        """The configured clone of a dump's repository."""
        return next((r for r in self.repositories if r.name.lower() == dump.name.lower()), None)

    def _records(self, payload: Any) -> Iterator[Record]:
        """The records of an input. One that cannot be read, or not to its end, gives a dropped record that says so."""
        config, timeout_s = self.config, self.config.git_timeout_s
        try:
            if isinstance(payload, Repository):
                git = open_repository(payload.path, timeout_s)
                yield from history(payload, git, config.take, config.rules, config.tree_paths, self.benchmark)
            elif isinstance(payload, Dump):
                clone = self._clone(payload)
                opened = open_repository(clone.path, timeout_s) if clone else None
                yield from dump_records(payload, opened, config.rules, config.tree_paths, self.benchmark)
            else:
                yield release_record(payload, config.rules, config.tree_paths)
        except InputError as e:
            yield Record("input", payload.name, "input").dropped("unreadable", str(e))


@dataclass(frozen=True)
class IndexUnits(HarvestUnits):
    """Reads one GH Archive file. `value` holds its counts; what it names is in `index/<unit>.json`."""

    def __call__(self, unit: Unit, note: Note) -> Report:
        name = f"{self.folder}/index/{unit.name}.json"
        identity = digest([FORMAT, self._content(unit.payload)])
        if self.root.exists(name):
            done = self.root.read_json(name)
            if done["unit"] == identity:
                return Report(unit.name, resumed=True, value=_counts(done))
        with Folder(unit.payload.folder).open(unit.payload.path) as f:
            index = read_index(f)
        done = {"unit": identity, "lines": index.lines, "bad_lines": index.bad_lines, "torn": index.torn}
        self.root.write_json(name, {**done, "seen": [list(s) for s in index.seen], "content": index_digest(index.seen)})
        return Report(unit.name, docs=index.lines, value=_counts(done))


def _counts(done: dict[str, Any]) -> dict[str, int]:
    return {key: done[key] for key in ("lines", "bad_lines", "torn")}


def write_unit(
    root: Root, folder: str, name: str, identity: str, records: Iterable[Record], note: Note
) -> dict[str, Any]:
    """Write a unit's records and then, as its commit, what is known of them."""
    counts: Counter[str] = Counter()
    drops: Counter[str] = Counter()
    running = hashlib.sha256()
    root.remove(f"{folder}/{name}.json")  # the old commit must not vouch for new records
    with (
        root.writing(f"{folder}/{name}{SUFFIX}") as path,
        open(path, "wb") as raw,
        zstandard.ZstdCompressor(level=ZSTD_LEVEL).stream_writer(raw) as out,
    ):
        for record in records:
            line = line_of(record)
            running.update(line)
            out.write(line)
            counts.update(records=1, bytes=len(line))
            if record.drop:
                drops[record.drop] += 1
            note(docs=1, bytes=len(line))
    done = {"unit": identity, "content": running.hexdigest(), "records": counts["records"], "bytes": counts["bytes"]}
    done["drops"] = dict(sorted(drops.items()))
    root.write_json(f"{folder}/{name}.json", done)
    return done


def committed(root: Root, folder: str, name: str, identity: str) -> dict[str, Any] | None:
    """What lies beside a unit's file, if it was made from this very input."""
    if not (root.exists(f"{folder}/{name}.json") and root.exists(f"{folder}/{name}{SUFFIX}")):
        return None
    done: dict[str, Any] = root.read_json(f"{folder}/{name}.json")
    return done if done.get("unit") == identity else None


class HarvestStageConfig(StageConfig):
    """What to harvest is said by each source of kind `harvest`; nothing is left to say here."""


def harvest(job: Job) -> Outcome:
    """One source's captures."""
    config: HarvestConfig = job.source
    folder = f"captures/{job.source_name}"
    pairs = all_pairs(config)
    _check(config, pairs)
    benchmark = read_base_commits(config.rules.benchmark_commits)
    work = HarvestUnits(job.root, folder, config, config.repositories, benchmark)
    units = [Unit(unit_name(x), x) for x in (*config.repositories, *config.dumps, *pairs)]
    _unique(units)
    label = f"{job.instance}: {job.source_name}"
    reports = job.engine.run_units(work, units, label, job.stall_s) if units else []
    made = {r.unit: r.value for r in reports}
    asked, indexed = _index(job, IndexUnits(job.root, folder, config, config.repositories, benchmark), folder)
    observed: dict[str, Any] = total(reports)
    made.update(_ask(job, config, folder, asked, benchmark, observed))
    if not made:  # an empty list of releases, archives without pull requests: nothing, and a file that says so
        made["nothing"] = write_unit(job.root, folder, "nothing", digest(FORMAT), (), _quiet)
    for name in job.root.names(folder):
        if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) not in made:
            job.root.remove(f"{folder}/{name}")  # of an input that the config no longer names
            job.root.remove(f"{folder}/{name.removesuffix(SUFFIX)}.json")
    return _outcome(made, {**observed, **indexed})


def _outcome(made: dict[str, dict[str, Any]], observed: dict[str, Any]) -> Outcome:
    drops: Counter[str] = Counter()
    for value in made.values():
        drops.update(value["drops"])
    outputs = {
        f"{name}{SUFFIX}": {"content": value["content"], "rows": value["records"], "bytes": value["bytes"]}
        for name, value in sorted(made.items())
    }
    accounts = {"records": sum(v["records"] for v in made.values()), "dropped": drops.total()}
    accounts.update({f"dropped.{reason}": n for reason, n in sorted(drops.items())})
    accounts.update({k: n for k, n in sorted(observed.items()) if k.startswith("indexed")})
    return Outcome(outputs=outputs, accounts=accounts, observed=observed)


def _index(job: Job, work: IndexUnits, folder: str) -> tuple[list[Asked], dict[str, int]]:
    """What archives name and no clone already holds, and how much of them was read."""
    found = [Archive(path, f.path) for path in work.config.archives for f in Folder(path).inputs(ARCHIVE_FILES)]
    units = [Unit(unit_name(a), a) for a in found]
    if not units:
        return [], {}
    _unique(units)
    reports = job.engine.run_units(work, units, f"{job.instance}: index", job.stall_s)
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update({f"indexed_{k}": n for k, n in report.value.items()})
    stored = (job.root.read_json(f"{folder}/index/{u.name}.json")["seen"] for u in units)
    clones = {r.name.lower() for r in work.config.repositories}
    asked = []
    for repo, numbers in united([Seen(*s) for s in seen] for seen in stored):
        counts.update(indexed_pulls=len(numbers))
        if repo.lower() in clones:
            counts.update(indexed_in_clones=len(numbers))
        else:
            asked.append(Asked(repo, tuple(numbers)))
    return asked, dict(counts)


def _ask(
    job: Job,
    config: HarvestConfig,
    folder: str,
    asked: Sequence[Asked],
    benchmark: frozenset[str],
    observed: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Units of the API: those of the index and of the config's list. Without an API the index stays unhydrated."""
    if config.api is None:
        if not asked:
            return {}
        value = write_unit(job.root, folder, "unhydrated", digest(FORMAT), _unhydrated(asked), _quiet)
        return {"unhydrated": value}
    wanted = [*asked, *(Asked(repo, None) for repo in config.api.repositories)]
    settings = config.model_dump(mode="json", include={"rules", "tree_paths", "api"})
    made: dict[str, dict[str, Any]] = {}
    with GitHub(config.api, job.root, f"{folder}/answers") as github:
        for ask in wanted:
            name = unit_name(ask)
            identity = digest([FORMAT, settings, sorted(benchmark), ask.repo, ask.numbers])
            rows = forge_records(github, ask.repo, ask.numbers, config.api, config.rules, config.tree_paths, benchmark)
            made[name] = committed(job.root, folder, name, identity) or write_unit(
                job.root, folder, name, identity, rows, _quiet
            )
        observed.update(requests=github.requests, confirmed=github.confirmed, from_store=github.stored)
    return made


def _unhydrated(asked: Sequence[Asked]) -> Iterator[Record]:
    for ask in asked:
        for number in ask.numbers or ():
            record = Record("pull_request", ask.repo, f"pull/{number}", number=number)
            yield record.dropped("unhydrated", "named by an archive; its content needs a clone or `api`")


def _quiet(**_: int) -> None:
    """The API's units report no progress: one answer may take as long as a rate limit."""


def all_pairs(config: HarvestConfig) -> tuple[ReleasePair, ...]:
    """The config's release pairs and those of its list, whose paths are meant from the list's folder."""
    if config.release_list is None:
        return config.release_pairs
    import json

    place = Path(config.release_list)
    try:
        rows = json.loads(place.read_text("utf-8"))
        listed = [ReleasePair.model_validate(row, context={"folder": str(place.resolve().parent)}) for row in rows]
    except (OSError, ValueError, TypeError) as e:
        raise ConfigError(
            f"harvest: release_list cannot be read, got {e}; expected a JSON list of release pairs"
        ) from e
    return (*config.release_pairs, *listed)


def _check(config: HarvestConfig, pairs: Sequence[ReleasePair]) -> None:
    """Everything that can be known before any work."""
    if config.repositories:
        require_git()
    paths = [r.path for r in config.repositories] + [d.path for d in config.dumps]
    paths += [p for x in pairs for p in (x.base, x.head)]
    problems = [f"harvest: no such input, got {p}; check the path" for p in paths if not Path(p).exists()]
    if problems:
        raise ConfigError(*problems)
    if not (paths or config.archives or config.api or config.release_list):
        raise ConfigError(
            "harvest: the source names no input; give repositories, dumps, archives, api or release_pairs"
        )


def _unique(units: Sequence[Unit]) -> None:
    twice = [name for name, n in Counter(u.name for u in units).items() if n > 1]
    if twice:
        raise ConfigError(f"harvest: two inputs share a name, got {twice[0]!r} twice; name each once")


def unit_name(payload: Any) -> str:
    """A file name that says what a unit is, the same wherever its input lies."""
    if isinstance(payload, Archive):
        kind, name = "archive", payload.path
    elif isinstance(payload, Asked):
        kind, name = ("api" if payload.numbers is None else "hydrated"), payload.repo
    else:
        kind = "repository" if isinstance(payload, Repository) else "dump" if isinstance(payload, Dump) else "release"
        name = f"{payload.name}-{payload.version}" if isinstance(payload, ReleasePair) else payload.name
    return f"{kind}-{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{digest([kind, name])[:8]}"


def _tree_digest(path: str) -> str:
    """Of the file as it is, or of all files of a folder."""
    if Path(path).is_file():
        return file_digest(path)
    running = hashlib.sha256()
    for name, data in read_tree(path).items():
        running.update(name.encode("utf-8", "surrogateescape") + b"\0" + hashlib.sha256(data).digest())
    return running.hexdigest()


STAGE = Stage(name="harvest", kind=Kind.CAPTURE, config=HarvestStageConfig, fn=harvest, where=False, per_dataset=True)

"""The knobs of a harvest: what it reads, and which changes are worth keeping. Thresholds are those of the spec sheet
(section 7 of sources) unless a description says otherwise.

An input's `name` enters the identity of the run, its `path` does not: the same clone elsewhere is the same clone. Archives have
no names; those of their files, with their sizes, stand for them.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from core.errors import ConfigError
from core.hashing import digest, file_digest
from core.stage import ConfigPath, execution

ARCHIVE_FILES = ("**/*.json.gz",)
Take = Literal["pulls", "merges", "commits"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _aside(default: Any, description: str) -> Any:
    """`core.stage.execution` for a field of a part: what is left out of its JSON never enters an identity."""
    return Field(default=default, exclude=True, description=description)


class Known(_Part):
    """What is known of a repository from elsewhere; null is unknown."""

    license: str | None = Field(default=None, description="SPDX identifier; null: read from the licence file")
    stars: int | None = Field(default=None, ge=0, description="stars at harvest")
    fork: bool | None = Field(default=None, description="a fork, mirror or template copy of another repository")
    archived: bool | None = Field(default=None, description="closed for good by its owner")


class Repository(Known):
    """A local clone, bare or not."""

    name: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name on its forge")
    path: ConfigPath = Field(exclude=True, description="folder of the clone")


class Dump(Known):
    """An `archive.json` of one repository's issues and pull requests, plain or gz."""

    path: ConfigPath = Field(exclude=True, description="the file")
    name: str = Field(description="name of the input in manifests, such as the repository's")


class ReleasePair(Known):
    """Two versions of a package."""

    name: str = Field(pattern=r"^[\w.-]+$", description="the package")
    base: ConfigPath = Field(exclude=True, description="older version: folder, sdist, wheel, zip or tar")
    head: ConfigPath = Field(exclude=True, description="newer version")
    version: str = Field(description="the newer version as its changelog spells it")


class Api(_Part):
    """The REST and GraphQL interfaces of a forge."""

    base_url: str = Field(default="https://api.github.com", description="without a slash at the end")
    repositories: tuple[str, ...] = Field(default=(), description="owner/name: their closed pull requests are listed")
    token_variable: str = _aside("GITHUB_TOKEN", "environment variable that holds the token")
    max_pulls: int = Field(default=1000, ge=1, description="pull requests taken from one repository's list")
    max_requests: int = _aside(4000, "requests of one run; the next run goes on from the stored answers")
    retries: int = _aside(4, "further attempts after a failure of the network or the server")
    retry_s: float = _aside(1.0, "wait before the first of them; doubled each time")
    max_wait_s: float = _aside(900.0, "longest wait for a rate limit; beyond it the run ends and says when to return")
    timeout_s: float = _aside(30.0, "of one request")


class Rules(_Part):
    """Which changes fall, and why."""

    max_files: int = Field(default=15, ge=1, description="more files changed: `too_many_files`")
    max_lines: int = Field(default=1000, ge=1, description="more lines added and removed: `too_many_lines`")
    file_bytes: int = Field(default=1 << 20, ge=1, description="a larger file in the change: `file_too_large` (chosen)")
    min_stars: int = Field(default=10, ge=0, description="fewer stars, where known: `stars`")
    unknown_stars: Literal["keep", "drop"] = Field(default="keep", description="where nobody counted stars")
    unknown_license: Literal["keep", "drop"] = Field(default="drop", description="where no licence was recognised")
    licenses: tuple[str, ...] | None = Field(
        default=None, description="SPDX identifiers kept; null: all permissive ones"
    )
    unwanted_files: Literal["drop", "leave_out"] = Field(
        default="drop",
        description="a vendored, generated, lock or binary file in a change drops it, or is left out of it",
    )
    languages: tuple[str, ...] | None = Field(
        default=None, description="a change must touch one of these; null: any of the known ones"
    )
    min_text: int = Field(default=200, ge=0, description="characters of a discussion that has no diff (StarCoder)")
    exclude: tuple[str, ...] = Field(default=(), description="further repositories (owner/name) never harvested")
    benchmark_commits: ConfigPath | None = Field(
        default=None, exclude=True, description="file of benchmark instances; changes on their base commits fall"
    )


class HarvestConfig(_Part):
    """Where pull requests, issues, commits and releases come from, and which are kept."""

    repositories: tuple[Repository, ...] = Field(default=(), description="local git repositories")
    take: tuple[Take, ...] = Field(default=("pulls", "merges", "commits"), description="what is taken from them")
    dumps: tuple[Dump, ...] = Field(default=(), description="archive.json files")
    archives: tuple[ConfigPath, ...] = execution(
        (), "GH Archive files or globs (.json.gz): an index of pull requests only; names and sizes enter the identity"
    )
    api: Api | None = Field(default=None, description="interface that completes what archives and lists name")
    release_pairs: tuple[ReleasePair, ...] = Field(default=(), description="two versions of a package each")
    release_list: ConfigPath | None = execution(
        None, "JSON file of further release pairs, as `release_pairs` spells them"
    )
    rules: Rules = Rules()
    tree_paths: int = Field(default=1000, ge=1, description="paths of the repository kept beside a change")
    git_timeout_s: float = execution(300.0, "of one git command")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def lists(self) -> dict[str, str]:
        """Digests of what says what is harvested: by it, and not by paths, runs are told apart. Small files are read, archives
        known by name and size."""
        paths = {"release_list": self.release_list, "benchmark_commits": self.rules.benchmark_commits}
        found = {name: file_digest(path) if Path(path).is_file() else "absent" for name, path in paths.items() if path}
        return {**found, **({"archives": _listed(self.archives)} if self.archives else {})}


def _listed(archives: tuple[str, ...]) -> str:
    """Digest of the names and sizes of the files that archives stand for."""
    from crawl.sources.listing import Folder  # its package reads this module

    try:
        return digest(sorted([f.path, f.bytes] for path in archives for f in Folder(path).inputs(ARCHIVE_FILES)))
    except ConfigError:  # told before any work by who reads them
        return "absent"

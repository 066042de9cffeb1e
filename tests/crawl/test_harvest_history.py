"""Clones as records: real repositories with merges, pull request refs and everything a change can be that is no source."""

import os
import subprocess
from dataclasses import replace

import pytest

from core.errors import ConfigError, InputError
from crawl.harvest.changes import unified
from crawl.harvest.config import Repository, Rules
from crawl.harvest.git import Git, open_repository
from crawl.harvest.history import history
from tests.bounds import BOUND_S
from tests.crawl.small_repository import SmallRepository

TAKE = ("pulls", "merges", "commits")


def harvest(repo, rules=None, take=TAKE, benchmark=frozenset(), **known):
    """Records by key."""
    config = Repository(name="ada/small", path=str(repo.path), **known)
    records = list(history(config, Git(str(repo.path)), take, rules or Rules(), 100, benchmark))
    assert len({r.key for r in records}) == len(records)
    return {r.key: r for r in records}


@pytest.fixture
def repo(tmp_path):
    return SmallRepository(tmp_path / "small")


def test_a_merged_pull_request(repo):
    head = repo.pull(7, "Return two, not one\n\nNobody wanted one.", {"app/main.py": "def main():\n    return 2\n"})
    found = harvest(repo, stars=12)["pull/7"]
    assert (found.kind, found.number, found.merged, found.license, found.stars) == ("pull_request", 7, True, "MIT", 12)
    assert (found.title, found.body) == ("Return two, not one", "Nobody wanted one.")
    assert (found.base_commit, found.head_commit) == (repo.root, head)
    assert (found.created_at, found.merged_at) == ("2024-03-01T12:02:00+00:00", "2024-03-01T12:03:00+00:00")
    (file,) = found.files
    assert (file.path, file.removed, file.added, file.language) == ("app/main.py", 1, 1, "Python")
    assert file.base.encode() == b"def main():\n    return 1\n"
    assert found.tree == ("LICENSE", "README.md", "app/main.py")
    assert found.url == "https://github.com/ada/small/pull/7"


def test_the_base_of_a_branch_is_where_it_left_the_main_line(repo):
    """What the main line gained meanwhile is no part of the change."""
    repo.git("checkout", "-q", "-b", "side")
    repo.commit("Work on the side", {"side.py": "x = 1\n"})
    repo.git("checkout", "-q", "main")
    repo.commit("Meanwhile on the main line", {"other.py": "y = 1\n"})
    repo.git("merge", "-q", "--no-ff", "-m", "Merge branch 'side'", "side")
    merges = [r for r in harvest(repo).values() if r.kind == "merge"]
    assert [[f.path for f in r.files] for r in merges] == [["side.py"]]
    assert merges[0].base_commit == repo.root


def test_squashed_unmerged_and_plain_commits(repo):
    repo.commit("Add a counter (#12)\n\nIt counts.", {"app/count.py": "n = 0\n"})
    repo.pull(13, "Never merged", {"app/never.py": "x\n"}, merge=None)
    repo.commit("Explain what main does in its own words", {"app/main.py": "def main():\n    'One.'\n    return 1\n"})
    repo.commit("wip", {"app/main.py": "def main():\n    return 3\n"})
    found = harvest(repo)
    assert (found["pull/12"].title, found["pull/12"].body) == ("Add a counter", "It counts.")
    assert found["pull/13"].drop == "not_merged"
    plain = [r for r in found.values() if r.kind == "commit"]
    assert [(r.title, r.drop) for r in plain] == [
        ("Explain what main does in its own words", None),
        ("", "message_length"),
    ]
    assert list(harvest(repo, take=("pulls",))) == ["pull/12", "pull/13"]


def test_a_merge_that_only_catches_up_is_no_change(repo):
    repo.git("checkout", "-q", "-b", "fork")
    repo.commit("Ahead on the fork", {"a.py": "1\n"})
    repo.git("checkout", "-q", "main")
    repo.git("merge", "-q", "--no-ff", "-m", "Merge branch 'main' of https://example.org/x", "fork")
    assert [r for r in harvest(repo).values() if r.kind == "merge"] == []


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({f"app/{i}.py": f"{i}\n" for i in range(16)}, "too_many_files"),
        ({"app/a.py": "x\n" * 1001}, "too_many_lines"),
        ({"app/a.py": "x" * (1 << 20) + "y"}, "file_too_large"),
        ({"app/a.py": "x = 1\n", "uv.lock": "a\n"}, "lock_file"),
        ({"app/a.py": "x = 1\n", "vendor/b.py": "b\n"}, "vendored_file"),
        ({"app/a.py": b"a\0b"}, "binary_file"),
        ({"app/a.py": "caf\u00e9\n".encode("latin-1")}, "not_utf8"),
        ({"docs/a.md": "words\n"}, "no_known_language"),
        ({"app/moved.py": "def main():\n    return 1\n", "app/main.py": None}, "renamed_file"),
        ({}, "no_change"),
    ],
)
def test_what_falls(repo, files, reason):
    repo.pull(1, "A change that must fall", files)
    assert harvest(repo)["pull/1"].drop == reason


def test_unwanted_files_may_be_left_out_instead(repo):
    repo.pull(1, "Code and what tools made of it", {"app/a.py": "x = 1\n", "uv.lock": "a\n", "b.png": b"\x89PNG\0"})
    found = harvest(repo, Rules(unwanted_files="leave_out"))["pull/1"]
    assert ([f.path for f in found.files], found.left_out) == (["app/a.py"], ("b.png", "uv.lock"))


def test_ugly_but_whole_files_are_kept_exactly(repo):
    ugly = {"a.py": "x = 1\r\ny = 2\r\n", "b.py": "no end", "c.py": "", "d.py": "\ufeffprint()\n\x0c\u2028"}
    repo.pull(1, "Ugly files all over", ugly)
    repo.pull(2, "Less of them, and one is empty now", {"a.py": None, "b.py": "", "d.py": "print()\n"})
    found = harvest(repo)
    assert {f.path: f.head for f in found["pull/1"].files} == ugly
    assert {f.path: (f.base, f.head) for f in found["pull/2"].files} == {
        "a.py": (ugly["a.py"], None),
        "b.py": ("no end", ""),
        "d.py": (ugly["d.py"], "print()\n"),
    }


def test_symlinks_and_submodules(repo):
    os.symlink("/etc/passwd", repo.path / "link.py")
    repo.pull(1, "A link out of the house", {})
    assert harvest(repo)["pull/1"].drop == "symlink"
    repo.git("update-index", "--add", "--cacheinfo", f"160000,{repo.root},module")
    repo._minute += 1
    repo.git("commit", "-q", "-m", "Another repository as a folder")
    assert [r.drop for r in harvest(repo).values() if r.kind == "commit"] == ["submodule"]


def test_a_huge_file_is_dropped_by_its_size(repo):
    repo.pull(1, "Fifty megabytes of numbers", {"app/data.py": b"1234567\n" * (50 << 17)})
    assert harvest(repo)["pull/1"].drop == "file_too_large"


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"stars": 9}, "stars"),
        ({"fork": True}, "fork"),
        ({"archived": True}, "archived"),
        ({"license": "GPL-3.0-only"}, "license_not_permissive"),
    ],
)
def test_whole_repositories_fall_once(repo, known, reason):
    repo.pull(1, "Anything", {"a.py": "1\n"})
    assert [r.drop for r in harvest(repo, **known).values()] == [reason]


def test_repositories_without_a_licence_or_stars(tmp_path):
    repo = SmallRepository(tmp_path / "bare", license=None)
    repo.pull(1, "Something worth having", {"a.py": "1\n"})
    assert harvest(repo)["repository"].drop == "license_unknown"
    assert harvest(repo, Rules(unknown_license="keep"))["pull/1"].license is None
    assert harvest(repo, Rules(unknown_stars="drop"), license="MIT")["repository"].drop == "stars"


def test_benchmarks_fall_by_base_commit_and_bots_by_name(repo):
    repo.pull(1, "Something worth having", {"a.py": "1\n"})
    assert harvest(repo, benchmark=frozenset({repo.root}))["pull/1"].drop == "benchmark_commit"
    repo.git(
        "-c", "user.name=x", "commit", "-q", "--allow-empty", "--author", "dep[bot] <b@x.org>", "-m", "Bump all of it"
    )
    assert "bot" in {r.drop for r in harvest(repo).values()}


def test_a_bare_clone_gives_the_same_records(repo, tmp_path):
    repo.pull(3, "Return two, not one", {"app/main.py": "def main():\n    return 2\n"})
    subprocess.run(
        ["git", "clone", "-q", "--mirror", str(repo.path), str(tmp_path / "x.git")], check=True, timeout=BOUND_S
    )
    bare = SmallRepository.__new__(SmallRepository)
    bare.path = tmp_path / "x.git"
    assert harvest(bare) == harvest(repo)


def test_our_diff_is_the_one_that_git_shows(repo):
    """On a change with several hunks: the same lines, whatever the function names behind @@."""
    old = "".join(f"value_{i} = {i}\n" for i in range(60))
    new = old.replace("value_7 = 7\n", "value_7 = 70\nextra = 1\n").replace("value_40 = 40\n", "")
    repo.commit("Sixty values to start with", {"v.py": old})
    repo.pull(1, "Some other values", {"v.py": new})
    record = harvest(repo)["pull/1"]
    theirs = repo.git("diff", record.base_commit, record.head_commit).split("\n")
    (file,) = record.files
    ours = unified(file.path, file.base, file.head, 100).rstrip("\n").split("\n")

    def bare(lines):
        return [
            line.split(" @@")[0] if line.startswith("@@") else line for line in lines if not line.startswith("index ")
        ]

    assert bare(ours) == bare(theirs)


def test_nothing_of_a_repository_is_executed(repo, tmp_path):
    """Hooks, monitors, external diffs, text conversion and signature programs of its own config stay asleep."""
    trap, sprung = tmp_path / "trap", tmp_path / "sprung"
    trap.write_text(f"#!/bin/sh\ntouch {sprung}\n")
    trap.chmod(0o755)
    repo.pull(
        1, "Return two, not one", {"app/main.py": "def main():\n    return 2\n", ".gitattributes": "*.py diff=trap\n"}
    )
    for key in (
        "core.fsmonitor",
        "diff.external",
        "diff.trap.textconv",
        "gpg.program",
        "core.pager",
        "core.sshCommand",
    ):
        repo.git("config", key, str(trap))
    repo.git("config", "log.showSignature", "true")
    repo.git("config", "core.hooksPath", str(tmp_path))
    assert harvest(repo)["pull/1"].drop is None
    assert not sprung.exists()


def test_repositories_that_are_none(repo, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such folder"):
        open_repository(str(tmp_path / "none"), 10)
    with pytest.raises(InputError, match="not a git repository"):
        open_repository(str(repo.path / "app"), 10)
    SmallRepository.git(replace_path(repo, tmp_path / "empty"), "init", "-q")
    with pytest.raises(InputError, match="rev-parse"):
        open_repository(str(tmp_path / "empty"), 10)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no `git` on this machine"):
        open_repository(str(repo.path), 10)


def replace_path(repo, path):
    path.mkdir()
    other = SmallRepository.__new__(SmallRepository)
    other.path, other._minute = path, 0
    return other


def test_a_command_that_takes_too_long_is_one_bad_input(repo):
    with pytest.raises(InputError, match="took longer than"):
        Git(str(repo.path), timeout_s=1e-9).run("rev-list", "HEAD")


def test_missing_objects_drop_what_needs_them(repo):
    repo.pull(1, "Return two, not one", {"app/main.py": "def main():\n    return 2\n"})
    record = harvest(repo)["pull/1"]
    blob = repo.git("rev-parse", f"{record.head_commit}:app/main.py")
    (repo.path / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    assert harvest(repo)["pull/1"] == replace(
        record.dropped("x"), drop="missing_object", detail=harvest(repo)["pull/1"].detail
    )

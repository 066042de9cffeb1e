"""Dumps, release pairs and GH Archive files: real ones where there are some, and broken ones."""

import gzip
import io
import json
import os
import tarfile
import zipfile

import pytest

from core.errors import InputError
from crawl.harvest.archives import Seen, read_index, united
from crawl.harvest.config import Dump, ReleasePair, Rules
from crawl.harvest.dumps import closed_issues, dump_records
from crawl.harvest.git import Git
from crawl.harvest.record import Record
from crawl.harvest.releases import entry_of, license_of, release_record
from crawl.harvest.trees import read_tree
from tests.crawl.small_repository import MIT, SmallRepository


def dump_of(path, **known):
    return Dump(name="ada/small", path=str(path), **known)


def records(dump, git=None, rules=None):
    return {r.key: r for r in dump_records(dump, git, rules or Rules(), 100, frozenset())}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cfrg+draft-irtf-cfrg-hpke", {"issue": 86, "pull_request": 166}),
        ("ietf-wg-masque+draft-ietf-masque-connect-udp", {"issue": 62, "pull_request": 17}),
    ],
)
def test_real_dumps(shared_data, name, counts):
    path = shared_data / "pull-requests" / f"{name}.json.gz"
    found = records(dump_of(path, license="BSD-3-Clause"))
    for kind, n in counts.items():
        assert sum(r.kind == kind for r in found.values()) == n
    pulls = json.loads(gzip.decompress(path.read_bytes()))["pulls"]
    unmerged = {f"pull/{p['number']}" for p in pulls if p["state"] != "MERGED"}
    assert {k for k, r in found.items() if r.drop == "not_merged"} == unmerged
    kept = [r for r in found.values() if r.drop is None]
    assert kept
    assert all(len(r.body) + sum(len(x.text) for x in r.remarks) >= 200 for r in kept)
    assert [r.drop for r in records(dump_of(path)).values()] == ["license_unknown"]


def comment(author, body, at="2024-01-02T00:00:00Z"):
    return {"author": author, "body": body, "createdAt": at, "updatedAt": at}


def pull(**more):
    said = {"number": 5, "title": "Return two", "state": "MERGED", "author": "ada", "mergedAt": "2024-01-03T00:00:00Z"}
    return {**said, "body": "Fixes #2. " + "Why. " * 50, "comments": [], "reviews": [], "labels": [], **more}


def write(path, pulls=(), issues=()):
    path.write_text(json.dumps({"repo": "ada/small", "pulls": list(pulls), "issues": list(issues)}))
    return path


def test_a_dump_without_a_clone_gives_discussions(tmp_path):
    review = {**comment("eve", "Looks good"), "comments": [{"body": "Why?", "createdAt": "2024-01-01T00:00:00Z"}]}
    said = pull(comments=[comment("ci-bot", "All green"), comment("eve", "Thanks")], reviews=[review])
    issues = [
        {"number": 2, "title": "One is wrong", "body": "It is.", "author": "eve", "createdAt": "2024-01-01T00:00:00Z"},
        {"number": 3, "title": "Long", "author": "ada", "body": "x" * 7_001, "comments": []},
    ]
    found = records(dump_of(write(tmp_path / "a.json", [said], issues), license="MIT"))
    record = found["pull/5"]
    assert [i.number for i in record.issues] == [2]
    assert [(r.author, r.text, r.where) for r in record.remarks] == [
        ("eve", "Why?", "review"),
        ("eve", "Thanks", "comment"),
        ("eve", "Looks good", "review"),
    ]
    assert (found["issues/2"].drop, found["issues/3"].drop) == ("too_short", "monologue")


def test_a_dump_with_its_clone_gives_contents(tmp_path):
    repo = SmallRepository(tmp_path / "small")
    head = repo.pull(5, "Return two", {"app/main.py": "def main():\n    return 2\n"})
    repo.git("checkout", "-q", "-b", "before", repo.root)
    here = pull(baseRefOid=repo.commit("Meanwhile on the base", {"b.py": "1\n"}), headRefOid=head)
    gone = pull(number=6, baseRefOid=repo.root, headRefOid="f" * 40)
    found = records(dump_of(write(tmp_path / "a.json", [gone, here]), license="MIT"), Git(str(repo.path)))
    assert [f.path for f in found["pull/5"].files] == ["app/main.py"]
    assert found["pull/5"].base_commit == repo.root  # the merge base, not the tip of the base branch
    assert found["pull/6"].drop == "missing_object"


def test_closing_words():
    said = "Fixes #2, closes: #3, resolved https://github.com/a/b/issues/4 <!-- fixes #5 --> fix #2; see #6, fixes #7x"
    record = Record("pull_request", "a/b", "pull/1", title="Closed #9", body=said)
    assert closed_issues(record, "A/B") == [9, 2, 3, 4]
    assert closed_issues(record, "o/r") == [9, 2, 3]


TORN = gzip.compress(b'{"pulls": []}', mtime=0)[:-9]


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", TORN, b"\x1f\x8bno"], ids=["empty", "list", "cut", "torn", "no gzip"]
)
def test_dumps_that_are_none(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.json"):
        records(dump_of(tmp_path / "a.json", license="MIT"))


def test_dumps_with_strange_parts_lose_those_only(tmp_path):
    strange = [None, {"title": "no number"}, pull(body=None, title=7), pull(number=8)]
    found = records(dump_of(write(tmp_path / "a.json", strange), license="MIT"))
    assert {k: r.drop for k, r in found.items()} == {"pull/5": "too_short", "pull/8": None}


CHANGES = """\
Version 1.1.0
-------------

Released 2024-02-02

-   Return two, not one, since 1.0.9 was wrong.

Version 1.0.9
-------------

-   Older.
"""


def test_changelog_entries():
    assert entry_of(CHANGES, "1.1.0") == "Released 2024-02-02\n\n-   Return two, not one, since 1.0.9 was wrong."
    assert entry_of(CHANGES, "1.0.9") == "-   Older."
    assert entry_of(CHANGES, "1.0") is None
    assert entry_of("# Changes\n\n## [2.0] - 2024\nNew\n### Fixed\nIt\n\n## 1.9\nOld\n", "2.0") == "New\n### Fixed\nIt"
    assert entry_of("v1.2.3 (2024)\n=====\n\nx\n\n.. _v1-2-2:\n\nv1.2.2\n=====\ny\n", "1.2.3") == "x"


def package(version, main, **more):
    return {
        "PKG-INFO": f"Name: small\nVersion: {version}\nLicense: MIT\n\nText",
        "LICENSE": MIT,
        "CHANGES.rst": CHANGES if version == "1.1.0" else "",
        "src/small.py": f"__version__ = '{version}'\n\n\ndef main():\n    return {main}\n",
        "src/same.py": "pass\n",
        **more,
    }


def as_sdist(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"small-1/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def as_wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def as_folder(path, files):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    os.symlink("/etc/passwd", path / "link")
    return path


@pytest.mark.parametrize("pack", [as_sdist, as_wheel, as_folder])
def test_a_release_pair_however_it_is_packed(tmp_path, pack):
    base, head = pack(tmp_path / "a", package("1.0.9", 1)), pack(tmp_path / "b", package("1.1.0", 2))
    pair = ReleasePair(name="small", base=str(base), head=str(head), version="1.1.0")
    assert release_record(pair, Rules(), 100).drop == "generated_file"  # PKG-INFO
    record = release_record(pair, Rules(unwanted_files="leave_out"), 100)
    assert (record.kind, record.key, record.license, record.left_out) == (
        "release_pair",
        "release/1.1.0",
        "MIT",
        ("PKG-INFO",),
    )
    assert record.body.endswith("since 1.0.9 was wrong.")
    assert [(f.path, f.removed, f.added) for f in record.files] == [("src/small.py", 2, 2)]
    assert record.tree == ("CHANGES.rst", "LICENSE", "PKG-INFO", "src/same.py", "src/small.py")
    other = pair.model_copy(update={"version": "1.2"})
    assert release_record(other, Rules(), 100).drop == "no_changelog_entry"
    assert release_record(pair.model_copy(update={"name": "sympy"}), Rules(), 100).drop == "benchmark_repository"


def test_licences_of_packages():
    assert license_of({"PKG-INFO": b"Name: x\nLicense-Expression: Apache-2.0\n\n"}) == "Apache-2.0"
    assert (
        license_of({"x.dist-info/METADATA": b"Classifier: License :: OSI Approved :: ISC License (ISCL)\n\n"}) == "ISC"
    )
    assert license_of({"PKG-INFO": b"License: UNKNOWN\n\n", "COPYING": MIT.encode()}) == "MIT"
    assert license_of({}) is None


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil.py", "a/../../evil.py", "C:\\evil.py", "..\\evil.py"])
def test_archives_whose_members_leave_it(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(InputError, match="leaves its folder"):
        read_tree(str(tmp_path / "a.zip"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(InputError, match="leaves its folder"):
        read_tree(str(tmp_path / "a.tar"))


def test_links_and_devices_in_archives_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "a"),
            (tarfile.LNKTYPE, "b"),
            (tarfile.FIFOTYPE, "c"),
            (tarfile.CHRTYPE, "d"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("e.py"))
    assert read_tree(str(tmp_path / "a.tar")) == {"e.py": b""}


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04broken", b"\x1f\x8b\x08\x00cut", b"plain text"])
def test_archives_that_are_none(tmp_path, data):
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.tar\.gz"):
        read_tree(str(tmp_path / "a.tar.gz"))


def event(action="closed", number=5, at="2025-01-01T00:00:00Z", **pull_fields):
    payload = {"action": action, "number": number, "pull_request": {"number": number, **pull_fields}}
    return {"type": "PullRequestEvent", "repo": {"name": "ada/small"}, "created_at": at, "payload": payload}


BEFORE = event(merged=True, title="Return two", body="words", commits=3)  # to October 2025
AFTER = event("merged", 6, url="https://example.org", base={"ref": "main"})  # since: no body, no `merged`
OLD = {
    "type": "PullRequestEvent",
    "repository": {"owner": "ada", "name": "small"},
    "created_at": "2012-01-01T00:00:00Z",
    "payload": {"action": "closed", "number": 3, "pull_request": {"merged": True}},
}


def test_archives_of_all_years_are_an_index():
    events = [
        BEFORE,
        AFTER,
        OLD,
        event(number=7, merged=False),
        event("opened", 8),
        {"type": "PushEvent", "payload": {}},
    ]
    later = event(at="2025-02-01T00:00:00Z", merged=True)
    lines = [json.dumps(e).encode() for e in (*events, later)] + [b"", b"{torn", b"[]", b'{"type": "PullRequestEvent"}']
    index = read_index(io.BytesIO(gzip.compress(b"\n".join(lines))))
    small = "ada/small"
    assert index.seen == [
        Seen(small, 3, "2012-01-01T00:00:00Z"),
        Seen(small, 5, "2025-02-01T00:00:00Z"),
        Seen(small, 6, "2025-01-01T00:00:00Z"),
    ]
    assert (index.lines, index.bad_lines, index.torn) == (10, 3, 0)
    assert list(united([index.seen, [Seen("ada/a", 9, ""), Seen(small, 4, "")]])) == [
        ("ada/a", [9]),
        (small, [3, 4, 5, 6]),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "ada",
        "/small",
        "ada/",
        "ada/small/pulls",
        "../small",
        "ada/..",
        "ada/small?x=1",
        "ada/a b",
        "ada/%2e",
        "a\nb/c",
        5,
    ],
)
def test_a_name_that_is_no_repository_is_a_bad_line(name):
    lines = [{**BEFORE, "repo": {"name": name}}, BEFORE]
    index = read_index(io.BytesIO(gzip.compress("\n".join(map(json.dumps, lines)).encode())))
    assert ([s.repo for s in index.seen], index.lines, index.bad_lines) == (["ada/small"], 2, 1)


def test_a_torn_archive_gives_what_came_before_the_tear():
    whole = gzip.compress(json.dumps(BEFORE).encode() + b"\n")
    index = read_index(io.BytesIO(whole + gzip.compress(json.dumps(AFTER).encode() * 100)[:-20]))
    assert ([s.number for s in index.seen], index.torn) == ([5], 1)

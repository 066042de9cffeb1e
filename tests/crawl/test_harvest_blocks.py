"""Line edits, unified diffs and SEARCH/REPLACE blocks: hand-computed cases, and the law that they lead back byte for byte."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InputError
from crawl.harvest.blocks import Block, MarkerCollisionError, apply, derive, locate, parse, render
from crawl.harvest.changes import Edit, changed_lines, edits, pieces, unified
from tests.bounds import BOUND_S

LINES = st.sampled_from(["a", "b", "", "  a", "c\r", "\u2028", "é", "\x0c", "### x", "---"])
TEXTS = st.none() | st.lists(LINES, min_size=1, max_size=24).map("\n".join)


@st.composite
def edited(draw):
    """A file of repeated lines and the same after a few edits: what makes a SEARCH ambiguous."""
    base = draw(st.lists(LINES, min_size=1, max_size=8)) * draw(st.integers(1, 6))
    head = list(base)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(head)))
        head[at : at + draw(st.integers(0, 3))] = draw(st.lists(LINES, max_size=3))
    return "\n".join(base), "\n".join(head)


def test_edits_by_hand():
    assert edits(list("abcd"), list("abcd"), 9) == []
    assert edits(list("abcd"), list("axcd"), 9) == [Edit(1, 2, 1, 2)]
    assert edits(list("abcd"), list("abxycd"), 9) == [Edit(2, 2, 2, 4)]
    assert edits(list("abcd"), list("d"), 9) == [Edit(0, 3, 0, 0)]
    assert edits(list("abcabba"), list("cbabac"), 9) is not None
    assert sum(changed_lines(edits(list("abcabba"), list("cbabac"), 9))) == 5  # Myers' own example
    assert edits(list("abcabba"), list("cbabac"), 4) is None


@given(TEXTS, TEXTS)
def test_edits_lead_from_base_to_head_and_are_the_fewest(base, head):
    a, b = pieces(base), pieces(head)
    found = edits(a, b, 100)
    made, at = [], 0
    for e in found:
        assert e.end > e.start or e.to_end > e.to
        made += a[at : e.start] + b[e.to : e.to_end]
        at = e.end
    assert made + a[at:] == b
    common = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            common[i + 1][j + 1] = common[i][j] + 1 if x == y else max(common[i][j + 1], common[i + 1][j])
    assert sum(changed_lines(found)) == len(a) + len(b) - 2 * common[-1][-1]


def test_a_unified_diff_by_hand():
    base, head = "1\n2\n3\n4\n5\n6\n7\n8\n9\n", "1\n2\n3\n4\nfive\n6\n7\n8\n9\n10"
    assert unified("f.txt", base, head, 9) == (
        "diff --git a/f.txt b/f.txt\n--- a/f.txt\n+++ b/f.txt\n@@ -2,8 +2,9 @@\n 2\n 3\n 4\n-5\n+five\n 6\n 7\n 8\n 9\n+10\n"
        "\\ No newline at end of file\n"
    )
    assert unified("f", "same", "same", 9) == ""
    with pytest.raises(ValueError, match="more than 2"):
        unified("f", "a\nb", "c\nd", 2)


CASES = [
    ("a\nb\nc\n", "a\nB\nc\n"),
    (None, "new\nfile"),
    (None, ""),
    ("old\nfile\n", None),
    ("x\n", ""),
    ("", "x"),
    ("a\r\nb\r\n", "a\r\nB\r\n"),
    ("no end", "no end\n"),
    ("a\n" * 30, "a\n" * 14 + "b\n" + "a\n" * 16),
]


@pytest.mark.parametrize(("base", "head"), CASES)
def test_git_applies_what_unified_writes(tmp_path, base, head):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=BOUND_S)
    path = tmp_path / "f.txt"
    if base is not None:
        path.write_bytes(base.encode())
    diff = unified("f.txt", base, head, 100).encode()
    done = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", "-"], cwd=tmp_path, input=diff, capture_output=True, timeout=BOUND_S
    )
    assert done.returncode == 0, done.stderr
    assert (path.read_bytes().decode() if path.exists() else None) == head


@pytest.mark.parametrize(("base", "head"), CASES)
def test_blocks_lead_back(base, head):
    assert apply(parse(render(derive("f", base, head, 100))), {"f": base}) == {"f": head}


@given(TEXTS, TEXTS)
def test_blocks_of_any_two_files_lead_back(base, head):
    assert apply(parse(render(derive("f", base, head, 100))), {"f": base})["f"] == head


@given(edited())
def test_blocks_of_edits_lead_back_and_every_search_is_unique(pair):
    base, head = pair
    blocks = derive("f", base, head, 100)
    assert apply(parse(render(blocks)), {"f": base})["f"] == head
    for block in blocks:
        assert 0 <= locate(block, pieces(base)) < len(pieces(base))  # raises unless it is there once


def test_a_block_by_hand():
    base = "".join(f"line {i}\n" for i in range(1, 21))
    head = base.replace("line 10\n", "line ten\nand more\n")
    search = tuple(f"line {i}" for i in range(7, 14))
    (block,) = derive("a/b.py", base, head, 9)
    assert block == Block("a/b.py", search, (*search[:3], "line ten", "and more", *search[4:]))
    assert render([block]) == (
        "### a/b.py\n<<<<<<< SEARCH\nline 7\nline 8\nline 9\nline 10\nline 11\nline 12\nline 13\n=======\n"
        "line 7\nline 8\nline 9\nline ten\nand more\nline 11\nline 12\nline 13\n>>>>>>> REPLACE\n"
    )


def test_context_grows_until_the_search_is_found_once():
    half = "".join(f"{i}\n" for i in range(20))
    base = "first\n" + half + half + "last\n"
    head = "first\n" + half + half.replace("10\n", "ten\n") + "last\n"
    (block,) = derive("f", base, head, 9)
    assert "last" in block.search or "0" in block.search[1:]
    assert apply([block], {"f": base}) == {"f": head}


def test_an_earlier_block_may_not_make_a_later_search_ambiguous():
    """The first edit writes what the second one looks for."""
    base = "\n".join([*"abcdefg", "x", *(str(i) for i in range(20)), *"pqrstuv", "y", *"wz"])
    head = "\n".join([*"abcdefg", *"stuvywz", *(str(i) for i in range(20)), *"pqrstuv", "Y", *"wz"])
    blocks = derive("f", base, head, 100)
    assert apply(blocks, {"f": base}) == {"f": head}


@pytest.mark.parametrize(
    "line", ["<<<<<<< HEAD", "=======", "=======  ", ">>>>>>> REPLACE", "||||||| base", "=======\r"]
)
def test_a_line_that_reads_like_a_marker_is_refused(line):
    with pytest.raises(MarkerCollisionError):
        derive("f", f"a\n{line}\nb\n", f"a\n{line}\nB\n", 9)


def test_markers_far_from_the_change_do_no_harm():
    far = "".join(f"{i}\n" for i in range(30))
    base = f"Title\n=======\n{far}end\n"
    assert apply(derive("f", base, base.replace("end", "END"), 9), {"f": base})["f"].endswith("END\n")


@pytest.mark.parametrize(
    ("text", "files", "what"),
    [
        ("### f\n<<<<<<< SEARCH\na\n=======\nb\n", {"f": "a"}, "no end"),
        ("<<<<<<< SEARCH\na\n=======\nb\n>>>>>>> REPLACE\n", {"f": "a"}, "before any"),
        ("### f\n<<<<<<< SEARCH\nz\n=======\nb\n>>>>>>> REPLACE\n", {"f": "a"}, "not at all"),
        ("### f\n<<<<<<< SEARCH\na\n=======\nb\n>>>>>>> REPLACE\n", {"f": "a\na"}, "more than once"),
        ("### f\n<<<<<<< SEARCH\n=======\nb\n>>>>>>> REPLACE\n", {"f": "a"}, "is there"),
        ("### g\n<<<<<<< SEARCH\na\n=======\nb\n>>>>>>> REPLACE\n", {"f": "a"}, "not at all"),
    ],
)
def test_wrong_answers_are_refused(text, files, what):
    with pytest.raises(InputError, match=what):
        apply(parse(text), files)


def test_too_many_lines_are_refused_without_the_whole_work():
    with pytest.raises(InputError, match="more than 10 changed"):
        derive("f", "a\n" * 50_000, "b\n" * 50_000, 10)

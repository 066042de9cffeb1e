"""Manifests: round trips, what makes an identity, differences in words, files that cannot be read."""

import json
from dataclasses import replace

import pytest

from core.errors import ConfigError
from core.manifest import Identity, Manifest, read_manifest, write_manifest
from core.storage import Root

OLD = Identity("signals", 1, {"low": 0.5, "words": None}, {"web/documents": "aa"}, {}, {"numpy": "2.0"})


def test_round_trip(tmp_path):
    root = Root(str(tmp_path))
    manifest = Manifest(
        "signals", "web", OLD, {"s0": {"rows": 1, "content": "c"}}, {"rows": 1}, {"seconds": 1.5}, {"u": [1]}
    )
    write_manifest(root, manifest)
    assert read_manifest(root, "signals", "web") == manifest
    assert read_manifest(root, "signals", None) is None
    assert root.exists("datasets/web/manifests/signals.json")


def test_only_outputs_make_the_content():
    a = Manifest("s", None, OLD, {"x": {"content": "1", "rows": 1}})
    assert a.content() == replace(a, observed={"seconds": 9}, accounts={"rows": 4}).content()
    assert a.content() != replace(a, outputs={"x": {"content": "2", "rows": 1}}).content()
    assert a.content() != replace(a, outputs={"y": {"content": "1", "rows": 1}}).content()


@pytest.mark.parametrize(
    ("new", "lines"),
    [
        (replace(OLD, version=2), ["version: 1 -> 2"]),
        (replace(OLD, config={"low": 0.7, "words": None}), ["config.low: 0.5 -> 0.7"]),
        (replace(OLD, inputs={"web/documents": "bb"}), ["inputs.web/documents: aa -> bb"]),
        (replace(OLD, config={"low": 0.5}), ["config.words: None -> absent"]),
        (replace(OLD, config={"low": 0.5, "words": None, "new": None}), ["config.new: absent -> None"]),
        (replace(OLD, libraries={}), ["libraries.numpy: 2.0 -> absent"]),
        (OLD, []),
    ],
)
def test_every_difference_is_told(new, lines):
    assert OLD.differences(new) == lines
    assert bool(lines) == (OLD.digest() != new.digest())


def test_a_difference_of_type_alone_is_told():
    assert replace(OLD, config={"n": 1}).differences(replace(OLD, config={"n": 1.0})) == ["config.n: 1 -> 1.0"]


def test_manifests_that_cannot_be_read_are_refused(tmp_path):
    root = Root(str(tmp_path))
    root.write_bytes("manifests/s.json", b"{torn")
    with pytest.raises(ConfigError, match=r"manifests/s.json: not a manifest"):
        read_manifest(root, "s", None)
    root.write_bytes("manifests/s.json", json.dumps({"format": 99}).encode())
    with pytest.raises(ConfigError, match="written in format 99, expected 1"):
        read_manifest(root, "s", None)

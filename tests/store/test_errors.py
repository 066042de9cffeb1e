"""What is wrong with a store is said in one line before any work, and never with a secret in it."""

import os
import re
import sys

import pytest

from core import object_store
from core.errors import ConfigError, StageError
from core.storage import Root
from pipelines.preflight import preflight
from tests.pipelines.small_pipeline import pipelines, texts, write_config, write_jsonl
from tests.store.seaweed import READER_KEY, READER_SECRET, SECRET, free_ports

CONFIG = """\
root: {root}
engine: {{workers: 1, memory_gb: 1}}
sources:
  notes: {{kind: jsonl, path: {source}}}
stages:
  extract: {{}}
"""
WRONG = "9Zz3-another-secret-of-nobody"

CASES = {
    "a wrong secret": (
        {"AWS_SECRET_ACCESS_KEY": WRONG},
        "a wrong secret (SignatureDoesNotMatch)",
        "AWS_SECRET_ACCESS_KEY",
    ),
    "an unknown key": ({"AWS_ACCESS_KEY_ID": "nobody"}, "does not know (InvalidAccessKeyId)", "AWS_ACCESS_KEY_ID"),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
        "got no credentials",
        "expected an access key and its secret",
    ),
    "half of the credentials": ({"AWS_SECRET_ACCESS_KEY": ""}, "got no credentials", "AWS_SECRET_ACCESS_KEY"),
    "a reader": (
        {"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET},
        "no permission (AccessDenied)",
        "the right to list, read, write and delete",
    ),
    "an endpoint that is no URL": ({"AWS_ENDPOINT_URL": "what is this"}, "cannot set up a client", "AWS_ENDPOINT_URL"),
    "an unknown setting": ({"FSSPEC_S3_ACL": "private"}, "fsspec's s3 setting 'acl'", "~/.aws/config"),
}


@pytest.fixture
def source(tmp_path):
    write_jsonl(tmp_path / "source", texts(3), 1)
    return tmp_path / "source"


def refused(url, monkeypatch, variables, kind=ConfigError):
    """The one line that a run would end with."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind) as e:
        preflight(Root(url))
    return plain(str(e.value))


def commanded(url, source, tmp_path, variables):
    """The one line that a run did end with."""
    config = write_config(tmp_path / "p.yaml", CONFIG, root=url, source=source)
    ran = pipelines("run", "all", "-c", config, variables=variables)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert ran.err.count("\n") == 1
    return plain(ran.err.strip().removeprefix("error: "))


def plain(line):
    assert "\n" not in line
    assert re.match(r"root: .*got .*, expected .*; ", line), line
    for secret in (WRONG, READER_SECRET, SECRET):
        assert secret not in line
    return line


@pytest.mark.parametrize("case", CASES)
def test_credentials_and_settings(case, s3, monkeypatch):
    variables, got, expected = CASES[case]
    line = refused(s3.url, monkeypatch, variables)
    assert got in line
    assert expected in line
    assert s3.server.keys(s3.bucket) == []


def test_a_bucket_that_is_not_there(s3, monkeypatch):
    line = refused("s3://nonesuch-bucket/root", monkeypatch, {})
    assert "got no such bucket" in line
    assert "s3://nonesuch-bucket" in line


def test_a_bucket_name_that_cannot_be(s3, monkeypatch):
    assert "expected s3://bucket/folder" in refused("s3://NO!/root", monkeypatch, {})


def test_an_endpoint_where_nobody_listens(s3, monkeypatch):
    monkeypatch.setattr(object_store, "PROBE_PATIENCE_S", 1.0)
    endpoint = f"http://someone:{WRONG}@127.0.0.1:{free_ports(1)[0]}"
    line = refused(s3.url, monkeypatch, {"AWS_ENDPOINT_URL": endpoint}, StageError)  # it may come back
    assert "got no connection to http://127.0.0.1:" in line
    assert "AWS_ENDPOINT_URL" in line


def test_the_command_says_just_that(s3, source, tmp_path):
    line = commanded(s3.url, source, tmp_path, {"AWS_SECRET_ACCESS_KEY": WRONG})
    assert "got a wrong secret (SignatureDoesNotMatch)" in line


def test_a_missing_package_names_the_extra(s3, source, tmp_path):
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "botocore.py").write_text("raise ImportError('no botocore here')\n")
    shadowed = os.pathsep.join([str(tmp_path / "shadow"), *filter(None, sys.path)])
    line = commanded(s3.url, source, tmp_path, {"PYTHONPATH": shadowed})
    assert "pip install 'stepwell[s3]'" in line

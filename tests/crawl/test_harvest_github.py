"""GitHub's interfaces on loopback: recorded shapes, pages, ETags, rate limits, faults; and pull requests made from them."""

import base64
import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import pytest

from core.errors import ConfigError, InputError, StageError
from core.storage import Root
from crawl.harvest.config import Api, Rules
from crawl.harvest.forge import forge_records
from crawl.harvest.github import GitHub, GoneError
from pipelines.config import load_pipeline
from pipelines.runner import Runner, RunOptions
from tests.crawl.test_harvest_inputs import BEFORE

SHA = {name: name * 40 for name in "abcdef"}


class Forge:
    """A server whose answers a test writes down: path -> (status, headers, body) or a list of them, used in turn."""

    def __init__(self):
        self.answers, self.seen = {}, []
        forge = self

        class Answers(BaseHTTPRequestHandler):
            def answer(self):
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                forge.seen.append((self.command, self.path, dict(self.headers), body))
                given = forge.answers.get(self.path, forge.answers.get(url.path, (404, {}, {"message": "Not Found"})))
                if isinstance(given, list):
                    given = given.pop(0) if len(given) > 1 else given[0]
                if callable(given):
                    given = given(dict(parse_qsl(url.query)), body)
                status, headers, value = given
                if headers.get("ETag") and self.headers.get("If-None-Match") == headers["ETag"]:
                    status, value = 304, None
                data = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = answer  # noqa: N815 - names of the standard library

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def paths(self):
        return [path for _, path, _, _ in self.seen]


@pytest.fixture
def forge():
    made = Forge()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def client(forge, tmp_path, monkeypatch):
    """A function that opens a client; each one is a new run over the same stored answers."""
    monkeypatch.setenv("FORGE_TOKEN", "secret")

    def opened(**more):
        api = Api(base_url=forge.url, token_variable="FORGE_TOKEN", **{"retry_s": 0.01, "retries": 2, **more})
        return GitHub(api, Root(str(tmp_path / "root")), "captures/x/answers")

    return opened


def test_pages_follow_their_links_and_stop_at_most(forge, client):
    forge.answers["/list?per_page=2"] = (
        200,
        {"Link": f'<{forge.url}/list?page=2>; rel="next", <x>; rel="last"'},
        [1, 2],
    )
    forge.answers["/list?page=2"] = (200, {}, [3, 4])
    with client() as github:
        assert list(github.pages("list", 9, per_page=2)) == [1, 2, 3, 4]
        assert list(github.pages("list", 3, per_page=2)) == [1, 2, 3]
        assert list(github.pages("list", 1, per_page=2)) == [1]
    assert forge.seen[0][2]["Authorization"] == "Bearer secret"


def test_the_token_goes_nowhere_else(forge, client):
    forge.answers["/list"] = (200, {"Link": '<http://elsewhere.example/list>; rel="next"'}, [1])
    forge.answers["/moved"] = (302, {"Location": "http://elsewhere.example/x"}, None)
    with client() as github, pytest.raises(InputError, match=r"elsewhere\.example"):
        list(github.pages("list", 9))
    with client() as github, pytest.raises(InputError, match=r"elsewhere\.example"):
        github.get("moved")


def test_etags_are_confirmed_and_fixed_answers_not_asked_for_again(forge, client):
    forge.answers["/a"] = (200, {"ETag": 'W/"1"'}, {"n": 1})
    forge.answers["/b"] = (200, {}, {"n": 2})
    for expected in ((2, 0, 0), (1, 1, 1)):
        with client() as github:
            assert github.get("a") == {"n": 1}
            assert github.get("b", fixed=True) == {"n": 2}
            assert (github.requests, github.confirmed, github.stored) == expected
    forge.answers["/a"] = (200, {"ETag": 'W/"2"'}, {"n": 3})
    with client() as github:
        assert github.get("a") == {"n": 3}


def test_rate_limits_are_waited_for_or_told(forge, client):
    soon = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(time.time()) + 1)}
    forge.answers["/a"] = [(403, soon, {"message": "rate limit"}), (429, {"Retry-After": "0"}, {}), (200, {}, {"n": 1})]
    with client() as github:
        assert github.get("a") == {"n": 1}
    forge.answers["/b"] = (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(time.time()) + 5000)}, {})
    with client() as github, pytest.raises(StageError, match="run again after"):
        github.get("b")


def test_waits_that_are_no_times_are_told_too(forge, client):
    forge.answers["/a"] = (429, {"Retry-After": "9" * 400}, {})
    with client() as github, pytest.raises(StageError, match="run again after"):
        github.get("a")
    forge.answers["/b"] = (429, {"Retry-After": "\u00b2"}, {})  # a digit that is no number
    with client(max_wait_s=30.0) as github, pytest.raises(StageError, match="a wait of 60 s"):
        github.get("b")


def test_redirects_in_a_circle_end(forge, client):
    forge.answers["/a"] = (301, {"Location": f"{forge.url}/a"}, None)
    with client() as github, pytest.raises(InputError, match="circles"):
        github.get("a")
    assert len(forge.seen) == 6


def test_faults_are_tried_again_a_few_times(forge, client):
    forge.answers["/a"] = [(502, {}, b"<html>bad gateway"), (503, {}, None), (200, {}, {"n": 1})]
    forge.answers["/b"] = (502, {}, b"")
    forge.answers["/c"] = (200, {}, b"no json")
    with client() as github:
        assert github.get("a") == {"n": 1}
        with pytest.raises(StageError, match="failed 3 times, the last with status 502"):
            github.get("b")
        with pytest.raises(InputError, match="no JSON"):
            github.get("c")
        with pytest.raises(GoneError):
            github.get("nowhere")


def test_a_refused_token_and_an_unreachable_server(forge, client, tmp_path):
    forge.answers["/a"] = (401, {}, {"message": "Bad credentials"})
    with client() as github, pytest.raises(ConfigError, match="FORGE_TOKEN"):
        github.get("a")
    nobody = Api(base_url="http://127.0.0.1:9", token_variable="NONE", retries=0, retry_s=0)
    with GitHub(nobody, Root(str(tmp_path)), "x") as github, pytest.raises(StageError, match="ConnectError"):
        github.get("a")
    with GitHub(nobody, Root(str(tmp_path)), "x") as github, pytest.raises(ConfigError, match="needs a token"):
        github.query("{}")


def test_a_run_ends_at_its_limit_of_requests_and_the_next_goes_on(forge, client):
    for i in range(4):
        forge.answers[f"/{i}"] = (200, {}, i)

    def all_four(github):
        return [github.get(str(i), fixed=True) for i in range(4)]

    with client(max_requests=3) as github, pytest.raises(StageError, match="run again to go on"):
        all_four(github)
    with client(max_requests=3) as github:
        assert all_four(github) == [0, 1, 2, 3]
        assert github.requests == 1


def test_graphql_errors(forge, client):
    good = {"data": {"x": 1}}
    forge.answers["/graphql"] = [
        (200, {}, {"errors": [{"type": "INTERNAL", "message": "something went wrong"}]}),
        (200, {"Retry-After": "0"}, {"data": None, "errors": [{"type": "RATE_LIMITED"}]}),
        (200, {}, good),
    ]
    with client() as github:
        assert github.query("{x}") == {"x": 1}
        assert github.query("{x}") == {"x": 1}
        assert (github.requests, github.stored) == (3, 1)
    forge.answers["/graphql"] = (200, {}, {"data": {"x": None}, "errors": [{"type": "NOT_FOUND"}]})
    with client() as github, pytest.raises(GoneError):
        github.query("{y}")
    forge.answers["/graphql"] = (200, {}, {"errors": [{"message": "no"}]})
    with client() as github, pytest.raises(InputError, match="errors only"):
        github.query("{z}")


def blob(data):
    return (200, {}, {"encoding": "base64", "content": base64.b64encode(data).decode(), "sha": "s"})


def node(**more):
    said = {"title": "Return two", "body": "Fixes #2 for @eve", "url": "u", "merged": True, "baseRefOid": SHA["a"]}
    at = {"mergedAt": "2024-01-03T00:00:00Z", "createdAt": "2024-01-02T00:00:00Z", "headRefOid": SHA["b"]}
    issue = {"number": 2, "title": "One", "body": "is wrong", "createdAt": "2024-01-01T00:00:00Z", "author": None}
    remark = {"author": {"login": "eve"}, "body": "ok", "createdAt": "2024-01-02T00:00:00Z", "lastEditedAt": None}
    lists = {
        "comments": {"nodes": [remark]},
        "closingIssuesReferences": {"nodes": [issue]},
        "reviews": {"nodes": [None]},
    }
    return {**said, **at, **lists, "author": {"login": "ada"}, "labels": {"nodes": [{"name": "bug"}]}, **more}


@pytest.fixture
def small(forge):
    """A repository with three closed pull requests, of which one was not merged and one is a bot's."""
    pulls = {5: node(), 6: node(merged=False, mergedAt=None), 7: node(author={"login": "renovate[bot]"})}
    license = {"spdx_id": "MIT"}
    forge.answers |= {
        "/repos/ada/small": (200, {}, {"stargazers_count": 50, "license": license, "fork": False, "archived": False}),
        "/repos/ada/small/pulls": (200, {}, [{"number": n, "merged_at": p["mergedAt"]} for n, p in pulls.items()]),
        f"/repos/ada/small/compare/{SHA['a']}...{SHA['b']}": (
            200,
            {},
            {
                "merge_base_commit": {"sha": SHA["c"]},
                "files": [
                    {"filename": "new file#1.py", "status": "added", "sha": SHA["e"]},
                    {"filename": "main.py", "status": "modified", "sha": SHA["d"]},
                ],
            },
        ),
        "/repos/ada/small/contents/main.py": lambda query, _: (
            blob(b"one\r\n") if query["ref"] == SHA["c"] else (404, {}, {})
        ),
        f"/repos/ada/small/git/blobs/{SHA['d']}": blob(b"two\r\n"),
        f"/repos/ada/small/git/blobs/{SHA['e']}": blob(b""),
        f"/repos/ada/small/git/trees/{SHA['c']}": (
            200,
            {},
            {"tree": [{"path": "main.py", "type": "blob"}, {"path": "d", "type": "tree"}]},
        ),
    }

    def answer(_, body):
        number = json.loads(body)["variables"]["number"]
        return 200, {}, {"data": {"repository": {"pullRequest": pulls.get(number)}}}

    forge.answers["/graphql"] = answer
    return pulls


def harvested(github, numbers=None, rules=None, benchmark=frozenset()):
    api = Api(base_url="http://unused")
    found = forge_records(github, "ada/small", numbers, api, rules or Rules(), 100, benchmark)
    return {r.key: r for r in found}


def test_pull_requests_of_a_forge(forge, client, small):
    with client() as github:
        found = harvested(github)
    assert {k: r.drop for k, r in found.items()} == {"pull/5": None, "pull/7": "bot"}
    record = found["pull/5"]
    assert (record.license, record.stars, record.labels, record.base_commit) == ("MIT", 50, ("bug",), SHA["c"])
    assert [(f.path, f.base, f.head) for f in record.files] == [
        ("main.py", "one\r\n", "two\r\n"),
        ("new file#1.py", None, ""),
    ]
    assert [i.number for i in record.issues] == [2]
    assert (record.remarks[0].author, record.tree, record.tree_size) == ("eve", ("main.py",), 1)
    with client() as github:
        assert harvested(github) == found
        assert github.requests == 2  # the repository and its list: all else cannot change
    with client() as github:
        assert {k: r.drop for k, r in harvested(github, [6, 9]).items()} == {"pull/6": "not_merged", "pull/9": "gone"}
        assert harvested(github, [5], benchmark=frozenset({SHA["c"]}))["pull/5"].drop == "benchmark_commit"


def test_content_that_does_not_come_costs_its_pull_request_only(forge, client, small):
    forge.answers[f"/repos/ada/small/git/blobs/{SHA['d']}"] = (200, {}, {"encoding": "none", "content": ""})
    with client() as github:
        assert harvested(github, [5])["pull/5"].drop == "unreadable"
    forge.answers["/repos/ada/small"] = (451, {}, {"message": "withdrawn"})
    with client() as github:
        assert [r.drop for r in harvested(github).values()] == ["gone"]
    for odd in ((200, {}, b"no json"), (400, {}, {"message": "bad name"})):
        forge.answers["/repos/ada/small"] = odd
        with client() as github:
            assert [r.drop for r in harvested(github).values()] == ["unreadable"]


@pytest.mark.parametrize(
    "odd",
    [
        {"title": 5},
        {"author": ["ada"]},
        {"labels": {"nodes": [{"color": "red"}]}},
        {"comments": [1]},
        {"closingIssuesReferences": {"nodes": [{"title": "no number"}]}},
        {"headRefOid": SHA["e"]},  # its comparison lacks everything
        {"headRefOid": SHA["f"]},  # its comparison's files lack their names
    ],
)
def test_json_of_another_shape_costs_its_pull_request_only(forge, client, small, odd):
    small |= {4: node(**odd), 5: node()}
    compare = f"/repos/ada/small/compare/{SHA['a']}..."
    forge.answers[f"{compare}{SHA['e']}"] = (200, {}, {"files": []})
    forge.answers[f"{compare}{SHA['f']}"] = (200, {}, {"files": [{}], "merge_base_commit": {"sha": SHA["c"]}})
    with client() as github:
        found = harvested(github, [4, 5])
    assert {k: r.drop for k, r in found.items()} == {"pull/4": "unreadable", "pull/5": None}


@pytest.mark.parametrize("odd", [[], "text", {"license": "MIT"}])
def test_a_repository_of_another_shape_is_one_record(forge, client, small, odd):
    forge.answers["/repos/ada/small"] = (200, {}, odd)
    with client() as github:
        assert [r.drop for r in harvested(github).values()] == ["unreadable"]
    forge.answers["/repos/ada/small"] = (
        200,
        {"ETag": "other"},
        {"stargazers_count": 50, "license": {"spdx_id": "MIT"}},
    )
    forge.answers["/repos/ada/small/pulls"] = (200, {}, [{"merged_at": "2024-01-03T00:00:00Z"}])
    with client() as github:
        assert [r.drop for r in harvested(github).values()] == ["unreadable"]


def test_forks_fall_before_their_list_is_asked_for(forge, client, small):
    forge.answers["/repos/ada/small"] = (200, {}, {"fork": True, "stargazers_count": 99, "license": None})
    with client() as github:
        assert [r.drop for r in harvested(github).values()] == ["fork"]
    assert forge.paths() == ["/repos/ada/small"]


STAGE_CONFIG = """\
root: {folder}/root
engine: {{workers: 1, memory_gb: 1}}
sources:
  pulls:
    kind: harvest
    archives: ["{folder}/archives"]
    api:
      {{base_url: "{url}", token_variable: FORGE_TOKEN, retries: 0, max_requests: {requests}, repositories: [ada/gone]}}
stages: {{harvest: {{}}, extract: {{}}}}
"""


def test_an_index_is_hydrated_and_a_run_that_ends_early_is_gone_on_with(forge, client, small, tmp_path):
    """The archive names pull requests 5, 6 and 7; the third request is refused to the first run."""
    closed = [
        {**BEFORE, "payload": {"action": "closed", "number": n, "pull_request": {"number": n}}} for n in (5, 6, 7)
    ]
    (tmp_path / "archives").mkdir()
    lines = "\n".join(json.dumps(e) for e in closed)
    (tmp_path / "archives" / "2025-11-01-1.json.gz").write_bytes(gzip.compress(lines.encode()))
    path = tmp_path / "p.yaml"

    def run(requests):
        path.write_text(STAGE_CONFIG.format(folder=tmp_path, url=forge.url, requests=requests))
        Runner(load_pipeline(path), RunOptions("test")).run()

    with pytest.raises(StageError, match="run again to go on"):
        run(3)
    run(100)
    manifest = json.loads((tmp_path / "root/datasets/pulls/manifests/harvest.json").read_text())
    expected = {"records": 4, "dropped": 3, "dropped.bot": 1, "dropped.gone": 1, "dropped.not_merged": 1}
    indexed = {"indexed_bad_lines": 0, "indexed_lines": 3, "indexed_pulls": 3, "indexed_torn": 0}
    assert manifest["accounts"] == expected | indexed
    assert sum(path == "/graphql" for path in forge.paths()) == 3  # each question once, over both runs
    documents = json.loads((tmp_path / "root/datasets/pulls/manifests/documents.json").read_text())
    assert (documents["accounts"]["documents"], documents["accounts"]["drops"]) == (1, 3)
    assert not any("secret" in p.read_text("utf-8", "replace") for p in (tmp_path / "root").rglob("*.json"))

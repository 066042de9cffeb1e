"""Config, seeds and the stage object."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from core.engines.local import LocalEngine
from core.errors import ConfigError
from core.hashing import file_digest
from core.job import Job
from core.stage import Kind, identity_fields
from core.storage import Root
from crawl.crawler import retry_after_s
from crawl.stage import STAGE, CrawlConfig, run_crawl
from tests.crawl.loopback import AGENT, Loopback, links, page, responses


@pytest.mark.parametrize(
    "knobs",
    [
        {"user_agent": "stepbot/1.0"},
        {"user_agent": "Mozilla/5.0 (+https://example.org)"},
        {"user_agent": "(+https://example.org)"},
        {"user_agent": "bot/1 (+https://example.org)\r\nCookie: x"},
        {"seeds": ()},
        {"hosts": ("a",)},
        {"scope": "listed"},
        {"allow_networks": ("127.0.0.1/8",)},
        {"resolver": {"a": "b"}},
        {"max_pages": 0},
        {"delay_s": -1},
        {"concurrency": 0},
        {"speed": 11},
    ],
)
def test_bad_configs_are_refused(knobs: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CrawlConfig.model_validate({"seeds": ("http://a/",), "user_agent": AGENT} | knobs)


def test_identity_leaves_out_how_to_run() -> None:
    config = CrawlConfig(seeds=("http://a/",), user_agent=AGENT)
    assert not {"concurrency", "resolver", "ca_file"} & set(identity_fields(config))
    assert {"seeds", "delay_s", "max_pages"} <= set(identity_fields(config))


def test_every_bad_seed_is_named_before_the_first_request(tmp_path: Path) -> None:
    file = tmp_path / "seeds.txt"
    file.write_text("# ours\nhttp://a.test/\n\nnonsense\nftp://a.test/\n")
    with Loopback({}) as web, pytest.raises(ConfigError) as error:
        run_crawl(web.config("also bad", seeds_file=str(file)), tmp_path / "web")
    assert [problem.rpartition("got ")[2] for problem in error.value.problems] == [
        "'also bad'; mend or remove it", "'nonsense'; mend or remove it", "'ftp://a.test/'; mend or remove it",
    ]  # fmt: skip
    assert not (tmp_path / "web").exists()
    with pytest.raises(ConfigError, match="cannot be read"):
        run_crawl(web.config(seeds_file=str(tmp_path / "none")), tmp_path / "web")


def test_seed_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "seeds.txt"
    file.write_text("# ours\nhttp://a.test/1\n\n http://a.test/2 \n")
    with Loopback({"/1": page(), "/2": page(), "/": page()}) as web:
        run_crawl(web.config(seeds_file=str(file)), tmp_path / "web")
    assert web.paths() == ["/", "/1", "/2"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("120", 120.0), (" 5 ", 5.0), ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("", None), ("soon", None), ("-5", None), ("1.5", None),
    ],
)  # fmt: skip
def test_retry_after(value: str, expected: float | None) -> None:
    assert retry_after_s(value, now=100.0) == expected


def test_the_stage_writes_below_captures(tmp_path: Path) -> None:
    with Loopback({"/": links("/x"), "/x": page()}) as web:
        root = Root(str(tmp_path))
        job = Job(
            STAGE,
            "crawl",
            STAGE.config(),
            root,
            LocalEngine(tmp_path / "x", 0),
            (),
            "i",
            source=web.config(),
            source_name="web",
        )
        outcome = STAGE.fn(job)
    assert STAGE.kind is Kind.CAPTURE
    assert outcome.accounts["fetched"] == len(responses(tmp_path / "captures" / "web")) == 2
    warc = tmp_path / "captures" / "web" / "web-00000.warc.gz"
    assert outcome.outputs == {warc.name: {"content": file_digest(warc), "bytes": warc.stat().st_size}}


def test_a_resolver_file_is_added_to_the_table(tmp_path: Path) -> None:
    with Loopback({"/": page()}) as web:
        config = web.config()
        table = dict(config.resolver)
        assert table
        file = tmp_path / "resolver.json"
        file.write_text(json.dumps(table))
        run_crawl(config.model_copy(update={"resolver": {}, "resolver_file": str(file)}), tmp_path / "web")
        assert web.paths() == ["/"]
        file.write_text("[]")
        with pytest.raises(ConfigError, match="resolver_file cannot be used"):
            run_crawl(config.model_copy(update={"resolver_file": str(file)}), tmp_path / "again")

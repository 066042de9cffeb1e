"""What must never be trained on because benchmarks test with it: repositories by name and by first commit, instances by
base commit.

Names: the 12 repositories of SWE-bench with names they had before, and those of SWE-bench Multilingual, from the harness at
SWE-bench/SWE-bench (7a21e05 and its history; three of the JavaScript ones belong to SWE-bench Multimodal). First commits find
forks and renamed clones; they were read with `git rev-list --max-parents=0` from clones on 2026-11-22. Those of django,
matplotlib and scikit-learn were not at hand: these three are known by name only.
"""

import json
from pathlib import Path

from core.errors import ConfigError

_SWE_BENCH_WORDS = """
    astropy/astropy django/django matplotlib/matplotlib mwaskom/seaborn pallets/flask psf/requests pydata/xarray
    pylint-dev/pylint pytest-dev/pytest scikit-learn/scikit-learn sphinx-doc/sphinx sympy/sympy mitsuhiko/flask
    kennethreitz/requests requests/requests pycqa/pylint seaborn/seaborn xarray/xarray
"""
SWE_BENCH = frozenset(_SWE_BENCH_WORDS.split())
_MULTILINGUAL_WORDS = """
    redis/redis jqlang/jq stedolan/jq nlohmann/json micropython/micropython valkey-io/valkey fmtlib/fmt
    caddyserver/caddy hashicorp/terraform prometheus/prometheus gohugoio/hugo gin-gonic/gin google/gson apache/druid
    javaparser/javaparser projectlombok/lombok apache/lucene reactivex/rxjava automattic/wp-calypso chartjs/chart.js
    markedjs/marked processing/p5.js diegomura/react-pdf babel/babel vuejs/core facebook/docusaurus
    immutable-js/immutable-js mrdoob/three.js preactjs/preact axios/axios phpoffice/phpspreadsheet laravel/framework
    php-cs-fixer/php-cs-fixer briannesbitt/carbon jekyll/jekyll fluent/fluentd fastlane/fastlane jordansissel/fpm
    faker-ruby/faker rubocop/rubocop burntsushi/ripgrep sharkdp/bat astral-sh/ruff tokio-rs/tokio uutils/coreutils
    nushell/nushell tokio-rs/axum
"""
MULTILINGUAL = frozenset(_MULTILINGUAL_WORDS.split())
# Package names are the last part of a repository's name; these are too common a word to say anything.
PACKAGES = frozenset(name.rpartition("/")[2] for name in SWE_BENCH | MULTILINGUAL) - {"core", "framework", "json"}

FIRST_COMMITS = {
    "d5b68f2fbddb8587ab8fe56e3069d81821adf222": "astropy/astropy",
    "36dd99374a1d6857af7652a9fb832a712a066e16": "mwaskom/seaborn",
    "33850c0ebd23ae615e6823993d441f46d80b1ff0": "pallets/flask",
    "e7615cbc6b4af5985c4e0d4848a426e2d35f79c3": "psf/requests",
    "f6202cb597237e5ad78904771bcbc03e01f39b27": "pydata/xarray",
    "4becf6f9e596b45401680c4947e2d92c953d5e08": "pylint-dev/pylint",
    "5992a8ef21424d7571305a8d7e2a3431ee7e1e23": "pytest-dev/pytest",
    "6219bccc477caba671e7c4a3a92a6626b33d5006": "sphinx-doc/sphinx",
    "99b21ff58ad2e2ba83172512d7f513a7c37e50c3": "sympy/sympy",
}


def excluded_repository(name: str, first_commits: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> str | None:
    """Why a repository (`owner/name`) is a benchmark's, or None. `more` holds names that the config adds."""
    lower = name.lower()
    if lower in SWE_BENCH or lower in MULTILINGUAL or lower in {m.lower() for m in more}:
        return f"{name} is a repository of a benchmark"
    known = next((FIRST_COMMITS[c] for c in first_commits if c in FIRST_COMMITS), None)
    return f"its first commit is that of {known}" if known else None


def excluded_package(name: str, more: tuple[str, ...] = ()) -> str | None:
    """Why a package is a benchmark's, by its name alone, or None."""
    plain = name.lower().replace("_", "-")
    if plain in PACKAGES or plain in {m.lower().rpartition("/")[2] for m in more}:
        return f"{name} is made from a repository of a benchmark"
    return None


def read_base_commits(path: str | None) -> frozenset[str]:
    """Base commits of benchmark instances from a JSONL file (key `base_commit`) or a text file of one SHA a line."""
    if path is None:
        return frozenset()
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
        found = [json.loads(line)["base_commit"] if line.startswith("{") else line for line in lines]
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(
            f"harvest: benchmark_commits cannot be read, got {e!r}; expected JSONL with base_commit, or one SHA a line"
        ) from e
    return frozenset(sha.lower() for sha in found)

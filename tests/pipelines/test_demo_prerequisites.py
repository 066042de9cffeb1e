"""What `make` says before it downloads anything: the check is run as make runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import BOUND_S

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / ".ci" / "check_prerequisites.py"


def check(path: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and output with PATH set to `path`, so that only the programs there are found."""
    done = subprocess.run(
        [sys.executable, str(CHECK), *arguments],
        env={"PATH": str(path)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND_S,
    )
    return done.returncode, done.stdout + done.stderr


def program(folder: Path, name: str, says: str = "") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    path.chmod(0o755)


def test_missing_java_is_advice_and_in_ci_a_failure(tmp_path: Path) -> None:
    status, text = check(tmp_path)
    assert status == 0
    assert "advised: java: got none, expected 17" in text
    assert "openjdk-17-jre-headless" in text
    status, text = check(tmp_path, CI="true")
    assert status == 1
    assert "missing: java" in text


@pytest.mark.parametrize(
    ("says", "version"),
    [('java version "1.8.0_392"', "8"), ('openjdk version "11.0.2" 2019-01-15', "11"), ("nonsense", "none")],
)
def test_old_java_is_named(tmp_path: Path, says: str, version: str) -> None:
    program(tmp_path, "java", says)
    assert f"java: got {version}, expected 17" in check(tmp_path)[1]


def test_new_java_is_accepted_also_by_its_home(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "java", 'openjdk version "21" 2023-09-19')
    assert check(tmp_path / "bin", CI="true")[0] == 0
    assert check(tmp_path, CI="true", JAVA_HOME=str(tmp_path))[0] == 0


def test_missing_compiler_names_the_wheel(tmp_path: Path) -> None:
    status, text = check(tmp_path)
    assert status == 0
    assert "fasttext-wheel" in text
    assert check(tmp_path, "--compiler")[0] == 1


def test_download_is_announced_until_the_environment_stands(tmp_path: Path) -> None:
    stamp = tmp_path / "ready"
    assert "will download" in check(tmp_path, "--plan", str(stamp))[1]
    stamp.touch()
    assert "will download" not in check(tmp_path, "--plan", str(stamp))[1]


def test_constraints_pin_torch_without_a_local_suffix() -> None:
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(name and version and "+" not in version for name, _, version in (x.partition("==") for x in lines))
    assert len(lines) == len({x.partition("==")[0].lower() for x in lines})


@pytest.mark.parametrize("target", ["demo", "test", "bench", "soak"])
def test_every_target_checks_first(target: str) -> None:
    outside = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))
    }  # this may run in `make test`
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, env=outside, capture_output=True, text=True, check=True, timeout=BOUND_S
    )
    assert "check_prerequisites.py --plan" in done.stdout.splitlines()[0]

"""kill -9 at any moment, another number of workers, files made in another order: the same bytes as an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.pipelines.small_pipeline import (
    JUDGED,
    command,
    environment,
    leftovers,
    pipelines,
    scratch,
    state,
    texts,
    write_config,
    write_jsonl,
)

DOCS, FILES = 1500, 6
GONE_S = 30.0  # a worker that outlives its driver by this has not noticed


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_jsonl(folder, texts(DOCS), FILES)
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> tuple[dict[str, str], float]:
    """What a run that nothing happened to leaves, and how long it took (to draw the moments of kills from)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "p.yaml", JUDGED, root=folder / "root", workers=2, source=source)
    began = time.monotonic()
    ran = pipelines("run", "all", "-c", config)
    took_s = time.monotonic() - began
    assert (ran.code, ran.err) == (0, "")
    assert leftovers(folder / "root") == []
    return state(folder / "root"), took_s


def started(config: Path) -> subprocess.Popen[bytes]:
    """The run as leader of a process group of its own."""
    return subprocess.Popen(
        command("run", "all", "-c", config),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_driver(process: subprocess.Popen[bytes]) -> None:
    """Only the driver; its workers must notice and go by themselves."""
    children = family(process)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=GONE_S)
    assert not alive


def kill_worker(process: subprocess.Popen[bytes]) -> None:
    """One worker; the run must go on without it."""
    workers = [child for child in family(process) if "spawn_main" in " ".join(child.cmdline())]
    if workers:
        workers[0].kill()


def disturb(config: Path, kill, delays: list[float]) -> int:
    """Start the run and `kill` after each delay; the number of runs that were ended by it."""
    ended = 0
    for delay in delays:
        process = started(config)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            kill(process)
        ended += process.wait() != 0
    return ended


def disturbed(config: Path, kill, draw: random.Random, took_s: float, kills: int) -> None:
    """Kill a run `kills` times, then let it end; what is committed is whole at any moment."""
    delays = [draw.uniform(0.1, 0.9) * took_s for _ in range(kills)]
    ended = disturb(config, kill, delays)
    assert ended == 0 if kill is kill_worker else ended <= kills
    assert pipelines("check", "-c", config, "--content").code == 0
    ran = pipelines("run", "all", "-c", config)
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize(("kill", "kills"), [(kill_group, 2), (kill_driver, 2), (kill_worker, 1)])
def test_a_killed_run_goes_on_to_the_same_bytes(kill, kills, source, undisturbed, tmp_path):
    expected, took_s = undisturbed
    config = write_config(tmp_path / "p.yaml", JUDGED, root=tmp_path / "root", workers=2, source=source)
    disturbed(config, kill, random.Random(kill.__name__), took_s, kills)
    assert state(tmp_path / "root") == expected
    assert scratch(tmp_path / "root") == []


@pytest.mark.soak
def test_many_killed_runs_go_on_to_the_same_bytes(source, undisturbed, tmp_path, soak):
    expected, took_s = undisturbed
    for number in range(int(soak)):
        draw = random.Random(number)
        config = write_config(
            tmp_path / f"{number}.yaml",
            JUDGED,
            root=tmp_path / f"{number}",
            workers=draw.choice([1, 2, 3]),
            source=source,
        )
        disturbed(config, draw.choice([kill_group, kill_driver]), draw, took_s, kills=3)
        assert state(tmp_path / f"{number}") == expected
        shutil.rmtree(tmp_path / f"{number}")


@pytest.mark.parametrize("workers", [1, 5])
def test_workers_and_the_order_in_which_files_were_made_change_nothing(workers, undisturbed, tmp_path):
    write_jsonl(tmp_path / "source", texts(DOCS), FILES, order=workers)
    config = write_config(
        tmp_path / "p.yaml", JUDGED, root=tmp_path / "root", workers=workers, source=tmp_path / "source"
    )
    ran = pipelines("run", "all", "-c", config)
    assert (ran.code, ran.err) == (0, "")
    assert state(tmp_path / "root") == undisturbed[0]

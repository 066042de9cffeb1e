"""Disks that are full, or cannot be written: one line that says which path and what to do, and the next run ends the same.

A small tmpfs is mounted where that is allowed. Elsewhere a limit on the size of files stands in: the same calls fail with EFBIG.
"""

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from core.hashing import seeded
from tests.bounds import BOUND_S
from tests.faults.strikes import different, tree
from tests.pipelines.small_pipeline import Ran, environment, leftovers

WAIT_S = 120.0
ROUNDS = 0.3  # of drawn sizes, times the soak: none in `make test`, which has sizes of its own


class SmallDisk:
    """A file system of its own at `folder`, or only the promise of a limit."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.options = folder, ""
        folder.mkdir()
        self.mounted = self._mount("size=1m")

    def _mount(self, options: str) -> bool:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(self.folder)], capture_output=True, timeout=BOUND_S
        )
        return done.returncode == 0

    def change(self, options: str) -> bool:
        return (
            subprocess.run(
                ["mount", "-o", f"remount,{options}", str(self.folder)], capture_output=True, timeout=BOUND_S
            ).returncode
            == 0
        )

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True, timeout=BOUND_S)


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk")
    yield made
    made.close()


def files_end_at(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def run(config: Path, file_limit: int | None = None) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.roomy", "run", "all", "-c", str(config)],
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=partial(files_end_at, file_limit) if file_limit else None,
        timeout=WAIT_S * 3,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def fails_and_goes_on(undisturbed, disk: SmallDisk, config: Path, options: str, file_limit: int, says: str) -> None:
    if disk.mounted:
        assert disk.change(options)
    ran = run(config, None if disk.mounted else file_limit)
    assert (ran.code, len(ran.err.strip().splitlines())) == (1, 1), ran.err
    assert f"cannot write {disk.folder}" in ran.err
    assert says in ran.err
    assert "then run again" in ran.err
    assert not list(disk.folder.rglob("*.tmp"))
    assert not list(disk.folder.rglob("locks/*.json"))
    if disk.mounted:
        assert disk.change("size=100m,nr_inodes=100000")
    ran = run(config)
    assert (ran.code, ran.err) == (0, "")
    assert different(tree(disk.folder / "root"), undisturbed.tree) == []
    assert leftovers(disk.folder / "root") == []


@pytest.mark.parametrize(
    ("options", "file_limit", "says"),
    [
        ("size=420k", 16_000, "error: "),  # what a shuffle exchanges
        ("size=100m,nr_inodes=12", 100, "error: root: "),  # no room for another name, from the first lock on
    ],
    ids=["exchange", "names"],
)
def test_a_full_disk_is_one_line_and_the_next_run_ends_the_same(undisturbed, disk, options, file_limit, says):
    fails_and_goes_on(
        undisturbed, disk, undisturbed.config(disk.folder.parent, folder=disk.folder), options, file_limit, says
    )


def test_a_full_root_beside_a_roomy_scratch(undisturbed, disk, tmp_path):
    """What fails here is a layer, since the exchange lies elsewhere."""
    config = undisturbed.config(tmp_path, folder=disk.folder, scratch=tmp_path / "scratch")
    fails_and_goes_on(undisturbed, disk, config, "size=300k", 9_000, "/layers/")


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_disks_of_any_size(undisturbed, disk, tmp_path, soak):
    if not disk.mounted:
        pytest.skip("needs the right to mount a tmpfs")
    for seed in range(int(ROUNDS * soak)):
        kilobytes = 4 + int(640 * seeded(seed, "size"))
        config = undisturbed.config(tmp_path, folder=disk.folder)
        fails_and_goes_on(undisturbed, disk, config, f"size={kilobytes}k", 0, "error: ")
        subprocess.run(["rm", "-rf", str(disk.folder / "root")], check=True, timeout=BOUND_S)


def test_a_read_only_root_is_refused_before_anything_is_done(undisturbed, disk, tmp_path):
    if not disk.mounted:
        pytest.skip("needs the right to mount a tmpfs")
    assert disk.change("ro")
    ran = run(undisturbed.config(tmp_path, folder=disk.folder))
    assert ran.code == 2
    assert ran.err.startswith(f"error: root: cannot write below {disk.folder}")
    assert len(ran.err.splitlines()) == 1
    assert not list(disk.folder.iterdir())


def test_a_root_that_becomes_read_only_is_one_error_and_the_next_run_goes_on(undisturbed, disk, tmp_path):
    if not disk.mounted:
        pytest.skip("needs the right to mount a tmpfs")
    assert disk.change("size=100m")
    config = undisturbed.config(tmp_path, folder=disk.folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.roomy", "run", "all", "-c", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    end = time.monotonic() + WAIT_S
    while process.poll() is None and not (disk.folder / "root/manifests").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    while process.poll() is None and not disk.change("ro"):  # refused while a file is open for writing
        time.sleep(0.001)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "Read-only file system" in err
    assert disk.change("rw")
    ran = run(config)
    assert (ran.code, ran.err) == (0, "")
    assert different(tree(disk.folder / "root"), undisturbed.tree) == []

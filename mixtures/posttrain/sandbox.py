"""A process of its own for code that nobody has read: no network, no other process, a memory, time and output limit.

In: Python source, standard input, `Limits`. Out: `Ran` (how it ended, what it printed). Each run is `python -I -S -B` in a
new folder, session and process group, with an empty environment and no file descriptors but the named pipes; the standard
library is there, installed packages are not. About 40 ms a run.

What stops what, on Linux x86-64 and arm64 (kernel 5.13 and later):
- seccomp: creating sockets (any family, io_uring too; a connected pair of streams is allowed, which asyncio needs) and
  processes; signalling, tracing, slowing or reading other processes; queues and shared memory that would outlive the run;
  changing owner, mode, times or attributes of files.
- Landlock: reading outside the interpreter and the system's libraries (so no home folder, no /proc, no environment of the
  parent), writing outside the run's folder.
- rlimits: address space, CPU seconds, size of one file, open files. The parent: wall-clock time (SIGKILL to the group), bytes
  of output.

What it does not stop: a hole in the kernel; covert channels such as timing; many files of the allowed size in the run's
folder; threads (the address space bounds them); reading what lies below /usr; asking whether a file is there and how large
(stat). `protections()` says which of the two strong
walls stand on this machine. Without seccomp (another processor, a container that forbids it) Python names are blocked
instead, which determined code undoes; without Landlock the run may read and write what this user may. Both then need a
container around this process.
"""

import contextlib
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

CHUNK = 1 << 16
GRACE_S = 2.0  # for the interpreter to start and end beyond the limit of the code itself


@dataclass(frozen=True)
class Limits:
    """What one run may use. Chosen, after the usual limits of programming contests."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20  # standard output and error together
    file_bytes: int = 16 << 20
    processes: int = 64  # only counts where seccomp is missing


@dataclass(frozen=True)
class Ran:
    """How a run ended. `ended`: 'exit', 'signal', 'timeout' or 'output' (it printed more than it may)."""

    ended: str
    code: int
    out: bytes
    err: bytes

    @property
    def ok(self) -> bool:
        return self.ended == "exit" and self.code == 0


@functools.cache
def _confined() -> str:
    return resources.files("mixtures.posttrain").joinpath("confined.py").read_text("utf-8")


@functools.cache
def protections() -> dict[str, bool]:
    """{"files": Landlock is in force, "calls": seccomp is in force} on this machine, found out by one run."""
    with folder() as place:
        Path(place, "program.py").write_text("", "utf-8")
        ran = watch(start("probe", place, Limits()), Limits())
    found = json.loads(ran.out) if ran.ok else {}
    return {"files": bool(found.get("files")), "calls": bool(found.get("calls"))}


def run_program(source: str, stdin: bytes = b"", limits: Limits | None = None) -> Ran:
    """Run `source` as a program with `stdin` as its standard input."""
    limits = limits or Limits()
    with folder() as place:
        Path(place, "program.py").write_text(source, "utf-8", errors="replace")
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            return watch(start("program", place, limits, stdin=given), limits)


def run_tests(source: str, tests: Sequence[str], limits: Limits | None = None) -> list[str]:
    """`pass` or `fail ...` for each test. The candidate's functions run in one sandbox, the tests in another: they call
    through a pipe and exchange plain data, so the candidate sees arguments only, never a test or the code that judges it."""
    limits = limits or Limits()
    with folder() as place, folder() as other, contextlib.ExitStack() as stack:
        ask, reply, result = os.pipe(), os.pipe(), os.pipe()
        fds = [*ask, *reply, *result]
        stack.callback(_close, fds)
        served = start("serve", place, limits, fds=(ask[0], reply[1]), quiet=True)
        stack.callback(lambda: _end(served))
        checker = start("check", other, limits, fds=(reply[0], ask[1], result[1]), quiet=True)
        stack.callback(lambda: _end(checker))
        _close((*ask, *reply, result[1]))
        _feed(served, source.encode("utf-8", "replace"))
        _feed(checker, json.dumps(list(tests)).encode())
        said = _read_all(result[0], time.monotonic() + limits.wall_s + GRACE_S, limits.output_bytes)
    lines = said.decode("utf-8", "replace").split("\n")[:-1][: len(tests)]
    return lines + ["fail no answer in time"] * (len(tests) - len(lines))


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """An empty folder for one run, removed whatever the run left in it."""
    place = os.path.realpath(tempfile.mkdtemp(prefix="stepwell-sandbox-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def start(
    mode: str, place: str, limits: Limits, fds: Sequence[int] = (), quiet: bool = False, stdin: Any = subprocess.PIPE
) -> "subprocess.Popen[bytes]":
    """A confined interpreter in `place`. Its standard streams are pipes, or with `quiet` its output goes nowhere."""
    options: dict[str, Any] = {
        "mode": mode,
        "folder": place,
        "fds": list(fds),
        "memory_bytes": limits.memory_bytes,
        "cpu_s": limits.cpu_s,
        "file_bytes": limits.file_bytes,
        "processes": limits.processes,
    }
    out = subprocess.DEVNULL if quiet else subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _confined(), json.dumps(options)],
        cwd=place,
        env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
        stdin=stdin,
        stdout=out,
        stderr=out,
        close_fds=True,
        pass_fds=tuple(fds),
        start_new_session=True,
    )


def watch(process: "subprocess.Popen[bytes]", limits: Limits) -> Ran:
    """Read what the process prints until it ends or passes a limit."""
    assert process.stdout
    assert process.stderr
    deadline = time.monotonic() + limits.wall_s + GRACE_S
    streams = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    ended = ""
    with selectors.DefaultSelector() as selector:
        for fd in streams:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and not ended:
            left = deadline - time.monotonic()
            for key, _ in selector.select(max(0.0, left)):
                if data := os.read(key.fd, CHUNK):
                    streams[key.fd] += data
                else:
                    selector.unregister(key.fd)
            if sum(map(len, streams.values())) > limits.output_bytes:
                ended = "output"
            elif left <= 0:
                ended = "timeout"
    out, err = (bytes(b) for b in streams.values())
    code = _end(process, 0.0 if ended else deadline)
    if not ended:
        ended = "timeout" if code is None else "signal" if code < 0 else "exit"
    return Ran(ended, -signal.SIGKILL if code is None else code, out, err)


def _feed(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    """Give a process that reads all of its input before anything else that input."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError), process.stdin as f:
        f.write(data)


def _read_all(fd: int, deadline: float, most: int) -> bytes:
    """What comes from `fd` until its writers are gone, the deadline, or `most` bytes."""
    said = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while len(said) < most and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                data = os.read(fd, CHUNK)
                if not data:
                    break
                said += data
    return bytes(said)


def _end(process: "subprocess.Popen[bytes]", deadline: float = 0.0) -> int | None:
    """Wait until the deadline, then kill the whole group. The exit status; None where it had to be killed."""
    try:
        code: int | None = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    return code


def _close(fds: Sequence[int]) -> None:
    """Close what is still open."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)

"""Runs in the process of a sandbox, before and around foreign code. Started as source text (`python -I -S -B -c`), so it
imports the standard library only and nothing of this project. See `mixtures.posttrain.sandbox` for what it promises.

argv: a JSON object with `mode` and the limits. Modes: `probe` prints what is in force; `program` runs `program.py`; `serve`
runs it and then answers calls of its functions on two file descriptors; `check` runs tests whose unknown names are such
functions.
"""

import ast
import builtins
import ctypes
import json
import os
import platform
import resource
import struct
import sys
from pathlib import Path
from typing import Any, TextIO

# Syscall numbers from the kernel's tables (unistd_64.h, asm-generic/unistd.h). Denied, in this order: new processes, sockets and
# io_uring, signals to and memory of other processes, namespaces, mounts; priority and processors of other processes; System V
# and POSIX queues and shared memory (they outlive the run), keyrings; owners, modes, times and attributes of files, of which
# Landlock knows nothing, and truncation by path, which its first versions lack. `clone` is let through for threads only.
SYSCALLS = {
    "x86_64": (
        0xC000003E,
        56,
        (
            *(41, 57, 58, 62, 101, 129, 165, 200, 234, 272, 297, 298, 308, 310, 311, 424, 425, 434, 435, 438),
            *(141, 142, 144, 203, 251, 314),
            *(29, 64, 68, 240, 248, 249, 250),
            *(76, 90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280, 452, 463, 466),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (
            *(40, 97, 117, 129, 130, 131, 138, 198, 240, 241, 268, 270, 271, 424, 425, 434, 435, 438),
            *(30, 118, 119, 122, 140, 274),
            *(180, 186, 190, 194, 217, 218, 219),
            *(5, 6, 7, 14, 15, 16, 45, 52, 53, 54, 55, 88, 452, 463, 466),
        ),
    ),
}
ANY = 0xFFFFFFFF
# Numbers by processor, which argument, which of its bits, values, whether these alone are allowed or these alone denied.
ARGUMENTS = (
    (
        {"x86_64": 72, "aarch64": 25},
        1,
        ANY,
        (8, 10, 15),
        False,
    ),  # fcntl SETOWN, SETSIG, SETOWN_EX: signals sent by proxy
    ({"x86_64": 16, "aarch64": 29}, 1, ANY, (0x8901, 0x8902), False),  # ioctl FIOSETOWN, SIOCSPGRP: the same
    (
        {"x86_64": 53, "aarch64": 199},
        1,
        0xF,
        (1,),
        True,
    ),  # socketpair of streams (asyncio); a datagram's reaches any socket
    ({"x86_64": 302, "aarch64": 261}, 0, ANY, (0,), True),  # prlimit of itself
)
CLONE3, CLONE_THREAD, X32 = 435, 0x00010000, 0x40000000
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
LOAD, AND, RETURN, IF_EQUAL, IF_ABOVE, IF_SET = (
    0x20,
    0x54,
    0x06,
    0x15,
    0x35,
    0x45,
)  # BPF: operation, jump if so, if not, value
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_RIGHTS = 1 | 4 | 8  # execute, read file, read folder
# write, remove, make folders and files, truncate
WRITE_RIGHTS = READ_RIGHTS | 2 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14
LIBC = ctypes.CDLL(None, use_errno=True)


def limit(limits: dict[str, Any]) -> None:
    """Resource limits; each as low as the system lets it be."""
    wanted = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in wanted.items():
        lower(name, most)


def lower(name: int, most: int) -> None:
    """One limit, no higher than what is allowed here."""
    hard = resource.getrlimit(name)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(name, (most, most))


def restrict_files(folder: str) -> bool:
    """Landlock: reading the interpreter and the system's libraries, writing below `folder`, nothing else. False: no
    Landlock."""
    version = LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    handled = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    rules = LIBC.syscall(LANDLOCK_CREATE, struct.pack("Q", handled), 8, 0)
    if rules < 0:
        return False
    readable = [
        "/usr",
        "/lib",
        "/lib64",
        "/dev/urandom",
        "/dev/null",
        os.path.dirname(os.__file__),
        sys.base_prefix + "/lib",
    ]
    for path, rights in [*((p, READ_RIGHTS) for p in readable), ("/dev/null", 2 | 4), (folder, WRITE_RIGHTS)]:
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= 1 | 2 | 4 | 1 << 14
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        LIBC.syscall(LANDLOCK_ADD, rules, 1, struct.pack("<Qi", rights & handled, fd), 0)
        os.close(fd)
    done = LIBC.syscall(LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return done


def restrict_calls() -> bool:
    """seccomp: the syscalls above fail with EPERM. False: no seccomp, or a processor that the table does not list."""
    if platform.machine() not in SYSCALLS or struct.calcsize("P") != 8:
        return False
    audit, clone, denied = SYSCALLS[platform.machine()]
    code = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, audit), (RETURN, 0, 0, EPERM)]  # word 4: the architecture
    code += [(LOAD, 0, 0, 0), (IF_ABOVE, 0, 1, X32), (RETURN, 0, 0, EPERM)]  # word 0: the syscall's number
    for number in denied:
        code += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ENOSYS if number == CLONE3 else EPERM)]
    for numbers, place, bits, values, alone in ARGUMENTS:
        listed, others = (ALLOW, EPERM) if alone else (EPERM, ALLOW)
        code += [(IF_EQUAL, 0, 2 * len(values) + 3, numbers[platform.machine()])]
        code += [(LOAD, 0, 0, 16 + 8 * place), (AND, 0, 0, bits)]
        code += [line for value in values for line in ((IF_EQUAL, 0, 1, value), (RETURN, 0, 0, listed))]
        code += [(RETURN, 0, 0, others)]
    code += [(IF_EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (IF_SET, 1, 0, CLONE_THREAD), (RETURN, 0, 0, EPERM)]
    code += [(RETURN, 0, 0, ALLOW)]
    packed = b"".join(struct.pack("HBBI", *line) for line in code)
    held = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(held))
    return LIBC.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0


def block_in_python() -> None:
    """Where seccomp is missing: names that start processes or open sockets raise. Foreign code that wants to can undo this."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("not allowed in this sandbox")

    import _posixsubprocess
    import _socket
    import socket
    import subprocess

    names = ((_socket, "socket"), (socket, "socket"), (socket, "create_connection"))
    for module, name in (*names, (_posixsubprocess, "fork_exec"), (subprocess, "Popen")):
        setattr(module, name, refuse)
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "kill", "killpg"):
        setattr(os, name, refuse)


def confine(options: dict[str, Any]) -> dict[str, bool]:
    """All restrictions, weakest first. Returns which of the two strong ones are in force."""
    LIBC.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: nobody is left behind when the checker dies
    limit(options)
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which the two below require
    files = restrict_files(options["folder"])
    calls = restrict_calls()
    if not calls:  # this limit counts all that the user runs, so with seccomp it would only make runs depend on that
        lower(resource.RLIMIT_NPROC, options["processes"])
        block_in_python()
    return {"files": files, "calls": calls}


# Values cross between candidate and tests as tagged JSON: plain data only, never pickled objects.

BY_TAG = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind in (float, complex):
        return {kind.__name__: repr(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [encode(v) for v in value]}
    if kind is dict:
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    raise TypeError(f"a value of type {kind.__name__} is no plain data")


def decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag in ("float", "complex"):
        return {"float": float, "complex": complex}[tag](inner)
    if tag == "bytes":
        return bytes.fromhex(inner)
    if tag == "dict":
        return {decode(k): decode(v) for k, v in inner}
    return BY_TAG[tag](decode(v) for v in inner)


def serve(source: str, read_fd: int, write_fd: int) -> None:
    """Run the candidate, then answer [name, arguments, keywords] with [value or null, error or null, arguments after the
    call]."""
    space: dict[str, Any] = {"__name__": "candidate"}
    error: list[str] | None = None
    try:
        exec(compile(source, "candidate.py", "exec"), space)
    except BaseException as e:  # noqa: BLE001 - SystemExit too: whatever it does is the answer
        error = [type(e).__name__, str(e)[:300]]
    with os.fdopen(read_fd, "r", encoding="utf-8") as calls, os.fdopen(write_fd, "w", encoding="utf-8") as replies:
        for line in calls:
            name, positional, named = json.loads(line)
            reply: list[Any] = [None, error, []]
            if error is None:
                positional = [decode(v) for v in positional]
                try:
                    value = space[name](*positional, **{k: decode(v) for k, v in named.items()})
                    reply = [encode(value), None, [encode(v) for v in positional]]
                except BaseException as e:  # noqa: BLE001 - as above
                    reply = [None, [type(e).__name__, str(e)[:300]], []]
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


class Remote:
    """A function of the candidate, called in the other process. Lists, dicts and sets that it changed are changed here too."""

    def __init__(self, name: str, calls: TextIO, replies: TextIO) -> None:
        self.name, self.calls, self.replies = name, calls, replies

    def __call__(self, *positional: Any, **named: Any) -> Any:
        request = [self.name, [encode(v) for v in positional], {k: encode(v) for k, v in named.items()}]
        self.calls.write(json.dumps(request) + "\n")
        self.calls.flush()
        line = self.replies.readline()
        if not line:
            raise ConnectionError("the candidate has ended")
        value, error, after = json.loads(line)
        if error is not None:
            kind = getattr(builtins, error[0], None)
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(error[1])
        for mine, theirs in zip(positional, map(decode, after), strict=False):
            if isinstance(mine, list):
                mine[:] = theirs
            elif isinstance(mine, (dict, set)):
                mine.clear()
                mine.update(theirs)
        return decode(value)


def check(tests: list[str], read_fd: int, write_fd: int, result_fd: int) -> None:
    """Run each test; a line `pass` or `fail ...` for each on `result_fd`. No code of the candidate runs in this process."""
    with (
        os.fdopen(write_fd, "w", encoding="utf-8") as calls,
        os.fdopen(read_fd, "r", encoding="utf-8") as replies,
        os.fdopen(result_fd, "w", encoding="utf-8") as results,
    ):
        for test in tests:
            try:
                tree = ast.parse(test)
                stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
                loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - stored
                space = {n: Remote(n, calls, replies) for n in loaded if not hasattr(builtins, n)}
                exec(compile(tree, "test.py", "exec"), {**space, "__name__": "test"})
                results.write("pass\n")
            except BaseException as e:  # noqa: BLE001 - a test may raise anything
                results.write(f"fail {type(e).__name__}: {e}"[:300].replace("\n", " ") + "\n")
            results.flush()


def main() -> None:
    options = json.loads(sys.argv[1])
    source = sys.stdin.read() if options["mode"] in ("serve", "check") else Path("program.py").read_text("utf-8")
    in_force = confine(options)
    if options["mode"] == "probe":
        sys.stdout.write(json.dumps(in_force))
    elif options["mode"] == "serve":
        serve(source, *options["fds"])
    elif options["mode"] == "check":
        check(json.loads(source), *options["fds"])
    else:
        sys.argv = ["program.py"]
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__", "__builtins__": builtins})


main()

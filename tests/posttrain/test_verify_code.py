"""The code verifier and its sandbox, under real attacks. What only a kernel feature stops is skipped where that is missing."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.errors import InputError
from mixtures.posttrain.sandbox import Limits, protections, run_program, run_tests
from mixtures.posttrain.verify_code import candidate_of, code_reward, same_output
from tests.bounds import BOUND_S

REPO = Path(__file__).resolve().parents[2]
SHORT = Limits(wall_s=1.0, cpu_s=1)  # for what is meant to run into a limit


def needs(wall: str) -> None:
    if not protections()[wall]:
        pytest.skip(f"this machine's kernel or container has no such wall: {wall}")


def test_a_program_reads_and_prints() -> None:
    ran = run_program("print(int(input()) ** 2)", b"12\n")
    assert (ran.ended, ran.code, ran.out, ran.err) == ("exit", 0, b"144\n", b"")


def test_an_endless_loop_ends() -> None:
    assert run_program("while True: pass", limits=SHORT).ended in ("timeout", "signal")
    assert run_program("import time; time.sleep(600)", limits=SHORT).ended == "timeout"


def test_memory_is_bounded() -> None:
    ran = run_program("x = bytearray(10 << 30); print(len(x))")
    assert not ran.ok
    assert b"MemoryError" in ran.err


def test_output_is_bounded() -> None:
    ran = run_program("import sys\nwhile True: sys.stdout.write('x' * 65536)", limits=Limits(output_bytes=1 << 20))
    assert ran.ended == "output"
    assert len(ran.out) < 2 << 20


def test_a_file_is_bounded_and_its_folder_is_gone_afterwards() -> None:
    ran = run_program("import os\nprint(os.getcwd())\nopen('f', 'wb').write(bytes(64 << 20))")
    assert not ran.ok
    assert not Path(ran.out.decode().strip()).exists()


@pytest.mark.parametrize(
    "source",
    [
        "import socket; socket.create_connection(('127.0.0.1', PORT), 2)",
        "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "import socket; socket.socket(socket.AF_UNIX)",
    ],
)
def test_no_network(source: str) -> None:
    """A server really listens, so that only the sandbox can be what refuses."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        ran = run_program(source.replace("PORT", str(server.getsockname()[1])))
    assert not ran.ok
    assert b"PermissionError" in ran.err


@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.system('true') and exit(1)",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.fork() < 0\nraise PermissionError",
    ],
)
def test_no_processes(source: str) -> None:
    needs("calls")
    assert not run_program(source).ok


def test_the_caller_cannot_be_signalled() -> None:
    needs("calls")
    ran = run_program("import os; os.kill(os.getppid(), 9)")
    assert b"PermissionError" in ran.err


@pytest.mark.parametrize(
    "source",
    [
        "import ctypes, struct\ncall = ctypes.CDLL(None).syscall\n"
        "call(SIGQUEUE, PID, 9, struct.pack('iiii', 9, 0, -1, 0) + bytes(112))",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 8, PID)\nfcntl.fcntl(r, 10, 9)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | fcntl.fcntl(r, fcntl.F_GETFL))\nos.write(w, b'x')",
        "import resource; resource.prlimit(PID, resource.RLIMIT_NOFILE, (5, 5))",
        "import os; os.setpriority(os.PRIO_PROCESS, PID, 19)",
    ],
)
def test_no_other_process_is_signalled_or_slowed_by_a_detour(source: str) -> None:
    """What `kill` has siblings for. The victim is a process of this user that waits for its standard input."""
    needs("calls")
    code = "import os, sys, resource as r; sys.stdin.read(); print(os.nice(0), r.getrlimit(r.RLIMIT_NOFILE)[0] > 5)"
    queue = "129" if platform.machine() == "x86_64" else "138"
    with subprocess.Popen([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as victim:
        run_program(source.replace("SIGQUEUE", queue).replace("PID", str(victim.pid)))
        said = victim.communicate()[0].split()
    assert (victim.returncode, said) == (0, [str(os.nice(0)).encode(), b"True"])


@pytest.mark.parametrize(
    "call", ["chmod(PATH, 0o777)", "utime(PATH, (1, 1))", "setxattr(PATH, 'user.x', b'1')", "truncate(PATH, 0)"]
)
def test_files_outside_keep_their_mode_times_and_length(call: str, tmp_path: Path) -> None:
    needs("calls")
    path = tmp_path / "file"
    path.write_text("hunter2")
    path.chmod(0o600)
    before = path.stat()
    ran = run_program(f"import os; os.{call.replace('PATH', repr(str(path)))}")
    assert b"PermissionError" in ran.err
    assert path.stat() == before


def test_nothing_is_left_behind_and_no_local_socket_is_reached() -> None:
    needs("calls")
    assert run_program("import ctypes; print(ctypes.CDLL(None).shmget(0, 4096, 0o1600))").out == b"-1\n"
    assert not run_program("import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)").ok
    ran = run_program("import asyncio; asyncio.run(asyncio.sleep(0)); print('done')")  # a pair of streams is harmless
    assert ran.out == b"done\n", ran.err


def test_without_seccomp_names_are_blocked_in_python() -> None:
    """The weaker wall, in a process of its own: what honest code calls by mistake is refused."""
    source = (REPO / "mixtures" / "posttrain" / "confined.py").read_text("utf-8").removesuffix("main()\n")
    calls = ("socket.socket()", "os.fork()", "os.system('true')", "subprocess.run(['true'])")
    tries = f"for f in ({', '.join(f'lambda: {c}' for c in calls)}):"
    source += f"block_in_python()\nimport socket, subprocess\n{tries}\n"
    source += "    try: f(); print('ran')\n    except PermissionError: pass"
    done = subprocess.run([sys.executable, "-I", "-c", source], capture_output=True, text=True, timeout=BOUND_S)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_threads_are_bounded() -> None:
    source = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    assert not run_program(source, limits=SHORT).ok


def test_environment_and_descriptors_are_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    held = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(held, True)
    source = "import os\nprint(sorted(os.environ))\n"
    source += "for fd in range(3, 64):\n  try: os.fstat(fd); print(fd)\n  except OSError: pass"
    try:
        ran = run_program(source)
    finally:
        os.close(held)
    assert ran.out.decode().split("\n") == ["['LC_ALL', 'PYTHONHASHSEED']", ""]


def test_files_outside_cannot_be_written_or_read(tmp_path: Path) -> None:
    needs("files")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for source in (
        f"open({str(tmp_path / 'evil')!r}, 'w')",
        f"print(open({str(secret)!r}).read())",
        f"import os; os.symlink({str(secret)!r}, 'link'); print(open('link').read())",
        "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
        "print(open('/etc/passwd').read())",
    ):
        ran = run_program(source)
        assert not ran.ok, source
        assert b"PermissionError" in ran.err
        assert b"hunter2" not in ran.out
    assert not (tmp_path / "evil").exists()


def test_tests_give_the_share_that_passes() -> None:
    tests = ["assert f(1) == 2", "assert f(2) == 5", "assert f(3) == 4", "assert f('a') == 1"]
    reward, said = code_reward("```python\ndef f(x):\n    return x + 1\n```", tests)
    assert reward == 0.5
    assert [s == "pass" for s in said] == [True, False, True, False]
    assert "AssertionError" in said[1]


def test_tests_see_values_exceptions_and_changed_arguments() -> None:
    source = (
        "def same(x): return x\n"
        "def fails(): raise ValueError('no')\n"
        "def put(l, d, s): l.append(1); d['k'] = (1, b'x'); s.clear()\n"
    )
    values = [None, True, 10**50, 1.5, float("inf"), "ü\ud83d", b"\x00", [1, (2,)], {1: {2}}, frozenset({3}), 1 + 2j]
    tests = [f"assert same({v!r}) == {v!r}" for v in values if v != float("inf")]
    tests += [
        "assert same(float('inf')) == float('inf') and type(same((1,))) is tuple",
        "try:\n    fails()\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False",
        "l, d, s = [], {}, {1}\nput(l, d, s)\nassert (l, d, s) == ([1], {'k': (1, b'x')}, set())",
        "def check(candidate):\n    assert candidate(3) == 3\ncheck(same)",
    ]
    assert run_tests(source, tests) == ["pass"] * len(tests)


CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "exit when called": "import sys\ndef f(x): sys.exit(0)",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "equal subclass": "class I(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return I(0)",
    "patched builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.compile = lambda *a: None\ndef f(x): return 0",
    "prints pass": "print('pass\\n' * 99)\ndef f(x): print('pass'); return 0",
    "writes to every descriptor": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'pass\\n' * 99)\n    except OSError: pass\ndef f(x): return 0"
    ),
    "reads the tests": (
        "import sys, gc\ndef f(x):\n    found = [o for o in gc.get_objects() if isinstance(o, str) and 'assert f' in o]\n"
        "    found += [a for a in sys.argv if 'assert f' in a]\n    return 2 if found else 0"
    ),
    "replaces the loop": "import sys\nsys._getframe(1).f_globals['encode'] = lambda v: {'all': v}\ndef f(x): return 0",
    "no such function": "x = 1",
    "a syntax error": "def f(x: return",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes_a_test(name: str) -> None:
    assert code_reward(CHEATS[name], ["assert f(1) == 2", "assert f(2) == 3"])[0] == 0.0


def test_a_candidate_that_hangs_costs_its_time_only() -> None:
    said = run_tests("def f(x):\n    while True: pass", ["assert f(1) == 2", "assert True"], SHORT)
    assert said[0].startswith("fail")


def test_input_and_output_tests() -> None:
    tests = [{"stdin": "3\n", "stdout": "9"}, {"stdin": "-2\n", "stdout": "4\n"}, {"stdin": "x\n", "stdout": "0"}]
    reward, said = code_reward("Here:\n\n```py\nprint(int(input()) ** 2)  \n```\nDone.", tests)
    assert reward == pytest.approx(2 / 3)
    assert "ValueError" in said[2]
    assert code_reward("import sys; sys.exit(0)", tests)[0] == 0.0


def test_output_is_compared_without_trailing_white_space() -> None:
    assert same_output("a \nb\n\n", "a\nb")
    assert not same_output("a\n\nb", "a\nb")
    assert not same_output(" a", "a")


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\na = 1\n```\nor\n```python\nb = 2\n```", "b = 2\n"),
        ("```python\na = 1\n```\n```\noutput\n```", "a = 1\n"),
        ("```\na = 1\n```\n```bash\nls\n```", "a = 1\n"),
        ("~~~py\na = 1\n~~~", "a = 1\n"),
        ("```python\nunclosed", "```python\nunclosed"),
    ],
)
def test_the_program_in_a_response(response: str, program: str) -> None:
    assert candidate_of(response) == program


@pytest.mark.parametrize("tests", [[], [3], [{"stdin": "x"}], [""], [{"stdout": 3}]])
def test_records_without_usable_tests_are_refused(tests: list[Any]) -> None:
    with pytest.raises(InputError):
        code_reward("x = 1", tests)


def verify(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", "verify", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        timeout=BOUND_S,
    )


@pytest.mark.parametrize(("text", "lines"), [("", 0), ('{"id": "a", "verifier": "maths", "answer": "1"}\n[1]\n', 2)])
def test_the_command_fails_where_nothing_can_be_judged(tmp_path: Path, text: str, lines: int) -> None:
    path = tmp_path / "sampled.jsonl"
    path.write_text(text, "utf-8")
    done = verify(path)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, lines)
    assert f"verify: nothing to judge, got {lines} lines in {path}" in done.stderr


def test_the_command_scores_a_file(tmp_path: Path) -> None:
    records = [
        {"id": "a", "verifier": "maths", "answer": "1/2", "responses": [r"\boxed{0.5}", "0.5"]},
        {
            "id": "b",
            "verifier": "code",
            "tests": ["assert f(1) == 2", "assert f(2) == 4"],
            "response": "def f(x): return x + 1",
        },
        {"id": "c", "verifier": "judge", "response": "x"},
        {"id": "d", "verifier": "maths", "answer": "1"},
    ]
    path = tmp_path / "sampled.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n[1]\n{torn", "utf-8")
    done = verify(path)
    assert done.returncode == 0, done.stderr
    assert "4 of 6 lines could not be judged" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {"id": "a", "verifier": "maths", "rewards": [1.0, 0.0], "detail": ["equal", "no marked answer"]}
    assert lines[1]["rewards"] == [0.5]
    assert [set(line) for line in lines[2:]] == [{"line", "error"}] * 4
    assert "judge" in lines[2]["error"]

"""The server under load: streams of OpenAI's own client against `python -m moe.server` with 32 slots.

    python -m benchmarks.gpu.serving RUN_FOLDER [--clients 1 8 32] [--speculate K] [--seconds 5] [--device cuda] [--out OUT]

RUN_FOLDER is a run of training with its tokenizer, or a hub folder, of a context of 1,024 tokens or more. Each client asks for
one streamed completion after another: 100 token ids drawn from the vocabulary, up to 128 new tokens at temperature 0.8. Clients
share four processes, so that reading events does not hold the server back: `client_cpu_fraction` of the busiest near 1 says that
it did. Under a minute for a model of 1 B parameters. Out:

    serving_server        seconds until the server answered, and until it had left after SIGTERM
    serving_<clients>     after a round of warming up: requests that ended within the seconds, the others cancelled; tokens_per_s
                          by the server's own count, all clients busy; median and 95th percentile of the time to a stream's
                          first part with text (first_) and between such parts (gap_), and the median time a token (token_ms)
                          of the answers that ended. A part is a token, or what a round of drafts gave; behind `--speculate`
                          the name ends in _drafts<K>
    serving_cancel        eight clients that leave after five parts of an answer of up to 768 tokens: what the server wrote, the
                          seconds until it runs nothing, and the tokens of half a second behind that
    serving_full          16 requests more than slots and queue hold, at once: how many got 429, and its Retry-After. More than
                          16 do, as all wait in the queue until the next step takes some

Needs starlette, uvicorn, openai and httpx.
"""

import argparse
import asyncio
import math
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.pool import Pool
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.errors import StageError
from core.hashing import seeded

if TYPE_CHECKING:
    from benchmarks.gpu.timing import Results

SLOTS, PROCESSES = 32, 4
PROMPT, NEW, LONG = 100, 128, 768
LEAVERS, LEFT_AFTER, BEYOND = 8, 5, 16
READY_S, IDLE_S, LEAVE_S = 120, 30, 30
LEAD_S = 0.5  # from handing out work to its begin, in which each process finds the server


@dataclass(frozen=True)
class Answer:
    """A stream as its client saw it."""

    parts_s: list[float]  # from asking to each part with text
    tokens: int | None = None  # by the server's last part; None: the client left, or was refused
    retry_after: str | None = None  # of a refusal


@dataclass(frozen=True)
class Work:
    """What the clients of one process do between two times of `time.monotonic`, which all processes share."""

    address: str
    words: Sequence[int]  # token ids that prompts are drawn from
    clients: Sequence[int]
    begin: float
    end: float | None = None  # answers are left there; None: they end by themselves
    most: int | None = None  # answers a client; None: until the end
    new: int = NEW
    leave_after: int | None = None  # parts


def ready(all_of_them: Barrier) -> None:
    """A client process begins: the import takes seconds, and one that came late would take no part."""
    import openai  # noqa: F401

    all_of_them.wait(READY_S)


def answers(work: Work) -> tuple[list[Answer], float]:
    """All answers of the process's clients, and the share of a core that reading them took."""
    return asyncio.run(_all_clients(work))


async def _all_clients(work: Work) -> tuple[list[Answer], float]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{work.address}/v1", api_key="none", max_retries=0, timeout=600) as web:
        name = (await web.models.list()).data[0].id
        await asyncio.sleep(max(0.0, work.begin - time.monotonic()))
        began, cpu = time.monotonic(), time.process_time()
        by_client = await asyncio.gather(*(_client(web, name, work, client) for client in work.clients))
        share = (time.process_time() - cpu) / (time.monotonic() - began)
    return [answer for own in by_client for answer in own], share


async def _client(web: Any, name: str, work: Work, client: int) -> list[Answer]:
    got: list[Answer] = []
    while len(got) < (work.most or math.inf) and (work.end is None or time.monotonic() < work.end):
        got.append(await _answer(web, name, work, f"{client}:{len(got)}"))
    return got


async def _answer(web: Any, name: str, work: Work, key: str) -> Answer:
    from openai import RateLimitError

    prompt = [work.words[int(seeded(i, key) * len(work.words))] for i in range(PROMPT)]
    asked, parts_s, tokens = time.monotonic(), list[float](), None
    try:
        async with asyncio.timeout(None if work.end is None else work.end - asked):
            stream = await web.completions.create(
                model=name, prompt=prompt, max_tokens=work.new, temperature=0.8, seed=int(seeded(0, key) * 2**31),
                stream=True, stream_options={"include_usage": True},
            )  # fmt: skip
            async with stream:
                async for part in stream:
                    if part.usage is not None:
                        tokens = part.usage.completion_tokens
                    elif part.choices[0].text:
                        parts_s.append(time.monotonic() - asked)
                    if len(parts_s) == work.leave_after:
                        break
    except TimeoutError:
        pass  # the seconds are over: the client leaves
    except RateLimitError as refused:
        return Answer([], retry_after=refused.response.headers.get("retry-after", ""))
    return Answer(parts_s, tokens)


@dataclass
class Server:
    """The command as a process, which writes to `log`."""

    command: Sequence[str]
    log: Path
    address: str = field(default="", init=False)

    def start(self) -> float:
        """Seconds until it answers. One that ends or says nothing for too long is a `StageError`."""
        began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
        while (found := re.search(r"running on (http://\S+)", self.log.read_text())) is None:
            if self.process.poll() is not None or time.monotonic() > began + READY_S:
                raise StageError(f"serving: no server within {READY_S} s, got exit status {self.process.returncode}")
            time.sleep(0.05)
        self.address = found[1]
        return time.monotonic() - began

    def stop(self) -> float:
        """Seconds that it takes to leave after SIGTERM. One that stays is killed, a `StageError`."""
        began = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(LEAVE_S)
        except subprocess.TimeoutExpired as stays:
            self.process.kill()
            raise StageError(f"serving: the server stays after SIGTERM, expected it to end in {LEAVE_S} s") from stays
        return time.monotonic() - began

    def metric(self, name: str) -> int:
        """A number of /metrics."""
        import httpx

        text = httpx.get(f"{self.address}/metrics", timeout=60).text
        return int(dict(line.rsplit(" ", 1) for line in text.splitlines())[name])

    def written(self) -> int:
        return self.metric("moe_written_tokens_total")

    def idle(self) -> float:
        """Seconds until no request runs. One that runs on is a `StageError`."""
        began = time.monotonic()
        while running := self.metric("moe_running_requests"):
            if time.monotonic() > began + IDLE_S:
                raise StageError(f"serving: nobody listens, got {running} requests that run on, expected none")
            time.sleep(0.005)
        return time.monotonic() - began


@dataclass(frozen=True)
class Load:
    """Clients of one server, in processes."""

    server: Server
    pool: Pool
    words: Sequence[int]

    def work(self, clients: int, **more: Any) -> list[Work]:
        shares = [range(first, clients, PROCESSES) for first in range(min(clients, PROCESSES))]
        return [Work(self.server.address, self.words, share, **more) for share in shares]

    def once(self, clients: int, **more: Any) -> list[Answer]:
        """One answer of each client, all asked at once."""
        work = self.work(clients, begin=time.monotonic() + LEAD_S, most=1, **more)
        return [answer for own, _ in self.pool.map(answers, work, 1) for answer in own]

    def steady(self, clients: int, seconds: float) -> dict[str, Any]:
        """The figures of `serving_<clients>`."""
        before = self.server.written()
        told = sum(answer.tokens or 0 for answer in self.once(clients))
        if told != (counted := self.server.written() - before):
            raise StageError(f"serving: clients and server count differently, got {counted} tokens, expected {told}")
        begin = time.monotonic() + LEAD_S
        found = self.pool.map_async(answers, self.work(clients, begin=begin, end=begin + seconds), 1)
        (first, began), (last, ended) = (self._written_at(when) for when in (begin, begin + seconds))
        by_process = found.get()
        self.server.idle()
        got = [answer for own, _ in by_process for answer in own]
        rates = {"new_tokens": last - first, "tokens_per_s": (last - first) / (ended - began)}
        return rates | summary(got) | {"client_cpu_fraction": max(share for _, share in by_process)}

    def _written_at(self, when: float) -> tuple[int, float]:
        """Tokens that the server has written by then, and when that was read."""
        time.sleep(max(0.0, when - time.monotonic()))
        return self.server.written(), time.monotonic()

    def leavers(self) -> dict[str, Any]:
        """The figures of `serving_cancel`."""
        before = self.server.written()
        got = self.once(LEAVERS, new=LONG, leave_after=LEFT_AFTER)
        idle_s, written = self.server.idle(), self.server.written()
        time.sleep(0.5)
        return {
            "clients": LEAVERS, "left": sum(a.tokens is None for a in got), "written": written - before,
            "most": LEAVERS * LONG, "idle_s": idle_s, "written_after": self.server.written() - written,
        }  # fmt: skip

    def crowd(self, room: int) -> dict[str, Any]:
        """The figures of `serving_full`: all ask at once, and leave after two seconds."""
        got = self.once(room + BEYOND, new=LONG, end=time.monotonic() + LEAD_S + 2)
        refused = [a.retry_after for a in got if a.retry_after is not None]
        self.server.idle()
        return {"requests": len(got), "room": room, "refused": len(refused), "retry_after": sorted(set(refused))}


def summary(got: Sequence[Answer]) -> dict[str, Any]:
    """Times over all answers, in milliseconds, and how many ended."""
    tokens = [a.tokens for a in got if a.tokens is not None]
    each = [
        1000 * (a.parts_s[-1] - a.parts_s[0]) / (a.tokens - 1)
        for a in got
        if a.tokens is not None and len(a.parts_s) > 1
    ]
    if not each:
        raise StageError(f"serving: too slow, got {len(tokens)} answers that ended, expected several; raise --seconds")
    first = [1000 * a.parts_s[0] for a in got if a.parts_s]
    gaps = [1000 * gap for a in got for gap in np.diff(a.parts_s)]
    return {
        "requests": len(tokens), "cancelled": len(got) - len(tokens), "answer_tokens": statistics.median(tokens),
        "token_ms": statistics.median(each),
        "first_ms": statistics.median(first), "first_p95_ms": float(np.percentile(first, 95)),
        "gap_ms": statistics.median(gaps), "gap_p95_ms": float(np.percentile(gaps, 95)),
    }  # fmt: skip


def measure(args: argparse.Namespace, results: "Results", folder: Path) -> None:
    """One server's lines; what it wrote is shown where something fails."""
    from moe.generate import load_tokenizer

    tokenizer, queue = load_tokenizer(args.run), max(SLOTS, *args.clients)
    special = tokenizer.get_added_tokens_decoder()
    words = [token for token in range(tokenizer.get_vocab_size()) if token not in special]
    options = {"--port": 0, "--device": args.device, "--slots": SLOTS, "--queue": queue, "--speculate": args.speculate}
    command = [sys.executable, "-m", "moe.server", str(args.run), *(str(v) for pair in options.items() for v in pair)]
    server, context = Server(command, folder / "server.log"), multiprocessing.get_context("spawn")
    begun = context.Barrier(PROCESSES + 1)
    with context.Pool(PROCESSES, ready, (begun,)) as pool:
        try:
            start_s = server.start()
            begun.wait(READY_S)
            load = Load(server, pool, words)
            for clients in args.clients:
                name = f"serving_{clients}" + (f"_drafts{args.speculate}" if args.speculate else "")
                figures = load.steady(clients, args.seconds)
                results.add(name, clients=clients, speculate=args.speculate, **figures)
            results.add("serving_cancel", **load.leavers())
            results.add("serving_full", **load.crowd(SLOTS + queue))
        except BaseException:
            print(*server.log.read_text().splitlines()[-40:], sep="\n", file=sys.stderr)
            raise
        finally:
            leave_s = server.stop()
    results.add("serving_server", start_s=start_s, leave_s=leave_s, status=server.process.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="of training with its tokenizer, or a hub folder")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="at once (default 1 8 32)")
    parser.add_argument("--speculate", type=int, default=0, help="drafts a round at most (default 0: none)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each number of clients (default 5)")
    parser.add_argument("--device", default="cuda", help="of the server (default cuda)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of serving.jsonl, to which lines are added")
    args = parser.parse_args()
    if missing := [name for name in ("openai", "starlette", "uvicorn", "httpx") if find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}")
    import torch  # which the clients' processes need not load

    from benchmarks.gpu.timing import Results

    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Results("serving", args.out), Path(folder))


if __name__ == "__main__":
    main()

"""The server through OpenAI's own client, on a real socket: answers, streams, errors, full queues, clients that leave."""

import asyncio
import copy
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from openai import OpenAI
from starlette.requests import Request

from core.errors import ConfigError
from moe.batching import Batcher, Full
from moe.config import ModelConfig
from moe.model import Decoder
from moe.presets import preset
from moe.sampling import Sampling
from moe.server.app import Serving
from moe.server.chat import PLAIN, ChatTemplate, chat_template
from moe.server.protocol import RefusedError, read
from moe.server.service import Scored, Service, StoppedError
from tests.moe.texts import tokenizer_of, uniform

REPO = Path(__file__).resolve().parents[2]
NAME = "toy"
TEXT = "Unless required by applicable law or agreed to in writing, software is distributed on an AS IS basis"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of([TEXT])


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Decoder:
    """Random weights, and an output that never ends a document by itself."""
    config = preset("ci", vocab_size=tokenizer.get_vocab_size(), eos=0)
    made = Decoder(ModelConfig(**{**vars(config), "context": 512}), seed=3).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
        made.lm_head.weight[0] = 0
    return made


@contextmanager
def served(batcher: Batcher, tokenizer: Any, **more: Any) -> Iterator[tuple[str, Serving]]:
    """The base address of a server on a free port, which is stopped behind."""
    serving = Serving(Service(batcher), tokenizer, ChatTemplate(PLAIN), NAME, **more)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(serving.app(), log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", serving
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(model: Decoder, tokenizer: Any) -> Iterator[str]:
    torch.set_num_threads(1)
    with served(Batcher(model, tokenizer, slots=4), tokenizer) as (url, _):
        yield url


@pytest.fixture
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=60)


def greedy(model: Decoder, tokenizer: Any, text: str, count: int) -> str:
    """What plain greedy decoding gives, one full forward a token."""
    return str(tokenizer.decode(greedy_ids(model, tokenizer, text, count)))


def greedy_ids(model: Decoder, tokenizer: Any, text: str, count: int) -> list[int]:
    tokens = [0, *tokenizer.encode(text).ids]
    start = len(tokens)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[start:]


def test_a_completion_is_what_the_model_says(client: OpenAI, model: Decoder, tokenizer: Any) -> None:
    found = client.completions.create(model=NAME, prompt="software", max_tokens=12, temperature=0)
    assert found.choices[0].text == greedy(model, tokenizer, "software", 12)
    assert (found.choices[0].finish_reason, found.object, found.model) == ("length", "text_completion", NAME)
    read_tokens = len(tokenizer.encode("software").ids)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (read_tokens, 12)


def test_prompts_of_every_shape_and_several_choices(client: OpenAI, tokenizer: Any) -> None:
    ids = tokenizer.encode("law").ids
    shapes: list[Any] = ["law", ids, ["law", "law"], [ids, ids]]
    texts = [
        [c.text for c in client.completions.create(model=NAME, prompt=p, max_tokens=6, temperature=0).choices]
        for p in shapes
    ]
    assert texts == [texts[0], texts[0], texts[0] * 2, texts[0] * 2]
    several = client.completions.create(model=NAME, prompt=["law", "on"], n=3, max_tokens=6, seed=1)
    assert [c.index for c in several.choices] == list(range(6))
    assert len({c.text for c in several.choices[:3]}) > 1, "choices of one prompt have seeds of their own"
    again = client.completions.create(model=NAME, prompt=["law", "on"], n=3, max_tokens=6, seed=1)
    assert [c.text for c in again.choices] == [c.text for c in several.choices]


def test_a_stream_is_the_answer_in_parts(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": "software", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len(parts) > 5
    assert "".join(p.choices[0].text for p in parts[:-1]) == whole.choices[0].text
    assert parts[-2].choices[0].finish_reason == "length"
    assert (parts[-1].choices, parts[-1].usage) == ([], whole.usage)


def test_stop_strings_end_the_text_before_them(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": "software", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    found = client.completions.create(**asked, stop=stop).choices[0]
    assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    parts = list(client.completions.create(**asked, stop=[stop], stream=True))
    assert "".join(p.choices[0].text for p in parts) == found.text


def test_a_chat_goes_through_the_template(client: OpenAI, model: Decoder, tokenizer: Any) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "as is?"}]}]
    found = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=8, temperature=0)
    assert found.choices[0].message.content == greedy(model, tokenizer, "User: as is?\n\nAssistant:", 8)
    parts = list(
        client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, temperature=0, stream=True)
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == found.choices[0].message.content


def test_logprobs_are_the_models(client: OpenAI, model: Decoder, tokenizer: Any) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": "on an", "temperature": 0}
    found = client.completions.create(**asked, max_tokens=3, logprobs=2).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    with torch.inference_mode():
        log_p = model(torch.tensor([[0, *tokenizer.encode("on an").ids]]))[0, -1].log_softmax(-1)
    assert found.token_logprobs[0] == pytest.approx(float(log_p.max()), abs=1e-4)
    assert found.top_logprobs is not None
    assert [len(t) for t in found.top_logprobs] == [2, 2, 2]
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], max_tokens=2, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs is not None
    assert [len(row.top_logprobs) for row in chat.choices[0].logprobs.content or []] == [3, 3]


def test_an_echo_scores_the_prompt(client: OpenAI, model: Decoder, tokenizer: Any) -> None:
    """As lm-evaluation-harness asks for likelihoods."""
    ids = tokenizer.encode(TEXT).ids
    found = client.completions.create(model=NAME, prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    with torch.inference_mode():
        log_p = model(torch.tensor([[0, *ids[:-1]]]))[0].log_softmax(-1)
    assert found.text == TEXT
    assert found.logprobs is not None
    expected = [float(log_p[t, token]) for t, token in enumerate(ids)]
    assert found.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert found.logprobs.text_offset == [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]


def test_a_text_as_long_as_the_context_is_scored(client: OpenAI) -> None:
    """Its last token is not read; a new one would have no place behind it."""
    asked: dict[str, Any] = {"model": NAME, "echo": True, "logprobs": 0, "max_tokens": 0}
    found = client.completions.create(**asked, prompt=[5] * 512).choices[0].logprobs
    assert found is not None
    assert len(found.token_logprobs or []) == 512
    with pytest.raises(openai.BadRequestError, match=r"got 513 \+ 0 tokens, expected 512 in the prompt"):
        client.completions.create(**asked, prompt=[5] * 513)


def test_choices_of_an_echoed_prompt_share_its_score(
    model: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = Batcher(model, tokenizer, slots=2)
    with served(batcher, tokenizer) as (url, serving):
        scored, score = [], serving.service._score

        def counted(prompt: list[int], top: int) -> Scored:
            scored.append(prompt)
            return score(prompt, top)

        monkeypatch.setattr(serving.service, "_score", counted)
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)
        asked: dict[str, Any] = {"model": NAME, "prompt": ["law", "on an", ""], "echo": True, "logprobs": 1}
        found = client.completions.create(**asked, n=3, max_tokens=0)
        assert len(scored) == 3
        assert [c.text for c in found.choices] == ["law"] * 3 + ["on an"] * 3 + [""] * 3
        assert found.choices[0].logprobs == found.choices[2].logprobs


def test_scores_are_bounded(model: Decoder, tokenizer: Any) -> None:
    service = Service(Batcher(model, tokenizer, slots=1, queue=2))  # not started: nothing is answered

    async def ask() -> None:
        waiting = [asyncio.create_task(service.score([5], 0)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await service.score([5], 0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        service.start()
        assert len((await service.score([5], 0)).chosen) == 1, "those who left count no more"
        service.stop()

    asyncio.run(ask())


def test_a_request_whose_client_leaves_while_it_is_taken_is_cancelled(
    model: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(Batcher(model, tokenizer, slots=1))
    taking, left = threading.Event(), threading.Event()
    submit = service._submit

    def slow(*given: Any) -> int:
        taking.set()
        assert left.wait(60)
        return submit(*given)

    monkeypatch.setattr(service, "_submit", slow)

    async def leave() -> None:
        task = asyncio.create_task(service.open([5], Sampling(max_tokens=500)))
        await asyncio.to_thread(taking.wait, 60)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        left.set()

    service.start()
    asyncio.run(leave())
    until(lambda: service.running == 0 and service.batcher.idle)
    assert service.tokens_out < 500
    service.stop()


def test_an_answer_that_ends_at_once_still_has_a_row(tokenizer: Any) -> None:
    """lm-evaluation-harness asks for one token behind what it scores, and leaves the last row out."""
    ids = tokenizer.encode(TEXT).ids
    with served(Batcher(uniform(tokenizer), tokenizer, slots=1), tokenizer) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)
        asked: dict[str, Any] = {"model": NAME, "prompt": ids, "echo": True, "logprobs": 1, "temperature": 0}
        found = client.completions.create(**asked, max_tokens=1).choices[0]
        assert (found.text, found.finish_reason) == (TEXT, "stop")
        assert found.logprobs is not None
        assert found.logprobs.tokens is not None
        assert len(found.logprobs.token_logprobs or []) == len(ids) + 1
        assert found.logprobs.tokens[-1] == "<eos>"


def test_rows_of_tokens_that_are_bytes_have_names_of_their_own(client: OpenAI, tokenizer: Any) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": "é许", "echo": True, "logprobs": 5, "max_tokens": 6, "seed": 3}
    whole = client.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    assert whole.tokens is not None
    assert whole.tokens[:5] == [f"bytes:\\x{b:02x}" for b in "é许".encode()]
    assert [len(t) for t in whole.top_logprobs or []] == [5] * len(whole.tokens)
    parts = [p.choices[0].logprobs for p in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for p in parts if p for x in getattr(p, name)] == getattr(whole, name)
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], max_tokens=9, logprobs=True, top_logprobs=20
    )
    assert chat.choices[0].logprobs is not None
    found = [t for row in chat.choices[0].logprobs.content or [] for t in row.top_logprobs]
    names = [t.token for t in found if t.token.startswith("bytes:")]
    assert names, "a random model has bytes among its likeliest"
    assert all(t.bytes is not None for t in found)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": 3}, "prompt: got 3"),
        ({"prompt": []}, "prompt: got"),
        ({"prompt": "x", "temperature": 3}, "temperature: got 3, expected a number from 0 to 2"),
        ({"prompt": "x", "temperature": True}, "temperature: got True"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens: got -1"),
        ({"prompt": "x", "n": 0}, "n: got 0"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "x", "best_of": 4}, "best_of"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "colour": 1}, "unknown field 'colour'"),
        ({"prompt": [10**6]}, "vocabulary"),
        ({"prompt": "x " * 2000}, "context"),
        ({"prompt": "x" * 50_000}, "got 50,000 bytes, expected at most 32,768"),
        ({"prompt": [10**6], "echo": True, "logprobs": 1, "max_tokens": 0}, "vocabulary"),
        ({"prompt": [5] * 600, "echo": True, "logprobs": 1, "max_tokens": 0}, "context"),
        ({"prompt": ["x"] * 8, "n": 17}, "n: got 17 choices of 8 prompts, expected at most 128"),
        ({"prompt": "x", "n": 69}, "got 69 choices of all prompts, expected at most 68"),
        ({"prompt": "x", "temperature": 1e-38}, "temperature: got 1e-38"),
        ({"prompt": "x", "repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"prompt": "x", "stop": "y" * 257}, "stop"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(client: OpenAI, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.post("/completions", body={"model": NAME, "max_tokens": 4, **body}, cast_to=dict)


def test_other_errors_are_the_clients_own_types(client: OpenAI, address: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.NotFoundError, match="no route"):
        client.embeddings.create(model=NAME, input="x")
    for body in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        answer = httpx.post(f"{address}/v1/completions", content=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=NAME, messages=[])
    assert httpx.get(f"{address}/v1/completions").status_code == 405


def test_what_is_served(client: OpenAI, address: str) -> None:
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "stepwell"
    assert httpx.get(f"{address}/health").text == "ok\n"
    assert 'moe_requests_total{status="200"}' in httpx.get(f"{address}/metrics").text


def test_lone_surrogates_and_nul_are_text(address: str) -> None:
    body = b'{"model": "toy", "prompt": "\\ud800 \\u0000", "max_tokens": 2}'
    assert httpx.post(f"{address}/v1/completions", content=body).status_code == 200
    refused = httpx.post(f"{address}/v1/completions", content=b'{"model": "toy", "prompt": "x", "\\ud800": 1}')
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "?")


def test_a_key_and_a_bound_on_bodies(model: Decoder, tokenizer: Any) -> None:
    with served(Batcher(model, tokenizer, slots=1), tokenizer, api_key="sesame", max_body_bytes=1000) as (url, _):
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        good = OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0)
        assert [m.id for m in good.models.list()] == [NAME]
        with pytest.raises(openai.APIStatusError, match="exceeds 1,000 bytes"):
            good.completions.create(model=NAME, prompt="x" * 2000)


def until(true: Any, limit_s: float = 60) -> None:
    """Waits for something another thread does."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_full_queue_is_said_and_a_client_that_leaves_frees_its_place(model: Decoder, tokenizer: Any) -> None:
    batcher = Batcher(model, tokenizer, slots=1, queue=1)
    with served(batcher, tokenizer) as (url, serving):
        asked: dict[str, Any] = {"model": NAME, "prompt": "law", "max_tokens": 500, "temperature": 0}

        async def crowd() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=60) as web:
                tasks = []
                for taken in (1, 2):  # one runs, one waits
                    tasks.append(asyncio.create_task(web.post("/v1/completions", json=asked)))
                    while serving.service.running < taken:
                        await asyncio.sleep(0.01)
                    if taken == 1:  # of two more choices one finds a place, and leaves it again
                        assert (await web.post("/v1/completions", json=asked | {"n": 2})).status_code == 429
                        while serving.service.running > 1:
                            await asyncio.sleep(0.01)
                refused = await web.post("/v1/completions", json=asked)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert refused.json()["error"]["code"] == "queue_full"
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(crowd())
        until(lambda: serving.service.running == 0)
        short = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        assert short.completions.create(**{**asked, "max_tokens": 2}).choices[0].finish_reason == "length"
        with short.completions.create(**asked, stream=True) as stream:
            next(iter(stream))
        until(lambda: serving.service.running == 0)


def test_a_model_that_fails_tells_everyone(model: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(model, tokenizer, slots=1)
    with served(batcher, tokenizer) as (url, serving):
        monkeypatch.setattr(batcher, "step", lambda: 1 / 0)
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the model stopped: ZeroDivisionError"):
            client.completions.create(model=NAME, prompt="x", max_tokens=4)
        with pytest.raises(openai.InternalServerError, match="the model stopped"):
            client.completions.create(model=NAME, prompt="x", max_tokens=4)
        assert httpx.get(f"{url}/health").status_code == 503
        assert serving.service.running == 0


def test_a_client_whose_loop_is_gone_keeps_nobody_from_hearing_of_the_end(
    model: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(Batcher(model, tokenizer, slots=2))
    service.start()
    asyncio.run(service.open([5], Sampling(max_tokens=500)))

    async def stay() -> None:
        stream = await service.open([5], Sampling(max_tokens=500))
        monkeypatch.setattr(service.batcher, "step", lambda: 1 / 0)
        with pytest.raises(StoppedError):
            async for _ in stream:
                pass
        with pytest.raises(StoppedError):
            await service.open([5], Sampling())

    asyncio.run(asyncio.wait_for(stay(), 60))
    assert isinstance(service.failure, ZeroDivisionError)


def test_a_failure_of_the_server_is_an_error_object(model: Decoder, tokenizer: Any) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise LookupError("no such merge")

    with served(Batcher(model, tokenizer, slots=1), Broken()) as (url, _):
        answer = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")


def test_a_body_that_does_not_come_is_given_up(model: Decoder, tokenizer: Any) -> None:
    with served(Batcher(model, tokenizer, slots=1), tokenizer, body_s=0.2) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_a_chat_ends_where_the_template_says(model: Decoder, tokenizer: Any) -> None:
    batcher = Batcher(model, tokenizer, slots=1)
    with served(batcher, tokenizer) as (url, serving):
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)
        asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "as is?"}], "temperature": 0}
        whole = client.chat.completions.create(**asked, max_tokens=20).choices[0].message.content or ""
        stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
        serving.template = ChatTemplate(PLAIN, (stop,))
        found = client.chat.completions.create(**asked, max_tokens=20).choices[0]
        assert (found.message.content, found.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_folders_own_template(tmp_path: Path) -> None:
    assert chat_template(tmp_path).source == PLAIN
    config = {"chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": {"content": "<s>"}}))
    assert chat_template(tmp_path)([{"role": "user", "content": "hi"}]) == "<s>[user]hi"
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_template(tmp_path)([]) == "d"
    for wrong in (json.dumps({"chat_template": named[:1]}), "{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(wrong)
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
            chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses them: roles must alternate"):
        chat_template(tmp_path)([])
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="cannot be read, line 1"):
        chat_template(tmp_path)


def test_fields_that_only_label_are_let_through() -> None:
    ask = read({"model": NAME, "prompt": "x", "user": "me", "metadata": {"a": "b"}}, chat=False)
    assert (ask.model, ask.prompt, ask.writes) == (NAME, ["x"], True)
    assert read({"prompt": "x"}, chat=False).sampling.seed != read({"prompt": "x"}, chat=False).sampling.seed
    assert read({"prompt": "x"}, chat=False).sampling.max_tokens == 16, "as OpenAI's completions"
    said = [{"role": "user", "content": "x"}]
    assert read({"messages": said}, chat=True).sampling.max_tokens is None
    with pytest.raises(RefusedError, match="tool_calls"):
        read({"messages": [*said, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, chat=True)
    with pytest.raises(RefusedError, match="not a JSON object"):
        read([], chat=True)


def test_the_command_serves_a_hub_folder(model: Decoder, tokenizer: Any, tmp_path: Path) -> None:
    """As a user starts it: a process, a port that it names, an answer, and SIGTERM."""
    from moe.hub import export

    export(model, tmp_path / "toy")
    tokenizer.save(str(tmp_path / "toy" / "tokenizer.json"))
    command = [sys.executable, "-m", "moe.server", str(tmp_path / "toy"), "--port", "0", "--slots", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPO) as process:
        assert process.stderr is not None
        try:
            address = next(hit[1] for line in process.stderr if (hit := re.search(r"running on (http://\S+)", line)))
            client = OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=60)
            found = client.completions.create(model="toy", prompt="law", max_tokens=3, temperature=0)
            assert found.choices[0].text == greedy(model, tokenizer, "law", 3)
        finally:
            process.terminate()
    assert process.returncode in (0, -signal.SIGTERM)


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe.server", str(tmp_path / "absent")]
    told = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith("serve: ")
    assert told.stderr.count("\n") == 1


def broken(model: Decoder, token: int) -> Decoder:
    """The model, but whoever reads that token gets NaN."""
    lost = copy.deepcopy(model)
    with torch.no_grad():
        lost.model["embed_tokens"].weight[token] = float("nan")
    return lost


def test_logits_that_are_no_numbers_are_one_clear_error_and_the_server_goes_on(model: Decoder, tokenizer: Any) -> None:
    (token,) = tokenizer.encode("Z").ids
    with served(Batcher(broken(model, token), tokenizer, slots=2), tokenizer) as (url, serving):
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)
        asked: dict[str, Any] = {"model": NAME, "max_tokens": 6, "temperature": 0}
        with pytest.raises(openai.InternalServerError, match="got logits that are not finite") as told:
            client.completions.create(**asked, prompt=["law", "Z"])
        assert (told.value.code, told.value.type) == ("model_failed", "server_error")
        with pytest.raises(openai.APIError, match="got logits that are not finite"):
            list(client.completions.create(**asked, prompt="Z", stream=True))
        for more in ({"echo": True, "logprobs": 1, "max_tokens": 0}, {"echo": True, "logprobs": 1, "stream": True}):
            with pytest.raises(openai.InternalServerError, match="got logits that are not finite"):
                client.completions.create(**{**asked, **more}, prompt="lawZ law")
        assert client.completions.create(**asked, prompt="law").choices[0].text == greedy(model, tokenizer, "law", 6)
        assert httpx.get(f"{url}/health").status_code == 200
        until(lambda: serving.service.running == 0)


def test_an_answer_ends_at_the_models_own_tokens_and_a_chat_at_its_templates(model: Decoder, tokenizer: Any) -> None:
    """A hub folder's generation_config may name several tokens, its tokenizer_config the one that ends a turn."""
    own = copy.copy(model)
    batcher = Batcher(own, tokenizer, slots=1)
    with served(batcher, tokenizer) as (url, serving):
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)
        said: Any = [{"role": "user", "content": "as is?"}]
        asked: dict[str, Any] = {"model": NAME, "messages": said, "temperature": 0, "max_tokens": 20}

        whole = greedy_ids(model, tokenizer, "User: as is?\n\nAssistant:", 20)
        end = next(i for i, token in enumerate(whole) if i > 2 and token not in whole[:i])
        text = tokenizer.id_to_token(whole[end])
        completions: dict[str, Any] = {"model": NAME, "prompt": "User: as is?\n\nAssistant:", "temperature": 0}
        serving.template = ChatTemplate(PLAIN, (), (("eos_token", text), ("bos_token", "<eos>")))
        chat = client.chat.completions.create(**asked)
        assert chat.usage is not None
        assert (chat.usage.completion_tokens, chat.choices[0].finish_reason) == (end, "stop")
        serving.template = ChatTemplate("{{ bos_token }}" + PLAIN, (), (("eos_token", text), ("bos_token", "<eos>")))
        assert client.chat.completions.create(**asked).usage == chat.usage, "a document begins once"
        plain = client.completions.create(**completions, max_tokens=20)
        assert plain.usage is not None
        assert plain.usage.completion_tokens == 20, "a text that is no chat does not end with a turn"
        own.stop_tokens = (whole[end],)
        plain = client.completions.create(**completions, max_tokens=20)
        assert plain.usage is not None
        assert (plain.usage.completion_tokens, plain.choices[0].finish_reason) == (end, "stop")


def test_a_stream_that_nobody_ever_read_is_cancelled(model: Decoder, tokenizer: Any) -> None:
    """The client leaves between the opening of its choices and the first event: the events' own end never runs."""
    service = Service(Batcher(model, tokenizer, slots=1))
    serving = Serving(service, tokenizer, ChatTemplate(PLAIN), NAME)
    body = json.dumps({"model": NAME, "prompt": "law", "max_tokens": 500, "stream": True}).encode()
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [],
        "query_string": b"",
    }

    async def leave() -> None:
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def reading() -> Any:
            if given:
                return given.pop()
            return await asyncio.get_running_loop().create_future()

        async def gone() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)

        response = await serving._answer(Request(scope, reading), chat=False)
        assert service.running == 1
        await response(scope, gone, send)

    service.start()
    try:
        asyncio.run(leave())
        until(lambda: service.running == 0 and service.batcher.idle)
        assert service.tokens_out < 500
    finally:
        service.stop()


def test_what_the_http_layer_owes(address: str) -> None:
    """Methods, kinds of bodies, and bodies far beyond the bound."""
    body = {"model": NAME, "prompt": "x", "max_tokens": 1}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        told = httpx.post(f"{address}/v1/completions", content=json.dumps(body), headers={"content-type": kind})
        assert (told.status_code, told.json()["error"]["code"]) == (415, "wrong_content_type")
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        told = httpx.post(f"{address}/v1/completions", content=json.dumps(body), headers={"content-type": kind})
        assert told.status_code == 200
    for method in ("HEAD", "OPTIONS", "PUT"):
        told = httpx.request(method, f"{address}/v1/completions")
        assert (told.status_code, told.headers["allow"]) == (405, "POST")
    assert httpx.head(f"{address}/v1/models").status_code == 200
    huge = httpx.post(f"{address}/v1/completions", content=b"[" + b" " * 20_000_000, timeout=60)
    assert (huge.status_code, huge.json()["error"]["code"]) == (413, "too_large")
    assert httpx.post(f"{address}/v1/completions", content=b"").status_code == 400


def test_options_of_a_stream_want_a_stream(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stream_options: set without stream"):
        client.post(
            "/completions",
            body={"model": NAME, "prompt": "x", "max_tokens": 1, "stream_options": {"include_usage": True}},
            cast_to=dict,
        )


def test_many_streams_at_once_are_each_their_own_answer(address: str, client: OpenAI) -> None:
    """More streams than slots, with two choices each: every one equals the whole answer of its seed."""

    async def all_of_them() -> list[list[str]]:
        web = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=120)

        async def one(seed: int) -> list[str]:
            texts = ["", ""]
            usage = None
            stream = await web.completions.create(
                model=NAME, prompt="software", max_tokens=8, n=2, seed=seed, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            async for part in stream:
                usage = part.usage or usage
                for choice in part.choices:
                    texts[choice.index] += choice.text
            assert usage is not None
            assert usage.completion_tokens <= 16
            return texts

        return await asyncio.gather(*(one(seed) for seed in range(7)))

    found = asyncio.run(all_of_them())
    for seed in (0, 6):
        whole = client.completions.create(model=NAME, prompt="software", max_tokens=8, n=2, seed=seed)
        assert [c.text for c in whole.choices] == found[seed]
    assert found[0][1] == found[1][0], "the second choice has the seed plus one"

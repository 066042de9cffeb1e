"""The exports `sft` and `rl`: what goes in comes out, spans applied, everything left out counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import given

from classifiers.pii import STAGE as PII
from classifiers.pii import PiiConfig, pii
from core.schema import FATE, SPANS
from dedup import decontaminate
from mixtures.posttrain.chat import STAGE as CHAT
from mixtures.posttrain.chat import ChatConfig, artifacts, chat, open_chat
from mixtures.posttrain.parts import parts_of
from mixtures.posttrain.rl import STAGE as RL
from mixtures.posttrain.rl import Task
from mixtures.posttrain.sft import STAGE as SFT
from mixtures.posttrain.sft import Line
from mixtures.posttrain.tasks import gold_of, unfit, verifier_of
from tests.posttrain.conftest import House, documents, turns
from tests.posttrain.test_conversations import CONVERSATIONS

MASKED = {
    "conversations": [
        {"role": "system", "content": "Be brief.", "loss_mask": 0},
        {
            "role": "user",
            "content": "Mail bob@corp.example.com please",
            "name": "Ann",
            "tool_schemas": [{"b": 1, "a": [None]}],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "value": "To bob@corp.example.com", "loss_mask": 1}],
            "loss_mask": None,
        },
    ],
    "images": [],
}


def judged(house: House, records: list[dict[str, Any]], shards: int = 2) -> None:
    """A dataset `chats` with all layers that the exports read."""
    step = -(-len(records) // shards)
    tables = {f"s{i}": documents(records[i * step : (i + 1) * step]) for i in range(shards)}
    house.add("chats", tables)
    state = open_chat(ChatConfig(), artifacts(ChatConfig()))
    assert CHAT.layer is not None
    assert PII.layer is not None

    def one(document: dict[str, Any]) -> pa.RecordBatch:
        fields = {k: pa.array([document[k]], pa.large_string()) for k in ("doc_id", "text", "metadata")}
        return pa.record_batch(fields)

    house.layer("chats", "chat", CHAT.layer, lambda d: chat(state, one(d))[0].to_pylist()[0])
    house.layer("chats", "pii", PII.layer, lambda d: pii(PiiConfig(), one(d))[0].to_pylist()[0])
    house.layer(
        "chats",
        "fate@final",
        FATE,
        lambda d: {"keep": "DROPPED" not in d["text"], "reason": "rule" if "DROPPED" in d["text"] else None},
    )


def lines(house: House, stage: str) -> list[dict[str, Any]]:
    files = sorted(Path(house.root.path(f"{stage}/chats")).glob("*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text("utf-8").splitlines()]


@given(CONVERSATIONS)
def test_a_conversation_leaves_as_it_came(record: dict[str, Any]) -> None:
    (document,) = documents([record]).to_pylist()
    assert Line((), False)({**document, "chat.domain": None}) == record


def test_kept_conversations_are_written_with_masks_and_spans(house: House) -> None:
    records = [MASKED, turns("DROPPED", "x"), turns("q1", "a1", domain="d", license="MIT"), turns("q2", "a2")]
    judged(house, records)
    outcome = house.run(SFT, spans=("pii.spans",))
    written = lines(house, "sft")
    assert [w["conversations"][-1]["content"] for w in written[1:]] == ["a1", "a2"]
    first = written[0]["conversations"]
    assert "bob@" not in json.dumps(first)
    stand_in = first[2]["content"][0]["value"].removeprefix("To ")
    assert first[1]["content"] == f"Mail {stand_in} please"
    restored = json.loads(json.dumps(first).replace(stand_in, "bob@corp.example.com"))
    assert restored == MASKED["conversations"]
    assert written[1]["provenance"]["domain"] == "d"
    assert written[1]["provenance"]["license"] == "MIT"
    accounts = outcome.accounts
    assert (accounts["considered"], accounts["records"], accounts["domain.d"], accounts["domain.chats"]) == (3, 3, 1, 2)
    docs = house.root.read_table("sft/chats/s0.docs.parquet")
    assert docs.column("doc_id").to_pylist() == [written[0]["provenance"]["doc_id"]]
    assert docs.column("bytes").to_pylist() == [house.root.size("sft/chats/s0.jsonl")]


def test_what_is_no_conversation_or_not_its_rendering_is_counted(house: House) -> None:
    table = documents([turns("q", "a"), turns("q", "b"), turns("q", "c")]).to_pylist()
    table[0]["text"] += " edited"
    table[1]["metadata"] = "{}"
    house.add("chats", {"s0": pa.Table.from_pylist(table, schema=documents([turns("q", "a")]).schema)})
    house.layer("chats", "chat", pa.schema([("domain", pa.large_string())]), lambda d: {"domain": None})
    outcome = house.run(SFT, where=None)
    assert outcome.accounts["left_out.rendering_differs"] == 1
    assert outcome.accounts["left_out.no_conversation"] == 1
    assert outcome.accounts["records"] == 1


def test_spans_of_another_text_cut_no_task() -> None:
    """A span would lie in the prompt; but the document's text is no longer what it was found in."""
    (row,) = documents([turns("How many?", "\\boxed{2}")]).to_pylist()
    about = {**row, "text": "edited", "chat.domain": None, "chat.pass_rate": None}
    span = {"start": 0, "end": 3, "replacement": "x"}
    task = Task(("pii.spans",), False, 1.0)
    assert task({**about, "pii.spans": [span]}) == "rendering_differs"
    assert isinstance(task({**about, "pii.spans": []}), dict)
    assert isinstance(task({**about, "pii.spans": [span], "text": row["text"]}), dict)


def test_lines_of_shards_that_are_gone_go(house: House) -> None:
    judged(house, [turns("q", "a")], shards=1)
    outcome = house.run(SFT)
    assert outcome.cleanup == []
    for name in ("sft/chats/old.jsonl", "sft/chats/old.docs.parquet", "sft/gone/s0.jsonl"):
        house.root.write_bytes(name, b"")
    assert house.run(SFT).cleanup == ["sft/chats/old.docs.parquet", "sft/chats/old.jsonl", "sft/gone/s0.jsonl"]


def test_workers_and_a_second_run_give_the_same_bytes(house: House) -> None:
    judged(house, [turns(f"What is {i} + 1?", f"\\boxed{{{i + 1}}}", id=i) for i in range(30)], shards=3)
    outputs = [house.run(stage).outputs for stage in (SFT, RL)]
    assert [sum(o["rows"] for o in out.values()) for out in outputs] == [30, 30]
    assert [house.run(stage).outputs for stage in (SFT, RL)] == outputs
    house.root.remove("sft")
    assert house.run(SFT, workers=2).outputs == outputs[0]


def test_a_cut_file_is_written_again(house: House) -> None:
    judged(house, [turns("q", "a"), turns("q", "b")], shards=1)
    house.run(SFT)
    path = Path(house.root.path("sft/chats/s0.jsonl"))
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    house.run(SFT)
    assert path.read_bytes() == whole


def test_tasks_become_records_and_others_are_counted(house: House) -> None:
    test = "assert f(1) == 2"
    records = [
        turns("What is 1 + 1? Ask bob@corp.example.com", "\\boxed{2}", pass_rate=0.5, attempts=8),
        turns("Write f.", "def f(x): return x + 1", tests=[test], timeout_s=3, domain="code"),
        turns("Too easy: 1 + 0?", "\\boxed{1}", passes=0, attempts=8),
        turns("See https://example.com and say how many.", "\\boxed{3}"),
        turns("Prove that 2 is even.", "\\boxed{2}"),
        turns("Tell me a story.", "Once upon a time."),
    ]
    judged(house, records)
    outcome = house.run(RL, spans=("pii.spans",))
    maths, code = lines(house, "rl")
    assert maths["verifier"] == "maths"
    assert (maths["answer"], maths["tests"], maths["timeout_s"], maths["version"], maths["pass_rate"]) == (
        "2",
        None,
        10.0,
        1,
        0.5,
    )
    assert [m["role"] for m in maths["prompt"]] == ["user"]
    assert "bob@" not in maths["prompt"][0]["content"]
    assert (code["verifier"], code["answer"], code["tests"], code["timeout_s"], code["domain"]) == (
        "code",
        None,
        [test],
        3,
        "code",
    )
    accounts = outcome.accounts
    assert (accounts["considered"], accounts["records"]) == (5, 2)  # the unsolved one is not of use
    assert {k: v for k, v in accounts.items() if k.startswith("left_out.")} == {
        "left_out.link": 1,
        "left_out.open_ended": 1,
        "left_out.proof": 1,
    }


def reason(prompt: str, said: str = "\\boxed{2}", **fields: Any) -> str | None:
    record = turns(prompt, said, **fields)
    parts = parts_of(record["conversations"])
    return unfit(record, parts, record["images"], verifier_of(record, parts))


def test_reasons_against_a_task() -> None:
    assert reason("How many?") is None
    assert reason("How many are in the figure below?") == "image"
    assert reason("Which is it? A) one B) two C) three") == "multiple_choice"
    assert reason("Which letter?", "\\boxed{B}") == "multiple_choice"
    assert reason("Is 7 prime?", "\\boxed{2}") == "true_false"
    assert reason("Say.", "\\boxed{true}") == "true_false"
    assert reason("Solve both.\n(a) x + 1 = 2\n(b) x + 2 = 3") == "multi_part"
    assert reason("Name the painter.", "It was he.", answer="Rembrandt") == "unverifiable_answer"
    assert reason("Explain rain.", "It falls.") == "open_ended"
    assert reason("Is it so?", "x", tests=["assert f()"]) is None  # tests decide, whatever the prompt looks like


def test_gold_answers() -> None:
    def gold(said: str, **fields: Any) -> str | None:
        record = turns("q", said, **fields)
        return gold_of(record, parts_of(record["conversations"]))

    assert gold("so \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert gold("work\n#### 72") == "72"
    assert gold("x", answer="steps #### 5") == "5"
    assert gold("x", ground_truth=3) == "3"
    assert gold("<think>\\boxed{1}</think>no box") is None
    assert gold("plain") is None


ITEM = "The old lighthouse keeper counted ships before breakfast for 14 days and wrote each name into a blue book yesterday"


def test_a_benchmark_item_that_spans_put_together_does_not_leave(house: House, tmp_path: Path) -> None:
    """The e-mail address between the halves is cut; what stays of it (`rl`: in the prompt, or in a test) is the item."""
    torn = ITEM.replace(" for 14", " bob@corp.example.com for 14")
    judged(house, [turns(f"{torn}. How many?", "\\boxed{14}"), turns("How many more?", "\\boxed{3}"),
                   turns("Write f.", "def f(): pass", tests=[f"assert f() == '{ITEM}'"])])  # fmt: skip

    def cut(document: dict[str, Any]) -> dict[str, Any]:
        at = document["text"].find("bob@")
        span = {"start": at, "end": at + len("bob@corp.example.com "), "replacement": None, "label": "x"}
        return {"spans": [span] if at >= 0 else None}

    house.layer("chats", "cut", pa.schema([pa.field("spans", SPANS)]), cut)
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"question": ITEM}))
    house.run(decontaminate.STAGE, benchmarks={"b": {"path": str(path), "answer": None}}, coverage=0.9)
    shards = [house.root.read_table(f"datasets/chats/layers/decontaminate/s{i}.parquet") for i in range(2)]
    assert [h for s in shards for h in s.column("hit").to_pylist()] == [False] * 3
    left = {}
    for stage in (SFT, RL):
        assert house.run(stage, spans=("cut.spans",)).accounts["records"] == 3
        accounts = house.run(stage, spans=("cut.spans",), decontaminate="decontaminate").accounts
        left[stage.name] = accounts["records"], accounts["left_out.contaminated"]
    assert left == {"sft": (2, 1), "rl": (1, 2)}


def test_private_text_does_not_leave_through_answers_and_tests(house: House) -> None:
    mail = "bob@corp.example.com"
    records = [
        turns(f"Write f, which returns {mail}.", "def f(): ...", tests=[f"assert f() == '{mail}'"]),
        turns(f"Write f, which prints {mail}.", "def f(): ...", tests=[{"stdin": "1", "stdout": mail}]),
        turns(f"Ask {mail}: how many?", "\\boxed{2}"),
        turns("How many?", f"\\boxed{{2}} says {mail}"),  # what the answer does not hold does not leave
    ]
    judged(house, records)
    outcome = house.run(RL, spans=("pii.spans",))
    assert (outcome.accounts["records"], outcome.accounts["left_out.pii_in_answer"]) == (2, 2)
    assert mail not in json.dumps(lines(house, "rl"))
    assert house.run(RL).accounts["records"] == 4

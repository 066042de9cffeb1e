"""The stages `train_raters` and `raters` on a small corpus: equal bytes, what scores mean, and what goes wrong."""

import json

import numpy as np
import pyarrow as pa
import pytest
from rated import corpus, layer, rows, run

from classifiers.raters.labels import RATERS
from classifiers.raters.score import STAGE as SCORE
from classifiers.raters.score import RatersConfig, rate, state_of
from classifiers.raters.store import load
from classifiers.raters.train import STAGE as TRAIN
from core.engines.local import LocalEngine
from core.errors import ConfigError, StageError
from core.manifest import read_manifest
from core.schema import TEXT
from core.storage import Root
from pipelines.config import load_pipeline
from pipelines.runner import Runner, RunOptions

SMALL = {"bits": 14, "order": 3, "lm_least_bytes": 2000}
PIPELINE = """\
root: {folder}/root
engine: {{workers: 1, memory_gb: 1}}
sources:
  web: {{kind: jsonl, path: {folder}/web}}
stages:
  extract: {{}}
  language: {{}}
  train_raters: {{raters: [educational], bits: {bits}}}
  pii: {{}}
  raters: {{}}
policy: {{}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A root with trained raters, its datasets and the outcome."""
    root = Root(str(tmp_path_factory.mktemp("trained") / "root"))
    datasets = corpus(root)
    return root, datasets, run(TRAIN, root, datasets, **SMALL)


def batch(texts, languages=None):
    ids = [f"{i:032x}" for i in range(len(texts))]
    return pa.record_batch(
        {
            "doc_id": pa.array(ids, TEXT),
            "text": pa.array(texts, TEXT),
            "language.language": pa.array(languages or ["en"] * len(texts), TEXT),
        }
    )


def test_trained_twice_and_from_other_shards_the_files_are_equal(trained, tmp_path):
    root, _, outcome = trained
    again = Root(str(tmp_path / "root"))
    with_workers = LocalEngine(tmp_path / "scratch", 2)
    try:
        other = run(TRAIN, again, corpus(again, shards=3), with_workers, **SMALL)
    finally:
        with_workers.close()
    assert other.outputs == outcome.outputs
    assert {"model.json", "linear.npz", "cards.json", "fluency-en.npz"} == set(outcome.outputs)
    for name in outcome.outputs:
        assert root.read_bytes(f"models/train_raters/{name}") == again.read_bytes(f"models/train_raters/{name}")


def test_cards_say_what_was_learned_from_what(trained):
    root, _, outcome = trained
    cards = {card["rater"]: card for card in root.read_json("models/train_raters/cards.json")}
    assert list(cards) == list(RATERS)
    teaching = cards["educational"]
    assert teaching["docs"] == 80  # 40 tutorials, 40 releases; stories say neither
    assert teaching["base_rate"] == 0.5
    assert teaching["held_out_auc"] > 0.9  # of sites not seen
    assert cards["reference"]["held_out_auc"] is not None
    for card in cards.values():
        assert card["length_auc"] is not None
        assert card["compression_auc"] is not None
        assert card["labels"]
    assert outcome.accounts == {"raters": 6, "sample_docs": 200, "languages": 1}


def test_scores_mean_what_they_say(trained):
    root, datasets, _ = trained
    outcome = run(SCORE, root, datasets)
    scores = layer(datasets, "raters")
    by_id = {d["doc_id"]: d for docs in rows().values() for d in docs}
    teaches, tells = [], []
    for doc_id, row in scores.items():
        assert row["computed"]
        assert row["bytes"] == len(by_id[doc_id]["text"].encode())
        assert all(0 <= row[name] <= 1 for name in RATERS)  # English, which all were trained in
        (teaches if "tutorial" in by_id[doc_id]["url"] else tells if "releases" in by_id[doc_id]["url"] else []).append(
            row["educational"]
        )
    assert min(teaches) > max(tells)
    assert outcome.accounts == {"rows": 200, "computed": 200, "rejected": 0}


def test_a_document_is_scored_by_the_half_that_has_not_read_it(trained):
    root, _, _ = trained
    state = state_of(RatersConfig(), load(root, "train_raters"))
    text = rows()["web"][0]["text"]
    ids = [f"{i:032x}" for i in range(40)]
    out, _ = rate(state, batch([text] * 40))
    found = out.column("educational").to_pylist()
    assert len(set(found)) == 2  # one text, two models, chosen by doc_id alone
    assert found == rate(state, batch([text] * 40))[0].column("educational").to_pylist()
    assert len(ids) == 40


def test_batches_and_order_change_nothing(trained):
    root, _, _ = trained
    state = state_of(RatersConfig(), load(root, "train_raters"))
    whole = batch([d["text"] for d in rows(30)["web"]])
    table = pa.table(rate(state, whole)[0])
    parts = pa.concat_tables([pa.table(rate(state, whole.slice(i, 7))[0]) for i in range(0, whole.num_rows, 7)])
    assert table.combine_chunks().equals(parts.combine_chunks())
    order = np.random.default_rng(1).permutation(whole.num_rows)
    turned = pa.table(rate(state, whole.take(pa.array(order)))[0])
    assert turned.equals(table.take(pa.array(order)))


def test_ugly_texts_have_scores_or_nulls_and_never_nan(trained):
    root, _, _ = trained
    state = state_of(RatersConfig(), load(root, "train_raters"))
    texts = ["", " \n\t", "\x00", "\ufffd" * 50, "word", "x" * 5_000_000, "a b " * 1_250_000, "日本語のテキスト。"]
    out, rejects = rate(state, batch([*texts, "Guten Tag"], ["en"] * 7 + ["ja", None]))
    assert rejects == []
    for name in RATERS:
        column = out.column(name)
        assert not any(v is not None and np.isnan(v) for v in column.to_pylist())
        assert column[0].as_py() is None  # nothing to read
        assert column[7].as_py() is None  # no labels and no model in Japanese
        assert column[8].as_py() is None
        assert column[5].as_py() is not None
    assert out.column("bytes").to_pylist()[5:7] == [5_000_000, 5_000_000]
    assert out.schema.equals(SCORE.layer)
    assert rate(state, batch([]))[0].num_rows == 0


def test_one_class_only_is_an_error_that_names_what_is_missing(tmp_path):
    root = Root(str(tmp_path / "root"))
    made = rows()
    web = {"web": [d for d in made["web"] if "tutorial" in d["url"]]}
    with pytest.raises(StageError) as e:
        run(TRAIN, root, corpus(root, made=web), **SMALL)
    assert "no bad documents for educational" in str(e.value)
    assert "no good documents for reference" in str(e.value)
    assert "labelled" in str(e.value)


def test_a_labelled_file_gives_the_missing_class(tmp_path):
    root = Root(str(tmp_path / "root"))
    made = rows()
    web = {"web": [d for d in made["web"] if "stories" in d["url"]]}
    path = tmp_path / "labels.jsonl"
    lines = [
        {"text": d["text"], "label": int("tutorial" in d["url"])} for d in made["web"] if "stories" not in d["url"]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(TRAIN, root, corpus(root, made=web), raters=["educational"], labelled={"educational": str(path)}, **SMALL)
    card = root.read_json("models/train_raters/cards.json")[0]
    assert card["docs"] == 80
    assert card["held_out_auc"] is None  # one source: without it nothing is left to learn from
    assert "not to be had" in card["note"]


def test_nothing_to_learn_from_and_no_model_are_named(tmp_path):
    root = Root(str(tmp_path / "root"))
    datasets = corpus(root)
    with pytest.raises(StageError, match="no documents to learn from"):
        run(TRAIN, root, datasets, where="source == 'absent'")
    with pytest.raises(StageError, match="run stage train_raters first"):
        run(SCORE, root, datasets)
    with pytest.raises(ConfigError, match="unknown raters"):
        TRAIN.config(raters=["taste"])
    with pytest.raises(ConfigError, match="no labels are taken"):
        TRAIN.config(labelled={"fluency": "x.jsonl"})


def test_in_a_pipeline_raters_share_a_pass_and_follow_their_models(tmp_path):
    lines = [json.dumps({"text": d["text"], "url": d["url"]}) + "\n" for d in rows()["web"]]
    (tmp_path / "web").mkdir()
    for i in range(2):
        (tmp_path / "web" / f"{i}.jsonl").write_text("".join(lines[i::2]))

    def ran(bits):
        config = tmp_path / "p.yaml"
        config.write_text(PIPELINE.format(folder=tmp_path, bits=bits))
        runner = Runner(load_pipeline(config), RunOptions("test"))
        return runner, {p.step.name: p for p in runner.run()}

    runner, _ = ran(14)
    first = read_manifest(runner.root, "raters", "web")
    assert first.observed["fused"] == ["pii", "raters"]
    assert first.accounts == {"rows": 120, "computed": 120, "rejected": 0}
    assert first.identity.artifacts["@train_raters"] == read_manifest(runner.root, "train_raters", None).content()
    assert not any(p.run for p in ran(14)[1].values())
    _, planned = ran(12)
    assert [name for name, p in planned.items() if p.run] == ["train_raters", "raters [web]"]
    assert read_manifest(runner.root, "raters", "web").content() != first.content()

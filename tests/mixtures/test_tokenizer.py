"""The tokenizer: deterministic whatever the order and threads, lossless, and never a special token out of a document."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from core.errors import ConfigError, StageError
from core.schema import SPANS
from mixtures.encoder import Encoder, as_text, describe, open_encoder, pieces_of, read_info
from mixtures.tokenizer import EOS, PAD, STAGE, TokenizerConfig, train
from tests.bounds import BOUND_S
from tests.mixtures.conftest import House, documents, sentence

TEXTS = [sentence(i, 40) for i in range(30)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = train(iter(TEXTS), TokenizerConfig(vocab_size=400))
    info = describe(tokenizer, "t", EOS)
    return Encoder(tokenizer, info.eos, info.dtype)


def filled(house: House, order: int = 1) -> House:
    shards = {"s1": documents("web", TEXTS[:15]), "s2": documents("web", TEXTS[15:], [f"u{i}" for i in range(15)])}
    house.add("web", dict(list(shards.items())[::order]))
    house.judge("web", drop=["page 13 "])
    return house


def test_training_does_not_depend_on_order_or_threads(tmp_path: Path) -> None:
    script = (
        "import sys; from tests.mixtures.test_tokenizer import TEXTS; from mixtures.tokenizer import train, TokenizerConfig;"
        "print(train(iter(TEXTS[::int(sys.argv[1])]), TokenizerConfig(vocab_size=400)).to_str())"
    )
    made = set()
    for order, threads in ((1, "1"), (-1, "4")):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script, str(order)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
            timeout=BOUND_S,
        )
        made.add(done.stdout)
    assert len(made) == 1


def test_shard_order_and_workers_change_nothing(make_house: Callable[[str], House]) -> None:
    a, b = filled(make_house("a")), filled(make_house("b"), order=-1)
    first = a.run(STAGE, vocab_size=350, sample_bytes=4000)
    second = b.run(STAGE, workers=2, vocab_size=350, sample_bytes=4000)
    assert first.outputs == second.outputs
    assert a.root.read_bytes("models/tokenizer/tokenizer.json") == b.root.read_bytes("models/tokenizer/tokenizer.json")
    assert 1000 < first.observed["sample_bytes"] == second.observed["sample_bytes"] < 12_000
    assert not a.root.names("exchange")


def test_special_tokens_come_first_and_info_says_so(house: House) -> None:
    filled(house).run(STAGE, vocab_size=300, reserved=2)
    info = read_info(house.root, "tokenizer")
    assert (info.eos, info.eos_token, info.vocab_size, info.dtype) == (0, EOS, 300, np.uint16)
    tokenizer = Tokenizer.from_str(house.root.read_bytes("models/tokenizer/tokenizer.json").decode())
    assert [tokenizer.id_to_token(i) for i in range(4)] == [EOS, PAD, "<|reserved_0|>", "<|reserved_1|>"]


def test_only_kept_train_documents_are_sampled(house: House) -> None:
    house.add("web", {"s": documents("web", ["good good good", "zzqq zzqq zzqq", "kkvv kkvv kkvv"])})
    house.judge("web", drop=["zzqq"], held_out=["kkvv"])
    outcome = house.run(STAGE, vocab_size=400)
    vocabulary = house.root.read_bytes("models/tokenizer/tokenizer.json")
    assert outcome.observed["sample_bytes"] == len("good good good")
    assert b"good" in vocabulary
    assert b"zz" not in vocabulary
    assert b"kk" not in vocabulary


def test_spans_are_applied_before_training(house: House) -> None:
    house.add("web", {"s": documents("web", ["mail jane@corp.example now"])})
    house.judge("web")
    span = {"start": 5, "end": 22, "replacement": "X", "label": "email"}
    house.layer("web", "pii", pa.schema([pa.field("spans", SPANS)]), lambda d: {"spans": [span]})
    assert house.run(STAGE, vocab_size=400, spans=["pii.spans"]).observed["sample_bytes"] == len("mail X now")


def test_nothing_to_train_on_is_an_error(house: House) -> None:
    house.add("web", {"s": documents("web", ["zzqq"])})
    house.judge("web", drop=["zzqq"])
    with pytest.raises(StageError, match="no text to train on"):
        house.run(STAGE, vocab_size=400)


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_round_trips(text: str) -> None:
    tokenizer = _shared()
    tokens, lengths = Encoder(tokenizer, 0, np.dtype(np.uint16)).encode([text])
    assert lengths.tolist() == [len(tokens)]
    assert tokens[-1] == 0
    assert tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False) == text


def _shared(made: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 - trained once for all examples
    if not made:
        made.append(train(iter(TEXTS), TokenizerConfig(vocab_size=400)))
        as_text(made[0])
    return made[0]


@pytest.mark.parametrize("text", [EOS, f"a{EOS}b", f"{PAD}{PAD}", "<|reserved_3|>", f"x {EOS}\n"])
def test_special_token_text_stays_text(encoder: Encoder, text: str) -> None:
    tokens, _ = encoder.encode([text])
    assert tokens[:-1].min() >= 16
    assert tokens[-1] == 0


def test_digits(encoder: Encoder) -> None:
    tokenizer = train(iter(["1847 1847 1847"] * 9), TokenizerConfig(vocab_size=400))
    grouped = train(iter(["1847 1847 1847"] * 9), TokenizerConfig(vocab_size=400, split_digits=False))
    assert tokenizer.encode("1847").tokens == ["1", "8", "4", "7"]
    assert grouped.encode("1847").tokens == ["184", "7"]


def test_keys_and_base64_teach_no_merges() -> None:
    vocabulary = train(iter(["qwqw" * 100 + " river river"] * 9), TokenizerConfig(vocab_size=400)).get_vocab()
    assert "Ġriver" in vocabulary
    assert "qw" not in vocabulary
    assert "qw" in train(iter(["qwqw" * 60 + " river river"] * 9), TokenizerConfig(vocab_size=400)).get_vocab()


def test_long_documents_are_cut_where_no_token_changes(encoder: Encoder) -> None:
    text = "".join(sentence(i, 9) for i in range(40))
    pieces = list(pieces_of(text, 200))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 200
    assert len(pieces) > 5
    whole, _ = encoder.encode([text])
    parts = [encoder.encode([p])[0][:-1] for p in pieces]
    assert np.concatenate([*parts, [0]]).tolist() == whole.tolist()


def test_a_huge_line_without_a_break(encoder: Encoder) -> None:
    text = "é" * 1_100_000
    assert [len(p) for p in pieces_of(text)] == [1 << 20, 1_100_000 - (1 << 20)]
    tokens, lengths = encoder.encode(["", text, "a"])
    assert lengths[0] == 1
    assert lengths.sum() == len(tokens)
    assert tokens[np.cumsum(lengths) - 1].tolist() == [0, 0, 0]


def given_tokenizer(path: Path, eos: str, special: bool = True) -> str:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.enable_truncation(1)
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([eos])
    tokenizer.save(str(path))
    return str(path)


def test_a_given_tokenizer_is_used_without_its_truncation(house: House, tmp_path: Path) -> None:
    house.run(STAGE, file=given_tokenizer(tmp_path / "t.json", "</s>"), eos="</s>")
    info = read_info(house.root, "tokenizer")
    assert (info.eos, info.vocab_size) == (2, 3)
    tokens, _ = open_encoder(house.root.url, info).encode(["abba"])
    assert tokens.tolist() == [0, 1, 1, 0, 2]


def test_a_given_tokenizer_without_eos_is_refused(house: House, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no token '<\|endoftext\|>'"):
        house.run(STAGE, file=given_tokenizer(tmp_path / "t.json", "</s>"))


def test_a_given_tokenizer_that_reads_eos_in_text_is_refused(house: House, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mark the token as special"):
        house.run(STAGE, file=given_tokenizer(tmp_path / "t.json", "</s>", special=False), eos="</s>")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\x00"])
def test_a_file_that_is_no_tokenizer_is_refused(house: House, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot read"):
        house.run(STAGE, file=str(tmp_path / "t.json"))


def test_a_tokenizer_changed_by_hand_is_noticed(house: House) -> None:
    filled(house).run(STAGE, vocab_size=350)
    info = read_info(house.root, "tokenizer")
    name = "models/tokenizer/tokenizer.json"
    tokenizer = Tokenizer.from_str(house.root.read_bytes(name).decode())
    tokenizer.add_tokens(["smuggled"])
    house.root.write_bytes(name, tokenizer.to_str().encode())
    open_encoder.cache_clear()
    with pytest.raises(StageError, match="is not what stage tokenizer wrote"):
        open_encoder(house.root.url, info)


def test_identity_and_limits() -> None:
    assert STAGE.columns(TokenizerConfig(file="x.json")) == ()
    assert STAGE.columns(TokenizerConfig(spans=("pii.spans",)))[2:] == ("fate@final.keep", "split.split", "pii.spans")
    with pytest.raises(ConfigError, match="vocab_size is too small, got 200, expected at least 272"):
        TokenizerConfig(vocab_size=200)

"""Comparisons of arms against scipy, by hand, and by simulation: intervals hold the truth as often as they say."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from core.errors import StageError
from core.statistics import POWER, holm, least_effect, paired_variance, satterthwaite
from mixtures.compare import Comparison, Losses, compare, run_noise


def losses(bits: dict[str, Any], text_bytes: Any = None, aa: str | None = None, **more: Any) -> Losses:
    """One domain, the first arm as the baseline."""
    made = {arm: np.array(b, dtype=float) for arm, b in bits.items()}
    n = next(iter(made.values())).shape[1]
    sizes = np.ones(n) if text_bytes is None else np.array(text_bytes)
    filled = {"domain": np.zeros(n, int), "domains": ["web"], **more}
    return Losses(bits=made, bytes=sizes, baseline=next(iter(made)), aa=aa, **filled)


def one(found: Losses, arm: str = "b") -> Comparison:
    return next(c for c in compare(found) if c.arm == arm)


def test_with_equal_documents_and_silent_runs_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(2, 0.3, 25), rng.normal(2.1, 0.3, 25)
    c = one(losses({"a": [a, a], "b": [b, b]}))
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert (c.low, c.high) == pytest.approx((interval.low, interval.high))
    assert (c.p, c.df, c.runs_error) == (pytest.approx(expected.pvalue), 24, 0.0)
    assert c.effect == pytest.approx((b - a).mean())


def test_with_one_difference_for_all_documents_it_is_the_paired_t_test_over_seeds() -> None:
    rng = np.random.default_rng(4)
    hard, runs_a, runs_b = rng.normal(2, 0.5, 30), rng.normal(0, 0.1, 4), rng.normal(0.05, 0.1, 4)
    c = one(losses({"a": hard + runs_a[:, None], "b": hard + runs_b[:, None]}))
    expected = stats.ttest_rel(runs_b, runs_a)
    interval = expected.confidence_interval(0.95)
    assert (c.low, c.high) == pytest.approx((interval.low, interval.high))
    assert (c.p, c.df) == pytest.approx((expected.pvalue, 3))
    assert c.docs_error == pytest.approx(0, abs=1e-12)


def test_variance_of_a_ratio_by_hand() -> None:
    # ratio 6 / 6 = 1, residuals 1 - 1, 1 - 2, 4 - 3: n / (n - 1) * (0 + 1 + 1) / 6^2
    assert paired_variance(np.array([1.0, 1.0, 4.0]), np.array([1, 2, 3])) == pytest.approx(1.5 * 2 / 36)


def test_noise_of_runs_is_the_residual_of_arm_and_seed() -> None:
    rng = np.random.default_rng(5)
    bpb, groups = rng.normal(size=(4, 3)), [0, 1, 2, 0]
    rows = [(k, s) for k in range(4) for s in range(3)]
    design = np.array([[groups[k] == g for g in range(3)] + [s == t for t in range(3)] for k, s in rows], float)
    fitted = design @ np.linalg.lstsq(design, bpb.ravel(), rcond=None)[0]
    df = len(rows) - np.linalg.matrix_rank(design)
    assert run_noise(bpb, groups) == (pytest.approx(np.square(bpb.ravel() - fitted).sum() / df), df)
    assert run_noise(rng.normal(size=(3, 2)), [0, 1, 0])[1] == 3, "two arms, A/A, two seeds"
    assert run_noise(rng.normal(size=(2, 2)), [0, 1])[1] == 1


def test_satterthwaite_by_hand() -> None:
    assert satterthwaite((2.0, 0.0), (7, 3)) == 7
    assert satterthwaite((1.0, 1.0), (4, 4)) == 8
    assert satterthwaite((0.0, 0.0), (4, 4)) == math.inf


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_least_effect_is_found_as_often_as_promised() -> None:
    assert least_effect(0.5, math.inf) == pytest.approx(0.5 * (1.959964 + 0.841621))
    for df in (3, 10, 60):
        shift, critical = least_effect(1.0, df), stats.t.ppf(0.975, df)
        found = stats.nct.sf(critical, df, shift) + stats.nct.cdf(-critical, df, shift)
        assert found == pytest.approx(POWER, abs=0.02)


def draw(
    rng: np.random.Generator, effect: float, run: float, seeds: int = 2, docs: int = 40, aa: bool = True
) -> Losses:
    """Documents of unequal length and difficulty, to which the arm does unequal good; runs and seeds with noise."""
    size = np.exp(rng.normal(7, 0.6, docs))
    hard, own = rng.normal(2, 0.4, docs), rng.normal(effect, 0.02, docs)
    block = rng.normal(0, 0.01, seeds)[:, None]
    bits = {}
    for arm in ("a", "b", "aa")[: 3 if aa else 2]:
        noise = rng.normal(0, run, seeds)[:, None] + rng.normal(0, 0.01, (seeds, docs))
        bits[arm] = (hard + block + noise + (own if arm == "b" else 0)) * size
    return losses(bits, size, "aa" if aa else None)


@pytest.mark.parametrize(
    ("run", "settings"),
    [(0.004, {}), (0.02, {}), (0.0001, {}), (0.004, {"aa": False, "seeds": 3}), (0.02, {"docs": 10})],
    ids=["both", "runs_rule", "documents_rule", "without_aa", "few_documents"],
)
def test_intervals_hold_the_truth(run: float, settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    found = [one(draw(rng, -0.02, run, **settings)) for _ in range(1000)]
    assert 0.93 <= np.mean([c.low <= -0.02 <= c.high for c in found]) <= 0.97


def test_arms_that_are_alike_tie_and_a_large_effect_does_not() -> None:
    rng = np.random.default_rng(2)
    alike = [one(draw(rng, 0.0, 0.01)).verdict for _ in range(300)]
    assert alike.count("tie") >= 0.95 * 300
    assert {one(draw(rng, -0.3, 0.01)).verdict for _ in range(20)} == {"better"}
    assert {one(draw(rng, 0.3, 0.01)).verdict for _ in range(20)} == {"worse"}


def test_identical_runs_tie() -> None:
    bits = np.random.default_rng(6).normal(2, 0.3, (2, 12))
    for c in compare(losses({"a": bits, "b": bits, "aa": bits}, aa="aa")):
        assert (c.effect, c.p, c.verdict) == (0.0, 1.0, "tie")


def test_what_is_significant_below_the_least_effect_is_a_tie() -> None:
    base = np.array([2.0, 2.0, 2.0, 2.0])
    step = np.array([0.1, 0.1001, 0.0999, 0.1])
    wild = base + np.array([0.9, -0.9, 0.8, -0.8])  # A/A differs by document, not on the whole
    c = one(losses({"a": [base, base], "b": [base + step, base + step], "aa": [wild, wild]}, aa="aa"))
    assert c.least_effect is not None
    quiet = one(losses({"a": [base, base], "b": [base + step, base + step]}))
    assert (quiet.verdict, quiet.least_effect) == ("worse", None)
    assert abs(c.effect) < c.least_effect
    assert c.verdict == "tie"


def test_many_arms_are_corrected_and_the_aa_arm_is_not_among_them() -> None:
    rng = np.random.default_rng(7)
    bits = {arm: rng.normal(2, 0.3, (2, 12)) for arm in ("a", "b", "c", "aa")}
    domains = {"domain": np.repeat([0, 1], 6), "domains": ["web", "code"]}
    found = compare(losses(bits, aa="aa", **domains))
    assert [(c.arm, c.domain) for c in found] == [(arm, d) for arm in ("b", "c", "aa") for d in ("web", "code")]
    tested = [c for c in found if c.arm != "aa"]
    assert [c.p_holm for c in tested] == holm([c.p for c in tested])
    assert all(c.p_holm == c.p for c in found if c.arm == "aa")


def test_a_domain_of_one_document_is_not_compared() -> None:
    bits = np.random.default_rng(8).normal(2, 0.3, (2, 4))
    found = compare(losses({"a": bits, "b": bits + 1}, domain=np.array([0, 0, 0, 1]), domains=["web", "code"]))
    assert [c.domain for c in found] == ["web"]


def test_what_cannot_be_known_is_refused() -> None:
    bits = np.ones((1, 4))
    with pytest.raises(StageError, match="got one seed and no A/A arm; name two seeds"):
        compare(losses({"a": bits, "b": bits}))
    with pytest.raises(StageError, match="arms differ in seeds or documents"):
        compare(losses({"a": np.ones((2, 4)), "b": np.ones((2, 3))}))


@given(st.integers(0, 999), st.integers(2, 4), st.integers(3, 30), st.permutations(range(3)))
def test_laws(seed: int, seeds: int, docs: int, turn: list[int]) -> None:
    """Neither the documents' order, nor that of seeds, nor a difficulty that all arms share changes a comparison."""
    rng = np.random.default_rng(seed)
    size, bits = rng.integers(1, 9999, docs), {arm: rng.normal(2, 0.3, (seeds, docs)) * 100 for arm in ("a", "b", "aa")}
    order, at = rng.permutation(docs), [t % seeds for t in turn]
    at = sorted(range(seeds), key=lambda s: (at.index(s) if s in at else 9, s))
    hard = rng.normal(0, 50, docs)
    plain = one(losses(bits, size, "aa"))
    moved = one(losses({arm: (b + hard)[at][:, order] for arm, b in bits.items()}, size[order], "aa"))
    for name in ("effect", "low", "high", "p", "least_effect", "df"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name), rel=1e-6, abs=1e-9), name

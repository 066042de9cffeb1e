"""Did an arm change the bits per byte of a domain? Interval, least detectable effect and a verdict, from losses by document.

In: for every arm the bits of each held-out document under each seed (the same documents and seeds for all), the documents'
bytes and domains, and on demand an A/A arm: the baseline trained again on another order of the same data. Out: a `Comparison` for
each arm and domain. No randomness; cost is a few sums.

The effect is the arm's bits per byte less the baseline's (below zero: better): a ratio of sums over documents of means over runs.
Its interval has to answer for two samples at once:

- **Documents.** Arms are compared on the same documents, so the variance is that of the paired differences, with a ratio's
  linearisation because documents differ in length (Cochran, Sampling Techniques, 1977, 6.4; Miller, arXiv 2411.00640, section 4,
  says why paired: most of a document's loss is its own difficulty, and cancels).
- **Runs.** Seeds are blocks: within one, all arms share initial weights. The residual of the additive model arm + seed is the
  noise of training. The A/A arm is the baseline once more, so it adds a run a seed to the baseline and degrees of freedom to the
  residual: 3 instead of 1 for two arms and two seeds (Box, Hunter and Hunter, Statistics for Experimenters, 2005, chapter 4).
  This assumes that arms are equally noisy.

Both variances add; the t quantile has Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). A bootstrap over
documents was not chosen: it says nothing of a third seed, and on the demo (two seeds, 163,840 tokens) the standard error of runs
was 2.5 times that of documents in two domains of three.

The least detectable effect is Bloom's multiple of the standard error (Evaluation Review 19, 1995), with the documents' part taken
from the A/A differences: a true effect of that size would be found with probability `POWER`. What is significant but smaller is
likely exaggerated (Gelman and Carlin, 2014), so it is called a tie too. Over arms and domains p-values are corrected by Holm.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import StageError
from core.statistics import ALPHA, holm, least_effect, paired_variance, satterthwaite

LEAST_DOCS = 2  # below, nothing can be said about other documents
TIE, BETTER, WORSE = "tie", "better", "worse"


@dataclass(frozen=True)
class Losses:
    """Bits of the same documents under every run."""

    bits: Mapping[str, np.ndarray]  # arm -> float64 [seeds, docs]; the seeds are the same for all
    bytes: np.ndarray  # int64 [docs]
    domain: np.ndarray  # int [docs], index into `domains`
    domains: Sequence[str]
    baseline: str
    aa: str | None = None  # the arm that is the baseline again


@dataclass(frozen=True)
class Comparison:
    """One arm beside the baseline on one domain. Bits per byte; effects below zero are better."""

    arm: str
    domain: str
    docs: int
    bytes: int
    baseline_bpb: float
    arm_bpb: float
    effect: float
    low: float
    high: float
    docs_error: float  # standard error from the choice of documents
    runs_error: float  # standard error from the noise of training
    df: float
    p: float
    p_holm: float  # over all arms and domains; of the A/A arm the same as `p`
    least_effect: float | None  # None without an A/A arm
    verdict: str  # better, worse or tie


def compare(losses: Losses) -> list[Comparison]:
    """Every arm but the baseline on every domain with at least `LEAST_DOCS` documents, arms outermost.

    One seed without an A/A arm leaves the noise of training unknown: a StageError.
    """
    _check(losses)
    found = [
        _compare(losses, arm, d)
        for arm in losses.bits
        if arm != losses.baseline
        for d in range(len(losses.domains))
        if int((losses.domain == d).sum()) >= LEAST_DOCS
    ]
    corrected = iter(holm([c.p for c in found if c.arm != losses.aa]))
    return [judged(c, c.p if c.arm == losses.aa else next(corrected)) for c in found]


def judged(c: Comparison, p_holm: float) -> Comparison:
    """The comparison with its corrected p-value and verdict."""
    unsure = p_holm > ALPHA or c.low <= 0.0 <= c.high or abs(c.effect) < (c.least_effect or 0.0)
    verdict = TIE if unsure else BETTER if c.effect < 0 else WORSE
    return Comparison(**{**vars(c), "p_holm": p_holm, "verdict": verdict})


def run_noise(bpb: np.ndarray, groups: Sequence[int]) -> tuple[float, int]:
    """(variance of one run, its degrees of freedom) from bits per byte [arms, seeds]; arms of one group are the same treatment.

    The residual of group + seed, both orthogonal because every seed has every arm."""
    arms, seeds = bpb.shape
    group = np.array(groups)
    means = np.array([bpb[group == g].mean() for g in group])
    rest = bpb - means[:, None] - bpb.mean(axis=0)[None, :] + bpb.mean()
    df = arms * seeds - len(set(groups)) - seeds + 1
    return float(np.square(rest).sum() / df), df


def _check(losses: Losses) -> None:
    shapes = {arm: bits.shape for arm, bits in losses.bits.items()}
    if len(set(shapes.values())) > 1:
        raise StageError(f"ablation: arms differ in seeds or documents, got {shapes}; evaluate all on the same ones")
    seeds = next(iter(shapes.values()))[0]
    if seeds < 2 and losses.aa is None:
        raise StageError(
            "ablation: the noise of training is unknown, got one seed and no A/A arm; name two seeds or set `aa: true`"
        )


def _compare(losses: Losses, arm: str, d: int) -> Comparison:
    from scipy.stats import t

    here = losses.domain == d
    text_bytes = losses.bytes[here].astype(np.float64)
    total = float(text_bytes.sum())
    bits = {name: by_seed[:, here] for name, by_seed in losses.bits.items()}
    same = [losses.baseline] if arm == losses.aa or losses.aa is None else [losses.baseline, losses.aa]
    base = np.concatenate([bits[name] for name in same])
    difference = bits[arm].mean(axis=0) - base.mean(axis=0)
    effect = float(difference.sum() / total)

    noise, noise_df = _noise(losses, bits, total)
    docs_var = paired_variance(difference, text_bytes)
    runs_var = noise * (1 / len(bits[arm]) + 1 / len(base))
    n = len(text_bytes)
    error, df = math.sqrt(docs_var + runs_var), satterthwaite((docs_var, runs_var), (n - 1, noise_df))
    half = float(t.ppf(1 - ALPHA / 2, df)) * error
    least = None
    if losses.aa is not None:
        aa_var = paired_variance((bits[losses.aa] - bits[losses.baseline]).mean(axis=0), text_bytes)
        least = least_effect(math.sqrt(aa_var + runs_var), satterthwaite((aa_var, runs_var), (n - 1, noise_df)))
    p = float(2 * t.sf(abs(effect) / error, df)) if error else float(effect == 0.0)
    baseline_bpb = float(base.mean(axis=0).sum() / total)
    return Comparison(
        arm=arm,
        domain=losses.domains[d],
        docs=n,
        bytes=int(total),
        baseline_bpb=baseline_bpb,
        arm_bpb=baseline_bpb + effect,
        effect=effect,
        low=effect - half,
        high=effect + half,
        docs_error=math.sqrt(docs_var),
        runs_error=math.sqrt(runs_var),
        df=df,
        p=p,
        p_holm=p,
        least_effect=least,
        verdict=TIE,
    )


def _noise(losses: Losses, bits: Mapping[str, np.ndarray], total: float) -> tuple[float, int]:
    """Noise of one run's bits per byte on one domain, from all arms."""
    names = list(bits)
    groups = [names.index(losses.baseline) if name == losses.aa else i for i, name in enumerate(names)]
    return run_noise(np.array([bits[name].sum(axis=1) / total for name in names]), groups)

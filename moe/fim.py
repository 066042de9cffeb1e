"""Documents whose middle is moved to their end, so that a model learns to fill it in (Bavarian et al. 2022, arXiv 2207.14255).

In: a `TokenSource`. Out: the same entries, of which a fraction in the named domains is rearranged: cut at two places
into prefix, middle and suffix, and written by half each as

    PSM   <prefix> prefix <suffix> suffix <middle> middle EOS
    SPM   <prefix> <suffix> suffix <middle> prefix middle EOS

Whether, how and where depends on (seed, entry) alone, so a document that the mixture repeats is cut elsewhere each time; a
pass over the mixture that `train.repeat` adds cuts as the first did. No token is lost and a rearranged document is longer by
the three sentinels, whatever the cuts, so `lengths` and with it packing need no token read. A document longer than the
context stays as it is, because a row's border would part the middle from what surrounds it; so does one with fewer than
three tokens before EOS. For the same reason a run with it packs by best fit (moe/data.py).

The three parts count in the loss, as in the paper, and EOS, which ends the middle; the sentinels do not: whoever infills
gives them, and a model that is asked for plain text shall not open with one. The cuts lie between tokens; the paper cuts
between characters, which also teaches completion from within a word, and token shards cannot tell. Cost: one hash an entry
of those domains at the start: 200,000 entries a second.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from core.errors import ConfigError
from core.hashing import digest, seeded

if TYPE_CHECKING:
    from moe.data import TokenSource

SENTINELS = 3
LEAST_TOKENS = 4  # EOS included: one for each part
SPM_FRACTION = 0.5  # of rearranged documents; the paper's joint training


class FimSource:
    """A `TokenSource` that rearranges `fraction` of another's documents in `domains`.

    `sentinels` are the ids that mark prefix, middle and suffix. They may lie beyond the source's vocabulary, which then grows.
    """

    def __init__(
        self,
        source: "TokenSource",
        *,
        fraction: float,
        domains: Sequence[str],
        sentinels: tuple[int, int, int],
        context: int,
        seed: int,
    ) -> None:
        self._source, self._seed, self._sentinels = source, seed, sentinels
        _check(source, domains, sentinels)
        self.vocab_size, self.eos = max(source.vocab_size, *(s + 1 for s in sentinels)), source.eos
        self.domains = source.domains
        lengths = source.lengths()
        wanted = [d for d, name in enumerate(source.domains) if name in set(domains)]
        domain = np.fromiter((source.domain(i) for i in range(len(source))), dtype=np.int32, count=len(source))
        fits = (lengths >= LEAST_TOKENS) & (lengths + SENTINELS <= context)
        self.rearranged = np.isin(domain, wanted) & fits  # bool [n]
        candidates = np.flatnonzero(self.rearranged)
        self.rearranged[candidates] = [self._drawn("fim", i) < fraction for i in candidates.tolist()]
        self._lengths = lengths + SENTINELS * self.rearranged
        self.content = digest([source.content, fraction, sorted(domains), list(sentinels), context, seed])

    def __len__(self) -> int:
        return len(self._source)

    def tokens(self, i: int) -> np.ndarray:
        tokens = self._source.tokens(i)
        return self._moved(i, tokens, self._sentinels) if self.rearranged[i] else tokens

    def mask(self, i: int) -> np.ndarray | None:
        """The source's mask, moved with the tokens; False at the sentinels."""
        mask = self._source.mask(i)
        if not self.rearranged[i]:
            return mask
        return self._moved(i, np.ones(self._source.length(i), np.bool_) if mask is None else mask, (False,) * SENTINELS)

    def length(self, i: int) -> int:
        return int(self._lengths[i])

    def lengths(self) -> np.ndarray:
        return self._lengths

    def domain(self, i: int) -> int:
        return self._source.domain(i)

    def bytes(self, i: int) -> int:
        return self._source.bytes(i)

    def _moved(self, i: int, values: np.ndarray, sentinels: tuple[int, ...]) -> np.ndarray:
        """One value a token of entry i in the order that the entry has here, those of the sentinels between them."""
        text = len(values) - 1
        low, high = sorted(int(self._drawn(f"cut{k}", i) * (text + 1)) for k in range(2))
        before, middle, after = ([np.array([s], dtype=values.dtype)] for s in sentinels)
        prefix, span, suffix = values[:low], values[low:high], values[high:text]
        if self._drawn("spm", i) < SPM_FRACTION:
            parts = [*before, *after, suffix, *middle, prefix, span]
        else:
            parts = [*before, prefix, *after, suffix, *middle, span]
        return np.concatenate([*parts, values[text:]])

    def _drawn(self, what: str, i: int) -> float:
        return seeded(self._seed, f"{what}/{i}")


def _check(source: "TokenSource", domains: Sequence[str], sentinels: tuple[int, int, int]) -> None:
    problems = []
    unknown = sorted(set(domains) - set(source.domains))
    if unknown:
        problems.append(
            f"train.fim_domains: no such domain in the mixture, got {unknown}, expected some of {list(source.domains)}"
        )
    if len({*sentinels, source.eos}) != SENTINELS + 1 or min(sentinels) < 0:
        problems.append(
            f"train.fim_tokens: must be three different ids other than EOS, got {sentinels} and EOS {source.eos}"
        )
    if problems:
        raise ConfigError(*problems)

"""Which passages are worth a paid request: the densest first, as long as they still cover something.

In: candidates, best first, each with the entities of the inventory that it holds. Out: the indices chosen, in the same order.
"""

from collections import Counter
from collections.abc import Sequence


def choose(
    entities: Sequence[Sequence[str]], documents: Sequence[str], most: int, per_entity: int, per_document: int
) -> list[int]:
    """Greedy: a candidate is taken when it holds an entity that fewer than `per_entity` taken passages hold.

    At most `per_document` passages of one document and `most` in all. A candidate without entities covers nothing."""
    covered: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    out: list[int] = []
    for i, (held, document) in enumerate(zip(entities, documents, strict=True)):
        if len(out) == most:
            break
        if taken[document] < per_document and any(covered[e] < per_entity for e in held):
            out.append(i)
            taken[document] += 1
            covered.update(set(held))
    return out

"""A made-up source, and ingest as the runner calls it. Imported by the processes that the tests kill."""

import random

from core.dataset import DOCUMENTS_INSTANCE
from core.engines.contract import Unit
from core.engines.local import LocalEngine
from core.ingest import Reader, ingest
from core.manifest import Identity, Manifest, write_manifest
from tests.builders import make_job
from tests.core.kernels import source_digest, source_parse, source_records


class Listed:
    """`Reader.units` over a dict of name -> records."""

    def __init__(self, units):
        self.of = units

    def __call__(self):
        return [Unit(name, records, 10 * len(records)) for name, records in self.of.items()]


def run(root, units, engine=None, code="code"):
    """Ingest and do what the runner does afterwards: write the manifest, then clean up."""
    engine = engine or LocalEngine(root.path("exchange/test"), 0)
    engine.begin(root.path(f"exchange/test-{source_digest(Unit('x', [code, sorted(units.items())]))}"))
    reader = Reader("src", Listed(units), source_records, source_parse, source_digest)
    outcome = ingest(make_job(root, engine, code=code), reader)
    manifest = Manifest(
        DOCUMENTS_INSTANCE,
        "src",
        Identity("x", 1, {}, {}),
        outcome.outputs,
        outcome.accounts,
        outcome.observed,
        outcome.units,
    )
    write_manifest(root, manifest)
    for name in outcome.cleanup:
        root.remove(name)
    engine.clear()
    return outcome


def kill_input(generation):
    """Units that share many captures; each generation changes, adds and removes some."""
    rng = random.Random(generation // 2)
    units = {}
    for u in range(12 + generation % 3):
        salt = generation if u % 4 == 0 else 0
        texts = [f"text {random.Random(f'{u}.{i}.{salt}').randrange(90)}" for i in range(60)]
        units[f"u{u:02d}"] = [(f"u{u}/{i}", t, f"http://x/{t[5:]}") for i, t in enumerate(texts)]
    del units[rng.choice(sorted(units))]
    return units

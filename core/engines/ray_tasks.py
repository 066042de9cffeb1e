"""What runs in Ray's workers: each verb over its blocks, bounded in memory.

A frame's task is a stream: tables of about a block, each an object of its own, and at the end one small `Fact`. A task of an
exchange gives one slice a partition, then its `Fact`. Slices come as tables where they fit into a block together, else as
references that are read one after the other, in passes that keep one share of the keys each.

Everything is a function of its arguments alone, so that a lost object can be made again, with the same number of tables.
"""

import faulthandler
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from core.engines.columns import blocks, join_tables, partition_hash
from core.engines.contract import Align, ChunkFn, Report, Unit, UnitFn, write_shards
from core.engines.guard import alone, watched
from core.engines.measure import peak_memory, reset_peak_memory
from core.engines.pool import attempted, quiet_note
from core.engines.ray_cluster import ray
from core.engines.spill import Cut, Told, chunks, gathered, prepared, shards_of, split

STALL_S = 600.0  # for one block of a frame, the contract's default for a unit
END = object()


@dataclass
class Fact:
    """What a finished task says to the driver: the size of each of its tables, the rows that a cap cut, the largest key."""

    sizes: list[int] = field(default_factory=list)
    told: Told = field(default_factory=Told)
    peak_memory_bytes: int = 0
    value: Any = None


class Actor:
    """A worker that lives on from unit to unit, so that a model is loaded once (see `core.annotate.opened`)."""

    def ready(self) -> None:
        """The actor has its place."""

    def run(self, fn: UnitFn, unit: Unit, label: str, stall_s: float) -> Report:
        return run_unit(fn, unit, label, stall_s)


def run_unit(fn: UnitFn, unit: Unit, label: str, stall_s: float, died: bool = False) -> Report:
    """One unit; after a death of its worker in a child process, so that a row that kills is found."""
    _settle()
    if died:
        return alone(fn, unit, label, stall_s)
    return attempted(partial(watched, fn, unit, stall_s), label, unit.name)


def streamed(make: Callable[..., Iterator[Any]], label: str, name: str, *arguments: Any) -> Iterator[Any]:
    """The tables that `make(fact, *arguments)` yields, then the fact, which `make` may add to."""
    _settle()
    reset_peak_memory()
    fact = Fact()
    items = _Stream(partial(make, fact, *arguments))
    while (item := attempted(items, label, name)) is not END:
        fact.sizes.append(item.nbytes)
        yield item
        del item  # before the next one is made
    fact.peak_memory_bytes = peak_memory()
    yield fact


class _Stream:
    """Items of `make()`, one a call, then END. After an exception the next call begins anew and passes over those given. The
    process exits if an item is not there after STALL_S."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make, self.given = make, 0
        self.items: Iterator[Any] | None = None

    def __call__(self) -> Any:
        if self.items is None:
            self.items = islice(self.make(), self.given, None)
        faulthandler.dump_traceback_later(STALL_S, exit=True)
        try:
            item = next(self.items, END)
        except Exception:
            self.items = None
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.given += 1
        return item


def _cast(tables: Iterable[pa.Table], schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    """The same rows cast to `schema`, in tables of about `size` bytes; none is empty."""
    return blocks((table.select(schema.names).cast(schema) for table in tables), size)


def scanned(
    fn: Callable[[Unit], Iterable[pa.RecordBatch]], schema: pa.Schema, size: int, fact: Fact, unit: Unit
) -> Iterator[pa.Table]:
    yield from _cast((pa.Table.from_batches([batch]) for batch in fn(unit)), schema, size)


def mapped(fn: ChunkFn, schema: pa.Schema, size: int, fact: Fact, *tables: pa.Table) -> Iterator[pa.Table]:
    yield from _cast((fn(table) for table in tables), schema, size)


def cut_up(cut: Cut, schema: pa.Schema, fact: Fact, *tables: pa.Table) -> Iterator[pa.Table]:
    """One slice a partition, empty or not."""
    fact.told = Told()  # a second try begins anew
    made, fact.told.cut_rows = prepared(pa.concat_tables(tables), cut.before_exchange())
    slices = dict(split(made, cut))
    nothing = schema.empty_table()
    for p in range(cut.partitions):
        yield slices.pop(p, nothing)


def reduced(
    fn: ChunkFn, schema_in: pa.Schema, schema: pa.Schema, cut: Cut, size: int, fact: Fact, passes: int, *slices: Any
) -> Iterator[pa.Table]:
    """`fn` over whole keys of one partition, in `passes` shares of its keys."""
    fact.told = Told()

    def results() -> Iterator[pa.Table]:
        for turn in range(passes):
            # Two blocks, or a hot key would be made smaller for each of its slices.
            share = _share(slices, cut, turn, passes)
            table, lost = prepared(gathered(share, schema_in, cut, 2 * size, fact.told), cut)
            fact.told.cut_rows += lost
            fact.told.large(table, cut, size)
            for piece in chunks(table, cut.by) if table.num_rows else ():
                yield fn(piece)
                del piece
            del table  # before the next share is read

    yield from _cast(results(), schema, size)


def joined(
    right: pa.Schema,
    schema: pa.Schema,
    cut: Cut,
    how: str,
    size: int,
    fact: Fact,
    passes: int,
    count: int,
    *slices: Any,
) -> Iterator[pa.Table]:
    """Slices of the left side, `count` of them, then those of the right. Of each share the right side is held; the left side
    passes by in blocks, so its keys may be of any size."""
    every = opened(slices)
    fact.told = Told()

    def results() -> Iterator[pa.Table]:
        for turn in range(passes):
            held = pa.concat_tables([right.empty_table(), *_share(every[count:], cut, turn, passes)]).combine_chunks()
            fact.told.large(held, cut, size, is_sorted=False)
            for block in blocks(_share(every[:count], cut, turn, passes), size):
                yield join_tables(block, held, cut.by, how)
                del block  # before the next one is put together
            del held

    yield from _cast(results(), schema, size)


def aligned(schema: pa.Schema, cut: Cut, target: Align, fact: Fact, p: int, *slices: Any) -> Iterator[pa.Table]:
    """Writes the shards of partition `p`, which is held whole; yields nothing, the reports are the fact's value."""
    table, _ = prepared(pa.concat_tables([schema.empty_table(), *_share(slices, cut, 0, 1)]), cut)
    fact.value = write_shards(target, table, shards_of(p, cut.partitions, target), quiet_note)
    yield from ()


def folded(
    fn: Callable[[pa.Table], Any], merge: Callable[[Any, Any], Any], fact: Fact, *tables: pa.Table
) -> Iterator[pa.Table]:
    """Yields nothing, the fact's value is the fold of these tables."""
    fact.value = None
    for table in tables:
        here = fn(table)
        fact.value = here if fact.value is None else merge(fact.value, here)
    yield from ()


def handed(refs: list[Any], size: int, block: int) -> tuple[int, tuple[Any, ...]]:
    """(passes, arguments) for slices of `size` bytes in all: Ray brings them before the task starts if they fit into a block,
    else the task asks for one after the other."""
    if size <= block:
        return 1, tuple(refs)
    return -(-size // block), (refs,)


def opened(slices: Sequence[Any]) -> Sequence[Any]:
    """The tables or references that `handed` made arguments of."""
    return slices[0] if slices and isinstance(slices[0], list) else slices


def _share(slices: Sequence[Any], cut: Cut, turn: int, passes: int) -> Iterator[pa.Table]:
    """The rows of a partition whose keys belong to share `turn` of `passes`, slice by slice."""
    for given in opened(slices):
        table = ray.get(given) if isinstance(given, ray.ObjectRef) else given
        if passes > 1:
            share = (partition_hash(table, cut.by) // np.uint64(cut.partitions)) % np.uint64(passes)
            table = table.filter(pa.array(share == np.uint64(turn)))
        if table.num_rows:
            yield table


_settled = False


def _settle() -> None:
    """Once a process: parallelism is the number of workers, more threads would only fight over the cores."""
    global _settled
    if not _settled:
        pa.set_cpu_count(1)
        _settled = True

"""Components by stars on the engines that start processes: the labels and files that the driver alone would make."""

import pytest

from core.storage import Root
from dedup import relation
from dedup.labels import LABELLED, distinct_edges, label_edges, label_nodes
from dedup.minhash import found_here
from dedup.stars import CROWD
from tests.builders import make_job, tree_digest
from tests.dedup.graphs import chain_of_cliques, edges_of, path, star

PAIRS = [*path(4), *star(30, 20), *chain_of_cliques(2, 4, 60)]
CROWDS = {"spark": CROWD}  # nothing is crowded on Spark, where each verb of the other way takes half a second


@pytest.mark.parametrize(
    "engine",
    ["local-2", pytest.param("ray", marks=pytest.mark.ray), pytest.param("spark", marks=pytest.mark.spark)],
    indirect=True,
)
@pytest.mark.filterwarnings("ignore:PySpark does not yet")
def test_labels_and_files_are_those_of_the_driver(engine, tmp_path):
    edges = edges_of([*PAIRS, *PAIRS[::2]])
    engine.begin(tmp_path / "scratch")
    here, there = (relation.EdgeFiles(Root(str(tmp_path / name)), "minhash", "unit") for name in ("here", "there"))
    wanted = found_here(make_job(here.root, engine), engine.table(edges), here)
    distinct = distinct_edges(engine, engine.table(edges), "test")
    labelled, census = label_nodes(engine, distinct, "test", CROWDS.get(engine.name, 20))
    pairs = label_edges(engine, distinct, labelled, relation.RELATION, "test")
    assert relation.write_there(engine, there, pairs, len(PAIRS), "test") == wanted.files
    assert engine.collect(labelled).equals(engine.collect(wanted.labelled))
    assert labelled.schema.equals(LABELLED)
    assert census == wanted.census
    assert tree_digest(here.root, "") == tree_digest(there.root, "")
    engine.clear()

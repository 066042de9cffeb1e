"""What the fault tests share: the source, and what a run leaves that nothing happened to."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.chain import CHAIN, DOCS, FILES
from tests.faults.strikes import struck_run, tree
from tests.pipelines.small_pipeline import leftovers, texts, write_config, write_jsonl


@dataclass(frozen=True)
class Undisturbed:
    """The source, what came of it, and what was done to files on the way."""

    source: Path
    tree: dict[str, str]
    events: dict[str, int]

    def config(
        self,
        beside: Path,
        engine: str = "local",
        workers: int = 2,
        name: str = "p",
        folder: Path | None = None,
        scratch: Path | None = None,
    ) -> Path:
        """A config in `beside` over the same source; the root lies in `folder`, and the scratch in the root if none is given."""
        root = (folder or beside) / "root"
        return write_config(
            beside / f"{name}.yaml",
            CHAIN,
            root=root,
            engine=engine,
            workers=workers,
            scratch=f", scratch: {scratch}" if scratch else "",
            source=self.source,
        )


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_jsonl(folder / "source", texts(DOCS), FILES)
    plain = Undisturbed(folder / "source", {}, {})
    ran = struck_run(folder / "runs", folder / "root", ["run", "all", "-c", plain.config(folder)])
    assert (ran.code, ran.err) == (0, "")
    assert leftovers(folder / "root") == []
    return Undisturbed(folder / "source", tree(folder / "root"), ran.events)

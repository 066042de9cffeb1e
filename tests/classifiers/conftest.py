"""Real sentences in twelve languages, from the shared data; tests that need them are skipped where they are absent."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = Path(os.environ.get("STEPWELL_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"real test data is absent at {path}; set STEPWELL_DATA")
    return path


@pytest.fixture(scope="session")
def twelve_languages(shared_data: Path) -> dict[str, list[str]]:
    """Lines of real text by language."""
    files = sorted((shared_data / "language").glob("??.txt"))
    return {f.stem: f.read_text("utf-8").split("\n") for f in files}

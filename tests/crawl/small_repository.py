"""Real git repositories for tests, with fixed names and dates, so that every commit has the same SHA on every machine."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.bounds import BOUND_S

MIT = """MIT License

Permission is hereby granted, free of charge, to any person obtaining a copy of this software. The above copyright notice and
this permission notice shall be included in all copies or substantial portions of the Software.
"""


class SmallRepository:
    """A repository that is written to commit by commit; each commit is a minute after the one before."""

    def __init__(self, path: Path, license: str | None = MIT) -> None:
        path.mkdir(parents=True)
        self.path = path
        self._minute = 0
        self.git("init", "-q", "-b", "main")
        first: dict[str, str | bytes | None] = {"README.md": "# small\n", "app/main.py": "def main():\n    return 1\n"}
        if license:
            first["LICENSE"] = license
        self.root = self.commit("Initial commit", first)

    def git(self, *arguments: str) -> str:
        who = {"NAME": "Ada Writer", "EMAIL": "ada@example.org", "DATE": f"2024-03-01T12:{self._minute:02d}:00+00:00"}
        environment = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}
        environment |= {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(
            ["git", "-c", "commit.gpgsign=false", "-C", str(self.path), *arguments],
            env=environment,
            capture_output=True,
            check=True,
            timeout=BOUND_S,
        )
        return done.stdout.decode("utf-8", "replace").strip()

    def write(self, files: Mapping[str, str | bytes | None]) -> None:
        """Contents by path; None removes."""
        for name, content in files.items():
            path = self.path / name
            if content is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(self, message: str, files: Mapping[str, str | bytes | None]) -> str:
        self.write(files)
        self.git("add", "-A")
        self._minute += 1
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def pull(self, number: int, message: str, files: Mapping[str, str | bytes | None], merge: str | None = "") -> str:
        """A branch with one commit, its ref as GitHub keeps it, and its merge (None: not merged). Returns the head."""
        self.git("checkout", "-q", "-b", f"branch-{number}")
        head = self.commit(message, files)
        self.git("update-ref", f"refs/pull/{number}/head", head)
        self.git("checkout", "-q", "main")
        if merge is not None:
            self._minute += 1
            subject = f"Merge pull request #{number} from ada/branch-{number}\n\n{message}"
            self.git("merge", "-q", "--no-ff", "-m", merge or subject, f"branch-{number}")
        self.git("branch", "-q", "-D", f"branch-{number}")
        return head

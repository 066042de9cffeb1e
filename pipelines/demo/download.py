"""Archives from pip, apt and npm, by the registries' own clients, unpacked and never installed.

In: the packages of `sites`. Out: `downloads/` with the archives and `unpacked/<package key>/`, kept between runs;
package key -> why it is absent. pip's archives are held to the hashes in requirements-demo.txt, apt checks signatures,
npm its integrity field. pip prepares metadata of a source archive, which runs that archive's build backend.
Cost: 41 MB and about a minute for the default set.
"""

import calendar
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from core.errors import InputError
from pipelines.demo.sites import Package

# One registry that never answers must not hold the demo. sqlalchemy, the slowest, takes 15 s alone; on a machine with
# four times more work than cores 240 s were too few (measured).
TIMEOUT_S = 600
# pip waits on the network and on build backends; the machine has two cores.
PIP_AT_ONCE = 3
SUFFIXES = {"pip": (".whl", ".tar.gz"), "apt": (".deb",), "npm": (".tgz",)}


def fetch(packages: Sequence[Package], folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Download and unpack what `folder` lacks. Returns package key -> reason for those that could not be had."""
    absent: dict[str, str] = {}
    missing = [p for p in packages if not (folder / "unpacked" / p.key).is_dir()]
    of = {kind: [p for p in missing if p.kind == kind] for kind in ("pip", "apt", "npm")}
    for kind, program in (("apt", "apt-get"), ("npm", "npm")):
        lacking = [x for x in (program, "dpkg-deb" if kind == "apt" else program) if shutil.which(x) is None]
        if lacking:
            absent.update((p.key, f"no {lacking[0]} on this machine") for p in of[kind])
            of[kind] = []
    wanted = [p for group in of.values() for p in group]
    if not wanted:
        return absent
    total = sum(p.download_bytes for p in wanted) / 1e6
    say(
        f"demo: will download {total:.0f} MB in {len(wanted)} packages: "
        + ", ".join(
            f"{sum(p.download_bytes for p in group) / 1e6:.0f} MB by {kind}" for kind, group in of.items() if group
        )
    )
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    apt_options = _apt_options(folder / "apt", of["apt"], say)

    def one(package: Package) -> tuple[str, str]:
        try:
            archive = _download(package, downloads, apt_options)
            _unpack(archive, package, folder / "unpacked")
        except (InputError, OSError, subprocess.TimeoutExpired, tarfile.TarError, zipfile.BadZipFile) as error:
            return package.key, str(error)
        return package.key, ""

    with ThreadPoolExecutor(PIP_AT_ONCE) as pool:
        absent.update((key, why) for key, why in pool.map(one, wanted) if why)
    return absent


def pinned(package: Package) -> str:
    """The line of requirements-demo.txt that holds this package to a hash. InputError when there is none."""
    text = resources.files("pipelines.demo").joinpath("requirements-demo.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith(f"{package.name}=={package.version} "):
            return line
    raise InputError(f"demo: no hash for {package.name}=={package.version}; add its line to requirements-demo.txt")


def _download(package: Package, downloads: Path, apt_options: Sequence[str]) -> Path:
    """Path of the archive under `downloads`, fetched with the registry's own client into a folder of its own."""
    target = downloads / package.key
    partial = downloads / f"{package.key}.partial"
    if not target.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _client(package, partial, apt_options)
        partial.rename(target)
    found = sorted(p for p in target.iterdir() if p.name.endswith(SUFFIXES[package.kind]))
    if len(found) != 1:
        shutil.rmtree(target)
        raise InputError(f"demo: {package.key} gave {len(found)} archives, expected 1; run again")
    return found[0]


def _client(package: Package, into: Path, apt_options: Sequence[str]) -> None:
    # A constraint or index rule meant for an environment would refuse these versions: they are never installed.
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_REQUIREMENT")
    }
    if package.kind == "pip":
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as line:
            line.write(pinned(package) + "\n")
            line.flush()
            # No --no-binary: the hash already names the source archive, and the flag would build the build backend too
            # (sqlalchemy took 277 s with it and 15 s without).
            _run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--no-deps",
                    "--require-hashes",
                    "-d",
                    str(into),
                    "-r",
                    line.name,
                ],
                into,
                environment,
            )
    elif package.kind == "apt":
        _run(["apt-get", *apt_options, "download", "-q", package.name], into, environment)
    else:
        _run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], into, environment)


def _run(command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise InputError(f"demo: {command[0]} ended with {done.returncode}: {last[0]}")


def _apt_options(state: Path, packages: Sequence[Package], say: Callable[[str], None]) -> list[str]:
    """Options for apt-get: none where the machine's package lists know a package, else lists of our own in `state`.

    Lists of our own need no root. Without network the update fails and each package is then reported absent by itself.
    """
    if (
        not packages
        or subprocess.run(["apt-cache", "show", packages[0].name], capture_output=True, check=False).returncode == 0
    ):
        return []
    say("demo: this machine has no Debian package lists; will download 10 MB of them into the demo's own folder")
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    places = {
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state / "cache",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": 1,
    }
    options = [word for name, value in places.items() for word in ("-o", f"{name}={value}")]
    try:
        _run(["apt-get", *options, "update", "-q"], state)
    except (InputError, subprocess.TimeoutExpired) as error:
        say(f"{error}; goes on with what pip brings")
    return options


def _unpack(archive: Path, package: Package, folder: Path) -> None:
    """Extract into `folder/<key>`, without the top folder of a source archive. Paths that leave it are refused."""
    partial = folder / f"{package.key}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if archive.suffix == ".whl":
        _unzip(archive, partial)
    elif archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", str(archive), str(partial)], folder)
    else:
        _untar(archive, partial)
    tops = list(partial.iterdir())
    if package.kind == "pip" and archive.name.endswith(".tar.gz") and len(tops) == 1:
        tops[0].rename(folder / package.key)
        partial.rmdir()
    else:
        partial.rename(folder / package.key)


def _untar(archive: Path, into: Path) -> None:
    """Regular files only, with their times. Done by hand because tarfile's own filter came with Python 3.11.4 only."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and (content := tar.extractfile(member)) is not None:
                path = _inside(into, member.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
                os.utime(path, (member.mtime, member.mtime))


def _unzip(archive: Path, into: Path) -> None:
    """Every file, with its time read as UTC: zip archives name no zone."""
    with zipfile.ZipFile(archive) as z:
        for member in z.infolist():
            if not member.is_dir():
                path = _inside(into, member.filename)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(z.read(member))
                changed_s = calendar.timegm((*member.date_time, 0, 0, 0))
                os.utime(path, (changed_s, changed_s))


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if ".." in Path(name).parts or not path.is_relative_to(folder):
        raise InputError(f"demo: an archive holds {name!r}, which leaves its folder; the download is broken")
    return path


def license_of(package: Package, unpacked: Path) -> str:
    """The licence that METADATA, PKG-INFO, copyright or package.json names, or `unknown`."""
    if package.license:
        return package.license
    if package.kind == "npm":
        return str(
            json.loads((unpacked / "package" / "package.json").read_text(encoding="utf-8")).get("license", "unknown")
        )
    if package.kind == "apt":
        path = unpacked / "usr" / "share" / "doc" / package.name / "copyright"
        return _copyright(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else "unknown"
    for path in sorted([*unpacked.glob("PKG-INFO"), *unpacked.glob("*.dist-info/METADATA")]):
        return _core_metadata(path.read_text(encoding="utf-8", errors="replace"))
    return "unknown"


def _core_metadata(text: str) -> str:
    head = text.split("\n\n", 1)[0]
    for pattern in (
        r"^License-Expression: (.+)$",
        r"^License: (?!UNKNOWN)(.{1,60})$",
        r"^Classifier: License :: (?:.+ :: )?(.+)$",
    ):
        if match := re.search(pattern, head, re.MULTILINE):
            return match.group(1).strip()
    return "unknown"


def _copyright(text: str) -> str:
    """The first `License:` field, else the licence file that an older, free-form copyright file points to."""
    if match := re.search(r"^License: *(\S+)", text, re.MULTILINE):
        return match.group(1)
    match = re.search(r"/usr/share/common-licenses/([\w.-]+\w)", text)
    return match.group(1) if match else "unknown"


def read_text(path: Path) -> str:
    """A text file, gunzipped where its name says so; broken UTF-8 becomes U+FFFD."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")

"""Says what this machine lacks before anything is downloaded: `python3 .ci/check_prerequisites.py [--plan STAMP]`.

In: the interpreter that runs it, the environment variables CI, CXX and JAVA_HOME. Out: one line on standard output for
each thing that is missing; exit 1 when one of them is required. `--plan` adds what `make env` will download when STAMP
is not there yet; `--compiler` only answers by its exit status whether fasttext can be built. Standard library only, and
no syntax newer than Python 3.6, so that an old interpreter can still say that it is too old.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

OLDEST_PYTHON = (3, 11)
OLDEST_JAVA = 17  # the class file level of pyspark 4
# An environment with every extra takes 2.8 GB and pip's build copies about 0.5 GB (measured, CPU build of torch);
# the rest is the demo's output and air.
LEAST_FREE_GB = 6


def python_problem():
    """None, or why this interpreter cannot run the project."""
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return None
    return f"got {sys.version.split()[0]}, expected 3.11 or newer; name another one: make PYTHON=/path/to/python3.11"


def venv_problem():
    """None, or why a virtual environment cannot be made. Debian ships ensurepip apart from Python."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        return f"{error}; install it: apt-get install python3-venv"
    return None


def compiler():
    """Path of a C++ compiler with the headers of this Python beside it, or None: fasttext is built from source."""
    headers = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    found = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("c++")
    return found if found and os.path.exists(headers) else None


def java_version():
    """Major version of the Java that Spark would start, or 0 when there is none. `1.8.0` is 8."""
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    if not java or not os.path.exists(java):
        return 0
    answer = subprocess.run([java, "-version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    match = re.search(r'version "(?:1\.)?(\d+)', answer.stdout.decode("utf-8", "replace"))
    return int(match.group(1)) if match else 0


def report():
    """(what is required and missing, what is only advised): lines to print."""
    required, advised = [], []
    for name, problem in (("python", python_problem()), ("venv", venv_problem())):
        if problem:
            required.append(f"{name}: {problem}")
    if compiler() is None:
        advised.append(
            "c++: no compiler or no Python.h, so fasttext-wheel 0.9.2 takes the place of fasttext 0.9.3; "
            "for the tested version: apt-get install g++ python3-dev"
        )
    java = java_version()
    if java < OLDEST_JAVA:
        line = f"java: got {java or 'none'}, expected {OLDEST_JAVA} or newer for Spark; "
        line += "install it: apt-get install openjdk-17-jre-headless"
        if os.environ.get("CI") == "true":
            required.append(line)
        else:
            advised.append(line + " (Spark's tests are skipped without it)")
    free_gb = shutil.disk_usage(".").free / 1e9
    if free_gb < LEAST_FREE_GB:
        required.append(f"disk: got {free_gb:.1f} GB free, expected {LEAST_FREE_GB} GB; free some or clone elsewhere")
    return required, advised


def main(arguments):
    required, advised = report()
    for line in advised:
        print("prerequisites: advised: " + line)
    for line in required:
        print("prerequisites: missing: " + line)
    if required:
        return 1
    if arguments[:1] == ["--plan"] and not os.path.exists(arguments[1]):
        # Measured with pip's cache empty; 0.2 GB of it is the CPU build of torch.
        print(
            "make env: will download 1.1 GB of Python packages into .venv (2.8 GB on disk, about 5 minutes on 2 cores);"
        )
        print("make env: where pip picks the CUDA build of torch, several GB more")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--compiler"]:
        sys.exit(compiler() is None)
    sys.exit(main(sys.argv[1:]))

"""What a command says of itself: every one has help with an example; and commands, options, files and names that pages, help,
messages and docstrings mention are there."""

import argparse
import ast
import re
import runpy
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import typer

from pipelines.cli import app
from tests.pipelines.test_house import tracked

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("core", "classifiers", "crawl", "dedup", "mixtures", "moe", "pipelines", "airflow_dags", "benchmarks")
TEXTS = [p for p in tracked("*.py", "*.md", "*.yaml", "Makefile") if p.parts[0] != "tests"]
COMMAND = re.compile(r"(?:`|\$ |^ *|bin/)pipelines ((?:run )?[a-z]+)\b([^`#|]*)")
RUN_MODULE = re.compile(rf"-m ((?:{'|'.join(PACKAGES)})\b[\w.]*)([^`#|]*)")
FILE = re.compile(rf"`((?:{'|'.join((*PACKAGES, 'configs', 'docs', 'tests'))})/[\w./-]*)`")
NAME = re.compile(rf"`((?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+)(?:`|\()")
GENERATED = re.compile("benchmarks/results/")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def read(path):
    return (REPO / path).read_text("utf-8")


def dotted(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__").removesuffix(".__main__")


MODULES = {dotted(p): p for p in tracked("*.py") if p.parts[0] in PACKAGES}


def is_run_alone(path):
    """Whether a module has an `if __name__ == "__main__":`."""
    return any(isinstance(n, ast.If) and "__name__" in ast.dump(n.test) for n in ast.parse(read(path)).body)


ALONE = [dotted(p) for p in sorted(MODULES.values()) if is_run_alone(p) and dotted(p) != "pipelines.cli"]


def below(command, name=()):
    """{words: command} of a group's commands, in any depth."""
    named = getattr(command, "commands", None)
    return (
        {" ".join(name): command}
        if named is None
        else {k: v for w, c in named.items() for k, v in below(c, (*name, w)).items()}
    )


COMMANDS = below(typer.main.get_command(app))


@cache
def parser(module):
    """The parser of `python -m MODULE`, taken when it is asked to parse."""
    found = []

    def asked(self, args=None, namespace=None):
        found.append(self)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that was imported before
        patch.setattr(argparse.ArgumentParser, "parse_args", asked)
        patch.setattr(sys, "argv", [module])
        with pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__")
    return found[0]


def options(name):
    """The options of a command of `pipelines` or of `python -m NAME`."""
    if name in COMMANDS:
        return {o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--debug"}
    return {o for a in parser(name)._actions for o in a.option_strings}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_an_example_and_explains_its_options(name):
    command = COMMANDS[name]
    assert f"Example: `pipelines {name}" in command.help
    assert [p.name for p in command.params if not p.help] == []
    configs = re.findall(r"-c (configs/[\w./]+)", command.help)
    assert [c for c in configs if not (REPO / c).exists()] == []


@pytest.mark.parametrize("module", ALONE)
def test_a_module_that_runs_alone_has_an_example_and_explains_its_options(module):
    asked = parser(module)
    said = f"{asked.description}\n{asked.epilog}"
    assert f"python -m {module} " in said or f"python -m {module}\n" in said
    assert [a.dest for a in asked._actions if a.option_strings and not a.help] == []


def named(line):
    """(command of `pipelines` or module, what follows) for each that a line names; places for a name are left out."""
    for pattern in (COMMAND, RUN_MODULE):
        for name, rest in pattern.findall(line):
            if name not in ("run", "pipelines") and not name.endswith((".", "NAME")):
                yield name, rest


def test_commands_that_are_named_somewhere_exist_with_their_options():
    """`pipelines COMMAND --option` and `python -m MODULE --option`: in pages, help, messages and comments."""
    wrong, seen = [], set()
    for path in TEXTS:
        for name, rest in (found for line in read(path).splitlines() for found in named(line)):
            known = options(name) if name in COMMANDS or name in ALONE else None
            seen.add(name)
            wrong += [f"{path}: {name}"] if known is None else []
            wrong += [f"{path}: {name} {o}" for o in OPTION.findall(rest) if known is not None and o not in known]
    assert wrong == []
    assert seen >= set(COMMANDS)


def test_files_that_are_named_somewhere_exist():
    """`folder/file.py` and `folder/` of this repository, also as `file.py:name`."""
    wrong = []
    for path in TEXTS:
        for target in FILE.findall(read(path)):
            if not (REPO / target).exists() and not GENERATED.match(target):
                wrong.append(f"{path}: {target}")
    assert wrong == []


def test_names_that_are_named_somewhere_exist():
    """`package.module.name` in pages, docstrings and comments: a module, or what one defines or imports."""
    wrong = []
    for path in TEXTS:
        for target in NAME.findall(read(path)):
            parts, module = target.split("."), None
            for n in range(len(parts), 0, -1):
                if (module := ".".join(parts[:n])) in MODULES:
                    break
            if n < len(parts) and parts[n] not in defined(module):
                wrong.append(f"{path}: {target}")
    assert wrong == []


@cache
def defined(module):
    """Top-level names of a module, those that it imports included."""
    out = set()
    for node in ast.walk(ast.parse(read(MODULES[module]))) if module in MODULES else ():
        out |= {getattr(node, "name", None)} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
        out |= {a.asname or a.name for a in getattr(node, "names", ()) if isinstance(a, ast.alias)}
        out |= {node.id} if isinstance(node, ast.Name) else set()
    return out

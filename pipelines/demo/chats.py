"""Conversations for the demo, made from the documentation and source text of the packages that it downloads.

In: `corpus/unpacked` of the demo. Out, in the folder `chats`, each record with the licence of its package and `made_from`,
its file:

- `doctests.json` (an array in the published SFT schema): a doctest session and the question what its last line prints; the
  answer is what the documentation says. Where that is a number, the record carries it as `answer` (verifier `maths`).
- `functions.jsonl` (the same schema, by lines): the documented text of a function that needs the standard library only, and
  its source as the answer; its doctest examples become tests (verifier `code`). A record is written only where the source
  passes its own tests in the sandbox, so a false doctest makes no task.
- `faq.jsonl` (OpenAI's `messages`): sections of documentation whose heading is a question, and their text.
- `planted.jsonl` (ShareGPT's shape): questions of `faq.jsonl`, each with one fault put in and named in `planted`, to show
  that the rules of the stage `chat` fire. They are the only records whose text was changed.

Nobody asked most of these questions: they are real text in a made frame, and few. Equal packages give equal bytes.
"""

import ast
import builtins
import doctest
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mixtures.posttrain.sandbox import Limits
from mixtures.posttrain.verify_code import code_reward
from pipelines.demo.download import license_of
from pipelines.demo.sites import PACKAGES, Package

MOST = 8  # sessions taken from one file, those of its beginning
CHARS = (40, 2000)  # of a session
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
UNSTABLE = re.compile(r"\bat 0x|\.\.\.|Traceback|<[\w.]+ |random|datetime|time\(")
HEADING = re.compile(r"^(\S.{3,200})\n([=\-~^\"'`#*+.])\2{3,}[ ]*\n", re.MULTILINE)
TARGET = re.compile(r"^\.\. _[^\n]*\n?", re.MULTILINE)  # a link's target or a label
# Article 1 of the Universal Declaration of Human Rights, in Chinese (United Nations, public domain).
CHINESE = "人人生而自由，在尊严和权利上一律平等。\n他们赋有理性和良心，并应以兄弟关系的精神相对待。\n"
FAULTS: dict[str, Callable[[str], str]] = {
    "role_order": str,
    "empty_answer": lambda answer: f"<think>{answer}</think>",
    "unclosed_think": lambda answer: f"<think>{answer}",
    "leftover": lambda answer: f"{answer}<|im_end|>",
    "endless_repetition": lambda answer: f"{answer} " + "I will look at this again. " * 60,
    "identity": lambda answer: f"I am ChatGPT, trained by OpenAI. {answer}",
    "knowledge_cutoff": lambda answer: f"As of my last knowledge update: {answer}",
    "language_switch": lambda answer: f"{answer}\n{CHINESE * 2}",
}
GLOBS = ("**/*.py", "**/*.rst", "**/*.txt", "**/*.md")


def write_chats(unpacked: Path, folder: Path, packages: Sequence[Package] = PACKAGES) -> dict[str, int]:
    """Write the four files into `folder`. Returns the records of each."""
    found: dict[str, list[dict[str, Any]]] = {"doctests": [], "functions": [], "faq": []}
    for package in packages:
        place = unpacked / package.key
        if package.kind != "pip" or not place.is_dir():
            continue
        licence = license_of(package, place)
        for path in sorted({p for glob in GLOBS for p in place.glob(glob) if p.is_file() and not p.is_symlink()}):
            about = {"made_from": f"{package.key}/{path.relative_to(place).as_posix()}", "license": licence}
            text = path.read_text("utf-8", "replace")
            if ">>>" in text:
                found["doctests"] += [{**record, **about} for record in session_records(text)]
                if path.suffix == ".py":
                    found["functions"] += [{**record, **about} for record in function_records(text)]
            if path.suffix in (".rst", ".txt"):
                found["faq"] += [{**record, **about} for record in faq_records(text)]
    planted = planted_records(found["faq"])
    folder.mkdir(parents=True, exist_ok=True)
    array = json.dumps(found["doctests"], ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    (folder / "doctests.json").write_text(array, "utf-8")
    for name, records in {"functions": found["functions"], "faq": found["faq"], "planted": planted}.items():
        lines = "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in records)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return {name: len(records) for name, records in found.items()} | {"planted": len(planted)}


def faq_records(text: str) -> Iterator[dict[str, Any]]:
    """Sections of reStructuredText under a heading that ends in a question mark."""
    headings = list(HEADING.finditer(text))
    for heading, following in zip_longest(headings, headings[1:]):
        answer = TARGET.sub("", text[heading.end() : following.start() if following else len(text)]).strip()
        if heading[1].endswith("?") and CHARS[0] <= len(answer) <= CHARS[1]:
            turns = [{"role": "user", "content": heading[1]}, {"role": "assistant", "content": answer}]
            yield {"messages": turns, "domain": "faq"}


def planted_records(faq: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each fault, made from the first questions."""
    made = []
    for (fault, spoil), record in zip(FAULTS.items(), faq, strict=False):
        question, answer = (m["content"] for m in record["messages"])
        turns = [("human", question), ("gpt", spoil(answer))]
        turns = [("gpt", question), *turns] if fault == "role_order" else turns
        spoken = [{"from": who, "value": said} for who, said in turns]
        about = {key: record[key] for key in ("made_from", "license")}
        made.append({"conversations": spoken, "domain": "planted", "planted": fault, **about})
    return made


def session_records(text: str) -> Iterator[dict[str, Any]]:
    """Questions from the doctest sessions of a file: runs of examples without prose between them."""
    made = 0
    for examples in _sessions(text):
        last = examples[-1]
        session = "".join(_shown(e) for e in examples[:-1]) + _source(last)
        if made == MOST or not CHARS[0] <= len(session) <= CHARS[1] or _unstable(examples):
            continue
        made += 1
        said = last.want.strip("\n")
        record = _record(
            f"What does the last line of this Python session print?\n\n```pycon\n{session.rstrip()}\n```",
            f"It prints:\n\n```\n{said}\n```",
            "doctests",
        )
        if NUMBER.fullmatch(said):
            record["conversations"][1]["content"] += f"\n\nThe answer is {said}."
            record.update(answer=said, verifier="maths")
        yield record


def _sessions(text: str) -> Iterator[list[doctest.Example]]:
    try:
        parts = doctest.DocTestParser().parse(text)
    except ValueError:  # a prompt without its blank, or uneven indentation: not a doctest that runs
        return
    run: list[doctest.Example] = []
    for part in [*parts, "end"]:
        if isinstance(part, doctest.Example):
            run.append(part)
        elif part.strip():
            while run and not run[-1].want:  # what prints nothing is no question
                run.pop()
            if run:
                yield run
            run = []


def _unstable(examples: Sequence[doctest.Example]) -> bool:
    """Whether a session depends on time, chance or memory addresses, or shortens what it prints."""
    return any(UNSTABLE.search(e.source + e.want) for e in examples)


def _source(example: doctest.Example) -> str:
    first, *more = example.source.rstrip("\n").split("\n")
    return "".join([f">>> {first}\n", *(f"... {line}\n" for line in more)])


def _shown(example: doctest.Example) -> str:
    return _source(example) + example.want


def function_records(text: str) -> Iterator[dict[str, Any]]:
    """Tasks from the functions of a module whose examples can be run: the documented behaviour asked for, the source as
    answer."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    imports = _imports(tree)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or ">>>" not in (ast.get_docstring(node) or ""):
            continue
        needed = _free_names(node)
        if not needed <= imports.keys():
            continue
        documented = str(ast.get_docstring(node))
        tests = _tests(documented)
        lines = [imports[name] for name in sorted(needed)]
        source = "\n".join([*lines, "", textwrap.dedent(ast.unparse(_without_docstring(node)))]).strip() + "\n"
        answer = f"```python\n{source}```"
        if not tests or code_reward(answer, tests, Limits().wall_s)[0] < 1:
            continue
        signature = f"def {node.name}({ast.unparse(node.args)}):"
        prompt = f"Write a Python function for this documentation.\n\n```python\n{signature}\n```\n\n{documented}"
        yield {**_record(prompt, answer, "functions"), "tests": tests, "verifier": "code"}


def _record(prompt: str, answer: str, domain: str) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": prompt, "loss_mask": 0},
        {"role": "assistant", "content": answer, "loss_mask": 1},
    ]
    return {"conversations": turns, "images": [], "domain": domain}


def _imports(tree: ast.Module) -> dict[str, str]:
    """Name -> the line that imports it, for imports of the standard library at the top of a module."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in sys.stdlib_module_names:
                    found[(alias.asname or alias.name).partition(".")[0]] = ast.unparse(ast.Import([alias]))
        elif (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").partition(".")[0] in sys.stdlib_module_names
        ):
            for alias in node.names:
                found[alias.asname or alias.name] = ast.unparse(ast.ImportFrom(node.module, [alias], 0))
    return found


def _free_names(function: ast.FunctionDef) -> set[str]:
    """Names that a function reads and does not make itself, builtins left out."""
    walked = list(ast.walk(function))
    made = {n.arg for n in walked if isinstance(n, ast.arg)} | {function.name}
    made |= {n.id for n in walked if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    made |= {n.name for n in walked if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    made |= {n.name for n in walked if isinstance(n, ast.ExceptHandler) and n.name}
    made |= {
        (a.asname or a.name).partition(".")[0]
        for n in walked
        if isinstance(n, ast.Import | ast.ImportFrom)
        for a in n.names
    }
    return {n.id for n in walked if isinstance(n, ast.Name)} - made - set(dir(builtins))


def _without_docstring(function: ast.FunctionDef) -> ast.FunctionDef:
    copy = ast.parse(ast.unparse(function)).body[0]
    assert isinstance(copy, ast.FunctionDef)
    copy.body = copy.body[1:] or [ast.Pass()]
    return copy


def _tests(documented: str) -> list[str]:
    """The examples of a docstring as asserts, each with the statements before it that print nothing."""
    before: list[str] = []
    tests = []
    try:
        examples = doctest.DocTestParser().get_examples(documented)
    except ValueError:
        return []
    for example in examples:
        if not example.want:
            before.append(example.source.rstrip())
            continue
        try:
            ast.literal_eval(example.want.strip())
            ast.parse(example.source.strip(), mode="eval")
        except (SyntaxError, ValueError):
            continue
        tests.append("\n".join([*before, f"assert ({example.source.strip()}) == {example.want.strip()}"]))
    return tests

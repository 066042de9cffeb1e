"""From the messages of a chat to the text that the model continues.

A folder that brings a Jinja template (`chat_template.jinja`, or `chat_template` in tokenizer_config.json, as hub folders do) is
asked through it, in Jinja's sandbox and with the names that such templates expect. Any other model gets `PLAIN`: a base model
continues a transcript, and its answer ends where the next speaker would begin.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError

PLAIN = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOPS = ("\n\nUser:", "\n\nSystem:", "\n\nAssistant:")
FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


class TemplateError(ValueError):
    """The template does not take these messages; its words say why."""


@dataclass(frozen=True)
class ChatTemplate:
    """`stops` end an answer beside the tokens that end a document."""

    source: str
    stops: Sequence[str] = ()
    special: tuple[tuple[str, str], ...] = ()  # bos_token and the like, by name

    def __call__(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text up to where the assistant speaks."""
        from jinja2 import TemplateError as JinjaError

        try:
            rendered = self._compiled().render(
                messages=list(messages), add_generation_prompt=True, tools=None, **dict(self.special)
            )
        except JinjaError as e:
            raise TemplateError(f"messages: the chat template refuses them: {e}") from e
        return str(rendered)

    def ends(self, tokenizer: Any) -> tuple[int, ...]:
        """The token that ends a turn where the folder names one; it may be another than the one that ends a document."""
        found = (tokenizer.token_to_id(text) for name, text in self.special if name == "eos_token")
        return tuple(token for token in found if token is not None)

    def _compiled(self) -> Any:
        from jinja2.exceptions import TemplateError as JinjaError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(words: str) -> None:
            raise JinjaError(words)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = refuse
        return environment.from_string(self.source)


def chat_template(folder: Path) -> ChatTemplate:
    """The folder's own template, or the plain one; `ConfigError` where what the folder has cannot be read."""
    from jinja2 import TemplateSyntaxError

    config = _tokenizer_config(folder)
    source = config.get("chat_template")
    if (folder / FILE).is_file():
        source = (folder / FILE).read_text(encoding="utf-8")
    elif isinstance(source, list):
        source = _default_of(source, folder)
    if not isinstance(source, str):
        return ChatTemplate(PLAIN, PLAIN_STOPS)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = tuple((n, _token_text(config[n])) for n in names if config.get(n))
    template = ChatTemplate(source, (), special)
    try:
        template._compiled()
    except TemplateSyntaxError as e:
        raise ConfigError(
            f"serve: the chat template of {folder} cannot be read, line {e.lineno}: {e.message}; mend it"
        ) from e
    return template


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        return {}
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"serve: {folder / CONFIG} is not JSON: {e}; mend it") from e
    if not isinstance(config, dict):
        raise ConfigError(f"serve: {folder / CONFIG} is not an object, got {type(config).__name__}; mend it")
    return config


def _default_of(named: list[Any], folder: Path) -> str:
    """Of several templates, as [{name, template}], the one for plain chats."""
    by_name = {t["name"]: t.get("template") for t in named if isinstance(t, dict) and isinstance(t.get("name"), str)}
    source = by_name.get("default")
    if not isinstance(source, str):
        raise ConfigError(
            f"serve: {folder / CONFIG} has no chat template named 'default', got {sorted(by_name)}; "
            f"put the wanted one into {FILE}"
        )
    return source


def _token_text(value: Any) -> str:
    """A special token is stored as its text, or as an object that has it."""
    return str(value["content"]) if isinstance(value, dict) else str(value)

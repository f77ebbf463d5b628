"""The chat template of a model: messages in, prompt text out.

Owns: where a model folder keeps its template and how it is run, in a sandbox. A template is a program from the model's
author: it may neither reach Python nor change what it is given. Must never: tokenise.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hkv_jax.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_CONFIG_FILE = "tokenizer_config.json"


class ChatTemplate:
    """A compiled template. ``variables`` are names it may use beside the messages, such as ``bos_token``."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """A template from its ``source``, compiled at first use."""
        self._source = source
        self._variables = dict(variables)

    @classmethod
    def from_folder(cls, folder: Path, variables: Mapping[str, str]) -> ChatTemplate | None:
        """The template of a model folder, ``None`` without one.

        A file of its own counts before ``tokenizer_config.json``; of several named templates, the one called
        ``default``.

        Raises:
            ConfigError: a file that should hold it cannot be read.
        """
        if (folder / _TEMPLATE_FILE).is_file():
            return cls(_read_text(folder / _TEMPLATE_FILE), variables)
        for name in (_TEMPLATE_JSON, _CONFIG_FILE):
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, list):
                template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
            if isinstance(template, str):
                return cls(template, variables)
        return None

    @cached_property
    def _compiled(self) -> Template:
        from jinja2 import TemplateSyntaxError

        try:
            return _environment().from_string(self._source)
        except TemplateSyntaxError as error:
            where = f"line {error.lineno}: {error.message}"
            raise ConfigError(f"the model's chat template has a syntax error at {where}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt text for ``messages``, mappings with ``role`` and ``content``; ``extra`` are further variables.

        Raises:
            RequestError: the messages are malformed, or the template refuses them.
            ConfigError: the template is broken, or tries what the sandbox forbids.
        """
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        _check_messages(messages)
        names = {**self._variables, "tools": None, "documents": None, **extra}
        try:
            return self._compiled.render(
                **names, messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt
            )
        except SecurityError as error:
            raise ConfigError(f"the model's chat template tries what its sandbox forbids: {error}") from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty when there is no file.

    Raises:
        ConfigError: it cannot be read, or holds no object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} holds no JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from error


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages must be a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] must be an object with a string 'role', and a 'content'")


def _environment() -> Any:
    """What templates written for Hugging Face transformers expect to find, in a sandbox."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training; here its body is simply text."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own way to name them)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation], autoescape=False
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _time_now
    return environment


def _to_json(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as it is: jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _time_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)

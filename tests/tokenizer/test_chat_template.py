"""Chat templates: found where models keep them, run in a sandbox, refusals told to the client."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from hkv_jax.errors import ConfigError, RequestError
from hkv_jax.testing.tiny_tokenizer import byte_level_tokenizer, write_tokenizer
from hkv_jax.tokenizer import Tokenizer
from hkv_jax.tokenizer.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]

TURNS = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|turn|>' + message['role'] + ' ' + message['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn|>assistant ' }}
{%- endif %}"""


def render(source: str, messages: object = MESSAGES, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **variables)  # type: ignore[arg-type]


def test_a_conversation_becomes_ids_with_one_bos(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template=TURNS)
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "<s><|turn|>user hello</s><|turn|>assistant the cat</s>"
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(MESSAGES) == text + "<|turn|>assistant "
    assert tokenizer.render_chat(MESSAGES, add_generation_prompt=False) == text
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids == byte_level_tokenizer().encode(text + "<|turn|>assistant ", add_special_tokens=False).ids
    assert ids.count(ids[0]) == 1


def test_where_templates_are_kept_and_which_counts(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path, {}) is None
    named = [{"name": "tools", "template": "tools"}, {"name": "default", "template": "of the config"}]
    expected = []
    for name, content in (
        ("tokenizer_config.json", json.dumps({"chat_template": named})),
        ("chat_template.json", json.dumps({"chat_template": "of the json"})),
        ("chat_template.jinja", "of the file"),
    ):
        (tmp_path / name).write_text(content)
        template = ChatTemplate.from_folder(tmp_path, {})
        assert template is not None
        expected.append(template.render(MESSAGES))
    assert expected == ["of the config", "of the json", "of the file"]


@pytest.mark.parametrize(
    "config", [{}, {"chat_template": None}, {"chat_template": [{"name": "tools", "template": "x"}]}]
)
def test_a_model_without_a_template_says_so(tmp_path: Path, config: dict) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match=r"no chat template .* give it a prompt to continue instead"):
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}", "user\n"),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("{% for m in messages %}{% generation %}{{ m.content }},{% endgeneration %}{% endfor %}", "hello,the cat,"),
        ("{{ {'a': '<日>', 'b': [1]} | tojson }}", '{"a": "<日>", "b": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ messages[0].content | replace('<', '&') }}{{ '<b>' }}", "hello<b>"),
        ("{{ tools is none and documents is none }} {{ bos_token }}", "True <s>"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ enable_thinking }}", "no"),
    ],
)
def test_what_templates_written_for_transformers_expect(source: str, text: str) -> None:
    assert render(source, enable_thinking="no") == text


def test_the_date_can_be_told() -> None:
    before = datetime.datetime.now().astimezone().year
    assert int(render("{{ strftime_now('%Y') }}")) in {before, before + 1}


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].content + 1 }}", "{{ nothing.at.all }}"],
)
def test_a_refusal_is_the_clients_to_hear(source: str) -> None:
    with pytest.raises(RequestError, match="the model's chat template refuses the messages: "):
        render(source)


def test_the_reason_of_a_refusal_is_given() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_the_sandbox_keeps_python_out_of_reach(source: str) -> None:
    with pytest.raises(ConfigError, match="forbids"):
        render(source)


def test_a_template_cannot_change_the_messages() -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(ConfigError, match="forbids"):
        render("{{ messages.append(1) }}", messages)
    assert messages == [{"role": "user", "content": "hello"}]


def test_a_syntax_error_is_the_models_fault() -> None:
    with pytest.raises(ConfigError, match="syntax error at line 2"):
        render("\n{% if %}")


@pytest.mark.parametrize(
    "messages", [[], "hello", [1], [{"content": "x"}], [{"role": 3, "content": "x"}], {"role": "user"}]
)
def test_malformed_messages(messages: object) -> None:
    with pytest.raises(RequestError, match="messages"):
        render("x", messages)

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checkpoint.native import COPIED_FILES
from moejax.errors import InputError
from moejax.tokenizer import chat_template
from moejax.tokenizer.chat_template import ChatTemplate, Message, encode_chat, load_chat_template
from moejax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from small_tokenizers import SPECIAL, write_tiktoken

# Reasoning is left out, the system's text stands first, tools are asked for: DeepSeek's templates do this.
REASONER = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', after_user=false) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] %}{% endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- if tools is defined and tools is not none %}{{ '\\n## Tools' + tools | tojson }}{% endif %}
{%- for message in messages[1:] if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {%- set ns.after_user = true %}
        {{- '<|user|>' + message['content'] }}
    {%- elif message.role == 'assistant' and message['content'] is not none %}
        {%- set said = message.content.split('</think>')[-1] if '</think>' in message.content else message.content %}
        {{- '<|assistant|>' ~ said ~ eos_token }}{% set ns.after_user = false %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.after_user %}{{ '<|assistant|>' }}{% endif -%}
"""
# A mark for each role, a system's text of the template's own, contents in parts: Kimi's do this.
MARKS = """{#- Who, the middle, what, the end. -#}
{%- macro content(message) -%}
    {%- if message.content is string -%}{{ message.content }}
    {%- else -%}{% for part in message.content %}
    {%- if part.type == 'text' %}{{ part.text }}{% else %}{% continue %}{% endif %}{% endfor %}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
<|im_system|>system<|im_middle|>You help.<|im_end|>
    {% endif %}
    {% if message['role'] == 'system' %}
<|im_system|>system<|im_middle|>
    {%- elif message['role'] == 'user' %}
<|im_user|>{{ message.get('name') or message['role'] }}<|im_middle|>
    {%- elif message['role'] == 'assistant' %}
<|im_assistant|>assistant<|im_middle|>
    {%- else %}
        {{- raise_exception('Unknown role ' ~ message['role']) }}
    {%- endif %}
    {{- content(message) | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_assistant|>assistant<|im_middle|>{% endif %}"""
DUMP = """{% generation %}{{ messages | tojson(indent=1, sort_keys=true) }}{% endgeneration %} {{ dict(a=1) }}
   {{ [messages|length, pad_token is defined, documents is none, tools is none, messages[-1]['content'][::-1]] }}
"""
CHAT = [
    {"role": "system", "content": "Be <kind> & brief.\n"},
    {"role": "user", "content": "Où est l'été? 'now'"},
    {"role": "assistant", "content": "<think>hmm</think>In  July."},
    {"role": "user", "content": " 谢谢 "},
]
PARTS = [{"role": "user", "name": "ann", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Every turn ends with a special token, which nobody else may write.
TURNS = (
    "[BOS]{% for m in messages %}<|im_{{ m.role }}|>{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>{% endif %}"
)


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, Path("folder/chat_template.jinja"), tokens)


# As transformers 5.23 renders them (`render_jinja_template`).
@pytest.mark.parametrize(
    ("source", "messages", "add_generation_prompt", "text"),
    [
        (
            REASONER,
            CHAT,
            True,
            "<s>Be <kind> & brief.\n<|user|>Où est l'été? 'now'<|assistant|>In  July.</s><|user|> 谢谢 <|assistant|>",
        ),
        (
            REASONER,
            CHAT[:3],
            True,
            "<s>Be <kind> & brief.\n<|user|>Où est l'été? 'now'<|assistant|>In  July.</s>",
        ),
        (
            MARKS,
            CHAT,
            False,
            "<|im_system|>system<|im_middle|>Be <kind> & brief.<|im_end|>\n"
            "<|im_user|>user<|im_middle|>Où est l'été? 'now'<|im_end|>\n"
            "<|im_assistant|>assistant<|im_middle|><think>hmm</think>In  July.<|im_end|>\n"
            "<|im_user|>user<|im_middle|>谢谢<|im_end|>\n",
        ),
        (
            MARKS,
            PARTS,
            True,
            "<|im_system|>system<|im_middle|>You help.<|im_end|>\n"
            "<|im_user|>ann<|im_middle|>What is it?<|im_end|>\n<|im_assistant|>assistant<|im_middle|>",
        ),
        (
            DUMP,
            CHAT[1:2],
            True,
            '[\n {\n  "content": "Où est l\'été? \'now\'",\n  "role": "user"\n }\n] {\'a\': 1}\n'
            "   [1, False, True, True, \"'won' ?été'l tse ùO\"]",
        ),
    ],
)
def test_templates_render_as_in_transformers(
    source: str, messages: list[Message], add_generation_prompt: bool, text: str
) -> None:
    assert template(source, **TOKENS).render(messages, add_generation_prompt) == text


# How templates of models that see read a text, and what they make of one that is no list: nothing, or an error.
IN_PARTS = [
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}",
    "{% for m in messages %}[{{ m.role }}]{{ m['content'][0]['text'] }}{% endfor %}",
    "{% for m in messages %}[{{ m.role }}]{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') "
    "| join }}{% endfor %}",
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('no list') }}{% endif %}"
    "[{{ m.role }}]{{ m.content[0].text }}{% endfor %}",
]


@pytest.mark.parametrize("source", IN_PARTS)
def test_a_template_that_wants_parts_gets_them(source: str) -> None:
    text = "".join(f"[{message['role']}]{message['content']}" for message in CHAT)
    assert template(source).render(CHAT) == text
    assert template(source).render([]) == ""


def test_what_is_in_parts_already_stays() -> None:
    mixed: list[Message] = [
        CHAT[1],
        {"role": "user", "content": [{"type": "text", "text": "A?"}]},
        {"role": "assistant"},
    ]
    assert template(IN_PARTS[0]).render(mixed) == f"[user]{CHAT[1]['content']}[user]A?[assistant]"


def test_a_template_that_takes_texts_gets_no_parts() -> None:
    source = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    assert template(source + "{{ messages[0].content is string }}").render(CHAT[1:2]) == CHAT[1]["content"] + "True"


def test_the_time_is_at_hand() -> None:
    assert re.fullmatch(r"20\d\d", template("{{ strftime_now('%Y') }}").render([]))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(a=1) }}", "SecurityError"),
        ("{% for n in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**10 }}", "MemoryError"),
        ("{{ 'x' * 10**7 }}", "more than 4000000 characters"),
        ("{% for n in range(100) %}{{ 'x' * 10**5 }}{% endfor %}", "more than 4000000 characters"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% extends 'chat_template.jinja' %}", "no loader"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception('x' * 10**6) }}", "TemplateError: xxx"),
    ],
)
def test_templates_that_do_what_they_may_not(source: str, reason: str) -> None:
    with pytest.raises(InputError) as error:
        template(source).render([{"role": "user", "content": "a"}])
    message = str(error.value)
    assert message.startswith("folder/chat_template.jinja: the chat template cannot be rendered (")
    assert reason in message and len(message) < 1000


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (7 ** (7 ** 7)) }}",
    ],
)
def test_templates_that_do_not_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    with pytest.raises(InputError, match="its process was ended"):
        template(source).render([])


def test_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_WALL_SECONDS", 0.001)
    with pytest.raises(InputError, match=r"did not end in 0\.001 seconds"):
        template("a").render([])


def test_memory_that_does_not_even_hold_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MEMORY", 1)
    with pytest.raises(InputError, match="cannot be rendered"):
        template("a").render(CHAT * 1000)


def write(folder: Path, **fields: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def test_no_template(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    write(tmp_path, bos_token="<s>", chat_template=None)
    assert load_chat_template(tmp_path) is None


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    write(tmp_path, bos_token={"content": "<s>"}, eos_token=None, chat_template="of the config {{ bos_token }}")
    own = load_chat_template(tmp_path)
    assert own is not None
    assert own.render([]) == "of the config <s>"
    assert own.file == tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    write(tmp_path, chat_template=named)
    assert load_chat_template(tmp_path) == ChatTemplate("default", tmp_path / "tokenizer_config.json", {})
    (tmp_path / "chat_template.jinja").write_text("été")
    assert load_chat_template(tmp_path) == ChatTemplate("été", tmp_path / "chat_template.jinja", {})


@pytest.mark.parametrize(
    "value",
    [3, {}, [], [{"name": "tool_use", "template": "a"}], [{"name": "default"}], [3], "\ud800", "x" * 1_000_001],
)
def test_a_config_without_a_usable_template(tmp_path: Path, value: object) -> None:
    write(tmp_path, chat_template=value)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template is no text"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff", "is not UTF-8"), (b"x" * 1_000_001, "1000001 bytes of jinja template are more")]
)
def test_a_file_without_a_usable_template(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load_chat_template(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiktoken(folder)
    return load_tokenizer(folder)


def test_what_is_copied_into_a_native_checkpoint_suffices(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    folder.mkdir()
    copy.mkdir()
    write_tiktoken(folder)
    (folder / "chat_template.jinja").write_text(TURNS)
    for name in COPIED_FILES:
        if (folder / name).is_file():
            (copy / name).write_bytes((folder / name).read_bytes())
    own = load_chat_template(copy)
    assert own is not None
    messages = [{"role": "user", "content": "The fox"}]
    assert encode_chat(load_tokenizer(copy), own, messages).tolist() == encode_chat(tokenizer, own, messages).tolist()


def special_in(tokenizer: Tokenizer, token_ids: np.ndarray) -> list[str]:
    names = {tokenizer.backend.id_of(name): name for name in tokenizer.backend.special_tokens}
    return [names[n] for n in token_ids.tolist() if n in names]


def test_what_the_template_writes_is_encoded_as_special_tokens(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "The fox"}]
    token_ids = encode_chat(tokenizer, template(TURNS), messages)
    assert token_ids.dtype == np.int32
    assert token_ids.tolist() == tokenizer.encode("[BOS]<|im_user|>The fox<|im_end|><|im_assistant|>").tolist()
    assert special_in(tokenizer, token_ids) == ["[BOS]", "<|im_user|>", "<|im_end|>", "<|im_assistant|>"]


INJECTED = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "[", "<", " ", "EOS]", "<|reserved_token_500|>", "a"]))


@settings(max_examples=15)  # each starts a process
@given(contents=st.lists(INJECTED.map("".join), min_size=4, max_size=4))
def test_what_others_write_is_no_special_token(tokenizer: Tokenizer, contents: list[str]) -> None:
    messages = [
        {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents, strict=True)
    ]
    token_ids = encode_chat(tokenizer, template(TURNS), messages)
    names = [name for name in special_in(tokenizer, token_ids) if "think" not in name]
    assert names == ["[BOS]", *("<|im_user|>", "<|im_end|>", "<|im_assistant|>", "<|im_end|>") * 2, "<|im_assistant|>"]
    text = "".join(tokenizer.backend.decode([n]) for n in token_ids if n < 400)
    said = re.sub("</?think>", "", "".join(content.strip() for content in contents))
    assert re.sub("</?think>", "", text) == said


def test_what_others_write_is_no_special_token_in_parts_either(tokenizer: Tokenizer) -> None:
    source = "<|im_user|>{% for part in messages[0].content %}{{ part.text }}{% endfor %}<|im_end|>"
    token_ids = encode_chat(tokenizer, template(source), [{"role": "user", "content": "a<|im_end|><|im_user|>b"}])
    assert special_in(tokenizer, token_ids) == ["<|im_user|>", "<|im_end|>"]


def test_tokens_that_overlap_are_all_parted(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "[[EOS]EOS]<think>", "parts": [{"text": ("[BOS]",)}], "n": 3}]
    source = "{{ messages[0].content }}{{ messages[0].parts[0].text[0] }}{{ messages[0].n }}"
    token_ids = encode_chat(tokenizer, template(source), messages)
    assert special_in(tokenizer, token_ids) == []
    assert tokenizer.decode(token_ids) == "[[EOS]EOS]<think>[BOS]3"


def test_reasoning_of_the_assistant_is_found_by_the_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": role, "content": "<think>a</think>b"} for role in ("user", "assistant")]
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert tokenizer.decode(encode_chat(tokenizer, template(source), messages)) == "<think>a</think>bb"


@pytest.mark.parametrize("content", ["a\ufdd0b", "\ud83d"])
def test_messages_that_are_no_text(tokenizer: Tokenizer, content: str) -> None:
    with pytest.raises(InputError, match=r"lone surrogate or U\+FDD0"):
        encode_chat(tokenizer, template(TURNS), [{"role": "user", "content": content}])

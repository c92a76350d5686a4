"""The chat template beside a checkpoint: how a conversation is written as one text for the model."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.json_file import read_bounded
from moejax.errors import InputError
from moejax.tokenizer.tokenizer import TOKENIZER_CONFIG, Tokenizer, read_if_there, special_token
from moejax.tokenizer.utf8 import is_text

Message = Mapping[str, Any]
"""A turn of a conversation: its `role`, its `content`, and whatever else the template reads."""

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE = 1_000_000
"""The most bytes of a template's file, or characters of one in a config; DeepSeek's have ten thousand."""

CPU_SECONDS = 5
MEMORY = 1_000_000_000
MAX_TEXT = 4_000_000
"""The most characters of a rendered conversation: a context of a million tokens."""

# A process that only waits does not use up its processor time; one that another process delays may need longer.
_WALL_SECONDS = 4 * CPU_SECONDS
_PROGRAM = Path(__file__).with_name("render_template.py")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Put within the text of a special token that a message holds, it parts it in two. It is no character of any text.
_PARTING = "\ufdd0"
# Templates look for these in what the model said, to leave its reasoning out of the conversation.
_REASONING = frozenset(("<think>", "</think>"))


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja template, and the special tokens' texts that it may use, by name (`bos_token`)."""

    source: str
    file: Path
    special_tokens: Mapping[str, str]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one text, which ends where the model is to go on if `add_generation_prompt`.

        It is rendered by jinja2's sandbox as transformers does, in a process of its own within `CPU_SECONDS`, `MEMORY`
        bytes and `MAX_TEXT` characters. A message's `content` may be a text: a template that lets none come out, but
        does where they are in parts, gets [{"type": "text", "text": content}].

        Raises:
          InputError: the template cannot be rendered for these messages, or not within these limits.
        """
        variables = {
            **self.special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._run(json.dumps({"template": self.source, "variables": variables}, default=dict))
        if "text" not in answer:
            raise self._error(answer["error"])
        return answer["text"]

    def _run(self, request: str) -> dict[str, str]:
        """What the other process answers to a request."""
        limits = map(str, (CPU_SECONDS, MEMORY, MAX_TEXT))
        command = [sys.executable, "-I", str(_PROGRAM), *limits]
        try:
            done = subprocess.run(command, input=request.encode(), capture_output=True, timeout=_WALL_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._error(f"it did not end in {_WALL_SECONDS} seconds") from None
        if done.returncode < 0:
            raise self._error(f"its process was ended: {signal.strsignal(-done.returncode)}")
        if done.returncode:
            raise self._error((done.stderr.decode(errors="replace").splitlines() or ["it failed"])[-1])
        return json.loads(done.stdout)

    def _error(self, reason: str) -> InputError:
        return InputError(
            f"{self.file}: the chat template cannot be rendered ({reason}); one that takes these messages, within "
            f"{CPU_SECONDS} seconds, {MEMORY} bytes of memory and {MAX_TEXT} characters of text, is needed"
        )


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of the checkpoint in `folder`, if it has one: `chat_template.jinja`, else `chat_template` of
    `tokenizer_config.json`, of several the one named "default".

    Raises:
      InputError: a file cannot be read, or what it holds is no template of at most `MAX_TEMPLATE` characters.
    """
    file, config_file = folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG
    config = read_if_there(config_file)
    special = {name: token for name in _SPECIAL if (token := special_token(config, name, config_file)) is not None}
    if file.exists():
        return ChatTemplate(_read_source(file), file, special)
    source = config.get("chat_template")
    if source is None:
        return None
    if isinstance(source, list):
        named = (entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default")
        source = next(named, {}).get("template")
    if not is_text(source) or len(source) > MAX_TEMPLATE:
        raise InputError(
            f"{config_file}: chat_template is no text of at most {MAX_TEMPLATE} characters, nor a list of which one "
            f'with the name "default" is'
        )
    return ChatTemplate(source, config_file, special)


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool = True
) -> np.ndarray:
    """The token ids of a conversation, int32 of shape (T,): what the template writes, `bos_token_id` not added.

    Special tokens are those that the template writes. Where a message spells one, its text is encoded as any other
    text, so that nobody can end their turn and speak for another; but `<think>` and `</think>` in what the assistant
    said remain. (One letter of the text and the rest are encoded apart.) A token that a template puts together from
    texts of its own and of a message is not recognized as the message's; `role` is taken as it is.

    Raises:
      InputError: the template cannot be rendered for these messages, or a message is not Unicode text.
    """
    text = template.render([_parted(tokenizer, message) for message in messages], add_generation_prompt)
    pieces = [tokenizer.encode(piece) for piece in text.split(_PARTING)]
    return np.concatenate(pieces)


def _parted(tokenizer: Tokenizer, message: Message) -> dict[str, Any]:
    """The message with every special token in its texts parted in two."""
    kept = _REASONING if message.get("role") == "assistant" else frozenset()
    # A token of one letter says nothing but itself.
    special = sorted((token for token in tokenizer.backend.special_tokens if len(token) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(token) for token in special if token not in kept) or "(?!)")
    return {key: value if key == "role" else _part(value, pattern) for key, value in message.items()}


def _part(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _part(entry, pattern) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_part(entry, pattern) for entry in value]
    if not isinstance(value, str):
        return value
    if not is_text(value) or _PARTING in value:
        raise InputError("a message has a lone surrogate or U+FDD0, which is no character; Unicode text is needed")
    while pattern.search(value):  # again, because tokens may overlap
        value = pattern.sub(lambda found: found[0][0] + _PARTING + found[0][1:], value)
    return value


def _read_source(file: Path) -> str:
    try:
        return read_bounded(file, MAX_TEMPLATE, "jinja template").decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 ({error}); a chat template in that encoding is needed") from None

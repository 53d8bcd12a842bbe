"""Conversations from jsonl files, and the text that a tokenizer's chat template makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsiq.data.documents import read_objects
from lsiq.errors import ConfigError, InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Templates that print today's date would make other tokens every day. This is the date that LLaMA 3.2's own template
# falls back to where it cannot ask for today's.
_NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class Conversation:
    """The messages of a line of a file, each with a `role` and a `content`."""

    messages: list[dict[str, Any]]
    line: int


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Yield the conversations of a jsonl file, plain or xz, in file order; needs no torch.

    Every line has the field `messages`, a list of objects with `role` (one of ROLES) and `content` (a string). What
    else a message has is left to the template; other fields of the line are not looked at.

    Raises:
        InputError: the file cannot be read, or a line is no conversation; the message names file and line.
    """
    path = Path(path)
    if not path.name.removesuffix(".xz").endswith(".jsonl"):
        raise InputError(
            f"{path}: calib.template=true reads conversations from jsonl; give a file of that ending, one object with "
            "messages per line"
        )
    for line, entry in read_objects(path):
        where = f"{path}, line {line}"
        messages = entry.get("messages")
        if not isinstance(messages, list) or not messages:
            fields = ", ".join(entry) or "none"
            raise InputError(
                f"{where}: has no list of messages (its fields: {fields}); give messages with role and content, or set "
                "calib.template=false and calib.fields=[…]"
            )
        for number, message in enumerate(messages, 1):
            _check(message, f"{where}, message {number}")
        yield Conversation(messages, line)


def _check(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise InputError(f"{where}: is a {type(message).__name__}; a message is an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{where}: role={role}: no such role; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        problem = "is missing" if content is None else f"is a {type(content).__name__}"
        raise InputError(f"{where}: content {problem}; it must be a string")


def no_template(where: object) -> str:
    """The message for a tokenizer without a chat template; also said before torch is imported."""
    return (
        f"calib.template=true: the tokenizer of {where} has no chat template; use an instruct model, or set "
        "calib.template=false and calib.fields=[…]"
    )


def no_conversation(path: object) -> str:
    """The message for a file without a conversation."""
    return f"{path}: holds no conversation; give a file with messages in it"


def template_of(tokenizer: Any) -> str:
    """Return the default chat template of a tokenizer; ConfigError if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(no_template(getattr(tokenizer, "name_or_path", None) or "the model"))
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several named templates, none of them the default
        raise ConfigError(f"calib.template=true: the tokenizer has no default chat template ({error})") from error


def render(path: str | Path, tokenizer: Any) -> list[str]:
    """Return every conversation of a file as the text that the tokenizer's chat template makes of it.

    The text holds the special tokens that the template writes, and no request for a further answer. A template that
    asks for today's date is told 26 July 2024, so that the same file gives the same text on every day.

    Raises:
        ConfigError: the tokenizer has no chat template.
        InputError: the file cannot be read, or the template refuses a conversation.
    """
    from jinja2 import TemplateError

    template = template_of(tokenizer)
    if "strftime_now" in template:
        template = _NO_CLOCK + template
    texts = []
    for conversation in read_conversations(path):
        try:
            texts.append(tokenizer.apply_chat_template(conversation.messages, chat_template=template, tokenize=False))
        except (TemplateError, TypeError) as error:  # what a template raises itself, and what it makes of odd fields
            raise InputError(
                f"{path}, line {conversation.line}: the chat template refuses the conversation ({error}); correct or "
                "remove it"
            ) from error
    return texts

"""What a row of a data set is: a text, or a prompt with its completion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_dam.config.data_settings import SHAPES

Messages = Sequence[Mapping[str, Any]]
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of roles, where they differ


@dataclass(frozen=True)
class Example:
    """One of: a text (without prompt); a prompt and a completion; a conversation, both being
    messages, of which the last by the assistant and those after it are the completion."""

    prompt: str | Messages | None
    completion: str | Messages


def example(row: Mapping[str, Any], mapping: Mapping[str, str] | None) -> Example | None:
    """A row's first shape in the order of SHAPES; None where it has none. `mapping` has our names
    of columns and the data's; without one they are the same.

    Files with mixed rows give None for the columns that a row lacks.
    """
    if mapping is not None:
        row = {ours: row.get(theirs) for ours, theirs in mapping.items()}
    return next(filter(None, (_shaped(row, shape) for shape in SHAPES)), None)


def _shaped(row: Mapping[str, Any], shape: tuple[str, ...]) -> Example | None:
    values = [row.get(column) for column in shape]
    if shape in (("messages",), ("conversations",)):
        messages = _messages(values[0])
        return messages and _conversation(messages)
    if all(isinstance(value, str) for value in values):
        if len(values) == 1:
            return Example(None, values[0])
        *prompt, completion = values
        return Example("\n\n".join(filter(None, prompt)), completion)
    if shape == ("prompt", "completion"):
        prompt, completion = map(_messages, values)
        return prompt and completion and Example(prompt, completion)
    return None


def _messages(value: Any) -> list[Mapping] | None:
    """The messages of a conversation, None where it is none. A column of dictionaries gives each
    of them all keys, those that it lacks as None, which templates would take for given."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return None
    messages = [_message({k: v for k, v in m.items() if v is not None}) for m in value]
    return messages if messages and all(isinstance(m.get("role"), str) for m in messages) else None


def _message(message: dict[str, Any]) -> Mapping:
    role = message.get("from")
    if "role" in message or not isinstance(role, str):
        return message
    return {"role": SHAREGPT.get(role, role), "content": message.get("value", "")}


def _conversation(messages: list[Mapping]) -> Example:
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    cut = answers[-1] if answers else len(messages)
    return Example(messages[:cut], messages[cut:])

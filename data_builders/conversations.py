"""What is said in a conversation, whichever of TRL's two shapes a row has: `prompt` and `completion`, or `messages`.

A message is `{"role": ..., "content": ...}`; its content is a text, or typed parts, among which `{"type": "image"}` is
a place for a picture. Without places, pictures come before the first user's text.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from data_builders.records import Row


class Turn(NamedTuple):
    """One message without its pictures."""

    role: str
    text: str


def messages_of(row: Row) -> list[Row]:
    """The messages of a row in their order, of whichever shape it has.

    >>> messages_of({"prompt": [{"role": "user", "content": "2 + 2?"}],
    ...              "completion": [{"role": "assistant", "content": "4"}]})[-1]
    {'role': 'assistant', 'content': '4'}
    """
    return row["messages"] if row.get("messages") else [*row["prompt"], *row["completion"]]


def turns(row: Row) -> list[Turn]:
    """The messages of a row as texts.

    >>> turns({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]})
    [Turn(role='user', text='What?')]
    """
    return [Turn(message["role"], "".join(_texts(message.get("content")))) for message in messages_of(row)]


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif content is not None:
        yield from (
            part["text"] for part in content if part.get("type") == "text" and isinstance(part.get("text"), str)
        )

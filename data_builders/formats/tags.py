"""`<image>` in texts and what it means: where a picture stands.

In our rows pictures come before the text and the text has no tag. A prompt with a picture in its middle becomes a list
of messages with typed parts, which is how TRL says it and what `mpo train` and `mpo sft` take; the pictures then
stand where the tags stood.
"""

import re
from collections.abc import Sequence
from typing import Any

from data_builders.formats.protocol import PAIR_KINDS, RefusedError
from data_builders.records import Row

TAG = "<image>"
Turn = tuple[str, str]
"""A role (system, user, assistant, tool) and a text, pictures in it as tags."""

_LEAD = re.compile(r"(?:\s*<image>\s*)+")


def without_tags(turns: Sequence[Turn], num_images: int, unit: str) -> tuple[list[Row], Row]:
    r"""Messages for turns with tags.

    Args:
        turns: The turns before the answer.
        num_images: How many pictures there are.
        unit: What the format usually writes before the text for each picture.

    Returns:
        The messages, and the hint `lead` if the tags before the text, or their absence, are unusual.

    Raises:
        RefusedError: There are more or fewer tags than pictures.

    >>> without_tags([("user", "<image>\nHow many?")], 1, "<image>\n")
    ([{'role': 'user', 'content': 'How many?'}], {})
    """
    texts = [text for _, text in turns]
    num_tags = sum(text.count(TAG) for text in texts)
    if num_tags not in (0, num_images):
        raise RefusedError("placeholders that do not match the images", f"{num_tags} for {num_images}: {texts[0]}")
    if not num_images:
        return [_message(role, text) for role, text in turns], {}
    first = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise RefusedError("images without a user's turn", texts)
    lead = _lead(texts[first], num_images, unit) if num_tags else ""
    if lead is None:
        return [_message(role, _parts(text) if TAG in text else text) for role, text in turns], {}
    texts[first] = texts[first][len(lead) :]
    messages = [_message(role, text) for (role, _), text in zip(turns, texts, strict=True)]
    return messages, {} if lead == unit * num_images else {"lead": lead}


def with_tags(messages: Sequence[Row], num_images: int, unit: str, hints: Row) -> list[Turn]:
    """Turns with tags for messages: the inverse of `without_tags`.

    Raises:
        RefusedError: A text holds a tag that is none, or a message is more than text and pictures.
    """
    turns = [(message["role"], text_of(message)) for message in messages]
    num_places = sum(text.count(TAG) for _, text in turns)
    if num_places or not num_images:
        if num_places != num_images:
            raise RefusedError("placeholders that do not match the images", f"{num_places} for {num_images}")
        return turns
    lead = hints.get("lead", unit * num_images)
    lead = lead if lead.count(TAG) in (0, num_images) else unit * num_images
    first = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise RefusedError("images without a user's turn", turns)
    turns[first] = ("user", lead + turns[first][1])
    return turns


def text_of(message: Any) -> str:
    """The text of a message, with a tag for each picture.

    Raises:
        RefusedError: It holds a tag itself, or something else than text and pictures.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str | list) or message.keys() - {"role", "content"}:
        raise RefusedError("a message that is more than a role and a text", message)
    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for piece in pieces:
        if not isinstance(piece, dict) or (piece.get("type") != "image" and not isinstance(piece.get("text"), str)):
            raise RefusedError("a message that is more than text and images", piece)
        check_untagged(piece.get("text") or "")
    return "".join(TAG if piece["type"] == "image" else piece["text"] for piece in pieces)


def check_untagged(text: Any) -> str:
    """The text itself, if nothing in it can be taken for a picture.

    Raises:
        RefusedError: It is no text, or holds a tag.
    """
    if not isinstance(text, str):
        raise RefusedError("a text that is no text", repr(text))
    if TAG in text:
        raise RefusedError(f"a text that holds {TAG} where no picture is meant", text)
    return text


def places_of(messages: Any) -> int:
    """How many pictures have a place in these messages."""
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(isinstance(part, dict) and part.get("type") == "image" for part in parts)


def dialogue(row: Row) -> tuple[list[Row], str, str]:
    """The messages before the answer, the chosen answer and the rejected one, of a pair in either of our shapes.

    Raises:
        RefusedError: An answer is more than one text.
    """
    if not isinstance(row["chosen"], list):
        return [_message("user", row.get("prompt"))], check_untagged(row["chosen"]), check_untagged(row["rejected"])
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not isinstance(prompt, list):
        prompt, chosen, rejected = _shared_prompt(chosen, rejected)
    return prompt, answer_of(chosen), answer_of(rejected)


def answer_of(messages: Any) -> str:
    """The text of an answer that is one message.

    Raises:
        RefusedError: It is none, several, or not the assistant's.
    """
    if not isinstance(messages, list) or len(messages) != 1 or messages[0].get("role") != "assistant":
        raise RefusedError("an answer of several messages", messages)
    return check_untagged(text_of(messages[0]))


def pair_fields(messages: list[Row], chosen: str, rejected: str, kind: Any) -> Row:
    """`prompt`, `chosen` and `rejected` of our row: strings if one user's turn and a `kind` say it all.

    Raises:
        RefusedError: An answer is empty or no text, or nothing is asked.
    """
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text:
            raise RefusedError(f"an empty `{name}`")
        check_untagged(text)
    if not messages:
        raise RefusedError("an answer to nothing")
    kinds = {"kind": kind} if kind in PAIR_KINDS else {}
    if kinds and len(messages) == 1 and messages[0]["role"] == "user" and isinstance(messages[0]["content"], str):
        return {"prompt": messages[0]["content"], "chosen": chosen, "rejected": rejected, **kinds}
    return {"prompt": messages, "chosen": answer(chosen), "rejected": answer(rejected), **kinds}


def answer(text: str) -> list[Row]:
    """A text as the assistant's message."""
    return [_message("assistant", text)]


def _shared_prompt(chosen: list[Row], rejected: Any) -> tuple[list[Row], list[Row], list[Row]]:
    """Without a prompt, it is what both begin with alike; each keeps its last message."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _lead(text: str, num_images: int, unit: str) -> str | None:
    """The tags before the text; None if there are others."""
    if unit and text.startswith(unit * num_images):
        return unit * num_images
    found = _LEAD.match(text)
    return found.group() if found and found.group().count(TAG) == num_images else None


def _message(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


def _parts(text: str) -> list[Row]:
    pieces = re.split(f"({TAG})", text)
    return [{"type": "image"} if p == TAG else {"type": "text", "text": p} for p in pieces if p]

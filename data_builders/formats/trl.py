"""TRL's conversational format: `prompt`, `chosen`, `rejected` (or `completion`) as lists of messages, and `images`.

A message's content is a text, and pictures come before the first one; or it is a list of typed parts, and pictures
stand where the parts say. A pair whose `kind` is known becomes a row of strings; others stay lists of messages, which
`mpo train` reads alike.
"""

from typing import Any, ClassVar

from data_builders.formats.files import NumberedFiles
from data_builders.formats.names import names_in_root
from data_builders.formats.protocol import PAIR_KINDS, Context, Kind, RefusedError, further, placed
from data_builders.formats.tags import places_of
from data_builders.records import Row

_TEXTS = ("prompt", "chosen", "rejected", "completion")


class Trl(NumberedFiles):
    """Pairs and conversations as TRL trains on them."""

    name: ClassVar[str] = "trl"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"pairs", "conversations"})
    columns: ClassVar[frozenset[str]] = frozenset({*_TEXTS, "images", "image"})
    holds: ClassVar[frozenset[str]] = frozenset({*_TEXTS, "images"})

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """A pair or a conversation.

        Raises:
            RefusedError: A response is missing or empty, or places for images do not match the images.
        """
        given = fields.get("image") if fields.get("images") is None else fields["images"]
        images = names_in_root(given, context.image_root)
        texts = {name: fields[name] for name in _TEXTS if fields.get(name) is not None}
        _check_texts(texts, len(images))
        row = {**placed(fields, self.columns, context), "images": images}
        messages, hints = _in_strings(texts, len(images))
        return {**row, **_as_pair(messages, row.get("kind"))}, hints

    def from_row(self, row: Row, context: Context) -> Row:
        """A row of TRL's."""
        texts = {name: row[name] for name in _TEXTS if row.get(name) is not None}
        if row.get("kind") is not None and isinstance(texts.get("chosen"), str):
            texts = as_messages(texts)
        if context.hints.get("parts"):
            texts = in_parts(texts, len(row.get("images", [])))
        return {"images": row.get("images", []), **texts, **further(row, self.columns, nested=False)}


def as_messages(texts: Row) -> Row:
    """Strings as messages of the user and the assistant."""
    roles = {"prompt": "user"}
    return {
        name: [{"role": roles.get(name, "assistant"), "content": text}] if isinstance(text, str) else text
        for name, text in texts.items()
    }


def in_parts(texts: Row, num_images: int) -> Row:
    """Messages whose contents are lists of parts, with a place for every picture."""
    parts = {name: [_message_in_parts(message) for message in messages] for name, messages in texts.items()}
    prompt = parts.get("prompt", [])
    first = next((message for message in prompt if message.get("role") == "user"), None)
    if num_images and first and not places_of(prompt):
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    return parts


def _message_in_parts(message: Row) -> Row:
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
    return {**message, "content": parts}


def _in_strings(texts: Row, num_images: int) -> tuple[Row, Row]:
    """The inverse of `in_parts`, with the hint `parts`; or the messages as they are, if strings would say less."""
    if not all(isinstance(messages, list) for messages in texts.values()):
        return texts, {}
    strings = {name: [_message_in_a_string(given_fields(message)) for message in part] for name, part in texts.items()}
    back = in_parts(strings, num_images)
    given = {name: [given_fields(message) for message in messages] for name, messages in texts.items()}
    return (strings, {"parts": True}) if back == given else (texts, {})


def _message_in_a_string(message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    rest = [part for part in content if part != {"type": "image"}] if isinstance(content, list) else []
    if len(rest) != 1 or not isinstance(rest[0], dict) or rest[0].keys() != {"type", "text"}:
        return message
    return {**message, "content": rest[0]["text"]}


def given_fields(message: Any) -> Any:
    """A message without the nulls that Arrow fills its fields up with."""
    if not isinstance(message, dict):
        return message
    given = {name: value for name, value in message.items() if value is not None}
    if isinstance(content := given.get("content"), list):
        given["content"] = [
            {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else part
            for part in content
        ]
    return given


def _as_pair(texts: Row, kind: Any) -> Row:
    """Strings, if the kind of pair is known and there is one text on each side."""
    if kind not in PAIR_KINDS or "chosen" not in texts:
        return texts
    if all(isinstance(text, str) for text in texts.values()):
        return texts
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    strings = {}
    for name, role in roles.items():
        messages = texts.get(name)
        if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
            return texts
        if messages[0].keys() != {"role", "content"} or messages[0]["role"] != role:
            return texts
        strings[name] = messages[0]["content"]
    return strings if all(isinstance(text, str) for text in strings.values()) else texts


def _check_texts(texts: Row, num_images: int) -> None:
    missing = [] if "completion" in texts else [name for name in ("chosen", "rejected") if name not in texts]
    if missing:
        raise RefusedError(f"no `{missing[0]}`", ", ".join(texts))
    for name, value in texts.items():
        if not isinstance(value, str | list):
            raise RefusedError(f"`{name}` that is neither a text nor a list of messages", value)
        if not value and name != "prompt":
            raise RefusedError(f"an empty `{name}`")
    if num_images and any(isinstance(texts[name], str) for name in texts if name != "prompt"):
        raise RefusedError("strings in place of messages in a row with images", texts)
    num_places = places_of(texts.get("prompt"))
    if num_places not in (0, num_images):
        raise RefusedError("placeholders that do not match the images", f"{num_places} for {num_images}")

r"""InternVL's instruction data and prompt files, and MAmmoTH-VL's arrays, which have the same rows.

    {"id": 5, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt",
    "value": "3"}]}                                              conversations
    {"image": "a.png", "question": "How many?", "answer": "3"}   a question
    {"image": "a.png", "question": "How many?", "chosen": "Let me see ...", "rejected": null}   a response to one

The last answer of a conversation is what our row learns; those before it are a part of its prompt. A question is one
text, so pictures inside it come before it in our row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from data_builders.formats.files import WholeFile, json_line
from data_builders.formats.mmpr import base_of, image_field, images_of
from data_builders.formats.protocol import AS_READ, Context, Kind, RefusedError, further, placed
from data_builders.formats.sets import OfSets, SetWriter, set_writer
from data_builders.formats.tags import TAG, answer, answer_of, check_untagged, text_of, with_tags, without_tags
from data_builders.records import Row

_UNIT = "<image>\n"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_FROM = {role: name for name, role in _ROLES.items()}


class InternvlSft(OfSets):
    """Conversations as InternVL is fine-tuned on them."""

    name: ClassVar[str] = "internvl_sft"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"conversations"})
    columns: ClassVar[frozenset[str]] = frozenset({"id", "image", "conversations"})
    holds: ClassVar[frozenset[str]] = frozenset({"id", "images", "prompt", "completion", "source"})

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """A conversation.

        Raises:
            RefusedError: It does not end with an answer, has a video, or its tags do not match its images.
        """
        if fields.get("video"):
            raise RefusedError("a video", fields["video"])
        images = images_of(fields, context)
        *turns, (role, completion) = _turns(fields.get("conversations"))
        if role != "assistant" or not any(role == "user" for role, _ in turns):
            raise RefusedError("a conversation that does not end with an answer to a question", fields)
        if not completion:
            raise RefusedError("an empty answer", fields)
        messages, hints = without_tags(turns, len(images), _UNIT)
        row = {**placed(fields, self.columns - {"id", "source"}, context), "images": images}
        root = {"root": context.hints["root"]} if "root" in context.hints else {}
        return {**row, "prompt": messages, "completion": answer(check_untagged(completion))}, {**root, **hints}

    def from_row(self, row: Row, context: Context) -> Row:
        """An annotation.

        Raises:
            RefusedError: A text holds a tag that is none, or a role has no counterpart.
        """
        if not isinstance(row["prompt"], list):
            raise RefusedError("a prompt that is no list of messages", row["prompt"])
        turns = with_tags(row["prompt"], len(row.get("images", [])), _UNIT, context.hints)
        turns.append(("assistant", answer_of(row["completion"])))
        if strange := {role for role, _ in turns} - _FROM.keys():
            raise RefusedError(f"a message of the role {sorted(strange)[0]}", row["prompt"])
        conversation = [{"from": _FROM[role], "value": text} for role, text in turns]
        own = {"id": row["id"]} if "id" in row else {}
        rest = further(row, {*self.columns, *self.holds} - {"source"})
        return {**own, **image_field(row, context), "conversations": conversation, **rest}

    @contextmanager
    def writer(self, folder: Path, image_root: Path, shard_size: int) -> Iterator["_Sets"]:
        """Opens a folder with a `meta.json` and one annotation file for each source."""
        del shard_size
        with set_writer(folder, image_root, meta=True) as writer:
            yield _Sets(writer, self.name)


class MammothVl(InternvlSft):
    """MAmmoTH-VL's instruction data: single JSON arrays of many gigabytes."""

    name: ClassVar[str] = "mammoth_vl"
    columns: ClassVar[frozenset[str]] = frozenset({"id", "image", "conversations", "source", "video"})

    @contextmanager
    def writer(self, folder: Path, image_root: Path, shard_size: int) -> Iterator["_OneArray"]:
        """Opens a folder with one JSON array."""
        del image_root, shard_size
        with WholeFile(folder / "data.json") as file:
            writer = _OneArray(file)
            yield writer
            file.write("\n]\n" if writer.begun else "[]\n")


class InternvlPrompt(OfSets):
    """Questions to be answered, and responses to be continued without their image."""

    name: ClassVar[str] = "internvl_prompt"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"questions", "responses"})
    columns: ClassVar[frozenset[str]] = frozenset({"image", "question", "answer", "chosen", "rejected"})
    holds: ClassVar[frozenset[str]] = frozenset({"images", "question", "prompt", "answer", "response", "source"})

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """A question, or a response if the row has a `chosen` one.

        Raises:
            RefusedError: Nothing is asked, or tags do not match images.
        """
        images = images_of(fields, context)
        question = fields.get("question")
        if not isinstance(question, str):
            raise RefusedError("no `question`", repr(question))
        [message], hints = without_tags([("user", question)], len(images), "")
        text = text_of(message).replace(TAG, "")
        if not text:
            raise RefusedError("an empty `question`")
        row = {**placed(fields, self.columns, context), "images": images, "question": text}
        row["answer"] = fields["answer"] if isinstance(fields.get("answer"), str) else None
        if fields.get("chosen") is not None:
            response = {"response": check_untagged(fields["chosen"]), "finish_reason": "stop", "sampler": {}}
            row |= {"prompt": text, **response}
        root = {"root": context.hints["root"]} if "root" in context.hints else {}
        return row, {**root, **hints}

    def from_row(self, row: Row, context: Context) -> Row:
        """A prompt.

        Raises:
            RefusedError: A text holds a tag that is none.
        """
        asked = row["prompt"] if "response" in row else row["question"]
        message = {"role": "user", "content": check_untagged(asked)}
        [(_, question)] = with_tags([message], len(row.get("images", [])), "", context.hints)
        fields = {**image_field(row, context), "question": question}
        if "response" in row:
            fields |= {"chosen": check_untagged(row["response"]), "rejected": None}
        else:
            fields["answer"] = row.get("answer")
        return {**fields, **further(row, {*self.columns, *self.holds} - {"source"})}

    @contextmanager
    def writer(self, folder: Path, image_root: Path, shard_size: int) -> Iterator["_Sets"]:
        """Opens a folder with one file for each source."""
        del shard_size
        with set_writer(folder, image_root, meta=False) as writer:
            yield _Sets(writer, self.name)


class _Sets:
    def __init__(self, writer: SetWriter, name: str) -> None:
        self.writer, self.name = writer, name

    def add(self, fields: Row, row: Row) -> None:
        memory = row.get(AS_READ) or {}
        memory = memory if memory.get("format") == self.name else {}
        self.writer.add_to(row.get("source") or "data", base_of(row, memory), fields)


class _OneArray:
    def __init__(self, file: WholeFile) -> None:
        self.file, self.begun = file, False

    def add(self, fields: Row, row: Row) -> None:
        del row
        self.file.write(("," if self.begun else "[") + "\n" + json_line(fields))
        self.begun = True


def _turns(conversations: object) -> list[tuple[str, str]]:
    if not isinstance(conversations, list) or not conversations:
        raise RefusedError("no `conversations`", conversations)
    turns = []
    for turn in conversations:
        said = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if said[0] not in _ROLES or not isinstance(said[1], str) or len(turn) != 2:
            raise RefusedError("a turn that is not `from` human, gpt or system with a text as its `value`", turn)
        turns.append((_ROLES[said[0]], said[1]))
    return turns

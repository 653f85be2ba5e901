"""What of a row of supervised fine-tuning is learned: its text in pieces, in any of TRL's shapes.

A chat template that marks what the assistant says (`{% generation %}`) is not needed: an assistant's turn is what a
conversation that ends with it has more than one that is about to hear it. That holds for templates that only ever add
text; others are refused.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from data_builders.records import InputError, Row


class Segment(NamedTuple):
    """A piece of a row's text, tokenized by itself as TRL does with prompts and completions."""

    text: str
    num_pictures: int = 0
    is_learned: bool = True


@dataclass(frozen=True)
class Segmenter:
    """Cuts rows into what is learned and what is only read.

    Attributes:
        processor: Its chat template renders conversations. Of a tokenizer, contents stay strings.
        assistant_only: True: the assistant's turns are learned, in a `prompt` of several turns too. None: those of
            `messages`. False: everything but prompts.
        completion_only: Of `prompt` and `completion`, only the completion is.
        text_field: The column of plain texts.
        begin: Put in front of plain texts, as the tokenizer of a text model does (`<s>`).
        end: Put behind plain texts that do not end with it, as TRL does.
    """

    processor: ProcessorMixin | PreTrainedTokenizerBase
    assistant_only: bool | None = None
    completion_only: bool = True
    text_field: str = "text"
    begin: str = ""
    end: str = ""

    def __call__(self, row: Row, num_pictures: int = 0) -> list[Segment]:
        """The pieces of a row, in their order.

        Args:
            row: With `messages`, `prompt` and `completion`, or a plain text.
            num_pictures: Of the row. They stand in front of the first user's text, or where messages have places.

        Raises:
            InputError: There is nothing to learn, or the chat template says earlier turns in another way later on.
        """
        if row.get("messages"):
            return self._of_messages(row, num_pictures)
        if row.get("prompt") is not None and row.get("completion") is not None:
            if self.assistant_only and is_conversational({"prompt": row["prompt"]}):
                return self._of_messages({**row, "messages": [*row["prompt"], *row["completion"]]}, num_pictures)
            return self._of_completion(row, num_pictures)
        text = row.get(self.text_field)
        if text is None:
            raise InputError(
                f"a row has neither `messages`, nor `prompt` and `completion`, nor `{self.text_field}`: it has "
                f"{', '.join(name for name, value in row.items() if value is not None)}."
            )
        return [Segment(self.begin + self._ended(text), num_pictures)]

    def _of_completion(self, row: Row, num_pictures: int) -> list[Segment]:
        texts: Row = {name: row[name] for name in ("prompt", "completion")}
        if is_conversational(texts):
            texts["prompt"] = self._structured(texts["prompt"], num_pictures)
            texts["completion"] = self._structured(texts["completion"], 0)
            texts |= {"chat_template_kwargs": row.get("chat_template_kwargs") or {}}
            texts = apply_chat_template(texts, self.processor, tools=_tools(row))
        else:
            texts = {"prompt": self.begin + texts["prompt"], "completion": self._ended(texts["completion"])}
        return [
            Segment(texts["prompt"], num_pictures, is_learned=not self.completion_only),
            Segment(texts["completion"]),
        ]

    def _of_messages(self, row: Row, num_pictures: int) -> list[Segment]:
        messages = self._structured(row["messages"], num_pictures)
        settings = {"tools": _tools(row), **(row.get("chat_template_kwargs") or {})}

        def said(until: int, **more: Any) -> str:
            if not until:
                return ""
            return self.processor.apply_chat_template(messages[:until], tokenize=False, **settings, **more)

        whole = said(len(messages))
        if self.assistant_only is False:
            return [Segment(whole, num_pictures)]
        pieces: list[Segment] = []
        place = heard = 0  # how much of the text, and how many messages, the pieces so far hold
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, answered = said(index, add_generation_prompt=True), said(index + 1)
            start = len(os.path.commonprefix([asked, answered]))
            if not whole.startswith(answered) or start < place:
                raise InputError(_NOT_ADDITIVE)
            pieces.append(Segment(whole[place:start], _num_places(messages[heard:index]), is_learned=False))
            pieces.append(Segment(whole[start : len(answered)], _num_places([message])))
            place, heard = len(answered), index + 1
        if not pieces:
            raise InputError(
                "a conversation has no assistant's turn, so that nothing of it is learned: leave it out, or set "
                "`assistant_only_loss: false` to learn all of its text."
            )
        rest = Segment(whole[place:], _num_places(messages[heard:]), is_learned=False)
        return [piece for piece in [*pieces, rest] if piece.text]

    def _structured(self, messages: Sequence[Row], num_pictures: int) -> list[Row]:
        """Messages as the template takes them: of a processor, contents in typed parts."""
        if not isinstance(self.processor, ProcessorMixin):
            return list(messages)
        return prepare_multimodal_messages(messages, images=[None] * num_pictures)

    def _ended(self, text: str) -> str:
        return text if text.endswith(self.end) else text + self.end


_NOT_ADDITIVE = (
    "the chat template writes a conversation's earlier turns in another way once later ones follow (some leave out "
    "what was thought), so that what the assistant said cannot be told apart. Make a row of each answer, with "
    "`prompt` and `completion`, or set `assistant_only_loss: false`."
)


def _tools(row: Row) -> Any:
    """The tools that a row names: a list, or JSON as TRL takes it too."""
    tools = row.get("tools") or None
    return json.loads(tools) if isinstance(tools, str) else tools


def _num_places(messages: Sequence[Row]) -> int:
    """Places for pictures in structured messages."""
    contents = (message.get("content") for message in messages)
    return sum(part.get("type") == "image" for parts in contents if isinstance(parts, list) for part in parts)

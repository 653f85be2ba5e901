"""ms-swift's preference data: the chosen answer ends the messages, the rejected one stands beside them.

{"messages": [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "3"}],
 "rejected_response": "4", "images": ["a.png"]}
"""

from typing import ClassVar

from data_builders.formats.files import NumberedFiles
from data_builders.formats.names import names_in_root
from data_builders.formats.protocol import Context, Kind, RefusedError, further, placed
from data_builders.formats.tags import TAG, dialogue, pair_fields, with_tags, without_tags
from data_builders.records import Row

_ROLES = ("system", "user", "assistant", "tool")


class MsSwift(NumberedFiles):
    """Pairs as ms-swift trains on them."""

    name: ClassVar[str] = "ms_swift"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"pairs"})
    columns: ClassVar[frozenset[str]] = frozenset({"messages", "rejected_response", "images"})
    holds: ClassVar[frozenset[str]] = frozenset({"images", "prompt", "chosen", "rejected"})

    def to_row(self, fields: Row, context: Context) -> tuple[Row, Row]:
        """A pair.

        Raises:
            RefusedError: A response is missing, an image lies outside the root, or tags do not match the images.
        """
        images = names_in_root(fields.get("images"), context.image_root)
        *turns, (role, chosen) = _turns(fields.get("messages"))
        if role != "assistant":
            raise RefusedError("messages that do not end with the chosen answer", fields["messages"])
        messages, hints = without_tags(turns, len(images), TAG)
        row = {**placed(fields, self.columns, context), "images": images}
        return {**row, **pair_fields(messages, chosen, fields.get("rejected_response"), row.get("kind"))}, hints

    def from_row(self, row: Row, context: Context) -> Row:
        """A row of ms-swift.

        Raises:
            RefusedError: An answer is more than one text, or a text holds a tag that is none.
        """
        prompt, chosen, rejected = dialogue(row)
        turns = [*with_tags(prompt, len(row.get("images", [])), TAG, context.hints), ("assistant", chosen)]
        return {
            "messages": [{"role": role, "content": text} for role, text in turns],
            "rejected_response": rejected,
            "images": row.get("images", []),
            **further(row, {*self.columns, *self.holds}, nested=False),
        }


def _turns(messages: object) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise RefusedError("no `messages`", messages)
    turns = []
    for message in messages:
        said = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if said[0] not in _ROLES or not isinstance(said[1], str) or len(message) != 2:
            raise RefusedError("a message that is more than a role and a text", message)
        turns.append(said)
    return turns

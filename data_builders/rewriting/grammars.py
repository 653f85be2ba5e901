r"""What a model must write when it rewrites a row, and how that is read: five grammars, one parser each.

    general, caption    <Instruction: ...> <Response: ...>
    chart               ##Instruction##: ... ##Response##: ...
    math                <response: ...>
    ocr                 Scenario: ... then Human: ... Assistant: ..., at most 5 rounds, each on a line of its own

A parser gives the turns, or the reason why there are none; no text makes it raise, and its work grows with the length
of the text alone. Case, spaces inside a tag and the full-width colon are forgiven, as is what stands before the first
tag and a code fence around everything. A tag that is missing, comes twice or out of order, is not closed at the very
end or holds no word is not: what is guessed here would be trained on.
Source: Guo et al. 2024, "MAmmoTH-VL", https://arxiv.org/abs/2412.05237.
"""

import re
from collections.abc import Callable, Mapping
from itertools import islice, pairwise
from typing import Literal

from data_builders.conversations import Turn

Grammar = Literal["general", "caption", "chart", "math", "ocr"]
Parsed = list[Turn] | str
"""The turns of a reply, or why it has none."""

MAX_ROUNDS = 5
MAX_REPLY_CHARS = 100_000

_COLON = r"[ \t]{0,9}[:\uff1a]"
_EDGES = " \t\r\n`*"  # that models put around a tag
_FENCE = re.compile(r"```\w{0,20}\n(.*)\n```", re.DOTALL)
_SPEAKER = re.compile(
    rf"^[ \t]{{0,9}}(?:(?:scenario|human|assistant){_COLON}"
    rf"|\*\*(?:scenario|human|assistant)(?:{_COLON}\*\*|\*\*{_COLON}))",
    re.IGNORECASE | re.MULTILINE,
)
# What only a model's own machinery may write: trained on as text, it would stand for a picture or end a message.
_MACHINERY = re.compile(
    r"<[|\uff5c][^<>\s]{1,40}[|\uff5c]>|\[/?INST\]|<</?SYS>>|</?(?:s|think|image|img|video|audio|IMG_CONTEXT|image_pad"
    r"|image_soft_token|start_of_image|end_of_image|start_of_turn|end_of_turn|tool_call)>",
    re.IGNORECASE,
)


def _tag(name: str) -> re.Pattern[str]:
    return re.compile(rf"<[ \t]{{0,9}}{name}{_COLON}", re.IGNORECASE)


def _heading(name: str) -> re.Pattern[str]:
    return re.compile(rf"##[ \t]{{0,9}}{name}[ \t]{{0,9}}##{_COLON}", re.IGNORECASE)


_TAGS = {name: _tag(name) for name in ("Instruction", "Response")}
_HEADINGS = {name: _heading(name) for name in ("Instruction", "Response")}
_MATH_TAGS = {"response": _tag("response")}


def parse(grammar: Grammar, reply: str) -> Parsed:
    """The turns of a reply in one of the grammars, or why it has none."""
    return _PARSERS[grammar](reply)


def parse_general(reply: str) -> Parsed:
    """A new question and its answer.

    >>> parse_general("<Instruction: How many cats are there?> <Response: Two, as one sits on the other.>")[1].text
    'Two, as one sits on the other.'
    >>> parse_general("<Instruction: How many cats are there?>")
    'no Response'
    """
    return _in_turn(_closed(_parts(reply, _TAGS)))


def parse_caption(reply: str) -> Parsed:
    """The same for a caption."""
    return parse_general(reply)


def parse_chart(reply: str) -> Parsed:
    """A new question about a chart and its answer.

    >>> parse_chart("##Instruction##: Which bar is higher? ##Response##: The left one.")[0]
    Turn(role='user', text='Which bar is higher?')
    """
    return _in_turn(_parts(reply, _HEADINGS))


def parse_math(reply: str) -> Parsed:
    """A new answer alone; the question stays.

    >>> parse_math("<response: 2 + 2 = 4, and 4 > 3. Final answer: 4>")
    [Turn(role='assistant', text='2 + 2 = 4, and 4 > 3. Final answer: 4')]
    """
    return _in_turn(_closed(_parts(reply, _MATH_TAGS)))


def parse_ocr(reply: str) -> Parsed:
    r"""A conversation of one to five rounds; the scenario only sets the scene for the model.

    >>> [turn.role for turn in parse_ocr("Scenario: A shop.\nHuman: What does it sell?\nAssistant: Shoes.")]
    ['user', 'assistant']
    """
    body = _body(reply)
    if body is None:
        return "too long"
    found = list(islice(_SPEAKER.finditer(body), 2 * MAX_ROUNDS + 2))
    speakers = [mark[0].strip(" \t*:\uff1a").capitalize() for mark in found]
    if reason := _wrong_order(speakers):
        return reason
    ends = [mark.start() for mark in found[1:]] + [len(body)]
    texts = [body[mark.end() : end].strip() for mark, end in zip(found, ends, strict=True)]
    return _in_turn(list(zip(speakers, texts, strict=True)))


def _wrong_order(speakers: list[str]) -> str | None:
    if "Scenario" not in speakers:
        return "no Scenario"
    if speakers.count("Scenario") > 1:
        return "Scenario twice"
    if speakers[0] != "Scenario" or speakers[1:2] == ["Assistant"]:
        return "wrong order"
    if len(speakers) == 1:
        return "no Human"
    if doubled := next((one for one, other in pairwise(speakers) if one == other), None):
        return f"{doubled} twice in a row"
    if len(speakers) > 1 + 2 * MAX_ROUNDS:
        return f"more than {MAX_ROUNDS} rounds"
    return "Human without Assistant" if speakers[-1] == "Human" else None


def _body(reply: str) -> str | None:
    """A reply without what was thought before it and a fence around it; None for one of unreasonable length."""
    if len(reply) > MAX_REPLY_CHARS:
        return None
    body = reply.rpartition("</think>")[2].strip()
    fence = _FENCE.fullmatch(body)
    return fence[1] if fence else body


def _parts(reply: str, tags: Mapping[str, re.Pattern[str]]) -> list[tuple[str, str]] | str:
    """What follows each tag, up to the next; the tags must stand once each and in their order."""
    body = _body(reply)
    if body is None:
        return "too long"
    places: list[tuple[str, re.Match[str]]] = []
    for name, tag in tags.items():
        found = list(islice(tag.finditer(body), 2))
        if len(found) != 1:
            return f"{name} twice" if found else f"no {name}"
        places.append((name, found[0]))
    starts = [mark.start() for _, mark in places]
    if starts != sorted(starts):
        return "wrong order"
    ends = [*starts[1:], len(body)]
    return [(name, body[mark.end() : end].strip()) for (name, mark), end in zip(places, ends, strict=True)]


def _closed(parts: list[tuple[str, str]] | str) -> list[tuple[str, str]] | str:
    """The parts without the `>` that each must end with; behind it nothing may stand, or it may be any `>`."""
    if isinstance(parts, str):
        return parts
    bare = [(name, text.rstrip(_EDGES)) for name, text in parts]
    if unclosed := next((name for name, text in bare if not text.endswith(">")), None):
        return f"{unclosed} not closed"
    return [(name, text[:-1].strip()) for name, text in bare]


def _in_turn(parts: list[tuple[str, str]] | str) -> Parsed:
    """The turns that the parts make, in which there must be words and no machinery."""
    if isinstance(parts, str):
        return parts
    if empty := next((name for name, text in parts if not re.search(r"\w", text)), None):
        return f"empty {empty}"
    if any(_MACHINERY.search(text) for _, text in parts):
        return "markup of a picture or a chat template"
    roles = {"Instruction": "user", "Human": "user", "Scenario": None}
    turns = [(roles.get(name, "assistant"), text) for name, text in parts]
    return [Turn(role, text) for role, text in turns if role]


_PARSERS: dict[str, Callable[[str], Parsed]] = {
    "general": parse_general,
    "caption": parse_caption,
    "chart": parse_chart,
    "math": parse_math,
    "ocr": parse_ocr,
}

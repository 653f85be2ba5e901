"""Rules that a conversation and its pictures must keep to, as functions of them alone; none asks a model.

Only answers are measured: what the assistant says. A word is a run of letters and digits; Chinese and Japanese count
character by character (`data_builders.text_measures`). A measure that is exactly at its limit is kept.
Sources: picture sides and shapes are those of https://arxiv.org/abs/2412.05237 (MAmmoTH-VL), the filter for repetition
is from https://arxiv.org/abs/2412.05271 (InternVL2.5), with every occurrence counted.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

from data_builders.conversations import turns
from data_builders.images import image_path, image_size, load_image
from data_builders.records import InputError, Row
from data_builders.text_measures import repetition, words

_THREADS = 8  # files that are decoded at a time
_MAX_DETAIL_CHARS = 300


class Fault(NamedTuple):
    """Why a row is left out; the reason is one of a few, the detail is this row's own."""

    reason: str
    detail: str


@dataclass(kw_only=True)
class RuleOptions:
    """The rules of `mpo filter`, each of which can be turned off."""

    drop_empty: bool = field(
        default=True, metadata={"help": "Leave out conversations with an empty answer, or with none."}
    )
    min_words: int = field(
        default=0, metadata={"help": "Words of all answers together, at least; Chinese and Japanese count characters."}
    )
    max_words: int | None = field(
        default=6000,
        metadata={"help": "At most; 6,000 English words are about the 8,192 tokens of MAmmoTH-VL's training rows."},
    )
    max_answers: int | None = field(default=None, metadata={"help": "Answers in one conversation, at most."})
    max_repetition: float | None = field(
        default=0.3,
        metadata={
            "help": "Share of an answer's n-grams that may occur more than once, each time counted; texts that loop "
            "come near 1 and texts that do not near 0, so the limit itself is a choice."
        },
    )
    repetition_n: int = field(
        default=10, metadata={"help": "Length of those n-grams, in words, or in characters for Chinese (InternVL2.5)."}
    )
    images: Literal["decode", "head", "ignore"] = field(
        default="decode",
        metadata={
            "help": "decode: every picture is opened whole; head: only its size is read; ignore: pictures are not "
            "looked at."
        },
    )
    min_side: int = field(default=224, metadata={"help": "Pixels of a picture's shorter side, at least (paper)."})
    max_side: int | None = field(default=4096, metadata={"help": "Of its longer side, at most (paper)."})
    max_aspect_ratio: float | None = field(
        default=7.0, metadata={"help": "Longer side over shorter side, at most (paper: 1:7 to 7:1)."}
    )

    def __post_init__(self) -> None:
        """Refuses limits that nothing keeps to.

        Raises:
            InputError: A limit is out of its range, or below the one that it goes with.
        """
        ranges = {
            "min_words": (0, None),
            "max_words": (self.min_words, None),
            "max_answers": (1, None),
            "max_repetition": (0, 1),
            "repetition_n": (1, None),
            "min_side": (0, None),
            "max_side": (self.min_side, None),
            "max_aspect_ratio": (1, None),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (value >= least and (most is None or value <= most)):
                limit = f" and at most {most}" if most is not None else ""
                raise InputError(f"`{name}` must be at least {least}{limit}, got {value}; null turns a rule off.")

    def rules(self) -> Row:
        """The rules as they stand."""
        return {option.name: getattr(self, option.name) for option in fields(RuleOptions)}


def text_fault(row: Row, options: RuleOptions) -> Fault | None:
    """What is wrong with the answers of a conversation, if anything; the cheapest rules come first.

    >>> text_fault({"messages": [{"role": "assistant", "content": 20 * "It is a cat, I think. "}]}, RuleOptions())
    Fault(reason='an answer repeats itself', detail='1.00 of its 10-grams')
    """
    answers = [turn.text for turn in turns(row) if turn.role == "assistant"]
    if options.drop_empty and not all(text.strip() for text in answers or [""]):
        return Fault("an answer is empty", f"{len(answers)} answers")
    if options.max_answers and len(answers) > options.max_answers:
        return Fault("too many answers", f"{len(answers)} answers")
    num_words = sum(len(words(text)) for text in answers)
    if num_words < options.min_words:
        return Fault("answers too short", f"{num_words} words")
    if options.max_words is not None and num_words > options.max_words:
        return Fault("answers too long", f"{num_words} words")
    return _repetition_fault(answers, options)


def _repetition_fault(answers: list[str], options: RuleOptions) -> Fault | None:
    if options.max_repetition is None:
        return None
    most = max((repetition(text, options.repetition_n) for text in answers), default=0.0)
    if most <= options.max_repetition:
        return None
    return Fault("an answer repeats itself", f"{most:.2f} of its {options.repetition_n}-grams")


def image_faults(names: Iterable[str], root: Path, options: RuleOptions) -> dict[str, Fault]:
    """What is wrong with pictures, by name; those with nothing wrong are not in it.

    Args:
        names: Paths of pictures, as rows have them.
        root: The folder that they are relative to.
        options: Which limits there are.
    """
    distinct = list(dict.fromkeys(names)) if options.images != "ignore" else []
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda name: image_fault(root, name, options), distinct)
        return {name: fault for name, fault in zip(distinct, faults, strict=True) if fault}


def image_fault(root: Path, name: str, options: RuleOptions) -> Fault | None:
    """What is wrong with a picture, if anything; it is opened whole only once its size is right."""
    try:
        image_path(root, name)
    except InputError as error:
        return _refused("image not found", error)
    try:
        fault = size_fault(*image_size(root, name), options)
        if fault is None and options.images == "decode":
            load_image(root, name)
    except InputError as error:
        return _refused("image broken", error)
    return fault and Fault(fault.reason, f"{name}: {fault.detail}"[:_MAX_DETAIL_CHARS])


def _refused(reason: str, error: InputError) -> Fault:
    return Fault(reason, str(error)[:_MAX_DETAIL_CHARS])


def size_fault(height: int, width: int, options: RuleOptions) -> Fault | None:
    """What is wrong with the size of a picture, if anything; a picture on its side is judged alike.

    >>> size_fault(224, 1568, RuleOptions()), size_fault(224, 1569, RuleOptions())
    (None, Fault(reason='image too long and thin', detail='1569 x 224 pixels'))
    """
    size, (shorter, longer) = f"{width} x {height} pixels", sorted((height, width))
    if shorter < options.min_side:
        return Fault("image too small", size)
    if options.max_side is not None and longer > options.max_side:
        return Fault("image too large", size)
    if options.max_aspect_ratio is not None and longer > options.max_aspect_ratio * shorter:
        return Fault("image too long and thin", size)
    return None

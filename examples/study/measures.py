"""What a model's answers say: accuracy by question, what it read off the picture, and what it made up.

A rationale names four digits in turn ("first is 3. second is 5, sum 8. ..."). At the second, third and fourth place
the context predicts the digit that the response itself gave before, plus one. Where the picture shows another digit
and the response says the predicted one, it has read from the context: a hallucination.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from statistics import mean

import numpy as np

from data_builders.records import Row
from mpo.digits import COT, DIRECT, PLACES

_STEP = re.compile(rf"({'|'.join(PLACES)}) is (\d+)(?:, (sum|largest|count) (\d+))?")
_THRESHOLD = re.compile(r"larger than (\d+)")


def pack(bits: Sequence[bool]) -> str:
    """Yes or no for each question, in base 64."""
    return base64.b64encode(np.packbits(np.array(bits, bool)).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The first `count` bits of a packed string, (count,)."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:count].astype(bool)


def read_off(response: str) -> list[int | None]:
    """The digits that a rationale names at the four places; None where it names none.

    >>> read_off("first is 3. second is 5, sum 8. Final answer: 8")
    [3, 5, None, None]
    """
    named = {place: int(digit) for place, digit, _, _ in reversed(_STEP.findall(response))}
    return [named.get(place) for place in PLACES]


def context_places(read: Sequence[int | None], digits: Sequence[int]) -> list[bool]:
    """For each place where picture and context disagree: whether the response follows the context.

    >>> context_places([3, 4, 7, 8], [3, 9, 7, 1])  # 4 follows 3 though the picture shows 9, 8 follows 7 likewise
    [True, False, True]
    """
    followed = []
    for before, now, digit in zip(read, read[1:], digits[1:], strict=False):
        if before is not None and digit != (before + 1) % 10:
            followed.append(now == (before + 1) % 10)
    return followed


def agrees_with_itself(row: Row, read: Sequence[int | None]) -> bool:
    """Whether the final answer follows from the digits that the response itself named."""
    if None in read:
        return False
    if row["source"] == "sum":
        result = sum(read)
    elif row["source"] == "largest":
        result = max(read)
    else:
        result = sum(digit > int(_THRESHOLD.search(row["question"])[1]) for digit in read)
    return row["prediction"] == str(result)


def measure_answers(answers: Iterable[Row]) -> Row:
    """The numbers of one model on one set of questions.

    Args:
        answers: Verdict rows of `mpo eval` with `style` and `digits`, both styles in the same order of questions.

    Returns:
        `cot` and `direct` (accuracy in %), their packed bits by question, and of the rationales: `reading` (digits
        named right, in %), `hallucination` (share of disagreeing places at which the context won, in %),
        `hallucinated` (packed: responses with at least one such place), `consistent` (in %), `characters` (mean).
    """
    rows = list(answers)
    found: Row = {}
    for name, style in (("cot", COT), ("direct", DIRECT)):
        right = [row["verdict"] == "correct" for row in rows if row["style"] == style]
        found |= {name: 100 * mean(right), f"{name}_bits": pack(right), "num": len(right)}
    rationales = [(row, read_off(row["response"] or "")) for row in rows if row["style"] == COT]
    followed = [context_places(read, row["digits"]) for row, read in rationales]
    places = [digit == shown for row, read in rationales for digit, shown in zip(read, row["digits"], strict=True)]
    disagreeing = [place for response in followed for place in response]
    return {
        **found,
        "reading": 100 * mean(places),
        "hallucination": 100 * mean(disagreeing or [False]),
        "hallucinated_bits": pack([any(response) for response in followed]),
        "consistent": 100 * mean(agrees_with_itself(row, read) for row, read in rationales),
        "characters": mean(len(row["response"] or "") for row, _ in rationales),
    }

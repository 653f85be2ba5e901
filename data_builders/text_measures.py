"""How alike two texts are and how much one repeats itself, as pure functions of the texts.

Both count n-grams of words, in time that grows with the length of the texts and not faster. A word is a run of letters
and digits; Chinese and Japanese, which put no space between words, count character by character. Case and punctuation
play no role, so a measure of 1.0 does not mean that two texts are the same.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

_CJK = r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(rf"(?=\w)[{_CJK}]|[^\W{_CJK}]+")
_GRAM = 3  # words in a row that `similarity` compares

Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a text in their order, casefolded; Chinese and Japanese characters one by one.

    >>> words("Final answer: 3.5 Cats!")
    ['final', 'answer', '3', '5', 'cats']
    >>> words("图中有3只猫。")
    ['图', '中', '有', '3', '只', '猫']
    """
    return _WORD.findall(text.casefold())


def similarity(left: str, right: str) -> float:
    """How much two texts share: twice the number of word trigrams that both have, over the number of all.

    A trigram that occurs several times counts as often as it occurs in both (Dice's coefficient of multisets). If a
    text has fewer than three words, both are compared by pairs of words, or by single ones.

    Args:
        left: A text.
        right: Another; the order of the two makes no difference.

    Returns:
        0.0 to 1.0. Texts without any word are 1.0 if they are equal and 0.0 if not.

    >>> similarity("the cat sat on the mat", "The cat sat on a mat.")
    0.5
    >>> similarity("图中有三只猫", "图中有四只猫")
    0.25
    """
    return Profile(left).similarity(Profile(right))


class Profile:
    """A text made ready for comparison with many others: its words and trigrams are counted once.

    Args:
        text: Any text.
    """

    def __init__(self, text: str) -> None:
        self._text, self._words = text, words(text)

    @cached_property
    def _trigrams(self) -> Counter[Gram]:
        return Counter(_grams(self._words, _GRAM))

    def similarity(self, other: "Profile") -> float:
        """As the function `similarity`."""
        size = min(_GRAM, len(self._words), len(other._words))
        if size == 0:
            return float(self._text == other._text)
        left, right = self._counted(size), other._counted(size)
        shared = sum(min(count, right[gram]) for gram, count in left.items() if gram in right)
        return 2 * shared / (left.total() + right.total())

    def _counted(self, size: int) -> Counter[Gram]:
        return self._trigrams if size == _GRAM else Counter(_grams(self._words, size))


def repetition(text: str, n: int = 10) -> float:
    """Which share of a text is said more than once: n-grams that occur again, each time they do, over all n-grams.

    The filter released with InternVL2.5 counts distinct n-grams, so the longer a loop runs the lower it scores; here
    every occurrence counts.

    Args:
        text: A response.
        n: Length of an n-gram, in words or, for Chinese and Japanese, in characters.

    Returns:
        0.0 to 1.0; 0.0 for texts of fewer than n words.

    Raises:
        ValueError: `n` is not positive.

    >>> looped = 50 * "We need to look at the picture again to find the answer. "
    >>> repetition(looped), repetition(" ".join(map(str, range(600))))
    (1.0, 0.0)
    >>> repetition("one two one two three", n=2)
    0.5
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}: it is the number of words of an n-gram.")
    counts = Counter(_grams(words(text), n))
    return sum(count for count in counts.values() if count > 1) / max(1, counts.total())


def _grams(sequence: Sequence[str], size: int) -> "zip[Gram]":
    return zip(*(sequence[start:] for start in range(size)), strict=False)

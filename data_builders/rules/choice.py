"""Answers from a closed set: the letter or the text of an option, yes or no. Part of `data_builders.verify`."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import ascii_uppercase

from data_builders.rules.numbers import same_numbers
from data_builders.rules.text import clean, same_text

# An option's text is no longer than an answer, and they stand at the end of a question.
MAX_OPTION_CHARS = 500
MAX_QUESTION_CHARS = 20_000

Options = Mapping[str, str]

_OPTION = re.compile(r"(?:^|(?<=[\s:,;\"'\[]))(?:[(\[]?([A-J])\s?[.):、\]]|\(([a-j])\))[^\S\n]*", re.MULTILINE)


def lettered(options: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """Options by their letter; those of a list are A, B, C, ..., whether or not their texts say so.

    >>> lettered(["cat", "dog"]), lettered(["A. cat", "B. dog"]), lettered({"a": "cat"})
    ({'A': 'cat', 'B': 'dog'}, {'A': 'cat', 'B': 'dog'}, {'A': 'cat'})
    """
    if not options:
        return {}
    if isinstance(options, Mapping):
        return {str(letter).strip(" ().:").upper(): str(text) for letter, text in options.items()}
    texts = [str(text).strip() for text in options]
    labels = [_OPTION.match(text) for text in texts]
    if [label and (label[1] or label[2]).upper() for label in labels] == list(ascii_uppercase[: len(labels)]):
        texts = [text[label.end() :] for text, label in zip(texts, labels, strict=True)]
    return dict(zip(ascii_uppercase, texts, strict=False))


@lru_cache(256)  # all responses to a question ask for the same
def options_in(question: str) -> Options:
    """The options in a question, {} without; of several rows of letters from A on, the longest and then the last.

    >>> options_in("What is it? A. cat B. dog"), options_in("What is in panel A. of the figure?")
    ({'A': 'cat', 'B': 'dog'}, {})
    """
    question = unicodedata.normalize("NFKC", question[-MAX_QUESTION_CHARS:])
    runs: list[list[re.Match[str]]] = [[]]
    for label in _OPTION.finditer(question):
        letter = (label[1] or label[2]).upper()
        if letter == "A":
            runs.append([label])
        elif runs[-1] and letter == ascii_uppercase[len(runs[-1])]:
            runs[-1].append(label)
    found = [texts for run in runs if len(run) > 1 and all((texts := _texts_after(run, question)).values())]
    return max(reversed(found), key=len) if found else {}


def _texts_after(labels: list[re.Match[str]], question: str) -> dict[str, str]:
    ends = [label.start() for label in labels[1:]] + [len(question)]
    texts = (question[label.end() : end].strip().split("\n")[0] for label, end in zip(labels, ends, strict=True))
    return {letter: text.strip(" ,;[(*\"'])") for letter, text in zip(ascii_uppercase, texts, strict=False)}


_CHOICE_ANSWER = re.compile(r"[(\[]?[A-J][)\]]?$|\([A-Ja-j]\)|[A-J][.):]\s|[A-J](?:\s*(?:,|&|\band\b)\s*[A-J])+$")
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
_SEVERAL = re.compile(r"[(\[]?[A-J][)\]]?(?:(?:\s*(?:[,;、&和与]|\band\b)\s*|\s+)[(\[]?[A-J][)\]]?)+")
_GLUED = re.compile("(?=[A-J]{2})A?B?C?D?E?F?G?H?I?J?")
_NAMED = r"option|choice|letter|figure|image|picture|photo|panel|graph|diagram|chart|shape"
_LABELLED = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]](?!\s*(?:(?:or|and|或|和)\b|[(\[][A-Z][)\]]))|([A-Z])\s?[.):、。]|([A-Z])\s+-\s"
    rf"|(?:{_NAMED}|应?选(?:择|项)?:?|图)\s*\(?([A-Z])(?![a-z])\)?[.:,]?|([A-Z])\s?选项"
    r"|([A-Z])\s+is\s+(?:the\s+)?(?:correct|right|best|true)\b|([A-Z]),?\s+(?=because\b|since\b))\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)

_REFUSED = re.compile(r"(?i:not|neither)\b|.{0,20}\b[A-J]\)? (?:is|are)(?:n't| not| wrong| incorrect| false)\b")


def is_choice(answer: str, options: Options) -> bool:
    """Whether a cleaned answer is the letter or the text of an option, or looks like an option's letter."""
    return bool((options and _read_choice(answer, options)[0]) or _CHOICE_ANSWER.match(answer))


def same_choice(prediction: str, answer: str, options: Options) -> bool:
    """Whether two cleaned texts stand for the same option or options.

    >>> pets = {"A": "cat", "B": "dog"}
    >>> same_choice("B. dog", "(B)", pets), same_choice("dog", "B", pets), same_choice("B. cat", "B", pets)
    (True, True, False)
    """
    letters, text = _read_choice(prediction, options)
    right_letters, right_text = _read_choice(answer, options)
    if letters and right_letters:
        # Without options "J. Smith" and "J. Brown" have the same letter too.
        is_same_text = bool(options) or not text or not right_text or same_text(text, right_text)
        return letters == right_letters and is_same_text
    return bool(text and right_text) and same_text(text, right_text)


def _read_choice(text: str, options: Options) -> tuple[frozenset[str], str]:
    """The letters that a text stands for and the option's text in it; no letter when it contradicts itself."""
    single = _LETTER.fullmatch(text)
    if single and (not options or single[1].upper() in options):
        return frozenset(single[1].upper()), ""
    named = _named_options(text, options)
    if named:
        return named, text
    several = set(re.findall("[A-J]", text.replace("and", ""))) if _SEVERAL.fullmatch(text) else set()
    several |= set(text) if _GLUED.fullmatch(text) else set()
    if several and (not options or several <= options.keys()):
        return frozenset(several), ""
    if _REFUSED.match(text):
        return frozenset(), text
    labelled = _LABELLED.match(text)
    if not labelled:
        letters = set(re.findall(r"\(([A-J])\)", text))
        return frozenset(letters if len(letters) == 1 else ()), text
    *labels, content = labelled.groups()
    letter = frozenset(next(label for label in labels if label).upper())
    named = _named_options(content, options)
    return (frozenset() if named and named != letter else letter), content


def _named_options(text: str, options: Options) -> frozenset[str]:
    """The letter of the one option that has this text, also with its letter before it ("B dog")."""
    texts = {letter: clean(option[:MAX_OPTION_CHARS])[:MAX_OPTION_CHARS] for letter, option in options.items()}
    for is_same in (str.__eq__, _same_value):
        named = {letter for letter, option in texts.items() if is_same(text, option)}
        named |= {letter for letter, option in texts.items() if is_same(text, f"{letter} {option}")}
        if named:
            return frozenset(named if len(named) == 1 else ())
    return frozenset()


def _same_value(left: str, right: str) -> bool:
    if not left:
        return False
    return bool(same_numbers(left, right)) or same_text(left, right) or (is_yes_no(right) and same_yes_no(left, right))


_YES_OR_NO = {"yes", "no", "true", "false", "是", "是的", "对", "正确", "否", "不是", "不", "不对", "错", "错误"}
_YES = {
    "yes", "true", "correct", "right", "y", "yeah", "yep", "yup",
    "是", "是的", "对", "对的", "正确", "有", "可以", "能", "会",
}  # fmt: skip
_NO = {
    "no", "false", "incorrect", "wrong", "n", "nope", "not correct", "not true", "not right",
    "否", "不是", "不是的", "不", "不对", "不正确", "错", "错的", "错误", "没有", "没", "不可以", "不能", "不会",
}  # fmt: skip
_POLARITY = re.compile(
    rf"({'|'.join(sorted(_YES | _NO, key=len, reverse=True))})"
    r"(?:\s*[,;:!。(]|\s*\.(?!\s*\d)|\s+-\s|\s*[—-]{2}|\s*—|\s+(?:it|there|he|she|they|the|this|that|because|since)\b|$)"
)


def is_yes_no(answer: str) -> bool:
    """Whether a cleaned answer is a yes or a no; "right" is not, it may be the opposite of "left"."""
    return answer.casefold() in _YES_OR_NO


def same_yes_no(prediction: str, answer: str) -> bool:
    """Whether two cleaned texts say yes, or both say no.

    >>> same_yes_no("Yes, there is a dog", "yes"), same_yes_no("none", "no"), same_yes_no("yes, no", "yes")
    (True, False, False)
    """
    left, right = _says_yes(prediction), _says_yes(answer)
    return same_text(prediction, answer) if right is None else left == right


def _says_yes(text: str) -> bool | None:
    """None when it says neither, or both."""
    first = _POLARITY.match(text := text.casefold())
    if not first:
        return None
    second = _POLARITY.match(text[first.end() :].strip())
    says_yes = first[1] in _YES
    return None if second and (second[1] in _YES) != says_yes else says_yes

"""Are two short answers the same number, or the same formula? The part of `data_builders.verify` that does arithmetic.

Numbers are read by one expression and compared as exact fractions. Formulas go to math-verify, which has a time limit
for the main thread only: here a formula is refused before parsing when its value could be huge, and the comparison may
take a fixed number of steps. So every answer costs about a second at most, in any thread or process, and the verdict
does not depend on how busy the machine is.
"""

import inspect
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from types import FrameType
from typing import Any

MAX_NUMBER_CHARS = 100
MAX_FORMULA_CHARS = 200
# Calls and returns, of Python and of C: about a second under the hook. Ordinary formulas take fewer than 0.5 million.
MAX_STEPS = 4_000_000
# A backstop for steps that are slow themselves; time of this thread on a core, so waiting does not count.
MAX_CPU_SECONDS = 1.5
# SymPy may look for prime factors of any number it meets.
MAX_RESULT_DIGITS = 1_000
YEARS = range(1000, 2101)

_COUNTED = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_COUNTED)}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNIT_NAMES = {
    "percent": "%", "percentage": "%", "pct": "%", "dollar": "$", "usd": "$", "us$": "$", "euro": "€", "eur": "€",
    "yen": "¥", "gbp": "£", "degree": "°", "deg": "°", "meter": "m", "metre": "m", "centimeter": "cm",
    "centimetre": "cm", "kilometer": "km", "kilometre": "km", "millimeter": "mm", "millimetre": "mm", "kilogram": "kg",
    "gram": "g", "liter": "l", "litre": "l", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h",
    "inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "米": "m", "厘米": "cm", "元": "¥", "度": "°",
}  # fmt: skip
# A single letter is a unit only where it is not more likely a variable.
_UNIT_LETTERS = set("mgslhNJWVAKCFLΩ")
_NOT_UNITS = {
    "pi", "sqrt", "half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth",
    "fifths", "squared", "cubed", "and", "or", "to", "of", "not", "is", "than", "less", "more", "least", "most",
    "plus", "minus", "times", "over",
    *NUMBER_WORDS,
}  # fmt: skip

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?![\d/])(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_FRACTION = r"\\[dt]?frac\s*\{\s*(?P<{0}n>\d+)\s*\}\s*\{\s*(?P<{0}d>\d+)\s*\}"
_QUANTITY = re.compile(
    r"(?:(?P<name>[A-Za-z][\w()]{0,9})\s*=\s*)?(?P<minus>[+-]?)\s*(?P<currency>US\$|[$€£¥₹₩])?\s*(?P<minus2>-?)"
    rf"(?:{_FRACTION.replace('{0}', 'l')}"
    rf"|(?P<value>{_DIGITS})(?:[eE](?P<e>[+-]?\d{{1,3}})(?!\d)"
    r"|\s*(?:×|x|\*|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<ten>[+-]?\d{1,3})\}?(?!\d)"
    rf"|\s+(?P<mn>\d+)/(?P<md>\d+)|\s*{_FRACTION.replace('{0}', 'k')}|\s*/\s*(?P<over>\d+(?:\.\d+)?))?)"
    r"\s*(?P<unit>(?:[%°$€£¥₹₩Ωµ]|[^\W\d_])[%°$€£¥₹₩µ·./ \w]{0,40}?(?:\^?\{?-?[23]\}?)?)?"
)
_NUMBER_WORD = re.compile(rf"^(?:(minus|negative)\s+)?({'|'.join(NUMBER_WORDS)})\b(?!-)", re.IGNORECASE)
_LEAD_IN = re.compile(
    r"^(?:(?:about|approximately|approx\.?|around|roughly|exactly|there (?:is|are)|it is|it's|is|are)\s+|[≈~=]\s*)+",
    re.I,
)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Quantity:
    """A number as it was written.

    Attributes:
        value: The number; of "50%", 50.
        unit: In one spelling ("cm", "$", "%"), "" without.
        name: The left side of an assignment ("x" of "x = 5"), "" without.
        is_year: Four plain digits from 1000 to 2100.
    """

    value: Fraction
    unit: str = ""
    name: str = ""
    is_year: bool = False


def same_numbers(prediction: str, answer: str, *, tolerance: Fraction | None = None) -> bool | None:
    """Whether both are the same number, or the same list of numbers in the same order.

    A unit, a currency or a percent sign that only one side has is ignored; of two different ones the answer is no. 50%
    is 0.5 as well as 50. A comma that could separate thousands or items may do either.

    Args:
        prediction: Short text in one spelling, as `data_builders.verify` cleans it.
        answer: The same for the known answer.
        tolerance: Relative to the answer, years excepted; None asks for exact equality.

    Returns:
        None when one of them is not a number or a list of numbers.

    >>> same_numbers("1,234 km", "1234"), same_numbers("5 cm", "5 m"), same_numbers("1, 2", "1,2")
    (True, False, True)
    """
    left, right = _readings(prediction), _readings(answer)
    if not left or not right:
        return None
    return any(
        len(one) == len(other)
        and {bracket, other_bracket} != {"(", "["}
        and all(_same_quantity(p, a, tolerance) for p, a in zip(one, other, strict=True))
        for bracket, one in left
        for other_bracket, other in right
    )


def is_number(text: str) -> bool:
    """Whether a short text is a number, or a list of numbers."""
    return bool(_readings(text))


def read_quantity(text: str) -> Quantity | None:
    """The one number that a short text consists of, None when there is more or less to it.

    >>> read_quantity("-1 1/2 hours")
    Quantity(value=Fraction(-3, 2), unit='h', name='', is_year=False)
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    text = _LEAD_IN.sub("", re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text)).strip()
    text = _NUMBER_WORD.sub(_word_to_digits, text)
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    scale, unit = _read_unit(match["currency"] or "", match["unit"] or "")
    value = _read_value(match)
    if unit is None or value is None:
        return None
    is_year = bool(re.fullmatch(r"\d{4}", text)) and int(text) in YEARS
    return Quantity(value * scale, unit, match["name"] or "", is_year)


def _word_to_digits(match: re.Match[str]) -> str:
    return ("-" if match[1] else "") + NUMBER_WORDS[match[2].lower()]


def _read_value(match: re.Match[str]) -> Fraction | None:
    part = {key: Fraction(text) for key in ("ln", "ld", "mn", "md", "kn", "kd", "over") if (text := match[key])}
    if 0 in (part.get("ld"), part.get("md"), part.get("kd"), part.get("over")):
        return None
    if "ln" in part:
        value = part["ln"] / part["ld"]
    else:
        value = Fraction(match["value"].replace(",", "").replace(" ", "").removesuffix("."))
        value *= Fraction(10) ** int(match["e"] or match["ten"] or 0)
        value /= part.get("over", 1)
        value += part.get("mn", 0) / part.get("md", Fraction(1)) + part.get("kn", 0) / part.get("kd", Fraction(1))
    return -value if (match["minus"] == "-") != (match["minus2"] == "-") else value


def _read_unit(currency: str, text: str) -> tuple[int, str | None]:
    """The factor in a unit ("million" of "million dollars") and its one spelling; None when it cannot be a unit."""
    words = text.replace(". ", " ").strip(" .").split()
    scale = _SCALES.get(words[0].lower().removesuffix("s"), 1) if words else 1
    if scale > 1:
        words = words[1:]
    if len(words) > 3 or any(word.lower() in _NOT_UNITS for word in words):
        return scale, None
    if len(words) == 1 and re.fullmatch("[a-zA-Z\u0370-\u03ff]", words[0]) and words[0] not in _UNIT_LETTERS:
        return scale, None
    names = [_unit_name(word) for word in words]
    if len(names) > 1 and names[0] in ("square", "sq", "cubic"):
        names = [names[1] + ("3" if names[0] == "cubic" else "2"), *names[2:]]
    return scale, " ".join(names) or _unit_name(currency)


def _unit_name(word: str) -> str:
    name = re.sub(r"[\^{}]", "", word.lower())
    singular = name.removesuffix("s") if len(name) > 3 else name
    return _UNIT_NAMES.get(name) or _UNIT_NAMES.get(singular, singular)


def _readings(text: str) -> list[tuple[str, tuple[Quantity, ...]]]:
    """All ways to read a text as numbers, each with the bracket around it: as one, and as a list at its commas."""
    bracket = ""
    if text and _BRACKETS.get(text[0]) == text[-1] and text[0] not in text[1:]:
        bracket, text = text[0], text[1:-1].strip()
    found = [(bracket, (one,))] if (one := read_quantity(text)) else []
    if len(text) > 10 * MAX_NUMBER_CHARS or not re.search(r"[,;、]|\band\b", text):
        return found
    items = [read_quantity(item.strip()) for item in re.split(r"\s*[,;、]\s*(?:and\s+)?|\s+and\s+", text)]
    several = tuple(item for item in items if item)
    return [*found, (bracket, several)] if len(several) == len(items) else found


def _same_quantity(left: Quantity, right: Quantity, tolerance: Fraction | None) -> bool:
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if left.name and right.name and left.name != right.name:
        return False
    if tolerance is None or (left.is_year and right.is_year):
        tolerance = Fraction(0)
    lefts = [left.value]
    rights = [right.value]
    if left.unit != right.unit:
        lefts += [left.value / 100] if left.unit == "%" else []
        rights += [right.value / 100] if right.unit == "%" else []
    return any(abs(one - other) <= tolerance * abs(other) for one in lefts for other in rights)


_SYMBOLS = str.maketrans(
    {"π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "÷": r"\div ", "≤": r"\leq ", "≥": r"\geq ", "∪": r"\cup ",
     "∩": r"\cap ", "∈": r"\in ", "·": r"\cdot ", "±": r"\pm ", "≠": r"\neq ", "°": r"^\circ "}
)  # fmt: skip
_COMMANDS = {
    "frac", "dfrac", "tfrac", "sqrt", "pi", "cdot", "times", "div", "pm", "mp", "infty", "left", "right", "sin",
    "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "ln", "lg", "cup", "cap", "in",
    "le", "ge", "leq", "geq", "lt", "gt", "ne", "neq", "circ", "text", "mathrm", "mathbf", "mathbb", "theta",
    "alpha", "beta", "gamma", "delta", "lambda", "mu", "phi", "varphi", "omega", "sigma", "rho", "emptyset",
    "varnothing", "quad", "begin", "end", "pmatrix", "bmatrix", "to", "rightarrow", "degree", "angle",
    "triangle", "displaystyle", "operatorname",
}  # fmt: skip
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "sqrt", "arcsin", "arccos", "arctan", "pmatrix", "bmatrix",
}  # fmt: skip


def looks_like_formula(text: str) -> bool:
    r"""Whether a short text is mathematics rather than words, a date, a range or a model number.

    >>> [looks_like_formula(text) for text in (r"\frac{x}{2}", "2x+1", "3-5", "10/12/2024", "t-shirt")]
    [True, True, False, False, False]
    """
    if re.search(r"\\[a-zA-Z{(]|[\^√π∞≤≥∪]", text):
        return True
    if has_words(text):
        return False
    if re.search(r"[=<>]", text) or re.fullmatch(r"[(\[][^\[\]]*,[^\[\]]*[)\]]", text):
        return True
    return bool(re.search(r"\d", text) and re.search(r"[+*]|[a-z)]\s?[-/]|[-/]\s?[a-z(]|\d[a-z](?![a-z])", text))


def same_formula(prediction: str, answer: str) -> bool:
    r"""Whether two formulas are equal: as written, as numbers, or to math-verify.

    Texts with words in them are only compared as written: as products of letters, "cat" would be "act". Whatever could
    have a huge value (towers of powers, factorials) or is not a plain formula is not sent to math-verify.

    Args:
        prediction: Short text in one spelling.
        answer: The same for the known answer.

    >>> same_formula("2^{10}", "1024"), same_formula("9^{9^{9}}", "1"), same_formula(r"\dfrac12 x", r"\frac{1}{2}x")
    (True, False, True)
    """
    left, right = _tidy(prediction), _tidy(answer)
    if "".join(left.split()) == "".join(right.split()):
        return True
    as_numbers = same_numbers(prediction, answer)
    if as_numbers or (as_numbers is False and "," not in prediction + answer):
        return bool(as_numbers)
    if not (_is_tame(left) and _is_tame(right) and _has_tame_logarithms(left, right)):
        return False
    parse_and_compare = _math_verify()
    return _within_steps(lambda: parse_and_compare(left, right))


def _tidy(text: str) -> str:
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text.translate(_SYMBOLS))
    text = re.sub(r"_(\d)(?!\d)", r"_{\1}", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;:]", "", text)
    return " ".join(re.sub(r"(?<!\\)\\ ", " ", text).replace("**", "^").split())


def has_words(text: str) -> bool:
    """Whether a short text has words of three letters or more, names of functions and LaTeX commands aside."""
    words = re.findall(r"[^\W\d_]{3,}", re.sub(r"\\[a-zA-Z]+", " ", text))
    return any(word not in _FUNCTIONS for word in words)


def _is_tame(text: str) -> bool:
    """Whether the work to parse and evaluate a formula is bounded."""
    if not text or len(text) > MAX_FORMULA_CHARS or "!" in text or re.search(r"\d{31}|\d\s+\d|\[\d{3}", text):
        return False
    if has_words(text) or not set(re.findall(r"\\([a-zA-Z]+)", text)) <= _COMMANDS:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return depth == 0 and deepest <= 8 and _max_digits(text) <= MAX_RESULT_DIGITS


def _has_tame_logarithms(left: str, right: str) -> bool:
    """SymPy rewrites k log(b) as log(b^k), so with a logarithm any value may become an exponent of any other.

    b^k has fewer than b k / 5 digits.
    """
    if not re.search(r"log|ln|lg", left + right):
        return True
    return math.prod(map(_max_value, (left, right))) <= 5 * MAX_RESULT_DIGITS


def _max_digits(text: str) -> float:
    """An upper bound for the digits of any integer in the value of a formula; infinite for towers of powers."""
    powers, _ = _split_powers(text)
    of_groups = re.search(r"[)\]}]\s*\^", text)
    num_digits = 1 + len(re.findall(r"\d", text))
    return num_digits * (math.prod(powers) if of_groups else max(powers))


def _max_value(text: str) -> float:
    """An upper bound for the integers in the value of a formula: a + b and a b are at most max(a, 2) max(b, 2)."""
    powers, rest = _split_powers(text)
    digits = sum(math.log10(max(int(number), 2)) for number in re.findall(r"\d+", rest)) * math.prod(powers)
    return 10**digits if digits < 300 else math.inf


def _split_powers(text: str) -> tuple[list[float], str]:
    """Upper bounds for the exponents in a formula, beside a 1, and the formula without them; infinity for a tower."""
    powers: list[float] = [1]
    rest = ""
    while "^" in text:
        base, _, text = text.partition("^")
        text = text.lstrip()
        end = _group_end(text) if text[:1] in _BRACKETS else re.match(r"[+-]?(?:[\d.]+|\\?[a-zA-Z]+)?", text).end()
        exponent, text = text[:end], text[end:]
        if "^" in exponent or text.lstrip().startswith("^") or len(re.sub(r"\D", "", exponent)) > 4:
            return [math.inf], ""
        powers.append(math.prod(int(number) or 1 for number in re.findall(r"\d+", exponent)))
        rest += base + " "
    return powers, rest + text


def _group_end(text: str) -> int:
    depth = 0
    for end, character in enumerate(text, 1):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return end
    return len(text)


@cache
def _math_verify() -> Callable[[str, str], bool]:
    """A function that parses and compares two formulas; the import takes half a second, so it waits for a formula."""
    # With its time limits off it warns on standard error that the caller must keep the time; `_within_steps` does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    formulas = [LatexExtractionConfig()]

    def compare(prediction: str, answer: str) -> bool:
        gold, target = (
            parse(f"${text}$", formulas, fallback_mode="no_fallback", parsing_timeout=None)
            for text in (answer, prediction)
        )
        return verify(gold, target, timeout_seconds=None, allow_set_relation_comp=True)

    compare(
        "(x+1)^2", r"x^2+\frac{4x}{2}+1"
    )  # Its parser builds tables at first use, which are not the answer's cost.
    return compare


class _OutOfSteps(BaseException):
    """Not an `Exception`: math-verify and SymPy catch those."""


def _within_steps(function: Callable[[], bool]) -> bool:
    """The result of a function, False when it takes more than `MAX_STEPS` or `MAX_CPU_SECONDS`.

    A profile hook belongs to one thread, so this works where a signal cannot.
    """
    steps = 0
    deadline = time.thread_time() + MAX_CPU_SECONDS

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal steps
        steps += 1
        is_over = steps > MAX_STEPS or (steps % 16 == 0 and time.thread_time() > deadline)
        if is_over and event == "call" and _can_be_stopped(frame):
            raise _OutOfSteps

    before = sys.getprofile()
    sys.setprofile(count)
    with suppress(_OutOfSteps):
        try:
            return function()
        finally:
            sys.setprofile(before)
    return False


def _can_be_stopped(frame: FrameType) -> bool:
    """Whether an exception raised here reaches us; Python removes a hook that raises, so there is one try.

    Python ignores exceptions in a generator or a callback that is being cleaned up, and mpmath has bare `except:`.
    """
    is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR
    return not is_generator and frame.f_globals.get("__name__", "").startswith(("sympy.", "antlr4.", "latex2sympy2"))

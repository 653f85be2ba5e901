"""Are two short answers the same formula? The part of `data_builders.verify` that does mathematics.

Formulas go to math-verify, which has a time limit for the main thread only: here a formula is refused before parsing
when its value could be huge, and the comparison may take a fixed number of steps. So every answer costs about a second
at most, in any thread or process, and the verdict does not depend on how busy the machine is.
"""

import inspect
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from types import FrameType
from typing import Any

from data_builders.rules.numbers import same_numbers

MAX_FORMULA_CHARS = 200
# Calls and returns, of Python and of C: under a second with the hook. Ordinary formulas take fewer than 0.5 million.
MAX_STEPS = 3_000_000
# A backstop for steps that are slow themselves; time of this thread on a core, so waiting does not count.
MAX_CPU_SECONDS = 1.0
# SymPy may look for prime factors of any number it meets.
MAX_RESULT_DIGITS = 1_000

_BRACKETS = {"(", "[", "{"}
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
    if has_words(text) or re.fullmatch(r"(?:the )?\d+'?s", text):
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
    if as_numbers or (as_numbers is False and "," not in prediction + answer and sorted(left) != sorted(right)):
        return bool(as_numbers)  # "2ab" and "2ba" are numbers with units to look at, and equal
    if not (_is_tame(left) and _is_tame(right) and _has_tame_logarithms(left, right)):
        return False
    return _equal_to_math_verify(left, right)


@lru_cache(4096)  # responses to one question repeat the same few answers, and this takes milliseconds
def _equal_to_math_verify(left: str, right: str) -> bool:
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
            sys.setprofile(before if callable(before) else None)  # that of cProfile is no function: it ends here
    return False


def _can_be_stopped(frame: FrameType) -> bool:
    """Whether an exception raised here reaches us; Python removes a hook that raises, so there is one try.

    Python ignores exceptions in a generator or a callback that is being cleaned up, and mpmath has bare `except:`.
    """
    is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR
    return not is_generator and frame.f_globals.get("__name__", "").startswith(("sympy.", "antlr4.", "latex2sympy2"))

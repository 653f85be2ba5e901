"""Are two short answers the same number, or the same list of numbers? Part of `data_builders.verify`.

A number is read by one expression, with its unit, and compared as an exact fraction; numbers in words, English or
Chinese, are put into digits first. Nothing here calls for arithmetic on more than a hundred digits.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_NUMBER_CHARS = 100
YEARS = range(1000, 2101)

_COUNTED = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: value for value, word in enumerate(_COUNTED)} | {t: 20 + 10 * i for i, t in enumerate(_TENS)}
NUMBER_WORDS = {word: str(value) for word, value in _VALUES.items()}
_POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ONES, _SMALL_WORDS, _POWER_WORDS = ("|".join(words) for words in (_COUNTED[1:10], _COUNTED, _POWERS))
_SMALL = rf"(?:(?:{'|'.join(_TENS)})(?:[- ](?:{_ONES}))?|{_SMALL_WORDS})\b"
_GROUP = rf"{_SMALL}(?: hundred\b(?:(?: and)? {_SMALL})?)?"
_SPELLED = re.compile(rf"{_GROUP}(?:,? (?:{_POWER_WORDS})\b(?:,? (?:and )?{_GROUP})?)*", re.IGNORECASE)
_SCALES = {"dozen": 12, "hundred": 100, **_POWERS}
_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "mln": 10**6, "B": 10**9, "bn": 10**9}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}  # fmt: skip
_UNIT_NAMES = {
    "percent": "%", "percentage": "%", "pct": "%", "dollar": "$", "usd": "$", "us$": "$", "euro": "€", "eur": "€",
    "yen": "¥", "rmb": "¥", "cny": "¥", "gbp": "£", "rupee": "₹", "inr": "₹", "rs": "₹", "degree": "°", "deg": "°",
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "kilogram": "kg", "gram": "g", "liter": "l", "litre": "l", "second": "s",
    "sec": "s", "minute": "min", "hour": "h", "hr": "h", "yr": "year", "inche": "in", "inch": "in", "feet": "ft",
    "foot": "ft", "kgs": "kg", "cms": "cm", "kms": "km", "hrs": "h", "lbs": "lb", "yrs": "year", "ozs": "oz",
    "米": "m", "厘米": "cm", "毫米": "mm", "千米": "km", "公里": "km", "克": "g", "千克": "kg", "公斤": "kg",
    "秒": "s", "分钟": "min", "小时": "h", "元": "¥", "度": "°", "年": "", "岁": "year",
}  # fmt: skip
# A single letter is a unit only where it is not more likely a variable.
_UNIT_LETTERS = set("mgslhNJWVAKCFLΩ")
_NOT_UNITS = {
    "pi", "sqrt", "squared", "cubed", "and", "or", "to", "of", "not", "is", "than", "less", "more", "least", "most",
    "plus", "minus", "times", "over", "under", "above", "below", *_PARTS, *(f"{part}s" for part in _PARTS), *_VALUES,
}  # fmt: skip

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?![\d/])(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_FRACTION = r"\\[dt]?frac\s*\{\s*(?P<{0}n>\d+)\s*\}\s*\{\s*(?P<{0}d>\d+)\s*\}"
_QUANTITY = re.compile(
    r"(?:(?P<name>[A-Za-z][\w()]{0,9})\s*=\s*|(?P<label>[A-Za-z][A-Za-z ]{0,30}):\s*)?(?P<minus>[+-]?)\s*"
    r"(?P<currency>US\$|USD|EUR|GBP|INR|RMB|Rs\.?|[$€£¥₹₩])?\s*(?P<minus2>-?)"
    rf"(?:{_FRACTION.replace('{0}', 'l')}"
    rf"|(?P<value>{_DIGITS})(?:[eE](?P<e>[+-]?\d{{1,3}})(?!\d)"
    r"|\s*(?:×|x|\*|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<ten>[+-]?\d{1,3})\}?(?!\d)"
    rf"|\s+(?P<mn>\d+)/(?P<md>\d+)|\s*{_FRACTION.replace('{0}', 'k')}|\s*/\s*(?P<over>\d+(?:\.\d+)?))?)"
    r"\s*(?P<unit>(?:[%°$€£¥₹₩Ωµ]|[^\W\d_])[%°$€£¥₹₩µ·./ \w]{0,40}?(?:\^?\{?-?[23]\}?)?)?"
)
_LEAD_IN = re.compile(
    r"^(?:(?:about|approximately|approx\.?|around|roughly|exactly|there (?:is|are)|it is|it's|is|are)\s+|[≈~=]\s*"
    r"|(?:in\s+)?(?:the\s+)?year\s+(?=\d)|in\s+(?=\d{4}$))+",
    re.IGNORECASE,
)
_DEGREE = re.compile(r"\^?\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_SEPARATOR = re.compile(r"\s*[,;、]\s*(?:and\s+)?|\s+and\s+|(?<=[A-Za-z%°.])\s+(?=\d)")  # "5 ft 3 in" is two as well


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
        prediction: Short text in one spelling, as `data_builders.rules.text` cleans it.
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
    >>> read_quantity("one hundred and five").value, read_quantity("1.5k").value
    (Fraction(105, 1), Fraction(1500, 1))
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    text = _LEAD_IN.sub("", _DEGREE.sub("°", text).replace("per cent", "percent")).strip()
    text = digits_for_words(text)
    suffix = re.search(r"(?<=\d)(?:[kKMB]|mln|[mb]n)$", text)
    match = _QUANTITY.fullmatch(text[: suffix.start()] if suffix else text)
    if match is None or re.fullmatch(r"[12]\d{3}'?s", text) or _is_no_label(match["label"] or ""):
        return None
    scale, unit = _read_unit(match["currency"] or "", match["unit"] or "")
    value = _read_value(match)
    if unit is None or value is None:
        return None
    scale *= _SUFFIXES[suffix[0]] if suffix else 1
    is_year = bool(re.fullmatch(r"\d{4}年?", text)) and int(text[:4]) in YEARS
    return Quantity(value * scale, unit, match["name"] or "", is_year)


def _is_no_label(label: str) -> bool:
    return not _NOT_UNITS.isdisjoint(label.lower().split())


def digits_for_words(text: str) -> str:
    """A short text with the number in words at its beginning, if there is one, in digits.

    >>> [digits_for_words(text) for text in ("twenty-one cats", "two thirds", "half an hour", "三只", "one-way")]
    ['21 cats', '2/3', '1/2 hour', '3只', 'one-way']
    """
    if not text or text[0].isdigit():
        return text
    if "\u3007" <= text[0] <= "\u9fff":
        return _digits_for_chinese(text)
    sign = _MINUS.match(text)
    rest = text[sign.end() :] if sign else text
    if part := _PART.match(rest):
        digits, rest = f"1/{_PARTS[(part[1] or part[2]).lower()]}", rest[part.end() :]
    else:
        rest = _ARTICLE.sub("one ", rest)
        spelled = _SPELLED.match(rest)
        if not spelled:
            return text
        digits, rest = _with_part(_spelled_value(spelled[0]), rest[spelled.end() :])
    return text if rest.startswith("-") else ("-" if sign else "") + digits + rest


_MINUS = re.compile(r"(?:minus|negative)\s+", re.IGNORECASE)
_ARTICLE = re.compile(rf"an?\s+(?=(?:{'|'.join(_SCALES)})\b)", re.IGNORECASE)
_PART = re.compile(r"(?:an?\s+(half|third|quarter)|(half)(?:\s+an?)?)(?=\s|$)", re.IGNORECASE)
_PARTS_AFTER = re.compile(rf"[ -]({'|'.join(_PARTS)})(s?)(?!\w)", re.IGNORECASE)
_MIXED = re.compile(r" and (?:(?:an?|one) (half|third|quarter)|(three) (quarter)s)(?!\w)", re.IGNORECASE)


def _with_part(value: int, rest: str) -> tuple[str, str]:
    """A number with the part named after it ("two thirds", "one and a half"), and what stands behind."""
    part, mixed = _PARTS_AFTER.match(rest), _MIXED.match(rest)
    if part and (value > 1) == bool(part[2] or part[1].lower() == "halves"):
        return f"{value}/{_PARTS[part[1].lower()]}", rest[part.end() :]
    if mixed:
        return f"{value} {3 if mixed[2] else 1}/{_PARTS[(mixed[1] or mixed[3]).lower()]}", rest[mixed.end() :]
    return str(value), rest


def _spelled_value(text: str) -> int:
    total = group = 0
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _POWERS:
            total, group = total + group * _POWERS[word], 0
        else:
            group = group * 100 if word == "hundred" else group + _VALUES.get(word, 0)
    return total + group


_CHINESE_DIGITS = {"零": 0, "〇": 0, "两": 2} | {digit: 1 + i for i, digit in enumerate("一二三四五六七八九")}
_CHINESE_TENS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_POWERS = {"万": 10**4, "亿": 10**8}
_CLASSIFIERS = "个只条张本辆位名头匹棵朵件块颗支根座栋层间家人次种天"
# Only before what counts or measures: "三角形" is no three, "千克" is no thousand.
_CHINESE = re.compile(
    rf"(百分之)?([{''.join(_CHINESE_DIGITS)}十百千万亿]{{1,12}})"
    rf"((?:[{_CLASSIFIERS}]|年|岁|元|度|米|厘米|毫米|千米|公里|克|千克|公斤|秒|分钟|小时)?)"
)


def _digits_for_chinese(text: str) -> str:
    found = _CHINESE.fullmatch(text)
    if not found or (found[2][0] not in _CHINESE_DIGITS and found[2][0] != "十"):
        return text
    return f"{_chinese_value(found[2])}{'%' if found[1] else ''}{found[3]}"


def _chinese_value(text: str) -> int:
    """Of "十二" 12, of "三百零五" 305, of "二〇一二" 2012."""
    if set(text) <= _CHINESE_DIGITS.keys():
        return int("".join(str(_CHINESE_DIGITS[digit]) for digit in text))
    total = group = digit = 0
    for character in text:
        if character in _CHINESE_POWERS:
            total, group, digit = (total + group + digit) * _CHINESE_POWERS[character], 0, 0
        elif character in _CHINESE_TENS:
            group, digit = group + (digit or 1) * _CHINESE_TENS[character], 0
        else:
            digit = _CHINESE_DIGITS[character]
    return total + group + digit


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
    scale = 1
    while text[:1] in _CHINESE_POWERS:
        scale, text = scale * _CHINESE_POWERS[text[0]], text[1:]
    words = text.replace(". ", " ").strip(" .").split()
    if words and (word := words[0].lower().removesuffix("s")) in _SCALES:
        scale, words = scale * _SCALES[word], words[1:]
    if len(words) > 3 or any(word.lower() in _NOT_UNITS or word[0].isdigit() for word in words):
        return scale, None
    if len(words) == 1 and re.fullmatch("[a-zA-Z\u0370-\u03ff]", words[0]) and words[0] not in _UNIT_LETTERS:
        return scale, None
    names = [_unit_name(word) for word in words]
    if len(names) > 1 and names[0] in ("square", "sq", "cubic"):
        names = [names[1] + ("3" if names[0] == "cubic" else "2"), *names[2:]]
    return scale, " ".join(names).strip() or _unit_name(currency.rstrip("."))


def _unit_name(word: str) -> str:
    name = re.sub(r"[\^{}]", "", word.lower())
    singular = name.removesuffix("s") if len(name) > 3 else name
    return "" if name and name in _CLASSIFIERS else _UNIT_NAMES.get(name, _UNIT_NAMES.get(singular, singular))


# Responses to one question repeat the same few answers.
@lru_cache(4096)
def _readings(text: str) -> tuple[tuple[str, tuple[Quantity, ...]], ...]:
    """All ways to read a text as numbers, each with the bracket around it: as one, and as a list at its commas."""
    bracket = ""
    if text and _BRACKETS.get(text[0]) == text[-1] and text[0] not in text[1:]:
        bracket, text = text[0], text[1:-1].strip()
    spellings = (text, f"{text[:-1]} K") if re.search(r"\dK$", text) else (text,)  # thousands, or kelvins
    found = tuple((bracket, (one,)) for spelling in spellings if (one := read_quantity(spelling)))
    if len(text) > 10 * MAX_NUMBER_CHARS or not _SEPARATOR.search(text):
        return found
    items = [read_quantity(item.strip()) for item in _SEPARATOR.split(text)]
    several = tuple(item for item in items if item)
    return (*found, (bracket, several)) if len(several) == len(items) else found


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

"""Prompt styles as Jinja files: what is asked of a model, around the question of a row.

A style is named by its file (`final_answer`, `boxed`, `think`, `direct`, `plain`); a path to a user's own `.jinja`
file works too. A file beside it whose name ends in `_zh` holds the Chinese wording. The only variable is `question`;
the filter `without_instructions` takes off what the question's source said about how to answer. Rows carry the
style's `version`, so that a changed wording is seen in the data.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from data_builders.prompts.instructions import strip_instructions
from data_builders.records import InputError

Language = Literal["auto", "en", "zh"]

STYLES = ("boxed", "direct", "final_answer", "plain", "think")

_FOLDER = Path(__file__).parent
_CHINESE = "_zh"
_JINJA = SandboxedEnvironment(autoescape=False, undefined=StrictUndefined)
_JINJA.filters["without_instructions"] = strip_instructions

_OPTIONS = re.compile(
    r"^\s*[(（]?[A-J](?:[.)）:：、]|．).*", re.MULTILINE
)  # of any language, whatever the question's is
_COMMAND = re.compile(r"\\[A-Za-z]+")  # of TeX
_WORD = re.compile(r"[A-Za-z]*[a-z]{2}[A-Za-z]*")  # not the AB and x of a Chinese geometry question
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_KANA = re.compile(r"[\u3041-\u30ff]")


@dataclass(frozen=True)
class PromptStyle:
    """One way to ask.

    Attributes:
        name: The file's name without its ending.
        version: The first 8 hex digits of the template's SHA-256.
        template: The Jinja text.
        chinese: The style that Chinese questions are asked in instead; None asks all of them in this one.
    """

    name: str
    version: str
    template: str
    chinese: "PromptStyle | None" = None

    def render(self, question: str) -> str:
        """The text that the model is given, images aside, in the words of this style."""
        return _compiled(self.template).render(question=question).strip()

    def for_question(self, question: str) -> "PromptStyle":
        """The style that this question is asked in: this one, or its Chinese wording."""
        return self.chinese if self.chinese and is_chinese(question) else self

    @property
    def id(self) -> str:
        """What rows say about how they were asked: the name and the version, as in `direct@0123abcd`."""
        return f"{self.name}@{self.version}"

    @property
    def ids(self) -> list[str]:
        """Every `id` that a row asked in this style may carry."""
        return [self.id, *(self.chinese.ids if self.chinese else [])]


@cache
def _compiled(template: str) -> Template:
    return _JINJA.from_string(template)


def is_chinese(question: str) -> bool:
    r"""Is this a question in Chinese? Formulas, options and names in Latin letters do not decide.

    >>> is_chinese("如图，AB=AC，求∠A"), is_chinese("What does 你好 mean?"), is_chinese("これは何ですか")
    (True, False, False)
    """
    asked = strip_instructions(question)
    text = _COMMAND.sub("", _OPTIONS.sub("", asked))
    text = text if re.search(r"\w", text) else asked
    num_han = len(_HAN.findall(text))
    num_latin = sum(
        map(len, _WORD.findall(text))
    )  # letters; a Chinese word has about two characters, an English one 5
    return 2 * num_han > max(num_latin, 2 * len(_KANA.findall(text)))


@cache
def prompt_style(name: str, language: Language = "auto") -> PromptStyle:
    """The style of that name, or of a `.jinja` file.

    Args:
        name: One of the styles there are, or a path that ends in `.jinja`.
        language: `en` asks all questions in the words of that file, `zh` all of them in its Chinese words, `auto` each
            one in the language it has (see `PromptStyle.for_question`).

    Raises:
        InputError: There is no such style (lists those there are), or no Chinese wording of it for `zh`, or its
            template cannot be rendered.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if not path.is_file() or (not name.endswith(".jinja") and "/" in name):
        known = ", ".join(STYLES)
        raise InputError(f"there is no prompt style {name!r}: choose one of {known}, or give a path to a .jinja file.")
    translated = path.with_stem(path.stem + _CHINESE)
    if language == "en" or name == "plain":  # `plain` has no words of its own
        return _read(path)
    if translated.is_file():
        return _read(translated) if language == "zh" else _read(path, _read(translated))
    if language == "zh" and not path.stem.endswith(_CHINESE):
        raise InputError(f"the prompt style {name!r} has no Chinese wording: write one to {translated}.")
    return _read(path)


def _read(path: Path, chinese: PromptStyle | None = None) -> PromptStyle:
    try:
        template = path.read_text(encoding="utf-8")
        version = hashlib.sha256(template.encode()).hexdigest()[:8]
        style = PromptStyle(path.stem, version, template, chinese)
        style.render("?")
    except (TemplateError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"the prompt style {path} cannot be rendered ({error}): it must be a Jinja template in UTF-8 whose only "
            "variable is `question`."
        ) from error
    return style

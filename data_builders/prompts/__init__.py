"""Prompt styles as Jinja files: what is asked of a model, around the question of a row.

A style is named by its file (`final_answer`, `boxed`, `direct`, `plain`); a path to a user's own `.jinja` file works
too. The only variable is `question`. Rows carry the style's `version`, so that a changed wording is seen in the data.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from data_builders.records import InputError

_FOLDER = Path(__file__).parent
_JINJA = SandboxedEnvironment(autoescape=False, undefined=StrictUndefined)


@dataclass(frozen=True)
class PromptStyle:
    """One way to ask.

    Attributes:
        name: The file's name without its ending.
        version: The first 8 hex digits of the template's SHA-256.
        template: The Jinja text.
    """

    name: str
    version: str
    template: str

    def render(self, question: str) -> str:
        """The text that the model is given, images aside."""
        return _JINJA.from_string(self.template).render(question=question).strip()


@cache
def prompt_style(name: str) -> PromptStyle:
    """The style of that name, or of a `.jinja` file.

    Raises:
        InputError: There is no such style (lists those there are), or its template cannot be rendered.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if not path.is_file() or (not name.endswith(".jinja") and "/" in name):
        known = ", ".join(sorted(path.stem for path in _FOLDER.glob("*.jinja")))
        raise InputError(f"there is no prompt style {name!r}: choose one of {known}, or give a path to a .jinja file.")
    try:
        template = path.read_text(encoding="utf-8")
        style = PromptStyle(path.stem, hashlib.sha256(template.encode()).hexdigest()[:8], template)
        style.render("?")
    except (TemplateError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"the prompt style {path} cannot be rendered ({error}): it must be a Jinja template in UTF-8 whose only "
            "variable is `question`."
        ) from error
    return style

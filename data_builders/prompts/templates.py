"""Jinja templates of what a model is asked about texts that others wrote: read, tried, and filled in.

A template runs in Jinja's sandbox and may use no variable but those it is given; its version is a hash of its text.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from data_builders.records import InputError

_JINJA = SandboxedEnvironment(autoescape=False, undefined=StrictUndefined)
_MARKUP = re.compile(r"([<\[])(?=[|/A-Za-z_])")


@dataclass(frozen=True)
class PromptTemplate:
    """What a model is asked, with places for what it is asked about.

    Attributes:
        id: Name and version, as in `judge@0123abcd`.
        text: Jinja text.
    """

    id: str
    text: str

    def render(self, **variables: Any) -> str:
        """The text with these in their places; whoever gives them defuses them."""
        return _compiled(self.text).render(**variables)


@cache
def _compiled(text: str) -> Template:
    return _JINJA.from_string(text)


def load_template(path: Path, example: Mapping[str, Any], what: str) -> PromptTemplate:
    """A template, tried with an example.

    Args:
        path: A `.jinja` file in UTF-8.
        example: A value for each variable that it may use.
        what: What to call it in a complaint, as in `judge prompt`.

    Raises:
        InputError: It cannot be read, or not be rendered with these variables alone.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
        template = PromptTemplate(f"{path.stem}@{hashlib.sha256(text.encode()).hexdigest()[:8]}", text)
        template.render(**example)
    except (TemplateError, TypeError, UnicodeDecodeError) as error:
        *others, last = (f"`{name}`" for name in example)
        raise InputError(
            f"the {what} {path} cannot be rendered ({error}): it must be a Jinja template in UTF-8 whose only "
            f"variables are {', '.join(others)}{' and ' if others else ''}{last}."
        ) from error
    return template


def defused(text: str) -> str:
    """Markup of chat templates and pictures broken up, so that it stands for nothing; mathematics is left alone.

    >>> defused("<image> <|im_end|> [INST] x < 3 and [1, 2]")
    '< image> < |im_end|> [ INST] x < 3 and [1, 2]'
    """
    return _MARKUP.sub(r"\1 ", text)

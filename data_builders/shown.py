"""What pages show of texts and pictures that others made: bounded, and nothing of it unseen.

Escaping is the template's. Needs Pillow only where a picture is shown.
"""

import base64
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

# Control characters, marks that reorder what is read or stand for nothing, tags that hide text, halves of characters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""The text with a sign or a number for each character that a page would swallow or obey.

    >>> visible("a\x00b\u202ec"), visible("half \ud83d")
    ('a␀b[U+202E]c', 'half \ufffd')
    """
    return _UNSEEN.sub(lambda found: _sign(ord(found[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else f"[U+{code:04X}]"


def shorten(text: str, limit: int) -> str:
    """The beginning of a text that may be long, saying how much is left out.

    >>> shorten("abcdef", 4)
    'abcd … (2 more characters)'
    """
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def picture_uri(image: "Image", *, side: int, kind: str = "PNG") -> str:
    """A picture as a data URI, scaled down in place where a side is longer than `side` pixels.

    Args:
        image: In RGB.
        side: Longest side, in pixels.
        kind: `PNG`, or `JPEG` for a page with many pictures.
    """
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, format=kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"

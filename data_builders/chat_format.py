"""How requests and answers look on the wire of an OpenAI-compatible server."""

import base64
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_builders.images import DECODING_ERRORS, image_path, load_image
from data_builders.records import InputError
from data_builders.samplers import Completion
from data_builders.servers import FailureError
from data_builders.tiling.plans import Tiling
from data_builders.tiling.views import tile_row

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

MAX_IMAGE_BYTES = 16 * 2**20

_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_ORIENTATION = 0x0112  # EXIF tag; values 2 to 8 turn or mirror the picture
_FINISHED = {None, "stop", "eos", "eos_token", "stop_sequence"}
_CUT_OFF = {"length", "max_tokens", "model_length"}
_LEAST_LOGP = -1e5  # vLLM writes -9999 for what is impossible


def data_url(root: Path, name: str) -> str:
    """A picture as part of a request: the file as it is, if a server would see in it what `load_image` does.

    Raises:
        InputError: As `load_image`; or the picture is too large to be sent.
    """
    kind = _sendable_kind(image_path(root, name))
    if kind:
        return _url(kind, image_path(root, name).read_bytes())
    return _url(*_encoded(load_image(root, name), name))


def _url(kind: str, data: bytes) -> str:
    return f"data:{_MIME[kind]};base64,{base64.b64encode(data).decode()}"


def _sendable_kind(path: Path) -> str | None:
    """The file's format, unless it must be encoded anew: turned, transparent, animated, large, or not for the web."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(_ORIENTATION) in range(2, 9)
            plain = picture.mode in {"RGB", "L"} and not getattr(picture, "is_animated", False)
            fits = picture.format in _MIME and path.stat().st_size <= MAX_IMAGE_BYTES
            return picture.format if plain and fits and not turned else None
    except (*DECODING_ERRORS, Image.DecompressionBombError):
        return None  # `load_image` says what is wrong


def _encoded(picture: "Image.Image", name: str) -> tuple[str, bytes]:
    for kind, settings in (("PNG", {"compress_level": 1}), ("JPEG", {"quality": 95, "subsampling": 0})):
        file = BytesIO()
        picture.save(file, kind, **settings)
        if file.tell() <= MAX_IMAGE_BYTES:
            return kind, file.getvalue()
    raise InputError(
        f"image {name!r} of {picture.width} x {picture.height} pixels takes more than {MAX_IMAGE_BYTES:,} bytes, too "
        "much for a request: scale it down."
    )


def user_messages(prompt: str, urls: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The user's turn: images first, then the text, as `chat_messages` has it."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}] if pictures else prompt}]


def tiled_messages(prompt: str, images: Sequence[str], root: Path, tiling: Tiling) -> list[dict[str, Any]]:
    """The user's turn with every picture cut into the views that the model was trained on.

    Raises:
        InputError: As `load_image`.
    """
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    row = {"images": list(images), "prompt": [{"role": "user", "content": parts}]}
    cut = tile_row(row, partial(load_image, root), tiling)
    views = (_url(*_encoded(view, images[0])) for view in cut["images"])
    content = [
        {"type": "image_url", "image_url": {"url": next(views)}} if part["type"] == "image" else part
        for part in cut["prompt"][0]["content"]
    ]
    return [{"role": "user", "content": content}]


def choices_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The completions in an answer, one or more.

    Raises:
        FailureError: There is none, so it is no answer to a request for one.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise FailureError(f"the answer holds no completion: {answer!r:.200}")
    return choices


def completion_of(choice: dict[str, Any], prefix: str, exact: bool) -> Completion:
    """What a server calls a choice.

    Args:
        choice: Of `/chat/completions` or `/completions`.
        prefix: What was continued.
        exact: Whether the whole prefix was in the prompt, so that the text goes on right behind it. A chat server was
            given it without the whitespace at its end, and may begin with that.
    """
    text, reason = _text(choice), choice.get("finish_reason")
    text = prefix + (text.lstrip() if not exact and prefix != prefix.rstrip() else text)
    if reason in _FINISHED:
        return Completion(text, "stop", first_logps=_first_logps(choice))
    if reason in _CUT_OFF:
        return Completion(text, "length", first_logps=_first_logps(choice))
    return Completion(text, "error", f"the server ended the response with {reason!r:.80}")


def _text(choice: dict[str, Any]) -> str:
    """The generated text, with what a reasoning model thought before it where the model wrote it."""
    message = choice.get("message")
    source = message if isinstance(message, dict) else {"content": choice.get("text")}
    content = source.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    thought = source.get("reasoning_content") or source.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(thought, str):
        raise FailureError(f"the answer holds no text: {choice!r:.200}")
    if not thought:
        return content
    unfinished = not content and choice.get("finish_reason") in _CUT_OFF
    return f"<think>{thought}" if unfinished else f"<think>{thought}</think>{content}"


def _first_logps(choice: dict[str, Any]) -> tuple[tuple[str, float], ...] | None:
    """The likeliest first tokens, where a chat server says them; what is none of that is passed over."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    entries = first.get("top_logprobs") if isinstance(first, dict) else None
    found = [
        (entry["token"], float(entry["logprob"]))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("token"), str)
        if isinstance(entry.get("logprob"), int | float) and _LEAST_LOGP <= entry["logprob"] <= 0
    ]
    return tuple(found) or None


def prompt_tokens(answer: dict[str, Any]) -> int:
    """How many tokens the server counted in the prompt; 0 if it does not say."""
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0


def rendered_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    """The prompt as the model was trained on it, up to where its answer begins.

    Raises:
        InputError: The tokenizer has no chat template, or one that cannot show a user's text.
    """
    from jinja2 import TemplateError

    for content in (prompt, [{"type": "text", "text": prompt}]):  # templates take the one or the other
        messages = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError):
            continue
        if prompt.strip() in text:
            begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]  # then the server adds it, too
            return text.removeprefix(tokenizer.bos_token) if begins and tokenizer.bos_token else text
    raise InputError(
        f"`tokenizer` {tokenizer.name_or_path} cannot render a question: it has no chat template, or one for other "
        "messages. Give the model's own tokenizer."
    )


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model that the servers hold, without running code that comes with it.

    Raises:
        InputError: There is none, or it does not know where in the text its tokens end.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"`tokenizer` {name} cannot be loaded ({error!s:.200}): give the folder or the Hub name of the model that "
            "the server holds."
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"`tokenizer` {name} does not say where its tokens end: leave it out, or convert it.")
    return tokenizer

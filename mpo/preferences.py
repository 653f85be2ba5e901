"""One row of preference data, checked and brought into TRL's explicit shape: `prompt`, `chosen`, `rejected`.

Three formats are told apart by the row itself:

* a row of `mpo pair` has strings and a `kind`; its strings become a user's turn and an assistant's;
* TRL's conversational format has lists of messages, whose content is a string or a list of typed parts;
* TRL's standard format has strings and no `kind`; TRL trains on them as they are, without a chat template.

Without a `prompt`, it is what `chosen` and `rejected` begin with alike. Pure: nothing is read, and of a row's images
only their number is known.
"""

from typing import Any

from data_builders.records import InputError, Pair, Row, check_row

COLUMNS = ("prompt", "chosen", "rejected")
RENDERED = ("tools", "chat_template_kwargs")
"""Columns that TRL renders into the prompt of text, but not of pictures."""
_ROLES = ("system", "user", "assistant", "tool")
_EXAMPLE = '[{"role": "user", "content": "..."}]'
_ELSEWHERE = ("image", "image_url", "url", "path", "base64")


def preference(row: Row, num_images: int, where: str) -> Row:
    """A row in TRL's explicit shape, with nothing in it but `prompt`, `chosen` and `rejected`.

    Args:
        row: What stood in the file, or in the table.
        num_images: How many pictures the row has.
        where: File and line, for messages.

    Returns:
        Three strings (standard) or three lists of messages (conversational).

    Raises:
        InputError: The row is not in one of the formats, a response is empty, or the places for images in the prompt
            are not as many as the images.

    >>> row = {"id": "q#0", "prompt": "How many?", "chosen": "3", "rejected": "4", "kind": "correctness"}
    >>> preference(row, num_images=1, where="pairs.jsonl, line 1")["chosen"]
    [{'role': 'assistant', 'content': '3'}]
    """
    for name in RENDERED:
        if row.get(name):
            raise InputError(
                f"{where}: TRL would render `{name}` into the prompt, and this reader does not pass it on. Remove the "
                "column, or give the data set to MPOTrainer in a script."
            )
    if row.get("kind") is not None and not isinstance(row.get("chosen"), list):
        return _turns(check_row(row, Pair, where), where)
    parts = {name: row.get(name) for name in COLUMNS}
    if _is_conversational(parts, where):
        return _conversational(parts, num_images, where)
    return _standard(parts, num_images, where)


def _turns(pair: Row, where: str) -> Row:
    roles = dict(zip(COLUMNS, ("user", "assistant", "assistant"), strict=True))
    return {name: [{"role": role, "content": _text(pair[name], name, where)}] for name, role in roles.items()}


def _is_conversational(parts: Row, where: str) -> bool:
    for name in ("chosen", "rejected"):
        value = parts[name]
        if value is None:
            raise InputError(
                f"{where}: `{name}` is missing. A preference row has `prompt`, `chosen` and `rejected`; see the "
                "README for the formats."
            )
        if not isinstance(value, str | list):
            raise InputError(
                f"{where}: `{name}` must be a string, or a list of messages such as {_EXAMPLE}, got {value!r:.80}."
            )
        if not value:
            raise InputError(f"{where}: `{name}` is empty. Leave such rows out: there is nothing to learn from them.")
    conversational = isinstance(parts["chosen"], list)
    if isinstance(parts["rejected"], list) != conversational:
        raise InputError(
            f"{where}: `chosen` and `rejected` must both be strings or both be lists of messages, got "
            f"{parts['chosen']!r:.80} and {parts['rejected']!r:.80}."
        )
    return conversational


def _standard(parts: Row, num_images: int, where: str) -> Row:
    if num_images:
        raise InputError(
            f"{where}: a row with images has strings in place of messages. TRL would train on them without a chat "
            f"template, and they would need the model's own image tokens. Write lists of messages such as {_EXAMPLE} "
            "(rows of `mpo pair` have a `kind`, and are turned into messages)."
        )
    if parts["prompt"] is None:
        parts = _extracted(parts, where)
    return {name: _text(parts[name], name, where) for name in COLUMNS}


def _conversational(parts: Row, num_images: int, where: str) -> Row:
    for name in ("chosen", "rejected"):
        parts = {**parts, name: _messages(parts[name], name, where)}
    if parts["prompt"] is None or isinstance(parts["prompt"], str):  # a string only repeats what the messages hold
        parts = _extracted(parts, where)
    elif isinstance(parts["prompt"], list):
        parts = {**parts, "prompt": _messages(parts["prompt"], "prompt", where)}
    else:
        raise InputError(
            f"{where}: `prompt` must be a list of messages such as {_EXAMPLE}, got {parts['prompt']!r:.80}."
        )
    for name in ("chosen", "rejected"):
        _check_response(parts[name], name, where)
    if not parts["prompt"] or parts["prompt"][-1]["role"] == "system":
        raise InputError(
            f"{where}: `prompt` must end with the message that is answered, got {parts['prompt']!r:.80}. The system's "
            "message alone asks nothing."
        )
    return {**parts, "prompt": with_places(parts["prompt"], num_images, where)}


def _extracted(parts: Row, where: str) -> Row:
    from trl import extract_prompt

    if parts["chosen"][0] != parts["rejected"][0] or min(len(parts["chosen"]), len(parts["rejected"])) < 2:
        raise InputError(
            f"{where}: there is no `prompt` in the format of the responses, and `chosen` and `rejected` do not begin "
            f"with the same one: {parts['chosen']!r:.80} and {parts['rejected']!r:.80}. Add a `prompt`."
        )
    return extract_prompt(parts)


def without_nulls(messages: list[Row]) -> list[Row]:
    """Messages with the fields that were given.

    Arrow gives every struct all fields of its column, and chat templates ask which ones there are.
    """
    return [_given({**message, "content": _given_parts(message.get("content"))}) for message in messages]


def _given_parts(content: Any) -> Any:
    return [_given(part) for part in content] if isinstance(content, list) else content


def _given(fields: Any) -> Any:
    return {key: value for key, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


def _messages(value: list[Any], name: str, where: str) -> list[Row]:
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise InputError(
                f"{where}: a message of `{name}` must have a role ({', '.join(_ROLES)}) and content, such as "
                f"{_EXAMPLE[1:-1]}, got {message!r:.80}."
            )
    messages = without_nulls(value)
    for message in messages:
        _check_content(message, name, where)
    return messages


def _check_content(message: Row, name: str, where: str) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(part, name, where)
    elif content is not None or not message.get("tool_calls"):
        _text(content, name, where)


def _check_part(part: Any, name: str, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        _text(part.get("text"), name, where)
    elif kind != "image" or any(key in part for key in _ELSEWHERE):
        raise InputError(
            f'{where}: a part of a message of `{name}` must be {{"type": "text", "text": "..."}} or '
            f'{{"type": "image"}}, got {part!r:.80}. The pictures themselves stand in the row\'s `images`, in order.'
        )


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: the text of `{name}` must be a string, got {value!r:.80}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: `{name}` holds half a character ({error.reason}): {value!r:.80}.") from error
    return value


def _check_response(messages: list[Row], name: str, where: str) -> None:
    if messages[0]["role"] in ("system", "user"):
        raise InputError(
            f"{where}: `{name}` must begin with the assistant's message, got {messages[0]!r:.80}. If it repeats the "
            "prompt, leave `prompt` away: it is then taken from what `chosen` and `rejected` share."
        )
    if _num_places(messages):
        raise InputError(f"{where}: `{name}` holds an image. Only a prompt can: TRL gives responses none.")
    if not any(_says_something(message) for message in messages):
        raise InputError(f"{where}: `{name}` is empty. Leave such rows out: there is nothing to learn from them.")


def _says_something(message: Row) -> bool:
    content = message.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return any(texts) or bool(message.get("tool_calls"))


def _num_places(messages: list[Row]) -> int:
    parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
    return sum(part["type"] == "image" for part in parts)


def with_places(prompt: list[Row], num_images: int, where: str) -> list[Row]:
    """The prompt as TRL takes it: with all places for images, or with none and a user's string to put them before.

    Args:
        prompt: Messages, each content a string or a list of typed parts.
        num_images: How many pictures the row has.
        where: File and line, for messages.

    Raises:
        InputError: There are more or fewer places than pictures.
    """
    num_places = _num_places(prompt)
    if num_places and num_places == num_images:
        return [_in_parts(message) for message in prompt]
    has_string = any(message["role"] == "user" and isinstance(message.get("content"), str) for message in prompt)
    if num_places or (num_images and not has_string):
        raise InputError(
            f'{where}: the prompt has {num_places} places for images ({{"type": "image"}}), and the row has '
            f"{num_images}. Make them as many, or leave the places out of all messages: the images then come first."
        )
    return prompt


def _in_parts(message: Row) -> Row:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message

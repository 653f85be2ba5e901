"""One JSON array of any size, read object by object: memory holds a piece of the file and no more.

The C scanner of the standard library does the work, so this is faster than an event-driven parser, and an error knows
its line.
"""

import json
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import TextIO

from data_builders.records import InputError, Row

_PIECE = 2**20  # characters
_LONGEST = 2**28  # characters of one object, beyond which a string was surely left open
_TAIL = 16  # an error this close to the end of what was read may be the cut alone: a half literal, number or escape


def read_array(path: Path, *, piece: int = _PIECE) -> Iterator[tuple[int, Row]]:
    """The objects of a JSON array, each with the line that it starts on.

    Args:
        path: A file in UTF-8 that holds one array of objects.
        piece: How many characters are read at a time.

    Raises:
        InputError: The array is broken; says in which line and, where it can, how.
    """
    with path.open(encoding="utf-8-sig") as file:
        window = _Window(file, path, piece)
        try:
            yield from _objects(window)
        except UnicodeDecodeError as error:
            raise window.complaint(f"not UTF-8 text ({error.reason})") from error


def json_complaint(path: Path, line: int, reason: str, before: str) -> InputError:
    """What is wrong with a JSON file, and in which line.

    Args:
        path: The file.
        line: Its line, from 1 on.
        reason: As the parser puts it.
        before: What stands before the error.
    """
    why = "a comma too many before it, most likely" if before.rstrip().endswith(",") else "was the file cut off?"
    return InputError(f"{path}, line {line}: broken JSON: {reason}; {why}")


def read_json(path: Path) -> Row:
    """The object that a small JSON file holds.

    Raises:
        InputError: It is missing, broken (says in which line), or no object, or says something twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, path))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); is it a JSON file?") from error
    except JSONDecodeError as error:
        raise json_complaint(path, error.lineno, error.msg, text[: error.pos]) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {value!r:.80}.")
    return value


def _once(pairs: list[tuple[str, object]], path: Path) -> Row:
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: {sorted(twice)[0]!r} is given twice in one object; only one of them would count.")
    return dict(pairs)


def _objects(window: "_Window") -> Iterator[tuple[int, Row]]:
    if window.take() != "[":
        raise window.complaint("expected an array, which begins with [")
    if window.peek() == "]":
        window.take()
    else:
        yield window.object()
        while (mark := window.take()) == ",":
            yield window.object()
        if mark != "]":
            raise window.complaint("expected , or ] after an object" if mark else "the array has no end")
    if window.peek():
        raise window.complaint("there is text after the end of the array")


class _Window:
    """The part of a file that is held, and the place in it that has been read up to."""

    def __init__(self, file: TextIO, path: Path, piece: int) -> None:
        self.file, self.path, self.piece = file, path, piece
        self.text, self.place, self.ended = "", 0, False
        self.line, self.counted = 1, 0  # the line of that place
        self.taken = ""  # the last mark that was taken, which may no longer be held
        self.decoder = JSONDecoder()

    def complaint(self, reason: str, place: int | None = None) -> InputError:
        place = self.place if place is None else place
        before = self.text[:place].rstrip() or self.taken
        return json_complaint(self.path, self._line_of(place), reason, before)

    def peek(self) -> str:
        """The next character that is no blank; empty at the end of the file."""
        while True:
            while self.place < len(self.text):
                if not self.text[self.place].isspace():
                    return self.text[self.place]
                self.place += 1
            if self.ended:
                return ""
            self._read_on(self.piece)

    def take(self) -> str:
        """The same, and moves past it."""
        self.taken = self.peek()
        self.place += len(self.taken)
        return self.taken

    def object(self) -> tuple[int, Row]:
        """The object that starts here, and its line."""
        if self.peek() != "{":
            raise self.complaint(f"expected an object, got {self.text[self.place : self.place + 40]!r}")
        wanted = self.piece
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
                break
            except JSONDecodeError as error:
                if self._is_real(error):
                    raise self.complaint(error.msg, error.pos) from error
                self._read_on(wanted)
                wanted *= 2
            except RecursionError as error:
                raise self.complaint("an object is nested too deeply") from error
        line, self.place = self._line_of(self.place), end
        return line, value

    def _line_of(self, place: int) -> int:
        """The line of a place; no later call may ask for an earlier one."""
        self.line += self.text.count("\n", self.counted, place)
        self.counted = place
        return self.line

    def _is_real(self, error: JSONDecodeError) -> bool:
        """Whether more text would not help."""
        held = len(self.text) - self.place
        if self.ended or held > _LONGEST:
            return True
        return not error.msg.startswith("Unterminated string") and error.pos < len(self.text) - _TAIL

    def _read_on(self, size: int) -> None:
        self._line_of(self.place)
        more = self.file.read(size)
        self.text, self.place, self.counted, self.ended = self.text[self.place :] + more, 0, 0, not more

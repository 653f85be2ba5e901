"""What is wrong with a data set, and what is worth knowing: the report of `mpo convert --check`.

Rows are looked at one by one and not kept: for each there remain numbers and hashes, some 200 bytes. A fault is what
training would stop at or learn nonsense from; a remark is what a person should decide about.
"""

import hashlib
import json
import zlib
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.formats.parquet import picture_problem
from data_builders.formats.protocol import RefusedError, kind_of
from data_builders.formats.tags import TAG, places_of
from data_builders.images import load_image
from data_builders.records import InputError, Row, Summary
from data_builders.shards import write_text
from data_builders.text_measures import similarity, words

REPORT = "check.json"
_TEXTS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "conversations": ("prompt", "completion"),
    "questions": ("question",),
    "responses": ("prompt", "response"),
}
_EXAMPLES = 20  # of each finding that are listed
_BATCH, _THREADS = 256, 8  # images opened at a time
_HASHES, _BANDS = 32, 8  # of MinHash: two texts that share 82% of their trigrams meet in a band with 99%
_GRAM = 3
_SHARES = {"least": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "most": 1.0}
_RANDOM = np.random.Generator(np.random.PCG64(0))
_FACTORS = _RANDOM.integers(1, 2**63, size=_HASHES, dtype=np.uint64) | np.uint64(1)
_OFFSETS = _RANDOM.integers(0, 2**63, size=_HASHES, dtype=np.uint64)


@dataclass
class Finding:
    """How often something was found, and where first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)


class Inspection:
    """Looks at rows and says what was found.

    Args:
        image_root: The folder that image paths are relative to.
        max_similarity: Share of common word trigrams above which two texts count as nearly the same.
    """

    def __init__(self, image_root: Path, max_similarity: float) -> None:
        self.image_root, self.max_similarity = image_root, max_similarity
        self.kinds: Counter[str] = Counter()
        self.faults: dict[str, Finding] = defaultdict(Finding)
        self.remarks: dict[str, Finding] = defaultdict(Finding)
        self._characters: dict[str, array] = defaultdict(lambda: array("I"))
        self._words: dict[str, array] = defaultdict(lambda: array("I"))
        self._images: set[int] = set()
        self._pending: list[tuple[str, str]] = []
        self._likeness = _Likeness()

    def refuse(self, reason: str, where: str, detail: str) -> None:
        """Counts a row that cannot be read."""
        self.faults[reason].add(f"{where}: {detail}" if detail else where)

    def add(self, row: Row, where: str, pictures: dict[str, bytes]) -> None:
        """Looks at a row.

        Args:
            row: One of ours.
            where: File and line.
            pictures: The encoded bytes of those images that are no files.

        Raises:
            RefusedError: It is no row of ours.
        """
        kind = kind_of(row)
        self.kinds[kind] += 1
        texts = {name: _text(row[name]) for name in _TEXTS[kind] if row.get(name) is not None}
        counted = {name: words(text) for name, text in texts.items()}
        self._check_texts(row, texts, where)
        for name, text in texts.items():
            self._characters[name].append(len(text))
            self._words[name].append(len(counted[name]))
        for name in row.get("images") or []:
            self._look_at(name, where, pictures.get(name))
        group = (row.get("images"), texts.get("prompt")) if kind == "pairs" else row.get("images")
        compared = {name: of for name, of in counted.items() if kind != "pairs" or name != "prompt"}
        self._likeness.add(_hash(group), _hash([row.get("images"), row.get("answer"), texts]), compared)

    def summary(self, source: str, output: Path | None, notes: list[str]) -> Summary:
        """All that was found, as a table; ends the inspection.

        Args:
            source: What was inspected, for the title.
            output: Folder for `check.json`; None writes none.
            notes: More to say.
        """
        self._open_images()
        self._likeness.report(self.remarks, self.max_similarity)
        if output:
            write_text(output / REPORT, json.dumps(self._report(source), ensure_ascii=False, indent=1) + "\n")
        rows = [[kind, f"{count:,}", ""] for kind, count in sorted(self.kinds.items())]
        rows.append(["images", f"{len(self._images):,}", ""])
        for title, findings in (("fault", self.faults), ("remark", self.remarks)):
            for name, finding in sorted(findings.items(), key=lambda item: -item[1].count):
                rows.append([f"{title}: {name}", f"{finding.count:,}", finding.examples[0]])
        lines = [_line(name, self._quantiles(name)) for name in self._characters]
        listed = [f"Up to {_EXAMPLES} examples of each are listed in {output / REPORT}."] if output else []
        verdict = "There are faults." if self.faults else "No faults were found."
        title = f"Check of {source}"
        return Summary(
            title, ["", "count", "first"], rows, [*lines, *notes, *listed, verdict], exit_code=int(bool(self.faults))
        )

    def _check_texts(self, row: Row, texts: dict[str, str], where: str) -> None:
        for name, text in texts.items():
            if not text.strip() and not row.get("error"):
                self.faults[f"an empty `{name}`"].add(where)
            if TAG in text:
                self.faults["placeholders that do not match the images"].add(f"{where}: {TAG} in the text of `{name}`")
        places, images = places_of(row.get("prompt")), len(row.get("images") or [])
        if places not in (0, images):
            self.faults["placeholders that do not match the images"].add(f"{where}: {places} for {images}")
        if "chosen" not in texts:
            return
        if texts["chosen"].strip() == texts["rejected"].strip():
            self.faults["chosen and rejected are the same"].add(where)
        elif similarity(texts["chosen"], texts["rejected"]) > self.max_similarity:
            self.remarks["chosen and rejected are nearly the same"].add(where)

    def _look_at(self, name: str, where: str, picture: bytes | None) -> None:
        """Opens an image when it is met for the first time."""
        key = _hash(name)
        if key in self._images:
            return
        self._images.add(key)
        if picture is None:
            self._pending.append((name, where))
        elif reason := picture_problem(picture):
            self.faults["a broken image"].add(f"{where}: {reason}")
        if len(self._pending) == _BATCH:
            self._open_images()

    def _open_images(self) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            problems = pool.map(lambda item: image_problem(self.image_root, item[0]), self._pending)
            for (_, where), problem in zip(self._pending, problems, strict=True):
                if problem:
                    self.faults[problem[0]].add(f"{where}: {problem[1]}")
        self._pending = []

    def _quantiles(self, name: str) -> dict[str, dict[str, int]]:
        measured = {"characters": self._characters[name], "words": self._words[name]}
        return {
            unit: dict(zip(_SHARES, np.quantile(values, [*_SHARES.values()], method="nearest").tolist(), strict=True))
            for unit, values in measured.items()
        }

    def _report(self, source: str) -> Row:
        return {
            "input": source,
            "rows": dict(sorted(self.kinds.items())),
            "images": len(self._images),
            "faults": {name: vars(finding) for name, finding in sorted(self.faults.items())},
            "remarks": {name: vars(finding) for name, finding in sorted(self.remarks.items())},
            "lengths": {name: self._quantiles(name) for name in self._characters},
        }


def image_problem(root: Path, name: str) -> tuple[str, str] | None:
    """What is wrong with an image: in general, and in particular; None if nothing is."""
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            return "an image outside the image root", name
        if not path.is_file():
            return "a missing image", name
        load_image(root, name)
    except (InputError, OSError, ValueError, RuntimeError) as error:  # also of names that no file can have
        return "a broken image", str(error)
    return None


class _Likeness:
    """Finds equal rows and nearly equal ones of one group, from hashes alone."""

    def __init__(self) -> None:
        self.groups, self.wholes, self.rows = array("Q"), array("Q"), array("Q")
        self.all_rows = 0
        self.signatures = bytearray()

    def add(self, group: int, whole: int, compared: dict[str, list[str]]) -> None:
        """Takes a row: what must be the same, the hash of all of it, and the words that may be nearly the same."""
        self.all_rows += 1
        self.groups.append(group)
        self.wholes.append(whole)
        self.signatures += _signature(compared).tobytes()

    def report(self, remarks: dict[str, Finding], max_similarity: float) -> None:
        """Adds what was found: every row that repeats, or nearly repeats, an earlier one."""
        if not self.all_rows:
            return
        wholes, groups = np.frombuffer(self.wholes, np.uint64), np.frombuffer(self.groups, np.uint64)
        for first, later in _neighbours(wholes):
            remarks["duplicate rows"].add(_rows(first, later))
        signatures = np.frombuffer(self.signatures, np.uint32).reshape(-1, _HASHES)
        near: dict[int, int] = {}
        for band in np.split(signatures.astype(np.uint64), _BANDS, axis=1):
            for first, later in _neighbours(_mixed(groups, band)):
                if later in near or wholes[first] == wholes[later]:
                    continue
                shared = float((signatures[first] == signatures[later]).mean())
                if 2 * shared / (1 + shared) > max_similarity:  # Jaccard's index as Dice's coefficient
                    near[later] = first
        for later, first in sorted(near.items()):
            remarks["near-duplicate rows of one question"].add(_rows(first, later))


def _rows(first: int, later: int) -> str:
    return f"rows {first + 1:,} and {later + 1:,}"


def _neighbours(keys: np.ndarray) -> list[tuple[int, int]]:
    """Each place whose key stood earlier too, with the place before it that has the same; in order."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    return sorted(zip(order[same].tolist(), order[same + 1].tolist(), strict=True), key=lambda pair: pair[1])


def _mixed(groups: np.ndarray, band: np.ndarray) -> np.ndarray:
    keys = groups.copy()
    for column in band.T:
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + column
        keys ^= keys >> np.uint64(29)
    return keys


def _signature(compared: dict[str, list[str]]) -> np.ndarray:
    """The least of many hashes of a row's word trigrams: two rows share as many as they share trigrams."""
    grams = {
        f"{name} {' '.join(of[place : place + _GRAM])}"
        for name, of in compared.items()
        for place in range(max(1, len(of) - _GRAM + 1))
    }
    hashed = np.array([zlib.crc32(gram.encode(errors="replace")) for gram in grams], dtype=np.uint64)
    mixed = hashed[:, None] * _FACTORS + _OFFSETS
    return (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest(), "big")


def _text(value: Any) -> str:
    """All that a text, or a list of messages, says."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RefusedError("a text that is no text", repr(value))
    contents = [message.get("content") for message in value if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    texts = [content for content in contents if isinstance(content, str)] + [part.get("text") for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def _line(name: str, quantiles: dict[str, dict[str, int]]) -> str:
    units = (f"{unit} {' / '.join(f'{value:,}' for value in of.values())}" for unit, of in quantiles.items())
    return f"`{name}`: {', '.join(units)} ({', '.join(_SHARES)})."

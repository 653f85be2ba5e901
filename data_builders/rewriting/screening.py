"""Sheets by which a person decides what becomes of a data set: a page of rows drawn from each, and its sizes.

A page holds small copies of its pictures, runs no script and loads nothing; everything in it is escaped. Which rows
are drawn depends on their ids and the seed, not on where they lie.
"""

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm import tqdm

from data_builders.conversations import turns
from data_builders.images import load_image
from data_builders.records import Conversation, InputError, Row, Summary
from data_builders.rewriting.datasets import GROUPS, RewriteSource
from data_builders.rewriting.pictures import Limits, normal_size
from data_builders.shards import Place, full_disk_explained, read_placed_rows, shard_paths, write_text
from data_builders.shown import picture_uri, shorten, visible

SCREEN = "screen"  # folder of the sheets, in the output
MAX_CHARS = 1200  # of a text that is shown
MAX_TURNS = 8
MAX_PICTURES = 4  # of one row
SIDE = 192  # pixels of a picture in the page: about 7 KB, so 1,000 rows make a page of 7 MB
_THREADS = 8


class Drawn(NamedTuple):
    """A row of the sample: rows are drawn in the order of their hashes."""

    hash: bytes
    path: str
    place: tuple[int, int]


class Survey(NamedTuple):
    """What was counted of all rows of a source."""

    num_rows: int
    num_with_images: int
    num_images: int
    num_answers: int
    sample: list[Drawn]


def screen_sources(
    sources: Mapping[str, RewriteSource], output: Path, *, image_root: Path, limits: Limits, num: int, seed: int
) -> Summary:
    """Writes the sheet of every source.

    Args:
        sources: By name.
        output: The sheets go into its folder `screen`.
        image_root: The folder that image paths are relative to.
        limits: The sizes of images that are kept; what lies outside is pointed out.
        num: Rows of each sheet.
        seed: Of which rows.

    Raises:
        InputError: There is no row, or one is broken.
    """
    table, paths = [], []
    for name, source in tqdm(sources.items(), desc="screening", unit="source"):
        try:
            survey = survey_source(source, num=num, seed=seed)
        except InputError as error:
            raise InputError(f"source {name!r}: {error}") from error
        with ThreadPoolExecutor(_THREADS) as pool:
            cards = list(pool.map(partial(card, source=source, image_root=image_root, limits=limits), _rows(survey)))
        facts = sheet_facts(survey, cards)
        path = output / SCREEN / f"{name}.html"
        with full_disk_explained(path, "Make room and give the same command again."):
            write_text(path, sheet(name, source, facts, cards))
        group = f"{source.group} {GROUPS[source.group]}" if source.group else "?"
        table.append([name, source.category, group, *(value for _, value in facts[:5])])
        paths.append(f"{name}: {path}")
    return Summary(
        "Sheets",
        ["source", "category", "group", "rows", "with image", "answers a row", "question", "answer"],
        table,
        notes=[
            "Question and answer: median characters of the drawn rows. Look at each sheet and give its `group`.",
            *paths,
        ],
        next_command="mpo rewrite --config YOUR.yaml",
    )


def survey_source(source: RewriteSource, *, num: int, seed: int) -> Survey:
    """Counts a source and draws `num` of its rows, in one reading and with only the places of the drawn in memory.

    Raises:
        InputError: There is no row, or one is broken.
    """
    counts = [0, 0, 0, 0]
    sample = heapq.nsmallest(num, _counted(source, seed, counts))
    if not sample:
        raise InputError(f"{', '.join(source.paths)}: there is no row to look at.")
    return Survey(*counts, sample)


def _counted(source: RewriteSource, seed: int, counts: list[int]) -> Iterator[Drawn]:
    for path in (shard for part in source.paths for shard in shard_paths(Path(part))):
        for place, row in read_placed_rows(path, Conversation):
            images = len(row.get("images") or [])
            answers = sum(turn.role == "assistant" for turn in turns(row))
            for index, more in enumerate((1, images > 0, images, answers)):
                counts[index] += more
            key = hashlib.blake2b(f"{seed}\0{row['id']}".encode(errors="surrogatepass"), digest_size=8)
            yield Drawn(key.digest(), str(path), (place.line, place.byte))


def _rows(survey: Survey) -> Iterator[Row]:
    for _, path, (line, byte) in survey.sample:
        yield next(row for _, row in read_placed_rows(Path(path), start=Place(line, byte)))


def card(row: Row, *, source: RewriteSource, image_root: Path, limits: Limits) -> Row:
    """What a sheet shows of one row.

    Args:
        row: A conversation.
        source: Where it is from.
        image_root: The folder that image paths are relative to.
        limits: The sizes of images that are kept.
    """
    said = turns(row)
    names = source.under_root(row.get("images") or [])
    texts = {role: sum(len(turn.text) for turn in said if turn.role == role) for role in ("user", "assistant")}
    return {
        "id": shorten(row["id"], 120),
        "turns": [{"role": turn.role, "text": shorten(turn.text, MAX_CHARS)} for turn in said[:MAX_TURNS]],
        "num_hidden_turns": len(said[MAX_TURNS:]),
        "pictures": [picture(image_root, name, limits) for name in names[:MAX_PICTURES]],
        "num_hidden_pictures": len(names[MAX_PICTURES:]),
        "question": texts["user"],
        "answer": texts["assistant"],
    }


def picture(image_root: Path, name: str, limits: Limits) -> Row:
    """A picture as a sheet shows it: small, with its size and what would become of it; or why it cannot be shown."""
    try:
        image = load_image(image_root, name)
    except InputError as error:
        return {
            "uri": None,
            "name": shorten(name, 120),
            "note": shorten(str(error), 200),
            "size": None,
            "fate": "broken",
        }
    width, height = image.size
    size = normal_size(width, height, limits)
    fate = "too long" if size is None else "fits" if size == (width, height) else "scaled"
    note = f"{width} x {height}" + {"too long": ", too long: left out", "scaled": ", would be scaled"}.get(fate, "")
    uri = picture_uri(image, side=SIDE, kind="JPEG")
    return {"uri": uri, "name": shorten(name, 120), "note": note, "size": (width, height), "fate": fate}


def sheet_facts(survey: Survey, cards: Sequence[Row]) -> list[tuple[str, str]]:
    """What stands on top of a sheet: of all rows, then of the drawn ones."""
    pictures = [one for card in cards for one in card["pictures"]]
    sizes = [one["size"] for one in pictures if one["size"]]
    fates = {fate: sum(one["fate"] == fate for one in pictures) for fate in ("scaled", "too long", "broken")}
    answers = {tuple(turn["text"] for turn in card["turns"] if turn["role"] == "assistant") for card in cards}
    facts = [
        ("rows", f"{survey.num_rows:,}"),
        ("with image", f"{survey.num_with_images / survey.num_rows:.0%}"),
        ("answers a row", f"{survey.num_answers / survey.num_rows:.1f}"),
        ("median question", f"{median(card['question'] for card in cards):,.0f}"),
        ("median answer", f"{median(card['answer'] for card in cards):,.0f}"),
        ("images a row", f"{survey.num_images / survey.num_rows:.1f}"),
        ("longest answer", f"{max(card['answer'] for card in cards):,}"),
        ("different answers", f"{len(answers):,} of {len(cards):,}"),
    ]
    if sizes:
        middle = f"{median(width for width, _ in sizes):,.0f} x {median(height for _, height in sizes):,.0f}"
        facts.append(("median image", middle))
    return facts + [(f"images {fate}", f"{count:,} of {len(pictures):,}") for fate, count in fates.items() if count]


def sheet(name: str, source: RewriteSource, facts: list[tuple[str, str]], cards: Sequence[Row]) -> str:
    """The page of one source."""
    # what data holds of characters that a page would swallow or obey is made visible
    jinja = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
    )
    return jinja.get_template("screen.html.jinja").render(
        name=name, source=source, groups=GROUPS, facts=facts, cards=cards
    )

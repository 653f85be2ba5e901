"""`mpo pair`: pairs right responses with wrong or unreadable ones of the same question, as MMPR does.

The responses to a question may stand anywhere in the input: they are first gathered in buckets (`partition`), one of
which becomes one shard. Questions come in the order of their digests, and which pairs a question gives depends on it
alone (`pairing`). So the order of the input, its files and the workers change not a byte of the output.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from data_builders.engine import DROPPED, Chunk, EngineConfig, Span, drop_note, run_step, shard_name
from data_builders.pairing import KINDS, PairOptions, pair_rows, priority, question_key
from data_builders.pairing import make_pairs as make_pairs
from data_builders.partition import cutoffs, discard, num_buckets, partition
from data_builders.records import InputError, Row, Summary, Verdict
from data_builders.shards import SETTINGS_FILE, Place, claim_folder, read_rows, shard_paths

_WORK = ".buckets"  # in the output folder, until all is done


@dataclass(kw_only=True)
class PairConfig(EngineConfig, PairOptions):
    """Settings of `mpo pair`."""

    verdicts: str = field(
        metadata={"help": "Verdicts: a JSONL file or a folder of shards, in any order and cut anywhere."}
    )
    max_per_source: dict[str, int] | int | None = field(
        default=None,
        metadata={"help": "Pairs per source, at most: one number for each, or `{source: number}` for some."},
    )

    def __post_init__(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            InputError: A value is out of its range.
        """
        EngineConfig.__post_init__(self)
        PairOptions.__post_init__(self)
        limits = self.max_per_source if isinstance(self.max_per_source, dict) else {"": self.max_per_source}
        for source, limit in limits.items():
            if limit is not None and limit < 1:
                of = f" for {source!r}" if source else ""
                raise InputError(
                    f"`max_per_source` must be at least 1, got {limit}{of}; to leave a source out, take its verdicts "
                    "out of the input."
                )

    def limit(self, source: str) -> int | None:
        """How many pairs a source may give."""
        return self.max_per_source.get(source) if isinstance(self.max_per_source, dict) else self.max_per_source

    def settings(self) -> Row:
        """All that changes what is written."""
        options = {option.name: getattr(self, option.name) for option in fields(PairOptions)}
        return {**options, "kinds": sorted(set(self.kinds)), "max_per_source": self.max_per_source}


CONFIGS = (PairConfig,)


def run(config: PairConfig) -> Summary:
    """Makes the pairs of all questions.

    Raises:
        InputError: The verdicts are missing or broken, or the folder holds other work.
    """
    source, output = Path(config.verdicts), Path(config.output)
    num = num_buckets(source)
    claim_folder(output, config.settings(), [source])
    if not all((output / shard_name(number, num)).exists() for number in range(num)):
        chunks = _chunks(config, num)
        kept = _cutoffs(config, chunks) if config.max_per_source is not None else {}
        run_step(partial(_Pairing, config, kept), chunks, config, title="pairing")
    discard(output / _WORK)
    return _summary(config)


def _chunks(config: PairConfig, num: int) -> list[Chunk]:
    source, output = Path(config.verdicts), Path(config.output)
    options = {"model": Verdict, "key": question_key, "title": "gathering"}
    try:
        buckets = partition(source, output / _WORK, num, **options)
    except InputError:
        if not any(output.glob("*.jsonl")):  # so that the folder can be filled from mended input
            (output / SETTINGS_FILE).unlink()
            if not any(output.iterdir()):
                output.rmdir()
        raise
    return [
        Chunk(shard_name(number, num), (Span(bucket.path.absolute(), Place(), bucket.size),))
        for number, bucket in enumerate(buckets)
    ]


class _Pairing:
    """The step: verdict rows of whole questions to pair rows."""

    def __init__(self, config: PairConfig, kept: Mapping[str, int]) -> None:
        self.config, self.kept = config, kept

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        return pair_rows(rows, self.config, self._is_kept if self.kept else None)

    def _is_kept(self, pair: Row) -> bool:
        source = pair["source"]
        return source not in self.kept or priority(pair, self.config.seed) <= self.kept[source]


class _Ranking:
    """The step before it where sources are capped: verdict rows to the priorities of their pairs."""

    def __init__(self, config: PairConfig) -> None:
        self.config = config

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        pairs = [pair for pair in pair_rows(rows, self.config)[0] if self.config.limit(pair["source"]) is not None]
        return [{"source": pair["source"], "priority": priority(pair, self.config.seed)} for pair in pairs], []


def _cutoffs(config: PairConfig, chunks: Sequence[Chunk]) -> dict[str, int]:
    """The priority up to which the pairs of each source are kept, for sources that give too many."""
    folder = Path(config.output) / _WORK / "priorities"
    run_step(partial(_Ranking, config), chunks, replace(config, output=str(folder)), title="ranking")

    def numbers() -> Iterator[tuple[str, int]]:
        rows = (row for chunk in chunks for row in read_rows(folder / chunk.name))
        return ((row["source"], row["priority"]) for row in rows)

    return cutoffs(numbers, lambda source: config.limit(source) or 0)


def _summary(config: PairConfig) -> Summary:
    output = Path(config.output)
    counts = _count(output)
    rows = []
    for source, count in sorted(counts.items()):
        names = ("questions", "with pairs", "pairs", *KINDS.values())
        mean = f"{count['pairs'] / max(1, count['questions']):.1f}"
        rows.append([source or "(no source)", *(f"{count[name]:,}" for name in names), mean])
    columns = ["source", "questions", "with pairs", "pairs", "correctness", "format", "pairs per question"]
    notes = drop_note(output)
    if isinstance(config.max_per_source, dict) and (unknown := sorted(config.max_per_source.keys() - counts.keys())):
        notes.append(f"`max_per_source` names {', '.join(map(repr, unknown))}, and there is no such source.")
    command = f"mpo train --data {output} --model_name_or_path MODEL --output_dir mpo-model"
    return Summary("Pairs", columns, rows, notes=notes, next_command=command)


def _count(output: Path) -> dict[str, Counter[str]]:
    """Questions and pairs by source."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for path in shard_paths(output):
        last = None
        for pair in read_rows(path):
            count, question = counts[pair["source"]], (pair["images"], pair["question"], pair["answer"])
            count.update(("pairs", pair["kind"], *(("questions", "with pairs") if question != last else ())))
            last = question
    for path in sorted((output / DROPPED).glob("*.jsonl")):
        for row in read_rows(path):
            if row["reason"].startswith("questions"):
                counts[row["source"]]["questions"] += row["count"]
    return counts

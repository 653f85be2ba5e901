"""`mpo mix`: many data sets into one folder of shards, with shares that are exact and an order that is fixed once.

A plan (`mixture_plan`) comes first and stays beside the shards. It depends on the mixture, the seed and the sources'
rows alone; workers, shards that are there already and a kill at any moment change not a byte.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from data_builders.engine import Chunk, EngineConfig, run_step
from data_builders.mixtures.plan import (
    PLAN,
    Copying,
    in_mixture,
    make_plan,
    mixed_sources,
    planned_chunks,
    planned_counts,
    source_files,
)
from data_builders.mixtures.spec import Mixture, cell_members, cell_shares, read_mixture
from data_builders.mixtures.stream import mixture_stream, open_stream
from data_builders.mixtures.trl import trl_sources
from data_builders.records import InputError, Row, Summary
from data_builders.shards import claim_folder, read_rows, write_rows

if TYPE_CHECKING:
    from datasets import IterableDataset

PRESETS = ("mammoth_vl", "mm1", "mm1_5_pretrain", "mm1_5_sft")
_FOLDER = Path(__file__).parent / "mixtures"


@dataclass(kw_only=True)
class MixConfig(EngineConfig):
    """Settings of `mpo mix`."""

    sources: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "What is mixed, by name: a path, or `{path, group, category, rewritten, weight, cap, repeats, "
            "image_folder, columns}` of which all but the path may be left out."
        },
    )
    datasets: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "The same in TRL's words (`DatasetMixtureConfig`), in the place of `sources`."}
    )
    mixture: str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "The shares: a preset (mammoth_vl, mm1, mm1_5_pretrain, mm1_5_sft), a YAML file, or `{groups, "
            "rewritten_share}` itself. None: sources share by `weight`, or by their rows."
        },
    )
    total: int | None = field(
        default=None,
        metadata={"help": "Rows of the mixture. None: as many as can be with no source giving more than it has."},
    )
    seed: int = field(default=0, metadata={"help": "Of which rows are taken, and of the order."})
    shard_size: int = field(default=5000, metadata={"help": "Rows of each shard."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Draw row by row from data too large to be looked through, also from Hub data sets: the shares "
            "then hold in expectation only."
        },
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "TRL's; not taken: mix the rows that are left once a test set is put aside."}
    )

    def __post_init__(self) -> None:
        """Refuses what does not go together.

        Raises:
            InputError: The mixture does not make sense, or a value is out of its range.
        """
        EngineConfig.__post_init__(self)
        if (self.sources is None) == (self.datasets is None):
            raise InputError("`mpo mix` needs either `sources` or, in TRL's words, `datasets`: what is to be mixed.")
        if self.shard_size < 1:
            raise InputError(f"`shard_size` must be at least 1, got {self.shard_size}.")
        if self.test_split_size is not None:
            raise InputError(
                "`test_split_size` is not taken: what a mixture repeats would stand on both sides. Put rows aside "
                "before mixing, and leave the setting away."
            )
        if self.streaming and (self.total is None or self.workers > 1 or self.ray):
            raise InputError("`streaming` needs `total`, as a stream has no end, and is drawn by one process alone.")
        self.spec()

    def spec(self) -> Mixture:
        """The mixture that the settings describe.

        Raises:
            InputError: A part is unknown, missing or of the wrong kind, or the parts do not fit each other.
        """
        given = trl_sources(self.datasets) if self.sources is None else self.sources
        sources = {name: {"path": one} if isinstance(one, str | list) else one for name, one in given.items()}
        mixture = read_mixture({**self._shares(), "sources": sources, "total": self.total}, "the mixture")
        for name, source in mixture.sources.items():
            if not source.paths:
                raise InputError(f"source {name!r} has no `path`: name a JSONL file or a folder of shards.")
        return mixture

    def _shares(self) -> dict[str, Any]:
        """What the mixture says besides its sources."""
        shares = _read_shares(self.mixture) if isinstance(self.mixture, str) else self.mixture or {}
        if not isinstance(shares, dict) or (unknown := shares.keys() - {"groups", "rewritten_share"}):
            what = ", ".join(sorted(map(str, unknown))) if isinstance(shares, dict) else f"{shares!r:.80}"
            raise InputError(f"`mixture` holds {what}: it takes `groups` and `rewritten_share`.")
        return shares


CONFIGS = (MixConfig,)


def run(config: MixConfig) -> Summary:
    """Mixes the sources.

    Raises:
        InputError: A source is missing, broken or too small, or the folder holds other work.
    """
    mixture, output = config.spec(), Path(config.output)
    plan = None if config.streaming or planned_counts(output) else make_plan(mixture, seed=config.seed)
    paths = [Path(path) for name in mixed_sources(mixture) for path in mixture.sources[name].paths]
    settings = {key: getattr(config, key) for key in ("seed", "shard_size", "streaming")}
    claim_folder(output, {**mixture.model_dump(), **settings}, [path for path in paths if path.exists()])
    if plan:
        plan.write(output, config.shard_size)
    counts = planned_counts(output) or {}
    total = sum(count["gives"] for count in counts.values()) or mixture.total
    chunks = list(planned_chunks(output / PLAN, total, config.shard_size))
    if config.streaming:
        _write_stream(config, mixture, chunks)
    else:
        run_step(partial(Copying, source_files(mixture), mixture.sources), chunks, config, title="mixing")
    return _summary(config, mixture, _mixed(output, chunks, counts), counts)


def _read_shares(name: str) -> Any:
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"there is no mixture {name!r}: choose one of {', '.join(PRESETS)}, or give a YAML file.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error


def _write_stream(config: MixConfig, mixture: Mixture, chunks: list[Chunk]) -> None:
    """Draws the rows of every shard, and writes those that are missing."""
    output = Path(config.output)
    if all((output / chunk.name).exists() for chunk in chunks):
        return
    streams = {name: _labelled(name, mixture.sources[name].paths) for name in mixed_sources(mixture)}
    drawn = iter(mixture_stream(mixture, streams, seed=config.seed))
    for chunk in tqdm(chunks, desc="mixing", unit="shard"):
        rows = list(islice(drawn, chunk.size))
        if not (output / chunk.name).exists():
            write_rows(output / PLAN / chunk.name, ({"source": row["source"]} for row in rows))
            write_rows(output / chunk.name, (_drawn(row, mixture) for row in rows))


def _labelled(name: str, paths: list[str]) -> "IterableDataset":
    """The rows of a source as JSON, of which Arrow need not know the types, with the source's name beside them."""
    from datasets import Features, IterableDataset, Value

    features = Features({"source": Value("string"), "row": Value("string")})
    return IterableDataset.from_generator(_as_json, features, gen_kwargs={"name": name, "paths": tuple(paths)})


def _as_json(name: str, paths: tuple[str, ...]) -> Iterator[Row]:
    for row in open_stream(list(paths)):
        try:
            yield {"source": name, "row": json.dumps(row)}
        except TypeError as error:
            kinds = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
            raise InputError(
                f"source {name!r} has rows that JSON cannot hold ({error}): {kinds:.300}. Save it as Parquet and let "
                "`mpo convert` write shards, with the pictures as files."
            ) from error


def _drawn(labelled: Row, mixture: Mixture) -> Row:
    name = labelled["source"]
    return in_mixture(json.loads(labelled["row"]), mixture.sources[name], f"source {name!r}")


def _mixed(output: Path, chunks: list[Chunk], counts: Mapping[str, Row]) -> Counter[str]:
    """The rows of each source in the mixture as it stands on disk, which must be as it was planned."""
    mixed: Counter[str] = Counter()
    for chunk in chunks:
        planned = Counter(row["source"] for row in read_rows(output / PLAN / chunk.name))
        with (output / chunk.name).open("rb") as file:
            num_lines = sum(1 for _ in file)
        if not num_lines == planned.total() == chunk.size:
            raise InputError(
                f"{output / chunk.name} has {num_lines} rows and its plan {planned.total()}, but {chunk.size} were "
                "written: it was changed since. Delete both, or the folder, and give the same command again."
            )
        mixed += planned
    if counts and (different := [name for name, count in counts.items() if mixed[name] != count["gives"]]):
        raise InputError(
            f"{output / PLAN} holds {mixed[different[0]]} rows of {different[0]!r} where "
            f"{counts[different[0]]['gives']} were planned: it was changed since. Delete the folder and start again."
        )
    return mixed


def _summary(config: MixConfig, mixture: Mixture, mixed: Counter[str], counts: Mapping[str, Row]) -> Summary:
    shares, total = cell_shares(mixture), mixed.total()
    cells, sources = [], []
    for cell, names in cell_members(mixture).items():
        num_rows = sum(mixed[name] for name in names)
        assert config.streaming or abs(num_rows - shares[cell] * total) < 1, f"{cell} has {num_rows} rows of {total}"
        cells.append([str(cell), f"{len(names):,}", f"{num_rows:,}", f"{num_rows / total:.2%}"])
        cells[-1].append(f"{float(shares[cell]):.2%}")
        for name in names:
            has = counts[name]["has"] if name in counts else None
            passes = [f"{has:,}", f"{mixed[name] / has:.2f}"] if has else ["?", "?"]
            sources.append([name, str(cell), f"{mixed[name]:,}", *passes])
    notes = [f"{total:,} rows in {config.output}; where each of them comes from is in {Path(config.output) / PLAN}."]
    if config.streaming:
        notes.append("The rows were drawn from a stream: the shares hold in expectation only.")
    return Summary(
        "Mixture",
        ["part", "sources", "rows", "share", "wanted"],
        cells,
        notes=notes,
        next_command=f"mpo sft --data {config.output} --model_name_or_path MODEL --output_dir sft-model",
        also=[Summary("Sources", ["source", "part", "rows", "of", "passes"], sources)],
    )

"""`mpo rewrite`: short answers into instruction data with rationales, set by set, as MAmmoTH-VL was made.

A data set is kept (group A), rewritten by a model (B) or dropped (C); `--screen true` writes a sheet of each, by which
a person decides. What was kept is in `original/` and what was rewritten in `rewritten/`, two sources of a mixture.
Source: Guo et al. 2024, "MAmmoTH-VL", https://arxiv.org/abs/2412.05237.
"""

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from data_builders.backends import SamplerConfig, check_sampler, open_sampler
from data_builders.engine import DROPPED, Chunk, EngineConfig, drop_reasons, run_step
from data_builders.images import image_path
from data_builders.records import InputError, Row, Summary
from data_builders.rewriting.asking import rewrite_prompt
from data_builders.rewriting.datasets import GROUPS, RewriteSource, chunks_of_source, read_sources
from data_builders.rewriting.pictures import Limits, Normaliser
from data_builders.rewriting.rows import Writer, keep_rows, rewrite_rows
from data_builders.rewriting.screening import screen_sources
from data_builders.shards import claim_folder, read_placed_rows, shard_paths, write_rows

ORIGINAL, REWRITTEN, PICTURES = "original", "rewritten", "images"  # folders in the output
_FOLDERS = {"A": ORIGINAL, "B": REWRITTEN}
_DROPPED_SET = "group C"


@dataclass(kw_only=True)
class RewriteConfig(EngineConfig, SamplerConfig):
    """Settings of `mpo rewrite`; the model is the multimodal one, which sees pictures and text."""

    sources: dict[str, Any] = field(
        metadata={
            "help": "The data sets, by name: `{path, category, group, image_folder, grammar, prompt}`; path and "
            "category are needed. Categories: General, OCR, Chart, Caption, Domain-specific, Code&Math, Language, "
            "Detection, Multi-Image, Video. Groups: A keep, B rewrite, C drop."
        }
    )
    output: str = field(
        metadata={
            "help": "Folder for `rewritten/`, `original/` and `images/` (scaled pictures). It must lie below "
            "`image_root`, so that one `--image_root` finds all pictures in training."
        }
    )
    screen: bool = field(
        default=False,
        metadata={"help": "Write a sheet (HTML) of rows of each source to decide its group by; asks no model."},
    )
    screen_rows: int = field(default=1000, metadata={"help": "Rows on each sheet (paper: 1,000)."})
    model: str | None = field(
        default=None,
        metadata={"help": "Multimodal model: folder or Hub name; with `server`, the name that it is served under."},
    )
    caption_model: str | None = field(
        default=None,
        metadata={"help": "Model for captions, which sees no picture. None: `model`. A text-only one must be served."},
    )
    caption_server: list[str] = field(
        default_factory=list, metadata={"help": "Servers of `caption_model`; without any, those of `server`."}
    )
    temperature: float = field(default=0.7, metadata={"help": "0 is greedy."})
    min_side: int = field(default=224, metadata={"help": "Smaller images are scaled up to this (paper: 224 pixels)."})
    max_side: int = field(default=4096, metadata={"help": "Larger ones are scaled down to this (paper: 4096)."})
    max_aspect: int = field(default=7, metadata={"help": "Longer shapes are left out with their row (paper: 1:7)."})
    shard_size: int = field(default=1024, metadata={"help": "Rows per shard: what a killed run repeats at most."})

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other.

        Raises:
            InputError: A source or a limit makes no sense, or a model that is needed is missing.
        """
        super().__post_init__()
        self.limits()
        if self.screen_rows < 1:
            raise InputError(f"`screen_rows` must be at least 1, got {self.screen_rows}.")
        if self.caption_server and not self.caption_model:
            raise InputError("`caption_server` needs `caption_model`: the name that the model is served under.")
        sources = self.spec()
        if self.screen:
            return
        if undecided := [name for name, source in sources.items() if source.group is None]:
            raise InputError(
                f"source {undecided[0]!r} has no `group`: look at its sheet (`mpo rewrite --screen true`) and give it "
                "A (keep), B (rewrite) or C (drop)."
            )
        blind = {source.reads == "caption" for source in sources.values() if source.group == "B"}
        if not self.model and (False in blind or (True in blind and not self.caption_model)):
            raise InputError("a source of group B needs a `model`: a folder, a Hub name or a name on a `server`.")

    def spec(self) -> dict[str, RewriteSource]:
        """The sources by name.

        Raises:
            InputError: One makes no sense.
        """
        return read_sources(self.sources)

    def limits(self) -> Limits:
        """The sizes of images.

        Raises:
            InputError: They exclude each other.
        """
        return Limits(self.min_side, self.max_side, self.max_aspect)

    def asks(self, *, blind: bool) -> SamplerConfig:
        """The model that rewrites captions (`blind`), or the one for all else."""
        own = {one.name: getattr(self, one.name) for one in fields(SamplerConfig)}
        if blind and self.caption_model:
            own |= {"model": self.caption_model, "server": self.caption_server or self.server, "tokenizer": None}
        return SamplerConfig(**own)


CONFIGS = (RewriteConfig,)


def run(config: RewriteConfig) -> Summary:
    """Rewrites the sources, or writes their sheets.

    Raises:
        InputError: Sources, images or models are not what they should be, or the folder holds other work.
    """
    sources, output = config.spec(), Path(config.output)
    if config.screen:
        return screen_sources(
            sources,
            output,
            image_root=Path(config.image_root),
            limits=config.limits(),
            num=config.screen_rows,
            seed=config.seed,
        )
    chunks = {
        name: chunks_of_source(name, source, config.shard_size)
        for name, source in sources.items()
        if source.group in _FOLDERS
    }
    _check_images(config, chunks)
    models = [config.asks(blind=blind) for blind in sorted(_blind(sources))]
    for model in models:
        check_sampler(model)
    paths = [Path(path) for source in sources.values() for path in source.paths]
    claim_folder(output, _settings(config, models), [*paths, *(path for one in models for path in one.model_paths())])
    _drop_sets(sources, output)
    for group, step, title in (("A", _Keeping, "keeping"), ("B", _Rewriting, "rewriting")):
        work = [chunk for name in chunks if sources[name].group == group for chunk in chunks[name]]
        if work:
            run_step(partial(step, config), work, _engine(config, output / _FOLDERS[group]), title=title)
    for leftover in output.rglob(".*.tmp"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    return _summary(config, sources, chunks)


def _blind(sources: dict[str, RewriteSource]) -> set[bool]:
    """Which models are asked: the one that sees no picture, and the other."""
    return {source.reads == "caption" for source in sources.values() if source.group == "B"}


def _settings(config: RewriteConfig, models: list[SamplerConfig]) -> Row:
    sources = config.spec()
    prompts = {name: rewrite_prompt(one.prompt or one.reads).id for name, one in sources.items() if one.group == "B"}
    return {
        "sources": {name: {**source.model_dump(), "grammar": source.reads} for name, source in sources.items()},
        "prompts": prompts,
        "models": [model.provenance() for model in models],
        "limits": vars(config.limits()),
        "images": _pictures(config).relative_to(Path(config.image_root).resolve()).as_posix(),
        "shard_size": config.shard_size,
    }


def _engine(config: RewriteConfig, output: Path) -> EngineConfig:
    own = {one.name: getattr(config, one.name) for one in fields(EngineConfig)}
    return EngineConfig(**{**own, "output": str(output)})


def _pictures(config: RewriteConfig) -> Path:
    """The folder of scaled pictures.

    Raises:
        InputError: It is not below the image root.
    """
    root, output = Path(config.image_root).resolve(), Path(config.output).resolve()
    if not output.is_relative_to(root):
        raise InputError(
            f"the output {config.output} is not below the image root {config.image_root}: scaled pictures are written "
            "there, and rows name all pictures by paths under one root. Give a folder above both as `image_root`, and "
            "each source the rest of the way to its own pictures as `image_folder`."
        )
    return output / PICTURES


def _check_images(config: RewriteConfig, chunks: dict[str, list[Chunk]]) -> None:
    """Looks for one image of each source: a wrong image root would leave out everything.

    Raises:
        InputError: It is not there, or the output is not below the image root.
    """
    _pictures(config)
    for name, source in config.spec().items():
        rows = (one["row"] for one in chunks[name][0].rows()) if name in chunks else ()
        if row := next((row for row in rows if row.get("images")), None):
            try:
                image_path(Path(config.image_root), source.under_root(row["images"])[0])
            except InputError as error:
                raise InputError(f"source {name!r}, row {row['id']!r}: {error} Or its `image_folder`?") from error


def _drop_sets(sources: dict[str, RewriteSource], output: Path) -> None:
    """Lists each source of group C in one line, with the number of its rows."""
    for name, source in sources.items():
        path = output / DROPPED / f"{name}.jsonl"
        if source.group == "C" and not path.exists():
            num = sum(1 for part in source.paths for shard in shard_paths(Path(part)) for _ in read_placed_rows(shard))
            write_rows(path, [{"id": name, "source": name, "reason": _DROPPED_SET, "count": num}])


class _Keeping:
    """The step: rows of group A to rows with images of usable sizes."""

    def __init__(self, config: RewriteConfig) -> None:
        self.config, self.sources = config, config.spec()
        self.images = Normaliser(Path(config.image_root), _pictures(config), config.limits())

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        return keep_rows(rows, self.sources, self.images.name_of)


class _Rewriting(_Keeping):
    """The step: rows of group B to rewritten ones."""

    def __init__(self, config: RewriteConfig) -> None:
        super().__init__(config)
        self.writers: dict[bool, Writer] = {}
        for blind in sorted(_blind(self.sources)):
            model = config.asks(blind=blind)
            shared = self.writers.get(False) if model == config.asks(blind=False) else None
            self.writers[blind] = shared or Writer(open_sampler(model), model.drawing(), model.provenance())

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        return rewrite_rows(rows, self.sources, self.images.name_of, self.writers.__getitem__)


def _summary(config: RewriteConfig, sources: dict[str, RewriteSource], chunks: dict[str, list[Chunk]]) -> Summary:
    output = Path(config.output)
    table, left_out = [], []
    for name, source in sources.items():
        group = source.group or ""
        folder = output / _FOLDERS[group] if group in _FOLDERS else output
        names = [chunk.name for chunk in chunks.get(name, [])]
        done, reasons = _num_lines(folder, names), drop_reasons(folder, names or [f"{name}.jsonl"])
        both = [f"{done:,}" if group == wanted else "" for wanted in _FOLDERS]
        read = f"{done + reasons.total():,}"
        table.append([name, source.category, f"{group} {GROUPS[group]}", read, *both, f"{reasons.total():,}"])
        left_out += [[name, reason, f"{count:,}"] for reason, count in reasons.most_common()]
    also = [Summary("Left out", ["source", "reason", "rows"], left_out)] if left_out else []
    folders = [output / folder for folder in _FOLDERS.values() if (output / folder).exists()]
    notes = [f"Rows that were left out are listed in {' and '.join(str(one / DROPPED) for one in folders)}."]
    rewritten = output / REWRITTEN
    return Summary(
        "Rewritten",
        ["source", "category", "group", "read", "kept", "rewritten", "left out"],
        table,
        notes=notes if left_out and folders else [],
        next_command=f"mpo filter --conversations {rewritten} --output filtered" if rewritten.exists() else None,
        also=also,
    )


def _num_lines(folder: Path, names: list[str]) -> int:
    num = 0
    for name in names:
        with (folder / name).open("rb") as file:
            num += sum(1 for _ in file)
    return num

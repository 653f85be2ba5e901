"""A mixture in TRL's words: `trl.DatasetMixtureConfig`, as it stands in the YAML of TRL's scripts.

The shares are TRL's: `fraction` of each data set relative to the sum, and as many rows as no data set has to repeat;
without fractions all rows. TRL takes the first rows of each and puts one set behind the other; here they are drawn
from all of it and mixed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_builders.records import InputError, Row


class TrlDataset(BaseModel):
    """The fields of TRL's `DatasetConfig`, which are the arguments of `datasets.load_dataset`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


def trl_sources(datasets: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """The sources of a mixture, in the fields of `data_builders.mixtures.spec.Source`, from TRL's `datasets`.

    Args:
        datasets: The list under `datasets:`. Local ones are JSONL files or folders of shards, named by `path` or by
            `data_files` of the `json` loader; a Hub id can only be streamed.

    Returns:
        By path, with a number behind the second one of the same path.

    Raises:
        InputError: A field is unknown, or says what only `load_dataset` could do.
    """
    sources: dict[str, Row] = {}
    for number, values in enumerate(datasets):
        entry = _entry(values, f"`datasets`, entry {number + 1}")
        same = sum(1 for name in sources if name == entry.path or name.startswith(f"{entry.path} ("))
        name = f"{entry.path} ({same + 1})" if same else entry.path
        sources[name] = {"path": _paths(entry), "weight": entry.fraction, "columns": entry.columns}
    return sources


def _entry(values: Mapping[str, Any], where: str) -> TrlDataset:
    try:
        return TrlDataset.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{where}: `{'.'.join(map(str, first['loc']))}` {first['msg'][:1].lower()}{first['msg'][1:]}. A data set "
            f"of TRL's has the fields {', '.join(TrlDataset.model_fields)}."
        ) from error


def _paths(entry: TrlDataset) -> str | list[str]:
    files = entry.data_files.get(entry.split) if isinstance(entry.data_files, dict) else entry.data_files
    by_split = entry.split == "train" or isinstance(entry.data_files, dict)
    if entry.path == "json" and files and by_split:
        return _inside(Path(entry.data_dir or "."), files)
    if Path(entry.path).exists() and entry.name is None and by_split and (files or entry.data_files is None):
        base = Path(entry.path) / (entry.data_dir or ".")
        return _inside(base, files) if files else str(base)
    if not Path(entry.path).exists() and "/" in entry.path and entry.data_dir is None and entry.data_files is None:
        return f"{entry.path}{f'/{entry.name}' if entry.name else ''}:{entry.split}"
    raise InputError(
        f"data set {entry.path!r}: no file follows from `path`, `name`, `data_dir`, `data_files` and `split`. Name a "
        "JSONL file or a folder of shards by `path`, or files by `path: json` with `data_files`, for another split "
        "those of that split; `mpo convert` writes shards from other formats. Of a Hub id, `name` and `split` count."
    )


def _inside(folder: Path, files: str | list[str]) -> list[str]:
    return [str(folder / file) for file in ([files] if isinstance(files, str) else files)]

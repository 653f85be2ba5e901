"""A mixture of data that do not fit anywhere: drawn while it is read, by `datasets.interleave_datasets`.

The shares hold in expectation only: of T rows, a part with share p gets p T rows give or take sqrt(p (1 - p) T). Which
rows come is a shuffle of a window, not of the whole. `mpo mix` without `streaming` has neither limit.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data_builders.mixtures.counts import mixture_shares
from data_builders.mixtures.spec import Mixture
from data_builders.records import InputError, Row
from data_builders.shards import read_stage, shard_paths

if TYPE_CHECKING:
    from datasets import IterableDataset

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>\w[\w.+-]*))?")


def mixture_stream(
    mixture: Mixture,
    streams: "Mapping[str, IterableDataset]",
    *,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    window: int = 1000,
) -> "IterableDataset":
    """An endless stream of rows, each drawn from a source with the probability that is its share.

    Args:
        mixture: The spec; its `total` is left to the reader (`.take(total)`).
        streams: The rows of each source that has a share. One that ends starts again.
        sizes: Rows of each source, where sources without a `weight` share a cell.
        seed: Of the draws and of the shuffles.
        window: Rows of each source that are shuffled at a time.

    Raises:
        InputError: A source has a `cap`, which a stream cannot keep; a stream is missing or has no share; or a size is
            needed.
    """
    from datasets import interleave_datasets

    shares = {name: share for name, share in mixture_shares(mixture, sizes).items() if share}
    if different := sorted(shares.keys() ^ streams.keys()):
        raise InputError(
            f"{', '.join(different)}: every source that has a share needs a stream, and no other has one."
        )
    if capped := [name for name in shares if mixture.sources[name].cap is not None]:
        raise InputError(
            f"{', '.join(capped)} cannot be capped in a stream, which is drawn row by row: give each a `weight`, or "
            "mix without `streaming`."
        )
    parts = [streams[name].shuffle(seed=seed, buffer_size=window).repeat(None) for name in shares]
    return interleave_datasets(parts, probabilities=[float(share) for share in shares.values()], seed=seed)


def open_stream(paths: list[str]) -> "IterableDataset":
    """The rows of JSONL files, folders of shards or Hub data sets (`org/name[/config][:split]`), one after the other.

    Raises:
        InputError: A path is no file or folder and no Hub id.
    """
    from datasets import IterableDataset, concatenate_datasets

    local = [str(shard) for path in paths if Path(path).exists() for shard in shard_paths(Path(path))]
    parts = [_open_hub(path) for path in paths if not Path(path).exists()]
    if local:
        # of a list, `datasets` gives each loader its part
        parts.insert(0, IterableDataset.from_generator(_rows, gen_kwargs={"paths": local}))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _rows(paths: list[str]) -> Iterator[Row]:
    for path in paths:
        yield from read_stage(Path(path))


def _open_hub(path: str) -> "IterableDataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    found = _HUB_ID.fullmatch(path)
    if found is None:
        raise InputError(f"{path} does not exist; expected a JSONL file, a folder of shards or a Hub id.")
    try:
        return load_dataset(found["name"], found["config"], split=found["split"] or "train", streaming=True)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        raise InputError(
            f"{path} is no file or folder here, and as a Hub data set it cannot be read ({type(error).__name__}: "
            f"{error!s:.200}). Is the name right, and is there a network?"
        ) from error

"""Training data whose pictures are cut into tiles as they are read, and what is kept of that with the model."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from pydantic import TypeAdapter, ValidationError
from transformers import ProcessorMixin, TrainerCallback

from data_builders.records import InputError, Row
from mpo.models import tiles_pictures
from mpo.tiling import Tiling, load_tiling, save_tiling, tile_batch


def read_tiling(settings: Row) -> Tiling:
    """The tiling that the settings describe.

    Raises:
        InputError: A setting is missing, unknown or out of its range.
    """
    known = [field.name for field in fields(Tiling)]
    takes = f"It takes {', '.join(known)}."
    if unknown := [name for name in settings if name not in known]:
        raise InputError(f"`tiling` has no setting `{unknown[0]}`. {takes}")
    try:
        return TypeAdapter(Tiling).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        reason = first.get("ctx", {}).get("error", f"`{name}`: {first['msg']}.")
        raise InputError(f"`tiling` is {settings}: {reason} {takes}") from error


def data_tiling(settings: Row | None, model: str, processor: ProcessorMixin) -> Tiling | None:
    """How the pictures of the data are cut before the processor sees them; None where that is its own business.

    Args:
        settings: Of the run; None takes what the model was trained on.
        model: The folder or Hub id that it starts from.
        processor: Of the model.

    Raises:
        InputError: The settings, or the model's own `tiling.json`, describe none.
    """
    if settings:
        return None if tiles_pictures(processor) else read_tiling(settings)
    return load_tiling(model)


def tiled(dataset: Dataset | None, tiling: Tiling | None) -> Dataset | None:
    """The rows with their pictures cut as they are read; those without pictures, or tiling, as they are."""
    if dataset is None or tiling is None or "images" not in dataset.column_names:
        return dataset
    return dataset.with_transform(partial(tile_batch, load=_as_it_is, tiling=tiling))


def _as_it_is(picture: Any) -> Any:
    return picture


class KeepsTiling(TrainerCallback):
    """Writes into checkpoints how the pictures of their training were cut."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Transformers' seam behind a checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            save_tiling(self.tiling, folder)

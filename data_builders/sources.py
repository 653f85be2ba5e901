"""Data sets as settings name them: where their rows and images are, read and checked.

Verbs that take many of them build their own kind of `DataSet` with fields of its own. Nothing here reads a file.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data_builders.records import InputError


class Spec(BaseModel):
    """A part of the settings; a field that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SpecT = TypeVar("SpecT", bound=Spec)


class DataSet(Spec):
    """Rows that lie somewhere.

    Attributes:
        path: A JSONL file, a folder of shards, or several of them.
        image_folder: Folder its image paths are relative to, under the image root of training: put before each.
    """

    path: str | list[str] = []
    image_folder: str = ""

    @model_validator(mode="after")
    def _keeps_images_inside(self) -> "DataSet":
        folder = PurePosixPath(self.image_folder)
        if folder.is_absolute() or ".." in folder.parts:
            raise ValueError(f"has the `image_folder` {self.image_folder!r}: it must be a folder below the image root")
        return self

    @property
    def paths(self) -> list[str]:
        """The files and folders, however they were given."""
        return [self.path] if isinstance(self.path, str) else self.path

    def under_root(self, images: Any) -> Any:
        """Image paths of a row, one or a list, as they are under the image root; what is no path stays as it is."""
        if isinstance(images, list):
            return [self.under_root(image) for image in images]
        return f"{self.image_folder.rstrip('/')}/{images}" if self.image_folder and isinstance(images, str) else images


def read_spec(model: type[SpecT], values: Mapping[str, Any], where: str, what: str) -> SpecT:
    """A part of the settings that a YAML file or a command line describes.

    Args:
        model: Its kind.
        values: Its fields.
        where: What to call it in a complaint.
        what: Of what an unknown field is no setting, as in `a mixture`.

    Raises:
        InputError: A field is unknown, missing or of the wrong kind, or the parts do not fit each other.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            reason = f"is no setting of {what}; is it spelled right?"
        elif first["type"] == "value_error":
            reason = f"{first['ctx']['error']}"
        elif first["type"] == "missing":
            reason = "is missing."
        else:
            reason = f"is {first['input']!r:.80}: {first['msg'][:1].lower()}{first['msg'][1:]}."
        raise InputError(f"{where}: {f'`{name}` ' if name else ''}{reason}") from error

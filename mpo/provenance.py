"""What a run was made with: the versions of what computes, kept beside its settings."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_builders.shards import write_text

PROVENANCE = "provenance.json"

_PACKAGES = ("mpo", "torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "liger-kernel", "datasets")


def installed_version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The version of Python and of each package that a run's numbers depend on and that is installed."""
    found = {package: installed for package in _PACKAGES if (installed := installed_version(package))}
    return {"python": platform.python_version(), **found}


def add_start(folder: Path, *, num_ranks: int) -> None:
    """Notes in a run's folder that it was started, or started again, when, with what, and on how many ranks."""
    path = folder / PROVENANCE
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []
    time = datetime.now(UTC).isoformat(timespec="seconds")
    starts.append({"time": time, "num_ranks": num_ranks, "versions": versions()})
    write_text(path, json.dumps({"starts": starts}, indent=1) + "\n")

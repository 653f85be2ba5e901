"""What a run was made with: the versions of what computes, kept beside its settings."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("mpo", "torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "liger-kernel", "datasets")


def versions() -> dict[str, str]:
    """The version of Python and of each package that a run's numbers depend on and that is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

"""Whether what is installed fits what mpo was made for: the ranges of its own package metadata."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import requires

from packaging.requirements import Requirement

from mpo.provenance import installed_version

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "liger-kernel")


@dataclass(frozen=True)
class Installed:
    """One package.

    Attributes:
        name: Of the package.
        version: What is installed; None: nothing.
        wanted: The range that mpo is made for; empty where it does not say.
        fits: Whether it is there and in the range.
    """

    name: str
    version: str | None
    wanted: str
    fits: bool


def check_versions(names: Iterable[str] = PACKAGES, requirements: Iterable[str] | None = None) -> list[Installed]:
    """Compares what is installed with what is wanted.

    Args:
        names: Packages to look at.
        requirements: Of mpo, as package metadata have them; None: those of the installed mpo.

    >>> check_versions(["numpy"], ["numpy>=999"])[0].fits
    False
    """
    wanted = {}
    for text in (requires("mpo") or []) if requirements is None else requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            wanted[requirement.name] = requirement.specifier
    found = []
    for name in names:
        installed, specifier = installed_version(name), wanted.get(name)
        fits = installed is not None and (specifier is None or specifier.contains(installed, prereleases=True))
        found.append(Installed(name, installed, str(specifier or ""), fits))
    return found

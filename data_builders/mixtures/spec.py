"""What a mixture is: groups, categories and sources as data, read and checked.

    groups by `weight`  >  categories by `alpha`  >  rewritten and original by `rewritten_share`  >  sources

One group, category and kind is a cell; inside a cell sources share by `weight`, or by how many rows they offer
(`data_builders.mixtures.counts`). Nothing here reads a file. Source of alpha: Zhang et al. 2024, "MM1.5",
https://arxiv.org/abs/2409.20566.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from data_builders.records import InputError
from data_builders.sources import DataSet, Spec, read_spec

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Group(Spec):
    """A part of the mixture with a share of its own.

    Attributes:
        weight: Its share of the whole, relative to the other groups'.
        alpha: Share of each category inside the group, relative to that of the reference, whose alpha is 1.
        reference: The category that `alpha` is relative to.
        rewritten_share: Share of rewritten rows in each category; None takes the mixture's.
    """

    weight: Weight = 1.0
    alpha: dict[str, Weight] = {}
    reference: str | None = None
    rewritten_share: Share | None = None

    @model_validator(mode="after")
    def _names_its_reference(self) -> "Group":
        if self.alpha and self.reference is None:
            raise ValueError("has `alpha` but no `reference`: name the category that alpha is relative to")
        if self.reference is not None and self.alpha.get(self.reference, 1.0) != 1.0:
            given = self.alpha[self.reference]
            raise ValueError(f"gives its reference {self.reference!r} an alpha of {given:g}; it is 1 by definition")
        return self

    @property
    def categories(self) -> dict[str, float]:
        """Every category with its alpha; one without a name where there are none."""
        return {"": 1.0} if self.reference is None else {self.reference: 1.0, **self.alpha}


class Source(DataSet):
    """A data set that gives rows to the mixture.

    Attributes:
        group: The group it belongs to; may be left out where there is one.
        category: The category it belongs to, where its group has categories.
        rewritten: Whether a model rewrote its rows, where the mixture has a `rewritten_share`.
        weight: Its share of the cell, relative to its neighbours'; None goes by what each offers: `repeats` times its
            rows, up to `cap`. 0 leaves it out.
        cap: Rows it gives at most; what it cannot give comes from its neighbours.
        repeats: How many times its rows count; 0.5 counts every second one.
        columns: Keys of its rows that are kept; None keeps all.
    """

    group: str | None = None
    category: str | None = None
    rewritten: bool | None = None
    weight: Weight | None = None
    cap: Annotated[int, Field(ge=1)] | None = None
    repeats: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    columns: list[str] | None = None


class Mixture(Spec):
    """A mixture: its shares, what is mixed, and how many rows.

    Attributes:
        groups: By name.
        rewritten_share: Share of rewritten rows in every group that has none of its own.
        sources: By name.
        total: Rows of the mixture; None makes it as large as it can be with no source giving more than it offers.
    """

    groups: Annotated[dict[str, Group], Field(min_length=1)] = {"all": Group()}
    rewritten_share: Share | None = None
    sources: Annotated[dict[str, Source], Field(min_length=1)]
    total: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _can_be_mixed(self) -> "Mixture":
        cell_members(self)
        return self


class Cell(NamedTuple):
    """Where sources compete with one another; "" where there is no such division."""

    group: str
    category: str
    kind: str

    def __str__(self) -> str:
        """The parts that have names, for messages and tables."""
        return " / ".join(filter(None, self))


def read_mixture(values: Mapping[str, Any], where: str) -> Mixture:
    """The mixture that a YAML file or a command line describes.

    Args:
        values: The fields of a `Mixture`.
        where: What to call it in a complaint.

    Raises:
        InputError: A field is unknown, missing or of the wrong kind, or the parts do not fit each other.
    """
    return read_spec(Mixture, values, where, "a mixture")


def cell_shares(mixture: Mixture) -> dict[Cell, Fraction]:
    """The share of each cell in the whole; they add up to 1.

    Raises:
        InputError: All weights are 0.
    """
    shares = {}
    for group, of_group in _parts({name: group.weight for name, group in mixture.groups.items()}).items():
        kinds = _kinds(mixture, group)
        for category, of_category in _parts(mixture.groups[group].categories).items():
            shares |= {Cell(group, category, kind): of_group * of_category * part for kind, part in kinds.items()}
    return shares


def cell_members(mixture: Mixture) -> dict[Cell, list[str]]:
    """The sources of each cell that has a share, by name, without those of weight 0.

    Raises:
        InputError: A source does not say where it belongs, or to where nothing is; some of a cell have a weight and
            some have none; or a cell has a share and no source.
    """
    shares = cell_shares(mixture)
    members: dict[Cell, list[str]] = {cell: [] for cell, share in shares.items() if share}
    for name in sorted(mixture.sources):
        cell = _cell_of(mixture, name)
        if shares[cell] and mixture.sources[name].weight != 0:
            members[cell].append(name)
    for cell, names in members.items():
        _check_cell(mixture, cell, names, shares[cell])
    return members


def exact(number: float) -> Fraction:
    """The number that was written down, not the nearest binary one.

    >>> exact(0.1)
    Fraction(1, 10)
    """
    return Fraction(str(number))


def _parts(weights: Mapping[str, float]) -> dict[str, Fraction]:
    total = sum(map(exact, weights.values()))
    if not total:
        raise InputError(f"the weights of {', '.join(sorted(weights))} are all 0: nothing would be mixed.")
    return {name: exact(weights[name]) / total for name in sorted(weights)}


def _rewritten_share(mixture: Mixture, group: str) -> float | None:
    own = mixture.groups[group].rewritten_share
    return mixture.rewritten_share if own is None else own


def _kinds(mixture: Mixture, group: str) -> dict[str, Fraction]:
    share = _rewritten_share(mixture, group)
    return {"": Fraction(1)} if share is None else {"rewritten": exact(share), "original": 1 - exact(share)}


def _cell_of(mixture: Mixture, name: str) -> Cell:
    source, groups = mixture.sources[name], mixture.groups
    group = next(iter(groups)) if source.group is None and len(groups) == 1 else source.group
    if group not in groups:
        what = "names no `group`" if group is None else f"names the group {group!r}, which the mixture does not have"
        raise InputError(f"source {name!r} {what}: give it one of {', '.join(sorted(groups))}.")
    categories = groups[group].categories
    category = "" if "" in categories else source.category
    if category not in categories:
        what = "names no `category`" if category is None else f"names the category {category!r}, which is not there"
        raise InputError(f"source {name!r} of group {group!r} {what}: give it one of {', '.join(sorted(categories))}.")
    if _rewritten_share(mixture, group) is None:
        return Cell(group, category, "")
    if source.rewritten is None:
        raise InputError(
            f"source {name!r} does not say whether its rows are `rewritten`, and {group!r} has a `rewritten_share`: "
            "give it `rewritten: true` or `rewritten: false`."
        )
    return Cell(group, category, "rewritten" if source.rewritten else "original")


def _check_cell(mixture: Mixture, cell: Cell, names: list[str], share: Fraction) -> None:
    if not names:
        raise InputError(
            f"{cell} makes {float(share):.1%} of the mixture, and no source belongs to it: add one, or set its share "
            "to 0 in a mixture of your own (copy the preset's lines), so that the others fill it."
        )
    without = [name for name in names if mixture.sources[name].weight is None]
    if 0 < len(without) < len(names):
        raise InputError(
            f"of the sources of {cell}, {', '.join(without)} have no `weight` and the others have one: give it to all "
            "of them, or to none and they share by their rows."
        )

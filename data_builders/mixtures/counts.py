"""How many rows of each source make a mixture, as exact arithmetic.

Shares are fractions, and a number means what its digits say: nothing depends on rounding, on the order of a listing or
on a machine. Nothing here reads a row; `data_builders.mixtures.spec` says what a mixture is.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import floor

from data_builders.mixtures.spec import Mixture, Source, cell_members, cell_shares, exact
from data_builders.records import InputError


def mixture_shares(mixture: Mixture, sizes: Mapping[str, int] | None = None) -> dict[str, Fraction]:
    """The share of each source in the whole, before caps; they add up to 1.

    Args:
        mixture: The spec.
        sizes: Rows of each source; needed where several sources of a cell have no `weight`.

    Raises:
        InputError: A size is needed and missing, or is not positive.
    """
    cells, shares = cell_shares(mixture), dict.fromkeys(sorted(mixture.sources), Fraction(0))
    for cell, names in cell_members(mixture).items():
        weights = _weights(mixture, names, sizes)
        shares |= {name: cells[cell] * weight / sum(weights.values()) for name, weight in weights.items()}
    return shares


def mixture_counts(mixture: Mixture, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many rows each source gives: exactly the total, and every part of the mixture to less than one row.

    A cell, a category, a group and the whole each get the next whole number below or above their exact share. A count
    above the size of its source repeats rows.

    Args:
        mixture: The spec.
        sizes: Rows of each source, by its name.

    Returns:
        By name, sorted; 0 for sources whose share is 0.

    Raises:
        InputError: `sizes` and `mixture.sources` name different sources, a source that has a share has no row, or the
            caps leave too few rows.

    >>> mixture = Mixture(groups={"a": {"weight": 0.7}, "b": {"weight": 0.3}}, total=11,
    ...                   sources={"x": {"group": "a"}, "y": {"group": "b"}})
    >>> mixture_counts(mixture, {"x": 100, "y": 2})
    {'x': 8, 'y': 3}
    """
    if different := sorted(mixture.sources.keys() ^ sizes.keys()):
        raise InputError(f"{', '.join(different)}: every source of the mixture needs a size, and no other has one.")
    members = cell_members(mixture)
    for cell, names in members.items():
        if empty := [name for name in names if sizes[name] < 1]:
            raise InputError(f"source {empty[0]!r} has a share of {cell} and no row: give it rows, or `weight: 0`.")
    shares = mixture_shares(mixture, sizes)
    total = _largest_total(mixture, shares, sizes) if mixture.total is None else mixture.total
    ideals: dict[tuple[str, ...], Fraction] = {}
    for cell, names in members.items():
        weights = {name: shares[name] for name in names}
        caps = {name: cap for name in names if (cap := mixture.sources[name].cap) is not None}
        filled = _filled(total * sum(weights.values()), weights, caps, str(cell))
        ideals |= {(*cell, name): ideal for name, ideal in filled.items()}
    return dict.fromkeys(sorted(mixture.sources), 0) | dict(sorted(_rounded(ideals, total).items()))


def largest_remainder(ideals: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Whole numbers with a given sum, each the next one below or above its ideal; equal remainders go by name.

    >>> largest_remainder({"a": Fraction(5, 2), "b": Fraction(5, 2), "c": Fraction(1)}, 6)
    {'a': 3, 'b': 2, 'c': 1}
    """
    counts = {name: floor(ideal) for name, ideal in ideals.items()}
    by_remainder = sorted(ideals, key=lambda name: (counts[name] - ideals[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _offer(source: Source, size: int) -> int:
    """Rows that a source has to give: each as often as it counts, up to the cap."""
    rows = floor(exact(source.repeats) * size)
    return rows if source.cap is None else min(rows, source.cap)


def _weights(mixture: Mixture, names: list[str], sizes: Mapping[str, int] | None) -> dict[str, Fraction]:
    given = {name: mixture.sources[name].weight for name in names}
    if None not in given.values():
        return {name: exact(weight) for name, weight in given.items()}
    if len(names) == 1:
        return {names[0]: Fraction(1)}
    if sizes is None or not given.keys() <= sizes.keys():
        raise InputError(
            f"{', '.join(names)} share by their numbers of rows, which are not known: give each of them a `weight`."
        )
    weights = {name: Fraction(_offer(mixture.sources[name], sizes[name])) for name in names}
    for name, weight in weights.items():
        if not weight:
            raise InputError(
                f"source {name!r} has {sizes[name]} rows and `repeats` of {mixture.sources[name].repeats:g}, which "
                "leaves none: raise `repeats`, or leave the source out with `weight: 0`."
            )
    return weights


def _largest_total(mixture: Mixture, shares: Mapping[str, Fraction], sizes: Mapping[str, int]) -> int:
    bounds = {name: _offer(mixture.sources[name], sizes[name]) / share for name, share in shares.items() if share}
    smallest = min(bounds, key=lambda name: (bounds[name], name))
    if bounds[smallest] < 1:
        raise InputError(
            f"no row can be mixed without using those of {smallest!r} more often than they count: it has "
            f"{sizes[smallest]} rows for {float(shares[smallest]):.1%} of the mixture. Give `total`, and rows repeat."
        )
    return floor(bounds[smallest])


def _filled(
    amount: Fraction, weights: Mapping[str, Fraction], caps: Mapping[str, int], where: str
) -> dict[str, Fraction]:
    """An amount of rows shared by weight; what is above a cap goes to the others, again by weight."""
    full: dict[str, Fraction] = {}
    while len(full) < len(weights):
        open_ = {name: weight for name, weight in weights.items() if name not in full}
        unit = (amount - sum(full.values())) / sum(open_.values())
        over = [name for name, weight in open_.items() if name in caps and unit * weight > caps[name]]
        if not over:
            return full | {name: unit * weight for name, weight in open_.items()}
        full |= {name: Fraction(caps[name]) for name in over}
    if (room := sum(full.values())) < amount:
        raise InputError(
            f"{where} has to give {float(amount):,.1f} rows, and the caps of its sources allow {int(room):,}: raise a "
            "`cap` or lower `total`."
        )
    return full


def _rounded(ideals: Mapping[tuple[str, ...], Fraction], total: int) -> dict[str, int]:
    """From the whole down to the sources: what a part got is shared by largest remainder among its own parts."""
    if all(len(path) == 1 for path in ideals):
        return largest_remainder({path[0]: ideal for path, ideal in ideals.items()}, total)
    inside: dict[str, dict[tuple[str, ...], Fraction]] = {}
    for path, ideal in ideals.items():
        inside.setdefault(path[0], {})[path[1:]] = ideal
    wholes = largest_remainder({name: sum(part.values(), Fraction(0)) for name, part in inside.items()}, total)
    return {name: count for key, part in inside.items() for name, count in _rounded(part, wholes[key]).items()}

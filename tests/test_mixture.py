"""How many rows each source gives, and in which order: exact, and dependent on nothing but spec, sizes and seed."""

import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import pytest

from data_builders.mixtures.counts import largest_remainder, mixture_counts, mixture_shares
from data_builders.mixtures.order import mixture_order
from data_builders.mixtures.spec import Mixture, cell_members, cell_shares, read_mixture
from data_builders.records import InputError, Row

ROOT = Path(__file__).parent.parent


def mixed(total: int | None = None, sizes: dict[str, int] | None = None, **sources: Row) -> dict[str, int]:
    """Counts of a mixture of one group; 100 rows in every source unless told."""
    mixture = read_mixture({"sources": sources, "total": total}, "test")
    return mixture_counts(mixture, dict.fromkeys(sources, 100) | (sizes or {}))


def random_mixture(seed: int) -> tuple[Row, dict[str, int]]:
    """One to four groups, some with categories, some half rewritten; one to three sources in each cell."""
    draw = random.Random(seed)
    groups, sources, sizes = {}, {}, {}
    for group in "abcd"[: draw.randint(1, 4)]:
        names = [f"k{number}" for number in range(draw.choice([0, 2, 5]))]
        groups[group] = {"weight": draw.randint(1, 99) / 100}
        if names:
            alpha = {name: draw.randint(1, 40) / 10 for name in names[1:]}
            groups[group] |= {"reference": names[0], "alpha": alpha}
        if draw.random() < 0.5:
            groups[group]["rewritten_share"] = draw.randint(1, 9) / 10
        for category in names or [None]:
            for rewritten in (True, False):
                weighted = draw.random() < 0.5
                for _ in range(draw.randint(1, 3)):
                    name = f"s{len(sources)}"
                    source = {"group": group, "category": category, "rewritten": rewritten}
                    sources[name] = {**source, "weight": draw.randint(1, 50) / 10 if weighted else None}
                    sizes[name] = draw.randint(1, 5000)
                if "rewritten_share" not in groups[group]:
                    break
    return {"groups": groups, "sources": sources, "total": draw.choice([1, 7, 1000, 99_991])}, sizes


def shuffled(values: Row, draw: random.Random) -> Row:
    return dict(draw.sample(list(values.items()), len(values)))


@pytest.mark.parametrize("seed", range(40))
def test_totals_are_exact_and_every_part_is_less_than_a_row_from_its_share(seed: int) -> None:
    values, sizes = random_mixture(seed)
    mixture, total = Mixture(**values), values["total"]
    counts, shares, cells = mixture_counts(mixture, sizes), mixture_shares(mixture, sizes), cell_shares(mixture)
    assert sum(counts.values()) == total
    assert sum(shares.values()) == sum(cells.values()) == 1
    assert all(abs(counts[name] - total * share) < 1 for name, share in shares.items())
    parts, wanted = Counter(), defaultdict(Fraction)
    for cell, names in cell_members(mixture).items():
        for depth in (1, 2, 3):
            parts[cell[:depth]] += sum(counts[name] for name in names)
            wanted[cell[:depth]] += total * cells[cell]
    assert all(abs(parts[part] - ideal) < 1 for part, ideal in wanted.items())


@pytest.mark.parametrize("seed", range(10))
def test_the_order_in_which_things_are_listed_changes_nothing(seed: int) -> None:
    values, sizes = random_mixture(seed)
    draw = random.Random(seed)
    other = {key: shuffled(values[key], draw) for key in ("sources", "groups")} | {"total": values["total"]}
    assert mixture_counts(Mixture(**other), shuffled(sizes, draw)) == mixture_counts(Mixture(**values), sizes)


def test_the_seed_of_hashes_changes_nothing() -> None:
    values, sizes = random_mixture(3)
    code = (
        "import json, sys; from data_builders.mixtures.counts import *; from data_builders.mixtures.order import *\n"
        "values, sizes = json.load(sys.stdin); counts = mixture_counts(Mixture(**values), sizes)\n"
        "print(counts, list(mixture_order(counts, sizes, seed=1).between(0, 500)))"
    )
    said = set()
    for seed in ("1", "2"):
        settings = {"cwd": ROOT, "env": {"PYTHONHASHSEED": seed}, "capture_output": True, "text": True, "check": True}
        said.add(subprocess.run([sys.executable, "-c", code], input=json.dumps([values, sizes]), **settings).stdout)
    assert len(said) == 1
    assert "s0" in said.pop()


def test_what_is_left_after_rounding_goes_to_the_largest_remainders_and_ties_go_by_name() -> None:
    assert largest_remainder({"b": Fraction(9, 4), "a": Fraction(3, 2), "c": Fraction(1, 4)}, 4) == {
        "a": 2,
        "b": 2,
        "c": 0,
    }
    assert largest_remainder({"y": Fraction(1, 2), "x": Fraction(1, 2)}, 1) == {"x": 1, "y": 0}


def test_weights_mean_what_their_digits_say() -> None:
    counts = mixed(10, x={"weight": 0.1}, y={"weight": 0.2}, z={"weight": 0.7})  # 0.1 + 0.2 is no 0.3 in binary
    assert counts == {"x": 1, "y": 2, "z": 7}
    mixture = Mixture(sources={"x": {"weight": 0.1}, "y": {"weight": 0.2}})
    assert mixture_shares(mixture) == {"x": Fraction(1, 3), "y": Fraction(2, 3)}
    assert mixed(15, a={"weight": 0.7}, b={"weight": 0.1}, c={"weight": 0.2}) == {"a": 11, "b": 1, "c": 3}  # 10.5, 1.5


def test_without_weights_sources_share_by_their_rows() -> None:
    assert mixed(30, {"big": 200}, big={}, small={}) == {"big": 20, "small": 10}


def test_without_a_total_and_weights_everything_is_taken_as_often_as_it_counts() -> None:
    counts = mixed(None, {"x": 11}, x={}, twice={"repeats": 2}, half={"repeats": 0.5}, some={"cap": 30})
    assert counts == {"x": 11, "twice": 200, "half": 50, "some": 30}


def test_without_a_total_the_mixture_grows_until_a_source_is_used_up() -> None:
    assert mixed(None, {"x": 10}, x={"weight": 1}, y={"weight": 3}) == {"x": 10, "y": 30}
    assert mixed(None, {"x": 10}, x={"weight": 1, "repeats": 2}, y={"weight": 3}) == {"x": 20, "y": 60}
    assert mixed(None, {"x": 10}, x={"weight": 1, "cap": 4}, y={"weight": 3}) == {"x": 4, "y": 12}


def test_with_a_total_a_small_source_is_repeated() -> None:
    assert mixed(100, {"x": 8}, x={"weight": 1}, y={"weight": 1}) == {"x": 50, "y": 50}


def test_what_a_capped_source_cannot_give_its_neighbours_give_by_weight() -> None:
    sources = {"x": {"weight": 6, "cap": 10}, "y": {"weight": 3}, "z": {"weight": 1}}
    assert mixed(90, **sources) == {"x": 10, "y": 60, "z": 20}
    sources["y"]["cap"] = 55  # full only once what `x` cannot give has come to it
    assert mixed(90, **sources) == {"x": 10, "y": 55, "z": 25}


def test_a_cap_moves_nothing_from_one_group_to_another() -> None:
    groups = {"a": {"weight": 0.5}, "b": {"weight": 0.5}}
    sources = {"x": {"group": "a", "cap": 5}, "y": {"group": "a"}, "z": {"group": "b"}}
    mixture = Mixture(groups=groups, sources=sources, total=40)
    counts = mixture_counts(mixture, {"x": 100, "y": 100, "z": 100})
    assert counts == {"x": 1, "y": 19, "z": 20}  # `x` counts as 5 rows beside 100


def test_sources_without_a_share_give_nothing_and_may_be_empty() -> None:
    assert mixed(10, {"out": 0}, x={}, out={"weight": 0}) == {"out": 0, "x": 10}
    groups = {"a": {"weight": 1}, "b": {"weight": 0}}
    mixture = Mixture(groups=groups, sources={"x": {"group": "a"}, "y": {"group": "b"}}, total=3)
    assert mixture_counts(mixture, {"x": 9, "y": 0}) == {"x": 3, "y": 0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": {"x": {"wieght": 1}}}, r"`sources\.x\.wieght` is no setting"),
        ({"sources": {}}, "`sources` is {}: dictionary should have at least 1 item"),
        ({"sources": {"x": {"weight": -1}}}, "`sources.x.weight` is -1: input should be greater than or equal to 0"),
        ({"sources": {"x": {"weight": float("inf")}}}, "finite"),
        ({"sources": {"x": {"cap": 0}}}, "`sources.x.cap` is 0"),
        ({"sources": {"x": {"repeats": 0}}}, "`sources.x.repeats` is 0"),
        ({"sources": {"x": {"image_folder": "../y"}}}, "must be a folder below the image root"),
        ({"sources": {"x": {}}, "total": 0}, "`total` is 0"),
        ({"sources": {"x": {}}, "rewritten_share": 1.5}, "less than or equal to 1"),
        ({"sources": {"x": {}, "y": {"weight": 1}}}, "x have no `weight` and the others have one"),
        (
            {"sources": {"x": {"group": "b"}}},
            "names the group 'b', which the mixture does not have: give it one of all",
        ),
        ({"groups": {"a": {}, "b": {}}, "sources": {"x": {}}}, "names no `group`: give it one of a, b"),
        (
            {"groups": {"a": {}, "b": {}}, "sources": {"x": {"group": "a"}}},
            "b makes 50.0% of the mixture, and no source",
        ),
        ({"groups": {"a": {"weight": 0}}, "sources": {"x": {}}}, "the weights of a are all 0"),
        ({"sources": {"x": {"weight": 0}}}, "no source belongs to it"),
        ({"groups": {"a": {"alpha": {"k": 1}}}, "sources": {"x": {}}}, "has `alpha` but no `reference`"),
        (
            {"groups": {"a": {"reference": "k", "alpha": {"k": 2}}}, "sources": {"x": {}}},
            "gives its reference 'k' an alpha of 2; it is 1 by definition",
        ),
        ({"groups": {"a": {"reference": "k"}}, "sources": {"x": {}}}, "names no `category`: give it one of k"),
        (
            {"groups": {"a": {"reference": "k"}}, "sources": {"x": {"category": "l"}}},
            "names the category 'l', which is not there: give it one of k",
        ),
        ({"rewritten_share": 0.7, "sources": {"x": {}}}, "does not say whether its rows are `rewritten`"),
        (
            {"rewritten_share": 0.7, "sources": {"x": {"rewritten": True}}},
            "all / original makes 30.0% of the mixture, and no source belongs to it",
        ),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused_with_advice(values: Row, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_mixture(values, "the mixture")


def test_sizes_that_do_not_fit_are_refused_with_advice() -> None:
    mixture = Mixture(sources={"x": {}, "y": {}}, total=10)
    with pytest.raises(InputError, match=r"y, z: every source of the mixture needs a size"):
        mixture_counts(mixture, {"x": 1, "z": 1})
    with pytest.raises(InputError, match="share by their numbers of rows, which are not known: give each of them"):
        mixture_shares(mixture)
    with pytest.raises(InputError, match=r"source 'y' has a share of all and no row"):
        mixture_counts(mixture, {"x": 1, "y": 0})
    with pytest.raises(InputError, match=r"1 rows and `repeats` of 0\.5, which leaves none"):
        mixed(10, {"x": 1}, x={"repeats": 0.5}, y={})
    with pytest.raises(InputError, match=r"has to give 50\.0 rows, and the caps of its sources allow 12"):
        mixed(50, x={"cap": 5}, y={"cap": 7})
    with pytest.raises(InputError, match=r"without using those of 'x' more often than they count: .* Give `total`"):
        mixed(None, {"x": 1}, x={"repeats": 0.5, "weight": 1}, y={"weight": 1})


def test_the_order_is_the_same_on_every_machine() -> None:
    order = mixture_order({"a": 5, "b": 3, "none": 0}, {"a": 2, "b": 100, "none": 7}, seed=7)
    assert list(order.between(0, 4)) == [("a", 1), ("a", 0), ("b", 71), ("b", 5)]
    assert list(order.between(4, 8)) == [("b", 45), ("a", 0), ("a", 1), ("a", 0)]


def test_a_source_is_repeated_in_whole_passes_and_a_part() -> None:
    order = mixture_order({"a": 25, "b": 4}, {"a": 10, "b": 10}, seed=0)
    uses = Counter(order.between(0, 29))
    assert sorted(uses[("a", row)] for row in range(10)) == [2] * 5 + [3] * 5
    assert sorted(uses[("b", row)] for row in range(10)) == [0] * 6 + [1] * 4
    other = Counter(mixture_order({"a": 25, "b": 4}, {"a": 10, "b": 10}, seed=1).between(0, 29))
    assert other != uses


def test_a_larger_mixture_keeps_the_rows_of_a_smaller_one_in_their_order() -> None:
    sizes = {"a": 50, "b": 50}
    small = list(mixture_order({"a": 20, "b": 10}, sizes, seed=0).between(0, 30))
    large = list(mixture_order({"a": 30, "b": 40}, sizes, seed=0).between(0, 70))
    assert [use for use in large if use in set(small)] == small


def test_every_part_of_the_mixture_has_something_of_every_source() -> None:
    order = mixture_order({"a": 9000, "b": 1000}, {"a": 3000, "b": 8000}, seed=0)
    tenths = [Counter(name for name, _ in order.between(start, start + 1000))["b"] for start in range(0, 10_000, 1000)]
    assert all(70 < count < 130 for count in tenths)  # three standard deviations around 100
    rows = [row for name, row in order.between(0, 10_000) if name == "b"]
    assert 3500 < sum(rows) / len(rows) < 4500  # the part of `b` is from all over it

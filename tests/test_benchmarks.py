"""The benchmarks run, count tokens as they should, and say what they measured; no figure is ever asserted."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def step() -> Any:
    """The script as a module, which finds `models.py` beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield import_module("step")
        for name in ("step", "models", "harness"):
            del sys.modules[name]


@pytest.fixture
def script(request: pytest.FixtureRequest) -> Any:
    """Likewise, another one, whose name is the fixture's parameter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        before = sys.modules.keys() & {"step", "models", "harness"}
        yield import_module(request.param)
        for name in {request.param, "models", "harness"} - before:
            del sys.modules[name]


@pytest.fixture(scope="module")
def results(step: ModuleType) -> dict[str, Any]:
    """Pictures of 4 tokens, prompts of 16 and responses of 8, through a model of one layer."""
    models = sys.modules["models"]
    sizes = models.Sizes(vocabulary=64, width=16, inner=32, layers=1, heads=2, tower=16, side=2)
    with_pictures, dropout_ntp, pairs_of_a_question, text = models.workloads(16, 8, 1)
    return step.run([with_pictures, dropout_ntp, pairs_of_a_question, text], sizes, rounds=1)


def test_every_workload_is_measured_with_every_method(results: dict[str, Any]) -> None:
    methods = {result["workload"]: list(result["methods"]) for result in results["workloads"]}
    gpu = ["flex"] if torch.cuda.is_available() else []
    assert methods == {
        "pair": ["trl", "plain", "shared", "cached", *gpu, "floor"],
        "dropout_ntp": ["trl", "plain", "shared", "cached", *gpu, "floor"],
        "15_pairs": ["trl", "shared", "grouped", "cached", *gpu, "floor"],
        "text": ["trl", "plain", "shared", "cached", "floor"],
    }
    assert json.loads(json.dumps(results)) == results


@pytest.mark.parametrize(
    ("workload", "tokens", "micro_batches"),
    [
        ("pair", {"trl": 2 * 24, "plain": 2 * 24, "shared": 16 + 2 * 8 + 1, "floor": 33}, 1),
        ("dropout_ntp", {"trl": 2 * 24, "plain": 2 * 24, "shared": 16 + 4 + 2 * 4 + 1, "floor": 29}, 1),
        ("15_pairs", {"trl": 15 * 48, "shared": 15 * 33, "grouped": 16 + 8 * 8 + 7}, 15),
    ],
)
def test_tokens_are_those_of_the_rows_and_each_branch_has_one_copy(
    results: dict[str, Any], workload: str, tokens: dict[str, int], micro_batches: int
) -> None:
    (result,) = (result for result in results["workloads"] if result["workload"] == workload)
    assert {name: result["methods"][name]["tokens"] for name in tokens} == tokens
    assert result["methods"]["trl"]["micro_batches"] == micro_batches
    assert result["pairs"] == micro_batches


def test_every_target_is_in_the_table_with_what_was_measured(step: ModuleType, results: dict[str, Any]) -> None:
    targets = {
        (result["workload"], ratio["what"]): ratio["at_least"] or ratio["at_most"]
        for result in results["workloads"]
        for ratio in result["ratios"]
        if ratio["met"] is not None
    }
    assert targets == {
        ("pair", "trl / shared"): 1.6,
        ("pair", "shared / floor"): 1.15,
        ("pair", "peak memory, shared / trl"): 0.85,
        ("dropout_ntp", "trl / shared"): 1.8,
        ("dropout_ntp", "shared / floor"): 1.15,
        ("15_pairs", "trl / grouped"): 9.0,
        ("15_pairs", "grouped / floor"): 1.15,
        ("text", "trl / shared"): 0.95,
        ("text", "shared / floor"): 1.15,
    }
    console = Console(width=150)
    with console.capture() as captured:
        console.print(*step.tables(results))
    shown = captured.get()
    assert "15_pairs, 16 + 8" in shown
    assert ">= 1.6" in shown
    assert "reference pass, trl / grouped" in shown
    if not torch.cuda.is_available():
        assert "not run: no GPU" in shown


def test_a_ratio_has_a_median_quartiles_and_a_verdict(step: ModuleType) -> None:
    ratio = step.ratio_of("a / b", [1.0, 2.0, 3.0, 4.0, 5.0], at_least=3.5)
    assert (ratio["low"], ratio["median"], ratio["high"], ratio["met"]) == (2.0, 3.0, 4.0, False)
    assert step.ratio_of("a / b", [3.0], at_most=3.0)["met"] is True
    assert step.ratio_of("a / b", [3.0])["met"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts a CPU's memory")
def test_peak_memory_counts_what_lives_at_the_same_time(step: ModuleType) -> None:
    def compute() -> None:
        first = torch.ones(1_000_000)  # 4 MB
        second = first + 1
        del first
        third = second.repeat(2)
        del second, third

    assert step.peak_of(compute) == pytest.approx(12_000_000, rel=1e-3)


@pytest.mark.parametrize("script", ["packing"], indirect=True)
def test_packing_is_measured_on_the_same_rows_and_leaves_out_the_padding(script: ModuleType) -> None:
    sizes = sys.modules["models"].Sizes(vocabulary=64, width=16, inner=32, layers=1, heads=2, tower=16, side=2)
    results = script.run(script.workloads(3, 12), sizes, rounds=1)
    equal, varied, texts = results["workloads"]
    assert equal["tokens"] == {"padded": 3 * (4 + 8 + 12), "packed": 3 * (4 + 8 + 12)}
    assert equal["padding"] == 0 < varied["padding"]
    for result in (equal, varied, texts):
        assert result["loss"]["packed"] == pytest.approx(result["loss"]["padded"], abs=2e-5)
    assert json.loads(json.dumps(results)) == results
    console = Console(width=150)
    with console.capture() as captured:
        console.print(script.table(results))
    assert "pictures, equal lengths" in captured.get()


@pytest.mark.parametrize("script", ["sampling"], indirect=True)
def test_sampling_is_measured_with_the_lengths_that_it_says(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = script
    sizes = sys.modules["models"].Sizes(vocabulary=64, width=16, inner=32, layers=1, heads=2, tower=16, side=2)
    given = []
    generate = sampling.generate

    def spy(sampler: Any, requests: Any, *arguments: Any) -> list[str]:
        given.append((sampler._encode(requests)["input_ids"].shape, generate(sampler, requests, *arguments)))
        return given[-1][1]

    monkeypatch.setattr(sampling, "generate", spy)
    results = sampling.run(sampling.workloads(16, 6, 2, sequences=32), sizes, rounds=1)
    names = [result["workload"] for result in results["workloads"]]
    assert names == ["N = 8", "N = 32", "N = 32, varied"]
    assert [tuple(shape) for shape, _ in given[::2]] == [(4, 16), (1, 16), (1, 16)]
    lengths = [{len(text.split()) for text in texts} for _, texts in given[::2]]
    assert lengths[:2] == [{6}, {6}]
    assert min(lengths[2]) < 6
    assert json.loads(json.dumps(results)) == results
    console = Console(width=150)
    with console.capture() as captured:
        console.print(sampling.table(results))
    assert "4 x 16 + 6" in captured.get()

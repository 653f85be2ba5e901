"""The study in `examples/study`: its plan, its statistics, and that its README says what its results say."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SIZES, SMALL

from data_builders.records import InputError
from data_builders.shards import read_rows
from mpo import digits
from mpo.cli import VERBS
from mpo.settings import read_values

FOLDER = ROOT / "examples" / "study"
MODULES = ("plan", "tasks", "measures", "steps", "claims", "figures", "report", "run")


@pytest.fixture(scope="module", autouse=True)
def _from_the_root() -> Iterator[None]:
    """`examples` is found from the checkout's root, as `python -m examples.study.run` finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield
        for name in [name for name in sys.modules if name == "examples" or name.startswith("examples.")]:
            del sys.modules[name]


@pytest.fixture
def study() -> Any:
    return module("plan").read_study(FOLDER / "study.yaml")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return list(read_rows(FOLDER / "results.jsonl"))


def module(name: str) -> Any:
    return import_module(f"examples.study.{name}")


class AtOnce:
    """An executor that does everything where it is asked to."""

    def submit(self, function: Any, *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def record(kind: str, task: str, seed: int, method: str, rate: float | None, **numbers: Any) -> dict[str, Any]:
    names = ("cot", "direct", "hallucination", "seconds")
    return {
        "kind": kind,
        "task": task,
        "seed": seed,
        "method": method,
        "rate": rate,
        **dict.fromkeys(names, 0.0),
    } | numbers


def done(job: Any, **numbers: Any) -> dict[str, Any]:
    return record(**asdict(job), **numbers)


def test_every_method_of_a_task_is_tuned_alike(study: Any) -> None:
    jobs = module("plan").plan(study)
    for task, settings in study.tasks.items():
        for method in study.tuned(task):
            own = [job for job in jobs if (job.task, job.method) == (task, method)]
            tried = [(job.rate, job.seed) for job in own if job.rate]
            assert sorted(tried) == sorted((rate, seed) for rate in settings["learning_rates"] for seed in (0, 1))
            fixed = [job.seed for job in own if job.rate is None]
            assert fixed == study.seeds[2:]
    assert len(study.seeds) == 10
    assert len(set(jobs)) == len(jobs)


def test_the_claims_and_methods_are_those_that_were_asked_for(study: Any) -> None:
    assert set(study.tasks["context"]["methods"]) == {
        *("further_sft", "rft", "dpo", "bco", "dpo_sft", "bco_sft", "mpo", "mpo_no_shift", "mpo_exponential"),
        *("mpo_ntp_25", "mpo_ntp_50", "mpo_ntp_75", "mpo_with_image", "mpo_grouped", "mpo_two_rounds"),
        *("mpo_light_sft", "dpo_moving", "mpo_moving", "mpo_ten_times"),
    }
    settings = [{key: value for key, value in method.items() if key != "name"} for method in study.methods.values()]
    assert all(settings.count(own) == 1 for own in settings)  # no two methods are the same one
    weights = {name: method.get("train", {}).get("loss_weights") for name, method in study.methods.items()}
    assert weights == dict.fromkeys(study.methods) | {
        "rft": [0.0, 0.0, 1.0],
        "dpo": [1.0, 0.0, 0.0],
        "bco": [0.0, 1.0, 0.0],
        "dpo_sft": [1.0, 0.0, 1.0],
        "bco_sft": [0.0, 1.0, 1.0],
        "mpo_light_sft": [0.8, 0.2, 0.01],
        "dpo_moving": [1.0, 0.0, 0.0],
    }
    assert {claim["measure"] for claim in study.claims} == {"cot", "direct", "gap", "faithful"}
    assert {claim["is"] for claim in study.claims} == {"more", "not_less"}


def test_the_rate_with_the_best_mean_over_both_styles_and_tuning_seeds_is_taken(study: Any) -> None:
    plan = module("plan")
    accuracies = {(1e-4, 0): (50, 30), (1e-4, 1): (52, 30), (2.5e-4, 0): (60, 20), (2.5e-4, 1): (55, 30)}
    rows = [
        record("train", "context", seed, "mpo", rate, cot=cot, direct=direct)
        for (rate, seed), (cot, direct) in accuracies.items()
    ]
    assert plan.rate_means(study, plan.by_job(rows), "context", "mpo") == {1e-4: 40.5, 2.5e-4: 41.25}
    assert plan.chosen_rate(study, plan.by_job(rows), "context", "mpo") is None  # others are missing
    others = study.tasks["context"]["learning_rates"][:2] + [6e-4]
    rows += [
        record("train", "context", seed, "mpo", rate, cot=41.0, direct=41.0) for rate in others for seed in (0, 1)
    ]
    assert plan.chosen_rate(study, plan.by_job(rows), "context", "mpo") == 2.5e-4
    assert plan.chosen_rate(study, plan.by_job(rows), "context", "mpo_ten_times") == pytest.approx(2.5e-3)


def test_jobs_wait_for_what_they_need_and_are_done_once(study: Any, tmp_path: Path) -> None:
    run, plan = module("run"), module("plan")
    order: list[Any] = []

    def do(_study: Any, job: Any, output: Path, command: str) -> dict[str, Any]:
        order.append(job)
        return done(job, cot=1.0)

    jobs = plan.plan(study)
    results = tmp_path / "results.jsonl"
    results.touch()
    assert run.run_jobs(study, jobs, tmp_path, "", AtOnce(), 2, None, do)
    assert Counter(job.kind for job in order) == {"base": 20, "train": len(jobs) - 20}
    assert all(job.rate for job in order if job.kind == "train")
    places = {(job.kind, job.task, job.seed): place for place, job in reversed(list(enumerate(order)))}
    assert places["base", "context", 3] < places["train", "context", 3]
    assert run.run_jobs(study, jobs, tmp_path, "", AtOnce(), 2, None, do)
    assert len(order) == len(jobs) == len(list(read_rows(results)))
    tests = plan.final_jobs(study, plan.by_job(read_rows(results)))
    assert Counter((job.task, job.method) for job in tests)["context", "sft"] == 10
    assert len(tests) == 10 * sum(1 + len(settings["methods"]) for settings in study.tasks.values())


def test_bases_with_a_line_from_elsewhere_are_made_again_where_they_are_needed(study: Any, tmp_path: Path) -> None:
    run, plan = module("run"), module("plan")
    jobs = plan.plan(study)
    base, other, here = (plan.Job("base", "context", seed) for seed in (0, 1, 2))
    folder = plan.base_folder(tmp_path, "context", 2)
    folder.mkdir(parents=True)
    (folder / "complete").touch()
    needed = [job for job in jobs if job.kind == "train" and job.seed in (0, 2) and job.method == "mpo_ten_times"]
    rates = [
        record("train", "context", seed, "mpo", rate) for seed in (0, 1) for rate in (1.6e-5, 4e-5, 1e-4, 2.5e-4, 6e-4)
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in [*map(done, (base, other, here)), *rates]))
    order: list[Any] = []

    def do(_study: Any, job: Any, output: Path, command: str) -> dict[str, Any]:
        order.append((job.kind, job.seed))
        return done(job)

    assert run.run_jobs(study, needed, tmp_path, "", AtOnce(), 2, None, do)
    assert order == [("base", 0), ("train", 0), ("train", 2)]
    assert len(list(read_rows(results))) == 3 + 10 + 2


def test_a_stopped_study_starts_nothing_new(study: Any, tmp_path: Path) -> None:
    run, plan = module("run"), module("plan")
    (tmp_path / "results.jsonl").touch()
    assert not run.run_jobs(study, plan.plan(study), tmp_path, "", AtOnce(), 2, 0.0, None)
    assert (tmp_path / "results.jsonl").read_text() == ""


def test_a_file_that_is_like_another_changes_it(study: Any, tmp_path: Path) -> None:
    quick = module("plan").read_study(FOLDER / "quick.yaml")
    assert list(quick.tasks) == ["context"]
    assert quick.verbs["train"] == study.verbs["train"]
    assert quick.bases["context"]["compose"] == "ascending"
    assert {claim["task"] for claim in quick.claims} == {"context"}
    (tmp_path / "bad.yaml").write_text("like: study.yaml\ntasks: {context: {methods: [mpo, magic]}}\n")
    (tmp_path / "study.yaml").write_text((FOLDER / "study.yaml").read_text())
    with pytest.raises(InputError, match=r"names \['magic'\], which is not described"):
        module("plan").read_study(tmp_path / "bad.yaml")


def test_the_verbs_take_the_settings_of_the_yaml(study: Any) -> None:
    steps = module("steps")
    paths = {"model_name_or_path": "m", "data": ["d"], "output_dir": "o", "learning_rate": 6e-5}
    of_verb: dict[str, list[dict[str, Any]]] = {"sft": [study.verbs["trainer"], paths]}
    of_verb["train"] = [study.verbs["trainer"], paths, {"train": ["vision"]}]
    of_verb |= {
        "sample": [{"model": "m", "questions": "q", "output": "o"}],
        "judge": [{"responses": "r", "output": "o"}],
    }
    of_verb["pair"] = [{"verdicts": "v", "output": "o", "max_per_source": 512}]
    of_verb["dropout-ntp"] = [{"model": "m", "responses": "r", "output": "o", "ratio": 0.25}]
    of_verb["eval"] = [{"models": ["model=m"], "questions": "q", "output": "o"}]
    for verb, own in of_verb.items():
        configs = import_module(VERBS[verb].module).CONFIGS
        for method in study.methods.values() if verb == "train" else [{}]:
            read = read_values(verb, configs, steps._argv(study.verbs[verb], *own, method.get("train", {})))
            if verb == "train":
                assert read[-1]["learning_rate"] == 6e-5


def test_bits_survive_packing() -> None:
    measures = module("measures")
    bits = [True, False, False, True, True, False, True, False, True, True]
    assert measures.pack(bits) == "msA="  # 10011010 11000000
    assert measures.unpack("msA=", 10).tolist() == bits


def test_answers_are_measured_by_hand() -> None:
    """Two questions: the first reads 4 after 3 where the picture shows 9; the second reads all and miscounts."""
    rows = [
        (
            "final_answer",
            "first is 3. second is 4, sum 7. third is 1, sum 8. fourth is 1, sum 9. Final answer: 9",
            "9",
        ),
        ("final_answer", "first is 5, count 1. second is 5, count 2. third is 0. fourth is 8. Final answer: 2", "2"),
        ("direct", "14", "14"),
        ("direct", "3", "3"),
    ]
    asked = [("sum", "What is the sum?", [3, 9, 1, 1], "14"), ("count", "digits larger than 4?", [5, 5, 0, 8], "3")]
    answers = [
        {
            "style": style,
            "response": response,
            "prediction": prediction,
            "verdict": "correct" if prediction == answer else "wrong",
            "source": source,
            "question": question,
            "digits": shown,
        }
        for (style, response, prediction), (source, question, shown, answer) in zip(rows, asked * 2, strict=True)
    ]
    found = module("measures").measure_answers(answers)
    assert (found["cot"], found["direct"], found["num"]) == (0.0, 100.0, 2)
    assert found["reading"] == 100 * 7 / 8
    assert found["hallucination"] == pytest.approx(100 / 6)  # of six places at which picture and context disagree
    assert module("measures").unpack(found["hallucinated_bits"], 2).tolist() == [True, False]
    assert found["consistent"] == 50.0  # 3 + 4 + 1 + 1 is 9; three digits are larger than 4
    assert found["characters"] == mean(len(row[1]) for row in rows[:2])


def test_neighbours_follow_as_often_as_asked_and_only_where_asked() -> None:
    scans = digits.split_scans(0)["sft"]
    rng = np.random.default_rng(0)
    chosen = scans.labels[module("tasks").ascending(0.8)(scans, 4000, rng)]
    follows = (chosen[:, 1:] == (chosen[:, :-1] + 1) % 10).mean()
    assert follows == pytest.approx(0.8 + 0.2 / 10, abs=0.01)
    assert np.bincount(chosen[:, 0], minlength=10).min() > 300
    any_four = scans.labels[digits.any_scans(scans, 4000, rng)]
    assert (any_four[:, 1:] == (any_four[:, :-1] + 1) % 10).mean() == pytest.approx(0.1, abs=0.015)


def tuning(study: Any) -> list[dict[str, Any]]:
    """Runs that make 1.6e-5 MPO's rate: all alike, and the first counts."""
    rates = study.tasks["context"]["learning_rates"]
    return [record("train", "context", seed, "mpo", rate) for rate in rates for seed in study.tuning_seeds]


def some_seeds(study: Any, better: list[list[int]], worse: list[list[int]]) -> Any:
    """The finding on the first claim, MPO over SFT, from the right and wrong answers of each seed."""
    pack, names = module("measures").pack, ("cot_bits", "direct_bits", "hallucinated_bits")
    rows = [
        record("test", "context", seed, method, rate, num=len(bits), **dict.fromkeys(names, pack(bits)))
        for method, rate, seeds in (("mpo", 1.6e-5, better), ("sft", 0.0, worse))
        for seed, bits in enumerate(seeds)
    ]
    return module("claims").findings(study, module("plan").by_job([*rows, *tuning(study)]))[0]


def test_a_paired_difference_and_its_interval_are_students(study: Any) -> None:
    found = some_seeds(study, [[1, 1, 1, 0], [1, 1, 0, 1]], [[1, 0, 1, 0], [0, 1, 0, 0]])
    assert found.by_seed == [25.0, 50.0]
    assert found.mean == 37.5
    assert found.high - found.mean == pytest.approx(12.7062 * 12.5, abs=0.01)  # t(0.975, 1) x standard error
    # variances of (0, 1, 0, 0) and (1, 0, 0, 1) are 1/4 and 1/3; each mean has a quarter of it
    assert found.over_questions == pytest.approx(1.96 * 100 * math.sqrt(1 / 16 + 1 / 12) / 2, abs=0.01)
    assert found.verdict == "undecided"
    assert some_seeds(study, [[1, 1, 1, 1]] * 2, [[0, 0, 0, 0]] * 2).verdict == "supported"
    assert some_seeds(study, [[0, 0, 0, 0]] * 2, [[1, 1, 1, 1]] * 2).verdict == "contradicted"
    assert some_seeds(study, [[1, 1, 1, 1]], [[0, 0, 0, 0]]).verdict == "not run"


def test_seeds_that_were_begun_last_are_also_shown_alone(study: Any) -> None:
    found = some_seeds(study, [[0, 0], [1, 0], *[[0, 0]] * 3, [1, 1], [1, 0]], [[0, 0]] * 7)
    assert found.by_seed == [0.0, 50.0, 0.0, 0.0, 0.0, 100.0, 50.0]
    assert found.replication["mean"] == 75.0
    assert found.replication["high"] - 75.0 == pytest.approx(12.7062 * 25.0, abs=0.01)
    assert "| +75.0 (-242.7 to +392.7) | undecided |" in module("report").claims_table(study, [found])
    assert some_seeds(study, [[1, 1]] * 6, [[0, 0]] * 6).replication == {}  # one seed has no interval


def test_p_values_are_students_and_corrected_by_holm() -> None:
    claims = module("claims")
    assert claims.p_value([1.0, 2.0, 3.0], 0.0) == pytest.approx(0.0742, abs=1e-4)  # t = 3.464 with 2 degrees
    assert claims.p_value([1.0, 2.0, 3.0], 2.0) == pytest.approx(1.0)
    assert claims.holm([0.012, 0.04, math.nan, 0.02, 0.5]) == [True, False, False, False, False]  # 0.0125, then 0.0167


def test_the_readme_holds_the_tables_that_the_results_give(study: Any, rows: list[dict[str, Any]]) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    tables = module("report").tables(study, module("plan").by_job(rows))
    assert tables.keys() == set(re.findall(r"<!-- table: (\w+) -->", readme))
    for name, table in tables.items():
        assert f"<!-- table: {name} -->\n{table}<!-- end -->" in readme, (
            f"run `python -m examples.study.report` ({name})"
        )
    for figure in re.findall(r"\]\((\w+\.png)\)", readme):
        assert (FOLDER / figure).stat().st_size > 10_000


def test_the_text_of_both_readmes_says_what_the_results_say(study: Any, rows: list[dict[str, Any]]) -> None:
    plan, report = module("plan"), module("report")
    records = plan.by_job(rows)
    found = module("claims").findings(study, records)

    def gain(better: str, worse: str, task: str = "context", measure: str = "cot", seeds: Any = None) -> float:
        ours, theirs = (plan.tests(study, records, task, method) for method in (better, worse))
        return mean(ours[seed][measure] - theirs[seed][measure] for seed in seeds or study.seeds)

    def invented(method: str, rate: float | None = None, seeds: Any = None) -> str:
        looks = plan.tests(study, records, "context", method)
        if rate:
            looks = {seed: records[plan.Job("test", "context", seed, method, rate)] for seed in seeds}
        return f"{mean(report._hallucinated(looks[seed]) for seed in seeds or study.seeds):.1f}%"

    def rate(method: str) -> float:
        return plan.chosen_rate(study, records, "context", method)

    first, last, mpos = range(5), study.replication_seeds, rate("mpo")
    light = [records[plan.Job("test", "context", seed, "mpo_light_sft", mpos)]["cot"] for seed in first]
    lost = mean(plan.tests(study, records, "context", "mpo")[seed]["cot"] for seed in first) - mean(light)
    says = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())
    for sentence in (
        f"MPO beats SFT by {gain('mpo', 'sft'):.1f} points of CoT accuracy and further SFT by",
        f"further SFT by {gain('mpo', 'further_sft'):.1f} (on `digits` by {gain('mpo', 'sft', 'digits'):.1f} and "
        f"{gain('mpo', 'further_sft', 'digits'):.1f})",
        f"The last five seeds alone give {gain('mpo', 'sft', seeds=last):.1f} over SFT",
        f"level with RFT ({gain('mpo', 'rft'):+.1f}), DPO + SFT ({gain('mpo', 'dpo_sft'):+.1f}) and BCO + SFT "
        f"({gain('mpo', 'bco_sft'):+.1f})",
        f"{invented('mpo')} of its responses have a digit read from the context, against {invented('rft')} and SFT's "
        f"{invented('sft')}",
        f"end {gain('mpo', 'dpo'):.1f} and {gain('mpo', 'bco'):.1f} points below MPO, undecided",
        f"0.01: {gain('mpo', 'mpo_light_sft'):.1f} below MPO when tuned (undecided), {lost:.1f} at MPO's own rate",
        f"hallucination further, to {invented('mpo_ntp_50')}, at no cost",
        f"saw the picture do nothing ({invented('mpo_with_image')})",
        f"more than 0.25 ({invented('mpo_ntp_25')}) and 0.75 ({invented('mpo_ntp_75')})",
        f"0.25 had {invented('mpo_ntp_25', mpos, first)} where 0.5 had {invented('mpo_ntp_50', seeds=first)}",
        f"0.75 was behind there too ({invented('mpo_ntp_75', mpos, first)})",
        f"{invented('mpo_two_rounds', mpos, first)} with a hallucination where MPO has {invented('mpo', seeds=first)}",
        f"names {gain('mpo', 'sft', measure='reading'):.1f} points more digits right than SFT",
        f"its own digits less often ({gain('mpo', 'sft', measure='consistent'):+.1f})",
        f"RFT gains {gain('rft', 'sft', 'digits'):.1f}, DPO {gain('dpo', 'sft', 'digits'):.1f}, MPO "
        f"{gain('mpo', 'sft', 'digits'):.1f} over SFT",
        f"stronger ({invented('further_sft')} with a hallucination)",
    ):
        assert sentence in says
    assert {rate(method) for method in ("dpo", "bco", "mpo_light_sft")} == {4e-5}
    assert mpos == 2.5e-4  # six times as high
    undecided = {finding.claim["says"] for finding in found if finding.verdict == "undecided"}
    assert {"DPO alone loses CoT (MPO's is better)", "An SFT weight of 0.01 hurts CoT"} <= undecided
    assert len(found) == 30  # "Thirty differences"
    assert sum(finding.holm for finding in found) == 11  # "eleven verdicts"
    front = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"MPO gains {gain('mpo', 'sft'):.1f} points of chain-of-thought accuracy over SFT" in front


def test_every_look_at_the_test_scans_stands_in_a_table(study: Any, rows: list[dict[str, Any]]) -> None:
    tables = module("report").tables(study, module("plan").by_job(rows))
    shown = 0
    for name in (*study.tasks, "others"):
        lines = [line.split(" | ") for line in tables[name].splitlines()]
        shown += sum(int(line[lines[0].index("seeds")]) for line in lines[2:])
    assert shown == sum(row["kind"] == "test" for row in rows)


def test_every_line_of_the_results_can_be_traced_and_is_the_only_one(rows: list[dict[str, Any]]) -> None:
    assert len(module("plan").by_job(rows)) == len(rows)
    for row in rows:
        assert row["versions"].keys() == {"torch", "transformers", "trl"}
        assert row["command"].startswith("python -m examples.study.run")
        assert re.fullmatch(r"[0-9a-f]{7,}", row["commit"])
        if "cot" in row:
            bits = module("measures").unpack(row["cot_bits"], row["num"])
            assert 100 * bits.mean() == pytest.approx(row["cot"], abs=1e-3)


def test_a_small_study_runs_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "write_model", partial(digits.write_model, vision_steps=20))
    run, plan, report = module("run"), module("plan"), module("report")
    base = {"sft_rows": SIZES["sft_rows"], "sft_steps": 100, "questions": 24}
    changes = {
        "like": str(FOLDER / "study.yaml"),
        "seeds": [0],
        "tuning_seeds": [0],
        "replication_seeds": [],
        "development_questions": 12,
        "test_questions": 12,
        "bases": {"context": {**base, "open_questions": 6, "share": 0.5}, "digits": None},
        "tasks": {
            "context": {"learning_rates": [1e-3], "methods": ["mpo", "further_sft", "mpo_two_rounds"]},
            "digits": None,
        },
        "verbs": {
            "sft": {"learning_rate": 2e-3},
            "sample": {"prompt": "direct", "max_new_tokens": 6, "num_responses": 8},
            "train": {"logging_steps": 1, "per_device_train_batch_size": 4},
            "eval": {"max_new_tokens": SMALL["eval"]["max_new_tokens"]},
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(changes))  # JSON is YAML
    study = plan.read_study(path)
    results = tmp_path / "results.jsonl"
    results.touch()
    assert run.run_jobs(study, plan.plan(study), tmp_path, "python -m", AtOnce(), 1, None)
    looks = plan.final_jobs(study, plan.by_job(read_rows(results)))
    assert run.run_jobs(study, looks, tmp_path, "python -m", AtOnce(), 1, None)
    rows = list(read_rows(results))
    assert Counter(row["kind"] for row in rows) == {"base": 1, "train": 3, "test": 4}
    two_rounds = next(row for row in rows if row["method"] == "mpo_two_rounds")
    assert two_rounds["steps"] >= 2
    report.write_report(study, plan.by_job(rows), tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| MPO beats SFT | context | MPO - SFT, cot | 1 |  |  |  | not run |  |" in page
    assert "| MPO in two rounds | 1.0e-3 | 1 |" in page
    assert (tmp_path / "claims.png").stat().st_size > 1000

"""`python -m examples.study.report`: the lines of the results become tables and figures, in the README where it is.

Tables stand in the README between `<!-- table: name -->` and `<!-- end -->`; a folder without a README gets one.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import mean

from data_builders.records import Row
from data_builders.shards import read_rows, write_text
from examples.study.claims import Finding, findings, interval, values
from examples.study.figures import draw_claims, draw_curves
from examples.study.plan import SFT, Records, Study, by_job, chosen_rate, rate_means, read_study, runs, tests

FOLDER = Path(__file__).parent
_MEANS = ("seeds", "CoT", "Direct", "digits read", "consistent", "with a hallucination", "characters")


def write_report(study: Study, records: Records, folder: Path) -> None:
    """Writes the tables into `README.md` of a folder, and `claims.png` and `curves.png` beside it.

    Args:
        study: The YAML.
        records: The lines of the results.
        folder: Where the results lie.
    """
    readme, found = folder / "README.md", tables(study, records)
    text = readme.read_text(encoding="utf-8") if readme.exists() else _bare(found)
    for name, table in found.items():
        text = re.sub(
            rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL
        )
    write_text(readme, text)
    draw_claims(findings(study, records), folder / "claims.png")
    draw_curves(study, records, folder / "curves.png")


def _bare(found: dict[str, str]) -> str:
    blocks = [f"## {name}\n\n<!-- table: {name} -->\n<!-- end -->\n" for name in found]
    return "\n".join(["# The study's tables\n", *blocks, "![claims](claims.png)\n", "![curves](curves.png)\n"])


def tables(study: Study, records: Records) -> dict[str, str]:
    """All tables in Markdown by name: `claims`, `tuning`, and one for each task."""
    return {
        "claims": claims_table(study, findings(study, records)),
        **{task: task_table(study, records, task) for task in study.tasks},
        **{f"against_{method}": differences_table(study, records, method) for method in (SFT, "mpo")},
        "tuning": tuning_table(study, records),
        "others": others_table(study, records),
        "bases": bases_table(study, records),
    }


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def claims_table(study: Study, found: Sequence[Finding]) -> str:
    """One line per claim."""
    columns = ["claim", "task", "difference", "seeds", "95% over seeds", "± over questions", "last seeds alone"]
    columns += ["verdict", "after Holm"]
    rows = []
    for finding in found:
        claim = finding.claim
        names = f"{study.name(claim['better'])} - {study.name(claim['worse'])}, {claim['measure']}"
        line = [claim["says"], claim["task"], names, str(len(finding.by_seed))]
        if finding.verdict == "not run":
            line += ["", "", "", "not run", ""]
        else:
            line[2] += f": **{finding.mean:+.1f}**"
            line += [f"{finding.low:+.1f} to {finding.high:+.1f}", f"{finding.over_questions:.1f}"]
            line += [_shown(finding.replication), finding.verdict, "holds" if finding.holm else ""]
        rows.append(line)
    return _markdown(columns, rows)


def _shown(found: dict[str, float]) -> str:
    return f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})" if found else ""


def task_table(study: Study, records: Records, task: str) -> str:
    """One line per method with its means over seeds on the test scans, and what it cost."""
    columns = ["method", "lr", *_MEANS, "margin", "steps", "tokens, M", "seconds"]
    rows = []
    for method in (SFT, *study.tasks[task]["methods"]):
        found = tests(study, records, task, method)
        if found:
            rate = chosen_rate(study, records, task, method)
            rows.append([study.name(method), _rate(rate), *_means(found), *_cost(runs(study, records, task, method))])
    return _markdown(columns, rows)


def _rate(rate: float | None) -> str:
    return f"{rate:.1e}".replace("e-0", "e-") if rate else ""


def _means(found: dict[int, Row]) -> list[str]:
    rows = list(found.values())
    shown = [f"{mean(map(of, rows)):.1f}" for of in _MEASURES]
    return [str(len(rows)), *shown, f"{mean(row['characters'] for row in rows):.0f}"]


def _cost(found: Sequence[Row]) -> list[str]:
    if not found:
        return [""] * 4
    margins = [row["curve"]["rewards/margins"][-1] for row in found if "rewards/margins" in row["curve"]]

    def of(measure: Callable[[Row], float]) -> float:
        return mean(measure(row) for row in found)

    return [
        f"{mean(margins):.2f}" if margins else "",
        f"{of(lambda row: row['steps']):.0f}",
        f"{of(lambda row: row['tokens']) / 1e6:.2f}",
        f"{of(lambda row: row['train_seconds']):.0f}",
    ]


def differences_table(study: Study, records: Records, other: str) -> str:
    """Paired differences of every method to another one in all that is measured, with 95% intervals over seeds."""
    rows = []
    for task, settings in study.tasks.items():
        theirs = tests(study, records, task, other)
        for method in (SFT, *settings["methods"]):
            ours = tests(study, records, task, method)
            seeds = sorted(ours.keys() & theirs.keys())
            if method != other and len(seeds) > 1:
                cells = [_shown(interval([of(ours[s]) - of(theirs[s]) for s in seeds])) for of in _MEASURES]
                rows.append([task, study.name(method), *cells])
    return _markdown(["task", f"method - {study.name(other)}", *_MEANS[1:-1]], rows)


def _hallucinated(row: Row) -> float:
    return float(100 - values(row, "faithful").mean())


_MEASURES = (*(itemgetter(name) for name in ("cot", "direct", "reading", "consistent")), _hallucinated)


def tuning_table(study: Study, records: Records) -> str:
    """Development accuracy, the mean of CoT and Direct, by learning rate."""
    rows = []
    for task, settings in study.tasks.items():
        for method in study.tuned(task):
            means = rate_means(study, records, task, method)
            best = max(means.values(), default=None)
            cells = [
                f"{_rate(rate)}: " + (f"**{value:.1f}**" if value == best else f"{value:.1f}")
                for rate, value in means.items()
            ]
            rows.append([task, study.name(method), *cells, *[""] * (len(settings["learning_rates"]) - len(cells))])
    width = max(len(settings["learning_rates"]) for settings in study.tasks.values())
    return _markdown(["task", "method", "lowest", *[""] * (width - 2), "highest"], rows)


def others_table(study: Study, records: Records) -> str:
    """Looks at the test scans at rates that are not the chosen ones: from before all methods had their own."""
    found: dict[tuple[str, str, float], dict[int, Row]] = {}
    for job, row in records.items():
        if job.kind == "test" and job.rate != chosen_rate(study, records, job.task, job.method):
            found.setdefault((job.task, job.method, job.rate), {})[job.seed] = row
    rows = []
    for (task, method, rate), looks in found.items():
        mpo = tests(study, records, task, "mpo")
        gains = [mpo[seed]["cot"] - row["cot"] for seed, row in looks.items() if seed in mpo]
        rows.append([task, study.name(method), _rate(rate), *_means(looks), _shown(interval(gains))])
    return _markdown(["task", "method", "lr", *_MEANS, "MPO's CoT - its"], rows)


def bases_table(study: Study, records: Records) -> str:
    """What the methods of a seed share: the SFT model on development scans, and the pairs."""
    columns = ["base", "seed", "CoT", "Direct", "digits read", "places where the context won", "correctness pairs"]
    rows = []
    for row in sorted((r for job, r in records.items() if job.kind == "base"), key=lambda r: (r["task"], r["seed"])):
        numbers = [f"{row[name]:.1f}" for name in ("cot", "direct", "reading", "hallucination")]
        rows.append([row["task"], str(row["seed"]), *numbers, str(row["pairs"]["pairs"]), f"{row['seconds']:.0f}"])
    return _markdown([*columns, "seconds"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rebuilds tables and figures from results.jsonl.")
    parser.add_argument("--study", default=str(FOLDER / "study.yaml"), help="The YAML file of the study.")
    parser.add_argument("--folder", default=str(FOLDER), help="Has results.jsonl; gets README.md and figures.")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder)
    write_report(read_study(Path(arguments.study)), by_job(read_rows(folder / "results.jsonl")), folder)


if __name__ == "__main__":
    main()

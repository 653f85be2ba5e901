"""`python -m examples.study.run`: runs what is not done yet, and rebuilds the table and the figures.

Every finished job is one line of `results.jsonl`, written at once, so a study that was stopped goes on with the same
command. Jobs run in as many processes as asked for, which stay alive, each with one thread. The test scans are read
when all other jobs are done, or with `--finish`, for the methods that are trained with all seeds.
"""

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from data_builders.records import InputError, Row
from data_builders.shards import read_rows
from examples.study.plan import Job, Records, Study, by_job, final_jobs, lost_bases, plan, read_study, with_rate

FOLDER = Path(__file__).parent
RESULTS = "results.jsonl"
JOBS_PER_PROCESS = 60  # then a fresh one takes over, which keeps memory bounded

Do = Callable[[Study, Job, Path, str], Row]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = _parse(argv)
    output = Path(arguments.output)
    study = read_study(Path(arguments.study))
    command = shlex.join(["python", "-m", "examples.study.run", *(sys.argv[1:] if argv is None else argv)])
    start = time.monotonic()
    deadline = start + 60 * arguments.minutes if arguments.minutes else None
    with _pool(arguments.jobs, output) as pool:
        whole = arguments.finish or run_jobs(study, plan(study), output, command, pool, arguments.jobs, deadline)
        if whole:
            records = by_job(read_rows(output / RESULTS))
            run_jobs(study, final_jobs(study, records), output, command, pool, arguments.jobs, None)
    from examples.study.report import write_report

    write_report(study, by_job(read_rows(output / RESULTS)), output)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes; tables and figures are in {output}.")
    if not whole:
        print("Not all is done: the same command goes on; `--finish` reads the test scans for what is.")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs the study, from where it stopped.")
    parser.add_argument("--study", help="The YAML file; study.yaml beside this file by default.")
    parser.add_argument("--quick", action="store_true", help="The reduced study of quick.yaml: minutes, not hours.")
    parser.add_argument("--output", help="Folder for runs, results.jsonl, tables and figures.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Processes, each with one thread.")
    parser.add_argument("--minutes", type=float, help="Start no new run after this time.")
    parser.add_argument("--finish", action="store_true", help="Read the test scans now, for what is trained.")
    arguments = parser.parse_args(argv)
    arguments.study = arguments.study or str(FOLDER / ("quick.yaml" if arguments.quick else "study.yaml"))
    arguments.output = arguments.output or ("runs/study-quick" if arguments.quick else "runs/study")
    return arguments


def _pool(jobs: int, output: Path) -> ProcessPoolExecutor:
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).touch()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started from here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=_into_log,
        initargs=(str(output / "log.txt"),),
        max_tasks_per_child=JOBS_PER_PROCESS,
    )


def _into_log(path: str) -> None:
    """What the verbs say in a worker goes into a file."""
    logging.captureWarnings(True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)


def _do(study: Study, job: Job, output: Path, command: str) -> Row:
    from examples.study.steps import run_job  # takes seconds, once per process

    return run_job(study, job, output, command)


def run_jobs(
    study: Study,
    jobs: list[Job],
    output: Path,
    command: str,
    pool: ProcessPoolExecutor,
    num: int,
    deadline: float | None,
    do: Do = _do,
) -> bool:
    """Does jobs in their order, each as soon as what it needs is there; appends a line for each.

    Bases that have a line but no folder are made again first, without a new line.

    Returns:
        Whether all of them are done.

    Raises:
        InputError: A job waits for one that is not among them.
    """
    results = output / RESULTS
    records = by_job(read_rows(results))
    lost = lost_bases(study, jobs, records, output)
    for future in [pool.submit(do, study, job, output, command) for job in lost]:
        print("made again:", *_shown(future.result()), flush=True)
    running: dict[Future[Row], Job] = {}
    while True:
        waiting = open_jobs(study, jobs, records, list(running.values()))
        late = deadline is not None and time.monotonic() > deadline
        for job in [] if late else waiting[: num - len(running)]:
            running[pool.submit(do, study, job, output, command)] = job
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            record = future.result()
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            records |= by_job([record])
            print(time.strftime("%H:%M:%S"), *_shown(record), flush=True)
    missing = [job for job in jobs if with_rate(study, job, records) not in records]
    if missing and not late:
        raise InputError(f"{missing[0]} waits for a job that is not in the plan.")
    return not missing


def _shown(record: Row) -> list[str]:
    names = ("kind", "task", "method", "rate", "seed")
    numbers = ("cot", "direct", "hallucination", "seconds")
    shown = [f"{name} {record[name]:.1f}" for name in numbers if name in record]
    return [str(record[name]) for name in names if record[name] not in ("", None)] + shown


def open_jobs(study: Study, jobs: Sequence[Job], records: Records, running: Sequence[Job]) -> list[Job]:
    """Jobs that can start now, in their order, with their learning rates."""
    ready = (with_rate(study, job, records) for job in jobs)
    return [
        job for job in ready if job and job not in running and job not in records and _has_base(study, job, records)
    ]


def _has_base(study: Study, job: Job, records: Records) -> bool:
    return job.kind == "base" or Job("base", study.tasks[job.task]["base"], job.seed) in records


if __name__ == "__main__":
    main()

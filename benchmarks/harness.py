"""What the benchmarks share: taking turns, ratios with their spread, a quiet process, the command line."""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h

Task = Callable[[], object]


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(tasks: dict[str, Task], rounds: int) -> dict[str, list[float]]:
    """Seconds of each task in each round; every round begins with another task."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    for number in range(rounds):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            _synchronize()
            start = time.perf_counter()
            tasks[name]()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def ratio_of(
    what: str, values: Sequence[float], *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """Median and quartiles; `met` is None where there is no target."""
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [median] * 3
    met = median >= at_least if at_least is not None else median <= at_most if at_most is not None else None
    return {
        "what": what,
        "median": median,
        "low": low,
        "high": high,
        "at_least": at_least,
        "at_most": at_most,
        "met": met,
    }


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, as CUDA's allocator does.

    It maps blocks above 32 MB anew each time and pays for every page of them, a third of a step at these sizes: a
    method whose largest block is just below would win by that alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def be_quiet() -> None:
    """No progress bars, and no advice of libraries to those who wrote other libraries."""
    import datasets
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # or DeepSpeed warns
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()


def parser(description: str, quick: str, rounds: int, quick_rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    found = argparse.ArgumentParser(description=description.splitlines()[0])
    found.add_argument("--quick", action="store_true", help=quick)
    found.add_argument("--rounds", type=int, help=f"turns of each method (default {rounds}, quick {quick_rounds})")
    found.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    return found


def begin(options_of: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options of a benchmark that runs models, `--threads` too, and readies the process."""
    import torch

    options_of.add_argument("--threads", type=int, help="torch's threads (default: what torch uses)")
    options = options_of.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    be_quiet()
    keep_freed_memory()
    return options


def show(results: dict[str, Any], tables: Iterable[Table], path: Path | None) -> None:
    """Prints machine and tables, and writes the figures where asked."""
    console = Console()
    console.width = max(120, console.width)  # or the tables are cut where the output is no terminal
    console.print(", ".join(f"{name} {value}" for name, value in results["machine"].items() if name != "model"))
    for table in tables:
        console.print(table)
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")

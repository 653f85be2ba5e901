"""Steps for the tests of the engine that worker processes can import."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from data_builders.engine import Step
from data_builders.records import InputError, Row

DROPPED = {"q-2": "too hard", "q-4": "too easy"}


def answer(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Answers every question but the third and the fifth."""
    return (
        [{**row, "answer": row["question"][:-1]} for row in rows if row["id"] not in DROPPED],
        [{"id": row["id"], "reason": DROPPED[row["id"]]} for row in rows if row["id"] in DROPPED],
    )


@dataclass(frozen=True)
class Answering:
    """Makes the step `answer`, with something that goes wrong.

    Attributes:
        seconds: What each chunk takes at least.
        die_at: Question at which the process is killed, the first time only.
        marker: File that says that it was.
        refuse: Question that is an input error.
    """

    seconds: float = 0.0
    die_at: str = ""
    marker: str = ""
    refuse: str = ""

    def __call__(self) -> Step:
        return self.step

    def step(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        time.sleep(self.seconds)
        for row in rows:
            if row["id"] == self.refuse:
                raise InputError(f"question {row['id']!r} cannot be answered.")
            if row["id"] == self.die_at and not Path(self.marker).exists():
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return answer(rows)

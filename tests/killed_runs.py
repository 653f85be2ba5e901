"""Runs a verb in a process that is killed at its n-th file: `python tests/killed_runs.py MODULE N CONFIG-AS-JSON`."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run_until_killed(module: str, config: Any, last: int) -> None:
    """Runs a verb of one config until it would move its `last`-th file to its place, counted from 1."""
    command = [sys.executable, __file__, module, str(last), json.dumps(vars(config))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def main(name: str, last: str, settings: str) -> None:
    module, replace, left = import_module(name), Path.replace, int(last)

    def counted(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = counted
    module.run(module.CONFIGS[0](**json.loads(settings)))


if __name__ == "__main__":
    main(*sys.argv[1:])

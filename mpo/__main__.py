"""`mpo`, `python -m mpo` and, several ranks at once, `torchrun -m mpo`, `accelerate launch -m mpo`, `deepspeed`."""

import re
import sys

from mpo.cli import app


def main() -> None:
    """Runs the command line.

    `deepspeed` puts `--local_rank=0` in front of the verb; the same number stands in the environment.
    """
    words = [word for word in sys.argv[1:] if not re.fullmatch(r"--local[-_]rank=\d+", word)]
    app(words, prog_name="mpo")


if __name__ == "__main__":
    main()

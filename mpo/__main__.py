"""`mpo`, `python -m mpo` and `torchrun -m mpo`."""

from mpo.cli import app


def main() -> None:
    """Runs the command line."""
    app(prog_name="mpo")


if __name__ == "__main__":
    main()

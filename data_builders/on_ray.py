"""Makes shards on a Ray cluster: the same files as in one process, since a shard depends on nothing but its rows."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_builders.records import InputError


def make_on_ray(
    make_shard: Callable[[Any, Any, Path], int],
    make_step: Callable[[], Any],
    chunks: Sequence[Any],
    output: Path,
    *,
    address: str,
    workers: int,
    gpus_per_worker: float,
) -> Iterator[int]:
    """Makes the shards, and gives the size of each chunk when it is done.

    Ray starts a lost worker again and repeats its chunk.

    Args:
        make_shard: A step, a chunk and a folder to a shard in it and the size of the chunk.
        make_step: Makes the step, once in each worker.
        chunks: The work.
        output: The folder, which all machines must see.
        address: Of the cluster; `local` starts one on this machine.
        workers: How many work at a time, at most.
        gpus_per_worker: What each takes of the cluster's GPUs.

    Raises:
        InputError: Ray is not installed, there is no such cluster, or a step refused its rows.
    """
    with _connected(address, workers) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.enable_operator_progress_bars = False
        indices = ray.data.from_items([{"chunk": i} for i in range(len(chunks))], override_num_blocks=len(chunks))
        made = indices.map(
            _Worker,
            fn_constructor_args=(make_shard, make_step, list(chunks), output.absolute()),
            concurrency=(1, min(workers, len(chunks))),
            num_gpus=gpus_per_worker or None,
        )
        for row in made.iter_rows():
            if row["error"]:
                raise InputError(row["error"])
            yield row["size"]


@contextmanager
def _connected(address: str, workers: int) -> Iterator[Any]:
    """Ray on the cluster of that address, or on the one that this process is connected to already and stays with."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("`ray` needs Ray, which is not installed: pip install 'mpo[ray]'.") from error
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "configure_logging": False}
    try:
        if address == "local":
            ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
        else:
            _check_reachable(address)
            ray.init(address, **quiet)
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no Ray cluster at {address!r} ({error!s:.200}). `ray start --head` starts one."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for two minutes, and then ends the process."""
    _, _, place = address.rpartition("://")
    host, colon, port = place.rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _Worker:
    def __init__(self, make_shard: Callable[..., int], make_step: Callable[[], Any], chunks: list[Any], output: Path):
        self.make_shard, self.make_step, self.chunks, self.output = make_shard, make_step, chunks, output
        self.step: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the number of a chunk to a row with its size, or with what the step complains of."""
        try:
            self.step = self.step or self.make_step()
            return {"size": self.make_shard(self.step, self.chunks[row["chunk"]], self.output), "error": ""}
        except InputError as error:
            return {"size": 0, "error": str(error)}

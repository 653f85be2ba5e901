"""Gathering rows by key: what lands where, that a broken or full run leaves nothing, and ranks in bounded memory."""

import errno
import json
import random
import tracemalloc
from hashlib import blake2b
from pathlib import Path

import pytest

from data_builders import partition as module
from data_builders.partition import Bucket, cutoffs, discard, num_buckets, partition
from data_builders.records import InputError, Question, Row
from data_builders.shards import read_rows, write_rows


def key(row: Row) -> bytes:
    return blake2b(row["id"].encode(), digest_size=8).digest()


def gather(source: Path, folder: Path, num: int) -> list[Bucket]:
    return partition(source, folder, num, model=Question, key=key, title="gathering")


def questions(count: int, each: int = 3) -> list[Row]:
    return [{"id": f"q{n}", "question": f"{n}?", "copy": copy} for copy in range(each) for n in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three times 40 questions, one round after the other."""
    write_rows(tmp_path / "in.jsonl", questions(40))
    return tmp_path / "in.jsonl"


def test_all_rows_of_a_key_land_in_one_bucket_in_their_order(source: Path, tmp_path: Path) -> None:
    buckets = gather(source, tmp_path / "out", 4)
    content = [list(read_rows(bucket.path)) for bucket in buckets]
    assert [bucket.size for bucket in buckets] == [len(rows) for rows in content]
    assert all(rows for rows in content)
    homes = [{row["id"] for row in rows} for rows in content]
    assert sum(len(home) for home in homes) == len(set().union(*homes)) == 40
    assert [row["copy"] for row in content[0] if row["id"] == content[0][0]["id"]] == [0, 1, 2]


def test_the_keys_of_a_bucket_are_smaller_than_those_of_the_next(source: Path, tmp_path: Path) -> None:
    """So that the order of all keys is the same for any number of buckets."""
    buckets = gather(source, tmp_path / "out", 5)
    keys = [sorted(key(row) for row in read_rows(bucket.path)) for bucket in buckets]
    assert sum(keys, []) == sorted(key(row) for row in questions(40))


def test_lines_are_copied_as_they_stand_but_for_white_space_around_them(tmp_path: Path) -> None:
    lines = [b'{"question":"\\u00e9?", "id":"a" , "n": 1e5}', '{"id": "b", "question": "é?"}'.encode()]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0] + b" \r\n\n  \n" + lines[1])
    (bucket,) = gather(tmp_path / "in.jsonl", tmp_path / "out", 1)
    assert bucket.path.read_bytes() == lines[0] + b"\n" + lines[1] + b"\n"


def test_what_is_held_back_in_memory_changes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [bucket.path.read_bytes() for bucket in gather(source, tmp_path / "out", 3)]
    monkeypatch.setattr(module, "BUFFER_BYTES", 100)
    assert [bucket.path.read_bytes() for bucket in gather(source, tmp_path / "again", 3)] == expected


def test_the_number_of_buckets_is_that_of_the_rows_and_not_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKET_BYTES", 1000)
    rows = [{"id": "a", "question": "?" * 73}] * 45  # 100 bytes each
    assert len(json.dumps(rows[0])) == 100
    write_rows(tmp_path / "one" / "0.jsonl", rows)
    for number in range(9):
        write_rows(tmp_path / "many" / f"{number}.jsonl", rows[:5])
        with (tmp_path / "many" / f"{number}.jsonl").open("ab") as file:
            file.write(b"\n\r\n" * 500)
    assert num_buckets(tmp_path / "one") == num_buckets(tmp_path / "many") == 5  # of 4,500 bytes
    assert num_buckets(tmp_path / "many" / "0.jsonl") == 1
    monkeypatch.setattr(module, "MAX_BUCKETS", 3)
    assert num_buckets(tmp_path / "one") == 3


def test_a_bucket_may_be_empty(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", questions(1))
    assert sorted(bucket.size for bucket in gather(tmp_path / "in.jsonl", tmp_path / "out", 3)) == [0, 0, 3]
    assert all(bucket.path.exists() for bucket in gather(tmp_path / "in.jsonl", tmp_path / "out", 3))


def test_buckets_that_are_there_are_not_made_again(source: Path, tmp_path: Path) -> None:
    first = gather(source, tmp_path / "out", 2)
    source.unlink()
    assert gather(source, tmp_path / "out", 2) == first


def test_what_a_killed_run_left_is_swept_away(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "00000.jsonl").write_text("half a row")
    (bucket,) = gather(source, tmp_path / "out", 1)
    assert len(list(read_rows(bucket.path, Question))) == 120
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x"}', "in.jsonl, line 121: `question` is missing"),
        ('{"id": "x", "question": 3}', "in.jsonl, line 121: `question` is 3"),
        ('{"id": "x", "quest', "in.jsonl, line 121: not a JSON object .* column 19"),
        ("[1]", "in.jsonl, line 121: expected a JSON object"),
        ("null", "in.jsonl, line 121: expected a JSON object"),
        ('{"id": "\xff", "question": "?"}', "in.jsonl, line 121: not UTF-8 text"),
    ],
)
def test_a_broken_row_is_refused_with_file_and_line_and_leaves_nothing(
    source: Path, tmp_path: Path, line: str, message: str
) -> None:
    with source.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=message):
        gather(source, tmp_path / "out", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_half_a_surrogate_pair_in_a_column_of_the_users_is_no_reason_to_stop(tmp_path: Path) -> None:
    line = '{"id": "a", "question": "?", "note": "\\ud83d"}\n'
    (tmp_path / "in.jsonl").write_text(line)
    (bucket,) = gather(tmp_path / "in.jsonl", tmp_path / "out", 1)
    assert bucket.path.read_text() == line


def test_a_source_without_a_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="holds no row"):
        num_buckets(tmp_path / "in.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        num_buckets(tmp_path / "missing")


def test_a_full_disk_is_explained_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", no_room)
    with pytest.raises(InputError, match="No space left on device.*Make room and give the same command again"):
        gather(source, tmp_path / "out", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_discarded_buckets_are_gone_also_when_a_run_was_killed_over_it(source: Path, tmp_path: Path) -> None:
    gather(source, tmp_path / "out", 2)
    (tmp_path / "out.tmp").mkdir()
    for _ in range(2):
        discard(tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_buckets_of_which_some_are_gone_are_never_taken_for_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [bucket.path.read_bytes() for bucket in gather(source, tmp_path / "out", 2)]

    def killed_after_one_file(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            next(folder.glob("*.jsonl")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", killed_after_one_file)
        with pytest.raises(KeyboardInterrupt):
            discard(tmp_path / "out")
    assert [bucket.path.read_bytes() for bucket in gather(source, tmp_path / "out", 2)] == whole


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER_BYTES", 2**16)
    peaks = []
    for count in (500, 5000):
        path = tmp_path / f"{count}.jsonl"
        write_rows(path, [{"id": f"q{n}", "question": "?" * 1000} for n in range(count)])
        tracemalloc.start()
        gather(path, tmp_path / str(count), num_buckets(path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2**20
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("limit", [1, 2, 999, 1000, 1999])
def test_a_cutoff_is_the_number_of_that_rank(limit: int) -> None:
    generator = random.Random(limit)
    numbers = [("a", generator.getrandbits(64)) for _ in range(2000)]
    numbers += [("b", generator.getrandbits(64)) for _ in range(3 * limit)]
    generator.shuffle(numbers)
    ranked = {group: sorted(n for g, n in numbers if g == group) for group in "ab"}
    found = cutoffs(lambda: iter(numbers), lambda group: limit)
    assert found == {group: ranked[group][limit - 1] for group in "ab"}


def test_a_group_within_its_limit_has_no_cutoff() -> None:
    numbers = [("a", 5), ("a", 7), ("b", 2**64 - 1)]
    assert cutoffs(lambda: numbers, lambda group: 2) == {}
    assert cutoffs(lambda: numbers, {"a": 1, "b": 1}.__getitem__) == {"a": 5}
    assert cutoffs(list, lambda group: 1) == {}

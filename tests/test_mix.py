"""`mpo mix`: a folder of shards with exact shares, which no worker, kill or order of files changes by a byte."""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from killed_runs import run_until_killed
from PIL import Image
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

import data_builders
from data_builders.engine import Chunk
from data_builders.mix import CONFIGS, PRESETS, MixConfig, run
from data_builders.mixtures.counts import mixture_counts, mixture_shares
from data_builders.mixtures.plan import PLAN
from data_builders.mixtures.spec import read_mixture
from data_builders.mixtures.stream import mixture_stream, open_stream
from data_builders.mixtures.trl import TrlDataset
from data_builders.records import InputError, Row
from data_builders.shards import read_rows, read_stage, write_rows, write_text
from mpo.data import sft_dataset
from mpo.settings import read_settings

ROOT = Path(__file__).parent.parent
MIXTURES = Path(data_builders.__file__).parent / "mixtures"


def conversation(name: str, number: int, image: bool = True) -> Row:
    row = {"id": f"{name}-{number}", "images": [f"{number % 3}.png"] if image else []}
    row |= {"prompt": [{"role": "user", "content": f"{number}?"}], "kept": {"number": number}}
    return {**row, "completion": [{"role": "assistant", "content": str(number)}]}


def preset(name: str, **sources: Row) -> Row:
    return {**yaml.safe_load((MIXTURES / f"{name}.yaml").read_text(encoding="utf-8")), "sources": sources}


def test_mm1_is_45_45_10_exactly() -> None:
    sources = {name: {"group": name} for name in ("interleaved", "caption", "text")}
    mixture = read_mixture({**preset("mm1", **sources), "total": 1_000_000}, "mm1")
    counts = mixture_counts(mixture, dict.fromkeys(sources, 10**7))
    assert counts == {"caption": 450_000, "interleaved": 450_000, "text": 100_000}


def test_the_pretraining_of_mm1_5_is_50_10_40_exactly() -> None:
    sources = {name: {"group": name} for name in ("interleaved", "caption", "text")}
    mixture = read_mixture({**preset("mm1_5_pretrain", **sources), "total": 1_000_000}, "mm1_5")
    counts = mixture_counts(mixture, dict.fromkeys(sources, 10**7))
    assert counts == {"caption": 500_000, "interleaved": 100_000, "text": 400_000}


def test_alpha_of_mm1_5_gives_its_published_shares() -> None:
    published = {"text_rich": 37.2, "refer_ground": 22.5, "general": 11.3, "math": 5.6, "code": 2.3, "science": 1.1}
    sources = {name: {"group": "single_image", "category": name} for name in published}
    sources |= {"multi_image": {"group": "multi_image"}, "text": {"group": "text"}}
    mixture = read_mixture({**preset("mm1_5_sft", **sources), "total": 1_000_000}, "mm1_5")
    shares = {name: round(100 * float(share), 1) for name, share in mixture_shares(mixture).items()}
    assert shares == {**published, "multi_image": 10.0, "text": 10.0}
    counts = mixture_counts(mixture, dict.fromkeys(sources, 1000))
    assert counts == {
        "text_rich": 371_831,  # 0.8 * 3.3 / 7.1
        "refer_ground": 225_352,
        "general": 112_676,
        "math": 56_338,
        "code": 22_535,
        "science": 11_268,
        "multi_image": 100_000,
        "text": 100_000,
    }


def test_seven_of_ten_rows_of_mammoth_vl_are_rewritten() -> None:
    sources = {"new": {"rewritten": True}, "newer": {"rewritten": True}, "old": {"rewritten": False}}
    mixture = read_mixture({**preset("mammoth_vl", **sources), "total": 1000}, "mammoth_vl")
    counts = mixture_counts(mixture, {"new": 300, "newer": 100, "old": 5})
    assert counts == {"new": 525, "newer": 175, "old": 300}


def test_every_preset_is_listed_and_says_where_its_numbers_are_from() -> None:
    paths = sorted(MIXTURES.glob("*.yaml"))
    assert [path.name for path in paths] == [f"{name}.yaml" for name in PRESETS]
    assert [path.name for path in paths if "https://arxiv.org/abs/" not in path.read_text(encoding="utf-8")] == []


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Row]:
    """`pairs`, 50 rows in two shards; `pages`, 40 rows; `words`, 7 rows without an image."""
    rows = [conversation("pairs", number) for number in range(50)]
    write_rows(tmp_path / "pairs" / "00000.jsonl", rows[:30])
    write_rows(tmp_path / "pairs" / "00001.jsonl", rows[30:])
    write_rows(tmp_path / "pages.jsonl", (conversation("pages", number) for number in range(40)))
    write_rows(tmp_path / "words.jsonl", (conversation("words", number, image=False) for number in range(7)))
    return {
        "pairs": {"path": str(tmp_path / "pairs"), "group": "caption", "image_folder": "pictures/pairs/"},
        "pages": {"path": str(tmp_path / "pages.jsonl"), "group": "interleaved", "image_folder": "pictures"},
        "words": {"path": str(tmp_path / "words.jsonl"), "group": "text"},
    }


@pytest.fixture
def config(tmp_path: Path, sources: dict[str, Row]) -> MixConfig:
    """200 rows as MM1 mixes them, in three shards."""
    settings = {"mixture": "mm1", "total": 200, "shard_size": 80}
    return MixConfig(sources=sources, output=str(tmp_path / "mixed"), **settings)


def other(config: MixConfig, output: Path, **changes: object) -> MixConfig:
    return MixConfig(**{**vars(config), "output": str(output), **changes})


def content(folder: str | Path) -> dict[str, bytes]:
    """All files of a run, hidden ones too."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder: str | Path) -> Counter[str]:
    return Counter(row["id"].split("-")[0] for row in read_stage(Path(folder)))


def test_the_shares_are_exact_and_small_sources_are_repeated_in_whole_passes(config: MixConfig) -> None:
    summary = run(config)
    assert names(config.output) == {"pairs": 90, "pages": 90, "words": 20}
    words = Counter(row["id"] for row in read_stage(Path(config.output)) if row["id"].startswith("words"))
    assert sorted(words.values()) == [2, 3, 3, 3, 3, 3, 3]
    assert summary.rows == [
        ["caption", "1", "90", "45.00%", "45.00%"],
        ["interleaved", "1", "90", "45.00%", "45.00%"],
        ["text", "1", "20", "10.00%", "10.00%"],
    ]
    assert summary.also[0].rows == [
        ["pairs", "caption", "90", "50", "1.80"],
        ["pages", "interleaved", "90", "40", "2.25"],
        ["words", "text", "20", "7", "2.86"],
    ]


def test_the_plan_says_where_every_row_is_from(config: MixConfig, sources: dict[str, Row]) -> None:
    run(config)
    output = Path(config.output)
    assert sorted(path.name for path in output.glob("*.jsonl")) == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    for path in sorted(output.glob("*.jsonl")):
        planned = list(read_rows(output / PLAN / path.name))
        expected = [f"{line['source']}-{line['row']}" for line in planned]
        assert [row["id"] for row in read_rows(path)] == expected
        for line in planned:
            files = sorted(Path(sources[line["source"]]["path"]).glob("*")) or [Path(sources[line["source"]]["path"])]
            text = files[line["file"]].read_bytes()
            assert text[: line["byte"]].count(b"\n") == line["line"] - 1
            assert json.loads(text[line["byte"] :].splitlines()[0])["kept"]["number"] == line["row"]


def test_rows_keep_all_they_have_and_their_images_are_found_under_one_root(config: MixConfig) -> None:
    run(config)
    rows = {row["id"]: row for row in read_stage(Path(config.output))}
    expected = conversation("pairs", 31)
    assert expected["images"] == ["1.png"]
    assert rows["pairs-31"] == {**expected, "images": ["pictures/pairs/1.png"]}
    assert rows["pages-5"]["images"] == ["pictures/2.png"]
    assert rows["words-2"]["images"] == []


def test_the_folder_is_what_fine_tuning_reads(config: MixConfig, tmp_path: Path) -> None:
    run(config)
    for folder in ("pictures", "pictures/pairs"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / folder / f"{number}.png")
    dataset = sft_dataset([config.output], tmp_path)
    assert len(dataset) == 200
    first = next(read_stage(Path(config.output)))
    assert dataset[0]["completion"] == first["completion"]


def test_workers_change_nothing(config: MixConfig, tmp_path: Path) -> None:
    run(config)
    run(other(config, tmp_path / "by_two", workers=2))
    assert content(tmp_path / "by_two") == content(config.output)


def test_the_shard_size_only_cuts_and_the_seed_changes_the_order(config: MixConfig, tmp_path: Path) -> None:
    run(config)
    run(other(config, tmp_path / "cut", shard_size=33))
    run(other(config, tmp_path / "seed", seed=1))
    rows = list(read_stage(Path(config.output)))
    assert list(read_stage(tmp_path / "cut")) == rows
    assert list(read_stage(tmp_path / "seed")) != rows
    assert names(tmp_path / "seed") == names(config.output)


def test_a_finished_mixture_is_only_summed_up_again(config: MixConfig) -> None:
    first = run(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
    assert run(config) == first
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")} == before


@pytest.mark.parametrize("last", [1, 3, 5, 7])  # settings, the plan, its end, the second shard
def test_a_run_that_is_killed_anywhere_and_started_again_ends_with_the_same_files(
    config: MixConfig, tmp_path: Path, last: int
) -> None:
    run(config)
    killed = other(config, tmp_path / "killed")
    run_until_killed("data_builders.mix", killed, last)
    assert content(killed.output) != content(config.output)
    run(killed)
    assert content(killed.output) == content(config.output)


def test_an_unfinished_mixture_is_not_planned_again(config: MixConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)
    whole = content(config.output)
    (Path(config.output) / "00001.jsonl").unlink()
    monkeypatch.setattr("data_builders.mix.make_plan", None)
    made = []
    monkeypatch.setattr(Chunk, "rows", lambda chunk, rows=Chunk.rows: made.append(chunk.name) or rows(chunk))
    run(config)
    assert made == ["00001.jsonl"]
    assert content(config.output) == whole


def test_other_settings_or_other_rows_do_not_get_into_a_mixture(config: MixConfig, tmp_path: Path) -> None:
    run(config)
    with pytest.raises(InputError, match=r"was filled with other settings \(total: then 200, now 300\)"):
        run(other(config, Path(config.output), total=300))
    write_rows(tmp_path / "words.jsonl", [conversation("words", 0)])
    with pytest.raises(InputError, match=r"was filled with other settings \(inputs"):
        run(config)


@pytest.mark.parametrize("name", ["00001.jsonl", "plan/00001.jsonl"])
def test_a_mixture_that_was_changed_afterwards_is_noticed(config: MixConfig, name: str) -> None:
    run(config)
    rows = list(read_rows(Path(config.output) / name))
    write_rows(Path(config.output) / name, rows[:-1])
    with pytest.raises(InputError, match="it was changed since"):
        run(config)


def test_a_plan_with_other_sources_than_were_counted_is_noticed(config: MixConfig) -> None:
    run(config)
    path = Path(config.output) / PLAN / "00000.jsonl"
    write_rows(path, ({**row, "source": "words"} for row in list(read_rows(path))))
    with pytest.raises(InputError, match="rows of 'pages' where 90 were planned"):
        run(config)


def test_nothing_is_left_behind_where_a_source_is_missing_or_broken(config: MixConfig, tmp_path: Path) -> None:
    text = (tmp_path / "words.jsonl").read_text()
    write_text(tmp_path / "words.jsonl", text + "{broken\n")
    with pytest.raises(InputError, match=r"words\.jsonl, line 8: not a JSON object"):
        run(config)
    (tmp_path / "words.jsonl").unlink()
    with pytest.raises(InputError, match=r"source 'words': .*words\.jsonl does not exist.*`mpo convert`"):
        run(config)
    write_text(tmp_path / "words.jsonl", "\n")
    with pytest.raises(InputError, match="source 'words' has a share of text and no row"):
        run(config)
    assert not Path(config.output).exists()
    write_text(tmp_path / "words.jsonl", text)
    run(config)
    assert names(config.output)["words"] == 20


def test_a_source_without_a_share_is_not_read(config: MixConfig, tmp_path: Path, sources: dict[str, Row]) -> None:
    out = {**sources, "gone": {"path": str(tmp_path / "gone.jsonl"), "group": "text", "weight": 0}}
    run(other(config, tmp_path / "without", sources=out))
    assert names(tmp_path / "without") == {"pairs": 90, "pages": 90, "words": 20}


def test_columns_are_kept_and_one_that_is_not_there_is_named(tmp_path: Path, sources: dict[str, Row]) -> None:
    source = {"path": sources["words"]["path"], "columns": ["id", "kept"]}
    run(MixConfig(sources={"words": source}, output=str(tmp_path / "kept")))
    rows = sorted(read_stage(tmp_path / "kept"), key=lambda row: row["id"])
    assert rows[1] == {"id": "words-1", "kept": {"number": 1}}
    source = {**source, "columns": ["id", "text"]}
    with pytest.raises(InputError, match=r"words\.jsonl, line \d: there is no column 'text' of `columns`"):
        run(MixConfig(sources={"words": source}, output=str(tmp_path / "missing")))


def test_settings_come_from_a_file_with_paths_alone_or_with_a_mixture_written_out(
    tmp_path: Path, sources: dict[str, Row]
) -> None:
    words, pages = sources["words"]["path"], sources["pages"]["path"]
    text = f"sources: {{a: {words}, b: [{pages}, {words}]}}\noutput: {tmp_path / 'all'}\n"
    write_text(tmp_path / "mix.yaml", text)
    (config,) = read_settings("mix", CONFIGS, ["--config", str(tmp_path / "mix.yaml")])
    run(config)
    assert names(config.output) == {"words": 14, "pages": 40}
    write_text(tmp_path / "half.yaml", "groups: {a: {weight: 1}, b: {weight: 1}}\n")
    given = {"a": {"path": words, "group": "a"}, "b": {"path": pages, "group": "b"}}
    run(MixConfig(sources=given, mixture=str(tmp_path / "half.yaml"), output=str(tmp_path / "half")))
    assert names(tmp_path / "half") == {"words": 7, "pages": 7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": None}, "needs either `sources` or, in TRL's words, `datasets`"),
        ({"datasets": [{"path": "x"}]}, "needs either `sources` or"),
        ({"mixture": "mm2"}, "there is no mixture 'mm2': choose one of mammoth_vl, mm1, mm1_5_pretrain, mm1_5_sft"),
        ({"mixture": {"group": {}}}, "`mixture` holds group: it takes `groups` and `rewritten_share`"),
        ({"sources": {"x": {"weight": 1}}, "mixture": None}, "source 'x' has no `path`"),
        ({"sources": {"x": 3}}, "`sources.x` is 3"),
        ({"shard_size": 0}, "`shard_size` must be at least 1, got 0"),
        ({"test_split_size": 0.1}, "`test_split_size` is not taken"),
        ({"streaming": True, "total": None}, "`streaming` needs `total`"),
        ({"streaming": True, "workers": 2}, "drawn by one process alone"),
        ({"workers": 0}, "`workers` must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_read(
    config: MixConfig, changes: Row, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        other(config, Path(config.output), **changes)


def test_trls_data_sets_have_the_fields_that_are_read_here() -> None:
    assert list(TrlDataset.model_fields) == [field.name for field in fields(DatasetConfig)]
    assert {field.name for field in fields(DatasetMixtureConfig)} <= {field.name for field in fields(MixConfig)}


@pytest.mark.parametrize("fractions", [(3, 1), (0.5, 0.5), (None, None)])
def test_trls_yaml_gives_as_many_rows_of_each_as_trl_takes(
    tmp_path: Path,
    sources: dict[str, Row],
    fractions: tuple[float | None, float | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = [sources["pages"]["path"], sources["words"]["path"]]
    entries = [
        {"path": "json", "data_files": file, "columns": ["id"], "fraction": fraction}
        for file, fraction in zip(files, fractions, strict=True)
    ]
    theirs = get_dataset(DatasetMixtureConfig(datasets=[dict(entry) for entry in entries]))["train"]
    write_text(tmp_path / "mix.yaml", json.dumps({"datasets": entries, "output": str(tmp_path / "ours")}))
    (config,) = read_settings("mix", CONFIGS, ["--config", str(tmp_path / "mix.yaml")])
    run(config)
    assert names(tmp_path / "ours") == Counter(row["id"].split("-")[0] for row in theirs)
    assert all(row.keys() == {"id"} for row in read_stage(tmp_path / "ours"))


def test_trls_data_sets_are_named_by_path_folder_and_files(tmp_path: Path, sources: dict[str, Row]) -> None:
    entries = [
        {"path": sources["pairs"]["path"]},
        {"path": str(tmp_path), "data_files": ["words.jsonl", "pages.jsonl"]},
        {"path": "json", "data_files": {"test": sources["words"]["path"]}, "split": "test"},
        {"path": "json", "data_files": "pages.jsonl", "data_dir": str(tmp_path)},
    ]
    config = MixConfig(datasets=entries, output=str(tmp_path / "mixed"))
    assert list(config.spec().sources) == [sources["pairs"]["path"], str(tmp_path), "json", "json (2)"]
    run(config)
    assert names(config.output) == {"pairs": 50, "words": 14, "pages": 80}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "x", "shuffle": True}, r"`datasets`, entry 1: `shuffle` extra inputs .* has the fields path, name"),
        ({"name": "x"}, "`path` field required"),
        ({"path": "json"}, "no file follows from"),
        ({"path": "no_such_folder"}, "no file follows from"),
        ({"path": "json", "data_files": {"test": "x"}}, "no file follows from"),
    ],
)
def test_a_data_set_of_trls_that_names_no_file_is_refused(entry: Row, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        MixConfig(datasets=[entry], output=str(tmp_path / "mixed"))


def test_a_hub_data_set_can_only_be_streamed(tmp_path: Path) -> None:
    entry = {"path": "org/set", "name": "part", "split": "test"}
    config = MixConfig(datasets=[entry], output=str(tmp_path / "mixed"))
    assert config.spec().sources["org/set"].paths == ["org/set/part:test"]
    with pytest.raises(InputError, match="of a Hub data set rows can be drawn with `streaming`"):
        run(config)


def test_a_stream_keeps_the_shares_in_expectation_and_is_drawn_the_same_again(
    config: MixConfig, tmp_path: Path
) -> None:
    streamed = other(config, tmp_path / "streamed", total=2000, streaming=True)
    summary = run(streamed)
    assert "The rows were drawn from a stream: the shares hold in expectation only." in summary.notes
    counts = names(streamed.output)
    assert counts.total() == 2000
    # three standard deviations, sqrt(p (1 - p) 2000), around 900 and 200
    assert 833 < counts["pairs"] < 967
    assert 833 < counts["pages"] < 967
    assert 160 < counts["words"] < 240
    assert [row[2] for row in summary.rows] == [str(counts[name]) for name in ("pairs", "pages", "words")]
    before, kept = content(streamed.output), (tmp_path / "streamed" / "00005.jsonl").stat().st_mtime_ns
    for name in ("00003.jsonl", "00007.jsonl"):
        (tmp_path / "streamed" / name).unlink()
    assert run(streamed) == summary
    assert content(streamed.output) == before
    assert (tmp_path / "streamed" / "00005.jsonl").stat().st_mtime_ns == kept


def test_a_stream_is_for_training_too_and_never_ends(sources: dict[str, Row]) -> None:
    mixture = read_mixture({"sources": {"pairs": {"weight": 3}, "pages": {"weight": 1}}}, "test")
    streams = {name: open_stream([sources[name]["path"]]) for name in ("pairs", "pages")}
    rows = list(mixture_stream(mixture, streams, seed=1, window=10).take(400))
    counts = Counter(row["id"].split("-")[0] for row in rows)
    assert 274 < counts["pairs"] < 326
    assert counts.total() == 400
    assert rows[0]["completion"][0]["role"] == "assistant"
    assert {row["id"] for row in rows if row["id"].startswith("pairs")} == {f"pairs-{number}" for number in range(50)}


def test_a_stream_that_cannot_be_drawn_is_refused_with_advice(sources: dict[str, Row]) -> None:
    stream = open_stream([sources["words"]["path"]])
    mixture = read_mixture({"sources": {"x": {}}}, "test")
    with pytest.raises(InputError, match="x, y: every source that has a share needs a stream"):
        mixture_stream(mixture, {"y": stream})
    with pytest.raises(InputError, match="x cannot be capped in a stream"):
        mixture_stream(read_mixture({"sources": {"x": {"cap": 5}}}, "test"), {"x": stream})
    with pytest.raises(InputError, match="give each of them a `weight`"):
        mixture_stream(read_mixture({"sources": {"x": {}, "y": {}}}, "test"), {"x": stream, "y": stream})
    with pytest.raises(InputError, match="no_such_file does not exist; expected a JSONL file"):
        open_stream(["no_such_file"])


def test_a_stream_names_the_line_that_is_broken(config: MixConfig, tmp_path: Path) -> None:
    with (tmp_path / "words.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(InputError, match=r"words\.jsonl, line 8: not a JSON object"):
        run(other(config, tmp_path / "streamed", streaming=True))


def test_rows_that_json_cannot_hold_are_refused_by_name(
    config: MixConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_builders.mix.open_stream", lambda paths: [{"id": "1", "image": b"png"}])
    with pytest.raises(InputError, match=r"rows that JSON cannot hold .*image \(bytes\).*`mpo convert`"):
        run(other(config, tmp_path / "streamed", streaming=True))

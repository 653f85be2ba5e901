"""How far to trust verdicts: where the rule that decided and the other rules disagree, and a random sample to read.

`audit.json` stands beside the verdict shards:

    {"version": 1, "seed": 0, "rows_per_source": 1000,
     "verdicts": [{"source", "rule", "correct", "wrong", "no_answer"}],
     "disagreements": [{"source", "rule", "other", "compared", "differ",
                        "examples": [{<row>, "other_verdict", "other_prediction"}]}],
     "sample": [{<row>}]}

* `verdicts` counts all rows, by source ("" without one) and by the rule that decided.
* `disagreements` looks at `rows_per_source` rows of each source, or all if there are fewer: `other` is another rule
  that could have judged the same answer ("number", "anls", ..., or "internvl" for the released scorers), `compared`
  the rows that both judged, `differ` those with another verdict. At most 5 examples each; rules that always agree are
  listed too, with `differ` 0.
* `sample` has 12 rows of each source.
* <row> is {"id", "index", "source", "images", "question", "answers", "response", "prediction", "verdict", "rule"}, and
  "judge" where a model decided; `index` is the number of the response. Texts are cut to 2,000 characters, with "..."
  where something is missing: at the beginning of a response, at the end of the others.

Rows are chosen by a hash of the row and the seed, so neither shards nor workers change the file. The shards are read
once and only the places of the chosen rows are kept.
"""

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from data_builders.records import Row
from data_builders.rules.internvl import judge_row_like_internvl
from data_builders.shards import Place, read_placed_rows, shard_paths
from data_builders.verify import Judgement, accepted_answers, judge_prediction, judge_row, rules_for

AUDIT_FILE = "audit.json"
VERSION = 1
NUM_READ = 12
NUM_EXAMPLES = 5
MAX_CHARS = 2_000

# The hash of a row with its sign changed, so that a heap drops the largest, and where it stands: file, line and byte.
Chosen = tuple[int, str, int, int]


def audit_verdicts(folder: Path, *, rows_per_source: int, seed: int = 0) -> Row:
    """What `audit.json` holds.

    Args:
        folder: The verdict shards.
        rows_per_source: How many rows of each source are looked at; 0 only counts.
        seed: Which rows.
    """
    verdicts, chosen = _count_and_choose(folder, rows_per_source, seed)
    return {
        "version": VERSION,
        "seed": seed,
        "rows_per_source": rows_per_source,
        "verdicts": verdicts,
        "disagreements": _disagreements(chosen),
        "sample": [_shown(row) for entries in chosen.values() for row in _rows_at(entries[:NUM_READ])],
    }


def _count_and_choose(folder: Path, num: int, seed: int) -> tuple[list[Row], dict[str, list[Chosen]]]:
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    heaps: defaultdict[str, list[Chosen]] = defaultdict(list)
    for path in shard_paths(folder):
        for place, row in read_placed_rows(path):
            source = row.get("source", "")
            counts[source, row["rule"]][row["verdict"]] += 1
            if not num:
                continue
            entry = (-_hash(row, seed), str(path), place.line, place.byte)
            heap = heaps[source]
            if len(heap) < num:
                heapq.heappush(heap, entry)
            elif entry[0] > heap[0][0]:
                heapq.heapreplace(heap, entry)
    verdicts = [
        {"source": source, "rule": rule, **{verdict: count[verdict] for verdict in ("correct", "wrong", "no_answer")}}
        for (source, rule), count in sorted(counts.items())
    ]
    return verdicts, {source: sorted(heaps[source], reverse=True) for source in sorted(heaps)}


def _hash(row: Row, seed: int) -> int:
    index = row.get("sampler", {}).get("index", 0)
    key = f"{seed}\0{row['id']}\0{index}\0{row.get('response')}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())


def _rows_at(entries: list[Chosen]) -> Iterator[Row]:
    for _, path, line, byte in entries:
        yield next(row for _, row in read_placed_rows(Path(path), start=Place(line, byte)))


def _disagreements(chosen: dict[str, list[Chosen]]) -> list[Row]:
    found: dict[tuple[str, str, str], Row] = {}
    for source, entries in chosen.items():
        for row in _rows_at(entries):
            for other, judgement in other_judgements(row):
                key = {"source": source, "rule": row["rule"], "other": other}
                entry = found.setdefault(tuple(key.values()), {**key, "compared": 0, "differ": 0, "examples": []})
                entry["compared"] += 1
                if judgement.verdict == row["verdict"]:
                    continue
                entry["differ"] += 1
                if len(entry["examples"]) < NUM_EXAMPLES:
                    said = {"other_verdict": judgement.verdict, "other_prediction": _cut(judgement.prediction)}
                    entry["examples"].append(_shown(row) | said)
    return [found[key] for key in sorted(found)]


def other_judgements(row: Row) -> Iterator[tuple[str, Judgement]]:
    """What the other rules that apply to the answer say of a verdict row; nothing of failed responses.

    For a verdict of the released scorers that is what our own rule says, under its name.
    """
    if row["rule"] in ("failed", "empty_answer"):
        return
    if row["rule"].startswith("internvl:"):
        judgement = judge_row(row)
        yield judgement.rule, judgement
        return
    if row["prediction"] is not None:
        answers, asked = accepted_answers(row), {"question": row["question"], "options": row.get("options")}
        for rule in rules_for(answers[0], **asked):
            if rule != row["rule"]:
                yield rule, judge_prediction(row["prediction"], answers, kind=rule, **asked)
    yield "internvl", judge_row_like_internvl(row)


def _shown(row: Row) -> Row:
    response = row["response"] or ""
    return {
        "id": row["id"],
        "index": row.get("sampler", {}).get("index", 0),
        "source": row.get("source", ""),
        "images": row.get("images", []),
        "question": _cut(row["question"]),
        "answers": [_cut(answer) for answer in accepted_answers(row)],
        "response": response if len(response) <= MAX_CHARS else "..." + response[-MAX_CHARS:],
        "prediction": _cut(row["prediction"]),
        **{name: row[name] for name in ("verdict", "rule", "judge") if name in row},
    }


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_CHARS else text[:MAX_CHARS] + "..."

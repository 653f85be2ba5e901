"""`mpo filter`: keeps the conversations that are worth learning from, and puts every other one aside with its reason.

Rules come first, as they are cheap; a model then judges what is left, and is not asked about the rest. Kept rows are
as they were, with a `filter` that says who judged. `dropped/` holds each other row whole, under `row`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from data_builders.backends import SamplerConfig, check_sampler, open_sampler
from data_builders.engine import DROPPED, Chunk, EngineConfig, chunks_of_rows, drop_note, run_step
from data_builders.filtering.counts import COUNTS_FILE, count_rows, table_cells
from data_builders.filtering.judging import Opinion, judge_conversations, prompts_for
from data_builders.filtering.rules import Fault, RuleOptions, image_faults, text_fault
from data_builders.images import image_path
from data_builders.records import Conversation, InputError, Row, Summary
from data_builders.samplers import Sampler
from data_builders.shards import claim_folder, write_text

NO_VERDICT = "the judge gave no verdict"

_TOP_LOGPROBS = 20
_LOOKS = 20  # into the input, as many images each, before the work starts


@dataclass(kw_only=True)
class FilterConfig(EngineConfig, SamplerConfig, RuleOptions):
    """Settings of `mpo filter`; without a `model` the rules alone decide."""

    conversations: str = field(metadata={"help": "Conversations: a JSONL file or a folder of shards."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "The judge: model folder or Hub name; with `server`, the name it is served under; null: none."
        },
    )
    filter_prompt: str = field(
        default="filter",
        metadata={
            "help": "What the judge is asked: filter (in the conversation's language), filter_zh, or a .jinja file."
        },
    )
    min_p_yes: float | None = field(
        default=None,
        metadata={
            "help": "Keep a row if the judge's P(Yes), over its P(Yes) and P(No), is at least this, in the place of "
            "its word, which must still be Yes or No and come first, without thoughts before it; null: keep it if the "
            "word is Yes (paper)."
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "Of the judge; 0 is greedy."})
    max_new_tokens: int = field(default=16, metadata={"help": "Of the judge; more if it thinks before it answers."})
    shard_size: int = field(
        default=1024, metadata={"help": "Conversations per shard: what a killed run repeats at most."}
    )

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other.

        Raises:
            InputError: A value is out of its range, or is about a judge and there is none.
        """
        EngineConfig.__post_init__(self)
        RuleOptions.__post_init__(self)
        if self.min_p_yes is not None and not 0.0 <= self.min_p_yes <= 1.0:
            raise InputError(f"`min_p_yes` must be between 0 and 1, got {self.min_p_yes}: it is a probability.")
        if not self.model and (self.server or self.min_p_yes is not None):
            given = "server" if self.server else "min_p_yes"
            raise InputError(f"`{given}` is about a judge: give its `model`, or leave both out to go by rules alone.")
        if self.model and self.images != "decode":
            raise InputError(
                f"`images: {self.images}` lets broken pictures pass, and the judge is shown them: with a `model` take "
                "`decode`."
            )

    def settings(self) -> Row:
        """All that changes what is written."""
        judge = self.judge()
        asked = {"judge": judge and {**judge, **self.provenance()}}
        return {**self.rules(), **asked, "shard_size": self.shard_size}

    def judge(self) -> Row | None:
        """Who judges, and by what; None if only rules do."""
        if not self.model:
            return None
        prompts = [prompt.id for prompt in prompts_for(self.filter_prompt)]
        return {"model": self.model, "prompt": prompts, "min_p_yes": self.min_p_yes}


CONFIGS = (FilterConfig,)


def run(config: FilterConfig) -> Summary:
    """Filters all conversations.

    Raises:
        InputError: The conversations, their images or the model are not what they should be, or the folder holds
            other work.
    """
    source, output = Path(config.conversations), Path(config.output)
    settings = config.settings()
    chunks = chunks_of_rows(source, Conversation, config.shard_size)
    _look_for_images(chunks, config)
    if config.model:
        check_sampler(config)
    claim_folder(output, settings, [source, *(config.model_paths() if config.model else [])])
    run_step(partial(_Filtering, config), chunks, config, title="filtering")
    counts = count_rows(output, config.judge())
    write_text(output / COUNTS_FILE, json.dumps(counts, ensure_ascii=False, indent=1) + "\n")
    return _summary(config, counts)


def _look_for_images(chunks: Sequence[Chunk], config: FilterConfig) -> None:
    """Stops where no image at all is found, as that is no fault of the rows.

    Raises:
        InputError: Of the images that rows here and there name, there is none.
    """
    if config.images == "ignore":
        return
    problem = None
    for chunk in chunks[:: max(1, len(chunks) // _LOOKS)]:
        for name in islice((name for row in chunk.rows() for name in row.get("images") or ()), _LOOKS):
            try:
                image_path(Path(config.image_root), name)
            except InputError as error:
                problem = problem or error
            else:
                return
    if problem:
        raise InputError(f"none of the images that were looked for is there, so no row would be left: {problem}")


class _Filtering:
    """The step: conversation rows to those that are kept."""

    def __init__(self, config: FilterConfig) -> None:
        self.config, self.sampler = config, open_sampler(config) if config.model else None

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        return filter_rows(rows, self.config, self.sampler)


def filter_rows(
    rows: Sequence[Row], config: FilterConfig, sampler: Sampler | None = None
) -> tuple[list[Row], list[Row]]:
    """The conversations that are kept, and those that are put aside: `id`, `reason`, `detail`, `judge` and `row`.

    Args:
        rows: Conversation rows.
        config: The rules, and what the judge is asked.
        sampler: The judge; None keeps what the rules keep.
    """
    faults = rule_faults(rows, config)
    passed = [index for index, fault in enumerate(faults) if fault is None]
    opinions = dict(zip(passed, _opinions([rows[i] for i in passed], config, sampler), strict=sampler is not None))
    kept, dropped = [], []
    for index, row in enumerate(rows):
        opinion = opinions.get(index)
        fault = verdict_fault(opinion, config.min_p_yes) if opinion else faults[index]
        if fault is None:
            kept.append(_kept(row, opinion))
        else:
            dropped.append(_put_aside(row, fault, opinion))
    return kept, dropped


def rule_faults(rows: Sequence[Row], config: FilterConfig) -> list[Fault | None]:
    """What the rules find wrong with each conversation, if anything; pictures come after texts."""
    faults = [text_fault(row, config) for row in rows]
    named = [[] if fault else row.get("images") or [] for row, fault in zip(rows, faults, strict=True)]
    broken = image_faults((name for names in named for name in names), Path(config.image_root), config)
    return [
        fault or next((broken[name] for name in names if name in broken), None)
        for fault, names in zip(faults, named, strict=True)
    ]


def _opinions(rows: Sequence[Row], config: FilterConfig, sampler: Sampler | None) -> list[Opinion]:
    if sampler is None:
        return []
    settings = replace(config.drawing(), top_logprobs=_TOP_LOGPROBS)
    asked = {"prompts": prompts_for(config.filter_prompt), "need_p_yes": config.min_p_yes is not None}
    return judge_conversations(rows, sampler, settings, **asked)


def verdict_fault(opinion: Opinion, min_p_yes: float | None) -> Fault | None:
    """Why a conversation is left out that a judge has looked at, if it is.

    Args:
        opinion: What the judge made of it.
        min_p_yes: Least P(Yes) of a conversation that is kept; None goes by the judge's word.
    """
    if opinion.failed:
        return Fault("the judge failed", "")
    if opinion.is_good is None:
        return Fault(NO_VERDICT, "")
    if min_p_yes is None:
        return None if opinion.is_good else Fault("the judge said No", "")
    if opinion.p_yes is None:
        return Fault("P(Yes) unknown", "neither word is among the likeliest first tokens")
    return None if opinion.p_yes >= min_p_yes else Fault("P(Yes) too small", f"{opinion.p_yes:g}")


def _kept(row: Row, opinion: Opinion | None) -> Row:
    if opinion is None:
        return row
    origin = {name: value for name, value in opinion.said.items() if name != "reply"}
    earlier = {"earlier": row["filter"]} if "filter" in row else {}
    return {**row, "filter": {**origin, **earlier}}


def _put_aside(row: Row, fault: Fault, opinion: Opinion | None) -> Row:
    said = {"judge": opinion.said} if opinion else {}
    return {"id": row["id"], "reason": fault.reason, "detail": fault.detail, **said, "row": row}


def _summary(config: FilterConfig, counts: Row) -> Summary:
    output, total = Path(config.output), counts["total"]
    notes = [*drop_note(output), f"The table is in {output / COUNTS_FILE}."]
    unread = sum(reason["rows"] for reason in counts["reasons"] if reason["reason"] == NO_VERDICT)
    if unread:
        notes.append(f"{unread:,} replies were neither Yes nor No: they are under `judge` in {output / DROPPED}.")
    train = (
        f"mpo sft --data {output} --image_root {config.image_root} --model_name_or_path MODEL --output_dir sft-model"
    )
    return Summary(
        "Filtered",
        ["category", "before", "after", "removed"],
        [table_cells(removal) for removal in (*counts["categories"], total)],
        notes=notes,
        next_command=train if total["after"] else None,
    )

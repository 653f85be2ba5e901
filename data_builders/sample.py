"""`mpo sample`: lets a model answer every question several times.

Questions in, one row per response out; a failed or truncated response is a row too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_builders.backends import SamplerConfig, check_sampler, open_sampler
from data_builders.engine import EngineConfig, chunks_of_rows, count_by_source, run_step
from data_builders.images import check_images
from data_builders.prompts import Language, PromptStyle, prompt_style
from data_builders.records import InputError, Question, Row, Summary
from data_builders.samplers import Completion, Request, Sampler, SamplingSettings
from data_builders.shards import claim_folder


@dataclass(kw_only=True)
class SampleConfig(EngineConfig, SamplerConfig):
    """Settings of `mpo sample`."""

    questions: str = field(metadata={"help": "Questions: a JSONL file or a folder of shards."})
    prompt: str = field(
        default="final_answer",
        metadata={"help": "Prompt style: final_answer, boxed, think, direct, plain, or a .jinja file."},
    )
    language: Language = field(
        default="auto",
        metadata={"help": "Words of the prompt: en, zh, or auto for those of each question's language."},
    )
    num_responses: int = field(default=32, metadata={"help": "Responses per question (paper: up to 32)."})
    shard_size: int = field(default=256, metadata={"help": "Questions per shard: what a killed run repeats at most."})


CONFIGS = (SampleConfig,)


def run(config: SampleConfig) -> Summary:
    """Samples responses to all questions.

    Raises:
        InputError: Questions, images or model are not what they should be, or the folder holds other work.
    """
    if config.num_responses < 1:
        raise InputError(f"`num_responses` must be at least 1, got {config.num_responses}.")
    questions = Path(config.questions)
    style = prompt_style(config.prompt, config.language)
    chunks = chunks_of_rows(questions, Question, config.shard_size)
    check_images((row for chunk in chunks for row in chunk.rows()), Path(config.image_root))
    check_sampler(config)
    settings = {"prompt": style.ids, "num_responses": config.num_responses, "shard_size": config.shard_size}
    claim_folder(Path(config.output), config.provenance() | settings, [questions, *config.model_paths()])
    run_step(partial(_Sampling, config), chunks, config, title="sampling")
    return _summary(config)


class _Sampling:
    """The step: question rows to response rows."""

    def __init__(self, config: SampleConfig) -> None:
        self.sampler, self.style = open_sampler(config), prompt_style(config.prompt, config.language)
        self.num, self.settings = config.num_responses, config.drawing()

    def __call__(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        return sample_responses(rows, self.sampler, self.style, self.num, self.settings), []


def sample_responses(
    questions: Sequence[Row], sampler: Sampler, style: PromptStyle, num: int, settings: SamplingSettings
) -> list[Row]:
    """Response rows for these questions, `num` for each, in their order.

    Args:
        questions: Question rows.
        sampler: What answers.
        style: How it is asked; Chinese questions in its Chinese wording if it has one.
        num: Responses per question.
        settings: How tokens are drawn.
    """
    styles = [style.for_question(row["question"]) for row in questions]
    prompts = [own.render(row["question"]) for own, row in zip(styles, questions, strict=True)]
    requests = [Request(p, tuple(row.get("images", []))) for p, row in zip(prompts, questions, strict=True)]
    answers = sampler.sample(requests, num, settings)
    origins = [{"model": sampler.name, "prompt": own.id, **settings.provenance()} for own in styles]
    return [
        {**row, "prompt": prompt, **_outcome(completion), "sampler": {**origin, "index": index}}
        for row, prompt, origin, completions in zip(questions, prompts, origins, answers, strict=True)
        for index, completion in enumerate(completions)
    ]


def _outcome(completion: Completion) -> Row:
    failed = {"error": completion.error} if completion.error else {}
    return {"response": completion.text, "finish_reason": completion.finish_reason, **failed}


def _summary(config: SampleConfig) -> Summary:
    reasons = ("stop", "length", "error")
    rows = [
        [source, f"{total.total():,}", *(f"{total[reason]:,}" for reason in reasons)]
        for source, total in count_by_source(Path(config.output), "finish_reason")
    ]
    return Summary(
        "Responses",
        ["source", "responses", "finished", "cut off", "failed"],
        rows,
        next_command=f"mpo judge --responses {config.output} --output verdicts",
    )

"""`mpo sample`: lets a model answer every question several times.

Questions in, one row per response out; a failed or truncated response is a row too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_builders.engine import chunks_of_rows, count_by_source, run_step
from data_builders.images import check_images
from data_builders.prompts import PromptStyle, prompt_style
from data_builders.records import InputError, Question, Row, Summary
from data_builders.samplers import Completion, HFSampler, Request, Sampler, SamplingSettings
from data_builders.shards import claim_folder


@dataclass
class SampleConfig:
    """Settings of `mpo sample`."""

    model: str = field(metadata={"help": "Model folder or Hub name."})
    questions: str = field(metadata={"help": "Questions: a JSONL file or a folder of shards."})
    output: str = field(metadata={"help": "Folder for the response shards."})
    image_root: str = field(default=".", metadata={"help": "Folder that image paths are relative to."})
    prompt: str = field(
        default="final_answer",
        metadata={"help": "Prompt style: final_answer, boxed, direct, plain, or a .jinja file."},
    )
    num_responses: int = field(default=32, metadata={"help": "Responses per question (paper: up to 32)."})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy (paper: 1.0)."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 keeps every token."})
    top_k: int = field(default=0, metadata={"help": "Keeps the k likeliest tokens; 0 keeps every token."})
    max_new_tokens: int = field(default=4096, metadata={"help": "Longer responses are cut and marked `length`."})
    seed: int = field(default=0, metadata={"help": "Same seed, same responses."})
    batch_size: int = field(default=64, metadata={"help": "Sequences generated at a time."})
    shard_size: int = field(default=256, metadata={"help": "Questions per shard: what a killed run repeats at most."})
    device: str | None = field(
        default=None, metadata={"help": "Where the model runs; null takes a GPU if there is one."}
    )
    dtype: str = field(default="auto", metadata={"help": "Weights in this type; auto takes the model's own."})


CONFIGS = (SampleConfig,)


def run(config: SampleConfig) -> Summary:
    """Samples responses to all questions.

    Raises:
        InputError: Questions, images or model are not what they should be, or the folder holds other work.
    """
    if config.num_responses < 1:
        raise InputError(f"`num_responses` must be at least 1, got {config.num_responses}.")
    questions, root = Path(config.questions), Path(config.image_root)
    style = prompt_style(config.prompt)
    chunks = chunks_of_rows(questions, Question, config.shard_size)
    check_images((row for chunk in chunks for row in chunk.rows()), root)
    drawing = SamplingSettings(config.temperature, config.top_p, config.top_k, config.max_new_tokens, config.seed)
    sampler = HFSampler(
        config.model, image_root=root, batch_size=config.batch_size, device=config.device, dtype=config.dtype
    )
    output = Path(config.output)
    claim_folder(
        output,
        {"model": config.model, "prompt": _name(style), "num_responses": config.num_responses, **asdict(drawing)}
        | {"shard_size": config.shard_size},
        [questions, Path(config.model)],
    )
    run_step(
        lambda rows: (sample_responses(rows, sampler, style, config.num_responses, drawing), []),
        chunks,
        output,
        title="sampling",
    )
    return _summary(config)


def sample_responses(
    questions: Sequence[Row], sampler: Sampler, style: PromptStyle, num: int, settings: SamplingSettings
) -> list[Row]:
    """Response rows for these questions, `num` for each, in their order.

    Args:
        questions: Question rows.
        sampler: What answers.
        style: How it is asked.
        num: Responses per question.
        settings: How tokens are drawn.
    """
    prompts = [style.render(row["question"]) for row in questions]
    requests = [Request(p, tuple(row.get("images", []))) for p, row in zip(prompts, questions, strict=True)]
    origin = {"model": sampler.name, "prompt": _name(style), **asdict(settings)}
    return [
        {**row, "prompt": prompt, **_outcome(completion), "sampler": {**origin, "index": index}}
        for row, prompt, completions in zip(questions, prompts, sampler.sample(requests, num, settings), strict=True)
        for index, completion in enumerate(completions)
    ]


def _name(style: PromptStyle) -> str:
    return f"{style.name}@{style.version}"


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

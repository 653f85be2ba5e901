"""How long N responses to each question take: `HFSampler` against `generate(num_return_sequences=N)`.

`python benchmarks/sampling.py --quick` takes under two minutes on two cores; `--help` lists the rest. In one run, on
the same questions, model and settings, and in batches of as many sequences, the methods take turns:

- `generate`: transformers' own, which computes the prompt of a question N times (its picture once) and goes on with
  rows that have ended until the last one has.
- `shared`: `HFSampler`, which computes the prompt once, copies its cache, and lets ended rows go.

Both begin with texts and picture files and end with texts. Where all responses have one length the two draw as many
tokens; where lengths vary, one token in 32 ends a response. fp32 on a CPU, bf16 on CUDA. Ratios are medians over
rounds, of the times of one round, with their quartiles.
"""

import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from harness import begin, parser, ratio_of, show, take_turns
from models import LARGE, PATCH, PICTURE, TOY, Sizes, build
from PIL import Image
from rich.table import Table

from data_builders.hf_sampler import HFSampler
from data_builders.samplers import Request, SamplingSettings

ROUNDS, QUICK_ROUNDS = 9, 3
SEQUENCES = 32  # in a batch of either method, on a CPU; twice as many on a GPU
ENDS_ONE_IN = 32  # where lengths vary
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}" + PICTURE + " {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Workload:
    """Questions of one kind; lengths are numbers of tokens.

    Attributes:
        num: Responses to each question.
        questions: How many there are.
        prompt: Length of a question with its pictures.
        new: Longest response.
        pictures: Of each question.
        varied: Whether responses end by themselves.
    """

    num: int
    questions: int
    prompt: int
    new: int
    pictures: int = 1
    varied: bool = False

    @property
    def name(self) -> str:
        """What it is like."""
        return f"N = {self.num}, varied" if self.varied else f"N = {self.num}"


def workloads(prompt: int, new: int, pictures: int, *, sequences: int) -> list[Workload]:
    """8 and 32 responses to each question, in one batch; and 32 that end at different places."""
    shape = {"prompt": prompt, "new": new, "pictures": pictures}
    plain = [Workload(num, max(1, sequences // num), **shape) for num in (8, 32)]
    return [*plain, Workload(32, max(1, sequences // 32), **shape, varied=True)]


def run(shapes: Sequence[Workload], sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Measures everything.

    Args:
        shapes: Of `workloads`.
        sizes: Of the model.
        rounds: Turns of each method.

    Returns:
        `machine` and `workloads` (see `measure`), as plain values.
    """
    has_gpu = torch.cuda.is_available()
    machine = {
        "processor": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if has_gpu else "float32",
        **{module.__name__: module.__version__ for module in (torch, transformers)},
        "model": sizes._asdict(),
    }
    with tempfile.TemporaryDirectory() as folder:
        sampler = _sampler(sizes, Path(folder))
        found = [measure(workload, sampler, sizes, rounds=rounds) for workload in shapes]
    return {"machine": machine, "workloads": found}


def _sampler(sizes: Sizes, folder: Path) -> HFSampler:
    model, processor = build(sizes, pictures=True, seed=0)
    processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return HFSampler(str(folder), image_root=folder, dtype=dtype)


def measure(workload: Workload, sampler: HFSampler, sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Times both methods on one workload, turn by turn.

    Args:
        workload: Of `workloads`.
        sampler: With the model that both use.
        sizes: Of that model.
        rounds: Turns of each method.

    Returns:
        Its `workload`, `shape` and `rounds`; by method, median `seconds` and `responses_per_second`; and the `ratio`.
    """
    requests = _requests(workload, sampler.image_root, sizes)
    settings = SamplingSettings(max_new_tokens=workload.new)
    sampler.batch_size = workload.num * workload.questions
    _set_ends(sampler, sizes, workload)
    tasks = {
        "generate": lambda: generate(sampler, requests, workload.num, settings),
        "shared": lambda: sampler.sample(requests, workload.num, settings),
    }
    for task in tasks.values():  # warms up, and finds out whether the model can share
        task()
    times = take_turns(tasks, rounds)
    quotients = [a / b for a, b in zip(times["generate"], times["shared"], strict=True)]
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    num_responses = workload.num * workload.questions
    return {
        "workload": workload.name,
        "shape": f"{workload.questions} x {workload.prompt:,} + {workload.new:,}",
        "rounds": rounds,
        "seconds": medians,
        "responses_per_second": {name: num_responses / seconds for name, seconds in medians.items()},
        "ratio": ratio_of("generate / shared", quotients),
    }


def _requests(workload: Workload, folder: Path, sizes: Sizes) -> list[Request]:
    generator = np.random.default_rng(0)
    side, num_words = sizes.side * PATCH, workload.prompt - workload.pictures * sizes.side**2
    requests = []
    for question in range(workload.questions):
        names = tuple(f"{question}-{number}.png" for number in range(workload.pictures))
        for name in names:
            Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name)
        words = generator.integers(0, sizes.vocabulary - 3, num_words)
        requests.append(Request(" ".join(f"w{word}" for word in words), names))
    return requests


def _set_ends(sampler: HFSampler, sizes: Sizes, workload: Workload) -> None:
    """Which tokens end a response, for both methods: one word in 32, or one that is never given."""
    tokenizer, config = sampler.tokenizer, sampler.model.generation_config
    some_words = list(range(len(tokenizer.all_special_ids), sizes.vocabulary, ENDS_ONE_IN))
    config.eos_token_id = some_words if workload.varied else [tokenizer.eos_token_id]
    config.suppress_tokens = tokenizer.all_special_ids


def generate(sampler: HFSampler, requests: Sequence[Request], num: int, settings: SamplingSettings) -> list[str]:
    """The same with `generate(num_return_sequences=num)`.

    Args:
        sampler: Whose model and processor are used.
        requests: One batch of questions.
        num: Responses to each.
        settings: How many tokens they have at most.
    """
    pictures = [[Image.open(sampler.image_root / name).convert("RGB") for name in r.images] for r in requests]
    texts = [f"{PICTURE} " * len(request.images) + request.prompt for request in requests]
    inputs = sampler.processor(
        images=pictures, text=texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    ).to(sampler.model.device, dtype=sampler.model.dtype)
    with torch.inference_mode():
        output = sampler.model.generate(
            **inputs, do_sample=True, top_k=0, num_return_sequences=num, max_new_tokens=settings.max_new_tokens
        )
    return sampler.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def table(results: dict[str, Any]) -> Table:
    """Times, and how many times as fast sharing is.

    Args:
        results: What `run` returned.
    """
    found = Table("workload", "shape", "generate, s", "shared, s", "responses/s")
    for column in ("generate / shared", "quartiles"):
        found.add_column(column)
    for result in results["workloads"]:
        seconds, ratio = result["seconds"], result["ratio"]
        found.add_row(
            result["workload"],
            result["shape"],
            f"{seconds['generate']:.2f}",
            f"{seconds['shared']:.2f}",
            f"{result['responses_per_second']['shared']:.1f}",
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes the figures where asked."""
    quick = "fewer rounds: under two minutes on two cores"
    options = begin(parser(__doc__, quick, ROUNDS, QUICK_ROUNDS), arguments)
    transformers.utils.logging.disable_progress_bar()
    if torch.cuda.is_available():
        shapes, sizes = workloads(1536, 256, 5, sequences=2 * SEQUENCES), LARGE
    else:
        shapes, sizes = workloads(512, 64, 1, sequences=SEQUENCES), TOY
    results = run(shapes, sizes, rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS))
    show(results, [table(results)], options.json)


if __name__ == "__main__":
    main(sys.argv[1:])

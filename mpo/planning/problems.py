"""What would stop or spoil a run, in words and with what to do about it.

Each function looks at one thing and returns what it found; `mpo.planning.plan` puts them in order.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from datasets import Dataset
from trl import ModelConfig

from data_builders.records import InputError
from mpo.config import MPOConfig
from mpo.lengths import Lengths
from mpo.overlong import FitReport, fit_to_length
from mpo.planning.footprint import Memory, Setup
from mpo.planning.placement import Change
from mpo.planning.versions import Installed
from mpo.tiling import Tiling

GIB = 2**30
_FAULTS = {  # by kind, the worst first: what it means, and what to do
    "source": (
        "sources cannot be read",
        "Run the steps that write them first, or correct `data`; of a Hub data set only what is in the cache is read.",
    ),
    "row": ("rows are broken", "Correct them or take them out: training stops at the first."),
    "image": (
        "rows have pictures that are missing, broken or outside of `image_root`",
        "Correct `image_root` or the paths, or take the rows out: training stops at the first.",
    ),
    "equal": ("pairs have the same text as chosen and as rejected", "Take them out: they teach no preference."),
}
_SHOWN = 3  # examples of each kind of fault
_OPTIONAL = ("deepspeed", "liger-kernel")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, or that one should know.

    Attributes:
        severity: "error" stops or spoils the run.
        what: What is wrong.
        fix: What to do.
    """

    severity: Literal["error", "warning"]
    what: str
    fix: str


@dataclass
class Faults:
    """What is wrong with rows, by kind: how many, and the first few in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Counts one."""
        self.counts[kind] += 1
        if self.counts[kind] <= _SHOWN:
            self.examples.setdefault(kind, []).append(example)


def data_problems(faults: Faults) -> list[Problem]:
    """Rows and sources that cannot be trained on."""
    return [
        Problem("error", f"{faults.counts[kind]:,} {what}: {' | '.join(faults.examples[kind])}", fix)
        for kind, (what, fix) in _FAULTS.items()
        if faults.counts[kind]
    ]


def memory_problems(memory: Memory, changes: list[Change], *, together: bool, limit: float) -> list[Problem]:
    """A run that does not fit.

    Args:
        memory: As configured.
        changes: Of `mpo.planning.placement.make_fit`.
        together: Whether all of them are needed.
        limit: Bytes of a GPU.
    """
    if memory.total <= limit:
        return []
    what = f"a GPU would need {memory.total / GIB:.1f} GiB and has {limit / GIB:.0f}."
    sizes = [f"`{change.text}` ({change.memory.total / GIB:.1f} GiB)" for change in changes]
    if not together:
        return [Problem("error", what, f"Any of these is enough: {'; '.join(sizes)}.")]
    if changes and changes[-1].memory.total <= limit:
        return [Problem("error", what, f"All of these together: {', then '.join(sizes)}.")]
    tried = f"Not enough together: {', then '.join(sizes)}. " if changes else ""
    return [Problem("error", what, f"{tried}Take larger GPUs, more of them with ZeRO-3, or a lower `max_length`.")]


def length_problems(
    sample: Dataset, lengths: Lengths, args: MPOConfig, *, longest: int | None
) -> tuple[FitReport | None, list[Problem]]:
    """What `max_length` does to the rows of a sample.

    Args:
        sample: N rows.
        lengths: Theirs.
        args: Of the trainer.
        longest: Positions that the model was made for.

    Returns:
        The report of `mpo.overlong`, None where no row stays; and problems.
    """
    before, total, found = int(lengths.before_response.max()), int(lengths.total.max()), []
    settings = {"max_length": args.max_length, "truncation_mode": args.truncation_mode}
    try:
        report = fit_to_length(sample, lengths, **settings, overlong="drop")[1]
    except InputError as error:
        return None, [Problem("error", str(error), f"Nothing is cut from `max_length: {total}` on.")]
    where = f"of {len(sample):,} rows"
    if report.dropped:
        drops = args.overlong == "drop"
        what = f"{len(report.dropped):,} {where} would lose pictures or a whole response to `max_length`"
        found.append(
            Problem(
                "warning" if drops else "error",
                what + (" and are left out." if drops else f"={args.max_length}."),
                f"Set `max_length` to at least {before + 1}; {total} cuts nothing."
                + ("" if drops else " Or `overlong: drop` leaves them out."),
            )
        )
    if report.num_cut:
        what = f"{report.num_cut:,} {where} lose the end of a response to `max_length={args.max_length}`."
        found.append(Problem("warning", what, f"`max_length: {total}` cuts nothing."))
    used = min(total, args.max_length or total)
    if longest is not None and used > longest:
        what = f"the longest row has {used:,} tokens, and the model was made for {longest:,}."
        found.append(Problem("warning", what, f"Set `max_length: {longest}`, or lower the number of tiles."))
    return report, found


def version_problems(versions: Iterable[Installed], *, needed: Iterable[str]) -> list[Problem]:
    """Packages that are missing or too old or new; those of `needed` although they are optional."""
    found = []
    for package in versions:
        if package.fits or (package.version is None and package.name in _OPTIONAL and package.name not in needed):
            continue
        have = f"{package.name} {package.version} is installed" if package.version else f"{package.name} is missing"
        install = f"`pip install -c constraints.txt '{package.name}{package.wanted}'`."
        found.append(Problem("error", f"{have}, and mpo needs {package.wanted or 'it for this run'}.", install))
    return found


def setting_problems(model_config: ModelConfig, setup: Setup, *, has_adapters: bool) -> list[Problem]:
    """Settings that do not go together, or that this machine cannot tell about."""
    found = []
    quantized = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model_config, name)), None)
    if quantized and not has_adapters:
        what = f"`{quantized}` stores weights that cannot be trained."
        found.append(Problem("error", what, "Add `use_peft: true` (QLoRA)."))
    if setup.trained_bytes == 2 and not setup.master and not has_adapters:
        found.append(
            Problem(
                "error",
                f"weights are trained in {model_config.dtype}, whose steps of 0.4% swallow the updates of a learning "
                "rate as small as MPO's.",
                "Set `dtype: float32` (with `bf16: true` products are still in bf16), or use DeepSpeed.",
            )
        )
    if setup.quantized_bytes and setup.stage == 3:
        what = "ZeRO-3 cannot shard weights that bitsandbytes has quantized."
        found.append(Problem("error", what, "Take configs/deepspeed/zero2.json, or none."))
    if quantized and find_spec("bitsandbytes") is None:
        what = f"`{quantized}` needs bitsandbytes, which is not installed here."
        found.append(Problem("warning", what, "`pip install bitsandbytes` on the machine that trains."))
    if model_config.attn_implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        what = "`attn_implementation: flash_attention_2` needs flash-attn, which is not installed here."
        found.append(Problem("warning", what, "Install it on the machine that trains, or leave the setting out."))
    return found


def tiling_problems(tiling: Tiling | None) -> list[Problem]:
    """Pictures that training cuts into tiles, which is not counted here."""
    if tiling is None:
        return []
    what = (
        f"training cuts each picture into {tiling.n_min} to {tiling.n_max} tiles and an overview (`tiling`): tokens, "
        "memory and time are counted here as if it did not."
    )
    return [Problem("warning", what, f"Reckon with up to {tiling.n_max + 1} times the tokens of pictures.")]


def sharing_problems(args: MPOConfig, reason: str | None) -> list[Problem]:
    """Prefixes that should be shared and cannot be; `reason` is that of `mpo.forest_inputs.why_not`."""
    if not args.share_prefixes or reason is None:
        return []
    what = f"prefixes will not be shared: {reason}. Rows are computed one by one, with the same numbers."
    return [Problem("warning", what, "Nothing has to be done; a change of what is named makes it faster.")]


def step_problems(rows: int, batch: int) -> list[Problem]:
    """A data set that is smaller than one optimizer step."""
    if rows >= batch:
        return []
    what = f"an optimizer step takes {batch:,} pairs, and there are {rows:,}."
    return [Problem("warning", what, "Lower `gradient_accumulation_steps` or `per_device_train_batch_size`.")]

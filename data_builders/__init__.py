"""Makes MMPR-style preference data: questions -> responses -> verdicts -> pairs. Needs no torch to import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_builders.dropout_ntp import cut_response as cut_response
    from data_builders.pair import make_pairs as make_pairs
    from data_builders.records import InputError as InputError
    from data_builders.rules.extract import extract_answer as extract_answer
    from data_builders.verify import Judgement as Judgement
    from data_builders.verify import judge_response as judge_response
    from data_builders.verify import verify_answer as verify_answer

_HOMES = {
    "InputError": "records",
    "Judgement": "verify",
    "cut_response": "dropout_ntp",
    "extract_answer": "rules.extract",
    "judge_response": "verify",
    "make_pairs": "pair",
    "verify_answer": "verify",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Mixed Preference Optimization of vision-language models, on top of TRL. The public names load what they need."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo.config import MPOConfig as MPOConfig
    from mpo.config import SFTConfig as SFTConfig
    from mpo.fused import LigerFusedLinearMPOLoss as LigerFusedLinearMPOLoss
    from mpo.losses import MPOLoss as MPOLoss
    from mpo.losses import generation_loss as generation_loss
    from mpo.losses import mpo_loss as mpo_loss
    from mpo.losses import preference_loss as preference_loss
    from mpo.losses import quality_loss as quality_loss
    from mpo.reward_shift import RewardShift as RewardShift
    from mpo.sft_trainer import SFTTrainer as SFTTrainer
    from mpo.trainer import MPOTrainer as MPOTrainer

__version__ = "0.1.0"

_HOMES = {
    "LigerFusedLinearMPOLoss": "fused",
    "MPOConfig": "config",
    "MPOLoss": "losses",
    "MPOTrainer": "trainer",
    "RewardShift": "reward_shift",
    "SFTConfig": "config",
    "SFTTrainer": "sft_trainer",
    "generation_loss": "losses",
    "mpo_loss": "losses",
    "preference_loss": "losses",
    "quality_loss": "losses",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

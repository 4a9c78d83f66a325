"""Pure tensor functions: score samples, choose coresets, and judge how reliable scores are."""

from lightning_cld.functional.cld import cld_scores
from lightning_cld.functional.confidence import early_confidence
from lightning_cld.functional.diagnostics import alignment, chance_alignment, rank_agreement, reference_reliability
from lightning_cld.functional.selection import proportional_holdout, select_drawn, select_top
from lightning_cld.functional.step_losses import at_epoch_ends
from lightning_cld.functional.uncertainty import aleatoric_uncertainty

__all__ = [
    "aleatoric_uncertainty",
    "alignment",
    "at_epoch_ends",
    "chance_alignment",
    "cld_scores",
    "early_confidence",
    "proportional_holdout",
    "rank_agreement",
    "reference_reliability",
    "select_drawn",
    "select_top",
]

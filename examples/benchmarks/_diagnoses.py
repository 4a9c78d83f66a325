"""How well the library tells how many labels are wrong, and which, from one proxy's losses."""

from __future__ import annotations

from typing import Any

from _rule_cases import Proxy
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_cld import baselines


def diagnose(proxy: Proxy) -> dict[str, Any]:
    """Compares the estimated shares of wrong labels with the true ones, and the listed suspects with the wrong labels.

    Returns:
        The true `share`, the estimate and the ends of its interval; the mean absolute `class_error`, and the share of
        classes whose interval holds their true share; of `CLDScores.suspects`, and of as many samples with the lowest
        CLD, their precision and recall; and AUROC by several scores. Precision is empty where none are listed, AUROC
        where no label is wrong.
    """
    scores, wrong = proxy.scores, proxy.wrong
    estimate, low, high = scores.metadata["implausible"]["share"]
    true_share = float(wrong.double().mean())
    errors, held = [], []
    for label, (middle, start, end) in scores.metadata["implausible"]["classes"].items():
        of_class = float(wrong[proxy.labels == int(label)].double().mean())
        errors.append(abs(middle - of_class))
        held.append(_holds(start, of_class, end))
    suspects = scores.suspects()
    lowest = scores.values.argsort()[: len(suspects)]
    negative = scores.suspects(max_score=0.0)
    result: dict[str, Any] = {
        "share": round(true_share, 4),
        "estimate": estimate,
        "low": low,
        "high": high,
        "held": int(_holds(low, true_share, high)),
        "class_error": round(sum(errors) / len(errors), 4),
        "classes_held": round(sum(held) / len(held), 4),
    }
    for name, listed in (("suspects", suspects), ("as many of lowest CLD", lowest), ("CLD below zero", negative)):
        result[f"{name}: count"] = len(listed)
        result[f"{name}: precision"] = round(float(wrong[listed].double().mean()), 4) if len(listed) else ""
        result[f"{name}: recall"] = round(float(wrong[listed].sum() / wrong.sum()), 4) if wrong.any() else ""
    for name, suspicion in suspicions(proxy).items():
        # Ranks, because torchmetrics squashes values outside of [0, 1].
        ranks = suspicion.argsort(stable=True).argsort().double() / len(suspicion)
        result[f"AUROC: {name}"] = round(float(binary_auroc(ranks, wrong.int())), 4) if wrong.any() else ""
    return result


def suspicions(proxy: Proxy) -> dict[str, Tensor]:
    """What is high for samples whose label may be wrong."""
    scores = proxy.scores
    return {
        "plausibility x confidence": -(scores.plausibility.double() * scores.confidence.double()),
        "mean loss": baselines.highest_mean_loss(proxy.losses),
        "low CLD": -scores.values,
        "low early confidence": -scores.confidence,
    }


def _holds(low: float, value: float, high: float) -> bool:
    # The ends are rounded to four digits.
    return low - 5e-5 <= value <= high + 5e-5

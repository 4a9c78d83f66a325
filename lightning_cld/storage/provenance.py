"""Where scores come from: the metadata that every file of scores holds."""

from __future__ import annotations

from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

import torch
from torch import Tensor


def provenance(
    train_classes: Tensor | None,
    val_classes: Tensor | None,
    references: int,
    differences: int | None,
    *,
    scored_by: str = "CLD",
    every_n_epochs: int = 1,
) -> dict[str, Any]:
    """Returns how and when the scores were made, library versions and reference sizes, as plain JSON values.

    Args:
        train_classes: Classes of the training samples, integer, `[N]`; None for one class.
        val_classes: Classes of the validation samples, integer, `[M]`; None for one class. Those that are not trained
            are not counted.
        references: The number of validation samples.
        differences: The number of differences that the scores are made of; None for scores of another kind.
        scored_by: The name of the score.
        every_n_epochs: The spacing of the scored checkpoints, in epochs.
    """
    classes = torch.zeros(references) if val_classes is None else val_classes
    if train_classes is not None and val_classes is not None:
        classes = val_classes[torch.isin(val_classes, train_classes.to(val_classes.device))]
    labels, counts = torch.unique(classes.long(), return_counts=True)
    return {
        **({} if differences is None else {"differences": differences}),
        "scored_by": scored_by,
        "scored_every_n_epochs": every_n_epochs,
        "reference_sizes": {str(c): n for c, n in zip(labels.tolist(), counts.tolist(), strict=True)},
        "versions": dict(_known_versions()),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@cache
def _known_versions() -> dict[str, str]:
    versions = {"python": python_version()}
    for name in ("lightning-cld", "lightning", "torch", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a source tree, or in an environment with pytorch-lightning
            versions[name] = "not installed"
    return versions

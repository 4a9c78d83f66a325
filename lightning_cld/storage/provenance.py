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
    val_classes: Tensor | None, references: int, *, scored_by: str = "CLD", every_n_epochs: int = 1
) -> dict[str, Any]:
    """Returns how and when the scores were made, library versions and reference sizes, as plain JSON values.

    Args:
        val_classes: Classes of the validation samples, integer, `[M]`; None for one class.
        references: The number of validation samples.
        scored_by: The name of the score.
        every_n_epochs: The spacing of the scored checkpoints, in epochs.
    """
    classes = torch.zeros(references) if val_classes is None else val_classes
    labels, counts = torch.unique(classes.long(), return_counts=True)
    return {
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

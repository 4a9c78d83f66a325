"""A coreset that is given as a list: positions in the train set or names of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_cld.functional.arrays import as_tensor, described
from lightning_cld.functional.checks import is_integer
from lightning_cld.names import SampleNames


def as_names(coreset: Any) -> SampleNames | None:
    """Names of samples, in order; None for what are no names."""
    if isinstance(coreset, SampleNames):
        return coreset
    if not isinstance(coreset, (Sequence, np.ndarray)) or len(coreset) == 0 or not isinstance(coreset[0], str):
        return None
    names = SampleNames(coreset)
    if len(names) < len(coreset):
        raise ValueError(f"Names must not repeat, but {len(coreset) - len(names)} of {len(coreset)} do.")
    return names


def as_positions(coreset: Any) -> list[int]:
    """Positions in the train set, each once, in the order given; raises if they are something else."""
    # Of a list numpy makes an array several times faster than torch.
    is_list = isinstance(coreset, list) and len(coreset) > 0 and type(coreset[0]) is int
    positions = as_tensor(np.asarray(coreset) if is_list else coreset)
    if positions is None:
        raise TypeError(
            "coreset must be CLDScores, the path of a scores file, or a sequence of whole numbers, got "
            f"{described(coreset)}. Give the `.scores` of a CLDCallback, or the `.score()` of LossTrajectories."
        )
    if positions.ndim == 1 and len(positions) == 0:
        raise ValueError("coreset is empty: there would be nothing to train on.")
    if positions.dtype == torch.bool:
        raise TypeError("coreset must be positions, got a mask of bool: use mask.nonzero().flatten().")
    if positions.ndim != 1 or not is_integer(positions):
        raise TypeError(
            "coreset must be CLDScores, the path of a scores file, or a sequence of whole numbers, got "
            f"{type(coreset).__name__} of shape {list(positions.shape)} and dtype {positions.dtype}."
        )
    positions = positions.cpu().long()
    if positions.min() < 0:
        raise ValueError(f"Positions must not be negative, got {int(positions.min())}.")
    ordered = positions if (positions[1:] > positions[:-1]).all() else positions.sort().values
    repeated = torch.unique(ordered[1:][ordered[1:] == ordered[:-1]]).tolist()
    if repeated:
        raise ValueError(f"Positions must not repeat, but {len(repeated)} do ({repeated[:5]}): use torch.unique.")
    checked: list[int] = positions.tolist()
    return checked

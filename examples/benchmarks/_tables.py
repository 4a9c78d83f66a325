"""Tables of numbers as data: rows are samples, and a network with one hidden layer can be trained on them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from _common import PRESETS as IMAGE_PRESETS
from _common import Images, Preset

_ARRAYS = ("pool_inputs", "pool_classes", "test_inputs", "test_classes")
_TABLES = {
    "letter": Preset("Letter Recognition", "mlp", epochs=20, steps=2_000, batch_size=128, lr=0.1, holdout=0.15),
    "landsat": Preset("Statlog Landsat", "mlp", epochs=30, steps=1_500, batch_size=64, lr=0.1, holdout=0.15),
}
PRESETS = {**IMAGE_PRESETS, **_TABLES}


def is_table(name: str) -> bool:
    return name in _TABLES


def load_table(path: Path) -> tuple[Images, Images]:
    """Reads a pool and a test set from an `.npz` file.

    The file holds `pool_inputs` `[N, F]`, `pool_classes` `[N]`, `test_inputs` `[M, F]` and `test_classes` `[M]`. Each
    column is standardised by the pool's mean and deviation.

    Returns:
        Pool and test set, as float32 images `[N, 1, 1, F]`.

    Raises:
        SystemExit: If there is no such file, or it holds something else.
    """
    try:
        with np.load(path) as file:
            arrays = [file[name] for name in _ARRAYS]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path} must be an .npz file that holds {', '.join(_ARRAYS)} ({error}).") from None
    pool, pool_classes, test, test_classes = (torch.from_numpy(array) for array in arrays)
    std, mean = torch.std_mean(pool.float(), dim=0)
    std = std.where(std > 0, 1.0)  # a column that never changes says nothing
    parts = [((inputs.float() - mean) / std)[:, None, None] for inputs in (pool, test)]
    return Images(parts[0], pool_classes.long()), Images(parts[1], test_classes.long())

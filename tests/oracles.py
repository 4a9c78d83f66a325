"""CLD from its definition, in float64 with numpy and scipy. The tests compare the library with this."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.stats import pearsonr
from torch import Tensor


def losses(rows: int, samples: int, seed: int = 0) -> Tensor:
    """Falling, noisy losses, float32 `[rows, samples]`."""
    generator = np.random.default_rng(seed)
    falling = 2.0 * np.exp(-np.arange(rows) / 4.0)[:, None]
    return torch.from_numpy((falling + generator.random((rows, samples))).astype(np.float32))


def cld_oracle(train, val, train_classes=None, val_classes=None) -> np.ndarray:
    """CLD of every column of `train`, float64; NaN where it is undefined."""
    train, val = _float64(train), _float64(val)
    train_classes = np.zeros(train.shape[1], int) if train_classes is None else np.asarray(train_classes)
    val_classes = np.zeros(val.shape[1], int) if val_classes is None else np.asarray(val_classes)
    references = {c: _reference(val[:, val_classes == c]) for c in np.unique(train_classes)}
    return np.array([_correlation(column, references[c]) for column, c in zip(train.T, train_classes, strict=True)])


def uncertainty_oracle(train) -> np.ndarray:
    """Mean of p (1 - p) of every column of `train` over its logged rows, float64; NaN where a loss is infinite."""
    train = _float64(train)
    chances = np.exp(-train)
    mean = np.nanmean(chances * (1 - chances), axis=0)
    return np.where(np.isinf(train).any(axis=0), np.nan, mean)


def confidence_oracle(train, val, counted=None) -> tuple[np.ndarray, np.ndarray]:
    """Mean `exp(-loss)` of both up to the row with the lowest mean of the `counted` columns of `val`, float64.

    But over as many rows as the largest power of two up to half of them, at least. Rows that either side lacks are left
    out. NaN where a loss is infinite.
    """
    train, val = _float64(train), _float64(val)
    both = ~(np.isnan(train).all(axis=1) | np.isnan(val).all(axis=1))
    train, val = train[both], val[both]
    deciding = val if counted is None else val[:, np.asarray(counted)]
    least = max((2**power for power in range(20) if 2 ** (power + 1) <= len(val)), default=0)
    rows = max(np.nanmean(deciding, axis=1).argmin() + 1, least)
    found = []
    for part in (train[:rows], val[:rows]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, which is right here
            found.append(np.where(np.isinf(part).any(axis=0), np.nan, np.nanmean(np.exp(-part), axis=0)))
    return found[0], found[1]


def held_out_oracle(val, val_classes) -> np.ndarray:
    """CLD of every column of `val` against the other columns of its class, one after another, float64."""
    val, val_classes = _float64(val), np.asarray(val_classes)
    found = []
    for column, label in enumerate(val_classes):
        others = np.flatnonzero((val_classes == label) & (np.arange(len(val_classes)) != column))
        found.append(_correlation(val[:, column], _reference(val[:, others])) if len(others) else np.nan)
    return np.array(found)


def noisy_losses(rows: int, train_classes, val_classes, share: float = 0.25, seed: int = 0):
    """Losses that fall, but for a share of the train samples, whose labels are wrong; and which these are.

    The lowest mean validation loss is three quarters of the way.
    """
    generator = np.random.default_rng(seed)
    steps = np.arange(rows)
    falling = 2.0 * np.exp(-steps / 4.0) + 0.02 * np.maximum(0, steps - 3 * rows // 4)
    train, val = (falling[:, None] + generator.random((rows, len(c))) for c in (train_classes, val_classes))
    wrong = generator.random(len(train_classes)) < share
    train[:, wrong] = 2.5 - 0.3 * falling[:, None] + generator.random((rows, int(wrong.sum())))
    return torch.from_numpy(train).float(), torch.from_numpy(val).float(), torch.from_numpy(wrong)


def reliability_oracle(val, val_classes, label, splits) -> float:
    """Mean correlation of the references of two halves of a class over the splits; NaN where it is undefined."""
    val, own = _float64(val), np.asarray(val_classes) == label
    found = []
    for half in splits:  # 0 or 1 for each validation sample
        a, b = (_reference(val[:, own & (np.asarray(half) == side)]) for side in (0, 1))
        logged = np.isfinite(a) & np.isfinite(b)
        undefined = logged.sum() < 3 or _constant(a[logged]) or _constant(b[logged])
        found.append(np.nan if undefined else pearsonr(a[logged], b[logged]).statistic)
    return float(np.mean(found))


def assert_scores(scores: Tensor, expected: np.ndarray) -> None:
    """Checks equality within 1e-5, with NaN in the same places."""
    np.testing.assert_allclose(scores.double().numpy(), expected, rtol=0, atol=1e-5)


def _float64(values) -> np.ndarray:
    return torch.as_tensor(values).double().numpy()


def _reference(val: np.ndarray) -> np.ndarray:
    if not np.isnan(val).any():
        return np.diff(val.mean(axis=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no samples is NaN, which is right here
        return np.nanmean(np.diff(val, axis=0), axis=1)


def _correlation(trajectory: np.ndarray, reference: np.ndarray) -> float:
    if np.isinf(trajectory).any():
        return np.nan
    difference = np.diff(trajectory)
    both = ~np.isnan(difference) & ~np.isnan(reference)
    x, y = difference[both], reference[both]
    if len(x) < 3 or _constant(x) or _constant(y):
        return np.nan
    return pearsonr(x, y).statistic


def _constant(values: np.ndarray) -> bool:
    return np.ptp(values) <= 1e-12 * np.abs(values).max()

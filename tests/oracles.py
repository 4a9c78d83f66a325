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

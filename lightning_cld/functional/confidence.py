"""How sure the model was of each sample's label before it began to memorise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cld.functional.checks import check_losses, check_rows

_SLICE = 2**15
"""Samples processed at a time, so that temporaries stay in the CPU cache."""


def early_confidence(train_losses: Tensor, val_losses: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of `exp(-loss)` over the checkpoints up to the one with the lowest mean validation loss, or a few more.

    If losses are cross-entropy, `exp(-loss)` is the probability of the label, and its mean over checkpoints is the
    confidence of S. Swayamdipta et al., "Dataset Cartography", EMNLP 2020. After the lowest validation loss a model
    memorises wrong labels too (D. Arpit et al., "A Closer Look at Memorization in Deep Networks", ICML 2017), so later
    losses of training samples can't be compared with those of validation samples. With wrong validation labels their
    loss can be lowest after the first checkpoint, when the network has hardly begun. Therefore more than a quarter of
    the checkpoints count: at least as many as the largest power of two up to half of them.

    Args:
        train_losses: Losses of the training samples at the checkpoints after theta_0, floating point, `[T, N]`.
        val_losses: Losses of the validation samples at the same checkpoints, floating point, `[T, M]`.

    Returns:
        The confidence of the training samples, float32 `[N]`, and of the validation samples, float32 `[M]`, on the
        device of their losses. In [0, 1] if no loss is negative. Rows that either side lacks and single NaN (not
        logged) are left out. NaN marks samples without a logged loss or with one that is infinite in float32. Losses
        above 104 give 0, so samples that have no others are not told apart.

    Raises:
        TypeError: If the losses are not floating point tensors.
        ValueError: If the shapes are not `[T, N]` and `[T, M]` with at least one row and column.

    Example:
        >>> import torch
        >>> from lightning_cld.functional import early_confidence
        >>> val = -torch.tensor([[0.5], [0.9], [0.8]]).log()
        >>> train = -torch.tensor([[0.5, 0.2], [0.9, 0.1], [1.0, 1.0]]).log()
        >>> early_confidence(train, val)[0]  # of the first two rows
        tensor([0.7000, 0.1500])
    """
    check_losses(train_losses, "train_losses")
    check_losses(val_losses, "val_losses")
    check_rows(train_losses, val_losses)
    train_losses, val_losses = train_losses.detach(), val_losses.detach()
    rows = [
        row for row, both in enumerate(zip(train_losses, val_losses, strict=True)) if not any(map(is_missing, both))
    ]
    if rows:
        means = [float(mean_loss(row)) for row in val_losses[rows].cpu()]  # some devices have no float64
        rows = rows[: max(means.index(min(means)) + 1, least_rows(len(rows)))]
    return _mean(train_losses, rows), _mean(val_losses, rows)


def least_rows(rows: int) -> int:
    """The fewest rows that `early_confidence` takes of so many: the largest power of two up to half of them, or 0.

    Example:
        >>> from lightning_cld.functional.confidence import least_rows
        >>> [least_rows(rows) for rows in (1, 2, 4, 12, 20)]
        [0, 1, 2, 4, 8]
    """
    return 2 ** ((rows // 2).bit_length() - 1) if rows > 1 else 0


def mean_loss(val_row: Tensor) -> Tensor:
    """The mean of a row of validation losses, float64 `[]`; infinite if it is not finite."""
    mean = val_row.double().nanmean()
    return mean.where(mean.isfinite(), torch.inf)


def with_row(mean: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    """The mean of `exp(-loss)` after one row of losses more, in a new tensor.

    The mean is computed in float64 and kept in float32. It lies in [0, 1], where rounding moves it by at most 2^-25.
    After `n` rows that makes at most `n * 2^-26`: below 2e-5 for 1,300 rows even if all roundings went one way.

    Args:
        mean: The mean of the rows so far, float32, `[N]`.
        rows: The number of rows so far, integer, `[]`.
        row: The losses of the new row, float32, `[N]`.

    Returns:
        Float32, `[N]`; NaN, for good, where the loss of any row was NaN or infinite.

    Example:
        >>> import torch
        >>> from lightning_cld.functional.confidence import with_row
        >>> first = with_row(torch.zeros(1), torch.tensor(0), -torch.tensor([0.5]).log())
        >>> with_row(first, torch.tensor(1), -torch.tensor([0.9]).log())
        tensor([0.7000])
    """
    updated = torch.empty_like(mean)
    for start in range(0, len(mean), _SLICE):
        part = slice(start, start + _SLICE)
        chances = (-row[part].double()).exp().where(row[part].isfinite(), torch.nan)
        updated[part] = (mean[part].double() * rows + chances) / (rows + 1)
    return updated


def is_missing(row: Tensor) -> bool:
    """Whether no loss of a row was logged."""
    return bool(row[0].isnan()) and bool(row.isnan().all())


def _mean(losses: Tensor, rows: Sequence[int]) -> Tensor:
    """The mean of `exp(-loss)` over some rows, float32 `[N]`."""
    values = torch.full((losses.shape[1],), torch.nan, dtype=torch.float32, device=losses.device)
    if not rows:
        return values
    for start in range(0, len(values), _SLICE):
        part = slice(start, start + _SLICE)
        sums = torch.zeros_like(values[part])
        total, chances = torch.zeros_like(sums), torch.empty_like(sums)
        for row in rows:
            chances.copy_(losses[row, part])
            total += chances  # stays infinite or NaN once it is
            sums += chances.neg_().exp_()
        values[part] = (sums / len(rows)).where(total.isfinite(), torch.nan)
    again = values.isnan().nonzero().flatten()
    width = max(1, _SLICE // len(rows))
    for start in range(0, len(again), width):
        columns = again[start : start + width]
        doubtful = losses[:, columns][rows].float()
        values[columns] = (-doubtful).exp().nanmean(dim=0).where(~doubtful.isinf().any(dim=0), torch.nan)
    return values

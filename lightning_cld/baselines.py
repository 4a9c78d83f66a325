"""Other scores from the same logged losses, to compare with CLD.

Each function takes `LossTrajectories` and returns a value for every training sample. The scores of
`trajectories.score(by=baselines.variability)` select, save and serve like CLD scores. Higher values are kept first. For
a source that keeps the lowest values, the function returns the negative, such as `lowest_mean_loss`.

The probability of a sample's label is computed as `exp(-loss)`, which is exact for cross-entropy. Checkpoints that were
not logged are left out. A sample with a loss that is not finite has the value NaN, as in `cld_scores`. theta_0 counts
only in `area_under_loss` and in the functions of CLD: before its first step the model knows nothing about a sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_cld.functional.checks import check_count
from lightning_cld.trajectories import LossTrajectories, trained_losses

_SLICE_ELEMENTS = 2**20
"""Losses processed at a time, counted once per window: a few float64 temporaries of 8 MiB."""


def random_values(trajectories: LossTrajectories, *, seed: int = 0) -> Tensor:
    """Uniform random values: the baseline to beat. Its coresets are stratified by class, like all others.

    Args:
        trajectories: Only the number of samples is read.
        seed: Seed of the draw; the global random state is neither used nor changed.

    Returns:
        Values in [0, 1), float32, `[N]`, on the CPU.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> trajectories = LossTrajectories(torch.rand(5, 8), torch.rand(5, 3))
        >>> scores = trajectories.score(by=partial(baselines.random_values, seed=1))
        >>> len(scores.select(fraction=0.5))
        4
    """
    return torch.rand(trajectories.train_losses.shape[1], generator=torch.Generator().manual_seed(seed))


def highest_mean_loss(trajectories: LossTrajectories) -> Tensor:
    """The mean loss over the epochs: hard samples first, mislabeled samples above all.

    Huang et al., "O2U-Net: A Simple Noisy Label Detection Approach for Deep Neural Networks", ICCV 2019, use this
    ranking (over epochs with a cyclical learning rate) to find mislabeled samples.

    Returns:
        Float32, `[N]`, on the CPU.

    Raises:
        ValueError: If no epoch was logged.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = torch.tensor([[2.0, 2.0], [1.0, 2.0], [0.5, 3.0], [0.0, 1.0]])
        >>> baselines.highest_mean_loss(LossTrajectories(train, train))
        tensor([0.5000, 2.0000])
    """
    return _over_epochs(trajectories, lambda losses: losses.nanmean(dim=0))


def lowest_mean_loss(trajectories: LossTrajectories) -> Tensor:
    """The negative of `highest_mean_loss`: easy samples first, the "small-loss" choice against mislabeled samples.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = torch.tensor([[2.0, 2.0], [1.0, 2.0], [0.5, 3.0], [0.0, 1.0]])
        >>> baselines.lowest_mean_loss(LossTrajectories(train, train))
        tensor([-0.5000, -2.0000])
    """
    return -highest_mean_loss(trajectories)


def area_under_loss(trajectories: LossTrajectories) -> Tensor:
    """The area under the loss over completed epochs, theta_0 included, by the trapezoidal rule: hard samples first.

    Every epoch counts the same, even if the timeline has gaps: losses that were not logged are interpolated linearly,
    and the nearest loss is used before the first and after the last logged one. The idea of an area over training is
    from Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020; here the
    loss replaces the margin.

    Returns:
        Areas in loss times epochs, float32, `[N]`, on the CPU.

    Raises:
        ValueError: If fewer than 2 checkpoints were logged.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = torch.tensor([[2.0, 2.0], [1.0, 2.0], [0.5, 3.0], [0.0, 1.0]])
        >>> baselines.area_under_loss(LossTrajectories(train, train, epochs=[0, 1, 2, 4]))
        tensor([2.7500, 8.5000])
    """
    losses, epochs = trajectories.train_losses, trajectories.epochs
    if (logged := _logged_rows(losses)) < 2:
        raise ValueError(f"An area needs at least 2 checkpoints, got {logged}. Log more epochs.")

    def area(losses: Tensor) -> Tensor:
        total, last = torch.zeros_like(losses[0]), losses[0]
        since = torch.full_like(last, epochs[0])
        for epoch, row in zip(epochs[1:], losses[1:], strict=True):
            step = (row + last.where(~last.isnan(), row)) / 2 * (epoch - since)
            logged = ~row.isnan()
            total = total + step.where(logged, 0.0)
            last, since = row.where(logged, last), since.masked_fill(logged, epoch)
        return total + last * (epochs[-1] - since)

    return _in_slices(losses, area)


def confidence(trajectories: LossTrajectories) -> Tensor:
    """The mean probability of the label over the epochs: easy samples first.

    This is the "confidence" of Swayamdipta et al., "Dataset Cartography: Mapping and Diagnosing Datasets with Training
    Dynamics", EMNLP 2020.

    Returns:
        In [0, 1] for cross-entropy, float32, `[N]`, on the CPU.

    Raises:
        ValueError: If no epoch was logged.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = -torch.tensor([[0.1, 0.1], [0.5, 0.2], [0.7, 0.2], [0.9, 0.2]]).log()
        >>> baselines.confidence(LossTrajectories(train, train))
        tensor([0.7000, 0.2000])
    """
    return _over_epochs(trajectories, lambda losses: (-losses).exp().nanmean(dim=0))


def variability(trajectories: LossTrajectories) -> Tensor:
    """The standard deviation of the probability of the label over the epochs: ambiguous samples first.

    This is the "variability" of Swayamdipta et al., "Dataset Cartography: Mapping and Diagnosing Datasets with Training
    Dynamics", EMNLP 2020 (population standard deviation).

    Returns:
        Float32, `[N]`, on the CPU.

    Raises:
        ValueError: If fewer than 2 epochs were logged.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = -torch.tensor([[0.1, 0.1], [0.5, 0.1], [0.7, 0.5], [0.9, 0.9]]).log()
        >>> baselines.variability(LossTrajectories(train, train))
        tensor([0.1633, 0.3266])
    """
    return _over_epochs(trajectories, lambda losses: _nanstd((-losses).exp(), correction=0), least=2)


def uncertainty(trajectories: LossTrajectories) -> Tensor:
    """Aleatoric uncertainty: the mean of `p (1 - p)` over the epochs, where `p` is the probability of the label.

    From Seedat et al., "Data-IQ: Characterizing Subgroups with Heterogeneous Outcomes in Tabular Data", NeurIPS 2022;
    see `lightning_cld.functional.aleatoric_uncertainty`.

    Returns:
        Float32, `[N]`, on the CPU.

    Raises:
        ValueError: If no epoch was logged.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = -torch.tensor([[0.1, 0.1], [0.5, 0.9], [0.5, 1.0]]).log()
        >>> baselines.uncertainty(LossTrajectories(train, train))
        tensor([0.2500, 0.0450])
    """
    return _over_epochs(trajectories, lambda losses: ((-losses).exp() * (1 - (-losses).exp())).nanmean(dim=0))


def dual(trajectories: LossTrajectories, *, window: int = 10) -> Tensor:
    """The DUAL score: uncertain and difficult samples first.

    For each window of consecutive epochs, `(1 - mean(p)) * std(p)` is computed, where `p` is the probability of the
    label and `std` the sample standard deviation (dividing by `window - 1`). The score is the mean over all windows.
    From Cho et al., "Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction
    Uncertainty", ICML 2025, without that paper's Beta sampling.

    Args:
        trajectories: The logged losses.
        window: Epochs per window; the paper uses 10. A shorter timeline is a single window.

    Returns:
        Float32, `[N]`, on the CPU.

    Raises:
        ValueError: If `window` is below 2, or fewer than 2 epochs were logged.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = -torch.tensor([[0.1, 0.1], [0.5, 0.2], [0.7, 0.2], [0.9, 0.2]]).log()
        >>> baselines.dual(LossTrajectories(train, train), window=2)
        tensor([0.0424, 0.0000])
    """
    window = check_count("window", window)
    if window < 2:
        raise ValueError(f"window must be at least 2 epochs, got {window}.")

    def mean_over_windows(losses: Tensor) -> Tensor:
        windows = (-losses).exp().unfold(0, min(window, len(losses)), 1).movedim(-1, 0)
        return ((1 - windows.nanmean(dim=0)) * _nanstd(windows, correction=1)).nanmean(dim=0)

    return _over_epochs(trajectories, mean_over_windows, least=2, copies=min(window, len(trajectories)))


def near_zero_cld(trajectories: LossTrajectories) -> Tensor:
    """The negative of the absolute CLD score: samples whose losses are unrelated to their class first.

    Nagaraj et al., TMLR 2025, compare coresets with the highest, near-zero and lowest CLD; this is the near-zero one.

    Returns:
        In [-1, 0], float32, `[N]`, on the CPU.

    Raises:
        ValueError: As for `LossTrajectories.score`.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = torch.tensor([[2.0, 2.0], [1.0, 3.0], [0.5, 3.5], [0.3, 3.7]])
        >>> baselines.near_zero_cld(LossTrajectories(train, train[:, :1]))
        tensor([-1., -1.])
    """
    return -trajectories.score().values.abs()


def lowest_cld(trajectories: LossTrajectories) -> Tensor:
    """The negative of CLD: samples whose loss rises while the loss of their class falls come first.

    Returns:
        In [-1, 1], float32, `[N]`, on the CPU.

    Raises:
        ValueError: As for `LossTrajectories.score`.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> train = torch.tensor([[2.0, 2.0], [1.0, 3.0], [0.5, 3.5], [0.3, 3.7]])
        >>> baselines.lowest_cld(LossTrajectories(train, train[:, :1]))
        tensor([-1.,  1.])
    """
    return -trajectories.score().values


def stratified_cld(trajectories: LossTrajectories, *, strata: int = 10, seed: int = 0) -> Tensor:
    """CLD stratified by percentile: the best values are a random draw from every percentile range of each class.

    The paper (Nagaraj et al., TMLR 2025) found that such stratification on top of CLD hurts. Its scripts do not include
    it, so the details are ours: every range holds equally many samples, and samples are drawn at random within a range.

    Args:
        trajectories: The logged losses.
        strata: Percentile ranges per class.
        seed: Seed of the draw; the global random state is neither used nor changed.

    Returns:
        Float32, `[N]`, on the CPU: the negative of the sample's place in the draw from its range. The best values of a
        class therefore take equally many samples from each range, give or take one.

    Raises:
        ValueError: If `strata` is below 1, or as for `LossTrajectories.score`.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, baselines
        >>> trajectories = LossTrajectories(torch.rand(5, 40), torch.rand(5, 3))
        >>> scores = trajectories.score(by=baselines.stratified_cld)
        >>> kept = trajectories.score().values.argsort().argsort()[scores.select(size=10)]
        >>> (kept // 4).sort().values.tolist()  # one from each tenth of the ranking
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    check_count("strata", strata)
    scores = trajectories.score()
    generator = torch.Generator().manual_seed(seed)
    values = torch.full((len(scores),), torch.nan)
    groups = torch.zeros(len(scores), dtype=torch.int64) if scores.classes is None else scores.classes
    scored = ~scores.values.isnan()
    for label in torch.unique(groups[scored]).tolist():
        members = torch.nonzero((groups == label) & scored).flatten()
        by_score = members[torch.argsort(scores.values[members], stable=True)]
        for stratum in by_score.tensor_split(strata):
            drawn = torch.randperm(len(stratum), generator=generator)
            # If the budget doesn't divide evenly, the random fraction decides between ranges, not the lower index.
            values[stratum] = -(drawn + torch.rand(1, generator=generator)).float()
    return values


def _over_epochs(
    trajectories: LossTrajectories, reduce: Callable[[Tensor], Tensor], *, least: int = 1, copies: int = 1
) -> Tensor:
    """Applies `reduce` to the rows after theta_0; at least `least` of them must be logged."""
    losses = trained_losses(trajectories)
    if (logged := _logged_rows(losses)) < least:
        raise ValueError(
            f"This baseline needs at least {least} checkpoints after training began, got {logged}. Log more epochs."
        )
    return _in_slices(losses, reduce, copies)


def _logged_rows(losses: Tensor) -> int:
    """The number of rows with a loss. A missing checkpoint is a row of NaN."""
    return sum(not bool(row.isnan().all()) for row in losses)


def _in_slices(losses: Tensor, reduce: Callable[[Tensor], Tensor], copies: int = 1) -> Tensor:
    """Applies `reduce`, from float64 `[T, n]` to `[n]`, to slices of the columns; NaN where a loss is not finite.

    `copies` is how many copies of each loss `reduce` holds.
    """
    work_device = torch.device("cpu") if losses.device.type == "mps" else losses.device
    values = torch.empty(losses.shape[1])
    width = max(1, _SLICE_ELEMENTS // (len(losses) * copies))
    for start in range(0, losses.shape[1], width):
        part = losses[:, start : start + width].to(work_device).double()
        finite = ~part.isinf().any(dim=0)
        values[start : start + width] = reduce(part).where(finite, torch.nan).float().cpu()
    return values


def _nanstd(values: Tensor, *, correction: int) -> Tensor:
    """Standard deviation over the first dimension without NaN; NaN if too few values are left."""
    logged = ~values.isnan()
    squares = (values - values.nanmean(dim=0)).square().where(logged, 0.0).sum(dim=0)
    freedom = (logged.sum(dim=0) - correction).double()
    return (squares / freedom.where(freedom > 0, torch.nan)).sqrt()

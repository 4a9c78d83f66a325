"""Figures of scores and trajectories. They need matplotlib: `pip install matplotlib`.

Every function returns `(figure, axes)` and leaves matplotlib's global state alone: it does not use pyplot, opens no
window and chooses no backend. Save a figure with `figure.savefig(path)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_cld.functional.checks import check_count
from lightning_cld.functional.diagnostics import OVERLAP
from lightning_cld.scores import CLDScores, is_cld
from lightning_cld.showing.axes import (
    BEST,
    REFERENCE,
    REST,
    WORST,
    axes_or_new,
    draw_beside,
    draw_row,
    given_axes,
    handle,
    legend_below,
    name_figure,
    new_figure,
    shade,
)
from lightning_cld.showing.called import for_figures, short_name
from lightning_cld.showing.choice import (
    agreement,
    by_mean_score,
    check_kind,
    check_same_run,
    extremes,
    positions_of,
    sampled,
    shown_classes,
)
from lightning_cld.showing.thumbnails import check_dataset, read_images
from lightning_cld.trajectories import LossTrajectories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST = 14
"""Letters of a name that there is room for in a legend."""


def plot_scores(
    scores: CLDScores,
    *,
    fraction: float | None = None,
    size: int | None = None,
    per_class: int | None = None,
    classes: Sequence[int] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> tuple[Figure, np.ndarray]:
    """Draws a histogram of the scores of each class, with the cut that a budget makes (rule "top").

    Args:
        scores: The scores.
        fraction: A budget, as for `CLDScores.select`. Without a budget no cut is drawn.
        size: A budget.
        per_class: A budget.
        classes: The classes to draw; None draws up to ten classes, those with the lowest mean scores.
        ax: The axes to draw on, one for each class; None makes a new figure.

    Returns:
        The figure and its axes, one for each class, `[C]`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: As for `CLDScores.select`, or if an argument has the wrong type.
        ValueError: As for `CLDScores.select`, or if a class is unknown, or the number of axes is wrong.

    Example:
        >>> from lightning_cld import CLDScores, plotting
        >>> scores = CLDScores([0.9, -0.2, 0.4, 0.6], [0, 0, 1, 1])
        >>> figure, axes = plotting.plot_scores(scores, per_class=1)
        >>> [ax.get_title().splitlines() for ax in axes]
        [['class 0', '1 of 2, from +0.900'], ['class 1', '1 of 2, from +0.600']]
    """
    check_kind("scores", scores, CLDScores)
    cut = any(budget is not None for budget in (fraction, size, per_class))
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    if cut:
        chosen[scores.select(fraction=fraction, size=size, per_class=per_class)] = True
    shown, left_out = shown_classes(scores, classes)
    pool = scores.values[scores.positions()].nan_to_num()
    ends = (-1.0, 1.0)
    if not is_cld(scores) or pool.abs().max() > 1:
        low, high = float(pool.min()), float(pool.max())
        ends = (low, high + ((high - low) / 40 or 1))  # leaves room for a bar that starts at the highest score
    if ax is None:
        columns = min(len(shown), 5 if len(shown) > 4 else 2)
        rows = -(-len(shown) // columns)
        figure = new_figure(2.2 * max(columns, 2) + 0.4, 1.8 * rows + 0.7)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
        for unused in grid[len(shown) :]:
            unused.remove()
        axes = grid[: len(shown)]
        figure.supxlabel("score", fontsize=9)
        figure.supylabel("samples", fontsize=9)
        name_figure(figure, "Scores" + (", the coreset in blue" if cut else ""), left_out)
    else:
        axes = given_axes(ax, (len(shown),), "one for each class")
        figure = axes[0].figure
        for axis in axes:
            axis.set_xlabel("score", fontsize=9)
            axis.set_ylabel("samples", fontsize=9)
    for axis, label in zip(axes, shown, strict=True):
        own = positions_of(scores, label)
        kept = own[chosen[own]]
        edges = np.linspace(*ends, 41)
        if len(kept):
            edges = np.union1d(edges, float(scores.values[kept].min()))  # so that no bar crosses the cut
        for part, colour in ((own, REST), (kept, BEST)):
            values = scores.values[part]
            # The edge keeps bars visible that are narrower than a pixel, such as the coreset's if the cut is near 1.
            axis.hist(values[~values.isnan()].numpy(), bins=edges, facecolor=colour, edgecolor=colour, linewidth=0.8)
        title = f"{len(own):,} samples"
        if cut:
            title = f"{len(kept):,} of {len(own):,}"
            if len(kept):
                least = float(scores.values[kept].min())
                axis.axvline(least, color=BEST, linestyle="--", linewidth=1, zorder=0)
                title += f", from {least:+.3f}"
        axis.set_title(title if scores.classes is None else f"class {label}\n{title}", fontsize=8)
        if not scores.values[own].isnan().all():
            # Most scores of an easy class are near 1; the logarithm shows the few others.
            axis.set_yscale("log")
            axis.set_ylim(0.7, max(12, axis.get_ylim()[1]))  # at least two powers of ten as ticks
            axis.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(labelsize=7)
    return figure, axes


def plot_extremes(
    scores: CLDScores,
    dataset: Dataset[Any],
    *,
    samples: int = 6,
    classes: Sequence[int] | None = None,
    ax: Sequence[Axes] | np.ndarray | None = None,
) -> tuple[Figure, np.ndarray]:
    """Draws the images with the highest and the lowest scores of each class. Look for mislabeled ones among the lowest.

    The displayed samples are read, and up to 64 to recognise the dataset. A sample is an image, or a tuple, list or
    mapping with an image in it. An image is a PIL image, or a tensor or array of shape `[C, H, W]`, `[H, W, C]` or
    `[H, W]`. The text below each image is its name, or its position in the train dataset if the scores have no names,
    and its score.

    Args:
        scores: The scores.
        dataset: The train dataset that the Trainer was given, preferably without augmentation.
        samples: The number of highest and of lowest images per class.
        classes: The classes to draw; None draws up to ten classes, those with the lowest mean scores.
        ax: The axes to draw on, two for each class; None makes a new figure.

    Returns:
        The figure and its axes, `[C, 2]`: highest and lowest scores of each class.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If a sample holds no image, or an argument has the wrong type.
        ValueError: If the dataset is not the scored one, a class is unknown, or the number of axes is wrong.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_cld import CLDScores, plotting
        >>> scores = CLDScores([0.9, -0.2, 0.4, 0.6], [0, 0, 1, 1])
        >>> images = TensorDataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]))
        >>> figure, axes = plotting.plot_extremes(scores, images, samples=1)
        >>> [ax.get_title() for ax in axes[0]]
        ['highest scores', 'lowest scores']
    """
    check_kind("scores", scores, CLDScores)
    samples = check_count("samples", samples)
    check_dataset(scores, dataset)
    shown, left_out = shown_classes(scores, classes)
    if ax is None:
        figure = new_figure(1.2 * samples + 1, 0.95 * len(shown) + 0.8)
        grid = figure.subplots(len(shown), 2, squeeze=False)
        name_figure(figure, "", left_out)
    else:
        grid = given_axes(ax, (len(shown), 2), "two for each class")
        figure = grid[0, 0].figure
    for axes, label in zip(grid, shown, strict=True):
        parts = extremes(scores, label, samples)
        positions = torch.cat(parts).tolist()
        images = read_images(dataset, positions) if positions else torch.empty(0)
        for axis, part, pictures in zip(axes, parts, (images[: len(parts[0])], images[len(parts[0]) :]), strict=True):
            draw_row(axis, pictures, part, scores, samples)
        if scores.classes is not None:
            axes[0].set_ylabel(f"class {label}", fontsize=8)
    for axis, title, colour in zip(grid[0], ("highest scores", "lowest scores"), (BEST, WORST), strict=True):
        axis.set_title(title, fontsize=9, color=colour)
    return figure, grid


def plot_trajectories(
    trajectories: LossTrajectories,
    of_class: int | None = None,
    *,
    scores: CLDScores | None = None,
    samples: int = 3,
    dataset: Dataset[Any] | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draws the losses of a class's best- and worst-scored samples over the checkpoints.

    The thick line is the mean validation loss of the class; its differences are the class reference. The more extreme a
    score, the stronger its line.

    Args:
        trajectories: The logged losses.
        of_class: The class; None takes the class with the lowest mean score.
        scores: Scores of the same train set, to rank the samples by; None scores by CLD.
        samples: The number of best-scored and of worst-scored samples.
        dataset: The train dataset that the Trainer was given. If given, the images are drawn beside the lines.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If a sample holds no image, or an argument has the wrong type.
        ValueError: If scores, dataset and trajectories don't belong together, or the class is unknown.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, plotting
        >>> falling = torch.tensor([2.0, 1.0, 0.6, 0.5])[:, None]
        >>> trajectories = LossTrajectories(falling * torch.tensor([1.0, -0.3, 0.8]) + 1, falling)
        >>> figure, ax = plotting.plot_trajectories(trajectories, samples=1)
        >>> [line.get_label() for line in ax.lines]
        ['reference', '#0  +1.00', '#1  -1.00']
    """
    check_kind("trajectories", trajectories, LossTrajectories)
    if scores is not None:
        check_kind("scores", scores, CLDScores)
    if of_class is not None and not isinstance(of_class, SupportsIndex):
        raise TypeError(f"of_class must be one class, a whole number, got {of_class!r}.")
    samples = check_count("samples", samples)
    scores = trajectories.score() if scores is None else scores
    check_same_run(scores, trajectories)
    if dataset is not None:
        check_dataset(scores, dataset)
    label = by_mean_score(scores)[0] if of_class is None else shown_classes(scores, [of_class])[0][0]
    best, worst = extremes(scores, label, samples)
    figure, ax = axes_or_new(ax, 7.2, 3 + 0.5 * max(1, len(best)))
    val = trajectories.val_losses
    own = slice(None) if trajectories.val_classes is None else (trajectories.val_classes == label).to(val.device)
    mean = val[:, own].cpu().double().nanmean(dim=1).numpy()
    columns = [ax.plot(trajectories.epochs, mean, color=REFERENCE, linewidth=2.5, label="reference")]
    for part, colour, style, name in ((best, BEST, "-", "highest scores"), (worst, WORST, "--", "lowest scores")):
        columns.append([handle(name, colour, "" if dataset is None else style)])
        for place, (position, score) in enumerate(zip(part.tolist(), scores.values[part].tolist(), strict=True)):
            name = for_figures(short_name(scores, position, _LONGEST))
            columns[-1] += ax.plot(
                trajectories.epochs,
                trajectories.train_losses[:, position].cpu().numpy(),
                style,
                color=colour,
                alpha=shade(place, samples),
                label="\n".join(filter(None, [f"#{position}  {score:+.2f}", name])),
            )
    if dataset is not None:
        draw_beside(ax, dataset, scores, best, worst, samples)
        columns = [column[:1] for column in columns]
    legend_below(ax, columns)
    ax.set_title("Loss" if scores.classes is None else f"Loss, class {label}", fontsize=10)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("completed epochs")
    ax.set_ylabel("loss")
    return figure, ax


def plot_agreement(
    trajectories: LossTrajectories, *, fraction: float = 0.1, cutoff_epoch: int | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draws how far the scores at early cutoffs agree with the final scores, to see when the proxy could have stopped.

    One line is Spearman's rank correlation within the class (`lightning_cld.functional.rank_agreement`). The other is
    the share of the final coreset that an early cutoff chooses too. Both have up to 20 points, evenly spaced cutoffs. A
    vertical line marks the first of them from which this share stays at 85 % or more. Both end at 1, because they
    compare with the last checkpoint. If they still rise steeply there, more epochs would change the coreset. For losses
    of training steps (`CLDCallback(record="step")`) only the correlation is drawn, because their scores choose no
    coreset.

    Both lines come from no more than 100,000 samples, drawn from each class in proportion to its size, and always the
    same ones. If there are more, the title says so. With a fraction below 0.1 % all samples are used.

    Args:
        trajectories: The logged losses.
        fraction: The share of the train set that the coresets keep.
        cutoff_epoch: The cutoff to compare with; None takes the last checkpoint. If the run diverged, give a cutoff
            before that.
        ax: The axes to draw on; None makes a new figure.

    Returns:
        The figure and the axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If the losses give no scores, or no coreset of that size.

    Example:
        >>> import torch
        >>> from lightning_cld import LossTrajectories, plotting
        >>> falling = torch.linspace(3, 0, 13)[:, None].square()
        >>> train = falling * torch.linspace(0.5, 1, 40) + torch.linspace(0, 20, 13 * 40).view(13, 40).sin()
        >>> figure, ax = plotting.plot_agreement(LossTrajectories(train, falling))
        >>> ax.lines[0].get_xdata().tolist()
        [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    """
    check_kind("trajectories", trajectories, LossTrajectories)
    some, of_all = sampled(trajectories, fraction)
    epochs, correlations, overlaps = agreement(some, fraction, cutoff_epoch)
    figure, ax = axes_or_new(ax, 6, 4.2)
    label = "rank correlation within the class"
    lines = ax.plot(epochs, correlations, "o-", color=REFERENCE, markersize=3, label=label)
    if overlaps:
        label = f"overlap of the coresets of {100 * fraction:.3g}%"
        lines += ax.plot(epochs, overlaps, "s-", color=BEST, markersize=3, label=label)
        ax.axhline(OVERLAP, color=BEST, linewidth=1, linestyle=":")
        stays = next((e for place, e in enumerate(epochs) if all(o >= OVERLAP for o in overlaps[place:])), epochs[-1])
        if stays < epochs[-1]:
            label = f"{OVERLAP:.0%} or more at the points from epoch {stays} on"
            lines.append(ax.axvline(stays, color=BEST, linewidth=1, linestyle=":", label=label))
    title = f"Agreement with the scores after {epochs[-1]} epochs"
    ax.set_title(f"{title}\n{of_all}" if of_all else title, fontsize=10)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("cutoff epoch")
    ax.set_ylabel("agreement")
    ax.set_ylim(top=1.03)
    ax.grid(alpha=0.25)
    legend_below(ax, [lines])
    return figure, ax

"""Building blocks of the figures. Functions import matplotlib themselves, because it is an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import make_grid  # type: ignore[import-untyped]  # torchvision ships no types

from lightning_cld.scores import CLDScores
from lightning_cld.showing.called import for_figures, short_name
from lightning_cld.showing.thumbnails import read_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

BEST, WORST, REFERENCE, REST = "#0072b2", "#d55e00", "#222222", "#bbbbbb"  # safe for color-blind readers

_LONGEST = 10
"""Letters of a name that there is room for below an image."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches, without a window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Figures need matplotlib, which is not installed: pip install matplotlib.") from error
    return Figure(figsize=(width, height), layout="constrained")


def axes_or_new(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """Returns the given axes and their figure, or new ones."""
    if ax is None:
        figure = new_figure(width, height)
        return figure, figure.subplots()
    return ax.figure, ax  # type: ignore[return-value]  # a subfigure has what a figure has


def given_axes(ax: Axes | Sequence[Axes] | np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Returns the given axes in `shape`. Raises if their number is wrong; `what` describes them in the error."""
    axes = np.atleast_1d(np.array(ax, dtype=object))
    if axes.size != np.prod(shape):
        raise ValueError(
            f"ax must hold {np.prod(shape)} axes, {what}, got {axes.size}. Limit the classes with classes=[...]."
        )
    return axes.reshape(shape)


def name_figure(figure: Figure, title: str, left_out: int) -> None:
    """Sets the title, and says how many classes are not shown."""
    more = f"the classes with the lowest mean scores; {left_out} more are not shown" if left_out else ""
    figure.suptitle(": ".join(part for part in (title, more) if part), fontsize=10)


def shade(place: int, samples: int) -> float:
    """The opacity of a sample: 1 for the most extreme one, then less and less."""
    return 1 - 0.6 * place / samples


def handle(label: str, colour: str, style: Any) -> Line2D:
    """A legend entry for something without a line of its own."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=label)


def legend_below(ax: Axes, columns: Sequence[Sequence[Line2D]]) -> None:
    """Draws a legend below the axes and their label, where it hides nothing."""
    from matplotlib.transforms import ScaledTranslation

    rows = max(map(len, columns))
    gap = handle(" ", REST, "")  # legends fill column by column, so short columns are padded
    ax.legend(
        handles=[line for column in columns for line in (*column, *[gap] * (rows - len(column)))],
        ncols=len(columns),
        fontsize=9,
        labelcolor="linecolor",
        frameon=False,
        borderaxespad=0,
        columnspacing=1.2,
        handlelength=1.7,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans),
    )


def draw_beside(ax: Axes, dataset: Dataset[Any], scores: CLDScores, best: Tensor, worst: Tensor, samples: int) -> None:
    """Draws images of the best and worst samples in two columns on the right, in frames that match their lines."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage, TextArea, VPacker

    rows = max(len(best), len(worst))
    if rows == 0:  # no sample of the class is scored
        return
    images = read_images(dataset, [*best.tolist(), *worst.tolist()]).permute(0, 2, 3, 1).numpy()
    room = 72 * ax.bbox.height / ax.figure.dpi / rows  # the layout later takes some of it for labels
    points = max(10, min(44, 0.85 * room - 28))
    for column, (name, part, pictures, colour, style) in enumerate(
        (
            ("highest", best, images[: len(best)], BEST, "-"),
            ("lowest", worst, images[len(best) :], WORST, "--"),
        )
    ):
        across = 34 + 60 * column  # points right of the axes
        ax.annotate(
            name,
            (1, 1),
            (across, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
        )
        for row, (position, picture) in enumerate(zip(part.tolist(), pictures, strict=True)):
            label = TextArea(
                caption(position, scores),
                textprops={"fontsize": 7, "color": colour, "multialignment": "center"},
            )
            image = OffsetImage(picture, zoom=points / max(picture.shape[:2]), interpolation="nearest")
            packed = VPacker(children=[image, label], align="center", pad=0, sep=1)
            ax.add_artist(
                AnnotationBbox(
                    packed,
                    (1, 1 - (row + 0.5) / rows),
                    (across, 0),
                    xycoords="axes fraction",
                    boxcoords="offset points",
                    pad=0.25,
                    bboxprops={
                        "edgecolor": colour,
                        "facecolor": "none",
                        "linestyle": style,
                        "alpha": shade(row, samples),
                    },
                    annotation_clip=False,
                )
            )


def draw_row(ax: Axes, images: Tensor, positions: Tensor, scores: CLDScores, columns: int) -> None:
    """Draws images side by side, with positions and scores below. The row has room for `columns` images."""
    ax.set_yticks([])
    ax.tick_params(length=0, labelsize=6, pad=1)
    ax.spines[:].set_visible(False)
    if len(images) == 0:
        ax.set_xticks([])
        return
    padding = max(1, images.shape[-1] // 14)
    ax.imshow(make_grid(images, columns, padding, pad_value=255).permute(1, 2, 0).numpy(), interpolation="nearest")
    step = images.shape[-1] + padding
    middles = [(column + 0.5) * step + padding / 2 for column in range(len(images))]
    ax.set_xticks(middles, [caption(position, scores) for position in positions.tolist()])
    ax.set_xlim(0, padding + columns * step)


def caption(position: int, scores: CLDScores) -> str:
    """The text below the image of a sample: its name, or else its position in the train dataset, and its score."""
    name = short_name(scores, position, _LONGEST) or f"#{position}"
    return f"{for_figures(name)}\n{scores.values[position]:+.2f}"

"""The figures of `accuracy.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _grid import Row, mean_and_spread
from _methods import EVERYTHING, HELD_OUT
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw_accuracy(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over the fraction kept, with a panel per noise level and a line per method."""

    def panel(axis: Axes, methods: dict[str, list[list[Row]]]) -> None:
        for number, (method, cells) in enumerate(methods.items()):
            means, spreads = zip(*(_accuracy(cell) for cell in cells), strict=True)
            kept = [100 * float(cell[0]["fraction"]) for cell in cells]
            axis.errorbar(kept, means, spreads, label=method, capsize=2, **_style(number))
        axis.set_xscale("log")
        ticks = sorted({100 * float(cell[0]["fraction"]) for cells in methods.values() for cell in cells})
        # Labels above 80 % would overlap.
        axis.set_xticks(ticks, [f"{tick:g}" if tick < 80 else "" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("share of the train set kept (%)")

    _draw(rows, panel, path)


def draw_compute(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over the compute of selection and training, with a line along the Pareto front."""

    def panel(axis: Axes, methods: dict[str, list[list[Row]]]) -> None:
        points = []
        for number, (method, cells) in enumerate(methods.items()):
            accuracies = [_accuracy(cell)[0] for cell in cells]
            epochs = [
                mean_and_spread([float(row["selection_epochs"]) + float(row["training_epochs"]) for row in cell])[0]
                for cell in cells
            ]
            points += zip(epochs, accuracies, strict=True)
            style = {**_style(number), "linestyle": "none"}
            axis.plot(epochs, accuracies, label=method, **style)
        front: list[tuple[float, float]] = []
        for point in sorted(points, key=lambda point: (point[0], -point[1])):
            if not front or point[1] > front[-1][1]:
                front.append(point)
        axis.plot(*zip(*front, strict=True), color="black", linewidth=1, zorder=0, label="Pareto front")
        axis.set_xlabel("selection and training (epochs on everything)")

    _draw(rows, panel, path, as_points=True)


def _draw(rows: Sequence[Row], panel: object, path: Path, *, as_points: bool = False) -> None:
    noises = sorted({row["noise"] for row in rows}, key=float)
    figure = Figure(figsize=(1 + 4.5 * len(noises), 5), layout="constrained")
    for axis, noise in zip(figure.subplots(1, len(noises), squeeze=False)[0], noises, strict=True):
        cells: dict[str, dict[str, list[Row]]] = {}
        for row in rows:
            if row["noise"] == noise:
                cells.setdefault(row["method"], {}).setdefault(row["fraction"], []).append(row)
        methods = {
            method: [by_fraction[fraction] for fraction in sorted(by_fraction, key=float)]
            for method, by_fraction in cells.items()
        }
        lines = {} if as_points else {name: methods.pop(name) for name in (EVERYTHING, HELD_OUT) if name in methods}
        panel(axis, methods)
        for (name, found), style in zip(lines.items(), ("--", ":"), strict=False):
            mean, spread = _accuracy(found[0])
            axis.axhline(mean, color="black", linestyle=style, label=name)
            axis.axhspan(mean - spread, mean + spread, color="black", alpha=0.1, linewidth=0)
        axis.set_title(f"{float(noise):.0%} of the train labels wrong")
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("test accuracy (%)")
    handles = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _accuracy(cell: list[Row]) -> tuple[float, float]:
    return mean_and_spread([float(row["accuracy"]) for row in cell])


def _style(number: int) -> dict[str, object]:
    return {"color": colormaps["tab20"](number % 20), "marker": "os^vDPX*<>"[number % 10], "linestyle": "-"}

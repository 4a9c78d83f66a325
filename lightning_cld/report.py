"""`CLDScores.report`: scores as one HTML page that holds all it shows."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image  # which torchvision brings
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cld.diagnostics import SHARE, alignment
from lightning_cld.files import replacing
from lightning_cld.images import check_dataset, read_images
from lightning_cld.plotting import plot_agreement, plot_scores, plot_trajectories
from lightning_cld.scores import CLDScores
from lightning_cld.shown import by_mean_score, check_same_train_set, extremes, positions_of, shown_classes
from lightning_cld.trajectories import LossTrajectories

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIGHEST, _LOWEST = 6, 12
"""Samples shown of each class."""

_SUSPECTS = 24

_DRAWN = 4
"""Classes whose trajectories are drawn."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .3rem; }}
img {{ max-width: 100%; height: auto; }}
p, td, figcaption {{ overflow-wrap: anywhere; }} th {{ overflow-wrap: break-word; }}
figure {{ margin: 0; }}
table {{ border-collapse: collapse; }}
td, th {{ text-align: left; vertical-align: top; padding: .15rem .9rem .15rem 0; white-space: pre-wrap; }}
table.account tr:last-child td {{ font-weight: 600; }}
table.numbers td, table.numbers th {{ text-align: right; white-space: nowrap; overflow-wrap: normal; }}
.scroll {{ overflow-x: auto; }}
.row {{ display: flex; flex-wrap: wrap; gap: .6rem; }}
.row.small > figure {{ width: 4.2rem; font-size: .75rem; line-height: 1.25; text-align: center; }}
.row.small img {{ width: 100%; image-rendering: pixelated; }}
.row.large > figure {{ width: 20rem; max-width: 100%; }}
.wide {{ max-width: 40rem; margin: 1rem 0 .4rem; }}
.note {{ color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_report(
    scores: CLDScores, path: Path, dataset: Dataset[Any] | None, trajectories: LossTrajectories | None
) -> Path:
    """Writes the page; see `CLDScores.report`."""
    if dataset is not None:
        check_dataset(scores, dataset)
    if trajectories is not None:
        check_same_train_set(scores, trajectories)
    shown, left_out = shown_classes(scores, None)
    note = f"Shown are the {len(shown)} classes with the lowest mean scores, of {len(shown) + left_out}."
    parts = [
        _section("Summary", _table(scores.account(), kind="account")),
        _section("Suspects", _suspects(scores, dataset)),
        _section("Scores by class", *([_p(note)] if left_out else []), _histograms(scores, shown)),
        *([] if trajectories is None else _of_trajectories(scores, trajectories, dataset)),
    ]
    if dataset is not None:
        each = (_extremes(scores, dataset, label) for label in shown)
        parts.append(_section("Highest and lowest", *([_p(note)] if left_out else []), *each))
    parts += [_section("All classes", _all_classes(scores)), _section("Provenance", _provenance(scores))]
    title = f"{scores.metadata.get('scored_by', 'CLD')} scores of {len(scores.positions()):,} samples"
    with replacing(path) as file:
        file.write(_PAGE.format(title=escape(title), body="\n".join(parts)).encode())
    return path


# The sections


def _suspects(scores: CLDScores, dataset: Dataset[Any] | None) -> str:
    """The lowest-scored samples of all."""
    if scores.metadata.get("scored_by", "CLD") != "CLD":
        return _p("Only CLD tells by its sign which labels may be wrong.")
    suspects = scores.suspects()
    if len(suspects) == 0:
        return _p("No sample has a score of zero or less.")
    first = suspects[:_SUSPECTS]
    told = _p(
        f"{len(suspects):,} samples have a score of zero or less: their loss rises while that of their class falls. "
        f"Wrong labels may be among them. The lowest {len(first)}:"
    )
    if dataset is not None:
        return told + _thumbnails(scores, dataset, first, named=scores.classes is not None)
    classes = torch.zeros(len(scores), dtype=torch.int64) if scores.classes is None else scores.classes
    rows = [(str(p), str(int(classes[p])), f"{scores.values[p]:+.3f}") for p in first.tolist()]
    return told + _table(rows, ("position", "class", "score"))


def _histograms(scores: CLDScores, shown: Sequence[int]) -> str:
    fraction = SHARE if _has_tenth(scores) else None
    figures = []
    for label in shown:
        figure, (ax,) = plot_scores(scores, fraction=fraction, classes=[label])
        figure.suptitle("")
        figure.set_size_inches(3.6, 2.3)
        told = ax.get_title().replace("\n", ", ")
        figures.append(_drawn(figure, f"Histogram of the scores of {told}"))
    coreset = f" Blue: the coreset of {SHARE:.0%}; the dashed line is its lowest score." if fraction else ""
    return _p(f"Logarithmic counts.{coreset}") + f'<div class="row large">{"".join(figures)}</div>'


def _of_trajectories(scores: CLDScores, trajectories: LossTrajectories, dataset: Dataset[Any] | None) -> list[str]:
    found = []
    if scores.metadata.get("scored_by", "CLD") == "CLD" and _has_tenth(scores):
        figure, _ = plot_agreement(trajectories, fraction=SHARE)
        told = (
            "How far the scores of an earlier cutoff agree with those of the last checkpoint: where the line of the "
            "coreset is high and flat, the proxy could have stopped."
        )
        found.append(_section("When it could have stopped", _drawn(figure, told, wide=True)))
    drawn = []
    for label in by_mean_score(scores)[:_DRAWN]:
        figure, ax = plot_trajectories(trajectories, label, scores=scores)
        told = f"{ax.get_title()}: the best-scored samples in blue, the worst-scored in orange and dashed."
        drawn.append(_drawn(figure, told, wide=True))
        if dataset is not None:
            drawn.append(_thumbnails(scores, dataset, torch.cat(extremes(scores, label, 3))))
    note = "The classes with the lowest mean scores. The reference is the mean validation loss of the class."
    return [*found, _section("Trajectories", _p(note), *drawn)]


def _extremes(scores: CLDScores, dataset: Dataset[Any], label: int) -> str:
    best, worst = extremes(scores, label, _LOWEST)
    best = best[:_HIGHEST]
    name = "" if scores.classes is None else f"Class {label}, "
    return "".join(
        f"<h3>{name}{what} scores</h3>{_thumbnails(scores, dataset, part)}"
        for what, part in (("highest", best), ("lowest", worst))
        if len(part)
    )


def _all_classes(scores: CLDScores) -> str:
    """A table of what is known of each class, folded up where it is long."""
    known = [scores.metadata.get(name) for name in ("reference_sizes", "reference_reliability")]
    sizes, reliability = (found if isinstance(found, Mapping) else {} for found in known)
    labels = sorted(by_mean_score(scores))
    kept = {}
    if _has_tenth(scores):
        found = alignment(scores.values, scores.classes)
        kept = dict(zip(found.classes.tolist(), found.kept_of_class.tolist(), strict=True))
    rows = []
    for label in labels:
        values = scores.values[positions_of(scores, label)].double()
        correlation = reliability.get(str(label))
        rows.append(
            (
                str(label),
                f"{len(values):,}",
                f"{int(values.isnan().sum()):,}",
                f"{int((values < 0).sum()):,}",
                f"{values.nanmean():+.3f}",
                f"{kept[label]:+.3f}" if label in kept else "",
                str(sizes.get(str(label), "")),
                "" if correlation is None else f"{correlation:.3f}",
            )
        )
    names = ("class", "samples", "unscored", "negative", "mean", "mean of best tenth", "validation", "reliability")
    table = f'<div class="scroll">{_table(rows, names, "numbers")}</div>'
    return table if len(rows) <= 20 else f"<details><summary>{len(rows)} classes</summary>{table}</details>"


def _provenance(scores: CLDScores) -> str:
    of_classes = ("reference_sizes", "reference_reliability")  # which the table of classes has
    kept = {name: value for name, value in scores.metadata.items() if name not in of_classes}
    return _table([(name, value if isinstance(value, str) else json.dumps(value)) for name, value in kept.items()])


def _has_tenth(scores: CLDScores) -> bool:
    """Whether there are enough scored samples for a coreset of a tenth."""
    try:
        scores.select(fraction=SHARE)
    except ValueError:
        return False
    return True


# Their parts. Whatever text comes from data is escaped here.


def _section(title: str, *content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def _p(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(rows: Iterable[Sequence[str]], names: Sequence[str] = (), kind: str = "") -> str:
    """Rows whose first cell names them, below the names of the columns if there are any."""
    lines = [[f'<th scope="col">{escape(name)}</th>' for name in names]] if names else []
    for row in rows:
        first, *others = map(escape, row)
        lines.append([f'<th scope="row">{first}</th>', *(f"<td>{cell}</td>" for cell in others)])
    return f'<table class="{kind}">' + "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in lines) + "</table>"


def _drawn(figure: Figure, told: str, *, wide: bool = False) -> str:
    if wide:
        figure.set_size_inches(5.6, 3.4)  # so that its letters can be read on a telephone
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    caption = f"<figcaption>{escape(told)}</figcaption>" if wide else ""
    kind = ' class="wide"' if wide else ""
    return f'<figure{kind}><img src="{_embedded(stream)}" alt="{escape(told)}">{caption}</figure>'


def _thumbnails(scores: CLDScores, dataset: Dataset[Any], positions: Tensor, *, named: bool = False) -> str:
    """The images of samples in a row that wraps, with position, score, and the class if it is to be named."""
    found = []
    for position, image in zip(positions.tolist(), read_images(dataset, positions.tolist()), strict=True):
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, format="PNG")
        of_class = f"class {int(scores.classes[position])}" if named and scores.classes is not None else ""
        score = f"{scores.values[position]:+.2f}"
        alt = f"sample {position}, score {score}{f', {of_class}' if of_class else ''}"
        caption = "<br>".join([f"#{position}", *([of_class] if of_class else []), score])
        found.append(f'<figure><img src="{_embedded(stream)}" alt="{alt}"><figcaption>{caption}</figcaption></figure>')
    return f'<div class="row small">{"".join(found)}</div>'


def _embedded(stream: io.BytesIO) -> str:
    return f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"

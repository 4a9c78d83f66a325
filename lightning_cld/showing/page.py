"""`CLDScores.report`: scores as one self-contained HTML page."""

from __future__ import annotations

import io
import json
import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image  # installed with torchvision
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cld.functional.diagnostics import SHARE, alignment
from lightning_cld.plotting import plot_agreement, plot_scores, plot_trajectories
from lightning_cld.scores import CLDScores, is_cld, is_compared, why_no_tenth
from lightning_cld.showing.axes import BEST, WORST
from lightning_cld.showing.called import short_name
from lightning_cld.showing.choice import (
    at_checkpoints,
    by_mean_score,
    check_kind,
    check_same_run,
    counted,
    extremes,
    shown_classes,
)
from lightning_cld.showing.thumbnails import check_dataset, read_images
from lightning_cld.trajectories import LossTrajectories

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIGHEST, _LOWEST = 6, 12
"""Samples shown per class."""

_SUSPECTS = 24

_LONGEST = 24
"""Letters of a name below an image."""

_DRAWN = 4
"""The number of classes whose trajectories are drawn."""

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
table.trusted tr:last-child td {{ font-weight: 600; }}
table.numbers td, table.numbers th {{ text-align: right; white-space: nowrap; overflow-wrap: normal; }}
.narrow {{ display: none; }}
@media (max-width: 36rem) {{
  .narrow {{ display: block; }}
  table.numbers td, table.numbers th {{ font-size: .8rem; padding-right: .5rem; }}
}}
.scroll {{ overflow-x: auto; }}
.row {{ display: flex; flex-wrap: wrap; gap: .6rem; }}
.row.small > figure {{ width: 4.2rem; font-size: .75rem; line-height: 1.25; text-align: center; }}
.row.small img {{ width: 100%; image-rendering: pixelated; }}
.row.large > figure {{ width: 20rem; max-width: 100%; }}
.pair {{ display: flex; align-items: center; gap: .6rem; margin: .4rem 0; }}
.pair > b {{ flex: 0 0 4.6rem; }} .best {{ color: {best}; }} .worst {{ color: {worst}; }}
.wide {{ max-width: 32rem; margin: 1rem 0 .4rem; }}
.note {{ color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def make_page(scores: CLDScores, dataset: Dataset[Any] | None, trajectories: LossTrajectories | None) -> str:
    """The page as HTML; see `CLDScores.report`."""
    if dataset is not None:
        check_dataset(scores, dataset)
    if trajectories is not None:
        check_kind("trajectories", trajectories, LossTrajectories)
        check_same_run(scores, trajectories)
    shown, left_out = shown_classes(scores, None)
    note = f"The {len(shown)} classes with the lowest mean scores, of {len(shown) + left_out} classes."
    account = scores.account()
    parts = [
        _section("Summary", _table(account, kind="trusted" if account[-1][0] == "trust" else "")),
        _section("Suspects", _suspects(scores, dataset)),
        _section("Scores by class", *([_p(note)] if left_out else []), _histograms(scores, shown)),
        *([] if trajectories is None else _of_trajectories(scores, trajectories, dataset)),
    ]
    if dataset is not None:
        each = (_extremes(scores, dataset, label) for label in shown)
        parts.append(_section("Highest and lowest", *([_p(note)] if left_out else []), *each))
    parts += [_section("All classes", _all_classes(scores)), _section("Provenance", _provenance(scores))]
    title = f"{scores.metadata.get('scored_by', 'CLD')} scores of {len(scores.positions()):,} samples"
    return _PAGE.format(title=escape(title), body="\n".join(parts), best=BEST, worst=WORST)


_WHY = {
    True: "So many training samples behave in a way that the validation samples of their class don't.",
    False: "The loss of these samples tends to rise when the loss of their class falls.",
}
"""Why samples are suspects, by whether they were compared with validation samples."""


# The sections


def _suspects(scores: CLDScores, dataset: Dataset[Any] | None) -> str:
    """The samples whose labels look wrong, of all classes."""
    if not is_cld(scores):
        return _p("Suspects are listed for CLD scores only.")
    suspects = scores.suspects()
    if len(suspects) == 0:
        return _p("No label looks clearly wrong.")
    first = suspects[:_SUSPECTS]
    why = _WHY[scores.plausibility is not None and is_compared(scores)]
    note = _p(f"{len(suspects):,} labels look wrong. {why} The first {len(first)}:")
    if dataset is not None:
        return note + _thumbnails(scores, dataset, first, with_class=scores.classes is not None)
    positions = first.tolist()
    columns = {
        "position": [str(position) for position in positions],
        **({} if scores.names is None else {"name": scores.names[positions]}),
        "class": ["0" if scores.classes is None else str(int(scores.classes[position])) for position in positions],
        "score": [f"{scores.values[position]:+.3f}" for position in positions],
    }
    return note + _table(zip(*columns.values(), strict=True), tuple(columns))


def _histograms(scores: CLDScores, shown: Sequence[int]) -> str:
    missing = why_no_tenth(scores)
    fraction = None if missing else SHARE
    figures = []
    for label in shown:
        figure, (ax,) = plot_scores(scores, fraction=fraction, classes=[label])
        figure.suptitle("")
        figure.set_size_inches(3.6, 2.3)
        title = ax.get_title().replace("\n", ", ")
        figures.append(_drawn(figure, f"Histogram of the scores of {title}"))
    coreset = f"No coreset of {SHARE:.0%} is marked: {missing}."
    if not missing:
        coreset = f"Blue: the coreset of {SHARE:.0%}. Dashed line: its lowest score."
    return _p(f"Counts are on a logarithmic scale. {coreset}") + f'<div class="row large">{"".join(figures)}</div>'


def _of_trajectories(scores: CLDScores, trajectories: LossTrajectories, dataset: Dataset[Any] | None) -> list[str]:
    sections = []
    if is_cld(scores):
        sections.append(_section("When the proxy could have stopped", _agreement(scores, trajectories)))
    drawn = []
    for label in by_mean_score(scores)[:_DRAWN]:
        figure, ax = plot_trajectories(trajectories, label, scores=scores)
        caption = f"{ax.get_title()}: highest scores in blue, lowest scores dashed in orange."
        drawn.append(_drawn(figure, caption, wide=True))
        if dataset is not None:
            for name, kind, part in zip(
                ("highest", "lowest"), ("best", "worst"), extremes(scores, label, 3), strict=True
            ):
                if len(part):
                    images = _thumbnails(scores, dataset, part)
                    drawn.append(f'<div class="pair"><b class="{kind}">{name}</b>{images}</div>')
    note = "The classes with the lowest mean scores. The reference is the mean validation loss of the class."
    return [*sections, _section("Trajectories", _p(note), *drawn)]


def _agreement(scores: CLDScores, trajectories: LossTrajectories) -> str:
    missing = why_no_tenth(scores)
    if missing:
        return _p(f"Not known, because there is no coreset of {SHARE:.0%} to compare: {missing}.")
    of_scores = at_checkpoints(trajectories, scores.epochs)
    if of_scores is None:
        return _p("Not known: the losses are not those of the checkpoints that the scores name.")
    figure, ax = plot_agreement(of_scores, fraction=SHARE)
    of_all = ax.get_title().partition("\n")[2]
    caption = (
        "How far the scores at an earlier cutoff agree with these scores. Where the coreset line is high and flat, "
        "the proxy could have stopped."
    )
    return _drawn(figure, f"{caption} Computed {of_all}." if of_all else caption, wide=True)


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
    """A table with a row per class, collapsed if it is long."""
    known = [scores.metadata.get(name) for name in ("reference_sizes", "reference_reliability", "implausible")]
    sizes, reliability, implausible = (entry if isinstance(entry, Mapping) else {} for entry in known)
    wrong = implausible.get("classes", {})
    kept = {}
    if not why_no_tenth(scores):
        means = alignment(scores.values, scores.classes)
        kept = dict(zip(means.classes.tolist(), means.kept_of_class.tolist(), strict=True))
    rows = []
    for label, samples, mean, negative, unscored in counted(scores):
        correlation = reliability.get(str(label))
        rows.append(
            (
                str(label),
                f"{samples:,}",
                _signed(mean),
                _signed(kept.get(label, math.nan)),
                "" if correlation is None else f"{correlation:.3f}",
                str(sizes.get(str(label), "")),
                _share(wrong.get(str(label))),
                f"{negative:,}",
                f"{unscored:,}",
            )
        )
    of_all = ("class", "samples", "mean", "best tenth")
    names = (*of_all, "reliability", "validation", "look wrong", "negative", "unscored")
    note = _p(
        "Mean scores of all samples and of the best tenth; reliability and number of the validation samples; the share "
        "of labels that look wrong."
    )
    hint = '<p class="note narrow">Scroll sideways for more columns &rarr;</p>'
    table = f'{note}{hint}<div class="scroll">{_table(rows, names, "numbers")}</div>'
    return table if len(rows) <= 20 else f"<details><summary>{len(rows)} classes</summary>{table}</details>"


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.3f}"


def _share(found: Sequence[float] | None) -> str:
    """An estimate with its interval; empty if there is none."""
    return f"{found[0]:.0%} ({found[1]:.0%} to {found[2]:.0%})" if found else ""


def _provenance(scores: CLDScores) -> str:
    # The table of classes has the first three; the others are hashes.
    left_out = ("reference_sizes", "reference_reliability", "implausible", "validation_fingerprint")
    kept = {name: value for name, value in scores.metadata.items() if name not in left_out}
    return _table([(name, _plain(value)) for name, value in kept.items()])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(of_name)}" for name, of_name in value.items())
    return value if isinstance(value, str) else json.dumps(value)


# The parts of sections. Text from data is escaped here.


def _section(title: str, *content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def _p(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(rows: Iterable[Sequence[str]], names: Sequence[str] = (), kind: str = "") -> str:
    """A table. The first cell of a row is its header; `names` are the column headers."""
    lines = [[f'<th scope="col">{escape(name)}</th>' for name in names]] if names else []
    for row in rows:
        first, *others = map(escape, row)
        lines.append([f'<th scope="row">{first}</th>', *(f"<td>{cell}</td>" for cell in others)])
    return f'<table class="{kind}">' + "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in lines) + "</table>"


def _drawn(figure: Figure, text: str, *, wide: bool = False) -> str:
    if wide:
        figure.set_size_inches(4.2, 3.8)  # so that its text is readable on a phone
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    caption = f"<figcaption>{escape(text)}</figcaption>" if wide else ""
    kind = ' class="wide"' if wide else ""
    return f'<figure{kind}><img src="{_embedded(stream)}" alt="{escape(text)}">{caption}</figure>'


def _thumbnails(scores: CLDScores, dataset: Dataset[Any], positions: Tensor, *, with_class: bool = False) -> str:
    """The images of samples in a wrapping row, with position, name, score and, if `with_class`, the class."""
    items = []
    for position, image in zip(positions.tolist(), read_images(dataset, positions.tolist()), strict=True):
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, format="PNG")
        name = "" if scores.names is None else scores.names[position]
        of_class = f"class {int(scores.classes[position])}" if with_class and scores.classes is not None else ""
        score = f"{scores.values[position]:+.2f}"
        alt = escape(", ".join(filter(None, [f"sample {position}", name, f"score {score}", of_class])))
        below = filter(None, [f"#{position}", short_name(scores, position, _LONGEST), of_class, score])
        caption = "<br>".join(map(escape, below))
        items.append(f'<figure><img src="{_embedded(stream)}" alt="{alt}"><figcaption>{caption}</figcaption></figure>')
    return f'<div class="row small">{"".join(items)}</div>'


def _embedded(stream: io.BytesIO) -> str:
    return f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"

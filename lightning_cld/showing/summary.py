"""The text of `CLDScores.summary()`: an account of the scores, and whether to trust them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_cld.functional.checks import MIN_CHECKPOINTS, distinct, labels_in, listed
from lightning_cld.functional.diagnostics import OVERLAP, RELIABLE, Alignment, alignment, chance_alignment
from lightning_cld.scores import MOST, CLDScores, is_cld

THIN_REFERENCE = 10
"""Classes with fewer validation samples than this are reported: the mean of so few losses is mostly noise."""

UNSCORED_SHARE = 0.1
"""Classes with a larger share of unscored samples are reported: no coreset can hold these samples."""

_INDENT = " " * 13


class _Finding(NamedTuple):
    """One condition for trusting the scores.

    Attributes:
        fine: Whether the condition holds; None if that is not known.
        name: The condition.
        remedy: If it does not hold: what is wrong and what to do.
        unknown: If it is not known: why.
    """

    fine: bool | None
    name: str
    remedy: str
    unknown: str = ""


def account(scores: CLDScores) -> list[tuple[str, str]]:
    """The lines of the summary as pairs of name and text; see `CLDScores.account`."""
    pool = scores.positions()
    values, classes = scores.values[pool], None if scores.classes is None else scores.classes[pool]
    epochs, metadata = scores.epochs, scores.metadata
    scored = values[~values.isnan()]
    outside = f" of {len(scores):,} (the others are outside the sampler)" if len(values) < len(scores) else ""
    lines = [
        ("samples", f"{len(values):,}{outside}"),
        ("classes", f"{1 if classes is None else len(labels_in(classes))}"),
        ("checkpoints", _describe_epochs(epochs)),
    ]
    more, findings = _unscored(values, classes)
    lines += more
    if len(scored):
        quantiles = np.quantile(scored.double().numpy(), [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
        names = ("min", "10 %", "25 %", "median", "75 %", "90 %", "max")
        lines.append(("scores", "  ".join(f"{n} {q:+.3f}" for n, q in zip(names, quantiles, strict=True))))
    if not is_cld(scores):  # the rest applies to CLD only
        return [*lines, *_references(metadata)[0]]

    more, doubts = _labels(metadata)
    lines += more
    findings += doubts
    differences = metadata.get("differences")  # fewer than checkpoints where some were not logged
    differences = differences if isinstance(differences, int) else len(epochs) - 1
    parts = [_references(metadata), _alignment(values, classes, differences)]
    if metadata.get("record") != "step":  # the best tenth of step losses is never chosen
        parts.insert(0, _settled(metadata, epochs))
    for more, finding in parts:
        lines += more
        findings.append(finding)
    return [*lines, ("trust", _verdict(findings))]


def laid_out(lines: Sequence[tuple[str, str]]) -> str:
    """The lines of `account` as text, each after its name."""
    return "\n".join(f"{name:<{len(_INDENT)}}{text}".replace("\n", f"\n{_INDENT}") for name, text in lines)


def _unscored(values: Tensor, classes: Tensor | None) -> tuple[list[tuple[str, str]], list[_Finding]]:
    """How many samples are unscored, and in which classes. There is a finding only if a class has many."""
    missing = values.isnan()
    text = f"{int(missing.sum()):,}"
    if missing.any():
        text += " (a loss was not finite, not logged or never changed)"
    labels, groups = distinct(torch.zeros(len(values), dtype=torch.int64) if classes is None else classes)
    shares = torch.bincount(groups, missing.double()) / torch.bincount(groups)
    worst = [c for c in torch.argsort(-shares, stable=True).tolist() if shares[c] > UNSCORED_SHARE]
    shown = _some([f"{int(labels[c])} ({shares[c]:.0%})" for c in worst])
    if not worst:
        return [("unscored", text)], []
    named = ""
    if classes is not None:
        text += f"; most in class {shown}"
        named = f" of {_classes_named([int(labels[c]) for c in worst])}"
    remedy = (
        f"more than {UNSCORED_SHARE:.0%} of the samples{named} are unscored, and so in no coreset: find out why their "
        "losses are not finite, never change or were not logged"
    )
    return [("unscored", text)], [_Finding(False, "", remedy)]


def _labels(metadata: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[_Finding]]:
    """The share of labels that look wrong, in all and in the classes with the most. A finding only if most do."""
    known = metadata.get("implausible")
    if not isinstance(known, Mapping) or not known.get("share"):
        return [], []
    share, low, high = known["share"]
    if share == 0:
        return [("labels", f"no clear sign of wrong ones; there may be up to {high:.0%}")], []
    text = f"about {share:.0%} look wrong ({low:.0%} to {high:.0%}), suspects() lists them"
    classes = {c: found for c, found in known["classes"].items() if found and found[0] > 0}
    worst = sorted(classes, key=lambda c: -classes[c][0])[:3]
    if len(known["classes"]) > 1:
        shown = ", ".join(f"{c} ({classes[c][0]:.0%}, {classes[c][1]:.0%} to {classes[c][2]:.0%})" for c in worst)
        text += f"; most in class {shown}"
    mostly = [int(c) for c, found in classes.items() if found[0] > MOST]
    if not mostly and share <= MOST:
        return [("labels", text)], []
    remedy = (
        f"more than half of the labels{f' of {_classes_named(mostly)}' if share <= MOST else ''} look wrong: look at "
        "some. If they are right, the validation samples are easier than the train samples: hold them out at random"
    )
    return [("labels", text)], [_Finding(False, "", remedy)]


def _settled(metadata: Mapping[str, Any], epochs: Sequence[int]) -> tuple[list[tuple[str, str]], _Finding]:
    """How much of the best tenth was already chosen at half the epochs."""
    texts = []
    settled = metadata.get("settled_epoch")
    # Scores from fewer epochs than it took to settle have the run's metadata too.
    if metadata.get("cutoff_epoch") == "auto" and (settled is None or not epochs or settled <= epochs[-1]):
        texts.append("no, scored at the end" if settled is None else f"after {settled} epochs")
    shared = metadata.get("half_overlap")
    if isinstance(shared, float):
        half = metadata.get("half_epoch")
        texts.append(f"{_floored(shared):.0%} of the best tenth was already in it after {half} epochs")
    lines = [("settled", "; ".join(texts))] if texts else []
    # rule="draw" depends less on the epochs: on digits and Fashion-MNIST, clean or with 20 % of the labels wrong, the
    # coresets of a former "draw" at half the epochs and at the end shared at least 94 %, the best tenths 52 to 91 %.
    return lines, _Finding(
        shared >= OVERLAP if isinstance(shared, float) else None,
        "settled",
        f'not settled (below {OVERLAP:.0%}): train the proxy for more epochs, or use rule="draw", which hardly '
        "depends on the order of the best samples",
        metadata.get("half_problem") or f"it takes {2 * (MIN_CHECKPOINTS - 1)} epochs or more",
    )


def _references(metadata: Mapping[str, Any]) -> tuple[list[tuple[str, str]], _Finding]:
    """How many validation samples the classes have, and how reliable the references are."""
    lines = []
    sizes, reliability = (metadata.get(name) for name in ("reference_sizes", "reference_reliability"))
    thin, low, known = {}, {}, {}
    if isinstance(sizes, Mapping) and sizes:
        thin = {c: n for c, n in sizes.items() if n < THIN_REFERENCE}
        shown = _some([f"{c} ({n})" for c, n in thin.items()])
        text = f"at least {min(sizes.values())} validation samples per class"
        if thin:
            text = f"{shown}: classes with fewer than {THIN_REFERENCE} validation samples; hold out more"
        lines.append(("references", text))
    if isinstance(reliability, Mapping) and reliability:
        known = {c: value for c, value in reliability.items() if value is not None}
        low = {c: value for c, value in known.items() if value < RELIABLE}
        shown = _some([f"{c} ({_floored(value):.2f})" for c, value in sorted(low.items(), key=lambda item: item[1])])
        text = "not known, too few samples"
        if known:
            text = f"references of two validation halves correlate by at least {_floored(min(known.values())):.2f}"
        if low:
            text = f"{shown}: classes whose halves correlate by less than {RELIABLE}; hold out more"
        lines.append(("reliability", text))
    poor = [int(c) for c in {**low, **thin}]
    return lines, _Finding(
        False if poor else (True if known and len(known) == len(reliability or ()) else None),
        "references reliable",
        f"the references of {_classes_named(poor)} are thin or unreliable: hold out more validation samples",
        "it takes the losses of two validation samples or more a class",
    )


def _alignment(values: Tensor, classes: Tensor | None, differences: int) -> tuple[list[tuple[str, str]], _Finding]:
    """How far the best tenth moves with its reference, compared with all samples and with chance."""
    try:
        means = alignment(values, classes)
    except ValueError:
        return [], _Finding(None, "alignment clear", "", "too few samples of a class are scored for a tenth of it")
    text = f"mean score {means.kept:+.2f} in the best tenth, {means.everything:+.2f} overall"
    chance = chance_alignment(differences) if differences >= MIN_CHECKPOINTS - 1 else None
    if chance is not None:
        text += f", {chance:+.2f} in a best tenth by chance"
    weak = [] if chance is None else means.classes[means.kept_of_class <= chance].tolist()
    if classes is not None and len(means.classes) > 1:
        text += f"; lowest in class {_lowest(means)}"
    return [("alignment", text)], _Finding(
        None if chance is None else not weak,
        "alignment clear",
        f"the best tenth of {_classes_named(weak)} is aligned no better than by chance: train the proxy for more "
        "epochs, and check that the validation samples are of the same kind as the train set",
        "the number of checkpoints is missing",
    )


def _lowest(means: Alignment) -> str:
    known = int((~means.kept_of_class.isnan()).sum())  # the other classes have no sample in the best tenth
    order = torch.argsort(means.kept_of_class)[: min(3, known)]  # NaN comes last
    return ", ".join(
        f"{int(means.classes[c])} ({means.kept_of_class[c]:+.2f}, overall {means.everything_of_class[c]:+.2f})"
        for c in order
    )


def _verdict(findings: Sequence[_Finding]) -> str:
    fine = ", ".join(finding.name for finding in findings if finding.fine)
    poor = [finding.remedy for finding in findings if finding.fine is False]
    unknown = [f"{finding.name}? Not known: {finding.unknown}" for finding in findings if finding.fine is None]
    if poor:
        word = "with care:"
    elif unknown:
        word = f"as far as known: {fine}" if fine else "not known:"
    else:
        word = f"yes: {fine}"
    return "\n- ".join([word, *poor, *unknown])


def _floored(value: float) -> float:
    """Two decimals, rounded down, so that a value below a threshold is not shown as one that reaches it."""
    return math.floor(100 * value + 1e-9) / 100


def _some(shown: Sequence[str]) -> str:
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")


def _classes_named(labels: Sequence[int]) -> str:
    return listed(sorted(labels), "class", "classes")


def _describe_epochs(epochs: Sequence[int]) -> str:
    if not epochs:
        return "unknown"
    shown = ", ".join(map(str, epochs)) if len(epochs) <= 8 else f"{', '.join(map(str, epochs[:4]))}, ... {epochs[-1]}"
    return f"{len(epochs)} (after {shown} epochs)"

"""What `CLDScores.summary()` says: an account of the scores, and whether to trust them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_cld.functional.checks import MIN_CHECKPOINTS, listed
from lightning_cld.functional.diagnostics import OVERLAP, RELIABLE, Alignment, alignment, chance_alignment
from lightning_cld.scores import CLDScores

THIN_REFERENCE = 10
"""A class with fewer validation samples than this is reported: the mean of so few losses is mostly noise."""

UNSCORED_SHARE = 0.1
"""A class with a larger share of unscored samples than this is reported: those are missing from every coreset."""

_INDENT = " " * 13


class _Finding(NamedTuple):
    """One thing that trust depends on.

    Attributes:
        fine: Whether it is fine; None if that is not known.
        name: What is fine then.
        remedy: What is wrong if it is not, and what to do.
        unknown: Why it is not known.
    """

    fine: bool | None
    name: str
    remedy: str
    unknown: str = ""


def account(scores: CLDScores) -> list[tuple[str, str]]:
    """What there is to say of scores: names and texts, in order; see `CLDScores.account`."""
    pool = scores.positions()
    values, classes = scores.values[pool], None if scores.classes is None else scores.classes[pool]
    epochs, metadata = scores.epochs, scores.metadata
    scored = values[~values.isnan()]
    outside = f" of {len(scores):,} (the others are outside the sampler)" if len(values) < len(scores) else ""
    lines = [
        ("samples", f"{len(values):,}{outside}"),
        ("classes", f"{1 if classes is None else len(torch.unique(classes))}"),
        ("checkpoints", _describe_epochs(epochs)),
    ]
    told, findings = _unscored(values, classes)
    lines += told
    if len(scored):
        quantiles = np.quantile(scored.double().numpy(), [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
        names = ("min", "10 %", "25 %", "median", "75 %", "90 %", "max")
        lines.append(("scores", "  ".join(f"{n} {q:+.3f}" for n, q in zip(names, quantiles, strict=True))))
        negative = int((scored < 0).sum())
        suspects = ": wrong labels may be among them, suspects() lists them" if negative else ""
        lines.append(("negative", f"{negative:,} ({negative / len(scored):.1%}){suspects}"))
    if metadata.get("scored_by", "CLD") != "CLD":  # what follows is about CLD
        return [*lines, *_references(metadata)[0]]

    parts = [_references(metadata), _alignment(values, classes, epochs)]
    if metadata.get("record") != "step":  # whose best tenth is not to be chosen anyway
        parts.insert(0, _settled(metadata))
    for told, finding in parts:
        lines += told
        findings.append(finding)
    return [*lines, ("trust", _verdict(findings))]


def laid_out(lines: Sequence[tuple[str, str]]) -> str:
    """The lines of `account` as text, names in front."""
    return "\n".join(f"{name:<{len(_INDENT)}}{told}".replace("\n", f"\n{_INDENT}") for name, told in lines)


def _unscored(values: Tensor, classes: Tensor | None) -> tuple[list[tuple[str, str]], list[_Finding]]:
    """How many samples have no score, and in which classes they are many; nothing is found where they are few."""
    missing = values.isnan()
    told = f"{int(missing.sum()):,}"
    if missing.any():
        told += " (a loss was not finite, not logged or never changed)"
    labels, groups = torch.unique(torch.zeros(len(values)) if classes is None else classes, return_inverse=True)
    shares = torch.bincount(groups, missing.double()) / torch.bincount(groups)
    worst = [c for c in torch.argsort(-shares, stable=True).tolist() if shares[c] > UNSCORED_SHARE]
    shown = _some([f"{int(labels[c])} ({shares[c]:.0%})" for c in worst])
    if not worst:
        return [("unscored", told)], []
    named = ""
    if classes is not None:
        told += f"; most in class {shown}"
        named = f" of {_classes_named([int(labels[c]) for c in worst])}"
    remedy = (
        f"more than {UNSCORED_SHARE:.0%} of the samples{named} are unscored, and so in no coreset: find out why their "
        "losses are not finite, never change or were not logged"
    )
    return [("unscored", told)], [_Finding(False, "", remedy)]


def _settled(metadata: Mapping[str, Any]) -> tuple[list[tuple[str, str]], _Finding]:
    """How much of the ranking's top was the same at half the epochs."""
    told = []
    if metadata.get("cutoff_epoch") == "auto":
        settled = metadata.get("settled_epoch")
        told.append("no, scored at the end" if settled is None else f"after {settled} epochs")
    same = metadata.get("half_overlap")
    if isinstance(same, float):
        told.append(f"{same:.0%} of the best tenth was the same after {metadata.get('half_epoch')} epochs")
    lines = [("settled", "; ".join(told))] if told else []
    # On digits and Fashion-MNIST, clean or with a fifth of the labels wrong, what was drawn at half the epochs had at
    # least 94 % in common with what was drawn at the end, where that of the best tenth was 52 to 91 %.
    return lines, _Finding(
        same >= OVERLAP if isinstance(same, float) else None,
        "settled",
        f'not settled (below {OVERLAP:.0%}): train the proxy for more epochs, or select by rule="draw", which hardly '
        "depends on the order of the best",
        metadata.get("half_problem")
        or f"it takes {2 * (MIN_CHECKPOINTS - 1)} epochs or more"
        + (
            ', and with history="running" a logger and a fit in one piece'
            if metadata.get("history") == "running"
            else ""
        ),
    )


def _references(metadata: Mapping[str, Any]) -> tuple[list[tuple[str, str]], _Finding]:
    """How many validation samples the classes have, and how far these agree with each other."""
    lines = []
    sizes, reliability = (metadata.get(name) for name in ("reference_sizes", "reference_reliability"))
    thin, low, known = {}, {}, {}
    if isinstance(sizes, Mapping) and sizes:
        thin = {c: n for c, n in sizes.items() if n < THIN_REFERENCE}
        shown = _some([f"{c} ({n})" for c, n in thin.items()])
        told = f"{min(sizes.values())} or more validation samples a class"
        if thin:
            told = f"{shown}: classes with fewer than {THIN_REFERENCE} validation samples; hold out more"
        lines.append(("references", told))
    if isinstance(reliability, Mapping) and reliability:
        known = {c: value for c, value in reliability.items() if value is not None}
        low = {c: value for c, value in known.items() if value < RELIABLE}
        shown = _some([f"{c} ({value:.2f})" for c, value in sorted(low.items(), key=lambda item: item[1])])
        told = "not known, too few samples"
        if known:  # rounded down, so that no less is called more
            told = f"correlation of {math.floor(100 * min(known.values())) / 100:.2f} or more between halves of them"
        if low:
            told = f"{shown}: classes whose halves correlate by less than {RELIABLE}; hold out more"
        lines.append(("reliability", told))
    poor = [int(c) for c in {**low, **thin}]
    return lines, _Finding(
        False if poor else (True if known and len(known) == len(reliability or ()) else None),
        "references reliable",
        f"the references of {_classes_named(poor)} are thin or unreliable: hold out more validation samples",
        'it takes the losses (history="full"), two or more a class',
    )


def _alignment(values: Tensor, classes: Tensor | None, epochs: Sequence[int]) -> tuple[list[tuple[str, str]], _Finding]:
    """How far the best tenth moves with its reference, against everything and against chance."""
    try:
        found = alignment(values, classes)
    except ValueError:
        return [], _Finding(None, "alignment clear", "", "too few samples of a class are scored for a tenth of it")
    told = f"{found.kept:+.2f} in the best tenth, {found.everything:+.2f} in all"
    chance = chance_alignment(len(epochs) - 1) if len(epochs) >= MIN_CHECKPOINTS else None
    if chance is not None:
        told += f", {chance:+.2f} in a tenth by chance"
    weak = [] if chance is None else found.classes[found.kept_of_class <= chance].tolist()
    if classes is not None and len(found.classes) > 1:
        told += f"; lowest in class {_lowest(found)}"
    return [("alignment", told)], _Finding(
        None if chance is None else not weak,
        "alignment clear",
        f"the best tenth of {_classes_named(weak)} is aligned no better than by chance: train the proxy for more "
        "epochs, and check that the validation samples are of the same kind as the train set",
        "the number of checkpoints is missing",
    )


def _lowest(found: Alignment) -> str:
    order = torch.argsort(found.kept_of_class)[:3]  # NaN, of a class without a sample in the tenth, comes last
    return ", ".join(
        f"{int(found.classes[c])} ({found.kept_of_class[c]:+.2f}, all of it {found.everything_of_class[c]:+.2f})"
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


def _some(shown: Sequence[str]) -> str:
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")


def _classes_named(labels: Sequence[int]) -> str:
    return listed(sorted(labels), "class", "classes")


def _describe_epochs(epochs: Sequence[int]) -> str:
    if not epochs:
        return "unknown"
    shown = ", ".join(map(str, epochs)) if len(epochs) <= 8 else f"{', '.join(map(str, epochs[:4]))}, ... {epochs[-1]}"
    return f"{len(epochs)} (after {shown} epochs)"

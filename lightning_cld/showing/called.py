"""What a sample is called where people read of it."""

from __future__ import annotations

from lightning_cld.scores import CLDScores


def short_name(scores: CLDScores, position: int, longest: int) -> str:
    """The name of a sample in at most `longest` characters, of which the last tell most; empty without names.

    Example:
        >>> from lightning_cld import CLDScores
        >>> from lightning_cld.showing.called import short_name
        >>> short_name(CLDScores([0.5], names=["train-00017/tabby-4711"]), 0, 12)
        '…/tabby-4711'
    """
    name = "" if scores.names is None else scores.names[position]
    if len(name) > longest:
        name = f"…{name[1 - longest :]}"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def for_figures(text: str) -> str:
    """The same text for matplotlib, which would read what is between two dollar signs as a formula."""
    return text.replace("$", r"\$")

"""`CLDScores`: the scores of a train set, the identity of that set, and the origin of the scores."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.functional.arrays import IntegersLike, NumbersLike
from lightning_cld.functional.checks import as_classes, as_numbers, check_classes, labels_in
from lightning_cld.functional.diagnostics import best_tenth
from lightning_cld.functional.selection import check_rule, select_drawn, select_top
from lightning_cld.names import SampleNames, checked_names, name_arrays, names_in_arrays
from lightning_cld.storage.files import Contents, read, write
from lightning_cld.storage.places import Place, as_place, child, is_folder, replacing

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from lightning_cld.trajectories import LossTrajectories

OUTSIDE = -1
"""The class of positions that the train loader's sampler never draws. They are unscored, and no budget counts them."""

MOST = 0.5
"""If more than this share of the labels look wrong, the validation samples may be to blame."""

_KIND = "cld-scores"

_FOR_EACH = ("plausibility", "confidence")
"""What a file may hold for each sample beside the score."""


class CLDScores:
    """The CLD score of every training sample, with the classes, the identity of the dataset, and metadata.

    Args:
        values: Scores, `[N]`: numbers in a tensor, an array, a pandas Series or a list. They are kept as float32. NaN
            or a masked number marks an unscored sample.
        classes: Classes, `[N]`: integers of any type, in a tensor, an array, a pandas Series or a list; -1 for
            positions outside of the train loader's sampler. None puts all samples into one class.
        epochs: The number of completed epochs at each checkpoint that was used; 0 is before training.
        fingerprint: The identity of the dataset; None uses the length and the classes.
        metadata: Plain JSON values. A run stores `versions`; the date `created`; the class name of the `model`; the
            callback's settings, and the `settled_epoch` for a cutoff of "auto"; `sweep_seconds`, the time that logging
            took; `identity`, what is known of the train set beside its length (some of "labels", "some labels",
            "positions", "files", "samples" and "names"); and `reference_sizes`, the number of validation samples per
            trained class, and `differences`, the number of differences that the scores are made of. There are also
            `reference_reliability` (`lightning_cld.functional.reference_reliability`, per class, None if unknown),
            `half_overlap`, the share of the best tenth that was the same after `half_epoch` epochs, or `half_problem`,
            why that is not known, and `implausible`, the share of implausible labels in all samples and in each class.
        plausibility: How plausible each label is, in [0, 1], `[N]`, for `select(rule="draw")` and `suspects`: the share
            of the training samples like it that the validation samples of its class explain. None if unknown.
        confidence: `lightning_cld.functional.early_confidence`, `[N]`, for the same; None if unknown.
        names: What the samples are called in a stream, such as keys or URLs: text, all different, one for each
            position. They are kept as `SampleNames`. None for map-style datasets, where the position is enough.

    Raises:
        TypeError: If `values`, `classes`, `plausibility`, `confidence` or `names` have the wrong type.
        ValueError: If shapes don't match, a class is negative (except -1), a plausibility lies outside of [0, 1], or
            two names are the same.

    Example:
        >>> import torch
        >>> from lightning_cld import CLDScores
        >>> scores = CLDScores(torch.tensor([0.9, -0.2, 0.4, 0.6]), torch.tensor([0, 0, 1, 1]))
        >>> len(scores)
        4
        >>> scores.select(fraction=0.5)
        tensor([0, 3])
    """

    def __init__(
        self,
        values: NumbersLike,
        classes: IntegersLike | None = None,
        epochs: Sequence[int] = (),
        fingerprint: Fingerprint | None = None,
        metadata: Mapping[str, Any] | None = None,
        plausibility: NumbersLike | None = None,
        confidence: NumbersLike | None = None,
        names: SampleNames | Iterable[str] | None = None,
    ) -> None:
        self.values = _own(values, "values")
        if self.values.ndim != 1 or len(self.values) == 0:
            raise ValueError(f"values must have shape [N] with N >= 1, got {list(self.values.shape)}.")
        self.classes = None if classes is None else check_pool_classes(classes, len(self.values), "classes")
        self.epochs = [operator.index(epoch) for epoch in epochs]
        if fingerprint is None:
            known = self.classes is not None and not (self.classes == OUTSIDE).any()
            fingerprint = (
                Fingerprint.of_labels(self.classes)
                if known and self.classes is not None
                else Fingerprint(len(self.values))
            )
        if fingerprint.length != len(self.values):
            raise ValueError(
                f"The fingerprint belongs to {fingerprint.length:,} samples, but there are {len(self.values):,} scores."
            )
        self.fingerprint = fingerprint
        self.metadata = dict(metadata or {})
        self.plausibility = self._for_each(plausibility, "plausibility")
        if self.plausibility is not None and ((self.plausibility < 0) | (self.plausibility > 1)).any():
            wrong = self.plausibility[(self.plausibility < 0) | (self.plausibility > 1)][0]
            raise ValueError(f"plausibility must lie in [0, 1], got {float(wrong):g}.")
        self.confidence = self._for_each(confidence, "confidence")
        self.names = checked_names(names, len(self.values))

    def _for_each(self, values: NumbersLike | None, name: str) -> Tensor | None:
        numbers = None if values is None else _own(values, name)
        if numbers is not None and numbers.shape != self.values.shape:
            raise ValueError(
                f"{name} must have shape [{len(self.values)}], one value per score, got {list(numbers.shape)}."
            )
        return numbers

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Former versions pickled none of these.
        vars(self).update({"plausibility": None, "confidence": None, "names": None} | state)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"CLDScores({len(self):,} samples, {self.num_classes} classes, {len(self.epochs)} checkpoints)"

    def select(
        self,
        *,
        fraction: float | None = None,
        size: int | None = None,
        per_class: int | None = None,
        rule: Literal["top", "draw", "random"] = "top",
        seed: int = 0,
    ) -> Tensor:
        """Chooses the coreset. `select_top` explains the budgets.

        `Subset(train_set, scores.select(fraction=0.1).tolist())` is the coreset as a dataset. For a stream,
        `scores.names[scores.select(fraction=0.1)]` are the names of its samples.

        Args:
            fraction: The share of all samples to keep. Give one of `fraction`, `size` and `per_class`.
            size: The number of samples to keep.
            per_class: The number of samples to keep in each class.
            rule: "top" takes the best-scored samples of each class, as the paper does. "draw" draws at random. It
                prefers samples with a plausible label, and typical ones if little is kept
                (`lightning_cld.functional.select_drawn`). "random" draws all samples of a class alike, unscored ones
                too: the baseline to compare with. `examples/benchmarks/RESULTS.md` does.
            seed: Seed of the draw.

        Returns:
            Sorted positions in the train dataset, int64.

        Warns:
            UserWarning: If the budget is smaller than the number of classes; for "draw" also if the validation samples
                explain less than half of the train samples.

        Raises:
            TypeError: As `select_top`, or if `seed` is not a whole number.
            ValueError: As `select_top`; or if the rule is unknown; or for "draw", if the scores hold no plausibility;
                or for "top", if the scores are CLD from `CLDCallback(record="step")`.
        """
        chosen = self._selected(rule, seed, {"fraction": fraction, "size": size, "per_class": per_class})
        if len(chosen) < self.num_classes:
            rank_zero_warn(
                f"CLD: {len(chosen)} samples can't have one of each of the {self.num_classes} classes. Of classes of "
                "one size those with the lowest numbers come first, whatever the seed. Keep more samples."
            )
        return chosen

    def _selected(self, rule: str, seed: int, budget: dict[str, Any]) -> Tensor:
        check_rule(rule, seed)
        pool = self.positions()
        values, classes = self.values[pool], None if self.classes is None else self.classes[pool]
        if rule == "random":
            alike = torch.ones(len(pool))
            return pool[select_drawn(alike, alike, classes, **budget, seed=seed)]
        if rule == "top":
            if self.metadata.get("record") == "step" and self.metadata.get("scored_by") == "CLD":
                raise ValueError(
                    "These scores come from the losses of training steps (record='step'). They tell bad samples from "
                    'good ones, but do not rank the good ones as sweeps would, so rule="top" does not work with them. '
                    "Use rule=\"draw\", or log with record='sweep'."
                )
            return pool[select_top(values, classes, **budget)]
        if self.plausibility is None:
            raise ValueError(
                'rule="draw" weights by how plausible each label is, but these scores hold no plausibility'
                f'{self._why_none()}. Score logged losses with LossTrajectories.load(...).score(), or use rule="top".'
            )
        plausible = self.plausibility[pool]
        explained = float(plausible.nanmean())
        if explained < 1 - MOST and is_compared(self):
            rank_zero_warn(
                f"CLD: the validation samples explain only {explained:.0%} of the train samples. Unless most labels "
                "are wrong, the validation samples are easier than the train samples, and a draw may be worse than a "
                'random one: hold validation samples out at random (proportional_holdout), or use rule="random".'
            )
        confidence = None if self.confidence is None else self.confidence[pool]
        return pool[select_drawn(values, plausible, classes, confidence=confidence, **budget, seed=seed)]

    def _why_none(self) -> str:
        if not is_cld(self):
            return f" (they are {self.metadata['scored_by']}, not CLD)"
        if self.metadata.get("history") == "running":
            return " (running moments of an earlier version held none, and a run that goes on from them has none)"
        return "" if self.metadata.get("scored_by") is None else " (they were made by an earlier version)"

    def suspects(self, max_score: float | None = None) -> Tensor:
        """Lists samples whose labels may be wrong, the most suspicious first.

        There are as many as the validation samples don't explain: the sum of `1 - plausibility`. They are those with
        the lowest product of plausibility and confidence, and where that is equal the lowest confidence, then the
        lowest score. None are listed without clear evidence. Chance alone is taken for that in about one of 20 classes
        without wrong labels; where there are a thousand, in one of 200. If the validation split has wrong labels too,
        fewer are listed, or none. Unscored samples are left out.

        Args:
            max_score: List the samples with at most this score instead, in [-1, 1], the lowest score first. Below zero,
                the loss of a sample tends to rise when the loss of its class falls. None means 0 for scores that hold
                no plausibility, and where losses can't be compared with those of validation samples: of
                augmented samples, and of training steps.

        Returns:
            Positions in the train dataset, int64.

        Raises:
            ValueError: If `max_score` is outside of [-1, 1], or the scores are other ones than CLD.

        Example:
            >>> from lightning_cld import CLDScores
            >>> scores = CLDScores([0.9, -0.2, 0.4, -0.7], names=["cat", "dog", "eagle", "owl"])
            >>> scores.suspects()
            tensor([3, 1])
            >>> scores.names[scores.suspects()]
            ['owl', 'dog']
        """
        if max_score is not None and not -1 <= max_score <= 1:
            raise ValueError(f"max_score is a correlation and must lie in [-1, 1], got {max_score!r}.")
        if not is_cld(self):
            raise ValueError(
                f"suspects() goes by CLD, but these scores are {self.metadata['scored_by']}: their lowest values need "
                "not be wrong labels. Take the suspects of CLD scores, LossTrajectories.score()."
            )
        pool = self.positions()
        if max_score is None and self.plausibility is not None and is_compared(self):
            plausible = self.plausibility[pool].double()
            values = self.values[pool]
            doubted = torch.nonzero((plausible < 1) & ~values.isnan()).flatten()  # neither plausible nor NaN
            doubted = doubted[torch.argsort(values[doubted], stable=True)]  # decides where all else is equal
            count = round(float((1 - plausible[doubted]).sum()))
            if self.confidence is not None:
                confidence = self.confidence[pool].double()
                doubted = doubted[torch.argsort(confidence[doubted], stable=True)]  # decides where plausibility is 0
                plausible = plausible * confidence
            return pool[doubted[torch.argsort(plausible[doubted], stable=True)][:count]]
        max_score = max_score or 0.0
        listed = pool[self.values[pool] <= max_score]
        return listed[torch.argsort(self.values[listed], stable=True)]

    def save(self, path: str | Path) -> Place:
        """Writes the scores to `path` (an `.npz` archive) atomically and returns the path.

        The path may be a URL that fsspec can write to, such as `s3://bucket/scores.npz`.

        Raises:
            TypeError: If the metadata are not plain JSON values.
        """
        return write(path, scores_contents(self))

    @classmethod
    def load(cls, path: str | Path) -> CLDScores:
        """Reads a file that `save` wrote, from a path or a URL. Nothing is unpickled.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is truncated or damaged, holds no scores, or has a newer format.

        Example:
            >>> import tempfile
            >>> from lightning_cld import CLDScores
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = CLDScores([0.5, -0.25]).save(f"{folder}/scores.npz")
            ...     CLDScores.load(path).values
            tensor([ 0.5000, -0.2500])
        """
        header, arrays = read(path, _KIND, "CLDScores.load")
        try:
            known = {name: typed_array(arrays[name], np.float32) for name in _FOR_EACH if name in arrays}
            return cls(
                typed_array(arrays["values"], np.float32),
                typed_array(arrays["classes"], np.int64) if "classes" in arrays else None,
                header["epochs"],
                Fingerprint.from_dict(header["fingerprint"]),
                header["metadata"],
                **known,
                names=names_in_arrays(arrays),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"CLDScores.load: {path} has been changed: {error}. Write it again.") from error

    def summary(self) -> str:
        """Describes the scores in a few lines. The last entry says whether you can trust them.

        Example:
            >>> from lightning_cld import CLDScores
            >>> print(CLDScores([0.5, -0.25, 1.0], [3, 3, 7], epochs=[0, 1, 2, 3]).summary())
            samples      3
            classes      2
            checkpoints  4 (after 0, 1, 2, 3 epochs)
            unscored     0
            scores       min -0.250  10 % -0.100  25 % +0.125  median +0.500  75 % +0.750  90 % +0.900  max +1.000
            trust        not known:
                         - settled? Not known: it takes 6 epochs or more
                         - references reliable? Not known: it takes the losses of two validation samples or more a class
                         - alignment clear? Not known: too few samples of a class are scored for a tenth of it
        """
        from lightning_cld.showing.summary import laid_out  # late: see `account`

        return laid_out(self.account())

    def account(self) -> list[tuple[str, str]]:
        """The entries of `summary`: pairs of a name and a text.

        Example:
            >>> from lightning_cld import CLDScores
            >>> CLDScores([0.5, -0.25, 1.0]).account()[0]
            ('samples', '3')
        """
        # Imported late, as in `report` and `to_csv`, because the modules that show scores import this one.
        from lightning_cld.showing.summary import account

        return account(self)

    def report(
        self, path: str | Path, dataset: Dataset[Any] | None = None, trajectories: LossTrajectories | None = None
    ) -> Place:
        """Writes an HTML page with the summary, figures, and the samples with the highest and lowest scores.

        The page is one file that loads nothing, for a browser, an attachment or a logger. It needs matplotlib
        (`pip install matplotlib`). If there are many classes, it shows those with the lowest mean scores.

        Args:
            path: The file to write, atomically, or a URL. Missing parent directories are created.
            dataset: The train dataset that the Trainer was given, if possible without augmentation. The page shows
                images of its samples. Only these samples are read, and up to 64 to recognise the dataset.
            trajectories: The losses that the scores were computed from. The page then draws them, and shows how early
                the proxy could have stopped.

        Returns:
            The path.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If a sample of the dataset holds no image, or an argument has the wrong type.
            IsADirectoryError: If `path` is a directory.
            ValueError: If the scores don't belong to the dataset or the trajectories.

        Example:
            >>> import tempfile
            >>> from lightning_cld import CLDScores
            >>> scores = CLDScores([0.9, -0.2, 0.4, 0.6], [0, 0, 1, 1])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     page = scores.report(f"{folder}/report.html").read_text(encoding="utf-8")
            >>> "<html" in page
            True
        """
        from lightning_cld.showing.page import make_page

        place = _file_place(path, "report.html")
        page = make_page(self, dataset, trajectories)
        with replacing(place) as file:
            file.write(page.encode("utf-8", "backslashreplace"))
        return place

    def to_csv(self, path: str | Path, dataset: Dataset[Any] | None = None) -> Place:
        """Writes a CSV table for a spreadsheet or a labelling tool, with one row per sample.

        What `suspects` lists comes first, in that order, and then the lowest score first. The columns are `position`
        (in the train dataset), `name` if the scores have `names`, `class`, `score`, `suspect` ("true" if `suspects`
        lists the sample, else "false"), and `file` if the dataset lists its files. Unscored samples come last, with
        empty `score` and `suspect`. Samples with equal scores are ordered by position. Positions outside of the train
        loader's sampler are left out. `class` is empty if there is only one class. `suspect` is empty if the scores are
        not CLD. Whatever is not UTF-8 in a name or a file is escaped.

        Args:
            path: The file to write, atomically and in UTF-8, or a URL. Missing parent directories are created.
            dataset: The train dataset that the Trainer was given. If it lists its files in `samples`, `imgs` or
                `files`, as torchvision does, they are written as they are listed.

        Returns:
            The path.

        Raises:
            TypeError: If the dataset is not a map-style dataset.
            IsADirectoryError: If `path` is a directory.
            ValueError: If the scores don't belong to the dataset.

        Example:
            >>> import tempfile
            >>> from lightning_cld import CLDScores
            >>> scores = CLDScores([0.9, -0.2, float("nan"), 0.6], [0, 0, 1, 1])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     print(scores.to_csv(f"{folder}/scores.csv").read_text(encoding="utf-8"))
            position,class,score,suspect
            1,0,-0.2,true
            3,1,0.6,false
            0,0,0.9,false
            2,1,,
            <BLANKLINE>
        """
        from lightning_cld.showing.table import make_table

        place = _file_place(path, "scores.csv")
        table = make_table(self, dataset)
        with replacing(place) as file:
            file.write(table.encode("utf-8", "backslashreplace"))
        return place

    def positions(self) -> Tensor:
        """All positions in the train dataset, except those that the train loader's sampler never draws; sorted, int64.

        Example:
            >>> from lightning_cld import CLDScores
            >>> CLDScores([0.5, float("nan"), 1.0], [0, -1, 0]).positions()  # -1 is outside of the sampler
            tensor([0, 2])
        """
        if self.classes is None:
            return torch.arange(len(self))
        return torch.nonzero(self.classes != OUTSIDE).flatten()

    @property
    def num_classes(self) -> int:
        """The number of classes.

        Example:
            >>> from lightning_cld import CLDScores
            >>> CLDScores([0.5, -0.25, 1.0], [3, 3, 7]).num_classes
            2
        """
        return 1 if self.classes is None else len(labels_in(self.classes[self.positions()]))


def _own(values: NumbersLike, name: str) -> Tensor:
    """`values` as float32 on the CPU, in memory of their own: the caller may use theirs again."""
    given = as_numbers(values, name)
    return given.to("cpu", torch.float32, copy=True)


def is_cld(scores: CLDScores) -> bool:
    """Whether these are CLD scores, and not values of another method (`LossTrajectories.score(by=...)`)."""
    return bool(scores.metadata.get("scored_by", "CLD") == "CLD")


def is_compared(scores: CLDScores) -> bool:
    """Whether plausibility comes from a comparison with validation samples, and not from a threshold on the scores.

    Losses of training steps, and of augmented samples, are no match for those of validation samples.
    """
    return scores.metadata.get("record") != "step" and not scores.metadata.get("augmented")


def why_no_tenth(scores: CLDScores) -> str:
    """Why there is no coreset of 10 %; empty if there is one."""
    if scores.metadata.get("record") == "step" and is_cld(scores):
        return "scores from training steps are not fit for choosing the best samples"
    pool = scores.positions()
    try:
        best_tenth(scores.values[pool], None if scores.classes is None else scores.classes[pool])
    except ValueError as error:
        return str(error)
    return ""


def scores_contents(scores: CLDScores) -> Contents:
    """What `CLDScores.save` writes."""
    arrays = {"values": scores.values.numpy()}
    if scores.classes is not None:
        arrays["classes"] = scores.classes.numpy()
    for name in _FOR_EACH:
        if getattr(scores, name) is not None:
            arrays[name] = getattr(scores, name).numpy()
    arrays |= name_arrays(scores.names)
    header = {"epochs": scores.epochs, "fingerprint": scores.fingerprint.to_dict(), "metadata": scores.metadata}
    return Contents(_KIND, header, arrays)


def _file_place(path: str | Path, example: str) -> Place:
    """Returns the path or URL, or raises if it is a directory."""
    place = as_place(path)
    if is_folder(place):
        raise IsADirectoryError(
            f"{place} is a directory. Give the name of a file in it, such as {child(place, example)}."
        )
    return place


def check_pool_classes(classes: IntegersLike, samples: int, name: str) -> Tensor:
    """Returns `classes` as int64 `[samples]` on the CPU, or raises. `OUTSIDE` is allowed."""
    given = as_classes(classes, name).cpu()
    outside = given == OUTSIDE
    if not outside.any():
        return check_classes(given, samples, name).clone()  # it may be the caller's own
    checked = check_classes(given.masked_fill(outside, 0), samples, name)
    if outside.all():
        raise ValueError(f"{name} are all {OUTSIDE}: every position is outside of the sampler.")
    return checked.masked_fill(outside, OUTSIDE)


def typed_array(array: np.ndarray, dtype: type) -> np.ndarray:
    """Returns `array`, or raises unless it has the given dtype."""
    if array.dtype != dtype:
        raise ValueError(f"an array has dtype {array.dtype} instead of {np.dtype(dtype)}")
    return array

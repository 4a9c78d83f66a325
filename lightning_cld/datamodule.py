"""`CoresetDataModule`: the user's own datamodule, its train set narrowed to the coreset."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_cld.data.hyperparameters import restore_hyperparameters
from lightning_cld.data.identity import compare, look_at
from lightning_cld.data.listed_coreset import as_names, as_positions
from lightning_cld.data.narrowing import loaders_by_key, narrow_loader, narrowable, put_back
from lightning_cld.data.redrawing import Draws
from lightning_cld.data.streams import Identify, Members, is_stream, serve_stream
from lightning_cld.functional.selection import check_budget
from lightning_cld.names import SampleNames
from lightning_cld.scores import CLDScores

Coreset: TypeAlias = CLDScores | str | Path | Sequence[int] | Sequence[str] | Tensor
"""What the coreset of one train loader can be given as."""

_VIEWS = ("cld_train_dataloader", "cld_val_dataloader")
"""Methods of the inner datamodule that `CLDCallback` must not find here, since they show the full train set."""


class CoresetDataModule(LightningDataModule):
    """Another datamodule with its train set narrowed to a coreset; everything else is that datamodule's own.

    The train dataloader keeps the inner one's batch size, workers, collate function, order (shuffled or not), pinning
    and the rest. Scores are served only on the dataset that they were made for.

    The train loader may also be a stream, that is, a loader over an `IterableDataset`, or one of webdataset. Each
    sample is asked where it is read, in the workers, and with webdataset before it is decoded. A sample that was not
    scored ends the run, and so does one whose class is another than the scored one, if `identify` tells classes.
    Streams that give any sample by its position (litdata, mosaicml-streaming) are read at the positions of the coreset
    alone, unless they were scored by name.

    On one process an epoch over a stream serves every member once, else it ends with an error that has the numbers. On
    several, each has a part of the stream: an epoch gives all of them the same number of batches, `k` members in `w`
    processes `ceil(ceil(k / w) / batch_size)`, and each process goes on where it stopped, also across epochs. When all
    have read their part once, they compare, at the start of the next epoch, whether together they have all members. A
    resumed run reads up to where it was; it trains on the same samples if the stream comes in the same order.

    Other attributes and hooks are the inner datamodule's, and what is set here is set there. `isinstance` takes it for
    one of the inner datamodule's class too. A checkpoint keeps the inner datamodule's state under the name of that
    class, so a run on the coreset can resume from what a run on the full set saved at the end of an epoch, and the
    other way round.

    Args:
        datamodule: The datamodule that the scores were logged on, or one that makes the same train set.
        coreset: A `CLDScores`, the path of one saved, or positions in the train dataset (of any other selection); for a
            stream, names of samples may stand in place of positions. If the datamodule returns several train loaders,
            in a dictionary, a list or a `CombinedLoader`: a mapping from the key of each loader (0, 1, ... in a list)
            to one of these, or to None for a loader that stays whole.
        fraction: Budget for scores: the share of the samples to keep; see `select_top`. With several train loaders
            each one gets this budget.
        size: Budget for scores: the number of samples to keep.
        per_class: Budget for scores: the number of samples to keep of every class.
        rule: For scores: "top", "draw" or "random"; see `CLDScores.select`.
        seed: For scores: seed of the rules "draw" and "random".
        redraw: For scores and these rules: whether every epoch has a coreset of its own. Epoch e (0, 1, ...) trains on
            `scores.select(..., rule=rule, seed=seed + e)`, on all ranks, and also in a run that is resumed. The draws
            are equal in size and class balance, and each takes as long as that call. To compare runs, give them seeds
            that are further apart than there are epochs. The loader reads the full train set at the positions of the
            draw, so `len(loader.dataset)` is the full set's length; `len(loader)` counts the batches that are served.
            With `epoch_length="full"` each pass over a coreset has a draw of its own: if an epoch takes p passes, its
            seeds are `seed + e * p` to `seed + e * p + p - 1`, and of the last draw only a part is served. So it is
            with a sampler that draws more samples than the train set has. In a loop without a Trainer, call
            `loader.sampler.set_epoch(e)` before each epoch. With several train loaders, those with scores are redrawn;
            one that Lightning begins again within an epoch serves the same draw again.
            A stream has no such draws, unless it gives any sample by its position.
        epoch_length: "coreset" makes an epoch one pass over the coreset. "full" keeps epochs as long as the full
            set's, so that schedules and step budgets stay as they were: each epoch consists of whole passes over the
            coreset and, for the remainder, of a fresh draw. The draw is the same on all ranks, unless each rank draws
            for itself (`use_distributed_sampler=False`). Either way `len(trainer.datamodule.train_set)` is the length
            of the full set, because attributes are the inner datamodule's. A schedule that needs the number of steps
            should read `trainer.estimated_stepping_batches`, which counts the batches that are served. Over a stream an
            epoch has as many batches as the scored samples would make, and passes follow each other. A stream that
            makes its own batches has to say their number (`with_epoch` of webdataset), and with "coreset" its loader
            has no length.
        identify: For a stream: a function from a sample to its position, a whole number, or its name, text; or to a
            tuple of that and its class. Names and positions are those that the step returned when the stream was
            scored. Of webdataset it gets the sample before it is decoded, and is `sample["__key__"]` if left out.
            Streams that give any sample by its position need none; if there is one, it is checked. With several
            train loaders: a mapping by key.

    Attributes:
        indices: The positions of the coreset in the train dataset; with `redraw=True` those of the first draw. With
            several train loaders: a dictionary of them by key, with None for a loader that stays whole. None also if
            names were given without scores.
        scores: The scores, or None if positions were given. With several train loaders: a dictionary of them by key.

    Raises:
        FileNotFoundError: If the scores file is not there.
        TypeError: If an argument has the wrong type, or not exactly one budget is given for scores, or any for
            positions or names; or if those shall be drawn anew.
        ValueError: If the budget can't be met, positions are negative or repeated, the rule "top" shall be drawn anew,
            or LightningCLI has mixed up the hyperparameters of both datamodules.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningDataModule
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_cld import CLDScores, CoresetDataModule
        >>> digits = TensorDataset(torch.rand(6, 2), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> inner = LightningDataModule.from_datasets(train_dataset=digits, batch_size=2)
        >>> scores = CLDScores([0.9, 0.1, 0.2, 0.3, 0.8, 0.1], [0, 0, 0, 1, 1, 1])
        >>> coreset = CoresetDataModule(inner, scores, per_class=1)
        >>> coreset.indices
        [0, 4]
        >>> len(coreset.train_dataloader().dataset)
        2
        >>> coreset.trainer is inner.trainer
        True

        With two train loaders, of which one stays whole:

        >>> two = LightningDataModule.from_datasets(train_dataset={"digits": digits, "unlabelled": digits})
        >>> coreset = CoresetDataModule(two, {"digits": scores, "unlabelled": None}, per_class=1)
        >>> {key: len(loader.dataset) for key, loader in coreset.train_dataloader().items()}
        {'digits': 2, 'unlabelled': 6}

        With a stream, whose samples say their own position:

        >>> from torch.utils.data import DataLoader, IterableDataset
        >>> class Stream(IterableDataset):
        ...     def __iter__(self):
        ...         return ({"index": index, "digit": digit} for index, (_, digit) in enumerate(digits))
        >>> streaming = LightningDataModule()
        >>> streaming.train_dataloader = lambda: DataLoader(Stream(), batch_size=2)
        >>> coreset = CoresetDataModule(streaming, scores, per_class=1, identify=lambda sample: sample["index"])
        >>> [batch["index"] for batch in coreset.train_dataloader()]
        [tensor([0, 4])]
    """

    # With several train loaders these are dictionaries. Their types don't say so: nearly everybody has one loader.
    scores: CLDScores | None
    indices: list[int]
    _redrawn: dict[str, Any] | None = None
    """Arguments of `CLDScores.select` for a draw in each pass. One that was pickled by an earlier version has none."""
    _identify: Any = None
    _names: Any = None
    """The names that were given as the coreset, or None; with several train loaders a dictionary of them by key."""

    def __init__(
        self,
        datamodule: LightningDataModule,
        coreset: Mapping[Any, Any] | Coreset,  # typed as Coreset | None, LightningCLI would save a None as text
        *,
        fraction: float | None = None,
        size: int | None = None,
        per_class: int | None = None,
        rule: Literal["top", "draw", "random"] = "top",
        seed: int = 0,
        redraw: bool = False,
        epoch_length: Literal["coreset", "full"] = "coreset",
        identify: Identify | Mapping[Any, Identify] | None = None,
    ) -> None:
        # Lightning's own constructor is not called: the attributes that it sets are the inner datamodule's.
        if not isinstance(datamodule, LightningDataModule):
            raise TypeError(
                f"datamodule must be a LightningDataModule of lightning.pytorch, got {type(datamodule).__name__}. For "
                "plain datasets, or with the package pytorch_lightning (whose Trainer refuses this one), use "
                "torch.utils.data.Subset(train_set, scores.select(fraction=...).tolist())."
            )
        if not is_overridden("train_dataloader", datamodule):
            raise TypeError(f"{type(datamodule).__name__} has no train_dataloader to narrow.")
        if epoch_length not in ("coreset", "full"):
            raise ValueError(f'epoch_length must be "coreset" or "full", got {epoch_length!r}.')
        if identify is not None and not callable(identify) and not isinstance(identify, Mapping):
            raise TypeError(
                "identify must be a function from a sample of the stream to its position or name, got "
                f"{type(identify).__name__}."
            )
        restore_hyperparameters(datamodule)
        self._identify = identify
        self.epoch_length = epoch_length
        budget = {"fraction": fraction, "size": size, "per_class": per_class}
        self._redrawn = {**budget, "rule": rule, "seed": seed} if redraw else None
        if isinstance(coreset, Mapping):
            chosen = _choose_each(coreset, budget, rule, seed, redraw)
            self.scores = {key: part[0] for key, part in chosen.items()}  # type: ignore[assignment]  # see their types
            self.indices = {key: part[1] for key, part in chosen.items()}  # type: ignore[assignment]  # see their types
            self._names = {key: part[2] for key, part in chosen.items()}
        else:
            self.scores, self.indices, self._names = _choose(_loaded(coreset), budget, rule, seed, redraw)  # type: ignore[assignment]  # see their types
        self._doubted: set[Hashable] = set()  # the keys of train loaders whose samples could not be compared
        self.datamodule = datamodule  # comes last: from here on, what is set may be the inner datamodule's

    # Every attribute that this class does not define is the inner datamodule's. This includes the hooks of Lightning's
    # base class: Lightning asks which are overridden, to know whether there is validation and whose transfer hooks to
    # call. It also includes `__class__`: Lightning stores and finds a datamodule's state by the name of its class.

    def __getattribute__(self, name: str) -> Any:
        if _is_own(self, name):
            return super().__getattribute__(name)
        if name in _VIEWS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.datamodule, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A batch size that a tuner sets here alone would change nothing.
        if "datamodule" not in vars(self) or _is_own(self, name) or not hasattr(self.datamodule, name):
            super().__setattr__(name, value)
        else:
            setattr(self.datamodule, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Left to itself, pickle would make an object of the inner datamodule's class.
        return object.__new__, (type(self),), vars(self)

    @override
    def setup(self, stage: str) -> None:
        self.datamodule.setup(stage)

    @override
    def train_dataloader(self) -> Any:
        """The inner train dataloader, narrowed. With several train loaders: the same collection of them, narrowed.

        Raises:
            TypeError: If an inner loader can't be narrowed.
            ValueError: If the scores are of another dataset, a position is outside of it, or the keys of the train
                loaders are not those of `coreset`.
        """
        loaders = self.datamodule.train_dataloader()
        if not isinstance(self.indices, dict):
            view = getattr(self.datamodule, "cld_train_dataloader", None)
            if isinstance(self._identify, Mapping):
                raise TypeError(
                    "identify is a mapping, but train_dataloader() returned one loader. Give the function alone."
                )
            return self._narrowed(loaders, self.scores, self.indices, self._names, self._identify, view)
        if isinstance(self._identify, Mapping) and not self._identify.keys() <= self.indices.keys():
            raise ValueError(
                f"identify has the keys {list(self._identify)}, but coreset has {list(self.indices)}. Give it no "
                "others."
            )
        served = loaders_by_key(loaders, list(self.indices))
        for key in served:
            names = None if self._names is None else self._names[key]
            if self.indices[key] is not None or names is not None:
                identify = self._identify.get(key) if isinstance(self._identify, Mapping) else self._identify
                with _about(key):
                    scores, indices = self.scores[key], self.indices[key]
                    served[key] = self._narrowed(served[key], scores, indices, names, identify, key=key)
        return put_back(loaders, served)

    def _narrowed(
        self,
        loader: Any,
        scores: CLDScores | None,
        indices: list[int],
        names: SampleNames | None,
        identify: Any,
        view: Callable[[], Any] | None = None,
        key: Hashable = None,
    ) -> Any:
        draws = self._draws(scores, indices)
        is_full = self.epoch_length == "full"
        if is_stream(loader):
            members = _members(scores, indices, names)
            return serve_stream(
                loader, members, identify=identify, full_length=is_full, trainer=self.trainer, draws=draws
            )
        inside = narrowable(loader)
        if identify is not None or names is not None:
            given, remedy = "The coreset was given as names", "Give positions, or the scores."
            if names is None:
                given = "identify was given"
                remedy = 'Leave it out, or give it for the streams among several loaders alone: identify={"name": ...}.'
            raise TypeError(
                f"{given}, but the train loader is no stream: the samples of {type(inside.dataset).__name__} have "
                f"positions. {remedy}"
            )
        if scores is None:
            _check_positions(inside, indices)
        else:
            self._check_scores(inside, scores, view, key)
        return narrow_loader(loader, indices, full_length=is_full, trainer=self.trainer, draws=draws)

    def _check_scores(
        self, inside: DataLoader[Any], scores: CLDScores, view: Callable[[], Any] | None, key: Hashable
    ) -> None:
        """Raises unless the scores are of the dataset of a loader; what can't be compared is said once."""
        if scores.names is not None:
            raise ValueError(
                f"The scores are of a stream: they know samples by name, such as {scores.names[0]!r}, and the "
                f"positions of {type(inside.dataset).__name__} are others. Find the positions of the chosen names "
                "yourself, scores.names[scores.select(...)], and give these in place of the scores."
            )
        problem, doubt = compare(scores.fingerprint, inside, view)
        if problem:
            raise ValueError(
                f"The scores are not of this train set: {problem}. Score this one, or make the same split again "
                "(random_split needs a seeded generator). If you know better, pass the positions: "
                "CoresetDataModule(datamodule, scores.select(...))."
            )
        if doubt and key not in self._doubted:
            self._doubted.add(key)
            rank_zero_warn(doubt if key is None else f"Train loader {key!r}: {doubt}")

    def _draws(self, scores: CLDScores | None, indices: list[int]) -> Draws | None:
        if scores is None or self._redrawn is None:
            return None
        positions = scores.positions()
        pool = positions if self._redrawn["rule"] == "random" else positions[~scores.values[positions].isnan()]
        return Draws(partial(_drawn, scores, **self._redrawn), len(indices), pool)


def _is_own(coreset: CoresetDataModule, name: str) -> bool:
    """Whether an attribute is the coreset's and not the inner datamodule's.

    It is if the object has it, or if a class below Lightning's base class defines it. Python's own names are its own
    too, but for `__class__`.
    """
    return (
        name == "datamodule"  # which an object that is being unpickled does not have yet
        or (name.startswith("__") and name != "__class__")
        or name in vars(coreset)
        or any(name in vars(kind) for kind in type(coreset).__mro__ if kind not in LightningDataModule.__mro__)
    )


def _check_positions(inside: DataLoader[Any], indices: list[int]) -> None:
    """Raises unless a loader's dataset has samples at some positions, and positions mean something to it."""
    length = len(inside.dataset)  # type: ignore[arg-type]  # map-style, as checked
    if max(indices) >= length:
        raise ValueError(f"Position {max(indices)} is outside of the train set of {length:,} samples.")
    look_at(inside, "train")  # raises if positions mean nothing


def _drawn(scores: CLDScores, number: int, *, rule: Any, seed: int, **budget: Any) -> Tensor:
    """The coreset of a pass of a run, by the number of the pass."""
    return scores.select(**budget, rule=rule, seed=seed + number)


def _members(scores: CLDScores | None, indices: list[int], names: SampleNames | None) -> Members:
    """What is known of a stream's coreset."""
    if names is not None:
        return Members(list(range(len(names))), names=names, strangers=True)
    if scores is None:
        return Members(indices)
    used = len(scores.positions())
    return Members(indices, len(scores), used, names=scores.names, classes=scores.classes)


_Choice: TypeAlias = tuple[CLDScores | None, list[int] | None, SampleNames | None]
"""The scores if there are some, the positions, and the names if these were given. None thrice: all samples."""


def _choose(
    coreset: CLDScores | Sequence[int] | Sequence[str] | Tensor,
    budget: dict[str, Any],
    rule: Any,
    seed: int,
    redraw: bool,
) -> _Choice:
    if isinstance(coreset, CLDScores):
        check_budget(**budget)
        if redraw and rule == "top":
            raise ValueError(
                'redraw=True draws a coreset for each epoch, but rule="top" chooses the same one each time. Use '
                'rule="draw" or rule="random", or leave redraw out.'
            )
        return coreset, coreset.select(**budget, rule=rule, seed=seed).tolist(), None
    if redraw:
        raise TypeError(
            'redraw=True draws a coreset for each epoch, which takes scores and rule="draw" or rule="random". '
            "Positions are the same coreset each time: leave redraw out, or give the scores."
        )
    given = {name: value for name, value in budget.items() if value is not None}
    if given or rule != "top":
        given = given or {"rule": rule}
        raise TypeError(f"Positions or names are the coreset itself, so they take no budget or rule, got {given}.")
    return _choose_listed(coreset)


def _choose_listed(coreset: Any) -> _Choice:
    """Of positions or names."""
    names = as_names(coreset)
    return (None, as_positions(coreset), None) if names is None else (None, None, names)


def _choose_each(
    coresets: Mapping[Hashable, Coreset | None], budget: dict[str, Any], rule: Any, seed: int, redraw: bool
) -> dict[Hashable, _Choice]:
    """What `_choose` gives for each key, and None thrice for a loader that stays whole."""
    loaded = {key: _loaded(coreset) for key, coreset in coresets.items() if coreset is not None}
    if not loaded:
        raise ValueError(f"coreset is a mapping, but none of its values is a coreset: {dict(coresets)}.")
    is_scored = any(isinstance(coreset, CLDScores) for coreset in loaded.values())
    chosen: dict[Hashable, _Choice] = dict.fromkeys(coresets, (None, None, None))
    for key, coreset in loaded.items():
        with _about(key):
            if is_scored and not isinstance(coreset, CLDScores):  # the budget is for the scores of other loaders
                chosen[key] = _choose_listed(coreset)
            else:
                chosen[key] = _choose(coreset, budget, rule, seed, redraw)
    return chosen


def _loaded(coreset: Coreset) -> CLDScores | Sequence[int] | Sequence[str] | Tensor:
    return CLDScores.load(coreset) if isinstance(coreset, (str, Path)) else coreset


@contextmanager
def _about(key: Hashable) -> Iterator[None]:
    """Says in an error which train loader it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"Train loader {key!r}: {error}") from error

"""The user's train dataloaders, made again over the coreset."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Subset, get_worker_info

from lightning_cld.data.device_loaders import around, loader_inside
from lightning_cld.data.loaders import loader_settings, reads_in_its_own_way
from lightning_cld.data.redrawing import Draws, epoch_ahead, redrawing_sampler
from lightning_cld.data.samplers import check_source, is_known_sampler, narrow_sampler, processes
from lightning_cld.guards import preserved_rng

_REMEDY = "build that loader yourself over torch.utils.data.Subset(dataset, indices)"


def narrowable(loader: Any) -> DataLoader[Any]:
    """The DataLoader that reads the samples: `loader` itself, or the one inside a device loader.

    Raises:
        TypeError: If it can't be made again over a part of its dataset. Streams are no matter of this function.
    """
    members = _members(loader)
    if members:
        entries = ", ".join(f"{key!r}: {'None' if place else '...'}" for place, key in enumerate(members))
        raise TypeError(
            f"train_dataloader() returned {len(members)} loaders in a {type(loader).__name__}, but coreset is for one "
            f"loader. Give a mapping with an entry for each, and None for one that stays whole: {{{entries}}}."
        )
    inside = loader_inside(loader)
    if not isinstance(inside, DataLoader):  # an empty collection
        raise TypeError(
            f"CoresetDataModule narrows a torch DataLoader, but train_dataloader() returned a {type(inside).__name__}. "
            f"Return a DataLoader, or {_REMEDY}."
        )
    if next(iter(inspect.signature(type(inside)).parameters), "dataset") not in ("dataset", "args"):
        raise TypeError(
            f"{type(inside).__name__} is not made from a dataset, so it can't be made again over a coreset. Give it "
            f"the positions of the coreset yourself if it takes some, or {_REMEDY}."
        )
    if not hasattr(inside.dataset, "__len__"):
        raise TypeError(
            f"The train dataset {type(inside.dataset).__name__} has no __len__, so its samples have no positions to "
            "serve. Give it one."
        )
    if inside.batch_size is None and not _has_plain_batches(inside):
        raise TypeError(
            "The train dataloader has a batch sampler of its own kind, or batch_size=None, and it is unknown which "
            f"batches it would make of a coreset. Use torch's BatchSampler, or {_REMEDY}."
        )
    return inside


def narrow_loader(
    loader: Any, indices: list[int], *, full_length: bool, trainer: Trainer | None, draws: Draws | None = None
) -> Any:
    """The same loader over the samples at `indices`.

    Args:
        loader: The full train set's loader, checked by `narrowable`.
        indices: Positions of the coreset in its dataset.
        full_length: Whether an epoch is to be as long as the full set's.
        trainer: The Trainer to serve, for its number of processes and its epoch; None for one process.
        draws: A coreset for each pass in place of `indices`. The loader then reads the full dataset at their positions.

    Raises:
        TypeError: If the sampler or the loader's class can't be carried over.
        ValueError: If nothing would be drawn, or the sampler leaves out positions of the coreset; or if each pass
            shall have a coreset and the loader or the Trainer begins passes in a way of its own.
    """
    inside = loader_inside(loader)
    if draws is not None:
        _check_passes(inside, trainer)
    # A BatchSampler of torch makes the same batches as these two arguments do. If it were given as batch_sampler,
    # Lightning would lose its batch size in a distributed run.
    batches = inside if inside.batch_size is not None else inside.batch_sampler
    # Workers keep the dataset that they were started with, so where coresets change the positions do.
    dataset: Any = _subset_of(inside.dataset, indices) if draws is None else inside.dataset
    splitting = trainer if _is_split(loader, trainer) else None
    check_source(batches.sampler, len(inside.dataset))
    sampler = _known_sampler(inside, batches.sampler)
    if draws is not None:
        sampler = redrawing_sampler(
            sampler, draws, len(dataset), full_length=full_length, epoch=epoch_ahead(trainer), trainer=splitting
        )
    elif sampler is batches.sampler or full_length:
        sampler = narrow_sampler(sampler, dataset, full_length=full_length, trainer=splitting)
    else:
        sampler = None  # shuffle=True makes it
    world = 1 if isinstance(sampler, DistributedSampler) else processes(splitting)["num_replicas"]
    drawn = -(-len(dataset if sampler is None else sampler) // world)
    if batches.drop_last and not full_length and drawn < batches.batch_size:
        raise ValueError(
            f"An epoch draws {drawn} of the coreset's {len(indices)} samples on each device. With drop_last=True that "
            f"gives no batch of {batches.batch_size}. Keep more samples, lower the batch size, or use "
            'epoch_length="full".'
        )
    changes: dict[str, Any] = {"shuffle": True} if sampler is None else {"sampler": sampler}
    if inside.worker_init_fn is not None and draws is None:
        changes["worker_init_fn"] = WorkerStart(inside.worker_init_fn, "dataset")
    made = made_again(inside, dataset, batch_size=batches.batch_size, drop_last=batches.drop_last, **changes)
    _check_made(made, inside, dataset, batches)
    served = made if inside is loader else around(loader, made)
    if draws is not None and not _is_told_epochs(served, sampler):
        raise TypeError(
            f"redraw=True draws a coreset for each epoch, which Lightning tells to loader.sampler, but a "
            f"{type(served).__name__} does not give the sampler of the DataLoader within. Give it that property."
        )
    return served


def made_again(loader: DataLoader[Any], dataset: Any, *, plain: bool = False, **changes: Any) -> DataLoader[Any]:
    """A loader of the same class and settings over another dataset.

    Args:
        loader: The loader to take after.
        dataset: The dataset to read.
        plain: Whether to make one of torch's class rather than of the loader's.
        **changes: The arguments of DataLoader about batches and samplers, which are not taken from `loader`, and those
            that shall differ from it.

    Raises:
        TypeError: If the loader's class can't be made so.
    """
    settings = {
        **loader_settings(loader),
        "generator": loader.generator,
        "persistent_workers": loader.persistent_workers,
        **changes,
    }
    for name, usual in (("in_order", True), ("pin_memory_device", "")):  # not every loader's constructor takes them
        if getattr(loader, name, usual) != usual:
            settings[name] = getattr(loader, name)
    if plain:
        return DataLoader(dataset, **settings)
    try:
        return type(loader)(dataset, **settings, **_added_arguments(loader))
    except TypeError as error:
        raise TypeError(
            f"{type(loader).__name__} can't be made again over the coreset: {error}. Let its constructor pass on "
            f"DataLoader's arguments and keep its own as attributes of the same names, or {_REMEDY}."
        ) from error


class WorkerStart:
    """Shows the user's functions in a worker their own dataset, which many set up there.

    Args:
        start: The user's `worker_init_fn`.
        within: The attribute of the dataset that is served, which holds the user's.
    """

    def __init__(self, start: Callable[[int], Any] | None, within: str) -> None:
        self.start = start
        self.within = within

    def __call__(self, worker_id: int) -> None:
        """Calls the user's function."""
        worker: Any = get_worker_info()
        # Past a lock that is meant for users.
        object.__setattr__(worker, "dataset", getattr(worker.dataset, self.within))
        if self.start is not None:
            self.start(worker_id)


def _check_made(made: DataLoader[Any], loader: DataLoader[Any], dataset: Any, batches: Any) -> None:
    """Raises unless a loader's class made what it was asked to make."""
    changed = [
        name
        for name, is_same in (
            ("dataset", made.dataset is dataset),
            ("batch size", getattr(made.batch_sampler, "batch_size", made.batch_size) == batches.batch_size),
            ("collate_fn", _is_same_function(made.collate_fn, loader.collate_fn)),
        )
        if not is_same
    ]
    if changed:
        raise TypeError(
            f"{type(loader).__name__} can't be made again over the coreset: its constructor changes the "
            f"{' and the '.join(changed)} that it is given, and would do so twice. Do that before you make the loader, "
            f"or {_REMEDY}."
        )


def _is_same_function(made: Any, given: Any) -> bool:
    """Whether two collate functions do the same; of callable objects only the type is compared."""
    if isinstance(made, MethodType) and isinstance(given, MethodType):
        return made.__func__ is given.__func__
    if isinstance(given, (FunctionType, partial)):
        return bool(made == given)
    return type(made) is type(given)


def _known_sampler(loader: DataLoader[Any], sampler: Any) -> Any:
    """A loader's sampler, or a `RandomSampler` in place of one that the loader's class makes for shuffle=True."""
    if is_known_sampler(sampler):
        return sampler
    if not _shuffles_itself(loader, sampler):
        raise TypeError(
            f"The train dataloader has a {type(sampler).__name__}, and it is unknown what that would draw from a "
            f"coreset. Use shuffle=True or a WeightedRandomSampler in the datamodule, or {_REMEDY}."
        )
    return RandomSampler(loader.dataset, generator=loader.generator)  # type: ignore[arg-type]  # only its length counts


def _check_passes(loader: DataLoader[Any], trainer: Trainer | None) -> None:
    """Raises unless each epoch begins to read the loader's sampler when it begins itself."""
    if reads_in_its_own_way(loader):
        raise TypeError(
            f"{type(loader).__name__} is iterated in a way of its own, so it is unknown when it begins to read an "
            "epoch, for which redraw=True draws a coreset. Use torch's DataLoader, with persistent_workers=True if "
            "starting workers is slow, or leave redraw out."
        )
    overfit = getattr(trainer, "overfit_batches", 0)
    if overfit:
        raise ValueError(
            f"Trainer(overfit_batches={overfit}) trains on the same samples in every epoch, and "
            "redraw=True on others in each. Leave one of them out."
        )


def _is_told_epochs(loader: Any, sampler: Any) -> bool:
    """Whether Lightning, which looks in two places, finds the sampler to tell it the epoch."""
    places = (loader, getattr(loader, "batch_sampler", None))
    return any(getattr(place, "sampler", None) is sampler for place in places)


# Several train loaders


def loaders_by_key(loaders: Any, keys: list[Hashable]) -> dict[Hashable, Any]:
    """The loaders in a dictionary, a list (its keys are 0, 1, ...), or a `CombinedLoader` of either.

    Args:
        loaders: What train_dataloader() returned.
        keys: The keys of the coresets.

    Raises:
        TypeError: If it is one loader.
        ValueError: If the keys are others.
    """
    members = _members(loaders)
    if members is None:
        raise TypeError(
            f"The coreset is a mapping with the keys {keys}, but train_dataloader() returned one "
            f"{type(loaders).__name__}. Give the coreset of that loader alone."
        )
    if set(members) != set(keys):
        raise ValueError(
            f"The coreset is a mapping with the keys {keys}, but train_dataloader() returned loaders with the keys "
            f"{list(members)}. Give one entry for each loader, and None for a loader that stays whole."
        )
    nested = [key for key, loader in members.items() if _members(loader) is not None]
    if nested:
        raise TypeError(f"The train loaders at {nested} are collections themselves. Return one collection of loaders.")
    return members


def put_back(loaders: Any, served: dict[Hashable, Any]) -> Any:
    """The collection that `loaders_by_key` read, with other loaders in it."""
    # A CombinedLoader can make any kind of collection again. A copy of one keeps its mode, which is not public.
    combined = copy.copy(loaders) if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
    combined.flattened = list(served.values())
    return combined if isinstance(loaders, CombinedLoader) else combined.iterables


def _members(loaders: Any) -> dict[Hashable, Any] | None:
    """The loaders in a collection by key; None for one loader."""
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    if isinstance(loaders, (list, tuple)):
        return dict(enumerate(loaders))
    return dict(loaders) if isinstance(loaders, Mapping) else None


# What a loader says about itself


class _StatefulSubset(Subset[Any]):
    """A subset of a dataset with a state that torchdata's `StatefulDataLoader` saves and restores."""

    dataset: Any

    def state_dict(self) -> Any:
        return self.dataset.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.dataset.load_state_dict(state)


def _subset_of(dataset: Any, indices: list[int]) -> Subset[Any]:
    stateful = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
    return (_StatefulSubset if stateful else Subset)(dataset, indices)


def _has_plain_batches(loader: DataLoader[Any]) -> bool:
    """Whether its batch sampler is that of torch or torchdata, which cuts what a sampler draws into batches."""
    kind = type(loader.batch_sampler)
    torchdata = kind.__name__ == "BatchSampler" and kind.__module__.partition(".")[0] == "torchdata"
    return kind is BatchSampler or torchdata


def _is_split(loader: Any, trainer: Trainer | None) -> bool:
    """Whether the Trainer splits what the loader draws between its processes."""
    if trainer is None or trainer.distributed_sampler_kwargs is None or not isinstance(loader, DataLoader):
        return False
    # Private, but nothing else says it.
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def _shuffles_itself(loader: DataLoader[Any], sampler: Any) -> bool:
    """Whether the loader's class made the sampler itself for shuffle=True, as torchdata's StatefulDataLoader does."""
    if type(loader) is DataLoader:
        return False
    try:
        with preserved_rng():
            made = type(loader)(loader.dataset, shuffle=True, **_added_arguments(loader)).sampler
    except (TypeError, ValueError):
        return False
    return type(made) is type(sampler) and _plain_values(made) == _plain_values(sampler)


def _plain_values(sampler: Any) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in vars(sampler).items() if isinstance(value, plain)}


def _added_arguments(loader: DataLoader[Any]) -> dict[str, Any]:
    """What a subclass of DataLoader takes besides DataLoader's arguments, from attributes of the same names.

    Raises:
        TypeError: If there is no such attribute: a default in its place would change what the loader does.
    """
    known = inspect.signature(DataLoader).parameters
    added = [
        name
        for name, parameter in [*inspect.signature(type(loader)).parameters.items()][1:]  # the first is the dataset
        if name not in known and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    missing = [name for name in added if not hasattr(loader, name)]
    if missing:
        raise TypeError(f"its {', '.join(missing)} can't be read from it")
    return {name: getattr(loader, name) for name in added}

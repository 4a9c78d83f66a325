"""`IndexedDataset`: samples that say their position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset


class IndexedDataset(Dataset[Any]):
    """A dataset whose samples say their position, for `CLDCallback(record="step")`.

    A sample that is a tuple or a list becomes a tuple with the position at its end; a mapping a dictionary with the
    position as "sample_index"; anything else a pair. Wrap the whole train set, so that positions count in the
    dataset that the Trainer is given: `IndexedDataset(Subset(...))`, not the other way round. Other attributes than
    `dataset` are those of the dataset within.

    Args:
        dataset: A map-style dataset.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_cld import IndexedDataset
        >>> IndexedDataset(TensorDataset(torch.tensor([0.5, 1.5]), torch.tensor([3, 4])))[1]
        (tensor(1.5000), tensor(4), 1)
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style has a length

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, Mapping):
            return {**sample, "sample_index": index}
        return (*sample, index) if isinstance(sample, (tuple, list)) else (sample, index)

    def __getattr__(self, name: str) -> Any:
        # A copy or an unpickled one asks before there is anything within; nor may a batched read go past __getitem__.
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def check_indexed(dataset: Any) -> None:
    """Raises if samples say their position in some other set, as those of `Subset(IndexedDataset(...))` do."""
    if isinstance(dataset, IndexedDataset):
        return
    inner = getattr(dataset, "dataset", None)
    for within in getattr(dataset, "datasets", [] if inner is None else [inner]):
        if isinstance(within, IndexedDataset):
            raise ValueError(
                f"The train set is a {type(dataset).__name__} of an IndexedDataset, so its samples say their positions "
                f"in the set within. Wrap the whole: IndexedDataset({type(dataset).__name__}(...))."
            )
        check_indexed(within)

"""The methods of `peers.py` by the classes of DataCull 1.0.2. Its package is imported when one of them is run."""

from __future__ import annotations

import tempfile
from types import ModuleType
from typing import Any

import numpy as np
import torch
from _peer_rivals import Entry
from _peer_runs import Fixed, Part, Proxy, Rival
from torch import Tensor


def package() -> ModuleType:
    """DataCull.

    Raises:
        SystemExit: If it is not installed.
    """
    try:
        import datacull
    except ImportError as error:
        raise SystemExit(
            f"The methods that begin with DataCull need a package that can't be imported ({error}): "
            "pip install datacull==1.0.2, or name other --methods."
        ) from None
    return datacull


class _Labelled:
    """What DataCull's classes read of a dataset that is never served by them: its length and its labels."""

    def __init__(self, part: Part) -> None:
        self.targets = part.classes.numpy()

    def __len__(self) -> int:
        return len(self.targets)


def _loader(name: str, proxy: Proxy, fraction: float, **options: Any) -> Any:
    """One of its loaders. What its documentation calls the fraction to remove is the fraction that it keeps."""
    dc = package()
    dataset = dc.DCDataset(_Labelled(proxy.data.train))
    return getattr(dc, name)(dataset=dataset, pruning_rate=fraction, batch_size=proxy.data.preset.batch_size, **options)


def _importance(name: str, proxy: Proxy, **options: Any) -> np.ndarray:
    """The scores of one of its classes, from the logits of every epoch. Kept beside the proxy."""
    kept = proxy.folder / f"{name}.npy"
    if not kept.exists():
        dc = package()
        import orjsonl  # DataCull's own

        with tempfile.TemporaryDirectory(dir=proxy.folder) as folder:
            # As its logger would, which opens the file anew for each sample.
            for epoch, row in enumerate(proxy.train_logits[1:].tolist()):
                lines = ({str(index): logits} for index, logits in enumerate(row))
                orjsonl.save(f"{folder}/epoch{epoch}.jsonl", lines)
            scores = getattr(dc, name)(
                dataset=dc.DCDataset(_Labelled(proxy.data.train)),
                trajectory_length=len(proxy.train_logits) - 1,
                logger_object=dc.DCLogger(f"{folder}/"),
                **options,
            ).compute_importance()
        temporary = kept.with_suffix(".tmp.npy")
        np.save(temporary, scores)
        temporary.replace(kept)
    return np.load(kept)


def _chosen(loader: Any, importance: np.ndarray | None, seed: int) -> Rival:
    np.random.seed(2000 + seed)  # noqa: NPY002  # what its loaders draw from
    loader.resample(importance)
    return Fixed(torch.as_tensor(np.asarray(loader.subset_indices)).long())


def _ccs(proxy: Proxy, fraction: float, seed: int, beta: float) -> Rival:
    loader = _loader("CCSDataLoader", proxy, fraction, beta=0.0, num_strata=50)
    loader.beta = beta  # the share left out as too hard; the constructor refuses one above the fraction kept
    return _chosen(loader, _importance("AUMImportance", proxy), seed)


def _tdds(proxy: Proxy, fraction: float, steps: int, seed: int) -> Rival:
    importance = _importance("TDDSImportance", proxy, window_size=5, decay=0.9)
    return _chosen(_loader("TDDSDataLoader", proxy, fraction), importance, seed)


def _metriq(proxy: Proxy, fraction: float, steps: int, seed: int) -> Rival:
    right = proxy.val_logits[-1].argmax(1) == proxy.data.val.classes
    classes = proxy.train_logits.shape[2]
    counts = torch.bincount(proxy.data.val.classes, minlength=classes)
    hits = torch.bincount(proxy.data.val.classes[right], minlength=classes)
    # Smoothed: a class without an error would get no sample.
    accuracies = ((hits + 1) / (counts + 2)).double().numpy()
    return _chosen(_loader("MetriQDataLoader", proxy, fraction, class_wise_acc=accuracies), None, seed)


class _Resampled(Fixed):
    """Positions from a loader that resamples for each pass."""

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader = loader
        self._state = np.random.RandomState(2000 + seed).get_state()  # see draw

    def draw(self, step: int) -> Tensor:
        np.random.set_state(self._state)  # noqa: NPY002  # its loaders draw from what all share
        self.loader.resample(self.importance())
        self._state = np.random.get_state()  # noqa: NPY002
        return torch.as_tensor(np.asarray(self.loader.subset_indices)).long()

    def importance(self) -> np.ndarray | None:
        return None


class _RCAP(_Resampled):
    """RCAP: the losses of a pass, through its logger, weigh the draw of the next."""

    def __init__(self, proxy: Proxy, fraction: float, seed: int, beta: float) -> None:
        super().__init__(_loader("RCAPDataLoader", proxy, fraction), seed)
        dc = package()
        self._folder = tempfile.TemporaryDirectory()
        self._logger = dc.DCLogger(f"{self._folder.name}/")
        self._scores = dc.RCAPImportance(self.loader.original_dataset, self._logger, beta=beta)

    def importance(self) -> np.ndarray:
        return self._scores.compute_importance()

    def observe(self, positions: Tensor, losses: Tensor) -> None:
        self._logger.log_metric(self._scores.epoch, positions, losses)


def _rs2(proxy: Proxy, fraction: float, steps: int, seed: int) -> Rival:
    loader = _loader("RS2DataLoader", proxy, fraction, sampling_with_replacement=True, stratify=True)
    return _Resampled(loader, seed)


DATACULL: dict[str, Entry] = {
    # Its authors leave out 30 % to keep 10 %; DataCull's example leaves out 10 %.
    "DataCull: CCS": Entry(
        lambda proxy, fraction, steps, seed: _ccs(proxy, fraction, seed, 0.1 if fraction > 0.2 else 0.3), "logits"
    ),
    "DataCull: CCS, told": Entry(
        lambda proxy, fraction, steps, seed: _ccs(proxy, fraction, seed, float(proxy.data.wrong.double().mean())),
        "logits, share of wrong labels",
    ),
    "DataCull: TDDS": Entry(_tdds, "logits"),
    "DataCull: MetriQ": Entry(_metriq, "validation accuracy"),
    "DataCull: RS2": Entry(_rs2, "nothing"),
    "DataCull: RCAP": Entry(
        lambda proxy, fraction, steps, seed: _RCAP(proxy, fraction, seed, beta=2.0), "losses while training"
    ),
}

"""`CoresetDataModule`: the user's own datamodule, its train set narrowed to the coreset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_cld.data.identity import compare
from lightning_cld.data.narrowing import check_narrowable, narrow_loader
from lightning_cld.functional.checks import is_integer
from lightning_cld.functional.selection import check_budget
from lightning_cld.scores import CLDScores

# Bound to the inner datamodule's own where it overrides them, and left alone where it does not: Lightning decides by
# what is overridden whether there is validation, and whose transfer hooks run (the datamodule's before the module's).
_DELEGATED = (
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "prepare_data",
    "teardown",
    "state_dict",
    "load_state_dict",
    "on_exception",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)


class CoresetDataModule(LightningDataModule):
    """Another datamodule with its train set narrowed to a coreset; everything else is that datamodule's own.

    The train dataloader keeps the inner one's batch size, workers, collate function, order (shuffled or not), pinning
    and the rest. Scores are checked to be those of the very dataset that is served.

    Args:
        datamodule: The datamodule that the scores were logged on, or one that makes the same train set.
        coreset: A `CLDScores`, the path of one saved, or positions in the train dataset (of any other selection).
        fraction: Budget for scores: the share of the samples to keep; see `select_top`.
        size: Budget for scores: the number of samples to keep.
        per_class: Budget for scores: the number of samples to keep of every class.
        rule: For scores: "top" or "draw"; see `CLDScores.select`.
        seed: For scores: seed of the rule "draw".
        epoch_length: "coreset" makes an epoch one pass over the coreset; "full" keeps epochs as long as the full
            set's, so that schedules and step budgets stay as they were: whole passes, and for the remainder a fresh
            draw each epoch, the same on all ranks.

    Raises:
        FileNotFoundError: If the scores file is not there.
        TypeError: If an argument has the wrong type, or not exactly one budget is given for scores, or any for
            positions.
        ValueError: If the budget can't be met, positions are negative or repeated, or LightningCLI has mixed up the
            hyperparameters of both datamodules.

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
    """

    def __init__(
        self,
        datamodule: LightningDataModule,
        coreset: CLDScores | str | Path | Sequence[int] | Tensor,
        *,
        fraction: float | None = None,
        size: int | None = None,
        per_class: int | None = None,
        rule: Literal["top", "draw"] = "top",
        seed: int = 0,
        epoch_length: Literal["coreset", "full"] = "coreset",
    ) -> None:
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
        _restore_hyperparameters(datamodule)
        self.datamodule = datamodule
        trainer = datamodule.trainer
        super().__init__()  # which sets the trainer, ours and so the inner one's, to None
        datamodule.trainer = trainer
        self.epoch_length = epoch_length
        self.prepare_data_per_node = datamodule.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            datamodule.allow_zero_length_dataloader_with_multiple_devices
        )
        # Private, but nothing else says whether the hyperparameters, which are the inner one's, are to be logged.
        self._log_hyperparams = datamodule._log_hyperparams
        for hook in _DELEGATED:
            if is_overridden(hook, datamodule):
                setattr(self, hook, getattr(datamodule, hook))

        if isinstance(coreset, (str, Path)):
            coreset = CLDScores.load(coreset)
        self.scores: CLDScores | None = None
        budget: dict[str, Any] = {"fraction": fraction, "size": size, "per_class": per_class}
        if isinstance(coreset, CLDScores):
            check_budget(fraction=fraction, size=size, per_class=per_class)
            self.scores = coreset
            self.indices: list[int] = coreset.select(
                fraction=fraction, size=size, per_class=per_class, rule=rule, seed=seed
            ).tolist()
        else:
            given = {name: value for name, value in budget.items() if value is not None}
            if given or rule != "top":
                given = given or {"rule": rule}
                raise TypeError(f"Positions are the coreset as they are and take no budget or rule, got {given}.")
            self.indices = _check_indices(coreset)
        self._doubted = False
        self._passes_on = True

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer, the same for both datamodules."""
        return self.datamodule.trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.datamodule.trainer = trainer

    def __setattr__(self, name: str, value: Any) -> None:
        # What is the inner datamodule's is set there, or a tuner of the batch size would tune nothing.
        own = "_passes_on" not in vars(self) or name in vars(self) or hasattr(type(self), name)
        if own or not hasattr(self.datamodule, name):
            super().__setattr__(name, value)
        else:
            setattr(self.datamodule, name, value)

    def __getattr__(self, name: str) -> Any:
        # Called for what is not found here. The views of the full train set would not fit the narrowed one.
        if name in ("datamodule", "cld_train_dataloader", "cld_val_dataloader") or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.datamodule, name)

    @override
    def setup(self, stage: str) -> None:
        self.datamodule.setup(stage)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """The inner train dataloader, narrowed.

        Raises:
            TypeError: If the inner loader can't be narrowed.
            ValueError: If the scores are of another dataset, or a position is outside of it.
        """
        loader = self.datamodule.train_dataloader()
        check_narrowable(loader)
        length = len(loader.dataset)
        if self.scores is not None:
            problem, doubt = compare(
                self.scores.fingerprint, loader, getattr(self.datamodule, "cld_train_dataloader", None)
            )
            if problem:
                raise ValueError(
                    f"The scores are not of this train set: {problem}. Score this one, or make the same split again "
                    "(random_split needs a seeded generator). If you know better, pass the positions: "
                    "CoresetDataModule(datamodule, scores.select(...))."
                )
            if doubt and not self._doubted:
                self._doubted = True
                rank_zero_warn(doubt)
        elif self.indices and max(self.indices) >= length:
            raise ValueError(f"Position {max(self.indices)} is outside of the train set of {length:,} samples.")
        return narrow_loader(loader, self.indices, self.epoch_length, self.trainer)


def _restore_hyperparameters(datamodule: LightningDataModule) -> None:
    """Gives `datamodule` the hyperparameters that LightningCLI means for it.

    LightningCLI hands the arguments of the outermost datamodule, ours, to whichever calls `save_hyperparameters()`.
    Those of the inner one are among them, as the configuration that it was made from.

    Raises:
        ValueError: If the datamodule may have read one of our arguments for its own.
    """
    saved = datamodule.hparams
    if "_instantiator" not in saved or "datamodule" not in saved:
        return
    name = type(datamodule).__name__
    config: Any = saved["datamodule"]
    while isinstance(config, Mapping) and config["class_path"].rpartition(".")[2] != name:  # a coreset of a coreset
        config = config.get("init_args", {}).get("datamodule")
    found = isinstance(config, Mapping)
    own = {**config.get("init_args", {}), **config.get("dict_kwargs", {})} if found else {}
    shared = [key for key, value in own.items() if saved.get(key, value) != value]
    if not found or shared:
        also = f" ({', '.join(shared)} of both)" if shared else ""
        raise ValueError(
            f"{name} calls save_hyperparameters(), and LightningCLI saved CoresetDataModule's arguments{also} there. "
            "Use LightningCLI(..., load_from_checkpoint_support=False): each class then saves what it was given."
        )
    own |= {"_class_path": config["class_path"], "_instantiator": saved["_instantiator"]}
    saved.clear()
    datamodule.save_hyperparameters(own, logger=False)


def _check_indices(coreset: Any) -> list[int]:
    try:
        positions = torch.as_tensor(coreset)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "coreset must be CLDScores, the path of a scores file, or a sequence of whole numbers, got "
            f"{type(coreset).__name__}. Of a CLDCallback give `.scores`, of LossTrajectories `.score()`."
        ) from None
    if positions.ndim == 1 and len(positions) == 0:
        raise ValueError("coreset is empty: there would be nothing to train on.")
    if positions.dtype == torch.bool:
        raise TypeError("coreset must be positions, got a mask of bool: use mask.nonzero().flatten().")
    if positions.ndim != 1 or not is_integer(positions):
        raise TypeError(
            "coreset must be CLDScores, the path of a scores file, or a sequence of whole numbers, got "
            f"{type(coreset).__name__} of shape {list(positions.shape)} and dtype {positions.dtype}."
        )
    if positions.min() < 0:
        raise ValueError(f"Positions must not be negative, got {int(positions.min())}.")
    values, counts = torch.unique(positions, return_counts=True)
    if len(values) < len(positions):
        repeated = values[counts > 1].tolist()
        raise ValueError(f"Positions must not repeat, but {len(repeated)} do ({repeated[:5]}): use torch.unique.")
    return [int(position) for position in positions]

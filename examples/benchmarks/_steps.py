"""The examples' data and model for `CLDCallback(record="step")`. Training gives the same weights as without it."""

from __future__ import annotations

import torch
from _common import Classifier, Images, Splits
from torch import Tensor
from torch.nn import functional as F


class IndexedImages(Images):
    """Batches with the images' positions as last element, as `IndexedDataset` does for single samples."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return (*super().__getitems__(indices), torch.tensor(indices))


class SteppingClassifier(Classifier):
    """A `Classifier` whose training step returns the loss of each sample."""

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, targets, index = batch
        logits = self(self.augment(images))
        # The mean of sample_losses rounds differently, so the weights would not be the same.
        loss = F.cross_entropy(logits, targets)
        losses = F.cross_entropy(logits.detach(), targets, reduction="none")
        return {"loss": loss, "sample_losses": losses, "sample_index": index}


def indexed(splits: Splits) -> Splits:
    """The same splits, with positions beside the training images."""
    train = IndexedImages(splits.train.images, splits.train.targets)
    return Splits(train, splits.val, splits.test, splits.batch_size)

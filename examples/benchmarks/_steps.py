"""The examples' data and model as `CLDCallback(record="step")` wants them; trained, they become the same weights."""

from __future__ import annotations

import torch
from _common import Classifier, Images, Splits
from torch import Tensor
from torch.nn import functional as F


class IndexedImages(Images):
    """Batches that end with the positions of their images, as `IndexedDataset` adds them to single samples."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return (*super().__getitems__(indices), torch.tensor(indices))


class SteppingClassifier(Classifier):
    """A `Classifier` whose training step returns the loss of each sample."""

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, targets, index = batch
        logits = self(self.augment(images))
        # The mean of sample_losses would do, but rounds otherwise, and then the weights would not be the same.
        loss = F.cross_entropy(logits, targets)
        losses = F.cross_entropy(logits.detach(), targets, reduction="none")
        return {"loss": loss, "sample_losses": losses, "sample_index": index}


def indexed(splits: Splits) -> Splits:
    """The same splits, the training images with their positions."""
    train = IndexedImages(splits.train.images, splits.train.targets)
    return Splits(train, splits.val, splits.test, splits.batch_size)

"""Reads the images of a few samples, in one shape, for display."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image  # installed with torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cld.data.identity import look_at, offered_by
from lightning_cld.guards import preserved_rng
from lightning_cld.scores import CLDScores

SIDE = 96
"""The largest height or width of a displayed image, in pixels."""


def check_dataset(scores: CLDScores, dataset: Dataset[Any]) -> None:
    """Raises if `dataset` is not the scored dataset, as far as length, positions, file names and labels say.

    Raises:
        TypeError: If it is not a map-style dataset.
        ValueError: If it is another dataset.

    Warns:
        UserWarning: If only its length was compared, or samples differ though the labels are the same.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset):
        raise TypeError(
            "dataset must be a map-style dataset, with __len__ and __getitem__: the train dataset that the Trainer "
            f"was given. Got {type(dataset).__name__}. For a stream leave it out: the scores hold the names."
        )
    served = offered_by(dataset)
    if not served.labels or scores.fingerprint.samples:
        served = look_at(DataLoader(dataset), "train").fingerprint
    # The same samples may look different here, without normalization for example.
    scored = replace(scores.fingerprint, samples=())
    problem = scored.mismatch(served)
    if problem:
        raise ValueError(
            f"The scores don't belong to this dataset: {problem}. Give the train dataset that the Trainer was given, "
            "with the same split (random_split needs a seeded generator). A view without augmentation is fine."
        )
    compared = scored.compared(served)
    if not {"files", "positions"} & set(compared) and scores.fingerprint.mismatch(served):
        rank_zero_warn(
            "The labels of this dataset are those of the scored one, but some samples are not. Either they are "
            "prepared in another way here, or they are in another order, and then other samples are shown."
        )
    if not compared:
        rank_zero_warn(
            "The labels of this dataset, or of the scored one, are unknown, so only its length was compared. Make sure "
            "that it has the same samples in the same order."
        )


def read_images(dataset: Dataset[Any], positions: Sequence[int]) -> Tensor:
    """Reads the images of the samples at `positions`, and no other samples.

    A sample is an image, or a tuple, list or mapping with an image in it. The first PIL image is taken. Without one, it
    is the first tensor or array of shape `[C, H, W]` or `[H, W, C]` with 1, 3 or 4 channels (the fourth is dropped), or
    else the first of shape `[H, W]`. Any dtype and range will do: the lowest value in all images becomes black and the
    highest white, which makes normalized images recognizable. Infinite values become the highest and the lowest of
    their image, and missing ones the lowest. Images larger than `SIDE` are scaled down. If sizes
    differ, smaller images get a white border. The global random states stay unchanged.

    Args:
        dataset: A map-style dataset.
        positions: At least one.

    Returns:
        Uint8, `[len(positions), 3, H, W]`.

    Raises:
        TypeError: If a sample holds no image.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_cld.showing.thumbnails import read_images
        >>> digits = TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10))
        >>> read_images(digits, [3, 7]).shape
        torch.Size([2, 3, 8, 8])
    """
    with preserved_rng():
        images = [_image_of(dataset[position], position) for position in positions]
    low = min(float(image.min()) for image in images)
    high = max(float(image.max()) for image in images)
    images = [(255 * (image - low) / max(high - low, 1e-12)).round().to(torch.uint8) for image in images]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack([_framed(image, height, width) for image in images])


def _image_of(sample: Any, position: int) -> Tensor:
    """Float32 `[3, H, W]`, no larger than `SIDE`."""
    candidates = list(_images_in(sample))
    if not candidates:
        raise TypeError(
            f"Sample {position} holds no image: no PIL image, and no tensor or array of shape [C, H, W], [H, W, C] or "
            "[H, W] with 1, 3 or 4 channels. If your data are not images, leave out the dataset; otherwise give one "
            "that returns the same samples as images."
        )
    # Two-dimensional tensors come last: they may be masks or tables.
    image = min(candidates, key=lambda kind_and_image: kind_and_image[0])[1]
    image = (image.expand(3, -1, -1) if len(image) == 1 else image[:3]).float().cpu()
    finite = image[image.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    image = image.nan_to_num(low, high, low)
    scale = SIDE / max(image.shape[1:])
    if scale >= 1:
        return image
    size = [max(1, round(scale * side)) for side in image.shape[1:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _images_in(sample: Any) -> Iterator[tuple[int, Tensor]]:
    """Yields all possible images in a sample, `[C, H, W]`, each with a rank: the lower, the more certain."""
    if isinstance(sample, Mapping):
        sample = list(sample.values())
    elif not isinstance(sample, (tuple, list, Tensor, np.ndarray, Image.Image)) and hasattr(sample, "__dict__"):
        sample = list(vars(sample).values())  # a dataclass, for example
    for part in sample if isinstance(sample, (tuple, list)) else [sample]:
        channels_last = not isinstance(part, Tensor)
        certain = isinstance(part, Image.Image)
        if isinstance(part, Image.Image):
            part = np.array(part if part.mode.startswith(("I", "F")) else part.convert("RGB"))
        if isinstance(part, np.ndarray) and part.dtype.kind in "biuf":
            part = torch.from_numpy(np.ascontiguousarray(part).astype(np.float32))
        if not isinstance(part, Tensor) or part.is_complex() or part.ndim not in (2, 3) or 0 in part.shape:
            continue
        if part.ndim == 2:
            yield 0 if certain else 2, part[None]
            continue
        for axis in (-1, 0) if channels_last else (0, -1):
            if part.shape[axis] in (1, 3, 4):
                yield 0 if certain else 1, part.movedim(axis, 0)
                break


def _framed(image: Tensor, height: int, width: int) -> Tensor:
    down, across = height - image.shape[1], width - image.shape[2]
    return F.pad(image, (across // 2, across - across // 2, down // 2, down - down // 2), value=255)

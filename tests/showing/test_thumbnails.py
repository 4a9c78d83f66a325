from __future__ import annotations

import dataclasses
import random
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_cld import CLDScores
from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.data.identity import look_at
from lightning_cld.showing.thumbnails import SIDE, check_dataset, read_images

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4)  # height 3, width 4
GREY = np.round(RAMP.astype(int) * 255 / 11).astype(np.uint8)
COLOURED = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)  # HWC
COLOURED[0, 0, 0], COLOURED[0, 0, 1] = 0, 255  # uses the whole range


class Samples(Dataset):
    """Serves the given samples and records the positions that are read."""

    def __init__(self, *samples):
        self.samples, self.read = samples, []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, position):
        self.read.append(position)
        return self.samples[position]


CHW = torch.from_numpy(COLOURED).permute(2, 0, 1)


@pytest.mark.parametrize(
    "sample",
    [
        CHW,
        CHW.float() / 255,
        CHW.double() / 127.5 - 1,
        (CHW.float() / 255 - 0.45) / 0.25,
        CHW.half() / 255,
        torch.from_numpy(COLOURED),
        COLOURED,
        COLOURED.astype(np.float32) / 255,
        Image.fromarray(COLOURED),
        Image.fromarray(COLOURED).convert("RGBA"),
        torch.cat([CHW, torch.full((1, 5, 6), 255, dtype=torch.uint8)]),
        (Image.fromarray(COLOURED), 3),
        [7, CHW, 3],
        {"label": torch.tensor(3), "pixel_values": CHW},
        {"image": COLOURED, "id": "name"},
        {"attention_mask": torch.ones(1, 7), "pixel_values": CHW},
        (torch.rand(3, 4, 4), torch.rand(4, 4), Image.fromarray(COLOURED)),
    ],
)
def test_an_image_is_found_in_whatever_form_it_comes(sample):
    images = read_images(Samples(sample), [0])
    assert images.dtype == torch.uint8
    assert images.shape == (1, 3, 5, 6)
    np.testing.assert_allclose(images[0].permute(1, 2, 0).int().numpy(), COLOURED.astype(int), atol=1)


@pytest.mark.parametrize(
    "sample",
    [
        RAMP,
        torch.from_numpy(RAMP),
        torch.from_numpy(RAMP)[None],
        RAMP[:, :, None],
        Image.fromarray(RAMP),
        Image.fromarray(RAMP.astype(np.int32) * 1000),
        Image.fromarray(RAMP.astype(np.float32) - 5),
        Image.frombytes("I;16B", (4, 3), (RAMP.astype(int) * 1000).astype(">u2").tobytes()),
    ],
    ids=lambda sample: f"{type(sample).__name__} {getattr(sample, 'shape', getattr(sample, 'mode', None))}",
)
def test_grey_becomes_three_equal_channels_stretched_to_all_of_the_range(sample):
    images = read_images(Samples(sample), [0])
    for channel in images[0]:
        assert channel.tolist() == GREY.tolist()


def test_images_are_stretched_together_so_that_they_compare():
    bright, dark = torch.full((1, 2, 2), 8.0), torch.tensor([[[0.0, 2.0], [2.0, 4.0]]])
    images = read_images(Samples(bright, dark), [1, 0])
    assert images[0, 0].tolist() == [[0, 64], [64, 128]]
    assert images[1, 0].tolist() == [[255, 255], [255, 255]]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_an_image_of_one_colour_or_with_values_that_are_not_finite_is_drawn(value):
    image = torch.full((1, 2, 2), value)
    assert read_images(Samples(image), [0]).shape == (1, 3, 2, 2)
    image[0, 0, 0] = torch.nan
    assert read_images(Samples(image), [0]).shape == (1, 3, 2, 2)


@pytest.mark.parametrize(("value", "shown"), [(torch.inf, 255), (-torch.inf, 0), (torch.nan, 0)])
def test_a_value_that_is_not_finite_leaves_the_others_as_they_are(value, shown):
    image = torch.from_numpy(RAMP)[None].float() + 7
    expected = read_images(Samples(image), [0])
    holed = image.clone()
    holed[0, 1, 1] = value
    images = read_images(Samples(image, holed), [0, 1])
    assert torch.equal(images[0], expected[0])
    assert images[1, :, 1, 1].tolist() == [shown] * 3
    expected[0, :, 1, 1] = shown
    assert torch.equal(images[1], expected[0])


class Sample(NamedTuple):
    image: torch.Tensor
    label: int


class Own(Sample):
    """Has a `__dict__`, which is empty."""


class Items(list):
    pass


@pytest.mark.parametrize("sample", [Sample(CHW, 3), Own(CHW, 3), Items([CHW, 3])], ids=lambda one: type(one).__name__)
def test_an_image_in_a_tuple_or_list_of_a_class_of_ones_own_is_found(sample):
    assert read_images(Samples(sample), [0]).shape == (1, 3, 5, 6)


def test_large_images_are_scaled_down_and_small_ones_get_a_white_border():
    wide, small = Image.new("RGB", (400, 200)), Image.new("RGB", (10, 20), (100, 100, 100))
    images = read_images(Samples(wide, small), [0, 1])
    assert images.shape == (2, 3, SIDE // 2, SIDE)
    assert (images[1, :, 14:34, 43:53] == 255).all()  # the brightest value among the two images
    assert (images[1, :, 0] == 255).all()
    assert (images[0] == 0).all()


def test_only_what_is_asked_for_is_read():
    data = Samples(*[CHW] * 9)
    read_images(data, [7, 2])
    assert data.read == [7, 2]


def test_random_states_stay_as_they_are():
    class Drawing(Samples):
        def __getitem__(self, position):
            return CHW + int(torch.randint(9, ())) + np.random.randint(9) + random.randint(0, 9)

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    read_images(Drawing(CHW), [0])
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


@pytest.mark.parametrize(
    "sample", [torch.rand(784), ("text", 3), torch.rand(5, 8, 8), {"x": None}, 3, torch.rand(0, 3, 3)]
)
def test_a_sample_without_an_image_is_refused(sample):
    with pytest.raises(TypeError, match="Sample 1 holds no image: no PIL image"):
        read_images(Samples(CHW, sample), [0, 1])


# The dataset must be the scored one


LABELS = torch.tensor([0, 1, 1, 0, 2, 2])
SCORES = CLDScores(torch.linspace(0, 1, 6), LABELS)


def test_the_dataset_that_was_scored_is_accepted():
    check_dataset(SCORES, TensorDataset(torch.rand(6, 3, 8, 8), LABELS))
    pool = TensorDataset(torch.rand(7, 3, 8, 8), torch.cat([torch.tensor([9]), LABELS]))
    check_dataset(SCORES, Subset(pool, range(1, 7)))


@pytest.mark.parametrize("form", [lambda label: (Image.new("L", (4, 4)), int(label)), lambda label: {"label": label}])
def test_labels_of_images_that_are_not_tensors_are_read(form):
    check_dataset(SCORES, Samples(*map(form, LABELS)))
    with pytest.raises(
        ValueError, match=r"don't belong to this dataset: it has other labels, or the same in another order"
    ):
        check_dataset(SCORES, Samples(*map(form, LABELS.flip(0))))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:5], r"it has 5 samples, not 6.*train dataset that the Trainer was given"),
        (LABELS.flip(0), "other labels"),
    ],
)
def test_another_dataset_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(SCORES, TensorDataset(torch.rand(len(labels), 3, 8, 8), labels))


def test_a_dataset_without_labels_is_taken_with_a_warning():
    with pytest.warns(UserWarning, match="only its length was compared"):
        check_dataset(SCORES, Samples(*[CHW] * 6))


def test_scores_made_for_names_numbered_as_numpy_does_fit_the_dataset():
    names = ["dog", "cat", "owl", "cat"]
    dataset = Samples(*[CHW] * 4)
    dataset.targets = names
    scores = CLDScores([0.1, 0.2, 0.3, 0.4], np.unique(names, return_inverse=True)[1])
    check_dataset(scores, dataset)
    dataset.targets = ["cat", "dog", "owl", "dog"]
    with pytest.raises(ValueError, match="it has other labels"):
        check_dataset(scores, dataset)


def test_the_same_labels_with_other_samples_are_told():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scored = TensorDataset(images, LABELS)
    scores = CLDScores(SCORES.values, LABELS, fingerprint=look_at(DataLoader(scored), "train").fingerprint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_dataset(scores, scored)
    within_class = images[[3, 2, 1, 0, 5, 4]]
    with pytest.warns(
        UserWarning, match="labels of this dataset are those of the scored one, but some samples are not"
    ):
        check_dataset(scores, TensorDataset(within_class, LABELS))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Sized(Stream):
    def __len__(self):
        return 1


@pytest.mark.parametrize(
    "data", [Stream(), Sized(), DataLoader(Samples(CHW)), None], ids=lambda one: type(one).__name__
)
def test_what_is_no_map_style_dataset_is_refused(data):
    with pytest.raises(TypeError, match="must be a map-style dataset"):
        check_dataset(CLDScores([0.1], fingerprint=Fingerprint(1)), data)


def test_an_image_in_a_dataclass_is_found():
    @dataclasses.dataclass
    class Item:
        path: str
        image: torch.Tensor

    items = [Item("a.png", torch.zeros(3, 4, 5)), Item("b.png", torch.ones(3, 4, 5))]
    assert read_images(items, [1, 0]).flatten(1).float().mean(1).tolist() == [255, 0]

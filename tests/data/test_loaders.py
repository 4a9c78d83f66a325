"""What samplers draw, found out without disturbing them."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_cld.data.loaders import check_drawn, sampled_positions, unknown_sampler

POINTS = TensorDataset(torch.rand(12, 2), torch.arange(12) % 3)


def loader(sampler, dataset=POINTS):
    return DataLoader(dataset, batch_size=4, sampler=sampler)


def batched(batch_sampler, dataset=POINTS):
    return DataLoader(dataset, batch_sampler=batch_sampler)


class Drawing(Sampler):
    """Draws what it is given."""

    def __init__(self, drawn):
        self.drawn = drawn

    def __len__(self):
        return len(self.drawn)

    def __iter__(self):
        return iter(self.drawn)


# Which positions are drawn


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (SequentialSampler(POINTS), range(12)),
        (RandomSampler(POINTS, replacement=True, num_samples=3), range(12)),
        (DistributedSampler(POINTS, 2, 1), range(12)),
        (SequentialSampler(range(4)), range(4)),
        (RandomSampler(range(4)), range(4)),
        (DistributedSampler(range(4), 2, 1), range(4)),
        (SubsetRandomSampler([5, 3, 3]), [3, 5]),
        (SubsetRandomSampler(torch.tensor([5, 3])), [3, 5]),
        (WeightedRandomSampler([0.0, 1.0, 0.0, 2.0], 9), [1, 3]),
        (WeightedRandomSampler(torch.ones(20), 9), range(12)),
        ([7, 2, 7], [2, 7]),
        ((7, 2), [2, 7]),
        (range(3, 6), [3, 4, 5]),
        (np.array([7, 2]), [2, 7]),
        (torch.tensor([7, 2]), [2, 7]),
        ([-1, 0], [0, 11]),
        ([], []),
        (Drawing([1, 2]), range(12)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_that_a_sampler_can_draw(sampler, expected):
    positions = sampled_positions(loader(sampler))
    assert positions.dtype == torch.int64
    assert positions.tolist() == list(expected)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ([[1, 2], [5]], [1, 2, 5]),
        (BatchSampler(SubsetRandomSampler([4, 2]), 2, drop_last=False), [2, 4]),
        (Drawing([[1, 2], [5]]), range(12)),
    ],
)
def test_positions_that_a_batch_sampler_can_draw(sampler, expected):
    assert sampled_positions(batched(sampler)).tolist() == list(expected)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (loader(SequentialSampler(POINTS)), None),
        (loader([1, 2]), None),
        (loader(SubsetRandomSampler([1, 2])), None),
        (loader(Drawing([1, 2])), "Drawing"),
        (batched(Drawing([[1, 2]])), "Drawing"),
    ],
)
def test_samplers_of_which_nothing_is_known_are_named(made, name):
    assert unknown_sampler(made) == name


# What is no position


@pytest.mark.parametrize(
    "drawn",
    [
        ["a", "b"],
        [(slice(0, 1),)],
        [1, 2, 0.5],
        [torch.tensor(0.5)],
        [torch.tensor([1, 2])],
        [np.float64(1.0)],
        [True],
        [None],
        [(3, 416)],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        lambda drawn: loader(Drawing(drawn)),
        lambda drawn: batched(Drawing([drawn])),
        lambda drawn: loader(drawn),
        lambda drawn: loader(SubsetRandomSampler(drawn)),
    ],
    ids=["sampler", "batch sampler", "list", "subset"],
)
def test_keys_are_refused(make, drawn):
    with pytest.raises(TypeError, match=r"The train dataloader's \w+ draws .*, which is no position in the dataset"):
        check_drawn(make(drawn), "train")


@pytest.mark.parametrize(
    "sampler", [["a", "b"], [[1], [2, 3]], [0.5], torch.tensor([0.5]), [1, "a"], [True, False]], ids=str
)
def test_a_list_of_other_things_than_positions_is_refused_whoever_asks(sampler):
    with pytest.raises(TypeError, match="positions that are no whole numbers"):
        sampled_positions(loader(sampler))


@pytest.mark.parametrize("position", [12, -13, 10**6])
def test_positions_outside_of_the_dataset_are_refused(position):
    with pytest.raises(ValueError, match=rf"The val dataloader's Drawing draws position {position}, outside"):
        check_drawn(loader(Drawing([3, position])), "val")


@pytest.mark.parametrize(
    "drawn", [[0, 11, -12], [np.int64(3), np.uint8(2)], [torch.tensor(3)], [], itertools.repeat(3)], ids=str
)
def test_positions_of_whatever_type_are_positions(drawn):
    check_drawn(loader(Drawing(drawn)), "train")


@pytest.mark.parametrize(
    "batch", [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2])], ids=lambda b: type(b).__name__
)
def test_batches_of_whatever_type_are_positions(batch):
    check_drawn(batched(Drawing([batch])), "train")


class Overridden(RandomSampler):
    """One of torch's samplers by its base alone."""

    def __iter__(self):
        return iter(["a", "b"])


def test_a_sampler_derived_from_torchs_is_asked_too():
    with pytest.raises(TypeError, match="Overridden draws 'a'"):
        check_drawn(loader(Overridden(POINTS)), "train")


# Nothing is disturbed


class Shuffling(Sampler):
    """Shuffles its list in place, from a generator of its own, and counts its epochs."""

    def __init__(self, generator):
        self.order, self.generator, self.epoch = list(range(12)), generator, 0

    def __len__(self):
        return 12

    def __iter__(self):
        self.epoch += 1
        if isinstance(self.generator, torch.Generator):
            self.order = [self.order[place] for place in torch.randperm(12, generator=self.generator)]
        else:
            self.generator.shuffle(self.order)
        yield from self.order


@pytest.mark.parametrize(
    "generator",
    [
        lambda: random.Random(0),
        lambda: np.random.RandomState(0),
        lambda: np.random.default_rng(0),
        lambda: torch.Generator().manual_seed(0),
    ],
)
def test_a_sampler_goes_on_as_it_would_have(generator):
    asked, other = Shuffling(generator()), Shuffling(generator())
    check_drawn(loader(asked), "train")
    assert asked.epoch == 0
    assert [list(asked) for _ in range(2)] == [list(other) for _ in range(2)]


def test_global_random_states_are_left_as_they_are():
    class Global(Drawing):
        def __iter__(self):
            random.shuffle(self.drawn)
            np.random.shuffle(self.drawn)
            yield from torch.randperm(12).tolist()

    sampler = Global(list(range(12)))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    check_drawn(loader(sampler), "train")
    assert sampler.drawn == list(range(12))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_an_endless_sampler_is_asked_for_a_few():
    class Endless(Drawing):
        def __iter__(self):
            return itertools.count()

    with pytest.raises(ValueError, match="position 3, outside"):
        check_drawn(loader(Endless([0]), TensorDataset(torch.rand(3, 1))), "train")
    check_drawn(loader(Endless([0])), "train")


def test_a_sampler_that_cannot_be_copied_is_not_asked(tmp_path):
    class Open(Drawing):
        def __init__(self):
            super().__init__(["a"])
            self.file = (tmp_path / "log").open("w")

        def __iter__(self):
            raise AssertionError("not to be asked")

    check_drawn(loader(Open()), "train")


@pytest.mark.parametrize("error", [RuntimeError, StopIteration, KeyError])
def test_a_sampler_that_cannot_be_asked_now_is_left_alone(error):
    class Later(Drawing):
        def __iter__(self):
            raise error("call set_epoch first")

    check_drawn(loader(Later([0])), "train")


class Uncopied(Dataset):
    def __len__(self):
        return 12

    def __deepcopy__(self, memo):
        raise AssertionError("data are not to be copied")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: data,
        lambda data: Subset(data, range(12)),
        lambda data: ConcatDataset([data]),
        lambda data: Subset(ConcatDataset([Subset(data, range(12))]), range(12)),
    ],
)
def test_the_data_that_a_sampler_knows_are_not_copied(wrap):
    class Aware(Drawing):
        def __init__(self, data):
            super().__init__(["a"])
            self.data = data

    data = Uncopied()
    with pytest.raises(TypeError, match="draws 'a'"):
        check_drawn(loader(Aware(data), wrap(data)), "train")


def test_a_dataset_within_itself_is_no_trap():
    data = Uncopied()
    data.parent = data
    with pytest.raises(TypeError, match="draws 'a'"):
        check_drawn(loader(Drawing(["a"]), data), "train")

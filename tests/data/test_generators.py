"""Random generators that a dataset keeps for itself."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from toys import Blobs, Classifier, blobs, fit

from lightning_cld import CLDCallback
from lightning_cld.data.generators import OwnGenerators

MAKERS = {
    "RandomState": (lambda: np.random.RandomState(0), lambda generator: generator.randn()),
    "Generator": (lambda: np.random.default_rng(0), lambda generator: generator.normal()),
    "Random": (lambda: random.Random(0), lambda generator: generator.gauss(0, 1)),
    "torch": (lambda: torch.Generator().manual_seed(0), lambda generator: torch.randn((), generator=generator).item()),
}


class Shared:
    R = np.random.RandomState(0)


@pytest.mark.parametrize(("make", "draw"), MAKERS.values(), ids=MAKERS)
def test_states_are_the_same_in_the_body_and_put_back_after_it(make, draw):
    generator = make()
    own = OwnGenerators(SimpleNamespace(transform={"a": [SimpleNamespace(rng=generator)]}))
    found = draw(make())
    draw(generator), draw(generator)
    expected = make()
    draws = [draw(expected) for _ in range(3)]
    for _ in range(2):
        with own.rewound():
            assert draw(generator) == found
    with pytest.raises(ZeroDivisionError), own.rewound():
        draw(generator) / 0
    assert draw(generator) == draws[2]


def test_generators_of_classes_are_found_and_those_in_data_are_not_looked_for():
    own = OwnGenerators(SimpleNamespace(transform=Shared(), data=[random.Random(0)] * 2000))
    assert own._found == [Shared.R]


def test_cycles_and_odd_objects_are_no_trouble():
    odd = SimpleNamespace(own=print, slots=object(), tensor=torch.rand(3), module=random)
    odd.me = odd
    assert OwnGenerators(odd, None, 3)._found == []


class Noisy(Dataset):
    """Augments with a generator of its own."""

    def __init__(self, inner, make, draw):
        self.inner, self.generator, self.draw = inner, make(), draw

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        inputs, label = self.inner[index]
        return inputs + self.draw(self.generator), label


@pytest.mark.parametrize(("make", "draw"), MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.filterwarnings("ignore:.*differently when read twice.*")
def test_watching_moves_no_generator_of_a_dataset(tmp_path, make, draw, view):
    def run(cld):
        data = Blobs()
        noisy = Noisy(data.train_set, make, draw)
        if view:
            data.cld_train_dataloader = lambda: DataLoader(data.train_set, 32)
        data.train_dataloader = lambda: DataLoader(noisy, 16, shuffle=True)
        return fit(tmp_path, cld, Classifier, data)[1]

    cld = CLDCallback()
    with_it, without = run(cld).state_dict(), run(None).state_dict()
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert len(cld.trajectories) == 5


@pytest.mark.filterwarnings("ignore:.*differently when read twice.*")
def test_every_sweep_shows_the_same_augmentation(tmp_path):
    noisy = Noisy(Subset(blobs(), range(90)), *MAKERS["RandomState"])
    data = Blobs()
    data.train_dataloader = lambda: DataLoader(noisy, 16, shuffle=True)
    cld = CLDCallback()
    module = Classifier(lr=0.0)
    module.net[1] = torch.nn.Identity()  # in place of BatchNorm, whose statistics move
    fit(tmp_path, cld, module, data)
    rows = cld.trajectories.train_losses
    assert torch.equal(rows, rows[:1].expand_as(rows))

"""Loaders around a DataLoader that carry its batches to the device and normalise them there, as timm's does."""

import copy
from importlib.metadata import version

import lightning as L
import pytest
import torch
from timm.data.loader import PrefetchLoader, fast_collate
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler
from toys import CLASSES, Classifier, quiet_trainer

from lightning_cld import CLDCallback, CoresetDataModule
from lightning_cld.data.device_loaders import around, loader_inside
from lightning_cld.data.loaders import changes_on_device, check_loader

KEPT = list(range(1, 90, 3))
CPU = torch.device("cpu")


class Images(Dataset):
    """Bytes of 3x2x2 images, as timm's transforms leave them."""

    def __init__(self, length=90, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(CLASSES, (length,), generator=generator)
        self.images = torch.randint(0, 150, (length, 3, 2, 2), generator=generator, dtype=torch.uint8)
        self.images += (self.targets * 50).to(torch.uint8)[:, None, None, None]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, position):
        return self.images[position].numpy(), int(self.targets[position])


def normalised(images):
    """What timm's loader makes of bytes, by its documentation: ImageNet's mean and deviation, times 255."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
    return (images.float() - mean) / deviation


def timm_loader(dataset, erase=0.0, **settings):
    settings = {"batch_size": 16, "collate_fn": fast_collate, **settings}
    loader = PrefetchLoader(DataLoader(dataset, **settings), device=CPU, re_prob=erase)
    if version("lightning").startswith("2.5.0"):  # which asks a loader that has a sampler for its batch sampler
        loader.batch_sampler = loader.loader.batch_sampler
    return loader


class Halves:
    """A device loader of one's own, which iterates by itself."""

    def __init__(self, loader, noise=0.0):
        self.loader = loader
        self.noise = noise

    def __iter__(self):
        self.batches = iter(self.loader)
        return self

    def __next__(self):
        images, targets = next(self.batches)
        return images / 2 + self.noise * torch.randn(images.shape), targets

    def __len__(self):
        return len(self.loader)


def own_loader(dataset, noise=0.0, **settings):
    return Halves(DataLoader(dataset, **{"batch_size": 16, **settings}), noise)


KINDS = {"timm": (timm_loader, normalised), "own": (own_loader, lambda images: images / 2)}


class Data(L.LightningDataModule):
    def __init__(self, make, changes=0.0, **settings):
        super().__init__()
        self.make, self.changes, self.settings = make, changes, settings
        self.made = []

    def train_dataloader(self):
        self.made.append(self.make(Images(), self.changes, **{"shuffle": True, **self.settings}))
        return self.made[-1]

    def val_dataloader(self):
        return self.make(Images(30, seed=1))


class Model(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, CLASSES))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sweep_sees_what_the_device_loader_makes_of_the_samples(tmp_path, kind, workers):
    make, made_of = KINDS[kind]
    weights, own_means = [], []

    class Watches(L.Callback):
        def on_train_start(self, trainer, module):
            weights.append(copy.deepcopy(module.net))

        def on_train_epoch_end(self, trainer, module):
            weights.append(copy.deepcopy(module.net))
            own_means.append(float(trainer.callback_metrics["val_loss"]))

    cld = CLDCallback(dirpath=tmp_path)
    data = Data(make, num_workers=workers, persistent_workers=workers > 0)
    torch.manual_seed(0)
    quiet_trainer(tmp_path, Watches(), cld, max_epochs=3).fit(Model(), datamodule=data)
    for images, rows in ((Images(), cld.trajectories.train_losses), (Images(30, seed=1), cld.trajectories.val_losses)):
        for net, row in zip(weights, rows, strict=True):
            with torch.no_grad():
                expected = F.cross_entropy(net(made_of(images.images)), images.targets, reduction="none")
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    assert cld.trajectories.val_losses.mean(1)[1:].tolist() == pytest.approx(own_means, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [0.0, 0.7])
def test_what_a_device_loader_changes_at_random_is_told(tmp_path, recwarn, kind, changes):
    cld = CLDCallback(dirpath=tmp_path)
    quiet_trainer(tmp_path, cld, max_epochs=3).fit(Model(), datamodule=Data(KINDS[kind][0], changes))
    told = [str(warning.message) for warning in recwarn if "CLD" in str(warning.message)]
    assert len([text for text in told if "read twice (random augmentation?)" in text]) == (changes > 0)
    assert not any("in a way of its own" in text for text in told)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [0.0, 0.7])
def test_two_passes_tell_whether_a_device_loader_changes_samples(kind, changes):
    loader = check_loader(KINDS[kind][0](Images(), changes), "train")
    assert changes_on_device(loader, "train") == (changes > 0)
    assert not changes_on_device(loader.loader, "train")


def test_labels_are_read_past_the_device_loader(tmp_path):
    class Hidden(Dataset):
        def __len__(self):
            return 90

        def __getitem__(self, position):
            return Images()[position]

    cld = CLDCallback(dirpath=tmp_path)
    data = Data(lambda images, *_, **settings: timm_loader(Hidden() if len(images) == 90 else images, **settings))
    quiet_trainer(tmp_path, cld, max_epochs=3).fit(Model(), datamodule=data)
    images, _ = next(iter(CoresetDataModule(data, cld.scores_path, size=16).train_dataloader()))
    assert images.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_watched_run_on_a_device_loader_trains_the_same(tmp_path, kind):
    def weights(*callbacks):
        L.seed_everything(3, verbose=False)  # timm's random erasing draws from python's generator too
        module = Model()
        quiet_trainer(tmp_path, *callbacks, max_epochs=3).fit(module, datamodule=Data(KINDS[kind][0], 0.5))
        return torch.cat([weight.flatten() for weight in module.parameters()])

    assert torch.equal(weights(), weights(CLDCallback(dirpath=tmp_path)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
def test_a_device_loader_is_made_again_over_the_coreset(kind, epoch_length):
    make, made_of = KINDS[kind]
    data = Data(make, drop_last=True)
    loader = CoresetDataModule(data, KEPT, epoch_length=epoch_length).train_dataloader()
    given = data.made[-1]
    assert type(loader) is type(given)
    assert loader.loader is not given.loader
    assert {name: value for name, value in vars(loader).items() if name != "loader"} == {
        name: value for name, value in vars(given).items() if name != "loader"
    }
    assert len(given.loader.dataset) == 90
    images = made_of(Images().images[KEPT]).flatten(1)
    batches = list(loader)
    assert [len(batch) for batch, _ in batches] == [16] * (1 if epoch_length == "coreset" else 5)
    distances = torch.cdist(torch.cat([batch for batch, _ in batches]).flatten(1).double(), images.double())
    assert distances.min(1).values.max() < 1e-4
    assert distances.min(0).values.max() < 1e-4 or epoch_length == "coreset"  # which drops a batch


def test_a_device_loader_around_a_batch_sampler_made_by_hand():
    data = Data(lambda images, *_, **__: Halves(DataLoader(images, batch_sampler=BatchSampler(range(90), 8, False))))
    with pytest.raises(TypeError, match="range, and it is unknown"):
        CoresetDataModule(data, KEPT).train_dataloader()
    data = Data(
        lambda images, *_, **__: Halves(DataLoader(images, batch_sampler=BatchSampler(RandomSampler(images), 8, False)))
    )
    assert [len(batch) for batch, _ in CoresetDataModule(data, KEPT).train_dataloader()] == [8, 8, 8, 6]


def test_lightning_does_not_split_what_is_no_dataloader():
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, barebones=True)
    data = CoresetDataModule(Data(own_loader), KEPT, epoch_length="full")
    data.trainer = trainer
    assert len(data.train_dataloader()) == 6  # 90 samples in batches of 16, as without the coreset
    shared = Data(own_loader, shuffle=None, sampler=DistributedSampler(Images(), 2, 1))
    own = CoresetDataModule(shared, KEPT, epoch_length="full")
    own.trainer = trainer
    assert len(own.train_dataloader()) == 3


def test_a_target_trains_on_the_coreset_of_a_device_loader(tmp_path):
    cld = CLDCallback(dirpath=tmp_path)
    data = Data(timm_loader)
    quiet_trainer(tmp_path, cld, max_epochs=3).fit(Model(), datamodule=data)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(Model(), datamodule=CoresetDataModule(data, cld.scores_path, size=40))
    assert trainer.global_step == 2 * 3


# What only looks like one


class Prefetched:
    """Began to read when it was made, so that no copy of it reads another loader."""

    def __init__(self, loader):
        self.loader = loader
        self.batches = iter(loader)

    def __iter__(self):
        return self.batches


class Counts:
    """Has a loader and yields something else."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(range(3))


class Breaks(Counts):
    def __iter__(self):
        raise OSError("the device is gone")


class Fixed(Counts):
    __slots__ = ()

    def __setattr__(self, name, value):
        if name in vars(self):
            raise AttributeError(f"{name} is fixed")
        super().__setattr__(name, value)


class Named:
    loader = "fast"


@pytest.mark.parametrize("kind", [Prefetched, Counts, Breaks, Fixed])
def test_a_loader_that_does_not_read_its_loader_is_refused(tmp_path, kind):
    class Custom(Data):
        def train_dataloader(self):
            return kind(DataLoader(Images(), 16))

    with pytest.raises(TypeError, match=f"CoresetDataModule narrows a torch DataLoader.* a {kind.__name__}"):
        CoresetDataModule(Custom(own_loader), KEPT).train_dataloader()
    cld = CLDCallback(dirpath=tmp_path, train_dataloader=kind(DataLoader(Images(), 16)))
    with pytest.raises(TypeError, match=f"train loader, a {kind.__name__}, is a stream.*train_dataloader="):
        quiet_trainer(tmp_path, cld).fit(Model(), datamodule=Data(own_loader))


class Unread(Images):
    def __getitem__(self, position):
        pytest.fail("a sample was read")


def test_other_loaders_are_taken_as_they_are():
    plain = DataLoader(Unread(), 16)
    plain.loader = DataLoader(Unread(), 16)  # somebody's own attribute
    assert loader_inside(plain) is plain
    named = Named()
    assert loader_inside(named) is named


def test_looking_inside_draws_no_random_numbers_and_does_not_touch_the_loader():
    loader = timm_loader(Images(), erase=0.5)
    before, attributes = torch.get_rng_state(), dict(vars(loader))
    assert loader_inside(loader) is loader.loader
    assert torch.equal(before, torch.get_rng_state())
    assert vars(loader) == attributes
    assert around(loader, DataLoader(Images(30))) is not loader

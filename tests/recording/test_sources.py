"""A run is watched on the data that it trains on, from its first sweep to its last."""

import itertools

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, WeightedRandomSampler
from toys import CLASSES, Blobs, Classifier, blobs, fit, quiet_trainer

from lightning_cld import CLDCallback

POOL = blobs(300)


def drawn(seed, each=30):
    """Positions of as many samples of each class, class after class: other ones for each seed, the same labels."""
    generator = torch.Generator().manual_seed(seed)
    places = [(POOL.tensors[1] == label).nonzero().flatten() for label in range(CLASSES)]
    return torch.cat([place[torch.randperm(len(place), generator=generator)[:each]] for place in places]).tolist()


class Taken(Dataset):
    """The same samples, of which nothing is known without reading them."""

    def __init__(self, positions, noise=0.0):
        self.positions, self.noise = positions, noise

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, index):
        inputs, label = POOL[self.positions[index]]
        return inputs + self.noise * torch.randn(4), label


class Texts(Taken):
    """Samples of different lengths."""

    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return {"inputs": inputs, "tokens": list(range(self.positions[index] % 50)), "labels": label}


class Reader(Classifier):
    """Reads `Texts`."""

    def training_step(self, batch, batch_idx):
        return self.cld_step(batch)[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def cld_step(self, batch):
        labels = torch.tensor([sample["labels"] for sample in batch])
        inputs = torch.stack([sample["inputs"] for sample in batch])
        return F.cross_entropy(self(inputs), labels, reduction="none"), labels


def data_of(dataset, *, view=None, **loader):
    """A datamodule that trains on what `dataset()` makes, anew each time that its loader is asked for."""
    settings = {"batch_size": 16, "shuffle": "sampler" not in loader, **loader}
    data = Blobs()
    data.train_dataloader = lambda: DataLoader(dataset(), **settings)
    data.val_dataloader = lambda: DataLoader(data.val_set, 16)
    if view is not None:
        data.cld_train_dataloader = lambda: view
    return data


def subset_of(seed):
    return Subset(POOL, drawn(seed))


def taken(seed):
    return Taken(drawn(seed))


KINDS = [subset_of, taken]


# The same samples all along


@pytest.mark.parametrize("make", KINDS)
def test_a_reloaded_train_set_of_other_samples_adds_no_rows_to_the_timeline(tmp_path, make):
    seeds, cld = itertools.count(), CLDCallback()
    with pytest.warns(UserWarning, match="The train set is not the one whose losses were logged so far"):
        fit(tmp_path, cld, datamodule=data_of(lambda: make(next(seeds))), reload_dataloaders_every_n_epochs=1)
    assert not cld.trajectories.train_losses[1:].isfinite().any(dim=1)[1:].any()
    assert cld.trajectories.epochs[:2] == [0, 1]


@pytest.mark.parametrize("make", KINDS)
def test_a_reloaded_train_set_of_the_same_samples_goes_on(tmp_path, make):
    cld = CLDCallback()
    fit(tmp_path, cld, datamodule=data_of(lambda: make(0)), reload_dataloaders_every_n_epochs=1)
    assert cld.trajectories.epochs == [0, 1, 2, 3, 4]
    assert not cld.scores.values.isnan().any()


def test_reloaded_texts_of_other_lengths_are_other_samples(tmp_path):
    seeds, cld = itertools.count(), CLDCallback()
    data = data_of(lambda: Texts(drawn(next(seeds))), collate_fn=list)
    data.val_dataloader = lambda: DataLoader(Texts(drawn(99)), 16, collate_fn=list)
    with pytest.warns(UserWarning, match="not the one whose losses were logged so far: some of its samples are other"):
        fit(tmp_path, cld, Reader, data, reload_dataloaders_every_n_epochs=1)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("history", ["full", "running"])
def test_a_run_goes_on_with_its_own_samples_alone(tmp_path, make, history):
    trainer, _ = fit(tmp_path, CLDCallback(history=history), datamodule=data_of(lambda: make(0)), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="The train set is not the one whose losses were logged so far"):
        fit(
            tmp_path,
            CLDCallback(history=history),
            datamodule=data_of(lambda: make(1)),
            ckpt_path=tmp_path / "half.ckpt",
        )
    cld = CLDCallback(history=history)
    fit(tmp_path, cld, datamodule=data_of(lambda: make(0)), ckpt_path=tmp_path / "half.ckpt")
    assert not cld.scores.values.isnan().any()


def test_a_validation_set_of_other_samples_is_no_reference(tmp_path):
    def with_val(seed):
        data = data_of(lambda: subset_of(0))
        data.val_dataloader = lambda: DataLoader(taken(seed), 16)
        return data

    trainer, _ = fit(tmp_path, CLDCallback(), datamodule=with_val(1), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="The validation set is not the one"):
        fit(tmp_path, CLDCallback(), datamodule=with_val(2), ckpt_path=tmp_path / "half.ckpt")


@pytest.mark.parametrize(
    ("dataset", "known"),
    [
        (lambda: subset_of(0), ["labels", "positions", "samples"]),
        (lambda: taken(0), ["some labels", "samples"]),
        (lambda: Taken(drawn(0), noise=1.0), ["some labels"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*shows the same sample differently.*")
def test_scores_say_what_is_known_of_the_train_set(tmp_path, dataset, known):
    cld = CLDCallback()
    fit(tmp_path, cld, datamodule=data_of(dataset))
    assert cld.scores.metadata["identity"] == known
    assert cld.trajectories.fingerprint.known() == known


@pytest.mark.parametrize("samples", [1, 2])
def test_very_small_sets_are_swept(tmp_path, samples):
    cld = CLDCallback()
    positions = drawn(0)[:samples]
    data = data_of(lambda: Taken(positions))
    data.val_dataloader = lambda: DataLoader(Taken(positions), 16)
    fit(tmp_path, cld, lambda: WithoutNorm(), data)
    assert cld.trajectories.train_losses.shape == (5, samples)


class WithoutNorm(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, CLASSES)


# Views


def view_of(dataset):
    return DataLoader(dataset, 32)


@pytest.mark.filterwarnings("error:.*shows the same sample differently.*")
def test_a_view_of_the_train_set_is_taken(tmp_path):
    cld = CLDCallback()
    data = data_of(lambda: Taken(drawn(0), noise=1.0), view=view_of(taken(0)))
    fit(tmp_path, cld, datamodule=data)
    assert cld.scores.metadata["identity"] == ["some labels", "samples"]


@pytest.mark.parametrize(
    ("given", "view", "problem"),
    [
        (lambda: subset_of(0), subset_of(1), "it takes other positions"),
        (lambda: taken(0), taken(1), "some of its samples are other ones"),
        (lambda: taken(0), Taken(drawn(0)[::-1]), "it has other labels"),
        (lambda: taken(0), Taken(drawn(0)[1:]), "it has 89 samples, not 90"),
    ],
)
def test_a_view_of_other_data_is_refused(tmp_path, given, view, problem):
    with pytest.raises(ValueError, match=f"is not of the dataset that is trained on: {problem}"):
        fit(tmp_path, CLDCallback(), datamodule=data_of(given, view=view_of(view)))


def test_a_view_may_show_labels_without_the_noise_that_training_adds(tmp_path):
    class Softened(Taken):
        def __getitem__(self, index):
            inputs, label = super().__getitem__(index)
            return inputs, F.one_hot(label, CLASSES) * 0.9 + torch.rand(CLASSES) * 0.1

    class Soft(Classifier):
        def validation_step(self, batch, batch_idx):
            pass

    cld = CLDCallback()
    fit(tmp_path, cld, Soft, data_of(lambda: Softened(drawn(0)), view=view_of(taken(0))))
    assert not cld.scores.values.isnan().any()


class Two(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["other"], batch_idx) + super().training_step(batch["own"], batch_idx)


def with_two(view):
    """Trains on two sets at once; of the second only some positions are drawn."""
    data = Blobs()
    data.train_dataloader = lambda: {
        "other": DataLoader(taken(1), 16),
        "own": DataLoader(taken(0), 16, sampler=range(1, 90)),
    }
    data.cld_train_dataloader = lambda: view_of(view)
    return data


def test_a_view_is_of_the_one_train_loader_that_has_its_samples(tmp_path):
    cld = CLDCallback()
    fit(tmp_path, cld, Two, with_two(taken(0)))
    assert cld.scores.values.isnan().nonzero().flatten().tolist() == [0]


def test_a_view_of_none_of_the_train_loaders_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not of the dataset that is trained on: some of its samples are other"):
        fit(tmp_path, CLDCallback(), Two, with_two(taken(2)))


class Keyed(Dataset):
    """Has names for positions."""

    def __len__(self):
        return 3

    def __getitem__(self, name):
        return POOL[int(name.removeprefix("sample "))]


class Names(Sampler):
    def __len__(self):
        return 90

    def __iter__(self):
        return iter([f"sample {position}" for position in drawn(0)])


class Queue(Dataset):
    """Ignores its index."""

    def __init__(self):
        self.at = 0

    def __len__(self):
        return 90

    def __getitem__(self, index):
        self.at += 1
        return POOL[self.at % 300]


UNUSABLE = [
    ({"dataset": Keyed, "sampler": Names()}, TypeError, "Names draws 'sample .*', which is no position"),
    ({"dataset": Queue}, ValueError, "Queue, the train dataset, does not give the same sample"),
]


@pytest.mark.parametrize(("data", "error", "message"), UNUSABLE)
def test_data_without_positions_are_refused_at_the_start(tmp_path, data, error, message):
    module = Classifier()
    before = [weight.clone() for weight in module.parameters()]
    with pytest.raises(error, match=message):
        fit(tmp_path, CLDCallback(), module, data_of(**data))
    assert all(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize("data", [data for data, _, _ in UNUSABLE])
def test_a_view_serves_where_training_has_no_positions(tmp_path, data):
    cld = CLDCallback()
    fit(tmp_path, cld, datamodule=data_of(**data, view=view_of(taken(0))))
    assert len(cld.scores) == 90


def test_samples_of_weight_zero_are_left_out(tmp_path):
    weights = torch.ones(90)
    weights[::3] = 0
    cld = CLDCallback()
    fit(tmp_path, cld, datamodule=data_of(lambda: taken(0), sampler=WeightedRandomSampler(weights, 90)))
    assert torch.equal(cld.scores.values.isnan(), weights == 0)
    assert not set(cld.scores.select(fraction=0.5).tolist()) & set(range(0, 90, 3))


def test_a_sampler_that_draws_nothing_is_refused(tmp_path):
    sampler = WeightedRandomSampler(torch.zeros(90), 90)
    with pytest.raises(ValueError, match=r"draws no samples. Are all weights of its sampler zero"):
        fit(tmp_path, CLDCallback(), datamodule=data_of(lambda: taken(0), sampler=sampler))


# Nothing is disturbed


class Shuffling(Sampler):
    """Shuffles its list in place, from a generator of its own."""

    def __init__(self, length):
        self.order, self.generator = list(range(length)), torch.Generator().manual_seed(3)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        self.order = [self.order[place] for place in torch.randperm(len(self.order), generator=self.generator)]
        return iter(self.order)


class Batches(Shuffling):
    def __iter__(self):
        return iter([[*super(Batches, self).__iter__()][start : start + 10] for start in range(0, 90, 10)])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("sampler", [Shuffling, Batches])
@pytest.mark.filterwarnings("ignore:.*whether .* draws all of them.*")
@pytest.mark.filterwarnings("ignore:.*shows the same sample differently.*")
def test_training_is_the_same_bit_for_bit_whatever_is_looked_at(tmp_path, sampler, workers):
    def trained(cld):
        own = sampler(90)
        drawing = {"sampler": own, "batch_size": 16} if sampler is Shuffling else {"batch_sampler": own}
        data = Blobs()
        dataset = Taken(drawn(0), noise=0.5)
        data.train_dataloader = lambda: DataLoader(
            dataset, num_workers=workers, persistent_workers=workers > 1, **drawing
        )
        _, module = fit(tmp_path, cld, datamodule=data)
        return module.state_dict()

    watched, alone = trained(CLDCallback(batch_size=16)), trained(None)
    assert all(torch.equal(value, alone[name]) for name, value in watched.items())


def test_the_data_are_looked_at_anew_only_when_they_are_loaded_anew(tmp_path):
    class Counts(TensorDataset):
        reads = 0

        def __getitem__(self, index):
            Counts.reads += 1
            return super().__getitem__(index)

    data = L.LightningDataModule.from_datasets(Counts(*POOL[drawn(0)]), Blobs().val_set, batch_size=16)
    fit(tmp_path, CLDCallback(), datamodule=data, max_epochs=4)
    trained, swept = 4 * 90, 5 * 90
    assert trained + swept < Counts.reads < trained + swept + 30


class BringsLoaders(Classifier):
    """A module with loaders and views of its own."""

    data = Blobs()
    view = Blobs().train_set

    def train_dataloader(self):
        return DataLoader(self.data.train_set, 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data.val_set, 16)

    def cld_train_dataloader(self):
        return DataLoader(self.view, 30)

    def cld_val_dataloader(self):
        return DataLoader(Subset(self.data.val_set, range(24)), 8)


def test_a_module_that_brings_its_loaders_brings_its_views(tmp_path):
    cld = CLDCallback()
    quiet_trainer(tmp_path, cld).fit(BringsLoaders())
    assert cld.trajectories.references == 24
    with pytest.raises(ValueError, match=r"cld_train_dataloader.*it has 30 samples, not 90"):
        quiet_trainer(tmp_path, CLDCallback()).fit(type("Other", (BringsLoaders,), {"view": Blobs().val_set})())


def test_views_of_a_module_are_not_used_with_a_datamodule(tmp_path):
    cld = CLDCallback()
    fit(tmp_path, cld, BringsLoaders, Blobs())
    assert cld.trajectories.references == 30

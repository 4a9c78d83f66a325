"""The data and the models of the examples. Nothing here knows about CLD."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_cld import proportional_holdout


@dataclass(frozen=True)
class Preset:
    """What is sensible for a dataset where the command line does not say otherwise."""

    title: str
    network: str
    epochs: int
    steps: int  # of a target, where all take the same number
    batch_size: int
    lr: float
    holdout: float  # share of the train data that becomes the validation split


PRESETS = {
    "digits": Preset("scikit-learn digits", "mlp", epochs=30, steps=1_000, batch_size=32, lr=0.1, holdout=0.15),
    "fashion-mnist": Preset("Fashion-MNIST", "cnn8", epochs=15, steps=1_500, batch_size=64, lr=0.1, holdout=0.1),
    "cifar10": Preset("CIFAR-10", "resnet9", epochs=40, steps=14_000, batch_size=128, lr=0.1, holdout=0.1),
    "cifar100": Preset("CIFAR-100", "resnet9", epochs=60, steps=21_000, batch_size=128, lr=0.1, holdout=0.1),
    "folder": Preset("Images in folders", "cnn32", epochs=30, steps=3_000, batch_size=64, lr=0.1, holdout=0.1),
}
NETWORKS = ("mlp", "cnn4", "cnn8", "cnn16", "cnn32", "resnet9")
FOLDER_SIZE = 64
"""Height and width that images in folders are brought to: all of them are kept in memory."""


# The data


class Images(Dataset):
    """Images as uint8 `[N, C, H, W]` and their labels, read a whole batch at a time.

    Stacking thousands of single images costs more than training a small network on them. With `__getitems__` a batch
    is one indexing operation, also through the `Subset` that a coreset is; the collate function has nothing left to do.
    """

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.targets[indices]


class OneByOne(Dataset):
    """The same images, read one by one as in most datasets, for the default collate function."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index]


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def load(name: str, root: Path | None) -> tuple[Images, Images]:
    """The pool, of which train and validation split are made, and the test set.

    Raises:
        SystemExit: If the data are not under `root` and can't be downloaded.
    """
    if name == "digits":
        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]  # 0 to 16
        targets = torch.from_numpy(digits.target).long()
        rest, test = proportional_holdout(targets, 0.25, seed=4000)
        return Images(images[rest], targets[rest]), Images(images[test], targets[test])
    if name == "folder":
        return _read_folder(root, "train"), _read_folder(root, "test")
    kind = {"fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    parts = []
    for train in (True, False):
        try:
            part = kind(root, train=train, download=True)  # downloads nothing if the files are there
        except (OSError, RuntimeError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            raise SystemExit(
                f"{PRESETS[name].title} is not in {root} and could not be downloaded ({reason}). Run this where there "
                "is a network, or copy torchvision's files there."
            ) from None
        images = torch.as_tensor(part.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        parts.append(Images(images, torch.as_tensor(part.targets)))
    return parts[0], parts[1]


def _read_folder(root: Path | None, part: str) -> Images:
    """All images under `root/part/<class>/`, brought to one size."""
    size = (FOLDER_SIZE, FOLDER_SIZE)
    resize = v2.Compose([v2.ToImage(), v2.RGB(), v2.Resize(size, antialias=True), v2.ToDtype(torch.uint8)])
    try:
        folder = datasets.ImageFolder(Path(root or ".") / part, transform=resize)
    except FileNotFoundError as error:
        raise SystemExit(f"{error}\nImages must lie under ROOT/train/CLASS/ and ROOT/test/CLASS/.") from None
    loader = DataLoader(folder, 64, num_workers=2)
    images = torch.cat([images for images, _ in tqdm(loader, desc=f"reading {part}", leave=False)])
    return Images(images, torch.tensor(folder.targets))


def flip_labels(targets: Tensor, rate: float, seed: int, kind: str = "symmetric") -> Tensor:
    """The labels with a share of them, drawn at random, each replaced by another class.

    Any other class if `kind` is "symmetric"; if it is "pair" always the next one, as when two classes are confused.
    """
    classes = int(targets.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(targets), generator=generator)[: round(rate * len(targets))]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    flipped = targets.clone()
    flipped[chosen] = (targets[chosen] + (shift if kind == "symmetric" else 1)) % classes
    return flipped


class Splits(L.LightningDataModule):
    """Train, validation and test set.

    The validation split is what CLD scores against. It is held out of the pool, never the test set: the accuracy of a
    coreset that was chosen by the test set would mean nothing.
    """

    def __init__(self, train: Images, val: Images, test: Images, batch_size: int) -> None:
        super().__init__()
        self.train, self.val, self.test, self.batch_size = train, val, test, batch_size

    def _loader(self, part: Images, size: int, shuffle: bool = False) -> DataLoader:
        return DataLoader(part, size, shuffle, collate_fn=as_it_is, pin_memory=torch.cuda.is_available())

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val, 1024)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test, 1024)


# The model


def conv(inputs: int, outputs: int, *, pool: bool) -> nn.Sequential:
    # Pooled first: what follows then has a quarter of the values to go through.
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), *([nn.MaxPool2d(2)] if pool else [])]
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Sequential):
    """Adds what goes in to what its layers make of it."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + super().forward(inputs)


def make_network(name: str, images: Tensor, classes: int) -> nn.Module:
    """One of `NETWORKS` for images like these."""
    channels, height, width = images.shape[1:]
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(channels * height * width, 128), nn.ReLU(), nn.Linear(128, classes)
        )
    if name == "resnet9":
        return nn.Sequential(  # a ResNet of nine layers
            *(conv(channels, 64, pool=False), conv(64, 128, pool=True)),
            Residual(conv(128, 128, pool=False), conv(128, 128, pool=False)),
            *(conv(128, 256, pool=True), conv(256, 256, pool=True)),
            Residual(conv(256, 256, pool=False), conv(256, 256, pool=False)),
            *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, classes)),
        )
    first = int(name.removeprefix("cnn"))
    layers = [
        conv(channels, first, pool=True),
        conv(first, 2 * first, pool=True),
        conv(2 * first, 4 * first, pool=True),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * first * (height // 8) * (width // 8), classes))


def augment(images: Tensor) -> Tensor:
    """Shifts each image by up to 4 pixels and mirrors half of them."""
    count, _, height, width = images.shape
    draw = {"device": images.device}
    rows = torch.randint(9, (count, 1), **draw) + torch.arange(height, **draw)
    columns = torch.randint(9, (count, 1), **draw) + torch.arange(width, **draw)
    columns = torch.where(torch.rand(count, 1, **draw) < 0.5, columns.flip(1), columns)
    every = torch.arange(count, **draw)[:, None, None]
    return F.pad(images, (4, 4, 4, 4))[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Classifier(L.LightningModule):
    """An ordinary classifier: there is nothing about CLD in it.

    It augments in `training_step`, not in the dataset, so that CLD's sweeps, which call `forward`, see plain images.
    """

    def __init__(self, name: str, train: Images, lr: float, *, seed: int, network: str | None = None) -> None:
        super().__init__()
        L.seed_everything(seed, verbose=False)  # of the initial weights, and of the order of batches that follows
        layers = make_network(network or PRESETS[name].network, train.images, int(train.targets.max()) + 1)
        self.network = layers.to(memory_format=torch.channels_last)  # convolutions are faster so
        self.augment = augment if name.startswith(("cifar", "folder")) else nn.Identity()
        self.lr = lr
        # Statistics of the pool's first images will do.
        std, mean = torch.std_mean(train.images[:10_000].float(), dim=(0, 2, 3), keepdim=True)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() - self.mean) / self.std)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        return F.cross_entropy(self(self.augment(images)), targets)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        right = (self(images).argmax(dim=1) == targets).float().mean()
        self.log("test_accuracy", right, batch_size=len(targets), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# The Trainer


class Ticks(L.Callback):
    """Moves a progress bar on by one after every epoch."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.update()


def quiet(*, single_thread: bool = False) -> None:
    """Leaves the screen to the example's own progress display.

    Args:
        single_thread: Compute in one thread. For a network as small as that for digits handing work to a second one
            costs more than it saves, many times so on a busy machine.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*validation_step.*", ".*LeafSpec.*", ".*treespec.*"):
        warnings.filterwarnings("ignore", message)
    if single_thread:
        torch.set_num_threads(1)


QUIET = {
    "accelerator": "auto",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""What makes a `Trainer` use one device, the GPU if there is one, and show and save nothing."""


def quiet_trainer(epochs: int | None, *callbacks: L.Callback, steps: int = -1) -> L.Trainer:
    """A Trainer on one device that shows and saves nothing."""
    return L.Trainer(max_epochs=-1 if epochs is None else epochs, max_steps=steps, callbacks=list(callbacks), **QUIET)

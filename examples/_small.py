"""What the small examples share: toy data that need no download, and the comparison that each of them ends with.

A program of your own needs neither: it has data, and trains on one coreset.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from _common import QUIET, quiet
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_cld import CoresetDataModule, LossTrajectories, baselines, proportional_holdout

Row = tuple[str, int, float]
"""What was trained on, the number of its samples, and the value measured on the test set."""


# The data


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's handwritten digits, a quarter of them set aside as the test set.

    Returns:
        Images `[N, 8, 8]` with values from 0 to 1 and labels `[N]`: those not set aside, then those of the test set.
    """
    data = load_digits()
    images, labels = torch.from_numpy(data.images / 16).float(), torch.from_numpy(data.target)
    pool, test = proportional_holdout(labels, 0.25, seed=1000 + seed)
    return (images[pool], labels[pool]), (images[test], labels[test])


def pairs_of_digits(seed: int) -> list[TensorDataset]:
    """Images of two digits side by side: train, validation and test set, which share no image of a single digit.

    A sample is an image `[8, 16]`, which of the ten digits are in it `[10]`, and which of them is the left one.
    """
    data = load_digits()
    images, labels = torch.from_numpy(data.images / 16).float(), torch.from_numpy(data.target)
    generator = torch.Generator().manual_seed(seed)
    sets = []
    parts = torch.randperm(len(labels), generator=generator).split([1000, 200, 597])
    for part, count in zip(parts, (1200, 300, 1000), strict=True):
        left, right = part[torch.randint(len(part), (2, count), generator=generator)]
        present = F.one_hot(labels[left], 10) | F.one_hot(labels[right], 10)
        sets.append(TensorDataset(torch.cat([images[left], images[right]], dim=2), present, labels[left]))
    return sets


def write_digits(root: Path) -> None:
    """Writes a thousand digits as PNG files to `root/train/<class>/`, every fourth to `root/test/<class>/`."""
    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images[:1000], data.target[:1000], strict=True)):
        folder = root / ("test" if number % 4 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).resize((16, 16)).save(folder / f"{number:04}.png")


def docstrings(packages: Sequence[str], vocabulary: int) -> list[tuple[Tensor, int]]:
    """The first lines of docstrings in installed packages.

    Returns:
        For each line its words as numbers below `vocabulary`, and which of the packages it is from.
    """
    lines: dict[str, int] = {}  # a line that several packages have is kept once
    for label, package in enumerate(packages):
        (folder,) = importlib.util.find_spec(package).submodule_search_locations
        for file in sorted(Path(folder).rglob("*.py")):
            for line in re.findall(r'"""(\w.+)', file.read_text(encoding="utf-8")):
                if len(line.split()) >= 4:
                    lines.setdefault(line, label)
    samples = []
    for line, label in lines.items():
        words = re.findall(r"\w+", line.lower())
        samples.append((torch.tensor([zlib.crc32(word.encode()) % vocabulary for word in words]), label))
    return samples


# The comparison


def set_up(argv: Sequence[str] | None, *, epochs: int, seeds: int = 3) -> argparse.Namespace:
    """Reads the command line, whose defaults suit the example's data, and keeps Lightning quiet."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs, help="epochs of every training")
    parser.add_argument("--seeds", type=int, default=seeds, help="how many seeds to repeat it all with")
    parser.add_argument("--fraction", type=float, default=0.2, help="share of the train set to keep")
    quiet(single_thread=True)
    return parser.parse_args(argv)


def random_coreset(
    data: L.LightningDataModule, trajectories: LossTrajectories, fraction: float, seed: int
) -> CoresetDataModule:
    """A random coreset with as many samples of each class as one chosen by CLD: the baseline to beat."""
    values = trajectories.score(by=partial(baselines.random_values, seed=seed))
    return CoresetDataModule(data, values, fraction=fraction, epoch_length="full")


def train_and_test(
    make_model: Callable[[], L.LightningModule], choices: Mapping[str, L.LightningDataModule], epochs: int, seed: int
) -> list[Row]:
    """Trains a new model on each of the choices.

    Args:
        make_model: Makes the model; it logs one value in `test_step`.
        choices: What to train on, by the name that the table gives it.
        epochs: Epochs of every training.
        seed: The proxy's seed.
    """
    rows = []
    for name, data in choices.items():
        # Not the proxy's seed: a coreset should serve other initial weights than those it was chosen with.
        L.seed_everything(100 + seed, verbose=False)
        model, trainer = make_model(), L.Trainer(max_epochs=epochs, **QUIET)
        trainer.fit(model, datamodule=data)
        samples = len(trainer.train_dataloader.dataset)
        (measured,) = trainer.test(model, datamodule=data, verbose=False)
        (value,) = measured.values()
        rows.append((name, samples, value))
    return rows


def print_table(metric: str, rows: Sequence[Row], *, percent: bool = False) -> None:
    """Prints mean and standard deviation over the seeds.

    Args:
        metric: What was measured.
        rows: One for each choice and seed.
        percent: Whether the values are shares, to be printed in percent.
    """
    print(f"{'trained on':<20} {'samples':>8}   {metric}{' (%)' if percent else ''}")
    for name, samples in dict.fromkeys((name, samples) for name, samples, _ in rows):
        values = [100 * value if percent else value for row, _, value in rows if row == name]
        around = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{name:<20} {samples:>8,}   {statistics.fmean(values):.2f}{around}")

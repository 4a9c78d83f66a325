import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import TensorDataset
from toys import Blobs, Classifier

README = Path(__file__).parent.parent / "README.md"


class SmallCifar(torchvision.datasets.FakeData):
    def __init__(self, root, transform, download=False):
        super().__init__(60, (3, 32, 32), 10, transform)
        self.targets = [int(torch.randint(10, (), generator=torch.Generator().manual_seed(i))) for i in range(60)]


def test_the_commands_are_there():
    text = README.read_text()
    assert 'pip install -e ".[examples]" && python examples/quickstart.py' in text
    assert 'pip install -e ".[test]" && pytest' in text


@pytest.mark.filterwarnings("ignore")
def test_the_snippets_work_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", SmallCifar)
    data = Blobs()
    generator = np.random.default_rng(0)
    L.seed_everything(7, verbose=False)
    names = {
        "proxy": Classifier(lr=0.001),
        "target": Classifier(lr=0.001),
        "cifar": data,
        "network": torch.nn.Linear(4, 3),
        "train_set": data.train_set,
        "val_set": data.val_set,
        "train_losses": generator.random((5, 20)),
        "val_losses": generator.random((5, 6)),
        "train_classes": np.arange(20) % 2,
        "val_classes": np.arange(6) % 2,
        "images": TensorDataset(
            torch.rand(len(data.train_set), 3, 8, 8), data.train_set.dataset.tensors[1][data.train_set.indices]
        ),
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    for block in blocks:
        exec(block, names)  # that readers can run them is the test
    assert Path("report.html").exists()
    assert len(names["small_set"]) == 9
    assert len(names["coreset"].indices) == len(names["baseline"].indices) == 9

    cifar = names["Cifar"]()
    cifar.setup("fit")
    assert len(cifar.plain_train_set) == len(cifar.train_set)
    for loader in (cifar.train_dataloader(), cifar.cld_train_dataloader(), cifar.val_dataloader()):
        assert next(iter(loader))[0].shape[1:] == (3, 32, 32)
    style = names["HuggingFaceStyle"]()
    style.forward = lambda pixels: pixels.flatten(1)[:, :5]
    losses, classes = style.cld_step({"pixel_values": torch.rand(2, 3, 4, 4), "labels": torch.tensor([4, 1])})
    assert (losses.shape, classes.tolist()) == ((2,), [4, 1])

"""README.md and the guides: their snippets run, their commands and links lead somewhere, and an index can show them."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import Blobs, Classifier, fit

from lightning_cld import CLDCallback

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
RESULTS = ROOT / "examples" / "benchmarks" / "RESULTS.md"
MEASURED = sorted((RESULTS.parent / "results").glob("*.md"))
PAGES = [README, *GUIDES]


def of_page(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


# Snippets


class SmallCifar(torchvision.datasets.FakeData):
    def __init__(self, root, transform, download=False):
        super().__init__(60, (3, 32, 32), 10, transform)
        self.targets = [int(torch.randint(10, (), generator=torch.Generator().manual_seed(i))) for i in range(60)]


@pytest.fixture(scope="module")
def proxy_run(tmp_path_factory):
    """The files that the README's first step leaves."""
    folder = tmp_path_factory.mktemp("proxy")
    fit(folder, CLDCallback(dirpath=folder), Classifier(lr=0.001), max_epochs=12)
    return folder


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, Any]:
    """What a reader has: models, data, and losses of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", SmallCifar)
    data = Blobs()
    generator = np.random.default_rng(0)
    L.seed_everything(7, verbose=False)
    return {
        "proxy": Classifier(lr=0.001),
        "target": Classifier(lr=0.001),
        "make_target": Classifier,
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


def check_readme(names: dict[str, Any]) -> None:
    assert len(names["small_set"]) == len(names["coreset"].indices) == 9
    assert names["scores"].epochs == list(range(0, 31, 2))
    assert Path("report.html").exists()
    assert names["suspects"].tolist() == names["scores"].suspects().tolist()


def check_your_data(names: dict[str, Any]) -> None:
    cifar = names["Cifar"]()
    cifar.setup("fit")
    assert len(cifar.plain_train_set) == len(cifar.train_set)
    for loader in (cifar.train_dataloader(), cifar.cld_train_dataloader(), cifar.val_dataloader()):
        assert next(iter(loader))[0].shape[1:] == (3, 32, 32)


def check_other_tasks(names: dict[str, Any]) -> None:
    style = names["HuggingFaceStyle"]()
    style.forward = lambda pixels: pixels.flatten(1)[:, :5]
    losses, classes = style.cld_step({"pixel_values": torch.rand(2, 3, 4, 4), "labels": torch.tensor([4, 1])})
    assert (losses.shape, classes.tolist()) == ((2,), [4, 1])
    samples = [{"pixel_values": point, "labels": label} for point, label in Blobs().train_set]
    loader = DataLoader(samples, 9)
    L.Trainer(max_epochs=3, callbacks=[names["library_cld"]], logger=False).fit(Library(), loader, loader)
    assert names["library_cld"].scores.classes.tolist() == [int(sample["labels"]) for sample in samples]
    numbers = DataLoader(TensorDataset(torch.rand(20, 4), torch.rand(20, 3)), 5)
    L.Trainer(max_epochs=3, callbacks=[names["cld"]], logger=False).fit(LinearRegression(), numbers, numbers)
    assert names["cld"].scores.num_classes == 1
    torch.testing.assert_close(names["values"], names["scores"].values, atol=1e-5, rtol=0)


class Named(IterableDataset):
    """The samples of `Blobs` as a stream of dictionaries with ids."""

    def __iter__(self):
        for place, (point, label) in enumerate(Blobs().train_set):
            yield {"image": point, "label": label, "id": f"sample {place}"}


def check_streams(names: dict[str, Any]) -> None:
    step = names["Streamed"].cld_step
    steps = {"training_step": lambda self, batch, _: step(self, batch)[0].mean(), "validation_step": lambda *_: None}
    module = type("Told", (Classifier,), {"cld_step": step, **steps})
    streams = L.LightningDataModule()
    streams.train_dataloader = streams.val_dataloader = lambda: DataLoader(Named(), 8)
    L.Trainer(max_epochs=3, callbacks=[names["cld"]], logger=False).fit(module(), datamodule=streams)
    coreset = names["target_data"](streams)
    assert [key for batch in coreset.train_dataloader() for key in batch["id"]] == sorted(
        names["cld"].scores.names[coreset.indices], key=lambda name: int(name.split()[1])
    )
    assert names["scores"].names[names["scores"].suspects()] == ["shard-0/dog"]


class Library(Classifier):
    """A module of somebody else's, for batches that are dictionaries."""

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch["pixel_values"]), batch["labels"])

    validation_step = training_step


class LinearRegression(Classifier):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    validation_step = training_step


def check_costs(names: dict[str, Any]) -> None:
    assert names["cld"].scores.epochs == list(range(46))
    assert len(names["small_set"]) == len(names["coreset"].indices) == 9


def check_comparing(names: dict[str, Any]) -> None:
    assert [(name, seed) for name, seed, _ in names["results"]] == [
        (name, seed)
        for seed in range(3)
        for name in ("random", "random, anew each epoch", "CLD", "CLD, drawn", "CLD, drawn, anew each epoch")
    ]
    assert {len(data.indices) for data in names["choices"].values()} == {len(names["coreset"].indices)} == {9}


def check_tuning(names: dict[str, Any]) -> None:
    assert len(names["small"].indices) == len(names["tenth"]) == 9
    validate, cifar = names["validate"], names["cifar"]
    assert names["best_three"] == sorted(names["configurations"], key=lambda each: validate(each, cifar, 3))[:3]
    losses = [validate(each, cifar, 30) for each in names["best_three"]]
    assert names["best"] == names["best_three"][int(np.argmin(losses))]
    assert names["best_on_tenth"] in names["configurations"]


def check_looking(names: dict[str, Any]) -> None:
    assert Path("report.html").exists()
    assert len(Path("scores.csv").read_text().splitlines()) == 1 + len(names["scores"])
    assert Path("scores.png").exists()


def check_distributed_and_resuming(names: dict[str, Any]) -> None:
    assert names["cld"].scores.epochs == list(range(46))
    assert torch.load("runs/long/last.ckpt", weights_only=True)["epoch"] == 44


def check_saved_checkpoints(names: dict[str, Any]) -> None:
    assert names["scores"].epochs == list(range(10))


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "README": check_readme,
    "your_data": check_your_data,
    "other_tasks": check_other_tasks,
    "streams": check_streams,
    "costs": check_costs,
    "comparing": check_comparing,
    "tuning": check_tuning,
    "looking": check_looking,
    "distributed_and_resuming": check_distributed_and_resuming,
    "saved_checkpoints": check_saved_checkpoints,
}


def test_every_page_with_snippets_is_checked():
    assert {page.stem for page in PAGES if "```py" in read(page)} == set(CHECKS)


@pytest.mark.filterwarnings("ignore")
@of_page([page for page in PAGES if page.stem in CHECKS])
def test_the_snippets_of_a_page_work_one_after_the_other(page, names, proxy_run):
    if page != README:
        shutil.copytree(proxy_run, "runs/proxy")
    for snippet in snippets(page):
        exec(snippet, names)  # that readers can run them is the test
    CHECKS[page.stem](names)


# Commands


def test_the_two_commands_are_there():
    for command in (
        'pip install -e ".[examples]" && python examples/quickstart.py',
        'pip install -e ".[test]" && pytest',
    ):
        assert f"```bash\n{command}\n```\n" in read(README)


@of_page(PAGES)
def test_commands_name_scripts_files_and_options_that_there_are(page):
    text = read(page).replace("examples/NAME.py", "examples/cli.py")
    for command in re.findall(r"\bpython (examples/[^`\n]+)", text):
        script, *arguments = shlex.split(command)
        source = read(ROOT / script) + read(ROOT / "examples" / "benchmarks" / "_runs.py")
        for argument in arguments:
            if argument.startswith("examples/"):
                assert (ROOT / argument).exists(), command
            elif argument.startswith("--") and script != "examples/cli.py":  # whose options are LightningCLI's
                assert f'"{argument}"' in source, command


# Links


_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def code_blocks(text: str) -> list[str]:
    return _CODE.findall(text)


def without_code(text: str) -> str:
    return _CODE.sub("", text)


def targets(text: str) -> list[str]:
    """Where links and pictures lead, but for web addresses."""
    ways = r'\]\(([^)]*)\)|\b(?:src|href)="([^"]*)"|^\[[^\]]+\]: *(\S+)'
    found = re.findall(ways, without_code(text), re.MULTILINE)
    return [target for target in map("".join, found) if not re.match(r"https?://", target)]


def sections(text: str) -> dict[str, str]:
    """By its anchor, the text below each heading, down to the next."""
    _, *parts = re.split(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in parts[::2]]
    return dict(zip(anchors, parts[1::2], strict=True))


@of_page([*PAGES, RESULTS, *MEASURED])
def test_links_lead_to_files_and_sections_that_there_are(page):
    assert page in GUIDES or targets(read(page))
    for target in targets(read(page)):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in sections(read(file)), target


def test_the_readme_leads_to_every_guide():
    assert {f"examples/guides/{guide.name}" for guide in GUIDES} <= set(targets(read(README)))


def test_the_results_lead_to_every_page_of_them():
    assert {f"results/{page.name}" for page in MEASURED} <= set(targets(read(RESULTS)))


@pytest.fixture
def for_indexes(monkeypatch):
    """The function that makes of the README what an index shows; without hatchling, which only builds have."""
    interface = SimpleNamespace(MetadataHookInterface=object)
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    return runpy.run_path(str(ROOT / ".ci" / "long_description.py"))["for_indexes"]


def test_on_an_index_nothing_leads_nowhere(for_indexes):
    shown = for_indexes(read(README))
    assert targets(shown) == []
    for target in targets(read(README)):
        assert f"(`{target}`)" in shown
    assert re.findall(r"\]\((https?://[^)]*)\)", shown) == re.findall(r"\]\((https?://[^)]*)\)", read(README))


def test_on_an_index_all_else_is_as_in_the_readme(for_indexes):
    assert code_blocks(for_indexes(read(README))) == code_blocks(read(README)) != []
    given = "![a](b.png) [c](d.md) [e](https://f.org)"
    assert for_indexes(given) == "*Picture (`b.png`): a* c (`d.md`) [e](https://f.org)"


# What is said


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 250


def test_the_summary_of_the_results_has_the_figures_of_its_sections():
    rows = re.findall(r"^\|.*\| (.+) \| \[.+\]\((.+)#(.+)\) \|$", sections(read(RESULTS))["summary"], re.MULTILINE)
    assert len(rows) >= 10
    for figures, page, anchor in rows:
        numbers = re.findall(r"\d+\.\d+", figures)
        assert numbers, figures
        section = sections(read(RESULTS.parent / page))[anchor]
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", section), (number, anchor)

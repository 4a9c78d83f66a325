from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from lightning_cld import CLDScores, IndexedDataset, LossTrajectories, baselines
from lightning_cld.data.identity import offered_by
from lightning_cld.scores import OUTSIDE

NAN = float("nan")
HEADER = ["position", "class", "score", "suspect"]
VALUES, CLASSES = [0.9, -0.25, NAN, 0.0, -0.7, 0.9, -0.1], [0, 0, 3, 3, OUTSIDE, 3, 0]


class Files(Dataset):
    """Lists its files, as torchvision's folder datasets do."""

    def __init__(self, names, labels=None):
        self.samples = [(name, 0) for name in names]
        self.targets = [0] * len(names) if labels is None else labels

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, position):
        return torch.zeros(1), self.targets[position]


def table(scores, path, dataset=None):
    """The header and the rows, read as the csv module says they should be."""
    assert scores.to_csv(path, dataset) == Path(path)
    with Path(path).open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    return header, rows


def scored(dataset, values):
    """Scores of this dataset."""
    fingerprint = offered_by(dataset)
    return CLDScores(values, dataset_classes(dataset), fingerprint=fingerprint)


def dataset_classes(dataset):
    return [int(dataset[position][1]) for position in range(len(dataset))]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.csv"


def test_the_lowest_score_is_first_and_the_unscored_are_last(path):
    header, rows = table(CLDScores(VALUES, CLASSES), path)
    assert header == HEADER
    assert rows == [
        ["1", "0", "-0.25", "true"],
        ["6", "0", "-0.1", "true"],
        ["3", "3", "0.0", "true"],
        ["0", "0", "0.9", "false"],
        ["5", "3", "0.9", "false"],  # of equal scores the lower position
        ["2", "3", "", ""],
    ]


def test_suspects_are_those_that_the_scores_list(path):
    scores = CLDScores(torch.randn(200, generator=torch.Generator().manual_seed(0)).tanh())
    _, rows = table(scores, path)
    assert [int(row[0]) for row in rows if row[3] == "true"] == scores.suspects().tolist()
    assert {row[3] for row in rows} == {"true", "false"}


def test_suspects_come_first_in_their_order(path):
    scores = CLDScores([0.9, -0.5, 0.8, 0.7], plausibility=[0.0, 1.0, 0.0, 1.0], confidence=[0.2, 0.9, 0.1, 0.9])
    _, rows = table(scores, path)
    assert [(int(row[0]), row[3]) for row in rows] == [(2, "true"), (0, "true"), (1, "false"), (3, "false")]


def test_a_single_class_is_left_empty(path):
    assert table(CLDScores([0.5, -0.5]), path)[1] == [["1", "", "-0.5", "true"], ["0", "", "0.5", "false"]]


def test_scores_keep_every_bit(path):
    values = np.random.default_rng(0).uniform(-1, 1, 500).astype(np.float32)
    values[:3] = 1e-7, np.float32(1) / 3, -1
    _, rows = table(CLDScores(values), path)
    assert {int(row[0]): np.float32(row[2]) for row in rows} == dict(enumerate(values))
    assert max(len(row[2]) for row in rows) <= 14


def test_values_that_are_not_cld_tell_of_no_suspects(path):
    generator = np.random.default_rng(1)
    losses = LossTrajectories(generator.random((6, 9)), generator.random((6, 4)))
    _, rows = table(losses.score(by=baselines.highest_mean_loss), path)
    assert {row[3] for row in rows} == {""}
    assert all(float(row[2]) > 0 for row in rows)
    assert {row[3] for row in table(losses.score(), path)[1]} <= {"true", "false"}


# Names

HOSTILE_NAMES = ["", "with, comma", 'with "quotes"', "new\nline", "Zürich 図", "caf\udce9"]


def test_names_stand_behind_the_positions(path):
    scores = CLDScores([0.6, 0.5, NAN, -0.4, 0.3, 0.2], [0, 0, 0, 0, OUTSIDE, 0], names=HOSTILE_NAMES)
    header, rows = table(scores, path)
    assert header == ["position", "name", "class", "score", "suspect"]
    written = [*HOSTILE_NAMES[:5], "caf\\udce9"]
    assert [row[:2] for row in rows] == [[str(position), written[position]] for position in (3, 5, 1, 0, 2)]


# File names

HOSTILE = [
    "plain.png",
    "with, comma.png",
    'with "quotes".png',
    "'single'.png",
    "new\nline.png",
    "carriage\rreturn.png",
    "both\r\n.png",
    "tab\t.png",
    " space .png",
    "Zürich 図.png",
    "semi;colon.png",
    "back\\slash.png",
]


@pytest.mark.parametrize("kind", [str, Path, lambda name: name.encode()], ids=["str", "Path", "bytes"])
def test_names_of_any_kind_come_back(path, kind):
    names = [f"/data/{name}" for name in HOSTILE]
    dataset = Files([kind(name) for name in names])
    header, rows = table(scored(dataset, torch.linspace(-1, 1, len(names))), path, dataset)
    assert header == [*HEADER, "file"]
    assert [row[4] for row in rows] == names


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (b"/data/caf\xe9.png", "/data/caf\\udce9.png"),  # as Linux allows
        ("/data/caf\udce9.png", "/data/caf\\udce9.png"),
        ("/data/\ud83d.png", "/data/\\ud83d.png"),  # as Windows allows
    ],
    ids=str,
)
def test_what_utf_8_can_not_write_in_a_name_is_escaped(path, name, written):
    dataset = Files([name, b"/data/b.png" if isinstance(name, bytes) else "/data/b.png"])
    _, rows = table(scored(dataset, [0.1, 0.2]), path, dataset)
    assert [row[4] for row in rows] == [written, "/data/b.png"]


def test_the_files_of_an_image_folder_can_be_opened(tmp_path, path):
    for place, name in enumerate(("cat/b, c.png", "cat/a.png", "dog/ü.png", 'dog/".png')):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (40 * place, 0, 0)).save(file)
    folder = ImageFolder(tmp_path / "images")
    _, rows = table(scored(folder, [0.4, 0.3, 0.2, 0.1]), path, folder)
    assert [int(row[0]) for row in rows] == [3, 2, 1, 0]
    for row in rows:
        assert np.array_equal(np.asarray(Image.open(row[4])), np.asarray(folder[int(row[0])][0]))


def test_names_are_looked_up_through_the_datasets_around_them(path):
    first, second = Files(["/data/a/0.png", "/data/a/1.png", "/data/b/2.png"]), Files(["/other/3.png", "/other/4.png"])
    dataset = IndexedDataset(ConcatDataset([Subset(first, [2, 0]), second]))
    scores = CLDScores([0.4, 0.3, 0.2, 0.1], [0] * 4, fingerprint=offered_by(dataset))
    _, rows = table(scores, path, dataset)
    assert [row[4] for row in rows] == ["/other/4.png", "/other/3.png", "/data/a/0.png", "/data/b/2.png"]


@pytest.mark.parametrize("samples", [[], [(0, 1), (2, 3)], [None, None], ["a.png"], "ab", None], ids=str)
def test_a_dataset_that_knows_no_names_adds_no_column(path, samples):
    dataset = Files(["a", "b"])
    dataset.__class__ = type("Other", (TensorDataset,), {})
    dataset.tensors, dataset.samples = (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)), samples
    assert table(scored(dataset, [0.1, 0.2]), path, dataset)[0] == HEADER


def test_names_go_with_the_positions_in_use_alone(path):
    dataset = Files([f"/data/{position}.png" for position in range(7)], [0, 0, 3, 3, 1, 3, 0])
    scores = CLDScores(VALUES, CLASSES, fingerprint=offered_by(dataset))
    _, rows = table(scores, path, dataset)
    assert [(row[0], row[4]) for row in rows] == [(str(p), f"/data/{p}.png") for p in (1, 6, 3, 0, 5, 2)]


def test_pandas_reads_the_table(path):
    pandas = pytest.importorskip("pandas")
    names = [f"/data/{name}" for name in HOSTILE]
    dataset = Files(names)
    scored(dataset, [*np.linspace(-0.5, 0.5, len(names) - 1), NAN]).to_csv(path, dataset)
    frame = pandas.read_csv(path).set_index("position").sort_index()
    assert frame["file"].tolist() == names
    assert frame["score"].isna().tolist() == [False] * 11 + [True]
    assert frame["suspect"].tolist()[:-1] == [True] * 6 + [False] * 5


# What is refused, and how it is written


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Files(["/d/a", "/d/c"]), ValueError, "don't belong to this dataset: it has files of other names"),
        (Files(["/d/b", "/d/a"]), ValueError, "it has files of other names, or the same in another order"),
        (Files(["/d/a", "/d/b"], [0, 1]), ValueError, "it has other labels"),
        (Files(["/d/a", "/d/b", "/d/c"]), ValueError, "it has 3 samples, not 2"),
        (iter([1]), TypeError, "must be a map-style dataset"),
    ],
    ids=["names", "order", "labels", "length", "kind"],
)
def test_another_dataset_is_refused_and_the_old_table_stays(path, dataset, error, message):
    scores = scored(Files(["/d/a", "/d/b"]), [0.1, 0.2])
    path.write_text("old")
    with pytest.raises(error, match=message):
        scores.to_csv(path, dataset)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(
        IsADirectoryError, match=r"is a directory\. Give the name of a file in it, such as .*scores\.csv"
    ):
        CLDScores([0.1]).to_csv(tmp_path)


def test_a_write_that_fails_leaves_the_old_table(path, monkeypatch):
    CLDScores([0.1]).to_csv(path)
    old = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        CLDScores([0.2]).to_csv(path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_missing_directories_are_made_and_a_path_may_be_a_string(tmp_path):
    written = CLDScores([0.5]).to_csv(str(tmp_path / "a" / "b" / "scores.csv"))
    assert written.read_bytes() == b"position,class,score,suspect\r\n0,,0.5,false\r\n"

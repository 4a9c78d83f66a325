from __future__ import annotations

import io
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from lightning_cld import CLDScores, LossTrajectories, SampleNames, baselines
from lightning_cld.showing import page as page_module
from lightning_cld.showing.choice import by_mean_score, extremes

NAN = float("nan")
EVIL = '<script>alert("1")</script> & <img src="http://example.org/x.png">'
VOID = {"img", "meta", "br", "link", "input", "hr"}


def timeline(classes, rows=9):
    generator = np.random.default_rng(3)
    falling = 2.0 * np.exp(-np.arange(rows) / 4.0)[:, None]
    train, val = ((falling + generator.random((rows, len(part)))).astype(np.float32) for part in (classes, classes))
    return LossTrajectories(train, val, classes, classes, metadata={"model": EVIL, EVIL: 7})


CLASSES = torch.arange(90) % 3
TIMELINE = timeline(CLASSES)
IMAGES = TensorDataset(torch.rand(90, 1, 8, 8), CLASSES)


class Page(HTMLParser):
    """Collects the elements of a page and checks that they are closed in the right order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def pictures(page):
    """The embedded images with their alternative texts."""
    found = []
    for attributes in page.all("img"):
        kind, _, content = attributes["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert attributes["alt"]
        found.append((attributes["alt"], np.asarray(Image.open(io.BytesIO(b64decode(content, validate=True))))))
    return found


def write(scores, path, *arguments):
    assert scores.report(path, *arguments) == path
    return Page(path.read_text(encoding="utf-8"))


def doubted():
    """Scores of the timeline, of which every third label is in doubt."""
    scores = TIMELINE.score()
    scores.plausibility[::3] = 0.5
    return scores


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A page with every section."""
    path = tmp_path_factory.mktemp("report") / "page.html"
    write(doubted(), path, IMAGES, TIMELINE)
    return path


def test_a_page_holds_all_it_shows(full):
    text = full.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert {"content": "width=device-width, initial-scale=1", "name": "viewport"} in page.all("meta")
    assert not page.all("script") + page.all("link") + page.all("iframe") + page.all("a")
    assert not [value for _, attributes in page.found for value in attributes.values() if value and "://" in value]
    assert not re.findall(r"url\(|@import", text)
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.all("img"))


def test_a_page_has_the_summary_the_figures_and_the_images(full):
    page = Page(full.read_text(encoding="utf-8"))
    scores = doubted()
    for name, told in scores.account():
        assert name in page.words
        assert told in page.text
    found = pictures(page)
    assert sum(alt.startswith("Histogram of the scores of class") for alt, _ in found) == 3
    assert sum(alt.startswith("How far the scores at an earlier cutoff agree") for alt, _ in found) == 1
    assert sum(alt.startswith("Loss, class") for alt, _ in found) == 3
    suspects = min(24, len(scores.suspects()))
    thumbnails = [(alt, picture) for alt, picture in found if alt.startswith("sample ")]
    assert len(thumbnails) == suspects + 3 * 6 + 3 * (6 + 12)
    assert {picture.shape for _, picture in thumbnails} == {(8, 8, 3)}
    assert all(picture.std() > 0 for _, picture in found)


def test_the_images_are_those_of_the_samples_they_name(tmp_path):
    marked = TensorDataset((torch.arange(90.0)[:, None, None, None]).expand(90, 1, 4, 4), CLASSES)
    scores = doubted()
    page = write(scores, tmp_path / "page.html", marked)
    assert len(scores.suspects()) == 15
    suspects = [(alt, picture[0, 0, 0]) for alt, picture in pictures(page) if ", class " in alt]
    named = [re.fullmatch(r"sample (\d+), score ([+-][\d.]+), class (\d)", alt) for alt, _ in suspects]
    positions = [int(match[1]) for match in named]
    assert positions == scores.suspects()[:24].tolist()
    assert [match[2] for match in named] == [f"{scores.values[position]:+.2f}" for position in positions]
    assert [int(match[3]) for match in named] == CLASSES[positions].tolist()
    assert np.argsort([value for _, value in suspects]).tolist() == np.argsort(positions).tolist()


def test_what_comes_from_data_is_text(full):
    text = full.read_text(encoding="utf-8")
    page = Page(text)
    assert page.words.count(EVIL) == 2  # a name and a value of the provenance
    assert "<script" not in text


def test_the_table_of_classes_tells_of_each(full):
    text = full.read_text(encoding="utf-8")
    (table,) = re.findall(r'<table class="numbers">(.*?)</table>', text, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
    names = [
        "class",
        "samples",
        "mean",
        "best tenth",
        "reliability",
        "validation",
        "look wrong",
        "negative",
        "unscored",
    ]
    assert rows[0] == names
    scores = TIMELINE.score()
    for label, row in enumerate(rows[1:]):
        values = scores.values[label == CLASSES].double().numpy()
        best = np.sort(values)[-3:]
        reliability = scores.metadata["reference_reliability"][str(label)]
        assert row == [
            str(label),
            "30",
            f"{values.mean():+.3f}",
            f"{best.mean():+.3f}",
            f"{reliability:.3f}",
            "30",
            "{:.0%} ({:.0%} to {:.0%})".format(*scores.metadata["implausible"]["classes"][str(label)]),
            str((values < 0).sum()),
            "0",
        ]


def test_the_images_of_a_figure_of_trajectories_are_two_rows_with_their_names(full):
    text = full.read_text(encoding="utf-8")
    rows = re.findall(r'<div class="pair"><b class="(\w+)">(\w+)</b>(.*?)</div>', text)
    assert [row[:2] for row in rows] == [("best", "highest"), ("worst", "lowest")] * 3
    scores = TIMELINE.score()
    shown = [[int(position) for position in re.findall(r'alt="sample (\d+),', images)] for *_, images in rows]
    expected = [part.tolist() for label in by_mean_score(scores) for part in extremes(scores, label, 3)]
    assert shown == expected


def test_versions_are_told_in_words(full):
    page = Page(full.read_text(encoding="utf-8"))
    versions = TIMELINE.score().metadata["versions"]
    assert ", ".join(f"{name} {version}" for name, version in versions.items()) in page.words


def test_only_what_is_said_of_trust_is_bold(tmp_path, full):
    other = tmp_path / "page.html"
    write(TIMELINE.score(by=baselines.variability), other)
    bold = [bool(re.search('<table class="trusted">', path.read_text(encoding="utf-8"))) for path in (full, other)]
    assert bold == [True, False]


def test_without_dataset_and_trajectories_there_is_a_table_of_suspects(tmp_path):
    scores = doubted()
    page = write(scores, tmp_path / "new" / "page.html")
    assert "Trajectories" not in page.words
    assert "Highest and lowest" not in page.words
    assert [alt.split(",")[0] for alt, _ in pictures(page)] == [
        f"Histogram of the scores of class {c}" for c in range(3)
    ]
    for position in scores.suspects()[:24].tolist():
        assert f"{scores.values[position]:+.3f}" in page.words


NAMES = [f"imagenet-train-00017/{position}-$x$\udce9-{EVIL}" for position in range(90)]
WRITTEN = [name.replace("\udce9", r"\udce9") for name in NAMES]


def test_samples_are_called_by_their_names(tmp_path):
    scores = doubted()
    scores.names = SampleNames(NAMES)
    page = write(scores, tmp_path / "page.html")
    suspects = scores.suspects().tolist()
    assert len(suspects) == 15
    headings = page.words.index("position")
    assert [word for word in page.words[headings:] if word.strip()][:4] == ["position", "name", "class", "score"]
    for position in suspects:
        assert WRITTEN[position] in page.words
    page = write(scores, tmp_path / "page.html", IMAGES, TIMELINE)
    shown = [(int(alt.split(",")[0].removeprefix("sample ")), alt) for alt, _ in pictures(page) if "sample " in alt]
    assert len(shown) == 15 + 3 * 6 + 3 * (6 + 12)
    for position, alt in shown:
        assert alt.startswith(f"sample {position}, {WRITTEN[position]}, score ")


def test_scores_and_losses_of_other_names_are_refused(tmp_path):
    scores = TIMELINE.score()
    scores.names = SampleNames(map(str, range(90)))
    other = timeline(CLASSES)
    other.names = SampleNames(map(str, range(90)[::-1]))
    write(scores, tmp_path / "page.html", None, TIMELINE)  # losses without names may be of the same run
    with pytest.raises(ValueError, match="don't belong to these trajectories: their names differ"):
        scores.report(tmp_path / "page.html", trajectories=other)


def test_of_many_classes_ten_are_shown_and_all_are_in_the_table(tmp_path):
    classes = torch.arange(360) // 3
    page = write(timeline(classes).score(), tmp_path / "page.html")
    assert "The 10 classes with the lowest mean scores, of 120 classes." in page.words
    assert len(page.all("img")) == 10
    assert "120 classes" in page.words
    assert len(page.all("details")) == 1


@pytest.mark.parametrize(
    "scores",
    [
        CLDScores([NAN] * 9),
        CLDScores([0.3, NAN, 0.2]),
        CLDScores([0.1, -0.2, NAN, NAN], [0, 0, 5, 5]),
        CLDScores([0.1, -0.2, 0.3, 0.4], [0, -1, 5, 5], metadata={"reference_reliability": None}),
        TIMELINE.score(by=baselines.variability),
    ],
    ids=["unscored", "few", "unscored class", "outside", "other scores"],
)
def test_scores_of_every_kind_get_a_page(tmp_path, scores):
    assert pictures(write(scores, tmp_path / "page.html"))


def test_other_scores_get_no_suspects_and_no_agreement(tmp_path):
    scores = TIMELINE.score(by=baselines.variability)
    page = write(scores, tmp_path / "page.html", IMAGES, TIMELINE)
    assert "Suspects are listed for CLD scores only." in page.words
    assert "When the proxy could have stopped" not in page.words
    assert "Trajectories" in page.words


def test_a_run_that_diverged_after_the_cutoff_gets_its_page(tmp_path):
    val = TIMELINE.val_losses.clone()
    val[-1] = float("inf")
    diverged = LossTrajectories(TIMELINE.train_losses, val, CLASSES, CLASSES)
    page = write(diverged.score(cutoff_epoch=7), tmp_path / "page.html", IMAGES, diverged)
    assert "When the proxy could have stopped" in page.words


def from_steps():
    return LossTrajectories(TIMELINE.train_losses, TIMELINE.val_losses, CLASSES, CLASSES, from_steps=True)


def unscored():
    train = TIMELINE.train_losses.clone()
    train[:, CLASSES == 1] = NAN
    return LossTrajectories(train, TIMELINE.val_losses, CLASSES, CLASSES)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (from_steps, "scores from training steps are not fit for choosing the best samples."),
        (unscored, "too few samples are scored for a tenth, in a class or overall."),
    ],
)
def test_a_page_without_a_coreset_says_why(tmp_path, make, why):
    trajectories = make()
    page = write(trajectories.score(), tmp_path / "page.html", None, trajectories)
    assert f"Counts are on a logarithmic scale. No coreset of 10% is marked: {why}" in page.words
    assert f"Not known, because there is no coreset of 10% to compare: {why}" in page.words
    assert not [alt for alt, _ in pictures(page) if alt.startswith("How far")]


def drawn_epochs(monkeypatch):
    """The checkpoints of what the page's figure of agreement is drawn from."""
    drawn = []
    draw = page_module.plot_agreement
    monkeypatch.setattr(
        page_module, "plot_agreement", lambda given, **how: drawn.append(given.epochs) or draw(given, **how)
    )
    return drawn


def test_agreement_is_that_of_the_checkpoints_that_were_scored(tmp_path, monkeypatch):
    drawn = drawn_epochs(monkeypatch)
    losses = timeline(CLASSES, rows=13)
    losses.val_losses[7] = torch.inf  # in a row that is left out
    scores = losses.score(cutoff_epoch=9, every_n_epochs=3)
    page = write(scores, tmp_path / "page.html", None, losses)
    assert drawn == [[0, 3, 6, 9]]
    assert [alt for alt, _ in pictures(page) if alt.startswith("How far")]


@pytest.mark.parametrize("epochs", [(), range(20, 29)])
def test_agreement_is_not_known_where_the_checkpoints_are_not(tmp_path, epochs):
    page = write(CLDScores(TIMELINE.score().values, CLASSES, epochs), tmp_path / "page.html", None, TIMELINE)
    assert "Not known: the losses are not those of the checkpoints that the scores name." in page.words


def test_a_class_without_scores_has_empty_cells_and_its_share_stands_in_the_table(tmp_path):
    scores = unscored().score()
    scores.metadata["implausible"] = {"share": [0.1, 0.0, 0.2], "classes": {"0": [0.25, 0.1, 0.4], "1": None}}
    page = write(scores, tmp_path / "page.html")
    assert "+nan" not in page.words
    assert "25% (10% to 40%)" in page.words
    assert "implausible" not in page.words  # a long line among the metadata


def test_a_directory_or_the_wrong_kind_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(CLDScores, "account", None)
    with pytest.raises(
        IsADirectoryError, match=r"is a directory\. Give the name of a file in it, such as .*report\.html"
    ):
        TIMELINE.score().report(tmp_path)
    for wrong in ("losses.npz", TIMELINE.score()):
        with pytest.raises(TypeError, match=r"trajectories must be LossTrajectories, got (str|CLDScores)"):
            TIMELINE.score().report(tmp_path / "page.html", trajectories=wrong)
    assert list(tmp_path.iterdir()) == []


def test_another_dataset_or_run_is_refused_and_nothing_written(tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match="don't belong to this dataset: it has other labels"):
        TIMELINE.score().report(path, TensorDataset(IMAGES.tensors[0], CLASSES.flip(0)))
    with pytest.raises(ValueError, match="don't belong to these trajectories"):
        TIMELINE.score().report(path, trajectories=timeline(CLASSES[:60]))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_page(tmp_path):
    class Breaking(Dataset):
        targets = CLASSES

        def __len__(self):
            return 90

        def __getitem__(self, position):
            raise OSError("unreadable")

    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(OSError, match="unreadable"):
        TIMELINE.score().report(path, Breaking())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    TIMELINE.score().report(str(path))
    assert path.read_text() != "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it(full, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium in PATH")
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'user'}"]
    size = [f"--screenshot={picture}", f"--window-size={width},4000"]
    subprocess.run([browser, *flags, *size, full.as_uri()], capture_output=True, timeout=120, check=True)
    shown = np.asarray(Image.open(picture).convert("L"))
    assert shown.shape[1] == width
    used = (shown < 250).any(axis=0)
    assert used[: width // 2].mean() > 0.5
    assert not used[width - 5 :].any()  # nothing overflows
    assert (shown < 250).any(axis=1)[:3500].mean() > 0.5

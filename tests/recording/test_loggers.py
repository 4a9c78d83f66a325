"""What the Trainer's loggers receive, read back from their files."""

from __future__ import annotations

import csv
import io
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from oracles import cld_oracle
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Blobs, Classifier, fit

from lightning_cld import CLDCallback, CLDScores, IndexedDataset, LossTrajectories
from lightning_cld.guards import is_a
from lightning_cld.recording import loggers
from lightning_cld.recording.loggers import log_scores
from lightning_cld.recording.settling import Settling

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "looking.md"
PER_CHECKPOINT = {"cld/epoch", "cld/train_loss", "cld/val_loss", "cld/seconds"}
PER_SCORES = {f"cld/scores/{name}" for name in ("unscored", "negative", "implausible", *loggers._QUANTILES)}
EPOCHS = 8
HISTORY = LossTrajectories(torch.rand(4, 2), torch.rand(4, 2))


class Quick(Classifier):
    """Learns so slowly that the coreset keeps changing."""

    def __init__(self) -> None:
        super().__init__(lr=0.003)


def run(root: Path, cld: CLDCallback | None = None, module=Quick, epochs: int = EPOCHS, **arguments) -> L.Trainer:
    return fit(root, cld, module, max_epochs=epochs, log_every_n_steps=3, **arguments)[0]


def read_csv(root: Path) -> list[dict[str, str]]:
    """The rows, without their empty columns."""
    with next(root.rglob("metrics.csv")).open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def logged(root: Path) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
    """The metrics of each checkpoint, by epoch, and the metrics of the scores."""
    rows = [{name: float(value) for name, value in row.items()} for row in read_csv(root) if "cld/epoch" in row]
    checkpoints = {int(row["cld/epoch"]): row for row in rows if "cld/seconds" in row}
    scores = [row for row in rows if "cld/seconds" not in row]
    assert len(scores) <= 1
    assert len(checkpoints) + len(scores) == len(rows)
    return checkpoints, scores[0] if scores else {}


def read_events(root: Path) -> EventAccumulator:
    events = EventAccumulator(str(next(root.rglob("events.out*")).parent), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def best_tenth_oracle(trajectories, epoch: int) -> set[int] | None:
    """The best-scored 10 % of each class at a checkpoint, from the definition."""
    if epoch < 3:
        return None
    train, val = trajectories.train_losses[: epoch + 1], trajectories.val_losses[: epoch + 1]
    classes = trajectories.train_classes.numpy()
    values = cld_oracle(train, val, classes, trajectories.val_classes)
    chosen = set()
    for c in np.unique(classes):
        own = np.flatnonzero(classes == c)
        assert len(own) % 10 == 0  # nothing to round
        chosen |= set(own[np.argsort(-values[own])][: len(own) // 10].tolist())
    return chosen


class Tens(Blobs):
    """Has 20 training samples per class, so that 10 % is a whole number."""

    def __init__(self) -> None:
        super().__init__()
        labels = self.train_set.dataset.tensors[1][self.train_set.indices]
        keep = [torch.nonzero(labels == c).flatten()[:20] for c in range(3)]
        self.train_set = torch.utils.data.Subset(self.train_set, torch.cat(keep).sort().values.tolist())


@pytest.mark.parametrize("history", ["full", "running"])
def test_each_checkpoint_is_logged(tmp_path, history):
    cld = CLDCallback(dirpath=tmp_path, history=history)
    run(tmp_path, cld, logger=CSVLogger(tmp_path), datamodule=Tens())
    full = CLDCallback(dirpath=tmp_path)
    run(tmp_path, full, datamodule=Tens())
    trajectories = full.trajectories
    checkpoints, _ = logged(tmp_path)

    assert list(checkpoints) == trajectories.epochs == list(range(EPOCHS + 1))
    coresets = {epoch: best_tenth_oracle(trajectories, epoch) for epoch in checkpoints}
    for row, (epoch, metrics) in enumerate(checkpoints.items()):
        expected = {
            "step": epoch * 4,  # 60 samples in batches of 16
            "cld/epoch": epoch,
            "cld/train_loss": trajectories.train_losses[row].double().mean().item(),
            "cld/val_loss": trajectories.val_losses[row].double().mean().item(),
            "cld/seconds": metrics["cld/seconds"],
        }
        for name, other in (("previous", epoch - 1), ("half", epoch // 2)):
            if other >= 3:
                expected[f"cld/overlap_{name}"] = len(coresets[epoch] & coresets[other]) / 6
        assert metrics == pytest.approx(expected, rel=1e-5)
    seconds = [metrics["cld/seconds"] for metrics in checkpoints.values()]
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(cld._recorder.seconds)
    # This run's overlaps are below 1, so a wrong definition would show.
    halves = [metrics["cld/overlap_half"] for metrics in checkpoints.values() if "cld/overlap_half" in metrics]
    previous = [
        metrics["cld/overlap_previous"] for metrics in checkpoints.values() if "cld/overlap_previous" in metrics
    ]
    assert len(halves) == 3
    assert len(previous) == 5
    assert min(halves) < 1


@pytest.mark.parametrize("history", ["full", "running"])
def test_the_last_overlap_is_what_the_summary_tells(tmp_path, history):
    cld = CLDCallback(dirpath=tmp_path, history=history)
    run(tmp_path, cld, logger=CSVLogger(tmp_path))
    last = logged(tmp_path)[0][EPOCHS]["cld/overlap_half"]
    assert cld.scores.metadata["half_overlap"] == pytest.approx(last, abs=1e-4)
    assert cld.scores.metadata["half_epoch"] == EPOCHS // 2


def test_a_run_that_settles_logs_what_settled_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_cld.recording.settling.OVERLAP", 0.2)
    cld = CLDCallback(dirpath=tmp_path, cutoff_epoch="auto")
    run(tmp_path, cld, logger=CSVLogger(tmp_path), epochs=24)
    checkpoints, scores = logged(tmp_path)
    halves = {epoch: row["cld/overlap_half"] for epoch, row in checkpoints.items() if "cld/overlap_half" in row}
    settled = next(e for e in halves if all(halves.get(f, 0) >= 0.2 for f in (e - 2, e - 1, e)))
    assert cld.scores.metadata["settled_epoch"] == settled == max(checkpoints)
    assert scores["cld/epoch"] == settled < 24


def test_the_scores_are_logged_when_they_are_made(tmp_path):
    cld = CLDCallback(dirpath=tmp_path, cutoff_epoch=5)
    run(tmp_path, cld, logger=CSVLogger(tmp_path))
    checkpoints, scores = logged(tmp_path)
    values = cld.scores.values.double().numpy()
    assert list(checkpoints) == list(range(6))
    assert scores.keys() == {"step", "cld/epoch"} | PER_SCORES
    assert scores["step"] == 5 * 6
    assert scores["cld/epoch"] == 5
    shares = {"min": 0, "q10": 10, "q25": 25, "median": 50, "q75": 75, "q90": 90, "max": 100}
    for name, share in shares.items():
        assert scores[f"cld/scores/{name}"] == pytest.approx(np.percentile(values, share))
    assert scores["cld/scores/negative"] == pytest.approx((values < 0).sum() / len(values))
    assert 0 < scores["cld/scores/negative"] < 1
    assert scores["cld/scores/implausible"] == cld.scores.metadata["implausible"]["share"][0]
    assert scores["cld/scores/unscored"] == 0


class NotFinite(Classifier):
    """Has a NaN loss for samples whose first value is above 2.5."""

    def cld_step(self, batch):
        losses = torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return torch.where(batch[0][:, 0] > 2.5, torch.nan, losses), batch[1]


def test_what_is_not_finite_is_left_out_of_means(tmp_path):
    data = Blobs()
    data.val_set = torch.utils.data.Subset(
        data.val_set, [place for place, (inputs, _) in enumerate(data.val_set) if inputs[0] <= 2.5]
    )
    cld = CLDCallback(dirpath=tmp_path)
    run(tmp_path, cld, NotFinite, logger=CSVLogger(tmp_path), datamodule=data, epochs=4)
    checkpoints, scores = logged(tmp_path)
    finite = cld.trajectories.train_losses.isfinite()
    unscored = (~finite).any(dim=0).double().mean().item()
    assert 0 < unscored < 1
    for row, metrics in enumerate(checkpoints.values()):
        expected = cld.trajectories.train_losses[row][finite[row]].double().mean().item()
        assert metrics["cld/train_loss"] == pytest.approx(expected, rel=1e-5)
    assert scores["cld/scores/unscored"] == pytest.approx(unscored)


def test_positions_outside_of_the_sampler_do_not_count(tmp_path):
    values = torch.tensor([0.5, math.nan, -0.5, math.nan])
    logger = CSVLogger(tmp_path)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger], fit_loop=loop)
    log_scores(trainer, CLDScores(values, torch.tensor([0, 0, 0, -1]), [0, 1, 2, 3]), HISTORY)
    scores = logged(tmp_path)[1]
    assert scores["step"] == 7
    assert scores["cld/scores/unscored"] == pytest.approx(1 / 3)
    assert scores["cld/scores/negative"] == pytest.approx(1 / 2)


def test_scores_of_which_there_are_none_are_logged_too(tmp_path):
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    trainer = SimpleNamespace(is_global_zero=True, loggers=loggers, fit_loop=loop)
    log_scores(trainer, CLDScores([math.nan, math.nan], epochs=[0, 1, 2, 3]), HISTORY)
    assert logged(tmp_path)[1] == {"step": 7, "cld/epoch": 3, "cld/scores/unscored": 1}


def test_the_guide_names_all_that_is_logged(tmp_path):
    run(tmp_path, CLDCallback(dirpath=tmp_path), logger=CSVLogger(tmp_path))
    found = {name for row in read_csv(tmp_path) for name in row if name.startswith("cld/")}
    assert found == PER_CHECKPOINT | PER_SCORES | {"cld/overlap_previous", "cld/overlap_half"}
    text = GUIDE.read_text()
    for name in found:
        assert f"`{name}`" in text or (
            name.startswith("cld/scores/") and f"`{name.removeprefix('cld/scores/')}`" in text
        )


# Loggers


def test_several_loggers_get_the_same(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    run(tmp_path, CLDCallback(dirpath=tmp_path), logger=loggers)
    events = read_events(tmp_path)
    rows = [row for row in read_csv(tmp_path) if "cld/epoch" in row]
    names = {name for row in rows for name in row} - {"step"}
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("cld/")} == names
    for name in names:
        expected = np.array([(int(row["step"]), float(row[name])) for row in rows if name in row])
        found = np.array([(event.step, event.value) for event in events.Scalars(name)])
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_tensorboard_gets_a_histogram_of_the_scores(tmp_path):
    cld = CLDCallback(dirpath=tmp_path)
    run(tmp_path, cld, logger=TensorBoardLogger(tmp_path))
    (histogram,) = read_events(tmp_path).Histograms("cld/scores")
    values = cld.scores.values.double()
    assert histogram.step == EPOCHS * 6
    assert histogram.histogram_value.num == len(values)
    assert histogram.histogram_value.min == pytest.approx(values.min().item())
    assert histogram.histogram_value.max == pytest.approx(values.max().item())


FIGURES = {"cld/scores_by_class", "cld/agreement", "cld/trajectories"}


@pytest.mark.parametrize(("watching", "figures"), [({}, FIGURES), ({"history": "running"}, {"cld/scores_by_class"})])
def test_tensorboard_gets_figures(tmp_path, watching, figures):
    run(tmp_path, CLDCallback(dirpath=tmp_path, **watching), logger=TensorBoardLogger(tmp_path))
    events = read_events(tmp_path)
    assert set(events.Tags()["images"]) == figures
    for tag in figures:
        (image,) = events.Images(tag)
        assert image.step == EPOCHS * 6
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert pixels.shape[:2] == (image.height, image.width)
        assert 0.01 < (pixels < 128).any(axis=2).mean() < 0.9  # the image is not blank


class Unscored(Quick):
    """The loss of a class never changes."""

    def cld_step(self, batch):
        losses = torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return torch.where(batch[1] == 1, 1.0, losses), batch[1]


@pytest.mark.filterwarnings("ignore:.*CLD.*")
def test_where_a_class_is_unscored_the_other_figures_are_drawn(tmp_path):
    run(tmp_path, CLDCallback(dirpath=tmp_path), Unscored, logger=TensorBoardLogger(tmp_path))
    assert set(read_events(tmp_path).Tags()["images"]) == FIGURES - {"cld/agreement"}


class Stepping(Quick):
    def training_step(self, batch, batch_idx):
        losses = torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return {"loss": losses.mean(), "sample_losses": losses, "sample_index": batch[2]}


def test_of_losses_from_training_steps_no_best_tenth_is_shown(tmp_path, recwarn):
    data = Blobs(drop_last=True)
    data.train_set = IndexedDataset(data.train_set)
    cld = CLDCallback(dirpath=tmp_path, record="step")
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    run(tmp_path, cld, Stepping, logger=loggers, datamodule=data)
    checkpoints, scores = logged(tmp_path)
    assert all(metrics.keys() == PER_CHECKPOINT | {"step"} for metrics in checkpoints.values())
    for row, metrics in enumerate(checkpoints.values()):
        expected = cld.trajectories.train_losses[row].double().nanmean().item()
        assert metrics["cld/train_loss"] == pytest.approx(expected, rel=1e-5)
    assert scores.keys() == {"step", "cld/epoch"} | PER_SCORES - {"cld/scores/implausible"}  # they tell no share
    assert set(read_events(tmp_path).Tags()["images"]) == FIGURES - {"cld/agreement"}
    assert not [warning for warning in recwarn if "CLD" in str(warning.message)]


def test_two_boards_get_the_same_figures(tmp_path):
    loggers = [TensorBoardLogger(tmp_path / name) for name in ("one", "two")]
    run(tmp_path, CLDCallback(dirpath=tmp_path), logger=loggers)
    one, two = (
        {tag: read_events(tmp_path / name).Images(tag)[0].encoded_image_string for tag in FIGURES}
        for name in ("one", "two")
    )
    assert one == two


def test_without_matplotlib_there_are_no_figures(tmp_path, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    run(tmp_path, CLDCallback(dirpath=tmp_path), logger=TensorBoardLogger(tmp_path))
    events = read_events(tmp_path)
    assert events.Tags()["images"] == []
    assert events.Tags()["histograms"] == ["cld/scores"]
    assert not [warning for warning in recwarn if "CLD" in str(warning.message)]


def test_a_figure_that_can_not_be_drawn_is_warned_about(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(loggers.plotting, "plot_agreement", fails)
    with pytest.warns(UserWarning, match="CLD: the figure agreement could not be drawn: no ink"):
        run(tmp_path, CLDCallback(dirpath=tmp_path), logger=TensorBoardLogger(tmp_path))
    assert set(read_events(tmp_path).Tags()["images"]) == FIGURES - {"cld/agreement"}


class Unreachable(TensorBoardLogger):
    def log_metrics(self, metrics, step=None):
        pass

    def save(self):
        pass

    @property
    def experiment(self):
        raise OSError("the disk is full")


def test_a_board_that_can_not_be_written_is_warned_about(tmp_path):
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    trainer = SimpleNamespace(is_global_zero=True, loggers=[Unreachable(tmp_path)], fit_loop=loop)
    with pytest.warns(UserWarning, match="CLD: the histogram of the scores could not be made: the disk is full"):
        log_scores(trainer, CLDScores([0.5, 0.1], epochs=[0, 1, 2, 3]), HISTORY)


def test_a_tensorboard_logger_of_the_other_package_is_known_too():
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    assert not issubclass(loggers.TensorBoardLogger, TensorBoardLogger)
    assert is_a(loggers.TensorBoardLogger("unused"), "TensorBoardLogger")
    assert not is_a(loggers.CSVLogger("unused"), "TensorBoardLogger")


def test_without_a_logger_nothing_is_computed_for_one(tmp_path, monkeypatch):
    def look(*_):
        raise AssertionError("looked")

    monkeypatch.setattr(Settling, "look", look)
    run(tmp_path, CLDCallback(dirpath=tmp_path), epochs=4)
    assert (tmp_path / "cld-scores.npz").exists()


def test_other_ranks_log_nothing():
    logger = Drawing(fails=False)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    for rank_0 in (False, True):
        trainer = SimpleNamespace(is_global_zero=rank_0, loggers=[logger], fit_loop=loop)
        log_scores(trainer, CLDScores([0.5, 0.1], epochs=[0, 1, 2, 3]), HISTORY)
        assert logger.got == rank_0


class Alternating(Classifier):
    """Takes two optimizer steps per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[place].parameters(), lr=0.1) for place in (0, 4)]


@pytest.mark.parametrize(("module", "arguments"), [(Alternating, {}), (Quick, {"accumulate_grad_batches": 2})])
def test_the_x_axis_is_that_of_the_training(tmp_path, module, arguments):
    trainer = run(tmp_path, CLDCallback(dirpath=tmp_path), module, logger=CSVLogger(tmp_path), epochs=4, **arguments)
    steps = 24 if module is Alternating else 12
    assert trainer.global_step == (48 if module is Alternating else 12)
    assert [row["step"] for row in logged(tmp_path)[0].values()] == [0, steps / 4, steps / 2, 3 * steps / 4, steps]
    theirs = [int(row["step"]) for row in read_csv(tmp_path) if "cld/epoch" not in row]
    assert max(theirs) == steps - 1


# Watching changes nothing


@pytest.mark.parametrize(
    "watching", [{}, {"history": "running"}, {"cutoff_epoch": "auto"}, {"cutoff_epoch": 4}], ids=str
)
def test_other_columns_are_those_of_a_run_that_is_not_watched(tmp_path, watching):
    run(tmp_path / "plain", logger=CSVLogger(tmp_path / "plain"))
    run(tmp_path / "watched", CLDCallback(**watching), logger=CSVLogger(tmp_path / "watched"))
    rows = read_csv(tmp_path / "watched")
    others = [{name: value for name, value in row.items() if not name.startswith("cld/")} for row in rows]
    assert [row for row in others if row.keys() != {"step"}] == read_csv(tmp_path / "plain")
    assert any("cld/epoch" in row for row in rows)


def test_other_scalars_are_those_of_a_run_that_is_not_watched(tmp_path):
    run(tmp_path / "plain", logger=TensorBoardLogger(tmp_path / "plain"))
    trainer = run(tmp_path / "watched", CLDCallback(), logger=TensorBoardLogger(tmp_path / "watched"))
    plain, watched = read_events(tmp_path / "plain"), read_events(tmp_path / "watched")
    theirs = [tag for tag in watched.Tags()["scalars"] if not tag.startswith("cld/")]
    assert sorted(theirs) == sorted(plain.Tags()["scalars"])
    for tag in theirs:
        for one, other in zip(plain.Scalars(tag), watched.Scalars(tag), strict=True):
            assert (one.step, one.value) == (other.step, other.value), tag
    assert not [name for name in (*trainer.logged_metrics, *trainer.callback_metrics) if name.startswith("cld")]


class Drawing(DummyLogger):
    """Draws from all RNGs when values under `cld/` arrive, and may fail then."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails
        self.got = 0

    def log_metrics(self, metrics, step=None):
        if "cld/epoch" in metrics:
            self.got += 1
            torch.rand(1), np.random.rand(), random.random()
            if self.fails:
                raise OSError("the server is down")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.filterwarnings("ignore:CLD")
def test_a_logger_that_draws_at_random_or_fails_changes_nothing(tmp_path, fails):
    def trained(cld):
        logger = Drawing(fails)
        _, module = fit(tmp_path, cld, max_epochs=4, logger=[logger, CSVLogger(tmp_path)])
        states = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
        return logger, [*(value.tolist() for value in module.state_dict().values()), *states]

    (_, plain), (logger, watched) = trained(None), trained(CLDCallback(dirpath=tmp_path))
    assert plain == watched
    assert logger.got == 6


def test_a_logger_that_fails_is_warned_about_and_the_next_gets_everything(tmp_path):
    with pytest.warns(
        UserWarning, match="CLD: a checkpoint could not be sent to Drawing: the server is down"
    ) as caught:
        run(tmp_path, CLDCallback(dirpath=tmp_path), logger=[Drawing(fails=True), CSVLogger(tmp_path)], epochs=4)
    assert any("CLD: the scores could not be sent to Drawing" in str(warning.message) for warning in caught)
    checkpoints, scores = logged(tmp_path)
    assert list(checkpoints) == [0, 1, 2, 3, 4]
    assert scores
    assert (tmp_path / "cld-scores.npz").exists()


def test_an_overlap_that_can_not_be_found_is_warned_about(tmp_path, monkeypatch):
    def look(self, history):
        raise MemoryError("no room for it")

    monkeypatch.setattr(Settling, "look", look)
    with pytest.warns(UserWarning, match="CLD: the coreset's overlaps could not be computed: no room for it"):
        run(tmp_path, CLDCallback(dirpath=tmp_path), logger=CSVLogger(tmp_path), epochs=4)
    checkpoints, _ = logged(tmp_path)
    assert all(metrics.keys() == PER_CHECKPOINT | {"step"} for metrics in checkpoints.values())


def test_a_resumed_run_logs_the_same(tmp_path):
    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 4:
                trainer.save_checkpoint(tmp_path / "five.ckpt")

    cld = CLDCallback(dirpath=tmp_path / "one")
    run(tmp_path, cld, callbacks=[Saves()], logger=CSVLogger(tmp_path / "one"))
    run(
        tmp_path,
        CLDCallback(dirpath=tmp_path / "two"),
        ckpt_path=tmp_path / "five.ckpt",
        logger=CSVLogger(tmp_path / "two"),
    )
    whole, rest = logged(tmp_path / "one")[0], logged(tmp_path / "two")[0]
    assert list(rest) == [6, 7, 8]
    assert [rest[epoch].keys() for epoch in rest] == [whole[epoch].keys() for epoch in rest]
    assert [rest[epoch]["step"] for epoch in rest] == [36, 42, 48]


SCRIPT = """
import sys
import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from toys import Blobs, Classifier
from lightning_cld import CLDCallback
import lightning_cld.recording.progress_bar
lightning_cld.recording.progress_bar._INTERVAL = -1.0
root = sys.argv[1]
trainer = L.Trainer(
    max_epochs=4, accelerator="cpu", devices=2, strategy="ddp", logger=CSVLogger(root), enable_checkpointing=False,
    enable_model_summary=False, callbacks=[TQDMProgressBar(), CLDCallback(dirpath=root)], log_every_n_steps=1,
)
trainer.fit(Classifier(), datamodule=Blobs())
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_on_two_processes_one_logs_and_shows(tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "LINES": "40"}
    environment.pop("TQDM_MINITERS", None)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    checkpoints, scores = logged(tmp_path)
    assert list(checkpoints) == [0, 1, 2, 3, 4]
    assert scores
    # Each process evaluates 45 samples in three batches, so 67 % is shown once per checkpoint.
    assert result.stdout.count("CLD train:  67%") == 5

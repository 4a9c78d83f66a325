"""The files of a run: where they go, what a kill or a later run leaves, and that losses and scores are a pair."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import fsspec
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import Blobs, Classifier, fit, quiet_trainer

import lightning_cld.recording.results as results_module
from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, LossTrajectories, SampleNames, plotting
from lightning_cld.recording import rows_folders
from lightning_cld.storage import places, row_files


class PowerCutError(RuntimeError):
    pass


def dies(epoch):
    class Dies(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == epoch:
                raise PowerCutError

    return Dies


def interrupted(root, cld, epoch=3, **arguments):
    with pytest.raises(PowerCutError):
        fit(root, cld, dies(epoch), **arguments)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def rows_folder(folder):
    (found,) = Path(folder).glob("*-rows-*")
    return found


@pytest.fixture
def memory():
    """The store of fsspec that lives in memory, empty."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return store


@pytest.fixture
def said(monkeypatch):
    """What is told at the level of information, by a list."""
    messages = []
    for module in (results_module, rows_folders):
        monkeypatch.setattr(module, "rank_zero_info", messages.append)
    return messages


# URLs


@pytest.mark.parametrize("history", ["full", "running"])
def test_files_are_written_and_read_behind_a_url(tmp_path, monkeypatch, memory, history):
    monkeypatch.chdir(tmp_path)
    cld = CLDCallback(dirpath="memory://runs/proxy", history=history)
    fit(tmp_path, cld)
    assert cld.scores_path == "memory://runs/proxy/cld-scores.npz"
    kept = ["cld-scores.npz"] if history == "running" else ["cld-scores.npz", "cld-trajectories.npz"]
    assert places.names_in("memory://runs/proxy") == kept
    assert names(tmp_path) == []
    assert torch.equal(CLDScores.load(cld.scores_path).values, cld.scores.values)
    coreset = CoresetDataModule(Blobs(), cld.scores_path, fraction=0.2)
    assert coreset.indices == cld.scores.select(fraction=0.2).tolist()
    if history == "full":
        loaded = LossTrajectories.load("memory://runs/proxy/cld-trajectories.npz")
        assert torch.equal(loaded.train_losses, cld.trajectories.train_losses)


def test_a_table_and_a_page_are_written_behind_a_url(memory):
    scores = CLDScores(torch.linspace(-1, 1, 40))
    assert scores.to_csv("memory://runs/scores.csv") == "memory://runs/scores.csv"
    scores.report("memory://runs/page.html")
    assert memory.cat("/runs/scores.csv").startswith(b"position,class,score")
    assert b"<html" in memory.cat("/runs/page.html")


def test_the_trainer_may_have_a_url_too(tmp_path, monkeypatch, memory):
    monkeypatch.chdir(tmp_path)
    cld = CLDCallback()
    fit("memory://runs", cld)
    assert cld.scores_path == "memory://runs/cld-scores.npz"
    assert places.exists(cld.scores_path)
    assert names(tmp_path) == []


def test_a_path_that_was_made_of_a_url_is_one_again():
    assert CLDCallback(dirpath=Path("s3://bucket/proxy")).dirpath == "s3://bucket/proxy"
    assert CLDCallback(dirpath="file:///runs").dirpath == Path("/runs")
    assert CLDCallback(dirpath=Path("file:///runs")).dirpath == Path("/runs")


@pytest.mark.parametrize("folder", ["runs/proxy", "runs with: colon", "C:/runs"])
def test_other_folders_are_taken_as_they_are(folder):
    assert CLDCallback(dirpath=folder).dirpath == Path(folder)


def test_a_run_is_killed_and_resumed_behind_a_url(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", 0)
    whole = CLDCallback(dirpath=tmp_path / "whole")
    fit(tmp_path, whole)
    saver = ModelCheckpoint("memory://runs", "{epoch}", save_top_k=-1)
    interrupted("memory://runs", CLDCallback(), callbacks=[saver], enable_checkpointing=True)
    resumed = CLDCallback()
    fit("memory://runs", resumed, ckpt_path="memory://runs/epoch=1.ckpt")
    assert resumed.trajectories.epochs == whole.trajectories.epochs
    assert torch.equal(resumed.trajectories.train_losses[:3], whole.trajectories.train_losses[:3])
    assert places.names_in("memory://runs") == [
        "cld-scores.npz",
        "cld-trajectories.npz",
        "epoch=0.ckpt",
        "epoch=1.ckpt",
        "epoch=2.ckpt",
    ]


@pytest.mark.parametrize("url", ["nothing-like-it://runs", "http://127.0.0.1:9/runs"])
def test_a_storage_that_cannot_be_written_is_found_out_at_the_start(tmp_path, url):
    module = Classifier()
    with pytest.raises((ValueError, OSError), match=r"CLD can't save cld-scores.npz .* Give CLDCallback\(dirpath"):
        fit(tmp_path, CLDCallback(dirpath=url), module)
    assert module.trainer.global_step == 0


def test_the_root_of_a_storage_is_a_folder(tmp_path, monkeypatch, memory):
    monkeypatch.chdir(tmp_path)
    cld = CLDCallback(dirpath="memory://")
    fit(tmp_path / "root", cld)
    assert places.names_in("memory://") == ["cld-scores.npz", "cld-trajectories.npz"]
    assert torch.equal(CLDScores.load(cld.scores_path).values, cld.scores.values)
    assert not (tmp_path / "memory:").exists()


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    fit(tmp_path / "root", CLDCallback(dirpath="~/runs"))
    assert names(tmp_path / "home" / "runs") == ["cld-scores.npz", "cld-trajectories.npz"]
    assert len(CLDScores.load("~/runs/cld-scores.npz")) == 90
    assert CLDCallback(dirpath="~nobody-of-this-name/runs").dirpath == Path("~nobody-of-this-name/runs")


@pytest.mark.parametrize("given", ["dirpath", "default"])
def test_a_folder_stays_where_it_is_if_the_process_goes_to_another(tmp_path, monkeypatch, given):
    class Goes(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            os.chdir(tmp_path)

    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    cld = CLDCallback(dirpath="runs" if given == "dirpath" else None)
    fit("runs", cld, callbacks=[Goes()])
    assert cld.scores_path == tmp_path / "start" / "runs" / "cld-scores.npz"
    assert names(tmp_path / "start" / "runs") == ["cld-scores.npz", "cld-trajectories.npz"]
    assert names(tmp_path) == ["start"]


# Targets that can't be written


def make_file(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("mine")


def make_dangling(folder):
    folder.symlink_to(folder.parent / "nowhere")


def make_target_folder(folder):
    (folder / "cld-scores.npz").mkdir(parents=True)


@pytest.mark.parametrize("given", ["dirpath", "default"])
@pytest.mark.parametrize("make", [make_file, make_dangling, make_target_folder])
def test_what_is_in_the_way_is_found_out_at_the_start(tmp_path, make, given):
    folder = tmp_path / "runs"
    make(folder)
    module, data = Classifier(), Blobs()
    with pytest.raises(OSError, match=r"CLD can't save .*runs.* Give CLDCallback\(dirpath=...\)"):
        fit(folder, CLDCallback(dirpath=folder if given == "dirpath" else None), module, data)
    assert module.trainer.global_step == 0


def test_a_name_that_is_too_long_is_found_out_at_the_start(tmp_path):
    module = Classifier()
    with pytest.raises(OSError, match=r"too long.* shorter filename"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path / "runs", filename="x" * 240), module)
    assert module.trainer.global_step == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only_is_found_out_at_the_start(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="dirpath"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path))


# Full disks


def full_disk(monkeypatch, *parts):
    """Lets every write fail to files that have one of `parts` in their name."""
    whole = places.replacing

    def replacing(place):
        if any(part in str(place) for part in parts):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(place)

    monkeypatch.setattr("lightning_cld.storage.files.replacing", replacing)


def test_scores_are_saved_where_there_is_no_space_for_the_losses(tmp_path, monkeypatch):
    full_disk(monkeypatch, "cld-trajectories")
    cld = CLDCallback(dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"losses could not be saved .*No space.* They are in .*cld-rows-"):
        fit(tmp_path, cld)
    assert torch.equal(CLDScores.load(tmp_path / "cld-scores.npz").values, cld.scores.values)
    assert torch.equal(LossTrajectories.load(rows_folder(tmp_path)).train_losses, cld.trajectories.train_losses)


def test_losses_are_saved_where_there_is_no_space_for_the_scores(tmp_path, monkeypatch):
    full_disk(monkeypatch, "cld-scores")
    cld = CLDCallback(dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"scores could not be saved .*No space.* They are in the callback's .scores"):
        fit(tmp_path, cld)
    assert names(tmp_path) == ["cld-trajectories.npz"]
    assert torch.equal(LossTrajectories.load(tmp_path / "cld-trajectories.npz").score().values, cld.scores.values)


def test_a_full_disk_in_between_is_told_once_and_made_up_for(tmp_path, monkeypatch):
    full_disk(monkeypatch, "after-000001", "after-000002")
    cld = CLDCallback(dirpath=tmp_path)
    with pytest.warns(UserWarning, match="could not be written") as caught:
        fit(tmp_path, cld)
    told = [str(warning.message) for warning in caught if "could not be written" in str(warning.message)]
    assert len(told) == 1
    assert "after 1 epochs" in told[0]
    assert LossTrajectories.load(tmp_path / "cld-trajectories.npz").epochs == [0, 1, 2, 3, 4]


# Rows that are written as they are logged


@pytest.mark.parametrize("record", ["sweep", "step"])
def test_each_checkpoint_is_on_disk_once_it_is_logged(tmp_path, record):
    seen = []

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            loaded = LossTrajectories.load(rows_folder(tmp_path))
            seen.append(loaded.epochs)
            assert torch.equal(loaded.train_losses.nan_to_num(9), cld.trajectories.train_losses.nan_to_num(9))
            assert torch.equal(loaded.val_losses, cld.trajectories.val_losses)
            assert loaded.metadata["run"] == cld.trajectories.metadata["run"]
            assert loaded.from_steps == (record == "step")

    if record == "step":
        from tests.recording.test_training_steps import Indexed, Stepping

        module, data = Stepping, Indexed()
    else:
        module, data = Classifier, None
    cld = CLDCallback(dirpath=tmp_path, record=record)
    fit(tmp_path, cld, module, data, callbacks=[Looks()])
    assert seen == [list(range(epoch + 1)) for epoch in range(4)]
    assert names(tmp_path) == ["cld-scores.npz", "cld-trajectories.npz"]


def test_scores_so_far_are_on_disk_where_no_losses_are_kept(tmp_path):
    cld = CLDCallback(dirpath=tmp_path, history="running")
    interrupted(tmp_path, cld, epoch=3)
    saved = CLDScores.load(rows_folder(tmp_path) / "scores.npz")
    assert saved.epochs == [0, 1, 2, 3]
    assert torch.equal(saved.values, cld.scores.values)


def test_what_a_checkpoint_costs_does_not_grow_with_the_epochs(tmp_path):
    """Bytes written by a run beside those of one twice as long, without the files at its end."""

    def written(epochs):
        sizes = {}

        class Counts(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                for path in rows_folder(tmp_path).iterdir():
                    sizes[path.name, path.stat().st_mtime_ns] = path.stat().st_size

        fit(tmp_path, CLDCallback(dirpath=tmp_path), callbacks=[Counts()], max_epochs=epochs)
        return sum(sizes.values())

    assert written(24) - written(16) == pytest.approx(written(16) - written(8), rel=0.02)


def test_checkpoints_name_the_folder_of_large_losses_and_hold_small_ones(tmp_path, monkeypatch):
    def size(limit):
        monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", limit)
        cld = CLDCallback(dirpath=tmp_path)
        sizes = []

        class Looks(L.Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                state = cld.state_dict()["trajectories"]
                sizes.append("train_losses" in state)

        fit(tmp_path, cld, callbacks=[Looks()])
        return sizes

    row = 4 * 120
    assert size(10 * row) == [True] * 4
    assert size(2 * row) == [True, True, False, False]
    assert size(0) == [False] * 4


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_resumes_from_the_folder_that_its_checkpoint_names(tmp_path, monkeypatch, moved):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", 0)
    whole = CLDCallback(dirpath=tmp_path / "whole")
    fit(tmp_path, whole)
    first, second = tmp_path / "first", tmp_path / ("second" if moved else "first")
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    interrupted(tmp_path, CLDCallback(dirpath=first), callbacks=[saver], enable_checkpointing=True)
    resumed = CLDCallback(dirpath=second)
    fit(tmp_path, resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.trajectories.epochs == [0, 1, 2, 3, 4]
    assert torch.equal(resumed.trajectories.train_losses[:3], whole.trajectories.train_losses[:3])
    saved = LossTrajectories.load(second / "cld-trajectories.npz")
    assert torch.equal(saved.train_losses, resumed.trajectories.train_losses)
    # And once more when the run is finished and its rows are in one file.
    again = CLDCallback(dirpath=second)
    fit(tmp_path, again, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert torch.equal(again.trajectories.train_losses, resumed.trajectories.train_losses)


NAMES = SampleNames(f"shard-{position % 4}/{position}" for position in range(90))


@pytest.fixture
def _named(monkeypatch):
    """The samples of a run that starts have names, as those of a stream do. A run that is resumed must keep its own."""
    keep = results_module.Results.keep

    def keep_named(self, history):
        if history.epochs == [0]:
            history.names = NAMES
        keep(self, history)

    monkeypatch.setattr(results_module.Results, "keep", keep_named)


@pytest.mark.usefixtures("_named")
@pytest.mark.parametrize(("history", "limit"), [("full", 0), ("full", 2**24), ("running", 2**24)])
def test_names_are_on_disk_from_the_first_row_and_outlive_a_kill(tmp_path, monkeypatch, history, limit):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", limit)
    seen = []

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            folder = rows_folder(tmp_path)
            if history == "full":
                seen.append(LossTrajectories.load(folder).names)
            elif (folder / "scores.npz").exists():
                seen.append(CLDScores.load(folder / "scores.npz").names)

    saver = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_top_k=-1)
    cld = CLDCallback(dirpath=tmp_path, history=history)
    interrupted(tmp_path, cld, callbacks=[saver, Looks()], enable_checkpointing=True)
    assert seen == [NAMES] * (4 if history == "full" else 1)
    resumed = CLDCallback(dirpath=tmp_path, history=history)
    fit(tmp_path, resumed, ckpt_path=tmp_path / "checkpoints" / "epoch=1.ckpt")
    assert CLDScores.load(resumed.scores_path).names == NAMES
    if history == "full":
        assert LossTrajectories.load(tmp_path / "cld-trajectories.npz").names == NAMES


@pytest.mark.usefixtures("_named")
def test_long_names_are_in_the_folder_that_checkpoints_name(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", 5 * 4 * 120)  # the losses of five checkpoints
    held = []

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            held.append("train_losses" in cld.state_dict()["trajectories"])

    cld = CLDCallback(dirpath=tmp_path)
    fit(tmp_path, cld, callbacks=[Looks()])
    assert held == [True, False, False, False]  # the names take as much as three


def test_a_folder_that_is_gone_is_named_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", 0)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    interrupted(tmp_path, CLDCallback(dirpath=tmp_path / "a"), callbacks=[saver], enable_checkpointing=True)
    (tmp_path / "a").rename(tmp_path / "b")
    module = Classifier()
    with pytest.raises(ValueError, match=r"neither in .*a.cld-rows-.* nor in .*cld-trajectories.npz. Bring"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path / "b"), module, ckpt_path=tmp_path / "epoch=1.ckpt")


def test_rows_that_a_killed_run_logged_behind_its_checkpoint_are_not_mixed_in(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    cld = CLDCallback(dirpath=tmp_path / "runs")
    monkey = Classifier()
    trainer = quiet_trainer(tmp_path, cld, saver, enable_checkpointing=True)
    # A run that was killed leaves its folder: here it is put back as it was before the end.
    trainer.fit(monkey, datamodule=Blobs())
    run = cld.trajectories.metadata["run"]
    folder = tmp_path / "runs" / f"cld-rows-{run}"
    rows = results_module.RowFiles(folder)
    rows.write_about({"fingerprint": None, "from_steps": False, "metadata": {}}, {})
    for epoch in range(5):
        rows.write(epoch, torch.full((90,), 7.0).numpy(), torch.full((30,), 7.0).numpy())

    class Looks(L.Callback):
        def on_train_start(self, trainer, pl_module):
            assert rows.epochs() == [0, 1, 2]

    fit(tmp_path, CLDCallback(dirpath=tmp_path / "runs"), callbacks=[Looks()], ckpt_path=tmp_path / "epoch=1.ckpt")
    assert not folder.exists()


def test_rows_of_a_run_that_went_on_from_an_earlier_checkpoint_are_written_again(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    runs = tmp_path / "runs"
    fit(tmp_path, CLDCallback(dirpath=runs), callbacks=[saver], enable_checkpointing=True)
    (runs / "cld-scores.npz").unlink()
    (runs / "cld-trajectories.npz").rename(tmp_path / "whole.npz")
    whole = LossTrajectories.load(tmp_path / "whole.npz")
    # What another run from the first checkpoint, which was killed, would leave.
    rows = results_module.RowFiles(runs / f"cld-rows-{whole.metadata['run']}")
    rows.write_about({"fingerprint": None, "from_steps": False, "metadata": {}}, {})
    for epoch in range(5):
        rows.write(epoch, torch.full((90,), 7.0).numpy(), torch.full((30,), 7.0).numpy())
    seen = []

    class Looks(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                seen.append(LossTrajectories.load(rows.folder))

    fit(tmp_path, CLDCallback(dirpath=runs), callbacks=[Looks()], ckpt_path=tmp_path / "epoch=1.ckpt")
    assert seen[0].epochs == [0, 1, 2, 3]
    assert torch.equal(seen[0].train_losses[:3], whole.train_losses[:3])
    assert seen[0].metadata["run"] == whole.metadata["run"]


def test_a_run_killed_while_its_rows_are_deleted_is_resumed_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", 0)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, deleted, unlink = CLDCallback(dirpath=tmp_path / "runs"), [], Path.unlink

    def killed(path, *args, **kwargs):
        if "-rows-" in path.parent.name and path.suffix == ".npz":
            if len(deleted) == 2:
                raise SystemExit
            deleted.append(path)
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(SystemExit):
        fit(tmp_path, whole, callbacks=[saver], enable_checkpointing=True)
    monkeypatch.undo()
    assert rows_folder(tmp_path / "runs")
    with pytest.raises(ValueError, match="folder without logged losses"):
        LossTrajectories.load(rows_folder(tmp_path / "runs"))
    for epoch in (3, 1):  # the first trains no more
        resumed = CLDCallback(dirpath=tmp_path / "runs")
        fit(tmp_path, resumed, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.trajectories.epochs == [0, 1, 2, 3, 4]
        assert torch.equal(resumed.trajectories.train_losses[:3], whole.trajectories.train_losses[:3])
        assert names(tmp_path / "runs") == ["cld-scores.npz", "cld-trajectories.npz"]


def test_a_run_killed_at_its_end_leaves_nothing_once_it_is_resumed(tmp_path, monkeypatch):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    monkeypatch.setattr(results_module.RowFiles, "delete", lambda self: None)
    fit(tmp_path, CLDCallback(dirpath=tmp_path / "runs"), callbacks=[saver], enable_checkpointing=True)
    monkeypatch.undo()
    assert rows_folder(tmp_path / "runs")
    fit(tmp_path, CLDCallback(dirpath=tmp_path / "runs"), ckpt_path=tmp_path / "epoch=3.ckpt")
    assert names(tmp_path / "runs") == ["cld-scores.npz", "cld-trajectories.npz"]


def test_rows_that_another_continuation_has_replaced_are_not_taken_for_those_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", 0)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    interrupted(tmp_path, CLDCallback(dirpath=tmp_path / "runs"), callbacks=[saver], enable_checkpointing=True)

    class Other(dies(3)):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5, momentum=0.9)

        def on_train_batch_start(self, batch, batch_idx):
            batch[0].add_(0.1)  # so that it trains otherwise

    with pytest.raises(PowerCutError):
        fit(tmp_path, CLDCallback(dirpath=tmp_path / "runs"), Other, ckpt_path=tmp_path / "epoch=0.ckpt")
    module = Classifier()
    with pytest.raises(ValueError, match="logged those epochs anew"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path / "runs"), module, ckpt_path=tmp_path / "epoch=2.ckpt")


def test_a_checkpoint_names_a_file_only_if_it_holds_what_was_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", 0)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    interrupted(tmp_path, CLDCallback(dirpath=tmp_path / "runs"), 2, callbacks=[saver], enable_checkpointing=True)
    rows = rows_folder(tmp_path / "runs")
    LossTrajectories.load(rows).save(tmp_path / "runs" / "cld-trajectories.npz")
    results_module.RowFiles(rows).delete()
    full_disk(monkeypatch, "after-")
    second = CLDCallback(dirpath=tmp_path / "runs")
    saver = ModelCheckpoint(tmp_path, "second-{epoch}", save_top_k=-1)
    with pytest.warns(UserWarning, match="could not be written"):
        fit(tmp_path, second, callbacks=[saver], enable_checkpointing=True, ckpt_path=tmp_path / "epoch=1.ckpt")
    resumed = CLDCallback(dirpath=tmp_path / "third")
    (tmp_path / "runs" / "cld-trajectories.npz").unlink()
    fit(tmp_path, resumed, ckpt_path=tmp_path / "second-epoch=2.ckpt")
    assert torch.equal(resumed.trajectories.train_losses[:4], second.trajectories.train_losses[:4])


# Pairs, and other runs


def test_losses_and_scores_of_a_run_carry_one_id(tmp_path):
    cld = CLDCallback(dirpath=tmp_path)
    runs = []
    for _ in range(2):
        fit(tmp_path, cld)
        scores, losses = (
            CLDScores.load(tmp_path / "cld-scores.npz"),
            LossTrajectories.load(tmp_path / "cld-trajectories.npz"),
        )
        assert scores.metadata["run"] == losses.metadata["run"]
        runs.append(scores.metadata["run"])
    assert runs[0] != runs[1]


def test_a_resumed_run_keeps_its_id(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    first = CLDCallback(dirpath=tmp_path / "runs")
    fit(tmp_path, first, callbacks=[saver], enable_checkpointing=True)
    resumed = CLDCallback(dirpath=tmp_path / "runs")
    fit(tmp_path, resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.scores.metadata["run"] == first.scores.metadata["run"]


@pytest.mark.parametrize("history", ["full", "running"])
@pytest.mark.parametrize("resumes", [False, True])
def test_a_later_run_that_is_interrupted_destroys_nothing(tmp_path, said, history, resumes):
    folder = tmp_path / "runs"
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(tmp_path, CLDCallback(dirpath=folder, history=history), callbacks=[saver], enable_checkpointing=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    ckpt = tmp_path / "epoch=1.ckpt" if resumes else None
    interrupted(tmp_path, CLDCallback(dirpath=folder, history=history), ckpt_path=ckpt)
    assert {name: (folder / name).read_bytes() for name in before} == before
    if history == "full":
        assert LossTrajectories.load(rows_folder(folder)).epochs == [0, 1, 2, 3]
    assert str(rows_folder(folder)) in said[-1]


@pytest.mark.parametrize("scored", [True, False])
def test_a_later_run_that_has_no_scores_destroys_nothing(tmp_path, scored):
    (fit if scored else interrupted)(tmp_path, CLDCallback(dirpath=tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 1 + scored

    class Stops(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    cld = CLDCallback(dirpath=tmp_path)
    with pytest.warns(UserWarning, match=r"no scores were saved.* got 3 .*The logged losses are in .*cld-rows-"):
        fit(tmp_path, cld, callbacks=[Stops()])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert torch.equal(LossTrajectories.load(rows_folder(tmp_path)).train_losses, cld.trajectories.train_losses)


@pytest.mark.parametrize("limit", [0, 2**24])
@pytest.mark.parametrize("other", [False, True])
def test_an_interrupted_run_names_a_place_that_holds_its_losses(tmp_path, said, monkeypatch, limit, other):
    """A run that had its scores at the cutoff goes on behind it, and ends there too: nothing more is logged."""
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", limit)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    first = CLDCallback(dirpath=tmp_path / "first", cutoff_epoch=3)
    fit(tmp_path, first, callbacks=[saver], enable_checkpointing=True, max_epochs=5)
    folder = tmp_path / "other" if other else tmp_path / "first"
    if other:
        fit(tmp_path, CLDCallback(dirpath=folder), max_epochs=5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    second = CLDCallback(dirpath=folder, cutoff_epoch=3)
    interrupted(tmp_path, second, epoch=4, max_epochs=5, ckpt_path=tmp_path / "epoch=3.ckpt")
    assert {name: (folder / name).read_bytes() for name in before} == before
    place = rows_folder(folder) if other else folder / "cld-trajectories.npz"
    assert said[-1].endswith(f"is in {place}")
    assert torch.equal(LossTrajectories.load(place).train_losses, first.trajectories.train_losses)


def test_a_pair_of_two_runs_is_refused_by_name(tmp_path):
    runs = []
    for seed in range(2):
        cld = CLDCallback(dirpath=tmp_path)
        L.seed_everything(seed, verbose=False)
        quiet_trainer(tmp_path, cld).fit(Classifier(), datamodule=Blobs())
        runs.append((cld.scores, cld.trajectories))
    ids = [losses.metadata["run"] for _, losses in runs]
    for call in (
        lambda: runs[0][0].report(tmp_path / "page.html", trajectories=runs[1][1]),
        lambda: plotting.plot_trajectories(runs[1][1], scores=runs[0][0]),
    ):
        with pytest.raises(ValueError, match=f"scores are of run {ids[0]}, the losses of run {ids[1]}"):
            call()
    runs[0][0].report(tmp_path / "page.html", trajectories=runs[0][1])


def test_scores_and_losses_are_replaced_together_or_not_at_all(tmp_path, monkeypatch):
    cld = CLDCallback(dirpath=tmp_path)
    fit(tmp_path, cld)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cld._results.save(cld.trajectories, cld.scores, 0.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


RUN = """
import sys, time
sys.path[:0] = [sys.argv[2]]
from toys import Classifier, Blobs, quiet_trainer
from lightning_cld import CLDCallback

class Slow(Classifier):
    def on_train_epoch_start(self):
        print("epoch", self.current_epoch, flush=True)
        if self.current_epoch == 2:
            time.sleep(60)

quiet_trainer(sys.argv[1], CLDCallback(dirpath=sys.argv[1])).fit(Slow(), datamodule=Blobs())
"""


@pytest.fixture
def other(tmp_path):
    """A process that saves to `tmp_path` and waits in its third epoch."""
    command = [sys.executable, "-c", RUN, str(tmp_path), str(Path(__file__).parents[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2"):
            break
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_one_folder_is_told_while_the_first_lives_and_finds_its_losses_once_it_is_killed(
    tmp_path, other, said
):
    with pytest.warns(UserWarning, match=rf"another run saves to .* too, .*process {other.pid} on .* of its own"):
        interrupted(tmp_path, CLDCallback(dirpath=tmp_path))
    other.send_signal(signal.SIGKILL)
    other.wait()
    killed = rows_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*another run saves.*")
        interrupted(tmp_path, CLDCallback(dirpath=tmp_path))
    (told,) = [message for message in said if "holds what an interrupted run had logged" in message]
    assert str(killed) in told
    # Killed without any checkpoint of Lightning's: what was logged is there.
    assert LossTrajectories.load(killed).epochs == [0, 1, 2]


def test_a_run_on_another_machine_is_told_of(tmp_path):
    interrupted(tmp_path, CLDCallback(dirpath=tmp_path / "a"))
    folder = tmp_path / "b" / "cld-rows-0123"
    folder.mkdir(parents=True)
    (folder / "owner.json").write_text(json.dumps({"host": "elsewhere", "process": 1, "started": "2026-01-01"}))
    with pytest.warns(UserWarning, match="process 1 on elsewhere, started 2026-01-01"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path / "b"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*another run saves.*")
        fit(tmp_path, CLDCallback(dirpath=tmp_path / "b", filename="other"))


def test_a_run_that_goes_on_on_another_machine_is_no_other_run(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "KEPT_IN_CHECKPOINTS", 0)  # so that the files of checkpoints stay
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    interrupted(tmp_path, CLDCallback(dirpath=tmp_path), callbacks=[saver], enable_checkpointing=True)
    note = {"host": "elsewhere", "process": 1, "started": "2026-01-01"}
    (rows_folder(tmp_path) / "owner.json").write_text(json.dumps(note))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*another run saves.*")
        fit(tmp_path, CLDCallback(dirpath=tmp_path), ckpt_path=tmp_path / "epoch=1.ckpt")


HUGE = json.dumps({"host": socket.gethostname(), "process": 10**30, "started": ""})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"host": 1}', HUGE])
def test_a_damaged_note_of_another_run_ends_no_fit(tmp_path, text):
    folder = tmp_path / "cld-rows-0123"
    folder.mkdir()
    (folder / "owner.json").write_text(text)
    with pytest.warns(UserWarning, match="another run saves to .* too, unless it was killed: an unknown process"):
        fit(tmp_path, CLDCallback(dirpath=tmp_path))
    assert names(tmp_path) == ["cld-rows-0123", "cld-scores.npz", "cld-trajectories.npz"]


def test_folders_of_others_are_not_taken_for_an_interrupted_run(tmp_path, said):
    (tmp_path / "cld-rows-folder" / "inner").mkdir(parents=True)
    (tmp_path / "cld-rows-file").write_text("mine")
    (tmp_path / "cld-rows-link").symlink_to(tmp_path / "nowhere")
    fit(tmp_path, CLDCallback(dirpath=tmp_path))
    assert not [message for message in said if "interrupted" in message]
    assert names(tmp_path)[:3] == ["cld-rows-file", "cld-rows-folder", "cld-rows-link"]


def test_what_a_run_left_that_kept_no_losses_is_read_as_scores(tmp_path, said):
    interrupted(tmp_path, CLDCallback(dirpath=tmp_path, history="running"), epoch=3)
    left = rows_folder(tmp_path) / "scores.npz"
    fit(tmp_path, CLDCallback(dirpath=tmp_path))
    assert f"read it with CLDScores.load({str(left)!r}), or delete it" in said[1]
    assert left.exists()


def test_a_run_killed_before_it_logged_anything_leaves_no_folder_for_ever(tmp_path, said):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = tmp_path / "cld-rows-0123"
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps({"host": socket.gethostname(), "process": gone.pid, "started": ""}))
    (folder / ".after-000000.npz.0123456789abcdef.tmp").write_text("a part")
    fit(tmp_path, CLDCallback(dirpath=tmp_path))
    assert names(tmp_path) == ["cld-scores.npz", "cld-trajectories.npz"]
    assert len(said) == 1  # that the run has its scores


@pytest.mark.parametrize("alone", [True, False])
def test_a_part_of_a_file_that_a_kill_left_is_deleted_unless_another_run_may_be_writing_it(tmp_path, alone):
    part, other = ".cld-scores.npz.0123456789abcdef.tmp", ".cld-scores.npz.mine.tmp"
    for name in (part, other):
        (tmp_path / name).write_text("a part")
    if not alone:
        (tmp_path / "cld-rows-0123").mkdir()
        owner = {"host": "elsewhere", "process": 1, "started": ""}
        (tmp_path / "cld-rows-0123" / "owner.json").write_text(json.dumps(owner))
    fit(tmp_path, CLDCallback(dirpath=tmp_path))
    assert (tmp_path / part).exists() is not alone
    assert (tmp_path / other).exists()


def test_another_run_may_end_while_one_starts(tmp_path, monkeypatch):
    folder = tmp_path / "cld-rows-0123"
    folder.mkdir()
    (folder / "owner.json").write_text("{}")
    whole = row_files.exists

    def ends(place):
        there = whole(place)
        if Path(place).parent == folder and there:
            (folder / "owner.json").unlink()
        return there

    monkeypatch.setattr(row_files, "exists", ends)
    fit(tmp_path, CLDCallback(dirpath=tmp_path))
    assert names(tmp_path) == ["cld-rows-0123", "cld-scores.npz", "cld-trajectories.npz"]


# Holes


@pytest.mark.parametrize("history", ["full", "running"])
def test_messages_count_what_was_logged(tmp_path, said, history):
    class Fails(Classifier):
        def cld_step(self, batch):
            if self.current_epoch == 1 and not self.trainer.sanity_checking and self.trainer.global_step:
                raise RuntimeError("no memory")
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1]

    cld = CLDCallback(dirpath=tmp_path, history=history)
    with pytest.warns(UserWarning, match="after 2 epochs could not be logged"):
        fit(tmp_path, cld, Fails, max_epochs=6)
    assert cld.scores.epochs == [0, 1, 3, 4, 5, 6]
    assert "from 6 checkpoints" in said[-1]
    assert "checkpoints  6 (after 0, 1, 3, 4, 5, 6 epochs)" in cld.scores.summary()
    if history == "full":
        assert cld.trajectories.epochs == [0, 1, 2, 3, 4, 5, 6]
        assert "(6 checkpoints" in repr(cld.trajectories)
        with pytest.raises(ValueError, match=r"got 3 \(after \[0, 1, 3\] epochs\)"):
            cld.trajectories.score(cutoff_epoch=3)


@pytest.mark.parametrize("fails", [True, False])
def test_a_storage_that_is_gone_at_the_end_is_told_and_hides_no_other_error(tmp_path, monkeypatch, fails):
    def gone(*places):
        raise OSError("the storage is gone")

    class Ending(Classifier):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:  # too few for scores
                monkeypatch.setattr(results_module, "exists", gone)
                self.trainer.should_stop = True
                if fails:
                    raise RuntimeError("the user's own")

    def run():
        fit(tmp_path, CLDCallback(dirpath=tmp_path), Ending)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if fails:
            with pytest.raises(RuntimeError, match="the user's own"):
                run()
        else:
            run()
    assert any("could not be saved: the storage is gone" in str(warning.message) for warning in caught)

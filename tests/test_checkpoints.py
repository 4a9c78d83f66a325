import copy
import multiprocessing
import warnings
import weakref
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset
from toys import Blobs, Classifier, blobs, fit, quiet_trainer

from lightning_cld import CLDCallback, LossTrajectories, trajectories_from_checkpoints
from lightning_cld.recording.recorder import Recorder

STEPS = 6  # per epoch of `Blobs`
EPOCH_END = {"save_on_train_epoch_end": True}
VALIDATION_END = {"save_on_train_epoch_end": False}
LAST_BATCH = {"every_n_train_steps": STEPS}

pytestmark = [
    # Lightning warns about resuming in another folder, without the first run's callbacks, or from mid-epoch.
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*The dirpath has changed from.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*"),
    pytest.mark.filterwarnings(r"ignore:.*fit\(ckpt_path=.*"),
]


class SaveStart(Callback):
    """As in the guide."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.folder / "start.ckpt")


def train(root, cld=None, module=Classifier, datamodule=None, saver=EPOCH_END, callbacks=(), **arguments):
    """Trains and saves a checkpoint at every epoch; returns the Trainer, the module and the files."""
    folder = root / "saved"
    savers = [SaveStart(folder), ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **saver)]
    arguments = {"enable_checkpointing": True, **arguments}
    trainer, module = fit(root, cld, module, datamodule, callbacks=[*savers, *callbacks], **arguments)
    return trainer, module, sorted(folder.glob("*.ckpt"))


def scored(root, paths, module=Classifier, datamodule=None, precision="32-true", **arguments):
    """The trajectories from the files, with a fresh Trainer and module."""
    L.seed_everything(99, verbose=False)
    trainer = quiet_trainer(root, precision=precision)
    module = module if isinstance(module, nn.Module) else module()
    if "train_dataloader" not in arguments:
        datamodule = Blobs() if datamodule is None else datamodule
    return trajectories_from_checkpoints(trainer, module, paths, datamodule, **arguments)


def assert_same(found, logged):
    assert found.epochs == logged.epochs
    for losses, others in ((found.train_losses, logged.train_losses), (found.val_losses, logged.val_losses)):
        assert torch.equal(losses.view(torch.int32), others.view(torch.int32))  # bit for bit, NaN included
    assert (found.train_classes is None) == (logged.train_classes is None)
    if logged.train_classes is not None:
        assert torch.equal(found.train_classes, logged.train_classes)
        assert torch.equal(found.val_classes, logged.val_classes)
    assert found.fingerprint == logged.fingerprint


def edited(path, change):
    """Saves a changed copy of a checkpoint beside it and returns the path."""
    checkpoint = torch.load(path)
    changed = change(checkpoint)
    new = path.with_name(f"edited-{path.name}")
    torch.save(checkpoint if changed is None else changed, new)
    return new


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four epochs with `CLDCallback`: its trajectories and its checkpoint files."""
    root = tmp_path_factory.mktemp("run")
    cld = CLDCallback()
    _, _, files = train(root, cld)
    return cld.trajectories, files


# The same rows


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH], ids=str)
@pytest.mark.parametrize("workers", [0, 1])
def test_the_rows_are_those_that_the_callback_logged(tmp_path, saver, workers):
    cld = CLDCallback()
    _, _, files = train(tmp_path, cld, saver=saver)
    assert len(files) == 5
    found = scored(tmp_path, files, datamodule=Blobs(num_workers=workers))
    assert_same(found, cld.trajectories)
    assert torch.equal(found.score().values, cld.scores.values)


def test_any_order_and_kind_of_paths(tmp_path, run):
    logged, files = run
    assert_same(scored(tmp_path, reversed(files)), logged)
    assert_same(scored(tmp_path, {str(path) for path in files}), logged)


def test_the_callback_need_not_have_watched_and_the_files_may_hold_weights_only(tmp_path, run):
    logged, _ = run
    _, _, files = train(tmp_path, saver={**EPOCH_END, "save_weights_only": True})
    assert_same(scored(tmp_path, files), logged)


def test_the_trainer_and_the_module_of_the_run_will_do(tmp_path):
    cld = CLDCallback()
    trainer, module, files = train(tmp_path, cld)
    logged = copy.deepcopy(cld.trajectories)
    assert_same(trajectories_from_checkpoints(trainer, module, files, trainer.datamodule), logged)
    assert_same(cld.trajectories, logged)


def test_a_file_saved_when_training_is_over_is_of_its_last_epoch(tmp_path, run):
    logged, _ = run
    trainer, _, files = train(tmp_path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_same(scored(tmp_path, [*files[:3], files[4], tmp_path / "end.ckpt"]), logged)


@pytest.mark.parametrize("every_n_epochs", [2, 3])
def test_epochs_without_a_file_leave_no_holes(tmp_path, every_n_epochs):
    cld = CLDCallback(every_n_epochs=every_n_epochs)
    saver = {**EPOCH_END, "every_n_epochs": every_n_epochs}
    _, _, files = train(tmp_path, cld, saver=saver, max_epochs=3 * every_n_epochs)
    assert_same(scored(tmp_path, files), cld.trajectories)


@pytest.mark.parametrize("saver", [EPOCH_END, VALIDATION_END, LAST_BATCH], ids=str)
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "on_train_epoch_end"])
def test_files_of_a_run_that_was_resumed(tmp_path, saver, hook):
    class Cut(Classifier):
        def on_train_batch_start(self, *args):
            self.cut("on_train_batch_start")

        def on_train_epoch_start(self):
            self.cut("on_train_epoch_start")

        def on_train_epoch_end(self):
            self.cut("on_train_epoch_end")

        def cut(self, name):
            if name == hook and self.current_epoch == 2:
                raise RuntimeError("power cut")

    cld = CLDCallback()
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, CLDCallback(), Cut, saver=saver)
    newest = max((tmp_path / "saved").glob("epoch=*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))
    saver = ModelCheckpoint(tmp_path / "saved", "{epoch}-{step}", save_top_k=-1, **saver)
    fit(tmp_path, cld, ckpt_path=newest, callbacks=[saver], enable_checkpointing=True)
    files = [path for path in (tmp_path / "saved").glob("*.ckpt") if "-v1" not in path.name]
    assert_same(scored(tmp_path, files), cld.trajectories)


def test_files_of_a_run_that_was_resumed_with_max_steps_or_in_mid_epoch(tmp_path):
    for name, arguments, saver, step in [
        ("max_steps", {"max_epochs": -1, "max_steps": 4 * STEPS}, EPOCH_END, STEPS),
        ("mid_epoch", {}, {"every_n_train_steps": 4}, 4),
    ]:
        root = tmp_path / name
        train(root, CLDCallback(), saver=saver, **arguments)
        newest = next((root / "saved").glob(f"epoch=*step={step}.ckpt"))
        cld, folder = CLDCallback(), root / "resumed"
        savers = [
            ModelCheckpoint(folder, "{step}-end", save_top_k=-1, **EPOCH_END),
            ModelCheckpoint(folder, "{step}-mid", save_top_k=-1, every_n_train_steps=1),
        ]
        fit(root, cld, ckpt_path=newest, callbacks=savers, enable_checkpointing=True, **arguments)
        assert_same(scored(root, [root / "saved" / "start.ckpt", *folder.glob("*-end.ckpt")]), cld.trajectories)
        in_mid = [path for path in folder.glob("*-mid.ckpt") if int(path.stem[5:-4]) % STEPS]
        assert len(in_mid) >= 14
        for path in in_mid:
            with pytest.raises(ValueError, match="was saved in mid-epoch"):
                scored(root, [path])


def test_epochs_may_have_different_numbers_of_batches(tmp_path):
    class Varies(Blobs):
        def train_dataloader(self):
            self.loader["batch_size"] = (16, 8, 30, 15)[self.trainer.current_epoch % 4]
            return super().train_dataloader()

    for saver in (EPOCH_END, VALIDATION_END):
        cld, root = CLDCallback(batch_size=16), tmp_path / str(saver)
        _, _, files = train(root, cld, datamodule=Varies(), saver=saver, reload_dataloaders_every_n_epochs=1)
        assert_same(scored(root, files, batch_size=16), cld.trajectories)


@pytest.mark.parametrize(
    ("hook", "call", "completed"),
    [
        ("on_fit_start", 1, 0),
        ("on_train_start", 1, 0),
        ("on_train_epoch_start", 1, 0),
        ("on_train_batch_start", 1, 0),
        ("on_before_optimizer_step", 1, None),
        ("on_train_batch_start", 2, None),
        ("on_train_batch_end", STEPS, 1),
        ("on_validation_start", 1, 1),
        ("on_train_epoch_end", 1, 1),
        ("on_train_epoch_start", 2, 1),
        ("on_train_batch_start", STEPS + 1, None),
        ("on_train_batch_start", STEPS + 2, None),
        ("on_train_batch_end", 2 * STEPS, 2),
        ("on_train_end", 1, 4),
    ],
)
def test_completed_epochs_wherever_a_file_is_saved(tmp_path, hook, call, completed):
    class Dies(Classifier):
        calls = 0

    def raises(self, *args, **kwargs):
        self.calls += 1
        if self.calls == call:
            raise RuntimeError("power cut")

    setattr(Dies, hook, raises)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, None, Dies, callbacks=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    if completed is None:
        with pytest.raises(ValueError, match=r"on_exception.ckpt was saved in mid-epoch"):
            scored(tmp_path, [tmp_path / "on_exception.ckpt"])
    else:
        assert scored(tmp_path, [tmp_path / "on_exception.ckpt"]).epochs == [completed]


# Other models, losses and data


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path, precision):
    cld = CLDCallback()
    _, _, files = train(tmp_path, cld, precision=precision)
    assert_same(scored(tmp_path, files, precision=precision), cld.trajectories)
    in_full = CLDCallback()
    train(tmp_path / "full", in_full)
    assert not torch.equal(in_full.trajectories.train_losses, cld.trajectories.train_losses)


def test_a_datamodule_with_views_and_hooks(tmp_path):
    class Views(Blobs):
        def setup(self, stage):
            self.stage = stage

        def cld_train_dataloader(self):
            assert self.stage == "fit"
            return DataLoader(self.train_set, batch_size=10)

        def cld_val_dataloader(self):
            return DataLoader(self.val_set, batch_size=7)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            inputs, targets = batch
            return (inputs if self.trainer.validating else inputs + torch.randn_like(inputs)), targets

    cld = CLDCallback()
    _, _, files = train(tmp_path, cld, datamodule=Views())
    assert_same(scored(tmp_path, files, datamodule=Views()), cld.trajectories)


def test_a_train_set_that_changes_between_reads_shows_the_same_as_in_the_run(tmp_path):
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            inputs, target = super().__getitem__(index)
            return inputs + 0.1 * torch.randn(4), target

    cld = CLDCallback()
    with pytest.warns(UserWarning, match="differently when read twice"):
        _, _, files = train(tmp_path, cld, datamodule=Blobs(Augmented(*blobs().tensors)))
    with pytest.warns(UserWarning, match="differently when read twice"):
        found = scored(tmp_path, files, datamodule=Blobs(Augmented(*blobs().tensors)))
    assert_same(found, cld.trajectories)


def test_loaders_without_a_datamodule_and_a_loss_function(tmp_path):
    data = Blobs()
    loaders = {
        "train_dataloader": DataLoader(blobs(), 16, sampler=SubsetRandomSampler(data.train_set.indices)),
        "val_dataloader": data.val_dataloader(),
    }
    settings = {"loss_fn": nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1), "batch_size": 50}
    cld, module = CLDCallback(**settings), Classifier()
    savers = [SaveStart(tmp_path), ModelCheckpoint(tmp_path, save_top_k=-1)]
    quiet_trainer(tmp_path, cld, *savers, enable_checkpointing=True).fit(module, *loaders.values())
    found = scored(tmp_path, tmp_path.glob("*.ckpt"), **loaders, **settings)
    assert_same(found, cld.trajectories)
    assert found.train_losses.isnan().any()  # the sampler leaves out these positions


class Transformed(TensorDataset):
    def __init__(self, transform=None):
        super().__init__(*blobs().tensors)
        self.transform = transform

    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return inputs if self.transform is None else self.transform(inputs), label


def test_a_model_with_its_own_loaders_and_an_explicit_view(tmp_path):
    class OwnLoaders(Classifier):
        def train_dataloader(self):
            return DataLoader(Transformed(), 16, sampler=SubsetRandomSampler(Blobs().train_set.indices))

        def val_dataloader(self):
            return Blobs().val_dataloader()

    view = DataLoader(Transformed(lambda inputs: inputs + 1), batch_size=20)
    cld = CLDCallback(train_dataloader=view)
    savers = [SaveStart(tmp_path), ModelCheckpoint(tmp_path, save_top_k=-1)]
    quiet_trainer(tmp_path, cld, *savers, enable_checkpointing=True).fit(OwnLoaders())
    found = scored(tmp_path, tmp_path.glob("*.ckpt"), OwnLoaders, train_dataloader=view)
    assert_same(found, cld.trajectories)


def test_a_view_of_other_samples_with_the_same_labels_is_refused(tmp_path, run):
    _, files = run
    inputs, labels = blobs().tensors
    view = Subset(TensorDataset(inputs.flip(0), labels), Blobs().train_set.indices)
    data = Blobs()
    data.cld_train_dataloader = lambda: DataLoader(view, 16)
    with pytest.raises(ValueError, match="is not of the dataset that is trained on: some of its samples are other"):
        scored(tmp_path, files, datamodule=data)


def test_trajectories_say_what_is_known_of_the_train_set(tmp_path, run):
    logged, files = run
    assert scored(tmp_path, files).metadata["identity"] == logged.metadata["identity"]
    assert logged.metadata["identity"] == ["labels", "positions", "samples"]


def test_a_trainers_earlier_datamodule_is_not_used(tmp_path, run):
    class Other(Blobs):
        def cld_train_dataloader(self):
            raise AssertionError("is of another run")

    class OwnLoaders(Classifier):
        def train_dataloader(self):
            return Blobs().train_dataloader()

        def val_dataloader(self):
            return Blobs().val_dataloader()

    logged, files = run
    trainer, _ = fit(tmp_path, None, datamodule=Other(), max_epochs=1)
    assert_same(trajectories_from_checkpoints(trainer, OwnLoaders(), files), logged)
    assert isinstance(trainer.datamodule, Other)


def test_a_loss_that_depends_on_the_progress_of_the_training(tmp_path):
    class Anneals(Classifier):
        def cld_step(self, batch):
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return losses * (1 + self.current_epoch) + self.global_step, None

    cld = CLDCallback()
    trainer, _, files = train(tmp_path, cld, Anneals, saver=VALIDATION_END)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_same(scored(tmp_path, files, Anneals), cld.trajectories)
    assert_same(scored(tmp_path, [*files[:3], files[4], tmp_path / "end.ckpt"], Anneals), cld.trajectories)


@pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="new in lightning 2.6")
def test_weight_averaging_has_the_weights_that_are_trained(tmp_path):
    cld = CLDCallback()
    _, _, files = train(tmp_path, cld, callbacks=[lightning_callbacks.EMAWeightAveraging(decay=0.5)])
    assert_same(scored(tmp_path, files), cld.trajectories)


class CompiledNet(Classifier):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize(("trained", "given"), [(CompiledNet, Classifier), (Classifier, CompiledNet)])
def test_compiled_and_plain_weights_have_the_same_names(tmp_path, trained, given):
    cld = CLDCallback()
    _, _, files = train(tmp_path, cld, trained)
    assert any("_orig_mod." in name for name in torch.load(files[0])["state_dict"]) == (trained is CompiledNet)
    assert_same(scored(tmp_path, files, given), cld.trajectories)


def test_a_compiled_module(tmp_path, run):
    logged, files = run
    model = torch.compile(Classifier(), backend="eager")
    before = copy.deepcopy(model.state_dict())
    assert_same(scored(tmp_path, files, model), logged)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_that_make_and_load_the_model(tmp_path, run):
    class Late(Classifier):
        def configure_model(self):
            if not hasattr(self, "body"):
                self.body = self.net
                del self.net

        def forward(self, inputs):
            return self.body(inputs)

        def on_load_checkpoint(self, checkpoint):
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.replace("net.", "body."): value for name, value in weights.items()}

    logged, files = run
    assert_same(scored(tmp_path, files, Late), logged)


def test_a_model_that_is_not_loaded_strictly_keeps_what_the_files_lack(tmp_path, run):
    logged, files = run
    untrained = Classifier()
    untrained.strict_loading = False

    def drop(checkpoint):
        del checkpoint["state_dict"]["net.0.weight"]

    assert_same(scored(tmp_path, [files[0], *[edited(path, lambda checkpoint: None) for path in files[1:]]]), logged)
    found = scored(tmp_path, [edited(path, drop) for path in files], untrained)
    assert found.epochs == logged.epochs
    assert not torch.equal(found.train_losses, logged.train_losses)


# Side effects


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(tmp_path, run, precision, fails):
    class Fails(Blobs):
        def cld_train_dataloader(self):
            return DataLoader(_FailsLater(self.train_set) if fails else self.train_set, batch_size=16)

    _, files = run
    module = Classifier()
    module.net[1].eval()
    buffer = module.net[1].running_mean
    before = copy.deepcopy(module.state_dict())
    modes = [submodule.training for submodule in module.modules()]
    parameters = list(module.parameters())
    if fails:
        with pytest.raises(OSError, match="disk is gone"):
            scored(tmp_path, files, module, Fails(), precision=precision)
    else:
        scored(tmp_path, files, module, Fails(), precision=precision)
    for name, value in module.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    assert [submodule.training for submodule in module.modules()] == modes
    assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
    assert module.net[1].running_mean is buffer


class _FailsLater(torch.utils.data.Dataset):
    """Fails at the second sweep."""

    def __init__(self, dataset):
        self.dataset, self.reads = dataset, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > 2 * len(self.dataset):
            raise OSError("disk is gone")
        return self.dataset[index]


class Noted(CSVLogger):
    saves = 0

    def save(self):
        self.saves += 1
        super().save()


@pytest.mark.parametrize("fails", [False, True])
def test_the_trainer_is_as_it_was(tmp_path, run, fails):
    logger = Noted(tmp_path / "logs")
    trainer, module, files = train(tmp_path, logger=logger, num_sanity_val_steps=2, callbacks=[CLDCallback()])
    saves = logger.saves
    callbacks, optimizers, logs = list(trainer.callbacks), trainer.optimizers, _tree(tmp_path)
    momentum = copy.deepcopy(trainer.optimizers[0].state_dict())
    if fails:
        files = [*files, edited(files[0], lambda checkpoint: checkpoint["loops"]["fit_loop"].clear())]
        with pytest.raises(ValueError, match="does not say how many epochs"):
            trajectories_from_checkpoints(trainer, module, files, Blobs())
        files[-1].unlink()
    else:
        trajectories_from_checkpoints(trainer, module, files, Blobs())
    assert (trainer.current_epoch, trainer.global_step) == (4, 4 * STEPS)
    assert trainer.loggers == [logger]
    assert logger.saves == saves
    assert trainer.callbacks == callbacks
    assert trainer.num_sanity_val_steps == 2
    assert trainer.optimizers is optimizers
    assert torch.equal(
        trainer.optimizers[0].state_dict()["state"][0]["momentum_buffer"], momentum["state"][0]["momentum_buffer"]
    )
    assert _tree(tmp_path) == logs
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, datamodule=Blobs())
    assert trainer.current_epoch == 5


def _tree(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_nothing_is_trained_validated_or_logged(tmp_path, run):
    class Watched(Classifier):
        called = ()

    def note(name):
        def noted(self, *args, **kwargs):
            self.called = (*self.called, name)

        return noted

    for hook in ("training_step", "validation_step", "on_train_start", "on_train_end", "on_validation_start"):
        setattr(Watched, hook, note(hook))
    _, files = run
    module = Watched()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*treespec.*")
        trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
        trajectories_from_checkpoints(trainer, module, files, Blobs())
    assert module.called == ()
    assert not any(tmp_path.iterdir())


def test_one_checkpoint_is_in_memory_at_a_time(tmp_path, run, monkeypatch):
    _, files = run
    load, loaded = torch.load, []

    def watched_load(*args, **kwargs):
        assert all(weights() is None for weights in loaded)
        checkpoint = load(*args, **kwargs)
        loaded.append(weakref.ref(checkpoint["state_dict"]["net.0.weight"]))
        return checkpoint

    monkeypatch.setattr(torch, "load", watched_load)
    scored(tmp_path, files)
    assert len(loaded) >= len(files)


def test_no_workers_wait_for_a_training_during_the_sweeps(tmp_path, run, monkeypatch):
    record, seen, before = Recorder.record, [], len(multiprocessing.active_children())

    def watched_record(self, *args):
        seen.append(len(multiprocessing.active_children()) - before)
        record(self, *args)

    monkeypatch.setattr(Recorder, "record", watched_record)
    scored(tmp_path, run[1], datamodule=Blobs(num_workers=1, persistent_workers=True))
    assert seen == [0] + [1] * (len(run[1]) - 1)  # the train sweep keeps its one worker
    assert len(multiprocessing.active_children()) == before


def test_the_trajectories_say_where_they_are_from_and_can_be_saved(tmp_path, run):
    logged, files = run
    found = scored(tmp_path, files)
    assert found.metadata["model"] == "Classifier"
    assert found.metadata["precision"] == "32-true"
    assert found.metadata["checkpoints"] == [str(files[-1]), *map(str, files[:-1])]
    assert_same(LossTrajectories.load(found.save(tmp_path / "found.npz")), logged)


# Errors and warnings


@pytest.fixture
def untouched(monkeypatch):
    """Fails the test if a sweep begins."""

    def record(self, *args):
        raise AssertionError("a sweep began")

    monkeypatch.setattr(Recorder, "record", record)


class Wider(Classifier):
    def __init__(self):
        super().__init__()
        self.net[4] = nn.Linear(16, 5)


class Deeper(Classifier):
    def __init__(self):
        super().__init__()
        self.net.append(nn.Linear(3, 3))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Wider, r"does not fit this Wider: net.4.weight has shape \[3, 16\], not \[5, 16\]; net.4.bias"),
        (Deeper, r"does not fit this Deeper: net.5.weight is missing.*hyperparameters"),
    ],
)
def test_a_file_of_another_model_is_refused_before_the_first_sweep(tmp_path, run, module, message):
    with pytest.raises(ValueError, match=message):
        scored(tmp_path, run[1], module)


@pytest.mark.usefixtures("untouched")
def test_one_other_file_among_the_good_ones_is_refused_before_the_first_sweep(tmp_path, run):
    _, files = run
    _, _, others = train(tmp_path, module=Deeper, max_epochs=5)
    other = next(path for path in others if "epoch=4" in path.name)
    with pytest.raises(ValueError, match=r"epoch=4.*Classifier: net.5.weight is not a weight of this model"):
        scored(tmp_path, [*files, other])


@pytest.mark.usefixtures("untouched")
def test_a_model_that_is_not_loaded_strictly_must_share_some_weights(tmp_path, run):
    def rename(checkpoint):
        checkpoint["state_dict"] = {f"old.{name}": value for name, value in checkpoint["state_dict"].items()}

    module = Classifier()
    module.strict_loading = False
    with pytest.raises(ValueError, match="none of this model's weights"):
        scored(tmp_path, [edited(path, rename) for path in run[1]], module)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda checkpoint: checkpoint["state_dict"], "not a checkpoint of a Trainer: it holds a OrderedDict without"),
        (lambda checkpoint: checkpoint["state_dict"]["net.0.weight"], "it holds a Tensor without a state_dict"),
        (lambda checkpoint: checkpoint.pop("loops") and None, "does not say how many epochs were completed"),
        (lambda checkpoint: checkpoint["loops"].update(fit_loop=None), "does not say how many epochs were completed"),
    ],
)
def test_a_file_without_weights_or_epochs_is_refused(tmp_path, run, change, message):
    with pytest.raises(ValueError, match=message):
        scored(tmp_path, [*run[1][:2], edited(run[1][2], change)])


@pytest.mark.usefixtures("untouched")
def test_a_damaged_file_is_refused(tmp_path, run):
    whole = run[1][0].read_bytes()
    pickle_at = whole.index(b"data.pkl") + 200
    for name, content in {
        "empty": b"",
        "text": b"epoch,loss\n0,1.0\n",
        "truncated": whole[: len(whole) // 2],
        "changed": whole[:pickle_at] + b"\xff" * 50 + whole[pickle_at + 50 :],
    }.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.ckpt is damaged or not a checkpoint file"):
            scored(tmp_path, [*run[1], path])


@pytest.mark.usefixtures("untouched")
def test_two_files_of_the_same_epoch_are_refused_by_name(tmp_path, run):
    _, files = run
    copied = tmp_path / "last.ckpt"
    copied.write_bytes(files[1].read_bytes())
    with pytest.raises(
        ValueError, match=rf"{files[1].name} and .*last.ckpt were both saved after 2 completed.*Leave one"
    ):
        scored(tmp_path, [*files, copied])


@pytest.mark.usefixtures("untouched")
def test_a_file_from_mid_epoch_is_refused(tmp_path):
    _, _, files = train(tmp_path, saver={"every_n_train_steps": 4}, max_epochs=1)
    with pytest.raises(
        ValueError, match=r"step=4.ckpt was saved in mid-epoch.*after 4 batches of epoch 1.*Leave it out"
    ):
        scored(tmp_path, files)


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        ([], ValueError, "paths is empty"),
        ("saved/epoch=0.ckpt", TypeError, r"single path 'saved/epoch=0.ckpt'.*glob"),
        (Path("saved"), TypeError, "single path"),
        (["nowhere.ckpt"], FileNotFoundError, "nowhere.ckpt does not exist"),
        (["."], FileNotFoundError, "is a folder"),
    ],
)
def test_bad_paths(tmp_path, monkeypatch, paths, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        scored(tmp_path, paths)


class WithPath(Classifier):
    def __init__(self, root=Path("data")):
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_of_other_types(tmp_path):
    cld = CLDCallback()
    _, _, files = train(tmp_path, cld, WithPath)
    with pytest.raises(ValueError, match=r"pathlib\S*PosixPath.*add_safe_globals.*weights_only=False"):
        scored(tmp_path, files, WithPath)
    assert_same(scored(tmp_path, files, WithPath, weights_only=False), cld.trajectories)
    with torch.serialization.safe_globals([type(Path())]):
        assert_same(scored(tmp_path, files, WithPath), cld.trajectories)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork"])
@pytest.mark.parametrize("devices", [1, 2])
def test_several_processes_are_refused(tmp_path, run, strategy, devices):
    trainer = quiet_trainer(tmp_path, devices=devices, strategy=strategy)
    with pytest.raises(ValueError, match=rf"has {devices} with DDPStrategy.*Trainer\(devices=1\)"):
        trajectories_from_checkpoints(trainer, Classifier(), run[1], Blobs())


def test_bad_arguments(tmp_path, run):
    files, trainer = run[1], quiet_trainer(tmp_path)
    with pytest.raises(TypeError, match=r"model must be a LightningModule, got <class"):
        trajectories_from_checkpoints(trainer, Classifier, files, Blobs())
    with pytest.raises(ValueError, match=r"no train set: give datamodule=\.\.\., or train_dataloader=\.\.\."):
        trajectories_from_checkpoints(trainer, Classifier(), files)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        scored(tmp_path, files, batch_size=0)
    with pytest.raises(ValueError, match="reduction='none'"):
        scored(tmp_path, files, loss_fn=nn.CrossEntropyLoss())
    with pytest.raises(
        ValueError, match=r"no validation data.*val_dataloader=\.\.\. to CLDCallback or trajectories_from"
    ):
        scored(tmp_path, files, train_dataloader=Blobs().train_dataloader())


def test_a_missing_theta_0_is_warned_of(tmp_path, run):
    with pytest.warns(UserWarning, match=r"theta_0 is missing.*trainer.save_checkpoint\(\.\.\.\) in on_train_start"):
        found = scored(tmp_path, [path for path in run[1] if path.name != "start.ckpt"])
    assert found.epochs == [1, 2, 3, 4]


def test_too_few_files_are_warned_of(tmp_path, run):
    with pytest.warns(UserWarning, match="2 files give 2 checkpoints, and a CLD score needs at least 4"):
        assert scored(tmp_path, [run[1][4], run[1][0]]).epochs == [0, 1]

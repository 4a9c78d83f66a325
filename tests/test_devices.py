"""Everything that touches losses, on the tests' own device: no devices mix, and no batch waits for the device.

The device itself is tested in `test_fake_device.py`. Results are compared with those on the CPU.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_cld import CLDCallback, CLDMetric, LossTrajectories, baselines, cld_scores, select_top
from lightning_cld.functional import diagnostics, moments, selection
from lightning_cld.recording import sweep as sweep_module
from lightning_cld.recording.batch_hooks import BatchHooks
from lightning_cld.recording.batch_losses import make_step
from lightning_cld.recording.running_history import RunningHistory
from lightning_cld.recording.settling import Settling
from lightning_cld.recording.sweep import Sweep
from lightning_cld.recording.training_steps import StepLosses
from lightning_cld.showing.thumbnails import read_images
from tests.fake_device import DEVICE, FakeCuda
from tests.oracles import losses
from tests.toys import Blobs, Classifier, blobs, quiet_trainer

TRAIN, VAL = losses(9, 300), losses(9, 60, seed=1)
CLASSES, VAL_CLASSES = torch.arange(300) % 3, torch.arange(60) % 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer.*"),
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true but no accelerator.*"),
    pytest.mark.filterwarnings("ignore:.*Can't initialize NVML.*"),
]


class Accelerator(CPUAccelerator):
    """Lets the Trainer have its device."""

    def setup_device(self, device):
        pass


class Decays(Classifier):
    """Shrinks its weights instead of training them, since the device has no autograd."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for weight in self.parameters():
                weight.mul_(0.99)

    def configure_optimizers(self):
        return None


class Steps(Decays):
    """Returns what `record="step"` asks for."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        with torch.no_grad():
            sample_losses = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return {"loss": sample_losses.mean(), "sample_losses": sample_losses, "sample_index": batch[2]}


class Indexed(Blobs):
    """Batches that hold positions too."""

    def __init__(self, **loader):
        super().__init__(**loader)
        places = torch.arange(len(self.train_set))
        samples = [self.train_set[place] for place in places.tolist()]
        inputs, targets = torch.stack([one[0] for one in samples]), torch.stack([one[1] for one in samples])
        self.train_set = torch.utils.data.TensorDataset(inputs, targets, places)


def there(tensor):
    return tensor.to(DEVICE)


def trainer_there(root, *callbacks, **arguments):
    strategy = SingleDeviceStrategy(device="cuda:0", accelerator=Accelerator())
    return quiet_trainer(root, *callbacks, strategy=strategy, **{"accelerator": "auto", **arguments})


def on(device, run, **tensors):
    """What `run` returns, with its tensors on the CPU or on the device; and what it waited for there."""
    if device == "cpu":
        return run(**tensors), []
    with FakeCuda() as fake:
        moved = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
        fake.waits.clear()
        result = run(**moved)
        return result, fake.waits


def by_place(waits):
    """Counts of what the library waited for, by place."""
    return Counter(f"{wait.place} {wait.what}" for wait in waits if wait.place)


# --- computations: the same results, and nothing but a constant number of waits


def of_settling(train, val):
    settling = Settling()
    epoch = settling.epoch(LossTrajectories(train, val, CLASSES, VAL_CLASSES))
    return torch.tensor([-1 if epoch is None else epoch, *(settling.overlaps or ())])


def of_metric(train, val):
    metric = CLDMetric(CLASSES, VAL_CLASSES).to(train.device)
    for train_row, val_row in zip(train, val, strict=True):
        metric.update(train_row, val_row)
    assert metric.compute().device == train.device
    return metric.compute()


def of_running(train, val):
    history = RunningHistory.of_losses(train[:1], val[:1], CLASSES, VAL_CLASSES)
    for epoch in range(1, len(train)):
        history.leave_hole(epoch) if epoch == 4 else history.record(epoch, train[epoch], val[epoch])
    again = RunningHistory.from_state_dict(history.state_dict()).to(train.device)
    assert again.values().device == history.values().device == train.device
    return again.score().values


def of_trajectories(train, val, **arguments):
    history = LossTrajectories(train[:1], val[:1], CLASSES, VAL_CLASSES)
    for epoch in range(1, len(train)):
        history.record(epoch, train[epoch], val[epoch])
    again = LossTrajectories.from_state_dict(history.state_dict()).to(train.device)
    again.leave_hole(len(train))
    assert again.train_losses.device == again.val_losses.device == train.device
    scores = again.score(**arguments)
    return torch.stack(
        [scores.values, *(part for part in (scores.plausibility, scores.confidence) if part is not None)]
    )


def of_part(train, val):
    outside = CLASSES.masked_fill(torch.arange(300) < 30, -1)
    scores = LossTrajectories(train, val, outside, VAL_CLASSES).score(cutoff_epoch=8, every_n_epochs=2)
    assert scores.metadata["reference_reliability"].keys() == {"0", "1", "2"}
    return scores.values


def with_holes(train, val):
    train, val = train.clone(), val.clone()
    train[3], val[3] = torch.nan, torch.nan
    train[5, :20] = torch.nan
    train[6, 20:30] = torch.inf
    return cld_scores(train, val, CLASSES, VAL_CLASSES)


def of_steps(train, val):
    steps = LossTrajectories(train, val, CLASSES, VAL_CLASSES, from_steps=True)
    return steps.score().values


def drawn(train, val):
    scores = cld_scores(train, val, CLASSES, VAL_CLASSES)
    return selection.select_drawn(scores, scores.abs() / 5, CLASSES.to(train.device), fraction=0.2, seed=3)


def diagnosed(train, val):
    scores, others = cld_scores(train, val, CLASSES, VAL_CLASSES), cld_scores(train[:6], val[:6], CLASSES, VAL_CLASSES)
    means = diagnostics.alignment(scores, CLASSES)
    return torch.tensor(
        [
            diagnostics.rank_agreement(scores, others, CLASSES),
            diagnostics.overlap(diagnostics.best_tenth(scores, CLASSES), diagnostics.best_tenth(others, CLASSES)),
            means.kept,
            *means.everything_of_class.tolist(),
        ]
    )


COMPUTATIONS = {
    "cld_scores": lambda train, val: cld_scores(train, val, CLASSES, VAL_CLASSES),
    "cld_scores, classes there": lambda train, val: cld_scores(
        train, val, CLASSES.to(train.device), VAL_CLASSES.to(val.device)
    ),
    "cld_scores, one class": lambda train, val: cld_scores(train, val),
    "cld_scores, holes": with_holes,
    "select_top": lambda train, val: select_top(train[0], CLASSES, fraction=0.3),
    "select_top, classes there": lambda train, val: select_top(train[0], CLASSES.to(train.device), per_class=5),
    "select_drawn": drawn,
    "score": of_trajectories,
    "score, part": of_part,
    "score, steps": of_steps,
    "values": lambda train, val: LossTrajectories(train, val, CLASSES, VAL_CLASSES).values(6),
    "running": of_running,
    "metric": of_metric,
    "settling": of_settling,
    "diagnostics": diagnosed,
    **{
        name: partial(of_trajectories, by=getattr(baselines, name))
        for name in (
            "random_values",
            "highest_mean_loss",
            "lowest_mean_loss",
            "area_under_loss",
            "confidence",
            "variability",
            "uncertainty",
            "dual",
        )
    },
    **{
        name: lambda train, val, name=name: getattr(baselines, name)(LossTrajectories(train, val, CLASSES, VAL_CLASSES))
        for name in ("near_zero_cld", "lowest_cld", "stratified_cld")
    },
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_a_computation_gives_the_same_on_the_device(name):
    expected, _ = on("cpu", COMPUTATIONS[name], train=TRAIN, val=VAL)
    got, _ = on("cuda", COMPUTATIONS[name], train=TRAIN, val=VAL)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "name", ["cld_scores", "cld_scores, one class", "score", "values", "running", "metric", "settling", "diagnostics"]
)
def test_waits_do_not_grow_with_the_samples(monkeypatch, name):
    counts = []
    for elements in (2**17, 2**7):  # one slice for all samples, then slices of 14 or 128 samples
        monkeypatch.setattr(moments, "_SLICE", elements)
        monkeypatch.setattr("lightning_cld.functional.cld._SLICE_SAMPLES", elements)
        monkeypatch.setattr("lightning_cld.functional.confidence._SLICE", elements)
        counts.append(by_place(on("cuda", COMPUTATIONS[name], train=TRAIN, val=VAL)[1]))
    assert counts[0] == counts[1]
    assert counts[0].total() > 0


def test_each_checkpoint_waits_as_often_as_the_one_before():
    with FakeCuda() as fake:
        for history in (RunningHistory, LossTrajectories):
            begin = RunningHistory.of_losses if history is RunningHistory else LossTrajectories
            kept = begin(there(TRAIN[:1]), there(VAL[:1]), CLASSES, VAL_CLASSES)
            counts = []
            for epoch in range(1, 9):
                train_row, val_row = there(TRAIN[epoch]), there(VAL[epoch])
                fake.waits.clear()
                kept.record(epoch, train_row, val_row)
                counts.append(by_place(fake.waits))
            assert all(count == counts[0] for count in counts)
            assert counts[0].total() <= (10 if history is RunningHistory else 0)


# --- the sweep


def swept(root, batch_size, *, loss_fn=None, sweeps=2, positions=None):
    """What a sweep of 120 samples gives, the oracle for it, and what each of some sweeps waited for in the library."""
    with FakeCuda() as fake:
        module, positions = Decays(), torch.arange(120) if positions is None else positions
        loader = DataLoader(blobs(120), batch_size=batch_size)
        trainer = trainer_there(root)
        trainer.strategy.connect(module)
        expected = Sweep(loader, positions, batch_size=None, kind="train").run(
            connected(quiet_trainer(root), module), module, make_step(module, loss_fn), BatchHooks([], module)
        )
        module.to(DEVICE)
        step, hooks = make_step(module, loss_fn), BatchHooks([], module)
        sweep = Sweep(loader, positions, batch_size=None, kind="train", fixed=True)
        waits = []
        for _ in range(sweeps):
            fake.waits.clear()
            got = sweep.run(trainer, module, step, hooks)
            waits.append(by_place(fake.waits))
        assert got[0].device == DEVICE
        return [part.cpu() for part in got], expected, waits


def connected(trainer, module):
    trainer.strategy.connect(module)
    return trainer


def documented_waits():
    """In a later sweep, and in the first one."""
    said = re.search(r"device at most (\d+) times, in the first sweep (\d+)", " ".join(Sweep.run.__doc__.split()))
    return int(said[1]), int(said[2])


def check_batches_do_not_wait(root, **arguments):
    """Raises if a sweep of 30 batches waits more often than one of 3."""
    (_, few), (_, many) = (swept(root, batch_size, **arguments)[2] for batch_size in (40, 4))
    assert few == many
    return few


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(reduction="none", weight=torch.tensor([1.0, 2.0, 3.0]))])
def test_a_sweep_on_the_device(tmp_path, loss_fn):
    for positions in (None, torch.arange(0, 120, 2)):
        got, expected, _ = swept(tmp_path, 16, loss_fn=loss_fn, positions=positions)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0, equal_nan=True)
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(reduction="none")])
@pytest.mark.parametrize("positions", [torch.arange(120), torch.arange(0, 120, 2)])
def test_no_batch_waits_and_a_sweep_waits_a_documented_number_of_times(tmp_path, loss_fn, positions):
    waits = check_batches_do_not_wait(tmp_path, loss_fn=loss_fn, positions=positions)
    later, at_first = documented_waits()
    assert 0 < waits.total() <= later
    first = swept(tmp_path, 40, loss_fn=loss_fn, positions=positions)[2][0]
    # Beside those, looks at the two tensors of the first batch, before and after the hooks that may prepare it.
    looks = sum(count for place, count in first.items() if place.startswith("data/parts.py"))
    assert looks <= 4
    assert first.total() - looks <= at_first


# --- the whole callback, in a fit


def fitted(root, *, batch_size=16, module=Decays, data=Blobs, **plan):
    """Fits on the device, and returns the callback and what the library waited for."""
    cld = CLDCallback(**plan)
    with FakeCuda() as fake:
        torch.manual_seed(0)
        datamodule = data(batch_size=batch_size)
        datamodule.val_dataloader = lambda: DataLoader(datamodule.val_set, batch_size=batch_size)
        trainer = trainer_there(root, cld, max_epochs=4)
        trainer.fit(module(), datamodule=datamodule)
        scores = cld.scores
    assert not scores.values.isnan().any()
    return cld, by_place(fake.waits)


class Places(IterableDataset):
    """A dataset as a stream whose samples say their position or name."""

    def __init__(self, dataset, named):
        self.dataset, self.named = dataset, named

    def __iter__(self):
        return ((*sample, str(place) if self.named else place) for place, sample in enumerate(self.dataset))


class Streamed(Blobs):
    def __init__(self, batch_size, *, named):
        super().__init__()
        self.batch_size, self.named = batch_size, named

    def train_dataloader(self):
        return DataLoader(Places(self.train_set, self.named), batch_size=self.batch_size)


class Tells(Decays):
    """Says which samples a batch holds, if it is of the stream."""

    def cld_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none"), *batch[1:]


PLANS = {
    "full": {},
    "running": {"history": "running"},
    "settling": {"cutoff_epoch": "auto"},
    "buffers on the CPU": {"buffer_device": "cpu"},
    "steps": {"record": "step", "module": Steps, "data": Indexed},
    "stream": {"num_samples": 90, "module": Tells, "data": partial(Streamed, named=False)},
    "stream of names": {"module": Tells, "data": partial(Streamed, named=True)},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_fit_on_the_device(tmp_path, plan):
    _, few = fitted(tmp_path, batch_size=45, **PLANS[plan])
    cld, many = fitted(tmp_path, batch_size=9, **PLANS[plan])
    assert few == many
    assert len(cld.scores.epochs) == 5
    assert all(
        tensor.device.type == "cpu"
        for tensor in torch.utils._pytree.tree_leaves(cld.state_dict())
        if isinstance(tensor, torch.Tensor)
    )


def test_no_more_of_the_device_is_reserved_than_said(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_cld.recording.recorder._RESERVED", 3 * 4 * 120)
    cld, _ = fitted(tmp_path)
    assert len(cld.trajectories._train._buffer) == 5  # put together once, to be scored
    monkeypatch.setattr("lightning_cld.storage.rows.Rows.reserve", lambda rows, count: reserved.add(count))
    reserved: set[int] = set()
    fitted(tmp_path)
    assert reserved == {3}


def test_training_steps_wait_only_at_the_first():
    with FakeCuda() as fake:
        steps = StepLosses()
        trainer = quiet_trainer("unused")
        steps.start(trainer, 40, DEVICE)
        for number in range(5):
            index = torch.arange(8) + 8 * number
            fake.waits.clear()
            steps.add(trainer, {"sample_losses": there(torch.rand(8)), "sample_index": index})
            if number:
                assert by_place(fake.waits) == {}
        fake.waits.clear()
        assert not steps.row(trainer).cpu().isnan().any()
        assert by_place(fake.waits).total() == 1


# --- faults of each kind are seen


def test_a_batch_that_stays_on_the_host_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "batch_to_device", lambda strategy, batch, **_: batch)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        check_batches_do_not_wait(tmp_path)


def test_mixed_devices_in_a_computation_are_seen(monkeypatch):
    own = moments.class_reference
    monkeypatch.setattr(moments, "class_reference", lambda *arguments: own(*arguments).cpu())
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        on("cuda", COMPUTATIONS["running"], train=TRAIN, val=VAL)
    with pytest.raises(RuntimeError, match="Encountered different devices"):  # torchmetrics' words for the same
        on("cuda", COMPUTATIONS["metric"], train=TRAIN, val=VAL)


def test_a_wait_for_each_batch_is_seen(tmp_path, monkeypatch):
    own = sweep_module.check_batch

    def with_values(losses, classes, samples):
        own(losses, classes, samples)
        if losses.isnan().any():
            raise ValueError("NaN")

    monkeypatch.setattr(sweep_module, "check_batch", with_values)
    with pytest.raises(AssertionError, match="_evaluate"):
        check_batches_do_not_wait(tmp_path)


def test_a_transfer_that_waits_is_seen(tmp_path, monkeypatch):
    def blocking(strategy, batch, **_):
        return [part.to(strategy.root_device) for part in batch]

    monkeypatch.setattr(SingleDeviceStrategy, "batch_to_device", blocking)
    with pytest.raises(AssertionError, match="copy to the device"):
        check_batches_do_not_wait(tmp_path)


def test_a_hidden_item_is_seen(monkeypatch):
    own = moments._norm
    monkeypatch.setattr(moments, "_norm", lambda *arguments: own(*arguments) * own(*arguments).isfinite().any().item())
    with pytest.raises(AssertionError):
        test_waits_do_not_grow_with_the_samples(monkeypatch, "running")


def test_losses_that_are_read_at_each_step_are_seen(monkeypatch):
    own = StepLosses._check

    def reads(self, outputs):
        own(self, outputs)
        if outputs["sample_losses"].max() > 1e6:
            raise ValueError("too large")

    monkeypatch.setattr(StepLosses, "_check", reads)
    with pytest.raises(AssertionError, match=r"training_steps\.py"):
        test_training_steps_wait_only_at_the_first()


def test_images_on_the_device_are_shown():
    image = torch.rand(3, 8, 8)
    expected = read_images([image], [0])
    with FakeCuda():
        assert torch.equal(read_images([image.to(DEVICE)], [0]), expected)

"""The pieces of `gpu.py`: each does its work bit by bit, in any number of calls, and makes a table of what is done."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _gpu_runs import (
    BATCH,
    DrawnAnew,
    ImagesThere,
    OneByOne,
    ResNetClassifier,
    Run,
    Saves,
    SplitsThere,
    Times,
    cifar_splits,
    made_up,
    made_up_splits,
    trainer_of,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, LossTrajectories, baselines, cld_scores
from lightning_cld.recording.batch_hooks import BatchHooks
from lightning_cld.recording.batch_losses import make_step
from lightning_cld.recording.sweep import Sweep

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
METHODS = ("random", "fresh random", "top", "draw")
FRACTIONS = (0.1, 0.3)

# (a) Is training bit by bit the same with and without the callback?


def identity(run: Run) -> None:
    for precision in PRECISIONS:
        if precision == "16-mixed" and run.device.type == "cpu":
            continue  # Lightning has it for GPUs only
        for history in ("full", "running"):
            key = {"precision": precision, "history": history}
            run.once("identity", key, lambda precision=precision, history=history: _compare(run, precision, history))


def _compare(run: Run, precision: str, history: str) -> dict[str, Any]:
    """Fits without the callback, without it again, and with it."""
    splits = SplitsThere(made_up_splits(run, min(run.sizes.images, 16 * BATCH)), run.device)
    ends = []
    torch.use_deterministic_algorithms(True)
    try:
        for watched in (False, False, True):
            callbacks = [CLDCallback(history=history, dirpath=run.work / "identity")] if watched else []
            module = ResNetClassifier(splits.train, 10, run.sizes.width, seed=0, epochs=4)
            trainer_of(run, 4, *callbacks, precision=precision).fit(module, datamodule=splits)
            states = [torch.get_rng_state()]
            states += torch.cuda.get_rng_state_all() if run.device.type == "cuda" else []
            ends.append(({name: value.cpu() for name, value in module.state_dict().items()}, states))
    finally:
        torch.use_deterministic_algorithms(False)
    plain, again, watched = ends
    return {
        "deterministic": _same(plain, again),
        "identical": _same(plain, watched),
        "largest_difference": max(float((plain[0][n].double() - watched[0][n].double()).abs().max()) for n in plain[0]),
        "scored": int(CLDScores.load(run.work / "identity" / "cld-scores.npz").values.isfinite().sum()),
    }


def _same(first: Any, second: Any) -> bool:
    weights = all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    return weights and all(map(torch.equal, first[1], second[1]))


# (b) What does a sweep cost, and does it wait for the device?


def sweep(run: Run) -> None:
    splits = cifar_splits(run.work) or made_up_splits(run)
    there = SplitsThere(splits, run.device)
    classes = int(splits[0].targets.max()) + 1
    model = ResNetClassifier(there.train, classes, run.sizes.width, seed=0, epochs=2)
    run.once("epoch", {"precision": run.precision}, lambda: _time_epoch(run, there, model), 20)
    model = ResNetClassifier(there.train, classes, run.sizes.width, seed=0, epochs=2)
    epoch = run.rows("epoch")[-1]["epoch_seconds"]
    on_device = {"collate_fn": there.train_dataloader().collate_fn}
    through = {"num_workers": run.workers, "persistent_workers": True, "pin_memory": run.device.type == "cuda"}
    for data, dataset, loading in (
        ("on the device", there.train, on_device),
        (f"{run.workers} workers", OneByOne(splits[0]), through),
    ):
        for size in (BATCH, 1024):
            work = _sweeping(run, model, DataLoader(dataset, size, shuffle=True, **loading), loading)
            key = {"data": data, "batch_size": size, "precision": run.precision}
            run.once("sweep", key, lambda work=work: _time_sweep(run, *work, epoch), 20)
    for count in run.sizes.batches:
        images = made_up(count * 32)
        loader = SplitsThere([images, images, images], run.device).train_dataloader()
        loader = DataLoader(loader.dataset, 32, collate_fn=loader.collate_fn)
        work = _sweeping(run, model, loader, on_device)[0]
        run.once("waits", {"batches": count}, lambda work=work: _count_waits(run, work))


def _time_epoch(run: Run, splits: SplitsThere, model: ResNetClassifier) -> dict[str, Any]:
    times = Times(run)
    trainer_of(run, 3, times, precision=run.precision).fit(model, datamodule=splits)
    return {"samples": len(splits.train), "epoch_seconds": round(min(times.epochs[1:]), 4)}


def _sweeping(run: Run, model: Any, loader: DataLoader, loading: dict[str, Any]) -> tuple[Callable[[], Any], ...]:
    """A sweep as the callback runs it, and the barest loop over the same batches."""
    trainer = trainer_of(run, 1, precision=run.precision)
    trainer.strategy.connect(model)
    trainer.strategy.model_to_device()
    ours = Sweep(
        loader,
        torch.arange(len(loader.dataset)),
        batch_size=loader.batch_size,
        kind="train",
        keep_workers=loader.persistent_workers,
        on_cpu=not isinstance(loader.dataset, ImagesThere),
    )
    step, hooks = make_step(model, None), BatchHooks([], model)
    reader = DataLoader(loader.dataset, loader.batch_size, **loading)

    def swept() -> None:
        ours.run(trainer, model, step, hooks)
        run.wait()

    def bare() -> None:
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for images, _ in reader:
                model(images.to(run.device, non_blocking=True))
        run.wait()

    return swept, bare


def _time_sweep(run: Run, swept: Callable[[], Any], bare: Callable[[], Any], epoch: float) -> dict[str, Any]:
    pairs = []
    for number in range(run.sizes.rounds + 1):
        order = (swept, bare) if number % 2 else (bare, swept)
        seconds = {call: _seconds(call) for call in order}
        if number:  # the first round starts workers and chooses kernels
            pairs.append((seconds[swept], seconds[bare]))
    own = statistics.median(ours for ours, _ in pairs)
    ratio = statistics.median(ours / plain for ours, plain in pairs)
    return {
        "sweep_seconds": round(own, 4),
        "per_bare_loop": round(ratio, 3),
        "per_epoch": round(own / epoch, 3),
    }


def _count_waits(run: Run, swept: Callable[[], Any]) -> dict[str, Any]:
    """How often a sweep waits for the device: by torch's own warnings, and in the profile of the CUDA calls."""
    swept()  # the first sweep looks at its first batch
    if run.device.type != "cuda":
        return {"warned": None, "synchronised": None}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        swept()
        torch.cuda.set_sync_debug_mode("default")
    warned = [f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchronizing CUDA" in str(w.message)]
    with torch.profiler.profile() as profile:
        swept()
    calls = {event.key: event.count for event in profile.key_averages() if "Synchronize" in event.key}
    return {"warned": len(warned), "places": sorted(set(warned)), "synchronised": calls}


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# (c) How long do scores take at the size of ImageNet?


def scores(run: Run) -> None:
    run.once("scores", {"samples": run.sizes.scored, "checkpoints": run.sizes.checkpoints}, lambda: _score(run), 20)


def _score(run: Run) -> dict[str, Any]:
    sizes, generator = run.sizes, torch.Generator(run.device).manual_seed(0)
    draw = {"device": run.device, "generator": generator}
    train = torch.rand(sizes.checkpoints, sizes.scored, **draw)
    val = torch.rand(sizes.checkpoints, 50 * sizes.classes, **draw)
    classes = torch.randint(sizes.classes, (sizes.scored,), **draw)
    val_classes = torch.arange(50 * sizes.classes, device=run.device) % sizes.classes

    def measured(call: Callable[[], Any]) -> float:
        call()  # warm-up
        run.wait()
        times = []
        for _ in range(2 * run.sizes.rounds):
            times.append(_seconds(lambda: (call(), run.wait())))
        return round(1000 * statistics.median(times), 3)

    before = _allocated(run, reset=True)
    values = cld_scores(train, val, classes, val_classes)
    extra = None if before is None else torch.cuda.max_memory_allocated() - before
    some = slice(0, 20_000)
    exact = cld_scores(train[:, some].cpu(), val.cpu(), classes[some].cpu(), val_classes.cpu())
    losses = LossTrajectories(train, val, classes, val_classes)
    return {
        "cld_scores_ms": measured(lambda: cld_scores(train, val, classes, val_classes)),
        "values_ms": measured(losses.values),
        "score_ms": measured(losses.score),
        "extra_bytes": extra,
        "losses_bytes": train.numel() * 4,
        "apart_from_the_cpu": float((values[some].cpu() - exact).abs().nan_to_num().max()),
    }


def _allocated(run: Run, *, reset: bool = False) -> int | None:
    if run.device.type != "cuda":
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


# (d) Where is the history, and does it grow?


class Small(L.LightningModule):
    """Next to nothing, over points, so that the memory is the history's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 10)

    def forward(self, points: Tensor) -> Tensor:
        return self.layer(points)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Memory(L.Callback):
    """The memory of the device after each epoch."""

    def __init__(self, run: Run) -> None:
        self.run, self.bytes = run, []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bytes.append(_allocated(self.run))


def memory(run: Run) -> None:
    for history in ("full", "running"):
        run.once("memory", {"history": history}, lambda history=history: _keep(run, history), 20)


def _keep(run: Run, history: str) -> dict[str, Any]:
    points = torch.randn(run.sizes.kept, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(points, torch.arange(run.sizes.kept) % 10)
    val = TensorDataset(points[:1000], torch.arange(1000) % 10)
    cld, kept = CLDCallback(history=history, dirpath=run.work / "memory"), Memory(run)
    size = max(100, run.sizes.kept // 20)
    trainer = trainer_of(run, run.sizes.memory_epochs, cld, kept, limit_train_batches=2)
    trainer.fit(Small(), _whole(data, size), _whole(val, size))
    tensors = _tensors(cld._recorder.history)
    return {
        "samples": run.sizes.kept,
        "devices": sorted({tensor.device.type for tensor in tensors if tensor.numel() >= run.sizes.kept}),
        "bytes_per_epoch": kept.bytes,
        "history_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


class _Batches(TensorDataset):
    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[torch.tensor(indices)]


def _whole(data: TensorDataset, size: int) -> DataLoader:
    return DataLoader(_Batches(*data.tensors), size, collate_fn=tuple)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in an object of the library."""
    if isinstance(value, Tensor):
        return [value]
    inner = value if isinstance(value, (list, tuple)) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for one in inner for tensor in _tensors(one)]


# (e) CIFAR-100 with ResNet-18, by as much of the authors' protocol as there is time for


def training(run: Run, splits: list[Any] | None) -> None:
    """Proxy and targets. The number of epochs is settled once, from the time of an epoch."""
    if splits is None:
        print("CIFAR-100 has not come as a whole: training is left out. Bring the other lots, and call this again.")
        return
    epochs = _settle_epochs(run)
    folder = run.work / f"proxy-{epochs}"
    run.once("training", {"method": "everything", "fraction": 1.0}, lambda: _proxy(run, splits, epochs, folder), 5)
    scored = CLDScores.load(folder / "cld-scores.npz")
    losses = LossTrajectories.load(folder / "cld-trajectories.npz")
    for fraction in FRACTIONS:
        for method in METHODS:
            key = {"method": method, "fraction": fraction}
            run.once(
                "training",
                key,
                lambda method=method, fraction=fraction: _target(run, splits, epochs, method, fraction, scored, losses),
                5,
            )


def _settle_epochs(run: Run) -> int:
    path = run.work / "epochs.json"
    if not path.exists():
        epoch = run.rows("epoch")[-1]["epoch_seconds"]
        share = run.rows("sweep")[0]["per_epoch"]
        # The proxy with its sweeps (of the train and the validation split), and all targets.
        cost = epoch * (1 + 1.15 * share + len(METHODS) * sum(FRACTIONS))
        fit = max(4, min(164, int(60 * run.training_minutes / cost)))
        path.write_text(json.dumps(run.epochs or fit), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def _proxy(run: Run, splits: list[Any], epochs: int, folder: Path) -> dict[str, Any]:
    there = SplitsThere(splits, run.device)
    cld = CLDCallback(dirpath=folder, batch_size=1024)
    return _fit(run, there, there, epochs, folder, cld)


def _target(
    run: Run, splits: list[Any], epochs: int, method: str, fraction: float, scored: CLDScores, losses: LossTrajectories
) -> dict[str, Any]:
    sampler = DrawnAnew(splits[0].targets, fraction, seed=1) if method == "fresh random" else None
    there = data = SplitsThere(splits, run.device, sampler)
    if method == "random":
        chosen = losses.score(by=baselines.random_values).select(fraction=fraction)
        data = CoresetDataModule(there, chosen)
    elif method != "fresh random":
        data = CoresetDataModule(there, scored.select(fraction=fraction, rule=method))
    return _fit(run, there, data, epochs, run.work / f"target-{method.replace(' ', '-')}-{fraction}-{epochs}")


def _fit(
    run: Run, there: SplitsThere, data: L.LightningDataModule, epochs: int, folder: Path, *callbacks: L.Callback
) -> dict[str, Any]:
    """Trains, or goes on from where an earlier call saved, and tests after the last epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "last.ckpt"
    classes = int(there.train.targets.max()) + 1
    seed = 0 if callbacks else 1  # a coreset should work for other initial weights than the proxy's too
    module = ResNetClassifier(there.train, classes, run.sizes.width, seed=seed, epochs=epochs)
    trainer = trainer_of(run, epochs, *callbacks, Saves(run, saved), precision=run.precision)
    trainer.fit(module, datamodule=data, ckpt_path=saved if saved.exists() else None)
    tested = trainer.test(module, dataloaders=there.test_dataloader(), verbose=False)[0]["test_accuracy"]
    saved.unlink(missing_ok=True)
    return {"epochs": epochs, "steps": trainer.global_step, "accuracy": round(100 * tested, 2)}

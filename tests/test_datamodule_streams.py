"""`CoresetDataModule` over streams: the right samples, epochs of the right length, and errors that say the cause."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from toy_streams import (
    SAMPLES,
    Data,
    Stream,
    flat,
    index_and_class,
    index_of,
    name_at,
    name_of,
    sample_at,
    scores_of,
    served,
)
from toys import Blobs, quiet_trainer

from lightning_cld import CLDScores, CoresetDataModule, SampleNames


def best(size: int) -> list[int]:
    """The best of each class by hand: 40 samples in three classes of 14, 13 and 13."""
    values, classes = scores_of().values.numpy(), scores_of().classes.numpy()
    quota = {9: (3, 3, 3), 10: (4, 3, 3), 12: (4, 4, 4)}[size]
    chosen: list[int] = []
    for label, number in enumerate(quota):
        inside = np.flatnonzero(classes == label)
        chosen += inside[np.argsort(-values[inside])[:number]].tolist()
    return sorted(chosen)


# The right samples


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("size", "drop_last"), [(9, False), (9, True), (10, False), (12, False), (12, True)])
def test_an_epoch_is_one_pass_over_the_coreset(workers, size, drop_last):
    data = Data(num_workers=workers, drop_last=drop_last)
    coreset = CoresetDataModule(data, scores_of(), size=size, identify=index_and_class)
    loader = coreset.train_dataloader()
    for _ in range(2):
        batches = served(loader)
        assert len(batches) == len(loader) == (size // 4 if drop_last else math.ceil(size / 4))
        assert sorted(map(len, batches[:-1])) == [4] * (len(batches) - 1)
        if drop_last:
            assert set(flat(batches)) <= set(best(size))
            assert len(set(flat(batches))) == len(flat(batches)) == size // 4 * 4
        else:
            assert sorted(flat(batches)) == best(size) == coreset.indices


def test_samples_are_served_as_the_stream_gives_them():
    loader = CoresetDataModule(Data(), [30, 3, 17], identify=index_of).train_dataloader()
    (batch,) = loader
    expected = default_collate([sample_at(position) for position in (3, 17, 30)])
    assert batch["name"] == expected["name"]
    assert torch.equal(batch["inputs"], expected["inputs"])


@pytest.mark.parametrize("workers", [0, 2])
def test_names_stand_in_place_of_positions(workers):
    names = [name_at(position) for position in (31, 2, 11)]
    for given in (names, np.array(names), SampleNames(names)):
        coreset = CoresetDataModule(Data(num_workers=workers), given, identify=name_of)
        assert sorted(flat(served(coreset.train_dataloader()))) == [2, 11, 31]
        assert coreset.indices is coreset.scores is None


def with_names() -> CLDScores:
    """Scores of a stream whose samples were first seen in another order than that of their indices."""
    order = np.random.default_rng(0).permutation(SAMPLES).tolist()
    whole = scores_of()
    return CLDScores(whole.values[order], whole.classes[order], names=SampleNames(map(name_at, order)))


def test_scores_with_names_are_served_by_name():
    coreset = CoresetDataModule(Data(num_workers=2), with_names(), size=9, identify=name_of)
    assert sorted(flat(served(coreset.train_dataloader()))) == best(9)
    assert sorted(coreset.scores.names[coreset.indices]) == [name_at(position) for position in best(9)]


class Pair(NamedTuple):
    inputs: Tensor
    index: Tensor


class Bag:
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.index = torch.tensor([sample["index"] for sample in samples])


def pair(samples: list[dict[str, Any]]) -> Pair:
    return Pair(torch.stack([sample["inputs"] for sample in samples]), Bag(samples).index)


@pytest.mark.parametrize(("collate", "kind"), [(pair, Pair), (Bag, Bag), (list, list)])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_whatever_the_collate_function_makes(collate, kind, workers):
    data = Data(collate_fn=collate, num_workers=workers)
    batches = list(CoresetDataModule(data, range(1, 40, 4), identify=index_of).train_dataloader())
    assert {type(batch) for batch in batches} == {kind}
    indices = [sample["index"] for batch in batches for sample in batch] if kind is list else None
    indices = torch.cat([batch.index for batch in batches]).tolist() if indices is None else indices
    assert sorted(indices) == list(range(1, 40, 4))


class SplitAtStart(Stream):
    """Is split between workers by a function that sets the dataset up in each, as torch's documentation has it."""

    def __init__(self) -> None:
        super().__init__(split=False)


def split_at_start(worker_id: int) -> None:
    worker = get_worker_info()
    worker.dataset.positions = worker.dataset.positions[worker_id :: worker.num_workers]


def test_functions_that_start_workers_find_the_users_dataset():
    data = Data(SplitAtStart(), num_workers=2, worker_init_fn=split_at_start)
    loader = CoresetDataModule(data, range(1, 40, 4), identify=index_of).train_dataloader()
    assert sorted(flat(served(loader))) == list(range(1, 40, 4))


def test_persistent_workers_serve_pass_after_pass():
    data = Data(num_workers=2, persistent_workers=True)
    loader = CoresetDataModule(data, range(3, 9), identify=index_of).train_dataloader()
    for _ in range(2):
        assert sorted(flat(served(loader))) == list(range(3, 9))
    next(iter(loader))  # left in the middle of a pass
    assert sorted(flat(served(loader))) == list(range(3, 9))


def test_spawned_workers_count_what_they_serve():
    data = Data(num_workers=1, multiprocessing_context="spawn")
    loader = CoresetDataModule(data, range(3, 9), identify=index_of).train_dataloader()
    assert flat(served(loader)) == list(range(3, 9))


class Kept(DataLoader):
    pass


class Wrapped:
    """A loader that carries batches to a device."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self):
        return ({**batch, "moved": True} for batch in self.loader)

    def __len__(self):
        return len(self.loader)


def test_loaders_of_other_kinds():
    data = Data()
    data.train_dataloader = lambda: Kept(Stream(), batch_size=3)
    loader = CoresetDataModule(data, range(7), identify=index_of).train_dataloader()
    assert flat(served(loader)) == list(range(7))
    data.train_dataloader = lambda: Wrapped(DataLoader(Stream(), batch_size=3))
    batches = list(CoresetDataModule(data, range(7), identify=index_of).train_dataloader())
    assert all(batch["moved"] for batch in batches)
    assert [position for batch in batches for position in batch["index"].tolist()] == list(range(7))


def test_one_of_several_train_loaders_may_be_a_stream():
    data = Data()
    data.train_dataloader = lambda: {"stream": DataLoader(Stream(), 4), "map": DataLoader(range(100, 140), 4)}
    both = {"stream": scores_of(), "map": [1, 2]}
    loaders = CoresetDataModule(data, both, size=9, identify={"stream": index_of}).train_dataloader()
    assert flat(served(loaders["stream"])) == best(9)
    assert [batch.tolist() for batch in loaders["map"]] in ([[101, 102]], [[102, 101]])
    coreset = CoresetDataModule(data, both, size=9, identify=index_of)
    with pytest.raises(TypeError, match="'map': identify was given, but the train loader is no stream"):
        coreset.train_dataloader()


# Epochs as long as the full stream's


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("endless", [False, True])
def test_full_length_epochs_are_passes_one_after_another(workers, drop_last, endless):
    data = Data(Stream(endless=endless), batch_size=6, num_workers=workers, drop_last=drop_last)
    coreset = CoresetDataModule(data, scores_of(), size=9, identify=index_of, epoch_length="full")
    loader = coreset.train_dataloader()
    epochs = [served(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 3 == [6 if drop_last else 7] * 3
    drawn = Counter(flat(flat(epochs)))
    assert set(drawn) <= set(best(9))
    if not drop_last:  # else the end of each pass is left out
        assert set(drawn) == set(best(9))
    if not drop_last and not endless:
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_positions_without_samples_do_not_count():
    whole = scores_of()
    classes = whole.classes.clone()
    classes[::2] = -1
    scores = CLDScores(whole.values, classes)
    data = Data(batch_size=6)
    loader = CoresetDataModule(data, scores, size=6, identify=index_and_class, epoch_length="full").train_dataloader()
    assert len(loader) == len(served(loader)) == math.ceil(20 / 6)


# Wrong input


def message(data: Data, coreset: Any, **arguments: Any) -> Any:
    return list(CoresetDataModule(data, coreset, **arguments).train_dataloader())


class Batches(IterableDataset):
    def __iter__(self):
        yield default_collate([sample_at(0), sample_at(1)])


@pytest.mark.parametrize(
    ("data", "coreset", "arguments", "kind", "expected"),
    [
        (Data, [1, 2], {}, TypeError, r"Stream is a stream.*identify=function.*position"),
        (Data, ["a"], {}, TypeError, r"identify=function.*is its name"),
        (Data, [1], {"identify": 3}, TypeError, "identify must be a function.*got int"),
        (Data, [1], {"identify": {"a": index_of}}, TypeError, "identify is a mapping, but .* one loader"),
        (
            Blobs,
            [1],
            {"identify": index_of},
            TypeError,
            "no stream: the samples of Subset have positions. Leave it out",
        ),
        (Data, SampleNames(), {"identify": name_of}, ValueError, "The coreset is empty"),
        (Blobs, ["a"], {}, TypeError, "given as names, but the train loader is no stream"),
        (Data, ["a", "b", "a"], {"identify": name_of}, ValueError, "1 of 3 do"),
        (
            lambda: Data(Batches(), batch_size=None),
            [1],
            {"identify": index_of},
            TypeError,
            "Batches gives ready.*batch_size=",
        ),
        (Data, [1], {"identify": index_of, "epoch_length": "full"}, ValueError, "only scores tell"),
        (lambda: Data(drop_last=True), [1], {"identify": index_of}, ValueError, "1 samples on each.*no batch of 4"),
        (Data, [1], {"identify": lambda sample: None}, TypeError, "a position.*or a name.*gave None"),
        (Data, [1], {"identify": lambda sample: True}, TypeError, "gave True"),
        (Data, [1], {"identify": lambda sample: 1.0}, TypeError, "gave 1.0, which is a float"),
        (Data, [1], {"identify": lambda sample: b"a"}, TypeError, "Decode bytes"),
        (Data, [1], {"identify": lambda sample: (1, 2, 3)}, TypeError, r"\(position or name, class\)"),
        (Data, [1], {"identify": lambda sample: (1, "a")}, TypeError, "whole number as the class, but gave 'a'"),
        (Data, [1], {"identify": name_of}, TypeError, "gave the name .* positions without names"),
        (
            Data,
            ["a"],
            {"identify": index_of},
            TypeError,
            "gave the position 0, but the coreset holds names, such as 'a'",
        ),
        (Data, [1], {"identify": lambda sample: -1}, ValueError, "Sample -1 is outside.*another stream"),
        (Data, [3, 99, 98], {"identify": index_of}, ValueError, "2 of 3 were not in it.*another or a shorter"),
        (
            lambda: Data(num_workers=2, stream=Stream(split=False)),
            range(9),
            {"identify": index_of},
            ValueError,
            "came twice in one pass.*workers or processes read the same",
        ),
        (
            lambda: Data(Stream(endless=True)),
            range(9),
            {"identify": index_of},
            ValueError,
            "came twice.*without an end",
        ),
    ],
)
def test_wrong_input_is_named(data, coreset, arguments, kind, expected):
    with pytest.raises(kind, match=expected):
        message(data(), coreset, **arguments)


@pytest.mark.parametrize(
    ("stream", "scores", "identify", "expected"),
    [
        (lambda: Stream(first=1), scores_of(), index_of, "Sample 40 is outside of the 40 that were scored. This is"),
        (lambda: Stream(39), scores_of(), index_of, r"\d of 9 were not in it|passed"),
        (lambda: Stream(wrong=best(9)[0]), scores_of(), index_and_class, r"has the class 1, but 0 when it was scored"),
        (lambda: Stream(first=1), with_names(), name_of, "Sample 'shard-4/040' is not among the 40 that were scored"),
        (lambda: Stream(4, endless=True), scores_of(), index_of, "After 400 samples .* not come to an end"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_another_stream_is_refused(stream, scores, identify, expected, workers):
    if expected.startswith(r"\d"):
        scores = CLDScores([*scores.values[:39], 2.0], scores.classes)  # the missing one is chosen
    coreset = CoresetDataModule(Data(stream(), num_workers=workers), scores, size=9, identify=identify)
    with pytest.raises(ValueError, match=expected):
        list(coreset.train_dataloader())


def test_a_stream_cannot_be_drawn_anew():
    coreset = CoresetDataModule(Data(), scores_of(), size=9, rule="random", redraw=True, identify=index_of)
    with pytest.raises(ValueError, match=r"redraw=True.*stream is read anew.*Leave redraw out"):
        coreset.train_dataloader()


# With a Trainer


class Model(L.LightningModule):
    """Remembers what it was trained on."""

    def __init__(self, estimates: bool = False) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.seen: list[list[list[int]]] = []
        self.estimates = estimates

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.seen:  # resumed in the middle of an epoch
            self.seen.append([])
        self.seen[-1].append(batch["index"].tolist())
        return nn.functional.cross_entropy(self.net(batch["inputs"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.estimated = self.trainer.estimated_stepping_batches if self.estimates else None
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saving(ModelCheckpoint):
    """Of which there may be several."""

    @property
    def state_key(self) -> str:
        return self.filename


class Validated(Data):
    def val_dataloader(self) -> Any:
        return DataLoader([sample_at(0)])


def train(
    root: Any, epoch_length: str, workers: int, ckpt_path: Any = None, *, estimates: bool = False, **arguments: Any
) -> Model:
    coreset = CoresetDataModule(
        Validated(num_workers=workers), scores_of(), size=10, identify=index_of, epoch_length=epoch_length
    )
    L.seed_everything(1, verbose=False)
    model = Model(estimates)
    saved = Saving(root, "{step}", every_n_train_steps=1, save_top_k=-1)
    ends = Saving(root, "end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    validated = Saving(root, "validated-{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    callbacks = [] if ckpt_path else [saved, ends, validated]
    trainer = quiet_trainer(root, *callbacks, max_epochs=3, **{"enable_checkpointing": not ckpt_path, **arguments})
    trainer.fit(model, datamodule=coreset, ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize(("workers", "estimates"), [(0, False), (0, True), (2, False)])
@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_where_it_was(tmp_path, workers, estimates, epoch_length):
    """Also if Lightning asks for the loader before it restores where the run was, to estimate the number of steps."""
    whole = train(tmp_path, epoch_length, workers, estimates=estimates)
    per_epoch = 3 if epoch_length == "coreset" else 10
    assert [len(epoch) for epoch in whole.seen] == [per_epoch] * 3
    steps = flat(whole.seen)
    if epoch_length == "coreset":
        assert all(sorted(flat(epoch)) == best(10) for epoch in whole.seen)
    points = {"step=1": 1, "step=4": 4, f"step={per_epoch}": per_epoch, "end-epoch=0": per_epoch}
    points |= {
        "validated-epoch=1": 2 * per_epoch,
        "end-epoch=1": 2 * per_epoch,
        f"step={per_epoch * 2 + 2}": per_epoch * 2 + 2,
    }
    for name, done in [*points.items()][:: 3 if workers else 1]:  # workers take their time to start
        resumed = train(tmp_path / "resumed", epoch_length, workers, tmp_path / f"{name}.ckpt", estimates=estimates)
        assert resumed.estimated == whole.estimated == (3 * per_epoch if estimates else None)
        assert flat(resumed.seen) == steps[done:], name
        assert torch.equal(resumed.net.weight, whole.net.weight), name


@pytest.mark.filterwarnings("ignore")
def test_reloaded_loaders_go_on_where_the_former_one_was(tmp_path):
    whole = train(tmp_path, "full", 0)
    reloaded = train(tmp_path / "reloaded", "full", 0, reload_dataloaders_every_n_epochs=1)
    assert reloaded.seen == whole.seen


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_fewer_batches_than_an_epoch_resumes_at_its_next_epoch(tmp_path):
    whole = train(tmp_path, "coreset", 0, limit_train_batches=2)
    for name in ("end-epoch=0", "validated-epoch=0", "step=2"):
        resumed = train(tmp_path / "resumed", "coreset", 0, tmp_path / f"{name}.ckpt", limit_train_batches=2)
        assert flat(resumed.seen) == flat(whole.seen[1:]), name


def test_lightning_gives_no_warning_about_the_length(tmp_path, recwarn):
    train(tmp_path, "coreset", 0, limit_val_batches=0)
    assert not [warning for warning in recwarn if "IterableDataset" in str(warning.message)]


def test_a_place_in_another_coreset_is_not_gone_to():
    def loader(size: int) -> Any:
        return CoresetDataModule(Data(), scores_of(), size=size, identify=index_of).train_dataloader()

    first, second, other = loader(9), loader(9), loader(10)
    batches = iter(first)
    next(batches)
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    assert flat(served(second)) == best(9)[4:]
    with pytest.warns(UserWarning, match="another coreset"):
        other.load_state_dict(state)
    assert flat(served(other)) == best(10)


@pytest.mark.parametrize("epoch_length", ["coreset", "full"])
def test_a_loader_that_is_iterated_anew_in_an_epoch_ends_with_an_error(epoch_length):
    coreset = CoresetDataModule(Data(), scores_of(), size=10, identify=index_of, epoch_length=epoch_length)
    loader = coreset.train_dataloader()
    batches = iter(loader)
    next(batches)
    iter(loader)  # reads nothing
    next(batches)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="iterated anew in the middle of an epoch, which"):
        next(batches)


def test_an_epoch_that_is_left_counts_as_a_pass():
    class Shuffled(Stream):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            generator = torch.Generator().manual_seed(self.epoch)
            order = torch.randperm(SAMPLES, generator=generator).tolist()
            return iter([sample_at(place) for place in order])

    litdata = type("StreamingDataset", (), {"__module__": "litdata.streaming.dataset"})

    class Own(Shuffled, litdata):
        region_of_interest = ((0, SAMPLES),)

    names = [name_at(position) for position in range(0, SAMPLES, 2)]
    loader = CoresetDataModule(Data(Own()), names, identify=name_of).train_dataloader()
    firsts = [next(iter(loader))["index"].tolist() for _ in range(4)]
    assert len({tuple(first) for first in firsts}) == 4


def test_a_loop_without_a_trainer_may_leave_an_epoch():
    data = Data()
    loader = CoresetDataModule(data, scores_of(), size=9, identify=index_of).train_dataloader()
    next(iter(loader))
    assert flat(served(loader)) == best(9)


def test_what_is_not_served_is_not_collated():
    read = []
    data = Data(collate_fn=lambda samples: read.extend(samples) or default_collate(samples))
    list(CoresetDataModule(data, [3, 5], identify=index_of).train_dataloader())
    assert [sample["index"] for sample in read] == [3, 5]


def test_a_loader_that_is_read_by_hand_after_a_fit_begins_at_its_beginning(tmp_path):
    data = Data()
    quiet_trainer(tmp_path, max_epochs=3).fit(Model(), datamodule=data)
    coreset = CoresetDataModule(data, scores_of(), size=9, identify=index_of)
    for _ in range(2):
        assert sorted(flat(served(coreset.train_dataloader()))) == best(9)


def test_scores_by_name_are_not_served_at_positions_of_another_set():
    data = Blobs()
    scores = CLDScores(torch.rand(len(data.train_set)), names=[str(place) for place in range(len(data.train_set))])
    with pytest.raises(ValueError, match=r"The scores are of a stream.*scores\.names\[scores\.select"):
        CoresetDataModule(data, scores, fraction=0.5).train_dataloader()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_datamodule_can_be_pickled_after_a_fit(tmp_path, workers):
    coreset = CoresetDataModule(Data(num_workers=workers), scores_of(), size=9, identify=index_of)
    quiet_trainer(tmp_path, max_epochs=1).fit(Model(), datamodule=coreset)
    again = pickle.loads(pickle.dumps(coreset))
    assert sorted(flat(served(again.train_dataloader()))) == best(9)

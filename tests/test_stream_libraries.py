"""`CoresetDataModule` over the streams of litdata, webdataset, Hugging Face datasets and torchdata."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from toy_streams import SAMPLES, Data, Stream, flat, index_of, name_at, sample_at, scores_of, served

from lightning_cld import CLDScores, CoresetDataModule, SampleNames

MEMBERS = [3, 4, 5, 11, 12, 13, 14, 15, 39]


def with_loader(make: Any) -> Data:
    data = Data()
    data.train_dataloader = make
    return data


def needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


# webdataset


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    """Four shards of ten samples, whose keys are unique."""
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / f"shard-{number}.tar" for number in range(4)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as shard:
            for position in range(10 * number, 10 * number + 10):
                for extension, content in (("cls", sample_at(position)["label"]), ("index", position)):
                    data = str(content).encode()
                    entry = tarfile.TarInfo(f"{name_at(position)}.{extension}")
                    entry.size = len(data)
                    shard.addfile(entry, io.BytesIO(data))
    return [str(path) for path in paths]


class Decoding:
    """Decodes a sample of a shard, and says which into a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        with self.log.open("a") as log:
            log.write(f"{int(sample['index'])}\n")
        return {"index": int(sample["index"])}


def key_and_class(sample: dict[str, Any]) -> tuple[str, int]:
    return sample["__key__"], int(sample["cls"])


def in_loader(dataset: Any, workers: int) -> Any:
    return DataLoader(dataset, batch_size=4, num_workers=workers)


def in_pipeline(dataset: Any, workers: int) -> Any:
    return DataLoader(dataset.batched(4), batch_size=None, num_workers=workers)


def in_web_loader(dataset: Any, workers: int) -> Any:
    import webdataset

    loader = webdataset.WebLoader(dataset.batched(4), batch_size=None, num_workers=workers)
    return loader.unbatched().shuffle(100).batched(4).with_epoch(5)


def in_bare_web_loader(dataset: Any, workers: int) -> Any:
    import webdataset

    return webdataset.WebLoader(dataset, batch_size=4, num_workers=workers)


def nested(dataset: Any, workers: int) -> Any:
    import webdataset

    return DataLoader(webdataset.DataPipeline(dataset, webdataset.shuffle(3)), batch_size=4, num_workers=workers)


def piped(shards: list[str], log: Path, **settings: Any) -> Any:
    import webdataset

    return webdataset.WebDataset(shards, shardshuffle=False, **settings).map(Decoding(log))


@needs("webdataset")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [in_loader, in_pipeline, in_web_loader, in_bare_web_loader, nested])
def test_webdataset_drops_samples_before_it_decodes_them(tmp_path, shards, make, workers):
    log = tmp_path / "decoded"
    data = with_loader(lambda: make(piped(shards, log), workers))
    loader = CoresetDataModule(data, [name_at(position) for position in MEMBERS]).train_dataloader()
    for _ in range(2):
        batches = served(loader)
        assert sorted(flat(batches)) == MEMBERS
        if make is not in_pipeline or not workers:
            assert len(batches) == 3
        if make not in (in_pipeline, in_web_loader):
            assert len(loader) == 3
    assert sorted(map(int, log.read_text().split())) == sorted(MEMBERS * 2)
    # The user's own pipeline is as it was.
    assert len(flat(served(make(piped(shards, log), workers)))) in (SAMPLES, 20)


@needs("webdataset")
@pytest.mark.parametrize("make", [in_loader, in_pipeline, in_web_loader])
def test_epochs_of_webdataset_as_long_as_the_full_ones(tmp_path, shards, make):
    scores = CLDScores(scores_of().values, scores_of().classes, names=SampleNames(map(name_at, range(SAMPLES))))
    dataset = piped(shards, tmp_path / "log", resampled=True, seed=1)
    data = with_loader(lambda: make(dataset, 2))
    coreset = CoresetDataModule(data, scores, size=9, epoch_length="full", identify=key_and_class)
    if make is in_pipeline:
        with pytest.raises(ValueError, match="WebDataset makes its own batches and does not say"):
            coreset.train_dataloader()
        dataset.with_epoch(3)
        make = None
        data.train_dataloader = lambda: DataLoader(dataset.batched(4).with_epoch(3), batch_size=None, num_workers=2)
    loader = coreset.train_dataloader()
    batches = served(loader)
    assert len(batches) == len(loader) == {in_loader: 10, in_web_loader: 5, None: 6}[make]
    assert set(flat(batches)) <= set(coreset.indices)


@needs("webdataset")
def test_an_endless_pipeline_with_its_own_batches_is_refused(tmp_path, shards):
    data = with_loader(lambda: in_web_loader(piped(shards, tmp_path / "log", resampled=True), 0))
    coreset = CoresetDataModule(data, [name_at(position) for position in MEMBERS])
    with pytest.raises(ValueError, match=r"came twice in one pass.*without an end.*limit"):
        list(coreset.train_dataloader())


@needs("webdataset")
def test_another_class_in_webdataset_is_found(tmp_path, shards):
    names = SampleNames(map(name_at, range(SAMPLES)))
    scores = CLDScores(scores_of().values, scores_of().classes.roll(1), names=names)
    data = with_loader(lambda: in_loader(piped(shards, tmp_path / "log"), 0))
    coreset = CoresetDataModule(data, scores, size=9, identify=key_and_class)
    with pytest.raises(ValueError, match="Sample 'shard-0/000' of the stream has the class 0, but 2 when"):
        list(coreset.train_dataloader())


@needs("webdataset")
def test_a_pipeline_that_loses_samples_behind_the_filter_is_refused(tmp_path, shards):
    dataset = piped(shards, tmp_path / "log").select(lambda sample: sample["index"] > 11)
    coreset = CoresetDataModule(with_loader(lambda: in_loader(dataset, 0)), [name_at(position) for position in MEMBERS])
    with pytest.raises(ValueError, match="4 of the coreset's 9 samples were read, but did not come to the batches"):
        list(coreset.train_dataloader())


@needs("webdataset")
def test_a_pipeline_without_files_takes_identify():
    import webdataset

    dataset = webdataset.DataPipeline(Stream())
    coreset = CoresetDataModule(with_loader(lambda: in_loader(dataset, 0)), MEMBERS, identify=index_of)
    assert flat(served(coreset.train_dataloader())) == MEMBERS
    data = with_loader(lambda: DataLoader(dataset.compose(webdataset.batched(4)), batch_size=None))
    with pytest.raises(TypeError, match="DataPipeline gives ready batches"):
        CoresetDataModule(data, MEMBERS, identify=index_of).train_dataloader()


# litdata


@pytest.fixture(scope="module")
def chunks(tmp_path_factory) -> Path:
    """Chunks of five samples each."""
    from litdata.streaming.cache import Cache

    folder = tmp_path_factory.mktemp("chunks")
    cache = Cache(str(folder), chunk_size=5)
    for position in range(SAMPLES):
        cache[position] = sample_at(position)
    cache.done()
    cache.merge()
    return folder


@needs("litdata")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["own", "torch"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_litdata_reads_only_chunks_with_members(tmp_path, chunks, workers, kind, shuffle):
    from litdata import StreamingDataLoader, StreamingDataset

    folder = tmp_path / "chunks"
    folder.mkdir()
    index = json.loads((chunks / "index.json").read_text())
    needed = {position // 5 for position in MEMBERS}
    for number, chunk in enumerate(index["chunks"]):
        if number in needed:
            (folder / chunk["filename"]).write_bytes((chunks / chunk["filename"]).read_bytes())
    (folder / "index.json").write_bytes((chunks / "index.json").read_bytes())
    make = StreamingDataLoader if kind == "own" else DataLoader
    data = with_loader(lambda: make(StreamingDataset(str(folder), shuffle=shuffle), batch_size=4, num_workers=workers))
    loader = CoresetDataModule(data, MEMBERS, identify=index_of).train_dataloader()
    assert len(loader) == 3
    epochs = [flat(served(loader)) for _ in range(3)]
    assert all(sorted(epoch) == MEMBERS for epoch in epochs)
    assert (epochs[0] == epochs[1] == epochs[2] == MEMBERS) is not shuffle


@needs("litdata")
def test_litdata_by_position_draws_anew_and_keeps_epochs_as_long(chunks):
    from litdata import StreamingDataLoader, StreamingDataset

    data = with_loader(lambda: StreamingDataLoader(StreamingDataset(str(chunks)), batch_size=4))
    arguments = {"rule": "random", "redraw": True, "size": 9, "epoch_length": "full"}
    loader = CoresetDataModule(data, scores_of(), **arguments).train_dataloader()
    assert len(loader) == 10
    scores = scores_of()
    drawn = [set(scores.select(size=9, rule="random", seed=seed).tolist()) for seed in range(4)]
    epoch = flat(served(loader))
    assert [set(epoch[9 * number : 9 * number + 9]) for number in range(4)] == drawn


@needs("litdata")
@pytest.mark.parametrize("workers", [0, 2])
def test_litdata_by_name_is_read_and_shuffled(chunks, workers):
    from litdata import StreamingDataLoader, StreamingDataset

    data = with_loader(
        lambda: StreamingDataLoader(StreamingDataset(str(chunks), shuffle=True), batch_size=4, num_workers=workers)
    )
    names = [name_at(position) for position in MEMBERS]
    loader = CoresetDataModule(data, names, identify=lambda sample: sample["name"]).train_dataloader()
    epochs = [flat(served(loader)) for _ in range(3)]
    assert all(sorted(epoch) == MEMBERS for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


@needs("litdata")
def test_litdata_of_another_length_or_other_positions_is_refused(chunks):
    from litdata import StreamingDataLoader, StreamingDataset

    data = with_loader(lambda: StreamingDataLoader(StreamingDataset(str(chunks)), batch_size=4))
    with pytest.raises(ValueError, match="scores are of 39 samples, but the StreamingDataset has 40"):
        CoresetDataModule(data, CLDScores(torch.rand(39)), size=9).train_dataloader()
    with pytest.raises(ValueError, match="Position 40 is outside of the stream of 40 samples"):
        CoresetDataModule(data, [3, 40]).train_dataloader()
    shifted = CoresetDataModule(data, [3], identify=lambda sample: sample["index"] + 1).train_dataloader()
    with pytest.raises(ValueError, match="identify gives 4 for the sample at position 3"):
        list(shifted)


# Hugging Face


def rows() -> Any:
    import datasets

    columns = [sample_at(position) for position in range(SAMPLES)]
    listed = [{"index": row["index"], "label": row["label"], "inputs": row["inputs"].tolist()} for row in columns]
    return datasets.Dataset.from_list(listed).to_iterable_dataset(num_shards=4)


@needs("datasets")
@pytest.mark.parametrize("workers", [0, 2])
def test_hugging_face_streams(workers):
    data = with_loader(lambda: DataLoader(rows(), batch_size=4, num_workers=workers))
    loader = CoresetDataModule(data, MEMBERS, identify=lambda row: (row["index"], row["label"])).train_dataloader()
    for _ in range(2):
        batches = served(loader)
        assert sorted(flat(batches)) == MEMBERS
        assert len(batches) == len(loader) == 3


# torchdata


@needs("torchdata")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 2])
@pytest.mark.parametrize("source", ["plain", "datasets"])
def test_a_stateful_loader_keeps_its_class_and_resumes(workers, done, source):
    from torchdata.stateful_dataloader import StatefulDataLoader

    if source == "datasets":
        pytest.importorskip("datasets")

    def make() -> Any:
        stream = rows() if source == "datasets" else Stream()
        data = with_loader(lambda: StatefulDataLoader(stream, batch_size=3, num_workers=workers))
        return CoresetDataModule(data, MEMBERS, identify=index_of).train_dataloader()

    whole = served(make())
    loader = make()
    batches = iter(loader)
    for _ in range(done):
        next(batches)
    state = loader.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    assert served(resumed) == whole[done:]
    assert sorted(flat(served(resumed))) == MEMBERS
    left = make()
    left.load_state_dict(state)
    next(iter(left))
    assert sorted(flat(served(left))) == MEMBERS  # not from the loaded place again


@needs("torchdata")
def test_what_a_stateful_loader_saved_another_loader_finds_again():
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(make: Any) -> Any:
        data = with_loader(lambda: make(Stream(), batch_size=3))
        return CoresetDataModule(data, MEMBERS, identify=index_of).train_dataloader()

    first = loader(StatefulDataLoader)
    batches = iter(first)
    served_before = [next(batches)["index"].tolist() for _ in range(2)]
    second = loader(DataLoader)
    second.load_state_dict(first.state_dict())
    assert sorted(flat([*served_before, *served(second)])) == MEMBERS

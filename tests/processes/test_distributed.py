"""Runs on several processes: `distributed_runs.py` makes them, and the tests read each rank's results."""

from __future__ import annotations

import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import (
    BROKEN,
    FULL,
    KEPT,
    KEPT_BY_HAND,
    PATIENCE,
    SIZES,
    SUBSET,
    Model,
    ModelWithColumn,
    Points,
    Runs,
)
from launching import run_script
from torch import Tensor
from torch.nn import functional as F

from lightning_cld import CLDScores, LossTrajectories

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ddp_fork needs fork")

EVERYWHERE = [
    "sizes",
    "models",
    "samplers",
    "coresets",
    "loaders",
    "later_errors",
    "no_reference",
    "other_data",
    "steps",
    "streams",
]
# The last part breaks the connection between the processes if the library fails. It comes last because the parts
# before it are saved by then.
PARTS = {
    ("ddp_fork", 2): [*EVERYWHERE, "once", "start", "without_dirpath", "bad_sample"],
    ("ddp_fork", 3): [*EVERYWHERE, "resume", "bad_sample"],
    ("fsdp2", 2): [*EVERYWHERE, "start", "tensor_parallel", "shared_place", "bad_sample"],
    ("fsdp2", 3): [*EVERYWHERE, "resume", "bad_sample"],
    ("ddp", 2): ["once", "coresets", "bad_sample"],
    ("ddp_spawn", 2): ["once"],
}
SAMPLES = [train for train, _ in SIZES]


class Run:
    """The results of a run of the script.

    Args:
        strategy: As in `distributed_runs.Runs`.
        devices: The number of processes.
        root: The folder with the results.
        log: All printed output.
    """

    def __init__(self, strategy: str, devices: int, root: Path, log: str = "") -> None:
        self.strategy = strategy
        self.devices = devices
        self.root = root
        self.log = log

    def ends(self, name: str) -> list[dict[str, Any]]:
        """The results of each rank in the fit `name`."""
        return [self._load(f"{name}-{rank}.pt") for rank in range(self.devices)]

    def main(self, name: str) -> dict[str, Any]:
        """The results of the main process, which started the others."""
        return self._load(f"{name}-main.pt")

    def logged(self, name: str) -> LossTrajectories:
        return LossTrajectories.load(self.root / name / "cld-trajectories.npz")

    def _load(self, file: str) -> Any:
        assert (self.root / file).exists(), f"the run did not get to {file}:\n{self.log[-6000:]}"
        return torch.load(self.root / file, weights_only=False)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A function that runs the script once per strategy and number of processes."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def run(strategy: str, devices: int) -> Run:
        if strategy == "fsdp2" and not hasattr(torch.cpu.current_stream(), "record_event"):
            pytest.skip("this torch has no FSDP2 on the CPU")
        if "resume" in PARTS[strategy, devices]:
            run(strategy, 2)
        root = folder / f"{strategy}-{devices}"
        root.mkdir()
        log = run_script(
            "distributed_runs.py", strategy, str(devices), root, *PARTS[strategy, devices], log=root / "log.txt"
        )
        return Run(strategy, devices, root, log)

    return run


@pytest.fixture(
    scope="module",
    params=[("ddp_fork", 2), ("ddp_fork", 3), ("fsdp2", 2), ("fsdp2", 3)],
    ids=lambda run: f"{run[0]}-{run[1]}",
)
def ranks(request, run_of) -> Run:
    return run_of(*request.param)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Run:
    """The same fits in one process."""
    root = tmp_path_factory.mktemp("alone")
    Runs("", 1, root).sizes()
    return Run("", 1, root)


def losses_one_by_one(model: Model, weights: dict[str, Tensor], points: Points) -> Tensor:
    """An oracle for a sweep's row: cross-entropy, one sample at a time."""
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(inputs[None]), target[None])
            for inputs, target in zip(points.inputs, points.targets, strict=True)
        ]
    return torch.stack(losses)


def rows_of(end: dict[str, Any]) -> tuple[Tensor, Tensor]:
    recorded = LossTrajectories.from_state_dict(end["rows"])
    return recorded.train_losses, recorded.val_losses


def assert_same_training(first: list[dict[str, Any]], second: list[dict[str, Any]], epochs: range) -> None:
    """Compares weights, buffers and batches of every rank and epoch, bit for bit."""
    for mine, other in zip(first, second, strict=True):
        for epoch in epochs:
            assert mine["weights"][epoch].keys() == other["weights"][epoch].keys()
            for name, value in mine["weights"][epoch].items():
                assert torch.equal(value, other["weights"][epoch][name]), (epoch, name)
        count = len(epochs) - 1
        assert mine["served"][:count] == other["served"][:count]


# The same losses


@pytest.mark.parametrize("samples", SAMPLES)
def test_losses_of_the_same_weights_are_those_of_one_process(ranks, alone, samples):
    theirs, ours = ranks.logged(f"sizes-{samples}"), alone.logged(f"sizes-{samples}")
    torch.testing.assert_close(theirs.train_losses[0], ours.train_losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.val_losses[0], ours.val_losses[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(theirs.train_classes, ours.train_classes)
    assert torch.equal(theirs.val_classes, ours.val_classes)


@pytest.mark.parametrize(("samples", "references"), SIZES)
def test_every_checkpoint_has_the_losses_of_rank_0s_weights_and_buffers(ranks, samples, references):
    ends = ranks.ends(f"sizes-{samples}")
    train, val = rows_of(ends[0])
    assert len(train) == len(val) == 4
    for epoch, weights in ends[0]["weights"].items():
        model = Model(norm=samples > 2)
        expected = losses_one_by_one(model, weights, Points(samples, seed=0))
        torch.testing.assert_close(train[epoch], expected, rtol=1e-5, atol=1e-6)
        expected = losses_one_by_one(model, weights, Points(references, seed=1))
        torch.testing.assert_close(val[epoch], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", SAMPLES)
def test_every_rank_ends_with_the_same_rows(ranks, samples):
    first, *others = (end["rows"] for end in ranks.ends(f"sizes-{samples}"))
    assert first["epochs"] == [0, 1, 2, 3]
    for other in others:
        assert other["epochs"] == first["epochs"]
        assert other["fingerprint"] == first["fingerprint"]
        for name in ("train_losses", "val_losses", "train_classes", "val_classes"):
            assert torch.equal(other[name], first[name])


@pytest.mark.parametrize("name", ["stream", "stream-names", "stream-shared"])
def test_a_stream_that_the_ranks_share_unevenly_gives_each_sample_the_loss_of_rank_0s_weights(ranks, name):
    ends = ranks.ends(name)
    logged = [LossTrajectories.from_state_dict(end["rows"]) for end in ends]
    for other in logged[1:]:
        assert torch.equal(other.train_losses, logged[0].train_losses)
        assert torch.equal(other.val_losses, logged[0].val_losses)
        assert torch.equal(other.train_classes, logged[0].train_classes)
        assert other.names == logged[0].names
    points = Points(49, seed=0)
    places = torch.arange(49)
    if name == "stream-names":
        places = torch.tensor([int(called.split()[1]) for called in logged[0].names])
        assert sorted(places.tolist()) == list(range(49))
    assert torch.equal(logged[0].train_classes, points.targets[places])
    assert logged[0].epochs == [0, 1, 2, 3]
    for epoch, weights in ends[0]["weights"].items():
        expected = losses_one_by_one(Model(), weights, points)[places]
        torch.testing.assert_close(logged[0].train_losses[epoch], expected, rtol=1e-5, atol=1e-6)
        mean = losses_one_by_one(Model(), weights, Points(11, seed=1)).mean()
        torch.testing.assert_close(logged[0].val_losses[epoch].mean(), mean, rtol=1e-5, atol=1e-6)


def test_a_stream_leaves_the_training_as_it_was(ranks):
    assert_same_training(ranks.ends("stream"), ranks.ends("unwatched"), range(4))


def test_a_stream_that_is_not_split_by_rank_is_said(ranks):
    assert re.search(r"49 of the 49 samples of the train stream came on several\s+ranks", ranks.log)


def test_too_many_positions_end_the_run(ranks):
    error = ranks.main("stream-small")["error"]
    assert (
        "With num_samples=20 positions must be from 0 to 19, but the train stream has positions from 0 to 48" in error
    )


def test_a_sample_of_a_stream_that_fails_later_costs_one_checkpoint(ranks):
    first, *others = (end["rows"] for end in ranks.ends("stream-broken"))
    missed = first["train_losses"].isnan().all(dim=1).nonzero().flatten().tolist()
    assert missed == [2]
    for other in others:
        assert torch.equal(other["train_losses"].nan_to_num(), first["train_losses"].nan_to_num())


def test_a_running_history_is_the_same_on_every_rank_and_gives_the_scores_of_a_full_one(ranks):
    first, *others = (end["rows"] for end in ranks.ends("running"))
    for other in others:
        assert other["epochs"] == first["epochs"] == [0, 1, 2, 3]
        for name, value in first["moments"].items():
            assert torch.equal(other["moments"][name], value), name
    running, full = (CLDScores.load(ranks.root / name / "cld-scores.npz") for name in ("running", "sizes-49"))
    torch.testing.assert_close(running.values, full.values, rtol=0, atol=1e-5)


def test_a_row_of_steps_has_what_all_ranks_saw_and_every_rank_has_it(ranks):
    first, *others = (end["rows"] for end in ranks.ends("returned"))
    for other in others:
        assert other["epochs"] == first["epochs"] == [0, 1, 2, 3]
        assert torch.equal(other["train_losses"], first["train_losses"])
    for epoch in (1, 2, 3):
        seen = [pair for end in ranks.ends("returned") for pair in end["seen"][epoch - 1]]
        assert len(seen) > len({position for position, _ in seen}) == 49  # the sampler repeats samples as padding
        expected = [[loss for place, loss in seen if place == position] for position in range(49)]
        expected = torch.tensor([sum(losses) / len(losses) for losses in expected])
        torch.testing.assert_close(first["train_losses"][epoch], expected, rtol=1e-6, atol=1e-6)


def test_all_ranks_stop_where_the_coreset_has_settled(ranks):
    scores = CLDScores.load(ranks.root / "settled" / "cld-scores.npz")
    assert scores.metadata["settled_epoch"] == 8
    assert scores.epochs == list(range(9))
    for end in ranks.ends("settled"):
        assert end["rows"]["epochs"] == scores.epochs
        assert max(end["weights"]) == 8


@pytest.mark.parametrize(("samples", "references"), SIZES)
def test_a_sweep_reads_each_sample_once_but_for_padding(ranks, samples, references):
    ends = ranks.ends(f"sizes-{samples}")
    for epoch in (1, 2, 3):
        for which, count in enumerate((samples, references)):
            shares = [end["reads"][epoch][which] for end in ends]
            equal_share = -(-count // ranks.devices)
            assert {len(share) for share in shares} == {equal_share}  # under FSDP2 each forward needs all ranks
            reads = Counter(position for share in shares for position in share)
            assert set(reads) == set(range(count))
            assert sum(reads.values()) - count == equal_share * ranks.devices - count


# The same training


@pytest.mark.parametrize(
    ("name", "without"),
    [("sizes-49", "unwatched"), ("with-step", "unwatched"), ("writes", "writes-unwatched")],
)
def test_training_is_the_same_with_and_without_the_callback_on_every_rank(ranks, name, without):
    watched, unwatched = ranks.ends(name), ranks.ends(without)
    assert_same_training(watched, unwatched, range(4))
    for mine, other in zip(watched, unwatched, strict=True):
        for key in ("steps", "metrics"):
            assert mine[key] == other[key]
        assert repr(mine["random"]) == repr(other["random"])


def test_ranks_have_buffers_and_random_states_of_their_own(ranks):
    # Without this the tests around this one would show nothing.
    first, second, *_ = ranks.ends("writes-unwatched")
    for name in ("mean", "_extra_state"):
        assert not torch.equal(first["weights"][3][name], second["weights"][3][name])
    first, second, *_ = ranks.ends("unwatched")
    for epoch in range(4):
        name = "net.1.running_mean"
        assert not torch.equal(first["weights"][epoch][name], second["weights"][epoch][name])
    assert repr(first["random"]) != repr(second["random"])


def test_cld_step_gives_the_losses_of_the_default_where_ranks_have_buffers_of_their_own(ranks):
    for mine, other in zip(ranks.ends("with-step"), ranks.ends("sizes-49"), strict=True):
        for row, expected in zip(rows_of(mine), rows_of(other), strict=True):
            assert torch.equal(row, expected)


def test_buffers_that_are_not_contiguous_are_shared_and_given_back(ranks):
    ends = ranks.ends("with-column")
    for rank, end in enumerate(ends):
        assert end["weights"][0]["scale"].tolist() == [rank + 2] * 4
    for epoch, row in enumerate(rows_of(ends[1])[0]):
        expected = losses_one_by_one(ModelWithColumn(), ends[0]["weights"][epoch], Points(49, seed=0))
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


def test_a_buffer_expanded_from_one_value_does_no_harm_under_fsdp2(run_of):
    assert [end["steps"] for end in run_of("fsdp2", 2).ends("shared-place")] == [9, 9]


# Resuming on another number of devices


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # ModelCheckpoint, left out on resume
@pytest.mark.parametrize("strategy", ["ddp_fork", "fsdp2"])
@pytest.mark.parametrize("devices", [1, 3])
def test_a_run_on_two_processes_resumes_on_one_and_on_three(run_of, tmp_path, strategy, devices):
    started = run_of(strategy, 2)
    if devices == 1:
        Runs("", 1, tmp_path).watched("resumed", max_epochs=5, ckpt_path=started.root / "epoch=1.ckpt")
        resumed = Run("", 1, tmp_path)
    else:
        resumed = run_of(strategy, devices)
    train, val = rows_of(started.ends("started")[0])
    ends = resumed.ends("resumed")
    for end in ends:
        assert end["rows"]["epochs"] == [0, 1, 2, 3, 4, 5]
        train_now, val_now = rows_of(end)
        assert torch.equal(train_now[:3], train[:3])
        assert torch.equal(val_now[:3], val[:3])
        assert train_now.isfinite().all()
    for epoch in (3, 4, 5):
        expected = losses_one_by_one(Model(), ends[0]["weights"][epoch], Points(49, seed=0))
        torch.testing.assert_close(train_now[epoch], expected, rtol=1e-5, atol=1e-6)
    assert len(CLDScores.load(resumed.root / "resumed" / "cld-scores.npz")) == 49


# Errors


def assert_ends_all(run: Run, name: str, message: str) -> None:
    """Checks that the fit ended soon on all ranks, with the message of the rank that failed."""
    main = run.main(name)
    assert message in main["error"]
    assert main["seconds"] < PATIENCE.seconds
    if run.strategy != "ddp_fork":  # under ddp_fork the first rank that ends kills the others
        for end in run.ends(name):
            assert message in end["error"]


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("strategy", ["ddp_fork", "fsdp2"])
def test_a_bad_sample_on_one_rank_ends_all_with_its_message(run_of, strategy, devices):
    assert_ends_all(run_of(strategy, devices), "bad-sample", f"sample {BROKEN} can't be read")


def test_a_bad_sample_on_one_rank_ends_all_under_ddp(run_of):
    assert_ends_all(run_of("ddp", 2), "bad-sample", f"sample {BROKEN} can't be read")


def test_data_missing_on_one_rank_end_all_with_its_message(ranks):
    assert_ends_all(ranks, "no-reference", "the reference is on another disk")


@pytest.mark.parametrize("name", ["other-split", "other-samples"])
def test_other_samples_on_one_rank_end_all_though_labels_are_the_same(ranks, name):
    assert_ends_all(ranks, name, "has other data than rank 0")


def test_a_first_step_without_sample_losses_on_one_rank_ends_all(ranks):
    assert_ends_all(ranks, "forgotten", "without sample_losses and sample_index")


@pytest.mark.parametrize("name", ["later-sample", "later-step", "later-class"])
def test_an_error_on_one_rank_later_on_leaves_a_hole_on_all(ranks, name):
    ends = ranks.ends(name)
    for end in ends:
        assert end["rows"]["epochs"] == [0, 1, 2, 3, 4, 5, 6]
        for rows in rows_of(end):
            assert rows[2].isnan().all()
            assert rows[[0, 1, 3, 4, 5, 6]].isfinite().all()
    assert_same_training(ends, ranks.ends("unwatched"), range(4))
    assert len(CLDScores.load(ranks.root / name / "cld-scores.npz")) == 49


def test_the_warning_of_a_hole_has_the_message_of_the_rank_that_failed(ranks):
    ranks.ends("later-step")
    warnings = [line for line in ranks.log.splitlines() if "could not be logged" in line]
    assert len(warnings) == 4
    assert f"sample {BROKEN} can't be read" in warnings[0]
    assert f"sample {BROKEN} can't be evaluated" in warnings[1]
    assert "the train set gave its classes in another order than before" in warnings[2]
    assert f"sample {BROKEN} can't be evaluated" in warnings[3]  # of the stream


def test_classes_cross_the_network_once_a_run(ranks):
    ranks.ends("later-class")
    for rank in range(ranks.devices):
        first, *later = ranks._load(f"later-class-exchanged-{rank}.pt")
        losses = [("torch.float32", 49), ("torch.float32", 11)]
        rows = [
            [each for each in epoch if each[1] > 1] for epoch in (first, *later)
        ]  # without decisions, one number each
        assert rows[0] == [losses[0], ("torch.int64", 49), losses[1], ("torch.int64", 11)]
        assert rows[1:] == [losses, [], losses, losses, losses, losses]  # the second sweep fails


# Samplers and coresets


def test_a_subset_random_sampler_is_honoured(ranks):
    for end in ranks.ends("subset"):
        train, _ = rows_of(end)
        assert train.isfinite().all(dim=0).nonzero().flatten().tolist() == list(SUBSET)
        assert train.isnan().all(dim=0).sum() == 49 - len(SUBSET)
    scores = CLDScores.load(ranks.root / "subset" / "cld-scores.npz")
    assert set(scores.select(fraction=1.0).tolist()) == set(SUBSET)


def test_every_sample_of_a_weighted_random_sampler_is_logged(ranks):
    for end in ranks.ends("weighted"):
        assert rows_of(end)[0].isfinite().all()


def served_by_all(ends: list[dict[str, Any]]) -> list[Counter[int]]:
    """How often each position was trained on, per epoch."""
    epochs = zip(*(end["served"] for end in ends), strict=True)
    return [Counter(position for share in epoch for position in share) for epoch in epochs]


@pytest.mark.parametrize("name", ["half", "half-own-sampler"])
def test_a_coreset_is_served_once_an_epoch_over_the_ranks(ranks, name):
    scores = CLDScores.load(ranks.root / "full-set" / "cld-scores.npz")
    kept = Counter(scores.select(fraction=0.5).tolist())
    assert len(kept) == FULL // 2
    assert served_by_all(ranks.ends(name)) == [kept] * 3


def test_full_length_epochs_have_as_many_steps_as_the_full_set(ranks):
    for mine, other in zip(ranks.ends("long"), ranks.ends("full-set"), strict=True):
        assert mine["steps"] == other["steps"]
        assert [len(epoch) for epoch in mine["served"]] == [len(epoch) for epoch in other["served"]]


def test_full_length_epochs_draw_the_same_on_all_ranks_and_afresh_each_epoch(ranks):
    scores = CLDScores.load(ranks.root / "full-set" / "cld-scores.npz")
    kept = set(scores.select(size=KEPT).tolist())
    epochs = served_by_all(ranks.ends("long"))
    passes, rest = divmod(FULL, KEPT)
    for served in epochs:
        assert set(served) == kept
        assert Counter(served.values()) == {passes + 1: rest, passes: KEPT - rest}
    drawn_again = {frozenset(p for p, times in served.items() if times > passes) for served in epochs}
    assert len(drawn_again) == len(epochs) == 3


def drawn(ranks, number: int) -> list[int]:
    """The coreset that pass `number` of a run is to be served."""
    scores = CLDScores.load(ranks.root / "full-set" / "cld-scores.npz")
    return scores.select(size=KEPT, rule="draw", seed=number).tolist()


@pytest.mark.parametrize("name", ["anew", "anew-own-sampler"])
def test_a_coreset_drawn_anew_is_served_once_an_epoch_over_the_ranks(ranks, name):
    for epoch, served in enumerate(served_by_all(ranks.ends(name))):
        assert sorted(served) == drawn(ranks, epoch)
        assert sum(served.values()) == -(-KEPT // ranks.devices) * ranks.devices  # as many on each rank


def test_each_rank_that_draws_for_itself_draws_the_same_anew(ranks):
    for end in ranks.ends("anew-apart"):
        assert [sorted(epoch) for epoch in end["served"]] == [drawn(ranks, epoch) for epoch in range(3)]


def test_each_pass_of_a_full_length_epoch_over_the_ranks_is_drawn_anew(ranks):
    passes, rest = divmod(FULL, KEPT)
    for epoch, served in enumerate(served_by_all(ranks.ends("anew-long"))):
        *whole, last = (Counter(drawn(ranks, (passes + 1) * epoch + number)) for number in range(passes + 1))
        left = served - sum(whole, Counter())
        assert served - left == sum(whole, Counter())
        assert left.total() == rest
        assert left <= last


@pytest.mark.parametrize("name", ["apart", "device"])
def test_where_lightning_splits_nothing_each_rank_draws_the_whole(ranks, name):
    for mine, other in zip(ranks.ends(f"{name}-long"), ranks.ends(f"{name}-full-set"), strict=True):
        assert mine["steps"] == other["steps"] == 3 * 5
        for epoch in mine["served"]:
            assert len(epoch) == FULL
            assert Counter(epoch[:KEPT]) == Counter(epoch[KEPT : 2 * KEPT]) == Counter(KEPT_BY_HAND)
    for end in ranks.ends(f"{name}-half"):
        assert [Counter(epoch) for epoch in end["served"]] == [Counter(KEPT_BY_HAND)] * 3


def test_a_batch_sampler_made_by_hand_is_split_and_keeps_its_batch_size(ranks):
    for served in served_by_all(ranks.ends("by-hand")):
        assert set(served) == set(KEPT_BY_HAND)
        assert sum(served.values()) == -(-KEPT // ranks.devices) * ranks.devices  # as many on each rank
    for end in ranks.ends("by-hand"):
        assert end["steps"] == 3 * -(-KEPT // ranks.devices // 10)
    for end in ranks.ends("by-hand-long"):
        assert end["steps"] == 3 * -(-FULL // ranks.devices // 10)
        assert {len(epoch) for epoch in end["served"]} == {FULL // ranks.devices}


def test_two_train_loaders_are_split(ranks):
    for served in served_by_all(ranks.ends("two")):
        first = {position for position in served if position >= 0}
        assert first == set(KEPT_BY_HAND)
        assert {-1 - position for position in served if position < 0} == set(range(FULL))


# The main process, which started the others


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn", "ddp"])
def test_the_main_process_has_the_scores_afterwards(run_of, strategy):
    run = run_of(strategy, 2)
    main, ends = run.main("scores"), run.ends("sizes-49")
    expected = LossTrajectories.from_state_dict(ends[1]["rows"]).score()
    torch.testing.assert_close(main["scores"], expected.values, rtol=0, atol=1e-6, equal_nan=True)
    assert main["kept"] == expected.select(fraction=0.5).tolist()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp"])
def test_losses_are_those_of_one_process_however_processes_are_started(run_of, alone, strategy):
    theirs, ours = run_of(strategy, 2).logged("sizes-49"), alone.logged("sizes-49")
    assert theirs.epochs == [0, 1, 2, 3]
    torch.testing.assert_close(theirs.train_losses[0], ours.train_losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.val_losses[0], ours.val_losses[0], rtol=1e-5, atol=1e-6)


def test_without_a_dirpath_the_main_process_is_told_to_give_one(run_of):
    told = run_of("ddp_fork", 2).main("without-dirpath")
    assert "CLDCallback(dirpath=...)" in told["error"]
    assert told["path"] is None


def test_the_scores_file_is_there_for_every_rank_when_fit_returns(run_of):
    # Rank 0 writes the file to a slow disk. The other ranks read it later in the same script.
    run = run_of("ddp", 2)
    assert "there is no file" not in run.log
    assert len(run.ends("half")) == 2


# Errors at the start


def test_tensor_parallel_layouts_are_refused(run_of):
    for end in run_of("fsdp2", 2).ends("tensor-parallel"):
        assert "ModelParallelStrategy(tensor_parallel_size=1)" in end["error"]

"""The comparison with other methods: each serves what its paper says, for the same steps, and what is done is kept."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import _grid
import _peer_datacull
import _peer_rivals
import _peer_runs
import peers
from _methods import METHODS

TINY = ["--seeds", "1", "--epochs", "6", "--steps", "40", "--noise", "0.2", "--fractions", "0.2"]
OWN = list(_peer_rivals.RIVALS)
CELL = {"dataset": "digits", "epochs": 6, "noise": 0.2, "seed": 0}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return _peer_runs.Places(Path("nowhere"), None, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def proxy(places):
    _peer_runs.train_proxy(CELL, places)
    return _peer_runs.read_proxy(CELL, places)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# The script


@pytest.fixture
def _threads(monkeypatch):
    monkeypatch.setattr(_grid, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))


@pytest.mark.usefixtures("_threads")
def test_the_script_runs_each_cell_once_and_prints_its_tables(tmp_path, capsys, monkeypatch):
    arguments = [*TINY, "--csv", str(tmp_path / "out.csv"), "--work", str(tmp_path / "work"), "--methods", *OWN]
    peers.main(arguments)
    printed = capsys.readouterr().out
    rows = _grid.read_rows(tmp_path / "out.csv")
    assert {row["method"] for row in rows} == set(OWN)
    assert len(rows) == len(OWN)
    assert all(0 < float(row["accuracy"]) <= 100 for row in rows)
    seen = {row["method"]: float(row["seen"]) for row in rows}
    assert seen["random, anew"] > seen["random"] == pytest.approx(0.2, abs=0.01)
    for made in (peers.table(rows, "digits"), peers.overview(rows), peers.stand_ins(rows)):
        assert made in printed
    assert "nan" not in printed

    monkeypatch.setattr(peers, "fit", pytest.fail)
    monkeypatch.setattr(_peer_runs, "fit", pytest.fail)
    peers.main(arguments)
    assert capsys.readouterr().out == printed


def test_without_datacull_its_methods_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datacull", None)
    with pytest.raises(SystemExit, match=r"pip install datacull==1\.0\.2, or name other --methods"):
        peers.main([*TINY, "--csv", str(tmp_path / "out.csv"), "--work", str(tmp_path / "work")])
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_is_missing_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"letters\.npz is not there. --tables names a folder"):
        peers.main([*TINY, "--datasets", "letters", "--tables", str(tmp_path), "--methods", "random"])


def test_a_table_is_split_and_every_column_standardised(tmp_path):
    generator = np.random.default_rng(0)
    pool = generator.normal(5, [1, 10, 0.1], (200, 3)).astype(np.float32)
    pool[:, 1] = 7  # says nothing, and has no spread
    classes = generator.integers(0, 3, 200)
    arrays = {"pool_inputs": pool, "pool_classes": classes, "test_inputs": pool[:50], "test_classes": classes[:50]}
    np.savez(tmp_path / "some.npz", **arrays)
    data = _peer_runs.make_data("some", 0.25, 0, _peer_runs.Places(Path(), tmp_path, Path()))
    assert len(data.train.classes) + len(data.val.classes) == 200
    assert len(data.test.classes) == 50
    assert float(data.wrong.float().mean()) == pytest.approx(0.25, abs=0.01)
    inputs = data.train.inputs.numpy()
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.std(0), [1, 0, 1], atol=0.01)
    again = [part.inputs[:, 2] for part in (data.train, data.val)]
    assert (
        torch.corrcoef(torch.stack([torch.cat(again).sort().values, torch.tensor(pool[:, 2]).sort().values]))[0, 1]
        > 0.9999
    )


# The loop


def run(proxy, *rivals, steps=50):
    models = _peer_runs.Models(proxy.data, 0, len(rivals))
    return models, _peer_runs.fit(models, proxy.data, rivals, steps, 0)


def test_a_fixed_subset_is_served_in_whole_passes_for_the_given_steps(proxy):
    kept = torch.arange(0, 300, 3)
    _, served = run(proxy, _peer_runs.Fixed(kept))
    counts = served.counts[0]
    assert int(counts.sum()) == 50 * 32
    assert set(torch.nonzero(counts).flatten().tolist()) == set(kept.tolist())
    assert set(counts[kept].tolist()) == {16}  # 1,600 are 16 passes over 100
    assert served.passes == [[100] * 16]


class Halved(_peer_runs.Fixed):
    """Remembers the losses of its batches, and halves them."""

    def __init__(self, positions):
        super().__init__(positions)
        self.batches = []

    def observe(self, positions, losses):
        self.batches.append((positions, losses.clone()))

    def weigh(self, positions):
        return torch.full((len(positions),), 0.5)


def test_models_side_by_side_are_those_trained_alone_on_batches_weighted_as_asked(proxy):
    inputs, classes = proxy.data.train.inputs, proxy.data.train.classes
    halved = Halved(torch.arange(0, 500, 2))
    models, _ = run(proxy, _peer_runs.Fixed(torch.arange(100)), halved, steps=20)
    assert len(halved.batches) == 20

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 20, pct_start=0.2)
    for positions, losses in halved.batches:
        expected = torch.nn.functional.cross_entropy(network(inputs[positions]), classes[positions], reduction="none")
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-3, atol=1e-4)
        optimizer.zero_grad()
        (0.5 * expected.mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = network(proxy.data.test.inputs)
    torch.testing.assert_close(models.logits(proxy.data.test)[1], logits, rtol=1e-3, atol=1e-3)
    right = (logits.argmax(1) == proxy.data.test.classes).double().mean()
    assert models.accuracies(proxy.data.test)[1] == pytest.approx(100 * float(right))


def test_a_proxy_logs_theta_0_and_every_epoch(proxy):
    samples = len(proxy.data.train.classes)
    assert proxy.train_logits.shape == (7, samples, 10)
    untrained = _peer_runs.Models(proxy.data, 0, 1).logits(proxy.data.train)[0]
    torch.testing.assert_close(proxy.train_logits[0], untrained)
    probabilities = softmax(proxy.train_logits.double().numpy())
    labels = proxy.data.train.classes.numpy()
    expected = -np.log(probabilities[:, np.arange(samples), labels])
    losses = proxy.trajectories
    assert losses.epochs == list(range(7))
    np.testing.assert_allclose(losses.train_losses.numpy(), expected, rtol=1e-4, atol=1e-5)
    right = (probabilities[-1].argmax(1) == labels)[~proxy.data.wrong.numpy()].mean()
    assert right > 0.8


# The methods


def test_scores_from_logits_are_those_of_the_papers(proxy):
    logits, labels = proxy.train_logits.double().numpy(), proxy.data.train.classes.numpy()
    samples = np.arange(len(labels))
    errors = softmax(logits) - np.eye(10)[labels]
    norms = np.linalg.norm(errors, axis=2)[1:2].mean(0)  # a fifth of six epochs
    np.testing.assert_allclose(_peer_rivals.error_norms(proxy).numpy(), norms, rtol=1e-4, atol=1e-6)
    others = logits.copy()
    others[:, samples, labels] = -np.inf
    margins = (logits[:, samples, labels] - others.max(2))[1:].mean(0)
    np.testing.assert_allclose(_peer_rivals.margins(proxy).numpy(), margins, rtol=1e-4, atol=1e-4)


def test_forgetting_counts_from_right_to_wrong_and_never_right_as_most():
    right = torch.tensor(
        [  # theta_0 does not count
            [1, 1, 0, 0, 1],
            [1, 0, 0, 1, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 0],
        ]
    ).bool()
    assert _peer_rivals.forgetting_events(right).tolist() == [0, 0, 1, 2, 4]


def test_the_highest_values_of_each_class_are_kept_and_ties_broken_at_random(proxy):
    labels = proxy.data.train.classes
    values = (torch.arange(len(labels)) % 4).float()
    choose = _peer_rivals._ranked(lambda _: values)
    first, second = (choose(proxy, 0.1, 40, seed).positions for seed in (0, 1))
    for kept in (first, second):
        assert set(values[kept].tolist()) == {3.0}
        assert (torch.bincount(labels[kept]) - 0.1 * torch.bincount(labels)).abs().max() < 1.01
    assert set(first.tolist()) != set(second.tolist())


@pytest.mark.parametrize("method", ["random", "CLD, drawn"])
def test_anew_begins_with_the_fixed_subset_and_goes_on_to_others(proxy, method):
    rival = _peer_rivals.RIVALS[f"{method}, anew"].make(proxy, 0.1, 40, 5)
    drawn = [set(rival.draw(0).tolist()) for _ in range(3)]
    assert drawn[0] == set(METHODS[method].choose(proxy.trajectories, 0.1, 5).tolist())
    assert drawn[0] != drawn[1] != drawn[2]
    again = _peer_rivals.RIVALS[f"{method}, anew"].make(proxy, 0.1, 40, 5)
    assert [set(again.draw(0).tolist()) for _ in range(3)] == drawn


def test_scores_are_computed_once(proxy):
    losses = _peer_runs.Scored(proxy.trajectories.train_losses, proxy.trajectories.val_losses)
    assert losses.score() is losses.score()
    assert losses.score(cutoff_epoch=4).epochs == [0, 1, 2, 3, 4]


def test_infobatch_leaves_out_half_of_the_easy_and_doubles_the_rest_until_the_last_eighth():
    rival = _peer_rivals.InfoBatch(1000, steps=80, seed=0)
    assert len(rival.draw(0)) == 1000  # nothing is known yet
    losses = torch.cat([torch.full((600,), 0.1), torch.full((400,), 2.0)])
    rival.observe(torch.arange(980), losses[:980])
    assert set(range(600, 1000)) <= set(rival.draw(9).tolist())  # 20 are still to come, and none of them is easy
    rival.observe(torch.arange(1000), losses)
    served = rival.draw(10)
    assert len(served) == len(served.unique()) == 700
    assert set(range(600, 1000)) <= set(served.tolist())
    weights = rival.weigh(served)
    assert set(weights[served < 600].tolist()) == {2.0}
    assert set(weights[served >= 600].tolist()) == {1.0}
    other = rival.draw(20)
    assert set(other.tolist()) != set(served.tolist())
    assert len(rival.draw(70)) == 1000
    assert set(rival.weigh(torch.arange(1000)).tolist()) == {1.0}


def test_with_two_classes_losses_alone_give_margins_and_order_error_norms(proxy):
    logits = 3 * torch.randn(5, 40, 2, generator=torch.Generator().manual_seed(0))
    part = _peer_runs.Part(torch.zeros(40, 1), torch.arange(40) % 2)
    data = _peer_runs.Data(part, part, part, torch.zeros(40).bool(), proxy.data.preset)
    two = _peer_runs.Proxy(logits, logits, data, Path())
    torch.testing.assert_close(_peer_rivals._log_odds(two).float(), _peer_rivals.margins(two), rtol=1e-3, atol=1e-3)
    for name in ("EL2N", "forgetting", "AUM"):
        assert _peer_rivals.RIVALS[name].agreement(two) == pytest.approx(1, abs=1e-5)


# The tables


def row(method, accuracy, *, dataset="digits", noise="0.0", fraction="0.1", seed="0"):
    found = {"dataset": dataset, "noise": noise, "seed": seed, "fraction": fraction, "method": method}
    return {**found, "accuracy": str(accuracy), "from_losses": ""}


ROWS = [
    *(row("random", value, seed=str(seed)) for seed, value in enumerate((80, 82))),
    *(row("random, anew", value, seed=str(seed)) for seed, value in enumerate((85, 87))),
    *(row("CLD", value, seed=str(seed)) for seed, value in enumerate((86, 86))),
    *(row("AUM", 82, seed=seed) for seed in "01"),
    *(row("everything", value, fraction="1.0", seed=str(seed)) for seed, value in enumerate((90, 90))),
    *(
        row(method, value, dataset="letter", seed=seed)
        for method, value in (("random", 50), ("random, anew", 60), ("CLD", 40))
        for seed in "01"
    ),
    *(row(method, 70, dataset="landsat") for method in ("random", "random, anew", "CLD")),  # one seed has no spread
]


def test_the_best_of_a_size_is_bold_and_everything_stands_aside():
    assert peers.table(ROWS, "digits").splitlines()[2:] == [
        "| everything | nothing | 90.0 ± 0.0 |",
        "| random | nothing | 81.0 ± 1.4 |",
        "| random, anew | nothing | **86.0 ± 1.4** |",
        "| CLD | losses | **86.0 ± 0.0** |",
        "| AUM | margins | 82.0 ± 0.0 |",
    ]


def test_the_overview_counts_places_on_both_kinds_of_sets():
    lines = {line.split(" | ")[0].strip("| "): line for line in peers.overview(ROWS).splitlines()[2:]}
    assert lines["CLD"] == "| CLD | losses | +5.0 | -10.0 | 1 / 0 / 1 | +0.0 | -20.0 | 1 / 1 / 0 |"
    assert lines["AUM"] == "| AUM | margins | +1.0 |  | 0 / 1 / 0 | -4.0 |  | 1 / 0 / 0 |"
    assert lines["random"] == "| random | nothing |  |  |  | -5.0 | -10.0 | 2 / 0 / 0 |"
    assert lines["everything"] == "| everything | nothing | +9.0 |  | 0 / 0 / 1 | +4.0 |  | 0 / 0 / 1 |"


# DataCull, where it is installed


@pytest.mark.parametrize("method", list(_peer_datacull.DATACULL))
@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_its_classes_keep_the_share_asked_for(proxy, method, fraction):
    pytest.importorskip("datacull")
    rival = _peer_datacull.DATACULL[method].make(proxy, fraction, 40, 0)
    _, served = run(proxy, rival, steps=40)
    samples = len(proxy.data.wrong)
    assert np.mean(served.passes[0]) == pytest.approx(fraction * samples, abs=12)
    fixed = method.removeprefix("DataCull: ") in ("CCS", "CCS, told", "TDDS", "MetriQ")
    assert (int((served.counts > 0).sum()) <= fraction * samples + 1) == fixed


@pytest.mark.parametrize("method", ["DataCull: RS2", "DataCull: RCAP"])
def test_what_it_draws_does_not_depend_on_what_is_trained_beside_it(proxy, method):
    pytest.importorskip("datacull")
    make = _peer_datacull.DATACULL[method].make
    _, alone = run(proxy, make(proxy, 0.1, 20, 0), steps=20)
    _, beside = run(proxy, make(proxy, 0.1, 20, 0), make(proxy, 0.1, 20, 0), make(proxy, 0.1, 20, 1), steps=20)
    first, second, other = beside.counts
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    if method == "DataCull: RS2":  # RCAP draws by losses, which are rounded another way
        assert torch.equal(first, alone.counts[0])


def test_its_margins_are_those_of_the_probabilities(proxy):
    pytest.importorskip("datacull")
    probabilities, labels = softmax(proxy.train_logits[1:].double().numpy()), proxy.data.train.classes.numpy()
    samples = np.arange(len(labels))
    own = probabilities[:, samples, labels].copy()
    probabilities[:, samples, labels] = -np.inf
    expected = (own - probabilities.max(2)).mean(0)
    np.testing.assert_allclose(_peer_datacull._importance("AUMImportance", proxy), expected, atol=1e-4)

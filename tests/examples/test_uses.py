"""What the tables on tuning, cleaning and keeping rely on: the plain training loop, and what is drawn and removed."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import _grid
import _runs
import cleaning
import keeping
import tuning
from _common import Classifier, Images, Splits, load, quiet, quiet_trainer
from _methods import METHODS
from _tables import load_table
from _uses import accuracy, always, drawer, train

from lightning_cld import baselines

CASE = _runs.Case("digits", "mlp", 4, 0.2, "symmetric", 0.0, 1.0, seed=0)
POOL, TEST = load("digits", None)


@pytest.fixture(scope="module", autouse=True)
def _threads():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_grid, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
        yield


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return _runs.Settings(Path("nowhere"), tmp_path_factory.mktemp("work"), 40)


# The plain loop


class Watched(Classifier):
    """A classifier that remembers the first pixel of every sample that it is trained on."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), batch[0].flatten(1)[:, 0].tolist()]
        return super().training_step(batch, batch_idx)


def numbered(count):
    images = torch.arange(count).float().reshape(count, 1, 1, 1).expand(count, 1, 1, 2)
    return Images(images, torch.arange(count) % 2)


def test_each_epoch_passes_once_over_what_it_draws_and_the_last_ends_with_the_steps():
    data, asked = numbered(20), []

    def draw(epoch):
        asked.append(epoch)
        return torch.arange(5 * epoch, 5 * epoch + 5)

    model = Watched("digits", data, 0.01, seed=0, network="mlp")
    train(model, data, draw, steps=8, batch_size=2, seed=1)
    assert asked == [0, 1, 2]
    assert [len(batch) for batch in model.seen] == [2, 2, 1, 2, 2, 1, 2, 2]
    epochs = [[pixel for batch in model.seen[start : start + 3] for pixel in batch] for start in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert epochs[0] != sorted(epochs[0]) or epochs[1] != sorted(epochs[1])
    assert not model.training


def test_the_plain_loop_trains_as_the_trainer_does():
    quiet()
    data = Images(POOL.images[:200], POOL.targets[:200])  # one batch an epoch, so that the order does not matter
    models = [Classifier("digits", data, 0.1, seed=0, network="mlp") for _ in range(2)]
    quiet_trainer(None, steps=12).fit(models[0], datamodule=Splits(data, data, data, 200))
    train(models[1], data, always(torch.arange(200)), steps=12, batch_size=200, seed=0)
    for theirs, ours in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    right = models[1](TEST.images).argmax(dim=1).numpy() == TEST.targets.numpy()
    assert accuracy(models[1], TEST) == round(100 * right.mean(), 2)


@pytest.mark.parametrize("method", ["random", "CLD, drawn"])
def test_a_draw_anew_differs_from_epoch_to_epoch_and_a_fixed_one_does_not(setup, method):
    fixed, anew = (drawer(CASE, setup, method, 0.1, anew=anew) for anew in (False, True))
    assert torch.equal(fixed(0), fixed(3))
    assert not torch.equal(anew(0), anew(3))
    assert torch.equal(anew(3), anew(3))
    classes = _runs.make_splits(CASE, setup.root)[0].train.targets
    counts = [torch.bincount(classes[draw]).tolist() for draw in (fixed(0), anew(0), anew(3))]
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0]) == round(0.1 * len(classes))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_its_share(setup, method):
    losses = _runs.run_proxy(replace(CASE, epochs=9), setup).trajectories  # a third of them is enough for scores
    chosen = METHODS[method].choose(losses, 0.1, 0).tolist()
    assert len(set(chosen)) == 115
    assert chosen == sorted(chosen)


# Tuning


def full(validation, test):
    return [{"validation": str(seen), "test": str(worth)} for seen, worth in zip(validation, test, strict=True)]


def test_a_choice_is_judged_as_scipy_and_hand_would():
    generator = np.random.default_rng(0)
    seen = generator.integers(0, 8, 20).astype(float)  # with ties
    worth = seen + generator.normal(size=20)
    spearman, kendall, regret, _ = tuning.judge(seen.tolist(), full(worth, worth))
    assert spearman == pytest.approx(spearmanr(seen, worth).statistic, abs=1e-6)
    assert kendall == pytest.approx(kendalltau(seen, worth).statistic, abs=1e-6)
    assert regret == pytest.approx(worth.max() - worth[seen.argmax()])
    # The second is chosen at once. Of the last three everything's validation finds the third, though not the best test.
    judged = tuning.judge([1.0, 4.0, 3.0, 2.0], full([99.0, 80.0, 95.0, 94.0], [97.0, 88.0, 91.5, 92.0]))
    assert judged[2:] == pytest.approx((9.0, 5.5))


def test_the_configurations_are_the_same_every_time_and_within_their_ranges():
    twenty = tuning.configurations("mlp", 20)
    assert tuning.configurations("mlp", 5) == twenty[:5]
    assert len(set(twenty)) == 20
    assert all(0.005 <= each.lr <= 0.5 and 1e-5 <= each.weight_decay <= 1e-2 for each in twenty)
    assert {each.width for each in twenty} == set(tuning.WIDTHS["mlp"])
    assert {each.augmented for each in twenty} == {False, True}


@pytest.mark.parametrize(("network", "shape"), [("mlp", (1, 8, 8)), ("cnn8", (1, 16, 16))])
@pytest.mark.parametrize("augmented", [True, False])
def test_a_configuration_is_what_is_trained(network, shape, augmented):
    data = Images(torch.randint(256, (30, *shape), dtype=torch.uint8), torch.arange(30) % 3)
    configuration = tuning.Configuration(0.25, 1e-3, tuning.WIDTHS[network.rstrip("8")][1], augmented)
    model = tuning.Tuned("digits", data, network, configuration, seed=0)
    widths = [layer.weight.shape[0] for layer in model.modules() if hasattr(layer, "weight")]
    assert model.lr == 0.25
    assert widths[0] == configuration.width
    assert widths[-1] == 3
    model.eval()  # so that only augmentation can change the loss
    torch.manual_seed(0)
    losses = {model.training_step((data.images, data.targets), 0).item() for _ in range(3)}
    assert len(losses) == (3 if augmented else 1)


def tuning_row(way, number, seed, validation, test, steps, paid=0.0):
    values = {"dataset": "digits", "noise": 0.0, "seed": seed, "epochs": 10, "trained_on": way, "configuration": number}
    values |= {"validation": validation, "test": test, "steps": steps, "selection_epochs": paid}
    return {name: str(value) for name, value in values.items()}


def test_the_cost_of_tuning_is_all_steps_and_the_proxy_in_trainings_on_everything():
    worth = [[90.0, 80.0, 85.0], [70.0, 75.0, 60.0]]
    rows = [
        tuning_row("everything", n, seed, worth[seed][n], worth[seed][n], 100) for seed in (0, 1) for n in (2, 0, 1)
    ]
    rows += [tuning_row("CLD", n, seed, [50, 60, 55][n], 0, 10, 12.0) for seed in (0, 1) for n in (0, 1, 2)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tuning.table(rows, "digits").splitlines()]
    found = {line[1]: line[2:] for line in lines[2:]}
    assert found["everything"] == ["3.0", "1.00 ± 0.00", "1.00 ± 0.00", "0.0 ± 0.0", "0.0 ± 0.0"]
    assert found["CLD"][0] == "1.5"  # 3 x 10 / 100 and 12 / 10
    assert found["CLD"][3] == "5.0 ± 7.1"  # 10 and 0
    # Seed 0 judged by seed 1's choice, whose best is the worst there, and the other way round.
    assert found["everything, another seed"][3] == "7.5 ± 3.5"
    assert found["none, chosen by lot"][3] == f"{(5 + 6 + 2 / 3) / 2:.1f} ± {(5 / 3) / 2**0.5:.1f}"


# Cleaning


def removed(what, setup):
    return cleaning.find({**vars(CASE), "removed": what}, setup)


def test_what_is_removed_is_what_its_name_says(setup):
    _, wrong = _runs.make_splits(CASE, setup.root)
    losses = _runs.run_proxy(CASE, setup).trajectories
    scores = losses.score()
    plausible, sure = scores.plausibility.double().numpy(), scores.confidence.double().numpy()
    suspects = np.argsort(np.where(plausible < 1, plausible * sure, np.inf), kind="stable")
    suspects = suspects[: round((1 - plausible).sum())]
    not_positive = set(np.flatnonzero(scores.values.numpy() <= 0).tolist())
    assert 0 < len(suspects) < len(wrong) / 2
    assert not_positive
    assert not_positive != set(suspects.tolist())
    by_loss, by_score = -baselines.lowest_mean_loss(losses).numpy(), losses.score().values.numpy()
    found = {what: removed(what, setup) for what in cleaning.REMOVALS if what != cleaning.CLEANLAB}
    sets = {what: set(positions.tolist()) for what, (positions, _) in found.items()}
    assert all(len(sets[what]) == len(positions) for what, (positions, _) in found.items())
    assert sets["nothing"] == set()
    assert sets["suspects()"] == set(suspects.tolist())
    assert sets[cleaning.FORMER] == not_positive
    assert sets["the wrong ones, if known"] == set(np.flatnonzero(wrong.numpy()).tolist())
    for what in ("the draw's rest, as many", "highest mean loss, as many", "random, as many"):
        assert len(sets[what]) == len(suspects)
    count = int(wrong.sum())
    assert sets["highest mean loss, as many"] == set(np.argsort(-by_loss, kind="stable")[: len(suspects)].tolist())
    assert sets["highest mean loss, as many as are wrong"] == set(np.argsort(-by_loss, kind="stable")[:count].tolist())
    assert sets["lowest CLD, as many as are wrong"] == set(np.argsort(by_score, kind="stable")[:count].tolist())
    free = {what for what, (_, cost) in found.items() if cost == 0}
    assert free == {"nothing", "random, as many", "the wrong ones, if known"}


def test_cleanlab_gets_the_labels_and_probabilities_of_models_that_did_not_see_the_sample(setup, monkeypatch):
    seen, package, module, fit = {}, ModuleType("cleanlab"), ModuleType("cleanlab.filter"), cleaning.fit

    def find_label_issues(labels, probabilities, **options):
        seen.update(labels=labels, probabilities=probabilities, **options)
        return np.array([3, 1])

    def remembered(case, data, kept, seed):
        model, steps = fit(case, data, kept, seed)
        seen.setdefault("models", []).append((model, set(kept.tolist())))
        return model, steps

    module.find_label_issues = find_label_issues
    monkeypatch.setitem(sys.modules, "cleanlab", package)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", module)
    monkeypatch.setattr(cleaning, "fit", remembered)
    train_set = _runs.make_splits(CASE, setup.root)[0].train
    positions, cost = removed("cleanlab", setup)
    assert positions.tolist() == [3, 1]
    assert cost == pytest.approx(4 * CASE.epochs, rel=0.05)
    assert seen["labels"].tolist() == train_set.targets.tolist()
    np.testing.assert_allclose(seen["probabilities"].sum(axis=1), 1, atol=1e-5)
    assert len(seen["models"]) == 5
    times_seen = np.zeros(len(train_set))
    for model, kept in seen["models"]:
        rest = sorted(set(range(len(train_set))) - kept)
        expected = model(train_set.images[rest]).softmax(dim=1).detach().numpy()
        np.testing.assert_allclose(seen["probabilities"][rest], expected, atol=1e-5)
        times_seen[list(kept)] += 1
    assert set(times_seen.tolist()) == {4}


def test_without_cleanlab_it_says_what_to_install_and_how_to_do_without(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cleanlab" else found(name))
    with pytest.raises(SystemExit, match=r'pip install cleanlab`, or do without it by --remove "nothing" "suspects'):
        cleaning.main(["--dataset", "digits", "--csv", str(tmp_path / "a.csv")])
    assert not (tmp_path / "a.csv").exists()


# Data


def test_a_part_of_the_pool_has_the_same_shares_of_the_classes(setup):
    case = _runs.Case("digits", "mlp", 4, 0.0, "symmetric", 0.0, 1.0, seed=0, pool=500)
    splits, _ = _runs.make_splits(case, setup.root)
    assert len(splits.train) + len(splits.val) == 500
    shares = torch.bincount(torch.cat([splits.train.targets, splits.val.targets])) / 500
    expected = torch.bincount(POOL.targets) / len(POOL)
    assert float((shares - expected).abs().max()) < 1 / 500


def write_table(path, **changes):
    generator = np.random.default_rng(0)
    arrays = {
        "pool_inputs": generator.normal(7, 3, (40, 5)).astype(np.float16),
        "pool_classes": np.arange(40) % 2,
        "test_inputs": generator.normal(9, 3, (10, 5)).astype(np.float16),
        "test_classes": np.arange(10) % 2,
    }
    arrays["pool_inputs"][:, 2] = 4
    np.savez(path, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return arrays


def test_a_table_is_standardised_by_its_pool(tmp_path):
    arrays = write_table(tmp_path / "a.npz")
    pool, test = load_table(tmp_path / "a.npz")
    inputs = arrays["pool_inputs"].astype(np.float64)
    deviation = inputs.std(axis=0, ddof=1)
    deviation[2] = 1
    for part, name in ((pool, "pool"), (test, "test")):
        expected = (arrays[f"{name}_inputs"].astype(np.float64) - inputs.mean(axis=0)) / deviation
        np.testing.assert_allclose(part.images[:, 0, 0].numpy(), expected, atol=1e-4)
        assert part.images.dtype == torch.float32
        assert part.targets.tolist() == arrays[f"{name}_classes"].tolist()


@pytest.mark.parametrize("fault", ["missing", "other arrays", "not an archive"])
def test_another_file_is_refused_by_name(tmp_path, fault):
    path = tmp_path / "letter.npz"
    if fault == "other arrays":
        write_table(path, test_inputs=None)
    elif fault == "not an archive":
        path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(SystemExit, match=r"letter\.npz must be an \.npz file that holds pool_inputs, pool_classes"):
        load_table(path)


# The scripts


@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        (tuning, ["--configurations", "2", "--seeds", "2"], 2 * 9 * 2),
        (cleaning, ["--seeds", "1", "--remove", "nothing", "suspects()", "the draw's rest, as many"], 3),
        (keeping, ["--seeds", "1", "--steps", "10", "--fractions", "0.05", "--methods", "random", "CLD"], 9),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_script_runs_and_prints_its_table(tmp_path, capsys, script, arguments, rows):
    path = tmp_path / "out.csv"
    common = ["--dataset", "digits", "--epochs", "5", "--noise", "0.2"]
    script.main([*common, *arguments, "--csv", str(path), "--work", str(tmp_path / "work")])
    printed = capsys.readouterr().out
    assert len(_grid.read_rows(path)) == rows
    assert script.table(_grid.read_rows(path), "digits") in printed
    assert "nan" not in printed


def test_longer_training_takes_as_many_steps_for_every_size(setup):
    cell = {**vars(CASE), "of_steps": 40, "times": 4}
    few = keeping.run_cell({**cell, "method": "random", "fraction": 0.01}, setup)
    everything = keeping.run_cell({**cell, "method": "everything", "fraction": 1.0}, setup)
    assert (few["steps"], everything["steps"]) == (160, 160)
    assert (few["samples"], everything["samples"]) == (11, 1146)
    assert everything["wrong"] == pytest.approx(0.2, abs=0.001)
    assert few["accuracy"] < everything["accuracy"]


def test_every_published_order_is_one_of_twenty_configurations():
    rows = _grid.read_rows(_runs.RESULTS / "tuning.csv")
    counts = Counter((row["dataset"], row["noise"], row["seed"], row["trained_on"]) for row in rows)
    assert set(counts.values()) == {20}

"""What the tables on the rules rely on: networks side by side are as good as alone, and cells are counted rightly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import _grid
import _rule_cases
import _rule_tables
import rules
from _common import Images
from _diagnoses import diagnose
from _rule_cases import CASES, CHOSE, JUDGE, TINY, Case, accuracies_of, load_data, run_proxies
from _side_by_side import Networks, one_cycle, train

from lightning_cld import CLDScores, LossTrajectories

DIGITS = load_data("digits", Path("nowhere"), None)


@pytest.fixture(scope="module")
def proxies():
    return run_proxies(DIGITS, CASES["20 % wrong"], 2)


# Networks side by side


def alone(networks, number):
    """The same network as torch's own layers."""
    first, first_bias, second, second_bias = (parts[number].clone() for parts in networks.parameters)
    layers = nn.Sequential(nn.Linear(*first.shape), nn.ReLU(), nn.Linear(*second.shape))
    with torch.no_grad():
        for layer, weight, bias in ((layers[0], first, first_bias), (layers[2], second, second_bias)):
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias[0])
    return layers


def a_problem(networks, steps, batch):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 5, generator=generator)
    order = torch.randint(60, (networks, steps * batch), generator=generator)
    return inputs, order, torch.randint(3, order.shape, generator=generator)


def test_networks_side_by_side_become_what_each_becomes_by_torch():
    networks, steps, batch = Networks(5, 7, 3, [1, 2, 3]), 40, 8
    inputs, order, labels = a_problem(3, steps, batch)
    separate = [alone(networks, number) for number in range(3)]
    for layers, of_layers, own_labels in zip(separate, order, labels, strict=True):
        optimizer = torch.optim.SGD(layers.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = one_cycle(step, steps)
            part = slice(step * batch, (step + 1) * batch)
            optimizer.zero_grad()
            nn.functional.cross_entropy(layers(inputs[of_layers[part]]), own_labels[part]).backward()
            optimizer.step()
    counted = []
    train(networks, inputs, order, labels, batch, counted.append)
    assert counted == list(range(1, steps + 1))
    for number, layers in enumerate(separate):
        expected = layers(inputs).detach()
        torch.testing.assert_close(networks.outputs(number, inputs), expected, rtol=1e-4, atol=1e-5)
        losses = nn.functional.cross_entropy(expected, labels[0, :60], reduction="none")
        torch.testing.assert_close(networks.losses(number, inputs, labels[0, :60]), losses, rtol=1e-4, atol=1e-5)


def test_initial_weights_are_those_of_linear_layers_and_follow_from_the_seed():
    several, one = Networks(16, 50, 10, [1, 2]), Networks(16, 50, 10, [2])
    for parts, own, fan_in in zip(several.parameters, one.parameters, (16, 16, 50, 50), strict=True):
        assert torch.equal(parts[1], own[0])
        assert not torch.equal(parts[0], parts[1])
        assert parts.abs().max() <= fan_in**-0.5
    first = several.parameters[0]
    assert first.std() == pytest.approx(16**-0.5 / 3**0.5, rel=0.05)


def test_the_learning_rate_rises_for_a_fifth_and_falls_to_zero():
    rates = [one_cycle(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.004)
    assert np.argmax(rates) == 200
    assert rates[200] == pytest.approx(0.1)
    assert rates[600] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-6


# Data and proxies


def test_tables_need_their_folder(tmp_path):
    with pytest.raises(SystemExit, match=r"landsat needs --tables DIR, the folder of landsat\.npz"):
        load_data("landsat", tmp_path, None)


def test_a_table_is_read_as_rows(tmp_path):
    inputs = torch.randn(40, 3).double().numpy() * 5 + 2
    arrays = {"pool_inputs": inputs, "pool_classes": np.arange(40) % 2}
    np.savez(tmp_path / "spambase.npz", **arrays, test_inputs=inputs[:7], test_classes=np.arange(7) % 2)
    data = load_data("spambase", tmp_path, tmp_path)
    assert (data.pool.shape, data.test.shape, data.count) == ((40, 3), (7, 3), 2)
    expected = (inputs - inputs.mean(0)) / inputs.std(0, ddof=1)
    np.testing.assert_allclose(data.pool.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(data.test, data.pool[:7])
    assert [name for name in CASES if name not in _rule_cases.cases_of(data)] == [
        "20 % to the next class",
        "40 % to the next class",
    ]


@pytest.mark.parametrize(("name", "samples", "classes"), [("wine", 178, 3), ("breast-cancer", 569, 2)])
def test_tiny_sets_need_no_folder_and_are_standardised_by_the_pool(name, samples, classes):
    data = load_data(name, Path("nowhere"), None)
    assert (len(data.pool) + len(data.test), data.count) == (samples, classes)
    assert len(data.test) == np.ceil(0.3 * samples)
    for labels in (data.classes, data.test_classes):
        assert set(labels.tolist()) == set(range(classes))
    np.testing.assert_allclose(data.pool.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.pool.numpy().std(0, ddof=1), 1, atol=1e-5)
    assert 1e-3 < data.test.mean(0).abs().max() < 0.5
    assert _rule_cases.cases_of(DIGITS) == list(CASES)


def test_images_become_principal_components(monkeypatch):
    images = (torch.rand(300, 1, 14, 14) * 255).to(torch.uint8)
    pool = Images(images, torch.arange(300) % 10)
    monkeypatch.setattr(_rule_cases, "load", lambda name, root: (pool, Images(images[:5], pool.targets[:5])))
    data = load_data("fashion-mnist", Path("nowhere"), None)
    assert data.pool.shape == (300, 96)
    assert data.pool.std() == pytest.approx(1.0, abs=1e-4)
    covariance = np.cov(data.pool.numpy().T)
    assert abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3
    assert (np.diff(np.diag(covariance)) <= 1e-3).all()  # the largest first
    torch.testing.assert_close(data.test, data.pool[:5])


@pytest.mark.parametrize(
    ("case", "wrong", "val_wrong", "rows", "hidden"),
    [
        (Case(0.2), 0.2, 0.0, 21, 128),
        (Case(0.4, "pair"), 0.4, 0.0, 21, 128),
        (Case(val_noise=0.2), 0.0, 0.2, 21, 128),
        (Case(0.2, epochs=4, hidden=32), 0.2, 0.0, 5, 32),
        (Case(0.2, imbalance=10), 0.2, 0.0, 21, 128),
    ],
    ids=str,
)
def test_a_case_has_its_faults(monkeypatch, case, wrong, val_wrong, rows, hidden):
    shapes = []

    def seen(*arguments):
        shapes.append(arguments[1])
        return Networks(*arguments)

    monkeypatch.setattr(_rule_cases, "Networks", seen)
    proxy = run_proxies(DIGITS, case, 1)[0]
    true = DIGITS.classes[proxy.positions]
    assert shapes == [hidden]
    assert proxy.losses.train_losses.shape == (rows, len(proxy.positions))
    assert torch.equal(proxy.wrong, proxy.labels != true)
    assert float(proxy.wrong.double().mean()) == pytest.approx(wrong, abs=0.002)
    if case.kind == "pair":
        assert torch.equal(proxy.labels[proxy.wrong], (true[proxy.wrong] + 1) % 10)
    *_, val_split, val_labels = _rule_cases._split(DIGITS, case, 0)
    assert float((val_labels != DIGITS.classes[val_split]).double().mean()) == pytest.approx(val_wrong, abs=0.005)
    assert not torch.isin(val_split, proxy.positions).any()
    sizes = torch.bincount(true)
    assert float(sizes[0] / sizes[9]) == pytest.approx(case.imbalance, rel=0.15)
    assert torch.equal(proxy.losses.val_classes, val_labels)


def test_a_proxy_follows_from_its_seed_alone(proxies):
    before = torch.get_rng_state()
    one = run_proxies(DIGITS, CASES["20 % wrong"], 1)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.positions, proxies[0].positions)
    assert torch.equal(one.labels, proxies[0].labels)
    # A batched product rounds in another order, and training makes more of it.
    torch.testing.assert_close(one.losses.train_losses[:3], proxies[0].losses.train_losses[:3], rtol=1e-3, atol=1e-3)
    assert not torch.equal(proxies[0].positions, proxies[1].positions)
    assert not torch.equal(proxies[0].losses.train_losses[0], proxies[1].losses.train_losses[0])
    assert proxies[0].losses.train_losses[0].mean() == pytest.approx(np.log(10), abs=0.2)
    assert proxies[0].losses.val_losses[-1].mean() < 0.6


# Targets


def test_targets_learn_from_their_own_coresets_alone():
    everything = torch.arange(len(DIGITS.pool))
    of_two = everything[DIGITS.classes < 2]
    shifted = (DIGITS.classes + 1) % 10
    coresets = [(everything, DIGITS.classes, 0), (of_two, DIGITS.classes[of_two], 0), (everything, shifted, 0)]
    right, two, wrong = accuracies_of(DIGITS, coresets, 300)
    share = 100 * float((DIGITS.test_classes < 2).double().mean())
    assert right > 93
    assert two == pytest.approx(share, abs=2)
    assert wrong < 5


def test_targets_are_trained_in_parts_if_they_are_many(monkeypatch):
    everything, shifted = torch.arange(len(DIGITS.pool)), (DIGITS.classes + 1) % 10
    coresets = [(everything, labels, 0) for labels in (shifted, DIGITS.classes, DIGITS.classes)]
    parts = []
    monkeypatch.setattr(_rule_cases, "train", lambda *arguments: parts.append(len(arguments[2])) or train(*arguments))
    monkeypatch.setattr(_rule_cases, "_WEIGHTS", 2 * 64 * 128 + 1)
    accuracies = accuracies_of(DIGITS, coresets, 60)
    assert parts == [2, 1]
    assert accuracies[0] < 10
    assert min(accuracies[1:]) > 80


def test_a_target_follows_from_its_coreset_and_its_seed():
    some = torch.arange(100)
    coresets = [(some, DIGITS.classes[some], seed) for seed in (0, 1, 0)]
    once, other, again = accuracies_of(DIGITS, coresets, 40)
    assert once == again != other
    assert accuracies_of(DIGITS, coresets[:1], 40)[0] == pytest.approx(once, abs=0.5)  # rounding may differ


def test_targets_of_other_seeds_have_other_weights_and_orders(monkeypatch):
    seen = []
    monkeypatch.setattr(_rule_cases, "train", lambda networks, inputs, *rest: seen.append((networks, *rest)))
    some = torch.arange(100)
    accuracies_of(DIGITS, [(some, DIGITS.classes[some], seed) for seed in (0, 1, 0)], 40)
    networks, order, labels, batch = seen[0]
    assert order.shape == (3, 40 * batch)
    assert torch.equal(labels, DIGITS.classes[order])
    for parts in (networks.parameters[0], order):
        assert torch.equal(parts[0], parts[2])
        assert not torch.equal(parts[0], parts[1])
    assert torch.equal(torch.bincount(order[0, :1200]), torch.full((100,), 12))  # twelve whole passes


# The rules


def a_proxy(proxy, values, chances):
    """One class of samples with these scores, whose labels always have these probabilities but at first."""
    labels, losses = torch.zeros(len(values), dtype=torch.int64), -torch.tensor(chances).log().repeat(5, 1)
    losses[0] = 0.7
    trajectories = LossTrajectories(losses, torch.rand(5, 3))
    return replace(proxy, labels=labels, losses=trajectories, scores=CLDScores(values, labels))


def test_all_rules_choose_as_many_of_each_class_and_random_ones_by_their_seed(proxies):
    proxy = proxies[0]
    chosen = {name: [rule(proxy, 0.2, seed) for seed in (0, 0, 1)] for name, rule in rules.RULES.items()}
    sizes = {tuple(torch.bincount(proxy.labels[kept]).tolist()) for every in chosen.values() for kept in every}
    assert len(sizes) == 1
    for name, (once, again, other) in chosen.items():
        assert torch.equal(once, again)
        assert torch.equal(once, other) == (name == "top")
    assert torch.equal(chosen["top"][0], proxy.scores.select(fraction=0.2))
    assert torch.equal(chosen["draw"][0], proxy.scores.select(fraction=0.2, rule="draw", seed=2000))
    assert not proxy.wrong[chosen["right labels"][0]].any()
    wrong = {name: float(proxy.wrong[every[0]].double().mean()) for name, every in chosen.items()}
    assert wrong["random"] == pytest.approx(0.2, abs=0.06)
    assert wrong["draw"] < 0.06


def test_right_labels_are_followed_by_wrong_ones(proxies):
    proxy = proxies[0]
    kept = rules.RULES["right labels"](proxy, 0.9, 0)
    left_out = torch.ones(len(proxy.labels), dtype=torch.bool)
    left_out[kept] = False
    for label in range(10):
        own = proxy.labels == label
        some_wrong = bool((proxy.wrong & own & ~left_out).any())
        assert not (some_wrong and bool((~proxy.wrong & own & left_out).any()))


def test_the_former_draw_is_by_score_times_a_power_of_uncertainty(proxies):
    # So many negative scores make the threshold Otsu's, which is the best of the low scores.
    values = torch.tensor([0.9, 0.8, 0.85, 0.7, -0.3, -0.4, 0.05, 0.0])
    chances = [0.5, 0.99, 0.9, 0.01, 0.5, 0.5, 0.5, 0.5]
    proxy = a_proxy(proxies[0], values, chances)
    weights = values.double().numpy() * np.array([p * (1 - p) for p in chances]) ** (0.125**0.25)
    weights[4:] = 0
    drawn = [int(rules.RULES["former draw"](proxy, 0.125, seed)[0]) for seed in range(2000)]
    found = np.bincount(drawn, minlength=8) / 2000
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.03)
    assert found[4:].sum() == 0
    # More than there are above the threshold: the best-scored of the rest.
    assert rules.RULES["former draw"](proxy, 6 / 8, 1).tolist() == [0, 1, 2, 3, 6, 7]


# The diagnosis


def test_a_diagnosis_agrees_with_scikit_learn(proxies):
    proxy = proxies[0]
    found, wrong = diagnose(proxy), proxy.wrong.numpy()
    assert found["share"] == pytest.approx(wrong.mean(), abs=1e-4)
    assert [found[name] for name in ("estimate", "low", "high")] == proxy.scores.metadata["implausible"]["share"]
    assert found["held"] == (found["low"] <= wrong.mean() <= found["high"])
    classes = proxy.scores.metadata["implausible"]["classes"]
    true = {label: wrong[proxy.labels.numpy() == int(label)].mean() for label in classes}
    assert len(true) == 10
    errors = [abs(classes[label][0] - true[label]) for label in classes]
    assert found["class_error"] == pytest.approx(np.mean(errors), abs=1e-4)
    held = [classes[label][1] <= true[label] <= classes[label][2] for label in classes]
    assert found["classes_held"] == pytest.approx(np.mean(held), abs=1e-4)

    lists = {
        "suspects": proxy.scores.suspects().numpy(),
        "as many of lowest CLD": np.argsort(proxy.scores.values.numpy())[: found["suspects: count"]],
        "CLD below zero": np.flatnonzero(proxy.scores.values.numpy() <= 0),
    }
    for name, listed in lists.items():
        guess = np.isin(np.arange(len(wrong)), listed)
        assert found[f"{name}: count"] == guess.sum() > 0
        assert found[f"{name}: precision"] == pytest.approx(precision_score(wrong, guess), abs=1e-4)
        assert found[f"{name}: recall"] == pytest.approx(recall_score(wrong, guess), abs=1e-4)

    losses = proxy.losses.train_losses.double().numpy()
    confidence = proxy.scores.confidence.double().numpy()
    scores = {
        "plausibility x confidence": -proxy.scores.plausibility.double().numpy() * confidence,
        "mean loss": losses[1:].mean(0),
        "low CLD": -proxy.scores.values.numpy(),
        "low early confidence": -confidence,
    }
    assert [name for name in found if name.startswith("AUROC")] == [f"AUROC: {name}" for name in scores]
    for name, suspicion in scores.items():
        assert found[f"AUROC: {name}"] == pytest.approx(roc_auc_score(wrong, suspicion), abs=2e-3)


def test_a_diagnosis_of_right_labels_has_no_precision():
    proxy = run_proxies(DIGITS, CASES["clean"], 1)[0]
    found = diagnose(proxy)
    assert found["share"] == 0
    assert (found["suspects: count"], found["suspects: precision"]) == (0, "")
    assert {found[name] for name in found if "recall" in name or "AUROC" in name} == {""}


# Counting


@given(
    rule=st.lists(st.integers(700, 900), min_size=5, max_size=5),
    random=st.lists(st.integers(700, 900), min_size=5, max_size=5),
    shift=st.integers(-200, 200),
)
def test_a_cell_is_ahead_or_behind_by_a_paired_t_test(rule, random, shift):
    rule, random = (np.array(rule) + shift) / 10, np.array(random) / 10
    difference = rule - random
    sign = _rule_tables.sign_of(rule, random)
    spread = difference.std(ddof=1)
    if spread < 1e-9:
        return
    t = difference.mean() / (spread / 5**0.5)
    expected = int(np.sign(t)) if abs(t) > 2.776445 else 0  # Student's t of 4 degrees of freedom, 97.5 %
    assert sign == expected
    assert (sign != 0) == (ttest_rel(rule, random).pvalue < 0.05)
    assert _rule_tables.sign_of(random, rule) == -sign


@pytest.mark.parametrize(("shift", "sign"), [(0.0, 0), (0.5, 1), (-0.5, -1)])
def test_a_difference_without_spread_needs_no_test(shift, sign):
    values = np.array([80.0, 81.0, 82.5])
    assert _rule_tables.sign_of(values + shift, values) == sign


def row(dataset, case, rule, fraction, accuracies):
    return {
        **{"dataset": dataset, "case": case, "seeds": "3", "rule": rule, "fraction": str(fraction)},
        **{"samples": "9", "wrong": "0.1", "accuracies": " ".join(map(str, accuracies))},
    }


ROWS = [
    row("landsat", "clean", "random", 0.1, [80, 81, 82]),
    row("landsat", "clean", "random", 0.005, [60, 60, 60]),
    row("landsat", "20 % wrong", "random", 0.1, [70, 70, 70]),
    row("landsat", "clean", "draw", 0.1, [82, 83, 84.1]),
    row("landsat", "clean", "draw", 0.005, [50, 70, 58]),
    row("landsat", "20 % wrong", "draw", 0.1, [60, 60.1, 60]),
    row("landsat", "clean", "top", 0.1, [80, 81, 82]),
    row("digits", "clean", "random", 0.1, [10, 11, 12]),
    row("digits", "clean", "draw", 0.1, [90, 91, 93]),
    row("digits", "clean", "draw", 0.3, [90, 91, 93]),  # without random
]


def lines(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_rules_are_counted_by_the_sets_that_are_named():
    assert lines(_rule_tables.rules_table(ROWS, JUDGE)) == [
        ["top", "0", "1", "0", "+0.00", "+0.0 (landsat, clean, 10 %)"],
        ["draw", "1", "1", "1", "-2.87", "-10.0 (landsat, 20 % wrong, 10 %)"],
    ]
    assert lines(_rule_tables.rules_table(ROWS, CHOSE)) == [
        ["draw", "0", "0", "1", "+80.33", "+80.3 (digits, clean, 10 %)"]
    ]
    assert len({*JUDGE, *CHOSE, *TINY}) == len(JUDGE + CHOSE + TINY)


def test_the_draw_is_compared_with_other_rules():
    assert lines(_rule_tables.rivals_table(ROWS, JUDGE)) == [
        ["top", "0", "0", "1", "+2.03", "+2.0 (landsat, clean, 10 %)"]
    ]
    assert _rule_tables.rivals_table(ROWS, JUDGE).startswith("| draw against | behind |")


def test_cells_are_counted_by_case_by_set_and_by_size():
    assert lines(_rule_tables.cases_table(ROWS, JUDGE)) == [
        ["clean", "0", "1", "1", "+0.68", "-0.7 (landsat, clean, 0.5 %)"],
        ["20 % wrong", "1", "0", "0", "-9.97", "-10.0 (landsat, 20 % wrong, 10 %)"],
    ]
    found = lines(_rule_tables.parts_table(ROWS, (*JUDGE, "digits")))
    assert [line[:4] for line in found] == [
        ["landsat", "1", "1", "1"],
        ["digits", "0", "0", "1"],
        ["0.5 % kept", "0", "1", "0"],
        ["10 % kept", "1", "0", "2"],
    ]


def test_diagnoses_are_averaged_by_case():
    def diagnosis(dataset, case, share, estimate, precision, recall, auroc):
        lists = {f"{name}: {what}": "" for name in _rule_tables.LISTS for what in ("precision", "recall")}
        return {
            **{"dataset": dataset, "case": case, "share": share, "estimate": estimate, "held": "1"},
            **{"class_error": "0.03", "classes_held": "0.5", **lists},
            **{"suspects: precision": precision, "suspects: recall": recall, "AUROC: mean loss": auroc},
        }

    rows = [
        diagnosis("landsat", "20 % wrong", "0.2", "0.18", "0.9", "0.8", "0.99"),
        diagnosis("letter", "20 % wrong", "0.2", "0.24", "", "0", "0.95"),
        {**diagnosis("letter", "clean", "0.0", "0.01", "", "", ""), "held": "0"},
        diagnosis("digits", "clean", "0.0", "0.5", "", "", ""),
    ]
    assert lines(_rule_tables.shares_table(rows, JUDGE)) == [
        ["clean", "0.0", "1.0", "1.0", "0", "3.0", "50"],
        ["20 % wrong", "20.0", "21.0", "3.0", "100", "3.0", "50"],
    ]
    table = _rule_tables.suspects_table(rows, JUDGE)
    assert table.splitlines()[0].endswith("| AUROC: mean loss |")
    assert lines(table) == [["20 % wrong", "0.900 / 0.400", "- / -", "- / -", "0.970"]]


# The script


def test_finished_cases_are_not_run_again_and_others_stay(tmp_path, monkeypatch, capsys):
    csv, diagnoses = tmp_path / "rules.csv", tmp_path / "diagnoses.csv"
    common = ["--datasets", "digits", "--seeds", "2", "--steps", "30", "--csv", str(csv), "--diagnoses", str(diagnoses)]
    rules.main([*common, "--cases", "20 % wrong, 4 epochs", "--fractions", "0.1"])
    printed = capsys.readouterr().out
    assert f"{', '.join(CHOSE)}\n\n| rule | behind |" in printed
    assert "| 20 % wrong, 4 epochs |" in printed
    assert "landsat" not in printed
    first = _grid.read_rows(csv)
    assert sorted(row["rule"] for row in first) == sorted(rules.RULES)
    for row in first:
        assert len(row["accuracies"].split()) == 2
        assert int(row["samples"]) == 115  # a tenth of 1,145 samples
    assert [row["seed"] for row in _grid.read_rows(diagnoses)] == ["0", "1"]
    files = csv.read_bytes(), diagnoses.read_bytes()

    runs = []
    monkeypatch.setattr(rules, "run_proxies", lambda *arguments: runs.append(arguments) or run_proxies(*arguments))
    rules.main([*common, "--cases", "20 % wrong, 4 epochs", "--fractions", "0.1"])
    assert (csv.read_bytes(), diagnoses.read_bytes(), runs) == (*files, [])

    trained = []
    monkeypatch.setattr(
        rules, "accuracies_of", lambda *arguments: trained.append(len(arguments[1])) or accuracies_of(*arguments)
    )
    rules.main([*common, "--cases", "20 % wrong, 4 epochs", "--fractions", "0.1", "0.3"])
    assert (len(runs), trained) == (1, [len(rules.RULES) * 2])
    rows = _grid.read_rows(csv)
    assert [row for row in rows if row["fraction"] == "0.1"] == first
    assert len(rows) == 2 * len(first)
    assert diagnoses.read_bytes() == files[1]


def test_the_accuracies_of_a_row_are_those_of_its_own_coresets(proxies, monkeypatch):
    def numbered(data, coresets, steps):
        """The number of wrong labels in each coreset, for an accuracy."""
        return [float((labels != data.classes[positions]).sum()) for positions, labels, _ in coresets]

    monkeypatch.setattr(rules, "accuracies_of", numbered)
    cells = [{"rule": rule, "fraction": fraction} for rule in rules.RULES for fraction in (0.1, 0.5)]
    rows = rules.run_case(proxies, DIGITS, cells, 1)
    for cell, found in zip(cells, rows, strict=True):
        expected = [
            int(proxy.wrong[rules.RULES[cell["rule"]](proxy, cell["fraction"], seed)].sum())
            for seed, proxy in enumerate(proxies)
        ]
        assert [float(value) for value in found["accuracies"].split()] == expected
        assert float(found["wrong"]) == pytest.approx(np.mean(expected) / int(found["samples"]), abs=1e-4)
        assert (found["rule"], found["fraction"]) == (cell["rule"], str(cell["fraction"]))

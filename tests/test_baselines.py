from __future__ import annotations

import math
import random
import statistics
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_scores, cld_oracle, losses
from scipy.integrate import trapezoid

from lightning_cld import LossTrajectories, baselines
from lightning_cld.scores import OUTSIDE

NAN, INF = float("nan"), float("inf")
OVER_EPOCHS = ["highest_mean_loss", "lowest_mean_loss", "confidence", "variability", "dual"]
FROM_LOSSES = [*OVER_EPOCHS, "area_under_loss"]
FROM_CLD = ["near_zero_cld", "lowest_cld", "stratified_cld"]
SEEDED = ["random_values", "stratified_cld"]
EVERY = [*FROM_LOSSES, *FROM_CLD, "random_values"]


# Oracles: one sample at a time, in float64


def quietly(reduce, values):
    """Runs a nan-reduction of numpy without its warning when there is no value; the result is then NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(reduce(values))


def dual_of(probabilities, window):
    """The DUAL score, averaged over the windows with at least two logged probabilities."""
    window = min(window, len(probabilities))
    products = []
    for start in range(len(probabilities) - window + 1):
        logged = [p for p in probabilities[start : start + window] if not math.isnan(p)]
        if len(logged) >= 2:
            products.append((1 - statistics.fmean(logged)) * statistics.stdev(logged))
    return statistics.fmean(products) if products else NAN


def area_of(trajectory, epochs):
    """np.interp fills holes linearly, and both ends with the nearest value."""
    logged = ~np.isnan(trajectory)
    return trapezoid(np.interp(epochs, epochs[logged], trajectory[logged]), epochs) if logged.any() else NAN


def oracle(name, train, epochs, window=10):
    """The values of the baseline `name` for every column of `train`."""
    table, epochs = torch.as_tensor(train).double().numpy(), np.asarray(epochs)
    values = []
    for trajectory in table.T:
        later = trajectory[epochs > 0]
        if np.isinf(trajectory if name == "area_under_loss" else later).any():
            values.append(NAN)
            continue
        probabilities = np.exp(-later)
        values.append(
            {
                "highest_mean_loss": lambda: quietly(np.nanmean, later),  # noqa: B023
                "lowest_mean_loss": lambda: -quietly(np.nanmean, later),  # noqa: B023
                "confidence": lambda: quietly(np.nanmean, probabilities),  # noqa: B023
                "variability": lambda: quietly(np.nanstd, probabilities),  # noqa: B023
                "dual": lambda: dual_of(probabilities.tolist(), window),  # noqa: B023
                "area_under_loss": lambda: area_of(trajectory, epochs),  # noqa: B023
            }[name]()
        )
    return np.array(values)


def assert_values(values, expected):
    assert values.dtype == torch.float32
    assert values.device.type == "cpu"
    np.testing.assert_allclose(values.double().numpy(), expected, rtol=1e-5, atol=1e-6)


# Baselines from each sample's own losses


@st.composite
def timelines(draw):
    """Losses with NaN and infinities, on a timeline with gaps that may start after training began."""
    rows, samples = draw(st.integers(2, 9)), draw(st.integers(1, 7))
    gaps = draw(st.lists(st.integers(1, 3), min_size=rows - 1, max_size=rows - 1))
    epochs = np.cumsum([draw(st.sampled_from([0, 0, 1, 4])), *gaps]).tolist()
    train = 4 * np.random.default_rng(draw(st.integers(0, 99))).random((rows, samples))
    place = st.tuples(st.integers(0, rows - 1), st.integers(0, samples - 1))
    for row, column in draw(st.lists(place, max_size=8)):
        train[row, column] = NAN
    for row, column in draw(st.lists(place, max_size=2)):
        train[row, column] = INF
    if draw(st.booleans()):
        train[:, draw(st.integers(0, samples - 1))] = NAN
    train[draw(st.lists(st.integers(0, rows - 1), max_size=2))] = NAN
    return torch.from_numpy(train.astype(np.float32)), epochs


@pytest.mark.parametrize("name", FROM_LOSSES)
@settings(max_examples=60, deadline=None)
@given(timeline=timelines(), window=st.integers(2, 12), elements=st.integers(1, 80))
def test_values_are_those_of_the_definition(name, timeline, window, elements):
    train, epochs = timeline
    logged = ~train.isnan().all(dim=1)
    if name in OVER_EPOCHS:
        logged &= torch.tensor(epochs) > 0
    made = LossTrajectories(train.clone(), torch.rand(len(train), 1), epochs=epochs)
    by = partial(baselines.dual, window=window) if name == "dual" else getattr(baselines, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "_SLICE_ELEMENTS", elements)  # from one sample at a time to all at once
        if logged.sum() < (1 if name in ("highest_mean_loss", "lowest_mean_loss", "confidence") else 2):
            with pytest.raises(ValueError, match="Log more epochs"):
                by(made)
            return
        assert_values(by(made), oracle(name, train, epochs, window))
        assert_values(made.score(by=by).values, oracle(name, train, epochs, window))
    torch.testing.assert_close(made.train_losses, train, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FROM_LOSSES)
def test_slices_are_no_larger_than_they_may_be_and_cover_every_sample(monkeypatch, name):
    train, seen = losses(6, 50), []
    nanmean = torch.Tensor.nanmean
    monkeypatch.setattr(baselines, "_SLICE_ELEMENTS", 60)
    monkeypatch.setattr(torch.Tensor, "nanmean", lambda self, dim: seen.append(self.numel()) or nanmean(self, dim=dim))
    by = partial(baselines.dual, window=3) if name == "dual" else getattr(baselines, name)
    assert_values(by(LossTrajectories(train, train)), oracle(name, train, range(6), 3))
    assert max(seen, default=0) <= 60


@pytest.mark.parametrize("name", FROM_LOSSES)
def test_losses_of_the_size_of_a_real_set_need_several_slices(name):
    train = losses(8, 2**18)
    some = np.r_[0:5, 2**17 - 3 : 2**17 + 3, 2**18 - 5 : 2**18]
    values = getattr(baselines, name)(LossTrajectories(train, train[:, :2]))
    assert len(values) == 2**18
    assert_values(values[some], oracle(name, train[:, some], range(8)))


@pytest.mark.parametrize("name", OVER_EPOCHS)
def test_the_loss_before_training_has_no_say(name):
    train = losses(8, 5)
    changed = train.clone()
    changed[0] = torch.tensor([9.0, 0.0, NAN, INF, 3.0])
    by = getattr(baselines, name)
    assert torch.equal(by(LossTrajectories(changed, train)), by(LossTrajectories(train, train)))


@pytest.mark.parametrize("name", FROM_LOSSES)
def test_the_first_checkpoint_counts_where_it_is_not_before_training(name):
    train, epochs = losses(6, 4), [1, 2, 3, 4, 5, 6]
    by = getattr(baselines, name)
    values = by(LossTrajectories(train, train, epochs=epochs))
    assert_values(values, oracle(name, train, epochs))
    train[0] += 1
    assert not torch.isclose(values, by(LossTrajectories(train, train, epochs=epochs))).any()


@pytest.mark.parametrize("name", [name for name in FROM_LOSSES if name != "dual"])
def test_a_checkpoint_that_was_not_logged_changes_nothing(name):
    train, epochs, kept = losses(7, 5), [0, 1, 3, 4, 6, 7, 9], [0, 1, 2, 4, 6]
    holes = train.clone()
    holes[[3, 5]] = NAN
    by = getattr(baselines, name)
    without = LossTrajectories(train[kept], train[kept], epochs=[epochs[row] for row in kept])
    if name == "area_under_loss":  # a straight line across the hole gives the same area, up to rounding
        assert_values(by(LossTrajectories(holes, train, epochs=epochs)), by(without).numpy())
    else:
        assert torch.equal(by(LossTrajectories(holes, train, epochs=epochs)), by(without))


def test_an_area_is_that_of_the_whole_timeline_whatever_was_not_logged():
    train = torch.full((5, 6), 2.0)
    train[0, 0] = train[2, 1] = train[4, 2] = train[:2, 3] = train[1:, 4] = NAN
    areas = baselines.area_under_loss(LossTrajectories(train, train, epochs=[0, 1, 2, 5, 8]))
    assert areas.tolist() == [16.0] * 6


@pytest.mark.parametrize("name", FROM_LOSSES)
@pytest.mark.parametrize(
    ("choice", "rows"),
    [
        ({"cutoff_epoch": 4}, [0, 1, 2, 3, 4]),
        ({"cutoff_epoch": 9}, [0, 1, 2, 3, 4, 5, 6]),
        ({"every_n_epochs": 2}, [0, 2, 4, 5, 6, 7]),
        ({"cutoff_epoch": 8, "every_n_epochs": 3}, [0, 3, 5]),
    ],
    ids=str,
)
def test_values_are_those_of_the_checkpoints_chosen(name, choice, rows):
    train, epochs = losses(8, 6), [0, 1, 2, 3, 4, 6, 8, 10]
    scores = LossTrajectories(train, train, epochs=epochs).score(**choice, by=getattr(baselines, name))
    chosen = [epochs[row] for row in rows]
    assert scores.epochs == chosen
    assert_values(scores.values, oracle(name, train[rows], chosen))


def test_a_window_longer_than_the_timeline_is_the_timeline():
    train = losses(7, 5)
    made = LossTrajectories(train, train)
    assert torch.equal(baselines.dual(made), baselines.dual(made, window=6))
    assert torch.equal(baselines.dual(made, window=10**12), baselines.dual(made, window=6))
    assert not torch.equal(baselines.dual(made, window=5), baselines.dual(made, window=6))


def test_a_window_is_ten_epochs_unless_told():
    train = losses(16, 5)
    made = LossTrajectories(train, train)
    assert_values(baselines.dual(made), oracle("dual", train, range(16), 10))
    assert not torch.isclose(baselines.dual(made), baselines.dual(made, window=9)).any()


def test_a_window_without_two_logged_epochs_is_left_out():
    train = losses(9, 3)
    train[2:5] = NAN
    values = baselines.dual(LossTrajectories(train, train), window=2)
    assert values.isfinite().all()
    assert_values(values, oracle("dual", train, range(9), 2))


def test_small_differences_under_a_large_offset_are_not_lost():
    probabilities = torch.full((20, 2), 0.9)
    probabilities[::2, 1] += 1e-4
    train = -probabilities.double().log()
    values = baselines.variability(LossTrajectories(train, train, epochs=range(1, 21)))
    expected = oracle("variability", train.float(), range(1, 21))
    np.testing.assert_allclose(expected, [0, 5e-5], rtol=1e-2, atol=1e-12)
    np.testing.assert_allclose(values.double().numpy(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("first", "name"),
    [
        ("wrong label", "highest_mean_loss"),
        ("learnt", "lowest_mean_loss"),
        ("wrong label", "area_under_loss"),
        ("learnt", "confidence"),
        ("undecided", "variability"),
        ("undecided", "dual"),
    ],
)
def test_the_sample_kept_first_is_the_one_that_the_name_promises(first, name):
    trajectories = {
        "learnt": [2.3, 0.3, 0.1, 0.02, 0.01, 0.01],
        "undecided": [2.3, 2.0, 0.2, 1.8, 0.1, 1.5],
        "wrong label": [2.3, 2.6, 3.0, 3.5, 4.0, 4.4],
    }
    train = torch.tensor(list(trajectories.values())).T
    kept = LossTrajectories(train, train).score(by=getattr(baselines, name)).select(size=1)
    assert list(trajectories)[int(kept)] == first


# Baselines from CLD

CLASSES, VAL_CLASSES = torch.tensor([0, 3, 700])[torch.arange(90) % 3], torch.tensor([0, 3, 700])[torch.arange(12) % 3]


def classed(**changes):
    arguments = {
        "train_losses": losses(9, 90),
        "val_losses": losses(9, 12, seed=1),
        "train_classes": CLASSES,
        "val_classes": VAL_CLASSES,
    }
    return LossTrajectories(**{**arguments, **changes})


EXPECTED = cld_oracle(losses(9, 90), losses(9, 12, seed=1), CLASSES, VAL_CLASSES)


@pytest.mark.parametrize(
    ("name", "of"), [("near_zero_cld", lambda cld: -abs(cld)), ("lowest_cld", lambda cld: -cld)], ids=["near", "lowest"]
)
def test_values_are_those_of_cld(name, of):
    train = losses(9, 90)
    train[4, 7] = INF
    train[2] = NAN
    expected = of(cld_oracle(train, losses(9, 12, seed=1), CLASSES, VAL_CLASSES))
    assert np.isnan(expected).tolist() == [position == 7 for position in range(90)]
    assert_scores(getattr(baselines, name)(classed(train_losses=train)), expected)
    assert_scores(classed().score(5, by=getattr(baselines, name)).values, of(oracle_until(5)))


def oracle_until(epoch):
    return cld_oracle(losses(9, 90)[: epoch + 1], losses(9, 12, seed=1)[: epoch + 1], CLASSES, VAL_CLASSES)


def strata_of(classes, cld, strata):
    """The positions in each percentile range of each class, ranked by the oracle's CLD."""
    classes = np.asarray(classes)
    return {
        label: np.array_split(
            np.array(sorted(np.flatnonzero((classes == label) & ~np.isnan(cld)), key=lambda position: cld[position])),
            strata,
        )
        for label in np.unique(classes[classes != OUTSIDE]).tolist()
    }


def stratified(made=None, **options):
    made = classed() if made is None else made
    return made.score(by=partial(baselines.stratified_cld, **options))


@pytest.mark.parametrize(("per_class", "each"), [(10, 1), (20, 2), (30, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_that_divides_takes_as_many_of_each_stratum(per_class, each, seed):
    kept = set(stratified(seed=seed).select(per_class=per_class).tolist())
    for strata in strata_of(CLASSES, EXPECTED, 10).values():
        assert [len(kept & set(stratum.tolist())) for stratum in strata] == [each] * 10


@settings(max_examples=40, deadline=None)
@given(per_class=st.integers(1, 27), strata=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_a_budget_that_does_not_divide_takes_one_more_of_some_strata(per_class, strata, seed):
    train = losses(9, 90)
    train[3, [0, 1, 4]] = INF
    cld = EXPECTED.copy()
    cld[[0, 1, 4]] = NAN
    scores = stratified(classed(train_losses=train), strata=strata, seed=seed)
    assert torch.equal(scores.values.isnan(), torch.from_numpy(np.isnan(cld)))
    kept = set(scores.select(per_class=per_class).tolist())
    for parts in strata_of(CLASSES, cld, strata).values():
        counts = [len(kept & set(part.tolist())) for part in parts]
        assert sum(counts) == per_class
        most = max(counts)
        # A stratum gives less than `most - 1` only if it has no more samples.
        assert all(count >= most - 1 or count == len(part) for count, part in zip(counts, parts, strict=True))


def test_ten_strata_are_made_unless_told():
    assert torch.equal(stratified().values, stratified(strata=10).values)
    assert not torch.equal(stratified().values, stratified(strata=9).values)


def test_every_member_of_a_stratum_is_drawn_about_as_often():
    drawn = np.zeros(90)
    for seed in range(300):
        drawn[stratified(seed=seed).select(per_class=10).numpy()] += 1
    # Each is drawn with chance 1/3, 300 times: 100 expected, standard deviation 8.2.
    assert abs(drawn - 100).max() < 40


def test_what_does_not_divide_falls_to_every_stratum_about_as_often():
    (parts, *_) = strata_of(CLASSES, EXPECTED, 5).values()
    more = np.zeros(5)
    for seed in range(200):
        kept = set(stratified(strata=5, seed=seed).select(per_class=6).tolist())
        more[np.argmax([len(kept & set(part.tolist())) for part in parts])] += 1
    assert abs(more - 40).max() < 30


def test_the_draws_from_two_strata_and_two_classes_are_not_the_same():
    values = stratified(strata=3).values
    orders = [
        tuple(values[part].argsort().tolist())
        for parts in strata_of(CLASSES, EXPECTED, 3).values()
        for part in map(torch.from_numpy, parts)
    ]
    assert len(set(orders)) == 9


def test_without_classes_the_strata_are_of_all_samples():
    train = losses(9, 40)
    made = LossTrajectories(train, train[:, :3])
    kept = set(stratified(made, strata=4).select(size=8).tolist())
    (parts,) = strata_of(np.zeros(40, int), cld_oracle(train, train[:, :3]), 4).values()
    assert [len(kept & set(part.tolist())) for part in parts] == [2, 2, 2, 2]


def test_more_strata_than_samples_are_no_problem():
    train = losses(9, 5)
    values = stratified(LossTrajectories(train, train), strata=12).values
    assert values.isfinite().all()
    assert len(set(values.tolist())) == 5


# Random baselines


@pytest.mark.parametrize("name", SEEDED)
def test_a_draw_follows_from_its_seed_alone(name):
    by = getattr(baselines, name)
    first = by(classed(), seed=5)
    torch.rand(3)
    assert torch.equal(by(classed(), seed=5), first)
    assert torch.equal(by(classed()), by(classed(), seed=0))
    coresets = {tuple(classed().score(by=partial(by, seed=seed)).select(fraction=0.3).tolist()) for seed in range(20)}
    assert len(coresets) == 20


@pytest.mark.parametrize("name", EVERY)
def test_the_global_random_states_are_neither_used_nor_changed(name):
    by, values = getattr(baselines, name), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
        values.append(by(classed()))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (repr(np.random.get_state()), random.getstate()) == before[1:]
    assert torch.equal(*values)


def test_random_values_are_uniform_and_read_no_loss():
    made = LossTrajectories(torch.full((1, 20_000), NAN), torch.ones(1, 1))
    values = baselines.random_values(made, seed=3)
    assert (values.dtype, list(values.shape)) == (torch.float32, [20_000])
    assert ((values >= 0) & (values < 1)).all()
    counts = np.histogram(values.numpy(), 10, (0, 1))[0]
    assert abs(counts - 2000).max() < 250
    assert len(made.score(by=baselines.random_values).select(fraction=0.25)) == 5000


def test_random_values_select_at_random_within_each_class():
    scores = classed().score(by=partial(baselines.random_values, seed=1))
    kept = scores.select(per_class=4)
    assert torch.bincount(CLASSES[kept])[[0, 3, 700]].tolist() == [4, 4, 4]


# Positions outside the sampler


@pytest.mark.parametrize("logged", [False, True], ids=["not logged", "logged"])
@pytest.mark.parametrize("name", EVERY)
def test_positions_outside_of_the_sampler_are_unscored_and_never_chosen(name, logged):
    outside = list(range(0, 90, 5))
    classes, train = CLASSES.clone(), losses(9, 90)
    classes[outside] = OUTSIDE
    train[:, outside] = 1e-3 if logged else NAN
    scores = classed(train_losses=train, train_classes=classes).score(by=getattr(baselines, name))
    assert scores.values.isnan().nonzero().flatten().tolist() == outside
    assert torch.equal(scores.classes, classes)
    assert scores.select(fraction=1.0).tolist() == [place for place in range(90) if place not in outside]


@pytest.mark.parametrize("name", [*FROM_LOSSES, *FROM_CLD[:2]])
def test_positions_outside_of_the_sampler_change_no_other_value(name):
    classes = CLASSES.clone()
    classes[[4, 9]] = OUTSIDE
    by = getattr(baselines, name)
    part, whole = classed(train_classes=classes).score(by=by).values, classed().score(by=by).values
    assert torch.equal(part[classes != OUTSIDE], whole[classes != OUTSIDE])


def test_strata_hold_no_positions_outside_of_the_sampler():
    classes = CLASSES.clone()
    classes[:30] = OUTSIDE
    cld = np.where(classes == OUTSIDE, np.nan, EXPECTED)
    kept = set(stratified(classed(train_classes=classes), strata=4).select(per_class=8).tolist())
    for parts in strata_of(classes, cld, 4).values():
        assert [len(kept & set(part.tolist())) for part in parts] == [2, 2, 2, 2]


# Errors


@pytest.mark.parametrize(
    ("name", "option", "error", "message"),
    [
        ("dual", {"window": 1}, ValueError, r"window must be at least 2 epochs, got 1\."),
        ("dual", {"window": 0}, ValueError, r"window must be at least 1, got 0"),
        ("dual", {"window": -3}, ValueError, r"window must be at least 1, got -3"),
        ("dual", {"window": 2.0}, TypeError, r"window must be a whole number, got 2\.0"),
        ("dual", {"window": True}, TypeError, r"window must be a whole number, got True"),
        ("stratified_cld", {"strata": 0}, ValueError, r"strata must be at least 1, got 0"),
        ("stratified_cld", {"strata": 2.5}, TypeError, r"strata must be a whole number, got 2\.5"),
    ],
    ids=str,
)
def test_bad_options_raise(name, option, error, message):
    with pytest.raises(error, match=message):
        classed().score(by=partial(getattr(baselines, name), **option))


def test_options_may_be_whole_numbers_of_numpy():
    assert torch.equal(baselines.dual(classed(), window=np.int64(3)), baselines.dual(classed(), window=3))
    some, same = (baselines.stratified_cld(classed(), strata=strata) for strata in (np.int64(3), 3))
    assert torch.equal(some, same)


@pytest.mark.parametrize(
    ("name", "least"),
    [("highest_mean_loss", 1), ("lowest_mean_loss", 1), ("confidence", 1), ("variability", 2), ("dual", 2)],
)
@pytest.mark.parametrize("theta_0", [True, False])
@pytest.mark.parametrize("hole", [True, False])
def test_too_few_epochs_raise(name, least, theta_0, hole):
    def made(logged):
        """A timeline of `logged` epochs, after theta_0 if `theta_0` and before a checkpoint of NaN if `hole`."""
        epochs = [*([0] if theta_0 else []), *range(1, logged + 1), *([logged + 1] if hole else [])]
        train = losses(len(epochs), 3)
        train[len(epochs) - hole :] = NAN
        return LossTrajectories(train, train, epochs=epochs)

    by = getattr(baselines, name)
    assert made(least).score(by=by).values.isfinite().all()
    if least == 1 and not theta_0 and not hole:
        return  # trajectories need at least one checkpoint
    message = rf"needs at least {least} checkpoints after training began, got {least - 1}\. Log more epochs"
    with pytest.raises(ValueError, match=message):
        made(least - 1).score(by=by)


@pytest.mark.parametrize("epochs", [[0], [3], [0, 1]], ids=str)
def test_an_area_of_too_few_checkpoints_raises(epochs):
    train = losses(len(epochs), 3)
    train[1:] = NAN
    with pytest.raises(ValueError, match=r"An area needs at least 2 checkpoints, got 1\. Log more epochs"):
        LossTrajectories(train, train, epochs=epochs).score(by=baselines.area_under_loss)


@pytest.mark.parametrize("name", FROM_CLD)
def test_what_cld_refuses_is_refused(name):
    by = getattr(baselines, name)
    with pytest.raises(ValueError, match=r"at least 4 checkpoints, got 3 \(after \[0, 1, 2\] epochs\)"):
        classed().score(2, by=by)
    val = losses(9, 12, seed=1)
    val[5, 1] = INF
    with pytest.raises(ValueError, match=r"of class 3 are not finite at the checkpoint after 5 epochs"):
        classed(val_losses=val).score(by=by)


@pytest.mark.parametrize("name", FROM_LOSSES)
def test_a_reference_that_diverged_is_no_problem_for_what_reads_none(name):
    val = losses(9, 12, seed=1)
    val[5:] = INF
    assert classed(val_losses=val).score(by=getattr(baselines, name)).values.isfinite().all()

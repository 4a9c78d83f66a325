from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from lightning_cld.functional import plausibility as module
from lightning_cld.functional.plausibility import CLEAR, ENOUGH, judged, plausibility

NAN, INF = float("nan"), float("inf")


def draws(samples, share=0.0, gap=3.0, seed=0, groups=None):
    """Two statistics of samples that correlate, float32 `[2, N]`, lower for some of them; and which these are."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(samples, generator=generator) < share
    values = 0.9 * torch.randn(samples, generator=generator) + 0.4 * torch.randn(2, samples, generator=generator)
    values = values - gap * wrong
    return (values if groups is None else values - 1.5 * groups), wrong


def case(train=3000, val=600, classes=3, share=0.2, seed=0):
    """Of each class as many; the statistics of a class are lower than those of the class before."""
    groups, val_groups = torch.arange(train) % classes, torch.arange(val) % classes
    values, wrong = draws(train, share, seed=seed, groups=groups)
    return values, draws(val, seed=seed + 1000, groups=val_groups)[0], groups, val_groups, classes, wrong


def found(values, val, groups, val_groups, classes, wrong=None):
    return plausibility(list(values), list(val), groups, val_groups, classes)


# An independent computation


def ratios_of_bins(train, val, weights, *, only_clear=True):
    """For one statistic in numpy and scikit-learn: the plausibility of each training sample."""
    bins = int(np.clip(len(val) // 10, 2, 20))
    ordered = np.sort(train)
    edges = np.array([ordered[len(train) * number // bins] for number in range(1, bins)])
    of_train, of_val = (np.searchsorted(edges, part, side="right") for part in (train, val))
    count = np.bincount(of_train, minlength=bins).astype(float)
    # Ties leave bins empty. Only the first can hold validation samples then; they count in the next.
    filled = np.flatnonzero(count)
    of_train, of_val = (np.searchsorted(filled, part) for part in (of_train, of_val))
    count, bins = count[filled], len(filled)
    # Weights that add up to the number of samples that have the same variance without weights.
    weights = weights * weights.sum() / (weights**2).sum()
    mass = np.bincount(of_val, weights, minlength=bins)
    ratio = (mass / mass.sum()) / (count / count.sum())
    rising = IsotonicRegression().fit(np.arange(bins), ratio, sample_weight=count).predict(np.arange(bins))
    low = rising < 1 - 1e-12
    share, size = count[low].sum() / count.sum(), mass.sum()
    error = np.sqrt(size * share * (1 - share) * (1 + size / count.sum()))
    clear = 0 < share < 1 and size * share - mass[low].sum() > CLEAR * error
    return (np.minimum(rising, 1) if clear or not only_clear else np.ones(bins))[of_train]


def unclear_ratios(train, val):
    """The same of both statistics of one class, `[2, N]` and `[2, M]`, whether they are clear or not."""
    ones = np.ones(val.shape[1])
    return np.minimum(
        *(ratios_of_bins(t, v, ones, only_clear=False) for t, v in zip(train.numpy(), val.numpy(), strict=True))
    )


def oracle(values, val, groups, val_groups, classes, wrong=None):
    values, val = values.double().numpy(), val.double().numpy()
    groups, val_groups = groups.numpy(), val_groups.numpy()
    result = np.empty(len(groups))
    sizes, own = np.bincount(val_groups, minlength=classes), np.bincount(groups, minlength=classes)
    for c in range(classes):
        if sizes[c] >= ENOUGH:
            here, there = groups == c, val_groups == c
            both = [ratios_of_bins(t[here], v[there], np.ones(there.sum())) for t, v in zip(values, val, strict=True)]
            result[here] = np.minimum(*both)
        else:
            weights = (own / np.maximum(sizes, 1))[val_groups]
            both = [ratios_of_bins(t, v, weights) for t, v in zip(values, val, strict=True)]
            result[groups == c] = np.minimum(*both)[groups == c]
    return result


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("val", [30, 240, 330, 900])
@pytest.mark.parametrize("classes", [1, 3])
def test_agrees_with_numpy_and_scikit_learn(share, val, classes):
    arguments = case(val=val, classes=classes, share=share)
    np.testing.assert_allclose(found(*arguments).values.numpy(), oracle(*arguments), rtol=0, atol=1e-6)


def test_agrees_where_classes_have_different_sizes_and_some_are_judged_together():
    generator = np.random.default_rng(0)
    groups, val_groups = (
        torch.from_numpy(generator.choice(5, n, p=p))
        for n, p in (
            (4000, [0.5, 0.25, 0.15, 0.07, 0.03]),
            (500, [0.3, 0.35, 0.1, 0.15, 0.1]),
        )
    )
    values, _ = draws(4000, 0.2, groups=groups)
    arguments = values, draws(500, seed=1, groups=val_groups)[0], groups, val_groups, 5
    assert sorted((np.bincount(val_groups) >= ENOUGH).tolist()) == [False, False, False, True, True]
    np.testing.assert_allclose(found(*arguments).values.numpy(), oracle(*arguments), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_agrees_with_numpy_whatever_the_values(data):
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    train, val = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 300)))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))  # few levels give ties
    values, others = (torch.from_numpy(generator.integers(0, levels, (2, n)).astype(np.float32)) for n in (train, val))
    arguments = values, others + data.draw(st.integers(0, 3)), torch.zeros(train).long(), torch.zeros(val).long(), 1
    result = found(*arguments)
    np.testing.assert_allclose(result.values.numpy(), oracle(*arguments), rtol=0, atol=1e-6)
    best, low, high = result.share.tolist()
    assert 0 <= low <= best <= high <= 1
    assert best == pytest.approx(float((1 - result.values.double()).mean()), abs=1e-6)


# What must hold


def test_plausibility_lies_between_0_and_1_and_rises_with_either_statistic_in_a_class():
    arguments = case()
    result = found(*arguments).values
    assert ((result >= 0) & (result <= 1)).all()
    for c in range(3):
        values, own = arguments[0][:, arguments[2] == c], result[arguments[2] == c]
        better = (values[:, :, None] >= values[:, None, :]).all(dim=0)
        assert (own[:, None] >= own[None, :])[better].all()
    assert len(result.unique()) > 10


def test_the_order_of_samples_and_the_numbers_of_classes_change_nothing():
    values, val, groups, val_groups, classes, _ = case()
    expected = found(values, val, groups, val_groups, classes)
    generator = torch.Generator().manual_seed(0)
    order, val_order = torch.randperm(3000, generator=generator), torch.randperm(600, generator=generator)
    result = found(values[:, order], val[:, val_order], groups[order], val_groups[val_order], classes)
    torch.testing.assert_close(result.values, expected.values[order], rtol=0, atol=0)
    torch.testing.assert_close(result.shares[0], expected.shares[0])
    new = torch.tensor([2, 0, 1])
    result = found(values, val, new[groups], new[val_groups], classes)
    assert torch.equal(result.values, expected.values)
    torch.testing.assert_close(result.shares[0][new], expected.shares[0])


@pytest.mark.parametrize("change", [lambda v: v.exp(), lambda v: v / 1000 - 5, torch.atan, torch.Tensor.double])
def test_only_the_order_of_a_statistic_counts(change):
    values, val, *rest = case()
    expected = found(values, val, *rest)
    result = plausibility([change(values[0]), values[1]], [change(val[0]), val[1]], *rest[:3])
    near = (result.values == expected.values).float().mean()
    assert near > 0.999  # rounding may make two values equal
    assert (found(values.double(), val.double(), *rest).values == expected.values).all()


def test_it_is_the_same_each_time_and_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLED", 1000)
    arguments = case()
    before = torch.get_rng_state()
    first = found(*arguments)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    for now, then in zip(found(*arguments), first, strict=True):
        assert torch.equal(now, then)


def test_inputs_are_not_changed():
    arguments = case()
    values, val = arguments[0].clone(), arguments[1].clone()
    found(*arguments)
    assert torch.equal(arguments[0], values)
    assert torch.equal(arguments[1], val)


# Chance


@pytest.mark.parametrize(
    ("train", "val", "classes"), [(1500, 100, 1), (1500, 400, 1), (500, 500, 1), (300, 300, 5), (3000, 300, 1)]
)
def test_where_validation_is_alike_few_seeds_find_anything(monkeypatch, train, val, classes):
    monkeypatch.setattr(module, "_RESAMPLES", 1)  # the interval is not looked at
    # One test at 2.5 standard errors is wrong in 0.6 % of cases. Here bins are chosen where the difference is large,
    # for two statistics.
    alarms = [found(*case(train, val, classes, 0.0, seed=seed)).share[0] > 0 for seed in range(60)]
    assert np.mean(alarms) <= 0.15


@pytest.mark.parametrize("hard", [0.1, 0.7, 0.9])
def test_other_shares_of_the_classes_in_validation_are_no_sign_of_wrong_labels(monkeypatch, hard):
    monkeypatch.setattr(module, "_RESAMPLES", 1)
    val_groups = torch.arange(120) % 2  # too few to be judged alone
    alarms = []
    for seed in range(30):
        groups = (torch.rand(2000, generator=torch.Generator().manual_seed(seed)) < hard).long()
        values, val = draws(2000, seed=seed, groups=groups)[0], draws(120, seed=seed + 99, groups=val_groups)[0]
        alarms.append(found(values, val, groups, val_groups, 2).share[0] > 0)
    assert np.mean(alarms) <= 0.2


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
@pytest.mark.parametrize(("val", "classes"), [(400, 1), (160, 2)])
def test_a_known_share_is_found_within_3_points_of_the_interval(share, val, classes):
    # The smaller of two ratios is biased down if the statistics err apart, and overlap hides wrong labels.
    inside, errors = [], []
    for seed in range(15):
        arguments = case(3000, val, classes, share, seed)
        best, low, high = found(*arguments).share.tolist()
        true = float(arguments[-1].float().mean())
        inside.append(low - 0.03 <= true <= high + 0.03)
        errors.append(best - true)
    assert np.mean(inside) >= 0.85
    assert abs(np.mean(errors)) < 0.07


def test_wrong_labels_have_low_and_right_ones_high_plausibility():
    *arguments, wrong = case()
    result = found(*arguments).values
    assert result[wrong].mean() < 0.2
    assert result[~wrong].mean() > 0.9


def test_an_interval_is_of_resampled_validation_samples():
    *arguments, _ = case(3000, 400, 1, 0.3)
    few = found(*arguments).share
    *arguments, _ = case(3000, 3000, 1, 0.3)
    many = found(*arguments).share
    assert 0 < many[2] - many[1] < few[2] - few[1] < 0.4


def test_an_interval_reaches_as_far_to_both_sides_as_the_farther_end_of_the_resamples(monkeypatch):
    values, val, groups, val_groups, classes, _ = case(2000, 300, 2, 0.3)  # of 150 samples, each class by itself
    resamples = []

    def kept(groups, count):
        for chosen in whole(groups, count):
            resamples.append(chosen)
            yield chosen

    whole = module._resamples
    monkeypatch.setattr(module, "_resamples", kept)
    best, low, high = found(values, val, groups, val_groups, classes).share.tolist()
    order = torch.argsort(val_groups, stable=True)
    # A resample draws the samples of each class from that class, and as many.
    assert all(torch.equal(val_groups[order][chosen], val_groups[order]) for chosen in resamples)
    assert len({tuple(chosen.tolist()) for chosen in resamples}) == len(resamples) == module._RESAMPLES
    shares = []
    for chosen in resamples:
        ratios = np.stack(
            [unclear_ratios(values[:, groups == c], val[:, order][:, chosen[c * 150 :][:150]]) for c in (0, 1)]
        )
        shares.append(1 - ratios.mean())
    ends = np.quantile(shares, [0.025, 0.975])
    reach = max(abs(ends - best))
    assert (low, high) == pytest.approx((max(0.0, best - reach), min(1.0, best + reach)), abs=1e-6)


@pytest.mark.parametrize(("best", "reach"), [(0.5, 0.3875), (0.2, 0.3875)])
def test_the_farther_end_may_be_on_either_side(best, reach):
    resampled = torch.linspace(best - 0.4, best + 0.1, 101, dtype=torch.float64)  # 95 % of it ends 0.0125 before
    if best < 0.3:
        resampled = 2 * best - resampled
    interval = module._interval(torch.tensor(best, dtype=torch.float64), resampled)
    assert interval.tolist() == pytest.approx([best, max(0.0, best - reach), best + reach])


def test_where_training_samples_are_better_all_are_plausible():
    values, val, *rest = case(share=0.0)
    assert (found(values + 1, val, *rest).values == 1).all()


# Odd input


def test_samples_without_a_statistic_have_no_plausibility_and_change_no_other():
    values, val, groups, val_groups, classes, _ = case()
    expected = found(values, val, groups, val_groups, classes)
    values = torch.cat([values, torch.tensor([[NAN, 1.0, NAN], [1.0, NAN, NAN]])], dim=1)
    val = torch.cat([val, torch.tensor([[NAN, -9.0, 1.0], [-9.0, NAN, 1.0]])], dim=1)
    result = found(
        values, val, torch.cat([groups, torch.arange(3)]), torch.cat([val_groups, torch.tensor([0, 1, -1])]), classes
    )
    assert torch.equal(result.values[:3000], expected.values)
    assert result.values[3000:].isnan().all()
    assert torch.equal(result.shares, expected.shares)


@pytest.mark.parametrize("infinite", [INF, -INF])
def test_infinite_statistics_are_the_largest_or_smallest(infinite):
    values, val, *rest = case()
    values, val = values.clone(), val.clone()
    values[0, :300], val[0, :60] = infinite, infinite
    expected = found(values.clamp(-1e9, 1e9), val.clamp(-1e9, 1e9), *rest)
    assert torch.equal(found(values, val, *rest).values, expected.values)


@pytest.mark.parametrize("missing", ["no samples", "no usable samples"])
def test_without_validation_samples_all_is_plausible_and_no_share_is_known(missing):
    values, val, groups, val_groups, classes, _ = case()
    val, val_groups = (val[:, :0], val_groups[:0]) if missing == "no samples" else (val * NAN, val_groups)
    result = found(values, val, groups, val_groups, classes)
    assert (result.values == 1).all()
    assert result.share.isnan().all()


def test_a_class_without_validation_samples_is_judged_by_all_and_does_not_change_them():
    values, val, groups, val_groups, classes, _ = case(val=90)  # all judged together
    expected = found(values, val, groups, val_groups, classes)
    more = torch.cat([values, values[:, :300] - 20], dim=1)
    result = found(more, val, torch.cat([groups, torch.full((300,), 3)]), val_groups, 4)
    assert result.values[3000:].max() < 0.5
    assert float(result.shares[0, :3].mean()) == pytest.approx(float(expected.shares[0].mean()), abs=0.1)


def test_a_class_without_training_samples_is_no_problem():
    values, val, groups, val_groups, _, _ = case()
    expected = found(values, val, groups, val_groups, 3)
    val, val_groups = torch.cat([val, val[:, :200] - 50], dim=1), torch.cat([val_groups, torch.full((200,), 3)])
    result = found(values, val, groups, val_groups, 5)
    assert torch.equal(result.values, expected.values)
    assert result.shares[:, 3:].isnan().all()
    torch.testing.assert_close(result.share[0], expected.share[0])


@pytest.mark.parametrize("samples", [1, 2, 5, 19])
def test_fewer_samples_than_bins_are_judged(samples):
    values, val, *_ = case(train=samples, val=300, classes=1)
    result = found(values, val, torch.zeros(samples).long(), torch.zeros(300).long(), 1)
    assert ((result.values >= 0) & (result.values <= 1)).all()


@pytest.mark.parametrize("constant", ["train", "both"])
def test_statistics_that_do_not_vary_in_the_train_set_tell_nothing_of_wrong_labels(constant):
    values, val, *rest = case(share=0.4)
    assert found(values, val, *rest).share[0] > 0.3
    result = found(torch.zeros_like(values), torch.zeros_like(val) if constant == "both" else val, *rest)
    assert (result.values == 1).all()
    assert result.share.tolist() == [0, 0, 0]


def test_two_values_give_the_ratio_of_their_shares():
    values = (torch.arange(1000) % 10 >= 4).float().expand(2, -1)  # 40 % are low
    val = (torch.arange(500) % 10 >= 1).float().expand(2, -1)  # 10 % are low
    result = found(values, val, torch.zeros(1000).long(), torch.zeros(500).long(), 1)
    torch.testing.assert_close(result.values, torch.where(values[0] > 0, 1.0, 0.25))
    assert result.share[0] == pytest.approx(0.3)


@pytest.mark.parametrize("val", [90, 600])  # judged together, and each by itself
def test_many_classes_need_no_count_of_each(monkeypatch, val):
    values, val, groups, val_groups, classes, _ = case(val=val, share=0.4)
    values[0, ::50] = NAN
    expected = found(values, val, groups, val_groups, classes)
    assert expected.share[0] > 0.2
    monkeypatch.setattr(module._Comparison, "_counts_fit", lambda self, numbers: False)
    result = found(values, val, groups, val_groups, classes)
    assert torch.equal(result.values.nan_to_num(-1), expected.values.nan_to_num(-1))
    torch.testing.assert_close(result.shares, expected.shares, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.share, expected.share, rtol=1e-12, atol=0)


def test_a_thousand_classes_are_judged_one_by_one():
    groups, val_groups = torch.arange(50_000) % 1000, torch.arange(100_000) % 1000
    values, wrong = draws(50_000, 0.5, gap=8.0)
    result = found(values, draws(100_000, seed=1)[0], groups, val_groups, 1000)
    assert result.shares.shape == (3, 1000)
    assert result.values[wrong].mean() < 0.1 < 0.8 < result.values[~wrong].mean()


def of_many(monkeypatch, classes, wrong_in=0, seed=0):
    """Judges classes of which the first `wrong_in` have a fifth of wrong labels: which are said to have some."""
    monkeypatch.setattr(module, "_RESAMPLES", 1)  # the interval is not looked at
    groups, val_groups = torch.arange(classes * 500) // 500, torch.arange(classes * 100) // 100
    generator = torch.Generator().manual_seed(seed)
    wrong = (groups < wrong_in) & (torch.rand(len(groups), generator=generator) < 0.2)
    train = list(torch.randn(2, len(groups), generator=generator) - 2.5 * wrong)
    val = list(torch.randn(2, len(val_groups), generator=generator))
    return plausibility(train, val, groups, val_groups, classes).shares[0] > 0


def test_chance_alone_is_no_evidence_in_many_classes(monkeypatch):
    # As `CLDScores.suspects` tells.
    few = torch.cat([of_many(monkeypatch, 20, seed=seed) for seed in range(20)])
    assert 0.02 < few.double().mean() < 0.09
    assert of_many(monkeypatch, 1000).double().mean() <= 0.01


@pytest.mark.parametrize("wrong_in", [400, 100, 10])
def test_wrong_labels_in_a_part_of_many_classes_are_found_and_in_few_of_the_others(monkeypatch, wrong_in):
    suspected = of_many(monkeypatch, 400, wrong_in=wrong_in)
    assert suspected[:wrong_in].double().mean() >= 0.9
    assert suspected[wrong_in:].sum() <= 0.4 * suspected.sum()


@pytest.mark.parametrize("classes", [1, 5, 20])
def test_in_few_classes_each_is_judged_as_if_it_were_alone(monkeypatch, classes):
    monkeypatch.setattr(module, "_RESAMPLES", 1)
    generator = torch.Generator().manual_seed(4)
    train, val = torch.randn(2, classes, 400, generator=generator), torch.randn(2, classes, 100, generator=generator)
    train[:, :, ::9] -= torch.linspace(0, 2, classes)[:, None]
    sizes = torch.arange(classes)
    both = plausibility(
        list(train.flatten(1)),
        list(val.flatten(1)),
        sizes.repeat_interleave(400),
        sizes.repeat_interleave(100),
        classes,
    )
    for number in range(classes):
        alone = found(train[:, number], val[:, number], torch.zeros(400, dtype=int), torch.zeros(100, dtype=int), 1)
        assert torch.equal(both.values[number * 400 : (number + 1) * 400], alone.values)


def test_edges_from_a_part_of_the_samples_serve_all_classes(monkeypatch):
    *arguments, _ = case(20_000, 2000, 10)
    whole = found(*arguments)
    monkeypatch.setattr(module, "_SAMPLED", 2000)
    monkeypatch.setattr(module, "_SAMPLED_OF_GROUP", 200)
    part = found(*arguments)
    assert not torch.equal(part.values, whole.values)
    torch.testing.assert_close(part.shares[0], whole.shares[0], rtol=0, atol=0.08)


def test_slices_change_nothing(monkeypatch):
    *arguments, _ = case()
    expected = found(*arguments)
    monkeypatch.setattr(module, "_SLICE", 7)
    for now, then in zip(found(*arguments), expected, strict=True):
        assert torch.equal(now, then)


# With the classes of a run


def test_shares_of_classes_are_plain_values_by_label():
    values, val, groups, val_groups, classes, _ = case()
    labels = torch.tensor([4, 700, 3])
    train, of_val = labels[groups], torch.cat([labels[val_groups], torch.tensor([9, 0])])
    train[[5, 6]] = -1
    val = torch.cat([val, torch.full((2, 2), -9.0)], dim=1)  # of classes that are not trained on
    plausible, told = judged((values[0], val[0]), (values[1], val[1]), (train, of_val))
    used = train >= 0
    expected = found(values[:, used], val[:, :600], groups[used], val_groups, classes)
    assert torch.equal(plausible[used], expected.values)
    assert plausible[~used].isnan().all()
    assert told["share"] == pytest.approx(expected.share.tolist(), abs=0.01)  # resamples are of classes in their order
    by_class = {str(label): share for label, share in zip(labels.tolist(), expected.shares.T.tolist(), strict=True)}
    assert list(told["classes"]) == ["3", "4", "700"]
    for label, share in by_class.items():
        assert told["classes"][label] == pytest.approx(share, abs=0.02)
        assert told["classes"][label][0] == pytest.approx(share[0], abs=1e-4)


def test_without_classes_there_is_one_and_what_is_not_known_is_none():
    values, val, *_ = case(classes=1)
    plausible, told = judged((values[0], val[0]), (values[1], val[1]), (None, None))
    assert list(told["classes"]) == ["0"]
    assert told["classes"]["0"] == told["share"]
    plausible, told = judged((values[0], val[0] * NAN), (values[1], val[1]), (None, None))
    assert told == {"share": None, "classes": {"0": None}}
    assert (plausible == 1).all()

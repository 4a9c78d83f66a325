"""Labels and losses in every form that people have them in, at every door that takes them."""

import array
import warnings
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from oracles import losses

from lightning_cld import CLDMetric, CLDScores, LossTrajectories, cld_scores, proportional_holdout, select_top
from lightning_cld.data.labels import labels_of
from lightning_cld.data.nesting import flat
from lightning_cld.functional import alignment, rank_agreement, select_drawn

NAN = float("nan")
LABELS = [3, 0, 3, 0, 7, 7, 3, 0, 7, 0, 3, 7]
TRAIN, VAL = losses(6, 12), losses(6, 12, seed=1)
SCORES = torch.linspace(0.9, -0.2, 12)


class Column(Sequence):
    """A lazy column, as that of a Hugging Face dataset."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, position):
        return self.values[position]


class Series:
    """As pandas': found by its index, but listed and converted by position, to an array that can't be written to."""

    ndim = 1

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        return self.values[[9, 7, 5, 3, 1, 0, 2, 4, 6, 8, 10, 12].index(key)]

    def tolist(self):
        return list(self.values)

    def to_numpy(self):
        return read_only(np.array(self.values))


def read_only(values):
    values.flags.writeable = False
    return values


def reversed_view(values):
    return np.array(values[::-1])[::-1]


def every_second(values):
    return np.repeat(values, 2)[::2]


FORMS = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "array.array": lambda values: array.array("B", values),
    "column": Column,
    "series": Series,
    "list of numpy's": lambda values: list(np.array(values, dtype=np.uint8)),
    "list of tensors": lambda values: list(torch.tensor(values)),
    "objects": lambda values: np.array(values, dtype=object),
    "objects of numpy's": lambda values: np.array([*np.array(values, dtype=np.uint16), None], dtype=object)[:-1],
    "reversed view": reversed_view,
    "every second": every_second,
    "every second of a tensor": lambda values: torch.tensor(values).repeat_interleave(2)[::2],
    "read-only": lambda values: read_only(np.array(values)),
    "no mask": lambda values: np.ma.array(values),
    "empty mask": lambda values: np.ma.array(values, mask=[False] * len(values)),
    **{
        f"numpy {kind}": lambda values, kind=kind: np.array(values, dtype=kind)
        for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i2", ">i8", ">u4")
    },
    **{
        f"{kind}": lambda values, kind=kind: torch.tensor(values, dtype=kind)
        for kind in (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    },
}


def updated(metric):
    for train, val in zip(TRAIN, VAL, strict=True):
        metric.update(train, val)
    return metric.compute()


DOORS = {
    "CLDScores": lambda labels: CLDScores(SCORES, labels).classes,
    "LossTrajectories.train_classes": lambda labels: LossTrajectories(TRAIN, VAL, labels, LABELS).train_classes,
    "LossTrajectories.val_classes": lambda labels: LossTrajectories(TRAIN, VAL, LABELS, labels).val_classes,
    "CLDMetric": lambda labels: updated(CLDMetric(labels, labels)),
    "cld_scores": lambda labels: cld_scores(TRAIN, VAL, labels, labels),
    "select_top": lambda labels: select_top(SCORES, labels, per_class=1),
    "select_drawn": lambda labels: select_drawn(SCORES, SCORES.abs(), labels, per_class=1),
    "proportional_holdout": lambda labels: torch.cat(proportional_holdout(labels, 0.3)),
    "alignment": lambda labels: torch.tensor(alignment(SCORES, labels)[:2]),
    "rank_agreement": lambda labels: torch.tensor(rank_agreement(SCORES, SCORES.sin(), labels)),
}
EXPECTED = {name: door(torch.tensor(LABELS)) for name, door in DOORS.items()}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", FORMS)
def test_integers_of_every_form_are_classes(form, door):
    given = FORMS[form](LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that can't be written to
        found = DOORS[door](given)
    assert torch.equal(found, EXPECTED[door])
    assert found.dtype == EXPECTED[door].dtype


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i1", "i2", "i4", "i8"])
def test_the_highest_number_of_a_type_is_a_class_like_any_other(kind):
    labels = np.array([0, 0, 0, np.iinfo(kind).max] * 3, dtype=kind)
    highest = int(np.iinfo(kind).max)
    for given in (labels, torch.as_tensor(labels)):
        scores = LossTrajectories(TRAIN, VAL, given, given).score()
        assert scores.classes.tolist() == [0, 0, 0, highest] * 3
        assert not scores.values.isnan().any()
        chosen = scores.select(per_class=1)
        assert sorted(scores.classes[chosen].tolist()) == [0, highest]
        assert torch.equal(select_top(scores.values, given, per_class=1), chosen)


def test_minus_one_is_still_no_class():
    for labels in ([0, -1, 0], np.array([0, -1, 0], dtype=np.int8), torch.tensor([0, -1, 0], dtype=torch.int16)):
        assert CLDScores([0.1, 0.2, 0.3], labels).positions().tolist() == [0, 2]


def test_one_sample_reversed_is_read():
    assert CLDScores([0.1], np.array([3])[::-1]).classes.tolist() == [3]  # it has a negative stride, yet is contiguous
    assert CLDScores(np.array([0.5])[::-1]).values.tolist() == [0.5]


def test_what_was_given_is_left_as_it_was():
    labels, train = np.array(LABELS), TRAIN.numpy().copy()
    scores, trajectories = CLDScores(SCORES, labels), LossTrajectories(train, VAL)
    scores.classes[0] = 99
    trajectories.record(6, TRAIN[0], VAL[0])
    assert labels.tolist() == LABELS
    assert np.array_equal(train, TRAIN.numpy())


# What is refused

TOO_LARGE = [0, 1, 2**64 - 1] * 4  # which would be -1, "not in use"


@pytest.mark.parametrize("door", sorted(set(DOORS) - {"proportional_holdout"}))
@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["cat", "dog", "cat"] * 4, "'cat' at position 0"),
        (np.array(["cat", "dog", "cat"] * 4), "'cat' at position 0"),
        (np.array(["cat", "dog", "cat"] * 4, dtype="S"), "b'cat' at position 0"),
        (np.array(["cat", "dog", "cat"] * 4, dtype=object), "'cat' at position 0"),
        (Series(["cat", "dog", "cat"] * 4), "'cat' at position 0"),
        ([0, "dog", 1] * 4, "'dog' at position 1"),
        ([0, 1, None] * 4, "None at position 2"),
        (np.array([0, 1, None] * 4, dtype=object), "None at position 2"),
        (["cat", NAN, "dog"] * 4, "nan at position 1"),
        ([0.0, 1.0, 2.0] * 4, "torch.float32"),
        (np.array([0.0, NAN, 2.0] * 4), "torch.float64"),
        ([True, False, True] * 4, "torch.bool"),
        (np.array([0, 1, 2] * 4, dtype=complex), "torch.complex128"),
        (np.array(["2020-01-01"] * 12, dtype="M8[D]"), "datetime.date"),
        (np.ma.masked_greater([0, 1, 99] * 4, 9), "a masked array"),
        (np.ma.masked_greater(np.array([0, 1, 99] * 4, dtype=object), 9), "torch.float32"),
        (TOO_LARGE, "18446744073709551615 at position 2"),
        (np.array(TOO_LARGE, dtype=np.uint64), "18446744073709551615 at position 2"),
        (torch.tensor(TOO_LARGE, dtype=torch.uint64), "18446744073709551615 at position 2"),
        (iter(LABELS), "list_iterator"),
        (dict(enumerate(LABELS)).values(), "dict_values"),
        ("cat", "str"),
        (7.5, "torch.float32"),
    ],
    ids=lambda value: f"{value}"[:20],
)
def test_other_labels_are_refused_with_the_remedy(labels, found, door):
    with pytest.raises(TypeError) as error:
        DOORS[door](labels)
    message = str(error.value)
    assert "classes must be integers, one class per sample, got " in message
    assert f"got {found}" in message
    assert "numpy.unique(names, return_inverse=True)[1]" in message
    assert "Leave out samples without a class (NaN, None or masked)" in message


def test_the_remedy_for_names_works():
    names, val_names = ["dog", "cat", "owl", "dog"] * 3, ["owl", "owl", "dog", "cat"] * 3
    numbers = np.unique(names, return_inverse=True)[1]
    assert CLDScores(SCORES, numbers).classes[:4].tolist() == [1, 0, 2, 1]
    together = np.unique([*names, *val_names], return_inverse=True)[1]
    trajectories = LossTrajectories(TRAIN, VAL, together[:12], together[12:])
    assert trajectories.val_classes[:4].tolist() == [2, 2, 1, 0]


def test_a_single_number_is_no_class_for_each_sample():
    with pytest.raises(ValueError, match=r"classes must have shape \[12\], one class per sample, got \[\]"):
        CLDScores(SCORES, 7)
    with pytest.raises(ValueError, match=r"classes must have shape \[0\], one class per sample, got \[\]"):
        proportional_holdout(7, 0.5)


# A split by names

NAMES = ["dog", "Cat", "owl", "dog", "dog", "owl", "Cat", "Zebra", "Zebra", "émeu", "émeu", "dog"]
NAME_FORMS = {
    "list": list,
    "tuple": tuple,
    "column": Column,
    "series": Series,
    "U": np.array,
    "S": lambda names: np.array([name.encode() for name in names]),
    "object": lambda names: np.array(names, dtype=object),
    "reversed view": reversed_view,
}


@pytest.mark.parametrize("form", NAME_FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_holdout_of_names_is_that_of_their_sorted_numbers(form, seed):
    numbers = np.unique([name.encode() for name in NAMES], return_inverse=True)[1]
    expected = proportional_holdout(numbers, 0.4, seed=seed)
    found = proportional_holdout(NAME_FORMS[form](NAMES), 0.4, seed=seed)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="new in numpy 2")
def test_a_holdout_of_numpys_own_strings():
    strings = np.array(NAMES, dtype=np.dtypes.StringDType())
    assert proportional_holdout(strings, 0.4)[1].tolist() == proportional_holdout(NAMES, 0.4)[1].tolist()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            ["cat", "dog", "cat", "owl"],
            ValueError,
            "at least 2 samples of each class, but classes dog, owl have only 1",
        ),
        (["cat", None, "cat", "dog"], TypeError, "got None at position 1.*Leave out"),
        (["cat", NAN, "cat", "dog"], TypeError, "got nan at position 1.*Leave out"),
        (["cat", b"cat", "cat", "dog"], TypeError, "got 'cat' at position 0"),
        (["cat", 1, "cat", 1], TypeError, "got 'cat' at position 0"),
        ("cat", TypeError, "got str"),
        ([], ValueError, "classes is empty: there must be at least one sample"),
        ([["cat"], ["dog"]], TypeError, r"got \['cat'\] at position 0"),
    ],
    ids=str,
)
def test_bad_names_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        proportional_holdout(labels, 0.5)


# Masked losses


def masked(values, kind=np.float32):
    """The values as they are, but three of them hidden behind a mask, with other numbers in their place."""
    hidden = np.zeros(values.shape, dtype=bool)
    hidden[..., 0], hidden.reshape(-1)[-1] = True, True
    hidden[..., 0].reshape(-1)[1:] = False
    return np.ma.array(np.where(hidden, 1e3, values).astype(kind), mask=hidden)


def with_nan(values):
    return np.where(masked(values).mask, np.nan, np.asarray(values, dtype=np.float32)).astype(np.float32)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4", object])
def test_masked_losses_are_not_logged(kind):
    train, val = TRAIN.numpy().astype(np.float16), VAL.numpy().astype(np.float16)
    expected = LossTrajectories(with_nan(train), with_nan(val))
    assert expected.train_losses.isnan().sum() == expected.val_losses.isnan().sum() == 2
    found = LossTrajectories(masked(train, kind), masked(val, kind))
    for name in ("train_losses", "val_losses"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.score().values, expected.score().values, rtol=0, atol=0, equal_nan=True)


def test_rows_may_be_masked_one_by_one():
    train, val = TRAIN.numpy(), VAL.numpy()
    whole = LossTrajectories(with_nan(train), val)
    listed = LossTrajectories([*masked(train)], [*val])
    recorded = LossTrajectories(masked(train)[:1], val[:1])
    for epoch in range(1, 6):
        recorded.record(epoch, masked(train)[epoch], val[epoch])
    for found in (listed, recorded):
        torch.testing.assert_close(found.train_losses, whole.train_losses, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found.val_losses, whole.val_losses, rtol=0, atol=0)


def test_masked_scores_are_unscored():
    values = np.ma.masked_less([0.5, -9.0, 0.25], -1)
    scores = CLDScores(values, plausibility=values / 4)
    assert scores.values.isnan().tolist() == scores.plausibility.isnan().tolist() == [False, True, False]
    assert scores.select(size=2).tolist() == [0, 2]


@pytest.mark.parametrize("row", [list, tuple, torch.tensor, np.array, Series])
@pytest.mark.parametrize("rows", [list, tuple])
def test_losses_are_given_as_rows_of_every_form(rows, row):
    train = rows(row(values) for values in TRAIN.double().tolist())
    assert torch.equal(LossTrajectories(train, VAL).train_losses, TRAIN)


@pytest.mark.parametrize("form", [Series, reversed_view, every_second, lambda values: read_only(np.array(values))])
def test_scores_are_given_in_every_form(form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CLDScores(form([0.5, -0.25, 1.0])).values.tolist() == [0.5, -0.25, 1.0]


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([[1.0, 2.0], [1.0]], TypeError, "train_losses must be numbers, in rows of the same length, got list"),
        ([torch.ones(2), torch.ones(3)], ValueError, r"rows of the same length, got shapes \[\(2,\), \(3,\)\]"),
        ([["a", "b"]], TypeError, "train_losses must be numbers"),
        ([[1.0, None]], TypeError, "train_losses must be numbers"),
        (np.ma.masked_greater([[1, 99]], 9), TypeError, "train_losses must be numbers.*got MaskedArray"),
        (None, TypeError, "train_losses must be numbers.*got NoneType"),
    ],
    ids=str,
)
def test_losses_that_are_no_table_are_refused(losses, error, message):
    with pytest.raises(error, match=message):
        LossTrajectories(losses, [[1.0, 2.0]])
    with pytest.raises((TypeError, ValueError)):
        LossTrajectories([[1.0, 2.0]], losses)


@pytest.mark.parametrize("call", [lambda row: cld_scores(row, VAL), lambda row: CLDMetric().update(row[0], VAL[0])])
def test_functions_of_tensors_refuse_masked_losses_rather_than_drop_the_mask(call):
    with pytest.raises(TypeError, match=r"train_losses must be a floating point tensor.*got MaskedArray"):
        call(masked(TRAIN.numpy()))


# Labels of datasets go through the same reader


@pytest.mark.parametrize("form", FORMS)
def test_the_labels_of_a_dataset_come_in_every_form(form):
    dataset = Column(LABELS)
    dataset.targets = FORMS[form](LABELS)
    assert labels_of(flat(dataset)).tolist() == LABELS


# pandas itself


def test_pandas_labels_and_losses():
    pandas = pytest.importorskip("pandas")
    index = [9, 7, 5, 3, 1, 0, 2, 4, 6, 8, 10, 12]
    frames = [
        pandas.Series(LABELS, index=index),
        pandas.Series(LABELS, index=index, dtype="uint16"),
        pandas.Series(LABELS, index=index, dtype="Int64"),
        pandas.Series(LABELS, index=index, dtype="category"),
        pandas.Series(LABELS, index=index, dtype=object),
        pandas.Index(LABELS),
        pandas.Categorical(LABELS),
        pandas.DataFrame({"label": LABELS}, index=index)["label"].sort_index(ascending=False).sort_index()[index],
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for labels in frames:
            for name, door in DOORS.items():
                assert torch.equal(door(labels), EXPECTED[name]), (labels, name)
        names = pandas.Series(NAMES, index=index)
        for given in (names, names.astype("category"), names.astype(object), pandas.Index(NAMES)):
            assert proportional_holdout(given, 0.4)[1].tolist() == proportional_holdout(NAMES, 0.4)[1].tolist()
        table = pandas.DataFrame(TRAIN.numpy(), index=[f"epoch {row}" for row in range(6)])
        assert torch.equal(LossTrajectories(table, VAL).train_losses, TRAIN)
        ranked = pandas.Series([0.5, -0.25, 1.0]).sort_values()
        assert CLDScores(ranked).values.tolist() == [-0.25, 0.5, 1.0]
    for missing in (pandas.Series([0, None] * 6, dtype="Int64"), names.where(names != "owl")):
        with pytest.raises(TypeError, match=r"classes must be integers.*Leave out"):
            CLDScores(SCORES, missing)
        with pytest.raises(TypeError, match=r"classes must be integers.*Leave out"):
            proportional_holdout(missing, 0.4)

"""What is kept of a sample: digests, sketches and small numbers."""

import datetime
import enum
import math
import threading
import time
import warnings
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch.utils.data import TensorDataset

from lightning_cld.data.parts import parts_of

Pair = namedtuple("Pair", "first second")


@dataclass
class Sample:
    image: torch.Tensor
    label: int


class Colour(enum.Enum):
    RED = 1


def graph(x, y):
    """As PyG's Data: an object that can be called, with a mapping and a class among its attributes."""

    class Data:
        def __init__(self):
            self.kind, self._store = dict, UserDict(x=x, y=y)

        def __call__(self):
            raise AssertionError("samples are not to be called")

    return Data()


def with_nan(sign):
    return np.array([np.copysign(np.nan, sign)])


# Digests

NUMBERS = hnp.arrays(
    st.sampled_from([np.uint8, np.int64, np.float32, np.float64, np.bool_]), hnp.array_shapes(max_dims=2, max_side=3)
)
FEW_FLOATS = st.sampled_from([0.0, -0.0, 1.0, 0.1, math.inf, math.nan])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.just(2**70)
    | FEW_FLOATS
    | st.text(max_size=2)
    | st.binary(max_size=2)
    | NUMBERS
    | NUMBERS.map(lambda array: torch.from_numpy(array.copy()))
)
KEYS = st.text("ab.:\n1'", max_size=2) | st.integers(0, 2)
SAMPLES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.sets(st.integers(0, 3), max_size=3)
    ),
    max_leaves=8,
)


def same(one, other):
    """Whether two samples are equal: types, shapes and bits of all that is in them."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        keys = {(type(key), key) for key in one}
        return keys == {(type(key), key) for key in other} and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return same(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, float):
        return np.float64(one).tobytes() == np.float64(other).tobytes()
    return one == other


def depth(sample):
    if isinstance(sample, dict):
        sample = list(sample.values())
    return 1 + max(map(depth, sample), default=0) if isinstance(sample, (list, tuple)) else 0


def reordered(sample):
    """An equal sample, made of other objects, mappings in another order."""
    if isinstance(sample, dict):
        return {key: reordered(part) for key, part in reversed(sample.items())}
    if isinstance(sample, (list, tuple)):
        return type(sample)(map(reordered, sample))
    return sample.copy() if isinstance(sample, np.ndarray) else sample


@given(SAMPLES, SAMPLES)
def test_digests_are_equal_if_and_only_if_samples_are(one, other):
    assume(max(depth(one), depth(other)) < 8)
    assert (parts_of(one).digest == parts_of(other).digest) == same(one, other)


@given(SAMPLES)
def test_an_equal_sample_has_the_same_parts(sample):
    one, other = parts_of(sample), parts_of(reordered(sample))
    assert (one.digest, one.sketch, one.known) == (other.digest, other.sketch, other.known)


@given(st.lists(SAMPLES, max_size=3), st.data())
def test_a_change_of_one_part_changes_the_digest(parts, data):
    assume(parts and max(map(depth, parts)) < 7)
    place, other = data.draw(st.integers(0, len(parts) - 1)), data.draw(SAMPLES)
    assume(depth(other) < 7)
    changed = [*parts[:place], other, *parts[place + 1 :]]
    assert (parts_of(parts).digest == parts_of(changed).digest) == same(parts, changed)


CHANGED = {
    "tensor": (torch.tensor([1, 2]), torch.tensor([1, 3])),
    "bfloat16": (torch.tensor([1.0]).bfloat16(), torch.tensor([2.0]).bfloat16()),
    "float8": (torch.tensor([1.0]).to(torch.float8_e4m3fn), torch.tensor([2.0]).to(torch.float8_e4m3fn)),
    "complex": (torch.tensor([1j]), torch.tensor([1j]).conj()),
    "negated": (torch.tensor([1j]).imag, torch.tensor([1j]).conj().imag),
    "array": (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    "strings": (np.array(["ab"]), np.array(["ac"])),
    "objects": (np.array([[1, 2], [3]], dtype=object), np.array([[1, 2], [4]], dtype=object)),
    "records": (np.zeros(2, dtype="i4,f8"), np.ones(2, dtype="i4,f8")),
    "date": (np.datetime64("2020-01-01"), np.datetime64("2020-01-02")),
    "image": (Image.new("RGB", (2, 3), "red"), Image.new("RGB", (2, 3), "blue")),
    "mode of an image": (Image.new("L", (2, 3)), Image.new("P", (2, 3))),
    "dataclass": (Sample(torch.zeros(2), 1), Sample(torch.ones(2), 1)),
    "named tuple": (Pair(1, 2), Pair(1, 3)),
    "object": (SimpleNamespace(y=1), SimpleNamespace(y=2)),
    "graph": (graph(torch.zeros(2), 1), graph(torch.zeros(2), 2)),
    "mapping": (UserDict(a=1), UserDict(a=2)),
    "sequence": (deque([1, 2]), deque([1, 3])),
    "range": (range(3), range(4)),
    "set": ({"a", "b"}, {"a", "c"}),
    "enumeration": (Colour.RED, None),
    "day": (datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)),
    "nested": ({"a": [{"b": (1, 2)}]}, {"a": [{"b": (1, 3)}]}),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "empty": ([], {}),
    "missing": ({"a": 1}, {"a": 1, "b": []}),
    "moved": ({"a": {"b": 1}}, {"a.b": 1}),
    "taken out": ([["a"], "b"], [["a", "b"]]),
    "cut elsewhere": ([b"a1:bytes\n", b"b"], [b"a", b"1:bytes\nb"]),
    "dtype of an array": (np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.float32)),
    "sign": (with_nan(1), with_nan(-1)),
}


@pytest.mark.parametrize(("one", "other"), CHANGED.values(), ids=CHANGED)
def test_a_change_is_seen_in_whatever_samples_are_made_of(one, other):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parts_of(one).digest != parts_of(other).digest
    assert parts_of(one).known
    assert parts_of(other).known


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
        ([1, "a"], (1, "a")),
        ({0, 8}, {8, 0}),
        (torch.arange(6).reshape(2, 3).T, torch.tensor([[0, 3], [1, 4], [2, 5]])),
        (np.arange(5)[::-2], np.array([4, 2, 0])),
        (np.broadcast_to(np.int64(3), (2, 2)), np.array([[3, 3], [3, 3]])),
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
        (Image.new("RGB", (2, 3), "red"), Image.new("RGB", (4, 3), "red").crop((0, 0, 2, 3))),
    ],
)
def test_what_is_equal_has_one_digest(one, other):
    assert parts_of(one).digest == parts_of(other).digest


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=9)), st.data())
def test_the_layout_in_memory_does_not_matter(array, data):
    steps = data.draw(st.tuples(*[st.sampled_from([1, -1, 2]) for _ in array.shape]))
    view = array.T[tuple(slice(None, None, step) for step in steps)]
    assert parts_of(view)[:2] == parts_of(view.copy(order="C"))[:2]


class Slots:
    __slots__ = ("x",)


class Empty:
    """As a class written in C, it has nothing that can be seen."""


@pytest.mark.parametrize(
    "part",
    [
        lambda: 0,
        (number for number in range(3)),
        threading.Lock(),
        Slots(),
        Empty(),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        TensorDataset(torch.zeros(2)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_cannot_be_compared_is_unknown_and_left_alone(part):
    parts = parts_of({"x": torch.ones(2), "part": part})
    assert not parts.known
    assert parts.digest == parts_of({"x": torch.ones(2), "part": part}).digest
    assert parts.digest != parts_of({"x": torch.zeros(2), "part": part}).digest


def test_a_generator_in_a_sample_is_not_used_up():
    numbers = iter([1, 2])
    parts_of({"numbers": numbers})
    assert list(numbers) == [1, 2]


def test_a_sample_within_itself_is_looked_at_once():
    def circle(x):
        sample = {"x": x, "more": []}
        sample["more"] = [sample, sample["more"]]
        return sample

    assert parts_of(circle(1)).digest == parts_of(circle(1)).digest != parts_of(circle(2)).digest
    assert parts_of(circle(1)).known


def test_what_is_too_deep_is_unknown():
    sample = 1
    for _ in range(50):
        sample = [sample]
    assert not parts_of(sample).known


def test_of_very_many_parts_some_are_looked_at_and_few_numbers_kept():
    sample = {str(key): key for key in range(200_000)}
    started = time.process_time()
    parts = parts_of(sample)
    assert time.process_time() - started < 2
    assert not parts.known
    assert len(parts.numbers) <= 64


def test_a_list_of_many_numbers_is_one_part():
    tokens = list(range(100_000))
    parts = parts_of({"tokens": tokens})
    assert parts.known
    assert parts.digest != parts_of({"tokens": [*tokens[:-1], 0]}).digest
    assert parts_of(tokens).known


@pytest.mark.parametrize("text", ["\udcff", "/folder/\udcff", Path("/folder/\udcff"), {"\udcff": 1}])
def test_names_that_are_no_unicode_are_text(text):
    assert parts_of(text).known


# Sketches


@pytest.mark.parametrize("size", [(), (3,), (3, 40, 50)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_floats_that_differ_in_their_last_digits_are_alike(size, offset):
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)) + offset
    one, other = parts_of(values), parts_of(values * (1 + 1e-6))
    assert one.digest != other.digest
    assert one.sketch.is_like(other.sketch)
    assert other.sketch.is_like(one.sketch)


@pytest.mark.parametrize("part", [0, 7])
@pytest.mark.parametrize("change", [lambda piece: -piece, lambda piece: piece.roll(1) * 1.01, torch.zeros_like])
def test_other_floats_are_not_alike_wherever_they_stand(part, change):
    values = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    other = values.clone()
    other[part] = change(values[part])
    assert not parts_of(values).sketch.is_like(parts_of(other).sketch)
    assert parts_of(values).sketch.form == parts_of(other).sketch.form


def test_floats_of_two_values_are_told_apart():
    signs = torch.randint(2, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    assert not parts_of(signs[0]).sketch.is_like(parts_of(signs[1]).sketch)


def test_a_slow_drift_is_seen():
    """As of prices or pressures, which lie close together."""
    one, other = (1013.0 + torch.linspace(0, step, 500) for step in (1.0, 2.0))
    assert not parts_of(one).sketch.is_like(parts_of(other).sketch)


def test_missing_values_do_not_hide_the_others():
    one, other = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
    one[::50] = other[::50] = math.nan
    assert parts_of(one).sketch.is_like(parts_of(one * (1 + 1e-6)).sketch)
    assert not parts_of(one).sketch.is_like(parts_of(other).sketch)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, -1e308, 0.0])
def test_extreme_floats_give_finite_sketches(value):
    sketch = parts_of(np.full(100, value)).sketch
    assert all(math.isfinite(number) for number in (*sketch.means, *sketch.sizes))
    assert sketch.is_like(sketch)


@pytest.mark.parametrize(("one", "other"), [(1, 2), ("a", "b"), (torch.tensor([1, 2]), torch.tensor([1, 3]))])
def test_all_but_floats_must_be_the_same(one, other):
    one, other = ((torch.ones(3), part) for part in (one, other))
    assert not parts_of(one).sketch.is_like(parts_of(other).sketch)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_known_by_its_name(kind):
    here, there, other = (parts_of(kind(path)) for path in ("/here/x.png", "/there/data/x.png", "/here/y.png"))
    assert here.sketch.is_like(there.sketch)
    assert not here.sketch.is_like(other.sketch)


def test_the_form_is_that_of_names_types_and_shapes():
    def form(sample):
        return parts_of(sample).sketch.form

    assert form((torch.ones(2), 1, "long text")) == form((torch.zeros(2), 1000, "text"))
    forms = [
        form(sample) for sample in ((torch.ones(2), 1), (torch.ones(3), 1), (torch.ones(2), 1.0), {"x": 1}, {"y": 1})
    ]
    assert len(set(forms)) == 5


def test_a_sketch_is_small_whatever_the_sample():
    sketch = parts_of([torch.rand(100, 100) for _ in range(500)]).sketch
    assert len(sketch.means) == len(sketch.sizes) <= 64


# Numbers


@pytest.mark.parametrize(
    ("sample", "path", "expected"),
    [
        ((torch.ones(3, 99), 5), ".1", 5),
        ((torch.ones(3, 99), torch.tensor([5])), ".1", [5]),
        ({"text": "a", "sentiment": np.uint8(200)}, ".sentiment", 200),
        ({"text": "a", "target": np.uint16([1, 65535])}, ".target", [1, 65535]),
        ({"a": {"b": True}}, ".a.b", 1),
        (SimpleNamespace(x="a", y=torch.tensor([2.5])), ".y", [2.5]),
        (graph(torch.ones(99), torch.tensor([3])), "._store.y", [3]),
        (Sample(torch.ones(99), 4), ".label", 4),
        ({"labels": [0, 1, 1]}, ".labels", [0, 1, 1]),
        ((7, 3), ".1", 3),
    ],
)
def test_small_numbers_are_kept_by_their_path(sample, path, expected):
    number = parts_of(sample).numbers[path]
    assert number.tolist() == expected
    assert number.dtype in (np.int64, np.float64)


@pytest.mark.parametrize("part", ["text", None, torch.ones(65), torch.zeros(0), 1j, 2**70, Image.new("L", (9, 9))])
def test_other_parts_are_no_numbers(part):
    assert parts_of((0, part)).numbers.keys() == {".0"}


def test_numbers_are_copies():
    labels = torch.tensor([1, 2])
    parts = parts_of((0, labels))
    labels[0] = 9
    assert parts.numbers[".1"].tolist() == [1, 2]

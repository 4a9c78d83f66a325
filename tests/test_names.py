"""`SampleNames` against the lists and dictionaries that it stands for."""

import copy
import io
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_cld import SampleNames
from lightning_cld.names import find_in_order

# Few letters too, so that names repeat.
TEXTS = st.lists(st.text(max_size=4) | st.text("ab", max_size=2))
LONE = ["\udce9", "\ud83d\ude00", "\N{GRINNING FACE}", "\udce9"]
"""Lone surrogates, which Python makes of file names that are no UTF-8, and what looks like two of them."""


def copies(names):
    """Copies of all kinds."""
    file = io.BytesIO()
    torch.save(names.state_dict(), file)
    file.seek(0)
    yield SampleNames.from_state_dict(torch.load(file, weights_only=True))
    yield pickle.loads(pickle.dumps(names))
    yield copy.deepcopy(names)


@settings(deadline=None, max_examples=150)
@given(TEXTS, TEXTS)
@example(LONE, LONE[::-1])
def test_names_are_those_of_a_dictionary(given_names, asked):
    expected = list(dict.fromkeys(given_names))
    places = {name: place for place, name in enumerate(expected)}
    names = SampleNames(iter(given_names))
    for found in (names, *copies(names)):
        assert (len(found), list(found), found[:]) == (len(expected), expected, expected)
        assert [found[place] for place in range(-len(expected), len(expected))] == expected * 2
        assert found.positions(given_names).tolist() == [places[name] for name in given_names]
        assert found.find(asked).tolist() == [places.get(name, -1) for name in asked]
        assert found.find(iter(asked)).dtype == torch.int64
        assert found == names
    assert (names == SampleNames(asked)) == (expected == list(dict.fromkeys(asked)))


@settings(deadline=None, max_examples=150)
@given(TEXTS, TEXTS, st.data())
def test_names_that_come_in_order_are_found_as_others_are(given_names, others, data):
    expected = list(dict.fromkeys(given_names))
    places = {name: place for place, name in enumerate(expected)}
    start, guessed = (data.draw(st.integers(0, len(expected))) for _ in range(2))
    asked = expected[start : start + 3] + data.draw(st.sampled_from([[], others]))
    found = find_in_order(SampleNames(given_names), asked, data.draw(st.sampled_from([start, guessed])))
    assert found.tolist() == [places.get(name, -1) for name in asked]


def test_names_that_differ_by_a_cut_are_not_taken_for_those_in_order():
    assert find_in_order(SampleNames(["ab", "c"]), ["a", "bc"], 0).tolist() == [-1, -1]
    assert find_in_order(SampleNames(["ab", "c"]), ["ax", "c"], 0).tolist() == [-1, 1]


def test_very_many_names_with_repeats():
    chance = np.random.default_rng(0)
    given_names = [f"shard-{number % 7}/{number:x}" for number in chance.integers(0, 60_000, 150_000)]
    expected = list(dict.fromkeys(given_names))
    names = SampleNames(given_names)
    assert list(names) == expected
    places = {name: place for place, name in enumerate(expected)}
    assert names.positions(given_names).tolist() == [places[name] for name in given_names]


def test_names_that_differ_by_a_cut_are_different():
    assert SampleNames(["ab", "c"]) != SampleNames(["a", "bc"])
    assert SampleNames(["ab", "c"]) != ["ab", "c"]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_several_positions_give_their_names_in_order(kind):
    names = SampleNames(["cat", "dog", "owl"])
    assert names[kind([2, 0, -1, 2])] == ["owl", "cat", "owl", "owl"]
    assert names[[]] == names[torch.zeros(0, dtype=torch.int64)] == []
    assert names[torch.tensor(1)] == names[np.int64(1)] == "dog"
    assert (names[1:], names[::-1], names[range(1)]) == (["dog", "owl"], ["owl", "dog", "cat"], ["cat"])


@pytest.mark.parametrize("wrong", [3, -4, [0, 3], torch.tensor([-4])])
def test_a_position_outside_is_refused(wrong):
    with pytest.raises(IndexError, match=r"Position -?\d is outside of the 3 names\."):
        SampleNames(["cat", "dog", "owl"])[wrong]


@pytest.mark.parametrize("wrong", [torch.tensor([True, False]), np.array([True, False]), [True, False], True])
def test_a_mask_is_not_taken_for_positions(wrong):
    with pytest.raises(TypeError, match=r"must be whole numbers, got a bool\. Of a mask, give mask\.nonzero"):
        SampleNames(["cat", "dog"])[wrong]


@pytest.mark.parametrize("wrong", [1.0, None, "cat", ["cat"], [[0, 1], [1, 0]]])
def test_what_is_no_position_is_refused(wrong):
    with pytest.raises(TypeError):
        SampleNames(["cat", "dog"])[wrong]


def test_unknown_names_are_named():
    names = SampleNames(["cat", "dog"])
    with pytest.raises(ValueError, match=r"^4 of 6 names are not among the 2 known: 'a', 'b', 'c', \.\.\.\.$"):
        names.positions(name for name in ["cat", "a", "b", "dog", "c", "d"])
    with pytest.raises(ValueError, match=r"^1 of 1 names are not among the 0 known: ''\.$"):
        SampleNames().positions([""])


@pytest.mark.parametrize("call", [SampleNames, SampleNames(["cat"]).find, SampleNames(["cat"]).positions])
def test_what_is_no_text_is_refused(call):
    for wrong in (b"cat", 3, None, ("cat",)):
        with pytest.raises(TypeError, match=r"^The name of a sample must be text, got "):
            call(["cat", wrong])
    for text in ("cat", b"cat"):
        with pytest.raises(TypeError, match=r"^names must be a list of text, got only b?'cat'\. Put it into a list\.$"):
            call(text)


UINT8 = torch.uint8


@pytest.mark.parametrize(
    ("text", "ends", "message"),
    [
        (torch.tensor([97, 98], dtype=UINT8), torch.tensor([1, 3]), "don't fit"),
        (torch.tensor([97, 98], dtype=UINT8), torch.tensor([1]), "don't fit"),
        (torch.tensor([97, 98], dtype=UINT8), torch.tensor([2, 1, 2]), "don't fit"),
        (torch.tensor([97, 98], dtype=UINT8), torch.tensor([-1, 2]), "don't fit"),
        (torch.tensor([97], dtype=UINT8), torch.tensor([2**62, -(2**63), -1, 1]), "don't fit"),  # differences overflow
        (torch.tensor([97], dtype=UINT8), torch.zeros(0, dtype=torch.int64), "don't fit"),
        (torch.tensor([97, 98]), torch.tensor([2]), r"names must be one row of uint8, got int64 \[2\]"),
        (
            torch.tensor([[97, 98]], dtype=UINT8),
            torch.tensor([2]),
            r"names must be one row of uint8, got uint8 \[1, 2\]",
        ),
        (torch.tensor([97, 98], dtype=UINT8), torch.tensor([2.0]), "name_ends must be one row of int64, got float32"),
        (torch.tensor([97, 98], dtype=UINT8), torch.tensor(2), r"name_ends must be one row of int64, got int64 \[\]"),
        (torch.tensor([255], dtype=UINT8), torch.tensor([1]), "can't decode"),
        (torch.tensor([195, 188], dtype=UINT8), torch.tensor([1, 2]), "can't decode"),  # cut through a letter
        (torch.tensor([97, 98, 97], dtype=UINT8), torch.tensor([1, 2, 3]), "repeat"),
        (torch.zeros(0, dtype=UINT8), torch.tensor([0, 0]), "repeat"),
    ],
)
def test_a_state_of_no_names_is_refused(text, ends, message):
    with pytest.raises(ValueError, match=message):
        SampleNames.from_state_dict({"names": text, "name_ends": ends})


def test_names_whose_hashes_are_equal_are_told_apart_or_refused(monkeypatch):
    monkeypatch.setattr("lightning_cld.names._digests_of", lambda text, ends: np.zeros(len(ends), np.uint64))
    assert list(SampleNames(["cat", "cat", "cat"])) == ["cat"]
    with pytest.raises(ValueError, match=r"The names 'cat' and 'dog' can't be told apart\. Change one"):
        SampleNames(["cat", "cat", "dog", "cat"])


def test_a_name_takes_its_text_and_24_bytes():
    tracemalloc.start()
    try:
        names = SampleNames(f"shard-{number % 100:04}/sample-{number:08}" for number in range(50_000))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    text = sum(map(len, names))
    assert held < text + 24 * len(names) + 10_000
    assert peak < 2 * (text + 24 * len(names))

"""Damaged, foreign or malicious files give an error that names the file, or the data as they were written."""

import functools
import io
import json
import os
import pickle
import random
import signal
import struct
import sys
import tempfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_cld import CLDScores, LossTrajectories
from lightning_cld.data.fingerprint import Fingerprint

MOST_MEMORY = 200e6
SECONDS = 60

CLASSES = torch.tensor([0, 1] * 10)
NAMES = [f"Wörter/{number}" for number in range(20)]
METADATA = {"seed": 7, "name": "Prüfung", "nested": {"list": [1, 2.5, None, True]}}


def scores(seed=0):
    values = torch.rand(20, generator=torch.Generator().manual_seed(seed))
    return CLDScores(values, CLASSES, [0, 2, 4, 5], Fingerprint.of_labels(CLASSES), METADATA, names=NAMES)


def trajectories(seed=0):
    losses = torch.rand(4, 26, generator=torch.Generator().manual_seed(seed))
    return LossTrajectories(
        losses[:, :20],
        losses[:, 20:],
        CLASSES,
        CLASSES[:6],
        [0, 2, 4, 5],
        fingerprint=Fingerprint.of_labels(CLASSES),
        metadata=METADATA,
        names=NAMES,
    )


MAKERS = {"scores": scores, "trajectories": trajectories}
ARRAYS = {
    "scores": ["values", "classes", "names", "name_ends"],
    "trajectories": ["train_losses", "val_losses", "train_classes", "val_classes", "names", "name_ends"],
}
MEMBERS = [(kind, name) for kind in MAKERS for name in [*ARRAYS[kind], "header"]]


class HangError(BaseException):
    """A BaseException, because a reader may turn an Exception into another."""


@pytest.fixture(autouse=True)
def _no_hang():
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*args):
        raise HangError

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


@pytest.fixture(scope="module", autouse=True)
def _memory_is_traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.npz"


@functools.cache
def file_of(kind, seed):
    with tempfile.TemporaryDirectory() as folder:
        return MAKERS[kind](seed).save(Path(folder) / "file").read_bytes()


def saved(kind, path, seed=0):
    """Writes a file of `kind` without waiting for the disk, unlike `save`; returns its bytes."""
    path.write_bytes(file_of(kind, seed))
    return file_of(kind, seed)


def same(a, b):
    if (a.epochs, a.fingerprint, a.metadata, a.names) != (b.epochs, b.fingerprint, b.metadata, b.names):
        return False
    kind = "scores" if isinstance(a, CLDScores) else "trajectories"
    pairs = [(getattr(a, name), getattr(b, name)) for name in ARRAYS[kind] if not name.startswith("name")]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def outcome(kind, path, seed=0):
    """Returns "refused" or "read", which are good, or what went wrong."""
    made = MAKERS[kind](seed)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        found = "read" if same(type(made).load(path), made) else "read as other data"
    except ValueError as error:
        named = str(path) in str(error) and f"{type(made).__name__}.load" in str(error)
        found = "refused" if named else f"a ValueError that names no file: {error}"
    except Exception as error:  # noqa: BLE001  # any other error is a fault
        found = f"{type(error).__name__}: {error}"
    _, peak = tracemalloc.get_traced_memory()
    return found if peak - before < MOST_MEMORY else f"{(peak - before) / 1e6:.0f} MB taken, then {found}"


def assert_refused(kind, path):
    assert outcome(kind, path) == "refused"


# Damaged files


def truncated(content, chance):
    return content[: chance.randrange(len(content))]


def flipped(content, chance):
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        damaged[chance.randrange(len(content))] ^= chance.randint(1, 255)
    return bytes(damaged)


def inserted(content, chance):
    place = chance.randint(0, len(content))
    return content[:place] + chance.randbytes(chance.randint(1, 64)) + content[place:]


def removed(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + content[place + chance.randint(1, 64) :]


def blanked(content, chance):
    place, length = chance.randrange(len(content)), chance.randint(1, 512)
    return content[:place] + bytes(len(content[place : place + length])) + content[place + length :]


def repeated(content, chance):
    start, end = sorted(chance.choices(range(len(content)), k=2))
    return content[:end] + content[start:]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("damage", [truncated, flipped, inserted, removed, blanked, repeated])
def test_a_damaged_file_is_refused_or_read_right(path, kind, damage):
    content = saved(kind, path)
    wrong = {}
    for case in range(300):
        path.write_bytes(damage(content, random.Random(case)))
        found = outcome(kind, path)
        if found not in ("refused", "read"):
            wrong[case] = found
    assert wrong == {}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_that_begins_as_one_and_ends_as_another_is_refused_or_read_right(path, kind):
    first, second = saved(kind, path, seed=1), saved(kind, path)
    other = saved("trajectories" if kind == "scores" else "scores", path)
    wrong = {}
    for case in range(200):
        chance = random.Random(case)
        head = chance.choice([first, other])
        path.write_bytes(head[: chance.randrange(len(head))] + second[chance.randrange(1, len(second)) :])
        found = outcome(kind, path)
        if found not in ("refused", "read"):
            wrong[case] = found
    assert wrong == {}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_half_written_over_another_is_refused(path, kind):
    # Both have the same length, so this is like an interrupted write in place.
    old, new = saved(kind, path, seed=1), saved(kind, path)
    assert len(old) == len(new)
    for tenths in range(1, 10):
        cut = len(new) * tenths // 10
        path.write_bytes(new[:cut] + old[cut:])
        assert "read" in (outcome(kind, path), outcome(kind, path, seed=1)) or outcome(kind, path) == "refused"


# Changed arrays with valid checksums


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, contents):
    """Writes an archive of (name, bytes) pairs."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items() if isinstance(contents, dict) else contents:
            archive.writestr(name, content)


def npy(array):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array))
    return stream.getvalue()


def replace(path, **arrays):
    """Rewrites the file with some members replaced by arrays or bytes; None removes one."""
    contents = members(path)
    for name, array in arrays.items():
        contents.pop(f"{name}.npy", None)
        if array is not None:
            contents[f"{name}.npy"] = array if isinstance(array, bytes) else npy(array)
    write(path, contents)


def read(path, name):
    with np.load(path) as archive:
        return archive[name]


def replace_header(path, **changes):
    replace(path, header=np.array(json.dumps({**json.loads(str(read(path, "header")[()])), **changes})))


DTYPES = ["?", "i1", "<i2", "<i4", "<u8", ">i8", "<f2", ">f4", "<f8", "<c8", "U4", "S4", "V8", "M8[s]", "m8[s]"]


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_an_array_that_is_missing_or_renamed_is_refused(path, kind, name):
    saved(kind, path)
    array = read(path, name)
    for others in ({}, {"other": array}, {f"{name}_": array}, {name.upper(): array}, {f"a/{name}": array}):
        saved(kind, path)
        replace(path, **{name: None}, **others)
        assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "name", ["other", "header2", "scores", ".", "", "../../escaped", "values/", "\u2028", "x" * 5000]
)
def test_a_member_too_many_is_refused(path, kind, name):
    saved(kind, path)
    replace(path, **{name: np.zeros(3, np.float32)})
    assert_refused(kind, path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
@pytest.mark.parametrize("dtype", [*DTYPES, [("a", "<f4"), ("b", "<i4")], ("<f4", (2,))], ids=str)
def test_an_array_of_another_dtype_is_refused(path, kind, name, dtype):
    saved(kind, path)
    replace(path, **{name: np.zeros(read(path, name).shape, dtype)})
    assert_refused(kind, path)


@pytest.mark.parametrize(("kind", "name"), [member for member in MEMBERS if member[1] != "header"])
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (0, 20), (4, 0), (0, 0), (21,), (19,), (5, 20), (4, 21), (1, 4, 20), (1,) * 30], ids=str
)
def test_an_array_of_another_shape_is_refused(path, kind, name, shape):
    saved(kind, path)
    replace(path, **{name: np.zeros(shape, read(path, name).dtype)})
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (b"\xff" * 20, range(1, 21)),  # no UTF-8
        (b"\xc3\xbc" * 10, range(1, 21)),  # cuts through letters
        (b"a" * 20, range(1, 21)),  # one name for all
        (bytes(range(21)), range(1, 21)),  # text that belongs to no name
        (bytes(range(20)), [2, 1, *range(3, 21)]),
        (bytes(range(20)), [2**62, -(2**63), *range(3, 21)]),
        (bytes(range(19)), range(1, 20)),  # too few
        (bytes(range(21)), range(1, 22)),  # too many
        (b"", []),
    ],
    ids=range(9),
)
def test_names_that_are_none_or_not_one_a_sample_are_refused(path, kind, names, ends):
    saved(kind, path)
    replace(path, names=np.frombuffer(names, np.uint8), name_ends=np.array([*ends], np.int64))
    assert_refused(kind, path)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(("kind", "name"), [*MEMBERS, ("scores", "other"), ("trajectories", "other")])
def test_an_array_of_objects_is_refused_and_never_unpickled(path, kind, name):
    saved(kind, path)
    trap = Trap(path.parent / "sprung")
    for array in (np.array(trap, dtype=object), np.array([trap] * 20, dtype=object)):
        replace(path, **{name: array})
        assert_refused(kind, path)
    assert not trap.path.exists()


def npy_header(text, version=1):
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode("latin1")


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
@pytest.mark.parametrize("descr", ["'<f4'", "'<i8'", "'|b1'", "'|O'", "'<U0'", "'|V0'", "'<U1152921504606846976'"])
@pytest.mark.parametrize(
    "shape",
    [
        f"({2**60},)",
        f"(4, {2**60})",
        f"({2**60}, 0)",
        f"(0, {2**63})",
        f"({2**32}, {2**32})",
        "(-1,)",
        f"(-{2**60}, -1)",
    ],
)
def test_an_array_that_claims_an_absurd_size_is_refused(path, kind, name, descr, shape):
    saved(kind, path)
    for data in (b"", bytes(320)):
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"
        replace(path, **{name: npy_header(text) + data})
        assert_refused(kind, path)


@pytest.mark.parametrize("epochs", [[], None, [0, 2, 4, 5]], ids=str)
def test_losses_that_claim_an_absurd_number_of_checkpoints_of_nothing_are_refused(path, epochs):
    saved("trajectories", path)
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**60}, 0)}}\n"
    nothing = np.zeros(0, np.int64)
    for classes in ({}, {"train_classes": nothing, "val_classes": nothing}):
        replace_header(path, epochs=epochs)
        replace(path, train_losses=npy_header(text), val_losses=npy_header(text), **classes)
        assert_refused("trajectories", path)


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy_header("-" * 9000 + "1\n"),
        npy_header("[" * 9000),
        npy_header("{'descr': " + "('<f4', " * 900 + "\n"),
        npy_header("x" * 60_000),
        npy_header("__import__('os').abort()\n"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x93NUMPY\x03\x00" + bytes(20),
        b"\x93NUMPY\x01\x00\x00\x00",
        pickle.dumps([1, 2, 3]),
        b"PK\x05\x06" + bytes(18),
    ],
    ids=range(12),
)
def test_a_member_that_is_no_array_is_refused(path, kind, name, content):
    saved(kind, path)
    replace(path, **{name: content})
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_damaged_array_header_is_refused_or_read_right(path, kind):
    saved(kind, path)
    contents = members(path)
    wrong = {}
    for case in range(300):
        chance = random.Random(case)
        name = chance.choice(sorted(contents))
        start = contents[name].index(b"\n") + 1
        write(path, {**contents, name: flipped(contents[name][:start], chance) + contents[name][start:]})
        found = outcome(kind, path)
        if found not in ("refused", "read"):
            wrong[case] = found
    assert wrong == {}


# The header


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("key", ["kind", "arrays", "epochs", "fingerprint", "metadata"])
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "text",
        [],
        [[]],
        [None],
        [["a", 1]],
        [0, 2, 4, 5.0],
        [0, 2, 4, float("nan")],
        ["0", "2", "4", "5"],
        {"length": 7},
        {"length": 20, "labels": 1, "probe": ""},
        {"length": True},
        {"length": -1},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_in_the_header_is_refused(path, kind, key, value):
    if isinstance(value, dict) and key == "metadata":
        pytest.skip("metadata may be any dictionary")
    if (kind, key, value) in (("trajectories", "fingerprint", None), ("scores", "epochs", [])):
        pytest.skip("may be unknown")
    saved(kind, path)
    replace_header(path, **{key: value})
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("value", [None, "", "text", [], [1], {}, float("nan"), float("inf"), 2, 10**30], ids=str)
def test_a_format_that_is_none_is_refused(path, kind, value):
    saved(kind, path)
    replace_header(path, format=value)
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("key", ["kind", "format", "arrays", "epochs", "fingerprint", "metadata"])
def test_a_header_that_lacks_a_key_is_refused(path, kind, key):
    saved(kind, path)
    header = json.loads(str(read(path, "header")[()]))
    del header[key]
    replace(path, header=np.array(json.dumps(header)))
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("key", ["kind", "format", "arrays", "epochs", "fingerprint", "metadata"])
@pytest.mark.parametrize("nested", ["[" * 900 + "]" * 900, "[" * 10**5 + "]" * 10**5, '{"a":' * 10**5, "9" * 10**5])
def test_a_header_that_is_nested_deeply_or_holds_a_huge_number_is_refused(path, kind, key, nested):
    saved(kind, path)
    header = json.loads(str(read(path, "header")[()]))
    text = json.dumps({**header, key: "HERE"}).replace('"HERE"', nested)
    replace(path, header=np.array(text))
    assert_refused(kind, path)


def something(chance, depth=0):
    """A random JSON value."""
    if depth < 3 and chance.random() < 0.4:
        inner = [something(chance, depth + 1) for _ in range(chance.randrange(5))]
        return inner if chance.random() < 0.5 else {chance.choice("abc"): value for value in inner}
    return chance.choice([None, True, 0, 1, -1, 20, 2.5, 10**30, float("nan"), float("inf"), "", "length", "\ud800"])


@pytest.mark.parametrize("kind", MAKERS)
def test_a_header_of_anything_is_refused_or_read(path, kind):
    saved(kind, path)
    header = json.loads(str(read(path, "header")[()]))
    wrong = {}
    for case in range(300):
        chance = random.Random(case)
        changed = json.loads(json.dumps(header))
        for _ in range(chance.randint(1, 2)):
            key = chance.choice(sorted(changed))
            inside = changed[key]
            if isinstance(inside, dict) and inside and chance.random() < 0.5:
                inside[chance.choice(sorted(inside))] = something(chance)
            elif isinstance(inside, list) and inside and chance.random() < 0.5:
                inside[chance.randrange(len(inside))] = something(chance)
            else:
                changed[key] = something(chance)
        replace(path, header=np.array(json.dumps(changed)))
        found = outcome(kind, path)
        if found not in ("refused", "read", "read as other data"):  # another number may be as valid as the right one
            wrong[case] = found
    assert wrong == {}


# Archives


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_member_is_refused(path, kind, name, method):
    saved(kind, path)
    contents = members(path)
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in contents.items():
            archive.writestr(member, content, method if member == f"{name}.npy" else zipfile.ZIP_STORED)
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_compressed_bomb_is_refused(path, kind):
    saved(kind, path)
    contents = members(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in contents.items():
            archive.writestr(member, content)
        archive.writestr("other.npy", bytes(300_000_000))
    assert_refused(kind, path)


def directory_entries(content):
    """The positions of the central directory's entries."""
    places, place = [], content.find(b"PK\x01\x02")
    while place != -1:
        places.append(place)
        place = content.find(b"PK\x01\x02", place + 1)
    return places


FIELDS = {"flags": (8, "<H"), "method": (10, "<H"), "packed": (20, "<I"), "size": (24, "<I"), "offset": (42, "<I")}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flags", 0x1),  # encrypted
        ("flags", 0x20),  # patched data
        ("flags", 0x40),  # strongly encrypted
        ("method", 99),
        ("packed", 0),
        ("packed", 0xFFFFFFFE),
        ("packed", 0xFFFFFFFF),
        ("size", 0),
        ("size", 0xFFFFFFFE),
        ("size", 0xFFFFFFFF),
        ("offset", 0xFFFFFFFE),
        ("offset", 1),
    ],
)
def test_a_member_with_an_absurd_entry_is_refused(path, kind, field, value):
    saved(kind, path)
    write(path, members(path))
    content = path.read_bytes()
    where, code = FIELDS[field]
    for entry in directory_entries(content):
        damaged = bytearray(content)
        struct.pack_into(code, damaged, entry + where, value)
        path.write_bytes(damaged)
        assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("field", ["packed", "size", "both"])
def test_a_member_that_claims_an_absurd_size_in_64_bits_is_refused(path, kind, field):
    saved(kind, path)
    contents = members(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        for member in archive.infolist():  # closing the archive writes the directory
            if field in ("packed", "both"):
                member.compress_size = 2**60
            if field in ("size", "both"):
                member.file_size = 2**60
    assert_refused(kind, path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(("kind", "name"), MEMBERS)
@pytest.mark.parametrize("first", [True, False])
def test_two_members_of_one_name_are_refused_or_read_right(path, kind, name, first):
    saved(kind, path, seed=1)
    other = {**members(path), "header.npy": npy(np.array(json.dumps({"kind": "other"})))}
    other = {**other, "classes.npy": npy(1 - CLASSES.numpy()), "train_classes.npy": npy(1 - CLASSES.numpy())}
    other["val_classes.npy"] = npy(1 - CLASSES[:6].numpy())
    saved(kind, path)
    for alias in (f"{name}.npy", name):  # the reader takes both names for the same member
        right = list(members(path).items())
        twin = (alias, other[f"{name}.npy"])
        write(path, [twin, *right] if first else [*right, twin])
        assert outcome(kind, path) in ("refused", "read")
        saved(kind, path)


def nested_members(count, payload):
    """Stored members that each contain all later ones: a small archive with a huge total size."""
    rest, entries = payload, []
    for number in reversed(range(count)):
        name = f"{number:05}.npy".encode()
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(rest)},)}}\n"
        content = npy_header(text) + rest
        sizes = struct.pack("<III", zlib.crc32(content), len(content), len(content))
        rest = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 0, 0, 33) + sizes + struct.pack("<HH", len(name), 0)
        rest += name + content
        entries.append((name, sizes, len(rest)))
    directory = b"".join(
        b"PK\x01\x02"
        + struct.pack("<HHHHHH", 20, 20, 0, 0, 0, 33)
        + sizes
        + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, len(rest) - behind)
        + name
        for name, sizes, behind in reversed(entries)
    )
    ending = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(rest), 0)
    return rest + directory + b"PK\x05\x06" + ending


@pytest.mark.parametrize("kind", MAKERS)
def test_members_within_members_are_refused_before_memory_is_taken(path, kind):
    path.write_bytes(nested_members(3, b"payload"))
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ["00000.npy", "00001.npy", "00002.npy"]
    path.write_bytes(nested_members(300, bytes(1_000_000)))
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_member_that_is_listed_again_and_again_is_refused_at_once(path, kind):
    saved(kind, path)
    name = f"{ARRAYS[kind][0]}.npy"
    contents = {**members(path), name: npy(np.zeros((4, 250_000), np.float32))}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in contents.items():
            archive.writestr(member, content)
        archive.filelist.extend([archive.getinfo(name)] * 10_000)
    signal.alarm(5)
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_of_very_many_empty_members_is_refused(path, kind):
    saved(kind, path)
    write(path, {**members(path), **{f"{number}.npy": b"" for number in range(5_000)}})
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_in_an_archive_is_refused(path, kind):
    content = saved(kind, path)
    for name in ("file.npz", "header.npy", f"{ARRAYS[kind][0]}.npy"):
        write(path, {name: content})
        assert_refused(kind, path)
        write(path, {**members(path), name: content})
        assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_behind_other_bytes_or_with_a_comment_is_read_right(path, kind):
    content = saved(kind, path)
    path.write_bytes(b"#!/bin/sh\n" + content)
    assert outcome(kind, path) == "read"
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\x05\x06" * 16_000
    assert outcome(kind, path) in ("refused", "read")


# Other files


@pytest.mark.parametrize("kind", MAKERS)
def test_pickles_are_refused_and_never_run(path, kind):
    trap = Trap(path.parent / "sprung")
    for write_trap in (
        lambda: path.write_bytes(pickle.dumps(trap)),
        lambda: torch.save({"values": trap}, path),
        lambda: torch.save({"values": trap}, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(npy(np.array([trap], dtype=object))),
        lambda: write(path, {"header.npy": pickle.dumps(trap), "data.pkl": pickle.dumps(trap)}),
    ):
        write_trap()
        assert_refused(kind, path)
    assert not trap.path.exists()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("content", [b"", b"\x00", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\xff" * 70_000], ids=len)
def test_files_of_nothing_are_refused(path, kind, content):
    path.write_bytes(content)
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_directory_is_refused(path, kind):
    path.mkdir()
    (path / "header.npy").write_bytes(b"")
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes in directories")
def test_a_named_pipe_is_refused_without_waiting_for_a_writer(path, kind):
    os.mkfifo(path)
    signal.alarm(2)
    assert_refused(kind, path)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_nothing_or_to_itself_is_no_file(path, kind):
    for target in ("nothing", "file.npz"):
        path.symlink_to(target)
        with pytest.raises(FileNotFoundError, match=r"load: there is no file .*file\.npz"):
            type(MAKERS[kind]()).load(path)
        path.unlink()

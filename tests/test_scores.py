from __future__ import annotations

import json
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from toys import fit

from lightning_cld import CLDCallback
from lightning_cld.data.fingerprint import Fingerprint
from lightning_cld.names import SampleNames
from lightning_cld.scores import OUTSIDE, CLDScores
from lightning_cld.trajectories import LossTrajectories

NAN = float("nan")
VALUES = torch.tensor([0.9, -0.2, NAN, 0.6, 0.7, 0.1])
CLASSES = torch.tensor([0, 0, 0, 3, OUTSIDE, 3])


FOUND = {
    "implausible": {
        "share": [0.2, 0.18, 0.23],
        "classes": {"0": [0.1, 0.08, 0.2], "3": [0.31, 0.25, 0.4], "5": None, "7": [0.0, 0.0, 0.1]},
    }
}


def scores(**changes):
    arguments = {
        "values": VALUES,
        "classes": CLASSES,
        "epochs": [0, 1, 3, 5],
        "fingerprint": Fingerprint(6, "labels", "probe"),
        "plausibility": None if "values" in changes else [0.1, 0.2, NAN, 0.0, NAN, 1.0],
        "confidence": None if "values" in changes else [0.5, 0.9, NAN, 0.0, NAN, 0.25],
        "metadata": {"seed": 7, "name": "Prüfung", "nested": {"list": [1, 2.5, None, True]}},
        "names": None if "values" in changes else ["", "b", "ü", "d/4", "5", "f"],
    }
    return CLDScores(**{**arguments, **changes})


def same(a, b):
    classes = (a.classes is None and b.classes is None) or torch.equal(a.classes, b.classes)
    values = torch.equal(a.values.nan_to_num(9), b.values.nan_to_num(9)) and a.values.dtype == b.values.dtype
    beside = all(
        (one is None and other is None) or torch.equal(one.nan_to_num(9), other.nan_to_num(9))
        for one, other in ((a.plausibility, b.plausibility), (a.confidence, b.confidence))
    )
    others = (a.epochs, a.fingerprint, a.metadata, a.names) == (b.epochs, b.fingerprint, b.metadata, b.names)
    return values and classes and beside and others


# In memory


@pytest.mark.parametrize(
    "values",
    [[0.25, -0.5], np.array([0.25, -0.5]), torch.tensor([0.25, -0.5], dtype=torch.float16, requires_grad=True)],
    ids=["list", "ndarray", "tensor"],
)
def test_values_become_a_float32_tensor(values):
    tensor = CLDScores(values).values
    assert tensor.dtype == torch.float32
    assert not tensor.requires_grad
    assert tensor.tolist() == [0.25, -0.5]


@pytest.mark.parametrize(
    "classes", [[0, 3], np.array([0, 3], dtype=np.int32), torch.tensor([0, 3], dtype=torch.uint8)], ids=type
)
def test_classes_become_an_int64_tensor(classes):
    tensor = CLDScores([0.1, 0.2], classes).classes
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("values", "classes", "error", "message"),
    [
        ([], None, ValueError, r"values must have shape \[N\] with N >= 1, got \[0\]"),
        ([[0.1]], None, ValueError, r"values must have shape \[N\].*got \[1, 1\]"),
        ([0.1], [0, 1], ValueError, r"classes must have shape \[1\].*got \[2\]"),
        ([0.1], [0.0], TypeError, r"classes must be integers"),
        ([0.1], [True], TypeError, r"classes must be integers"),
        ([0.1], [-2], ValueError, r"classes must not be negative, got -2"),
        ([0.1, 0.2], [-1, -1], ValueError, r"classes are all -1: every position is outside of the sampler"),
    ],
    ids=str,
)
def test_bad_values_and_classes_raise(values, classes, error, message):
    with pytest.raises(error, match=message):
        CLDScores(values, classes)


def test_a_fingerprint_of_another_length_raises():
    with pytest.raises(ValueError, match=r"6.*7|7.*6"):
        scores(fingerprint=Fingerprint(7))


def test_scores_stay_when_the_caller_uses_its_memory_again():
    values, shares = torch.tensor([0.5, 0.25]), torch.tensor([0.5, 1.0])
    scores = CLDScores(values, plausibility=shares, confidence=shares)
    values.zero_(), shares.zero_()
    assert scores.values.tolist() == [0.5, 0.25]
    assert scores.plausibility.tolist() == scores.confidence.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("classes", "fingerprint"),
    [
        ([0, 1], Fingerprint.of_labels(torch.tensor([0, 1]))),
        ([0, OUTSIDE], Fingerprint(2)),
        (None, Fingerprint(2)),
    ],
)
def test_without_a_fingerprint_length_and_known_classes_are_it(classes, fingerprint):
    assert CLDScores([0.1, 0.2], classes).fingerprint == fingerprint


def test_len_and_repr_count_what_there_is():
    assert len(scores()) == 6
    assert repr(scores()) == "CLDScores(6 samples, 2 classes, 4 checkpoints)"
    assert repr(CLDScores(torch.rand(1234))) == "CLDScores(1,234 samples, 1 classes, 0 checkpoints)"


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"per_class": 1}, [0, 3]),
        ({"size": 3}, [0, 1, 3]),  # 5 positions in use: quotas 1.8 and 1.2
        ({"fraction": 0.8}, [0, 1, 3, 5]),  # 4 of 5 positions in use, not 5 of 6
    ],
)
def test_positions_outside_of_the_sampler_are_never_chosen_and_in_no_budget(budget, expected):
    assert scores().select(**budget).tolist() == expected


def test_more_than_the_positions_in_use_raises():
    with pytest.raises(ValueError, match=r"size=6 is more than the 5 samples"):
        scores().select(size=6)


def test_unscored_samples_are_never_chosen():
    with pytest.raises(ValueError, match=r"class 0 needs 3 but has 2"):
        scores().select(fraction=1.0)


def test_without_classes_the_best_of_all_are_chosen():
    assert scores(classes=None).select(size=3).tolist() == [0, 3, 4]


# The summary


def line(name, **changes):
    (found,) = (row for row in scores(**changes).summary().splitlines() if row.startswith(f"{name} "))
    return found.removeprefix(name).strip()


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("samples", {}, r"5 of 6 (the others are outside the sampler)"),
        ("samples", {"values": torch.rand(1234), "classes": None, "fingerprint": Fingerprint(1234)}, "1,234"),
        ("classes", {}, "2"),
        ("classes", {"classes": None}, "1"),
        ("checkpoints", {}, "4 (after 0, 1, 3, 5 epochs)"),
        ("checkpoints", {"epochs": range(0, 90, 2)}, "45 (after 0, 2, 4, 6, ... 88 epochs)"),
        ("checkpoints", {"epochs": ()}, "unknown"),
        ("unscored", {}, "1 (a loss was not finite, not logged or never changed)"),
        ("unscored", {"values": VALUES.nan_to_num(0.3)}, "0"),
        (
            "labels",
            {"metadata": FOUND},
            "about 20% look wrong (18% to 23%), suspects() lists them; most in class 3 (31%",
        ),
        (
            "labels",
            {"metadata": {"implausible": {"share": [0, 0, 0.07]}}},
            "no clear sign of wrong ones; there may be up",
        ),
        ("references", {"metadata": {"reference_sizes": {"0": 9, "3": 10, "7": 2}}}, "0 (9), 7 (2): classes with"),
        ("references", {"metadata": {"reference_sizes": {"0": 11, "3": 10}}}, "at least 10 validation samples"),
    ],
)
def test_a_summary_tells(name, changes, expected):
    assert line(name, **changes).startswith(expected)


def test_a_summary_gives_quantiles_of_the_positions_in_use():
    values = torch.cat([torch.linspace(-1, 1, 101), torch.tensor([NAN])])
    quantiles = line("scores", values=values, classes=None, fingerprint=Fingerprint(102))
    assert quantiles == "min -1.000  10 % -0.800  25 % -0.500  median +0.000  75 % +0.500  90 % +0.800  max +1.000"


def test_a_summary_of_nothing_but_unscored_samples_is_written():
    assert line("unscored", values=[NAN] * 6).startswith("5 ")


def test_a_summary_without_known_references_says_nothing_of_them():
    assert not any(row.startswith(("references ", "reliability ")) for row in scores().summary().splitlines())


def test_a_summary_of_many_thin_references_counts_the_rest():
    sizes = {str(label): 1 for label in range(25)}
    assert "9 (1) and 15 more: classes with" in line("references", metadata={"reference_sizes": sizes})


def sound(**changes):
    """Twenty scores in each of two classes, from a long run that settled and had reliable references."""
    metadata = {
        "scored_by": "CLD",
        "reference_sizes": {"0": 20, "3": 30},
        "reference_reliability": {"0": 0.997, "3": 0.951},
        "half_epoch": 15,
        "half_overlap": 0.9,
        **changes.pop("metadata", {}),
    }
    arguments = {
        "values": torch.linspace(-0.2, 1, 40),
        "classes": torch.tensor([0, 3]).repeat(20),
        "epochs": range(31),
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }
    return CLDScores(**{**arguments, **changes})


def told(made):
    """The summary as a dictionary; an indented line continues the previous one."""
    found, name = {}, ""
    for row in made.summary().splitlines():
        name = row[:13].strip() or name
        found[name] = found.get(name, "") + row[13:]
    return found


def test_a_summary_of_sound_scores_says_so():
    assert told(sound()) == {
        "samples": "40",
        "classes": "2",
        "checkpoints": "31 (after 0, 1, 2, 3, ... 30 epochs)",
        "unscored": "0",
        "scores": told(sound())["scores"],
        "settled": "90% of the best tenth was already in it after 15 epochs",
        "references": "at least 20 validation samples per class",
        "reliability": "references of two validation halves correlate by at least 0.95",
        # Of classes 0 and 3 the best two each: 0.969, 0.908 and 1, 0.938; by chance in 30 differences 0.32.
        "alignment": "mean score +0.95 in the best tenth, +0.40 overall, +0.32 in a best tenth by chance; "
        "lowest in class 0 (+0.94, overall +0.38), 3 (+0.97, overall +0.42)",
        "trust": "yes: settled, references reliable, alignment clear",
    }


def test_what_is_too_little_is_never_rounded_to_enough():
    metadata = {"half_overlap": 0.8496, "half_epoch": 4, "reference_reliability": {"0": 0.8996, "3": 0.95}}
    summary = CLDScores(torch.linspace(-1, 1, 40), [0] * 20 + [3] * 20, range(9), metadata=metadata).summary()
    assert "84% of the best tenth" in summary
    assert "0 (0.89): classes whose halves" in summary


def test_classes_without_a_sample_in_the_best_tenth_are_not_among_the_lowest():
    account = dict(CLDScores(torch.linspace(-1, 1, 24), torch.arange(24) // 2, range(9)).account())
    assert account["alignment"].count("overall") == 1 + 2  # of all, and of the two classes that have one
    assert "nan" not in account["alignment"]


def test_a_reliability_is_never_told_to_be_more_than_it_is():
    reliability = {"0": 0.9999, "3": 0.997}
    assert told(sound(metadata={"reference_reliability": reliability}))["reliability"].endswith("at least 0.99")


@pytest.mark.parametrize(
    ("changes", "name", "line", "trust"),
    [
        ({"metadata": {"half_overlap": 0.84}}, "settled", "84% of the best", "with care:- not settled (below 85%)"),
        (
            {"metadata": {"reference_sizes": {"0": 9, "3": 30}}},
            "references",
            "0 (9): classes with fewer than 10",
            "with care:- the references of class 0 are thin or unreliable: hold out more",
        ),
        (
            {"metadata": {"reference_reliability": {"0": 0.89, "3": 0.5}, "reference_sizes": {"0": 9, "3": 30}}},
            "reliability",
            "3 (0.50), 0 (0.89): classes whose halves correlate by less than 0.9; hold out more",
            "with care:- the references of classes 0, 3 are thin or unreliable: hold out more",
        ),
        (
            {"values": torch.linspace(-1, 0.3, 40)},
            "alignment",
            "mean score +0.25 in the best tenth, -0.35 overall, +0.32 in a best tenth by chance; lowest in class 0 (",
            "with care:- the best tenth of classes 0, 3 is aligned no better than by chance: train",
        ),
        (
            {"epochs": range(4)},
            "alignment",
            "mean score +0.95 in the best tenth, +0.40 overall, +0.98 in a best tenth by chance",
            "with care:- the best tenth of classes 0, 3 is aligned no better than by chance: train",
        ),
        (
            {"metadata": {"differences": 3}},  # with 31 checkpoints, some of which were not logged
            "alignment",
            "mean score +0.95 in the best tenth, +0.40 overall, +0.98 in a best tenth by chance",
            "with care:- the best tenth of classes 0, 3 is aligned no better than by chance: train",
        ),
        (
            {"metadata": {"implausible": {"share": [0.51, 0.4, 0.6], "classes": {"0": [0.51, 0.4, 0.6]}}}},
            "labels",
            "about 51% look wrong",
            "with care:- more than half of the labels look wrong: look at some. If they are right, the validation",
        ),
        (
            {
                "metadata": {
                    "implausible": {"share": [0.5, 0.4, 0.6], "classes": {"0": [0.5, 0.4, 0.6], "3": [0.6] * 3}}
                }
            },
            "labels",
            "about 50% look wrong",
            "with care:- more than half of the labels of class 3 look wrong: look at some. If they are right, the",
        ),
    ],
    ids=[
        "not settled",
        "thin",
        "unreliable",
        "weak",
        "too few checkpoints",
        "too few differences",
        "most wrong",
        "most of a class wrong",
    ],
)
def test_a_summary_says_what_not_to_trust_and_what_to_do(changes, name, line, trust):
    found = told(sound(**changes))
    assert found[name].startswith(line)
    assert found["trust"].startswith(trust)


@pytest.mark.parametrize(
    ("metadata", "missing"),
    [
        ({"half_overlap": None}, "settled? Not known: it takes 6 epochs or more"),
        ({"half_overlap": None, "half_problem": "class 3: 2 asked"}, "settled? Not known: class 3: 2 asked"),
        (
            {"reference_reliability": None},
            "references reliable? Not known: it takes the losses of two validation samples or more a class",
        ),
        ({"reference_reliability": {"0": None, "3": 0.95}}, "references reliable? Not known"),
    ],
)
def test_a_summary_says_what_it_does_not_know(metadata, missing):
    trust = told(sound(metadata=metadata))["trust"]
    assert trust.startswith("as far as known: ")
    assert missing in trust


def test_a_summary_of_bare_scores_trusts_nothing():
    trust = told(CLDScores([0.1] * 4))["trust"]
    assert trust.startswith("not known:- settled?")
    assert trust.endswith("alignment clear? Not known: too few samples of a class are scored for a tenth of it")


@pytest.mark.parametrize("epochs", [6, 8])
def test_a_summary_of_running_moments_is_that_of_a_full_history(tmp_path, epochs):
    found = []
    for history in ("full", "running"):
        fit(tmp_path, CLDCallback(history=history, dirpath=tmp_path), max_epochs=epochs)
        found.append(told(CLDScores.load(tmp_path / "cld-scores.npz")))
    assert found[0] == found[1]
    assert {"settled", "reliability"} <= set(found[1])


def test_a_summary_of_running_moments_says_what_they_do_not_tell(tmp_path):
    stop = EarlyStopping("val_loss", patience=0, stopping_threshold=1e9, min_delta=0.0)
    fit(tmp_path, CLDCallback(history="running", dirpath=tmp_path), max_epochs=16, min_epochs=7, callbacks=[stop])
    scores = CLDScores.load(tmp_path / "cld-scores.npz")
    assert scores.epochs[-1] == 7
    found = told(scores)
    assert "settled" not in found
    assert "settled? Not known: the best tenth after 3 epochs was not kept: only a run that ends at" in found["trust"]
    assert "reliability" in found


@pytest.mark.parametrize("unscored", [0.1, 0.2])
def test_a_summary_warns_of_classes_that_are_largely_unscored(unscored):
    values = sound().values.clone()
    values[1 : round(40 * unscored) : 2] = NAN  # in class 3
    found = told(sound(values=values))
    if unscored == 0.1:
        assert found["unscored"] == "2 (a loss was not finite, not logged or never changed)"
        assert found["trust"].startswith("yes: ")
    else:
        assert found["unscored"].endswith("never changed); most in class 3 (20%)")
        assert found["trust"].startswith(
            "with care:- more than 10% of the samples of class 3 are unscored, and so in no"
        )


def test_a_summary_tells_why_nothing_is_known_of_settling():
    generator = torch.Generator().manual_seed(0)
    val = torch.rand(9, 20, generator=generator)
    train = torch.rand(9, 40, generator=generator)
    train[0:4, :38] = torch.nan  # too few scored samples at half the epochs
    found = told(LossTrajectories(train, val).score())
    assert "settled" not in found
    assert "settled? Not known: with the checkpoints up to epoch 4 or with all, " in found["trust"]
    assert "too few samples are scored for a tenth" in found["trust"]


def test_a_summary_of_scores_from_steps_does_not_judge_their_order():
    assert "settled" not in told(sound(metadata={"record": "step", "half_overlap": 0.3}))
    assert told(sound(metadata={"record": "step", "half_overlap": 0.3}))["trust"].startswith("yes: ")


def test_a_summary_of_other_scores_says_nothing_that_is_only_true_of_cld():
    assert set(told(sound(metadata={"scored_by": "variability"}))) & {"settled", "alignment", "trust"} == set()


def test_a_summary_of_one_class_names_none():
    assert "class" not in told(sound(classes=None))["alignment"]


# In files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.npz"


def rewrite(path, **members):
    """Rewrites the file with changed members; None removes one."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**contents, **{f"{key}.npy": value for key, value in members.items()}}.items():
            if isinstance(content, bytes):
                archive.writestr(name, content)
            elif content is not None:
                with archive.open(name, "w") as member:
                    np.lib.format.write_array(member, np.asanyarray(content))


def rewrite_header(path, **changes):
    with np.load(path) as archive:
        header = json.loads(str(archive["header"][()]))
    rewrite(path, header=np.array(json.dumps({**header, **changes})))


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": None},
        {"epochs": ()},
        {"fingerprint": None},
        {"metadata": None},
        {"metadata": {"value": float("inf")}},
        {"names": None},
    ],
    ids=str,
)
def test_what_was_saved_is_loaded(path, changes):
    before = scores(**changes)
    assert before.save(path) == path
    assert same(CLDScores.load(path), before)


def test_paths_may_be_strings_without_suffix_in_directories_that_are_not_there_yet(tmp_path):
    path = tmp_path / "deep" / "er" / "scores"
    scores().save(str(path))
    assert same(CLDScores.load(str(path)), scores())


def test_numpy_reads_the_files(path):
    scores().save(path)
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["values"], VALUES.numpy())


def test_loaded_scores_can_be_written_to(path):
    scores().save(path)
    loaded = CLDScores.load(path)
    loaded.values[0] = -1
    assert loaded.values[0] == -1


CIRCULAR = {}
CIRCULAR["itself"] = CIRCULAR


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, torch.ones(1), np.ones(1), np.int64(1), b"bytes", CIRCULAR], ids=type
)
def test_metadata_that_are_not_json_raise_and_leave_no_file(path, value):
    with pytest.raises(TypeError, match=r"metadata must be plain JSON values"):
        scores(metadata={"value": value}).save(path)
    assert list(path.parent.iterdir()) == []


def test_a_missing_file_raises(path):
    with pytest.raises(FileNotFoundError, match=rf"CLDScores\.load: there is no file {path}"):
        CLDScores.load(path)


def assert_refused(path, message=None):
    with pytest.raises(ValueError, match=message) as error:
        CLDScores.load(path)
    assert str(path) in str(error.value)
    assert "CLDScores.load" in str(error.value)


@pytest.mark.parametrize("tenths", range(10))
def test_a_truncated_file_is_refused(path, tenths):
    scores().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])
    assert_refused(path, "not a complete cld-scores file")


@pytest.mark.parametrize("lost", [1, 2, 10, 22, 23])
def test_a_file_that_lacks_its_last_bytes_is_refused(path, lost):
    scores().save(path)
    path.write_bytes(path.read_bytes()[:-lost])
    assert_refused(path, "not a complete cld-scores file")


def test_a_file_with_a_byte_flipped_is_refused_or_read_right(path):
    scores().save(path)
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    wrong = []
    for position in [*range(0, directory, 7), *range(directory, len(content))]:
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            good = same(CLDScores.load(path), scores())
        except ValueError as error:
            good = str(path) in str(error)
        if not good:
            wrong.append(position - len(content))
    assert wrong == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"epochs,score\n0,0.5\n",
        bytes(range(256)) * 20,
        b"PK\x05\x06" + bytes(18),
        b"\x93NUMPY\x01\x00",
        json.dumps({"kind": "cld-scores", "format": 1}).encode(),
    ],
    ids=["nothing", "text", "bytes", "an empty archive", "npy", "json"],
)
def test_a_foreign_file_is_refused(path, content):
    path.write_bytes(content)
    assert_refused(path, "not a complete cld-scores file")


def test_random_bytes_are_refused(path):
    for seed in range(20):
        path.write_bytes(np.random.default_rng(seed).bytes(2000))
        assert_refused(path, "not a complete cld-scores file")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_another_archive_of_arrays_is_refused(path, save):
    save(path, values=np.zeros(6, np.float32))
    assert_refused(path, "not a complete cld-scores file")


@pytest.mark.parametrize("samples", [6, 10_000_000], ids=["small", "a thousandfold"])
def test_a_compressed_archive_is_refused(path, samples):
    CLDScores(torch.zeros(samples)).save(path)
    noise = np.random.default_rng(0).random(1000)  # makes the archive larger than its small members
    with np.load(path) as archive:
        np.savez_compressed(path, **archive, noise=noise)
    assert_refused(path, "compressed")


def test_a_directory_is_refused(path):
    path.mkdir()
    assert_refused(path, "not a regular file")


def test_a_pickle_is_refused_and_never_run(path):
    trap = path.parent / "sprung"
    path.write_bytes(pickle.dumps(Trap(trap)))
    assert_refused(path, "not a complete cld-scores file")
    assert not trap.exists()


@pytest.mark.parametrize("member", ["header", "values", "classes", "other"])
def test_an_array_of_pickled_objects_is_refused_and_never_run(path, member):
    scores().save(path)
    trap = path.parent / "sprung"
    rewrite(path, **{member: np.array([Trap(trap)] * 6, dtype=object)})
    assert_refused(path)
    assert not trap.exists()


def test_a_file_of_another_kind_is_refused(path):
    LossTrajectories(torch.rand(5, 6), torch.rand(5, 2)).save(path)
    assert_refused(path, "holds 'cld-trajectories', not 'cld-scores'")


def test_a_file_of_a_newer_format_is_refused(path):
    scores().save(path)
    rewrite_header(path, format=2)
    assert_refused(path, "has format 2, but this lightning-cld reads up to 1. Upgrade")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "one"},
        {"format": None},
        {"kind": None},
        {"epochs": "zero"},
        {"epochs": 5},
        {"epochs": None},
        {"fingerprint": None},
        {"fingerprint": {}},
        {"fingerprint": {"length": 6, "colour": "red"}},
        {"fingerprint": {"length": "6"}},
        {"fingerprint": {"length": 7}},
        {"metadata": 5},
        {"metadata": ["seed"]},
    ],
    ids=str,
)
def test_a_header_that_was_edited_is_refused(path, changes):
    scores().save(path)
    rewrite_header(path, **changes)
    assert_refused(path)


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "{", '"text"', "{}", "[" * 100_000])
def test_a_header_that_is_not_ours_is_refused(path, text):
    scores().save(path)
    rewrite(path, header=np.array(text))
    assert_refused(path)


@pytest.mark.parametrize(
    ("member", "array"),
    [
        ("values", None),
        ("header", None),
        ("values", np.zeros(5, np.float32)),
        ("values", np.zeros((6, 1), np.float32)),
        ("values", np.zeros(0, np.float32)),
        ("values", np.zeros(6)),
        ("values", np.zeros(6, ">f4")),
        ("values", np.array(["a"] * 6)),
        ("values", b"no array"),
        ("classes", np.zeros(7, np.int64)),
        ("classes", np.zeros(6)),
        ("classes", np.full(6, -1)),
        ("classes", np.full(6, -2)),
    ],
)
def test_arrays_that_were_changed_are_refused(path, member, array):
    scores().save(path)
    rewrite(path, **{member: array})
    assert_refused(path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-6,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (6,",
        "{'descr': '<f4', 'fortran_order': False, 'shape': '''",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (6,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
        "{'shape': (6,)}",
        "print('run')",
        "((((((((",
        "",
    ],
)
def test_an_array_header_that_was_edited_is_refused(path, header):
    scores().save(path)
    text = header.encode().ljust(117) + b"\n"
    rewrite(path, values=b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24))
    assert_refused(path)


def test_an_array_that_is_a_header_cut_short_is_refused(path):
    scores().save(path)
    with zipfile.ZipFile(path) as archive:
        whole = archive.read("values.npy")
    for length in range(0, len(whole), 5):
        rewrite(path, values=whole[:length])
        assert_refused(path)


# Atomic writes


@pytest.fixture
def _disk_full(monkeypatch):
    """Makes writing the second array fail."""
    whole, calls = np.lib.format.write_array, []

    def write_array(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left on device")
        whole(*args, **kwargs)

    monkeypatch.setattr(np.lib.format, "write_array", write_array)


@pytest.mark.usefixtures("_disk_full")
def test_a_write_that_fails_leaves_no_file(path):
    with pytest.raises(OSError, match="no space left"):
        scores().save(path)
    assert list(path.parent.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(path, request):
    scores().save(path)
    old = path.read_bytes()
    request.getfixturevalue("_disk_full")
    with pytest.raises(OSError, match="no space left"):
        scores(values=torch.zeros(6)).save(path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_write_replaces_the_old_file_and_leaves_nothing_else(path):
    scores().save(path)
    scores(values=torch.zeros(6)).save(path)
    assert CLDScores.load(path).values.tolist() == [0.0] * 6
    assert list(path.parent.iterdir()) == [path]


# Suspects


def test_as_many_suspects_are_listed_as_validation_does_not_explain():
    plausibility = [1.0, 0.2, NAN, 0.4, 0.0, 0.5, 0.0]
    scores = CLDScores([0.9] * 7, [0, 0, 0, 0, 0, 0, OUTSIDE], plausibility=plausibility)
    assert scores.suspects().tolist() == [4, 1, 3]  # 0.8 + 0.6 + 1 + 0.5 is about 3
    scores = CLDScores([0.9] * 7, scores.classes, plausibility=plausibility, confidence=[1, 0.9, 1, 0.2, 0.1, 0.1, 0])
    assert scores.suspects().tolist() == [4, 5, 3]  # the lowest products
    assert CLDScores([0.9, -0.9], plausibility=[1.0, 1.0]).suspects().tolist() == []
    assert CLDScores([0.9, -0.9], plausibility=[1.0, 1.0]).suspects(0.0).tolist() == [1]


@pytest.mark.parametrize("metadata", [{"record": "step"}, {"augmented": True}])
def test_where_losses_were_not_compared_suspects_go_by_the_score(metadata):
    scores = CLDScores([0.9, 0.1, -0.3, -0.8], plausibility=[1.0, 0.0, 0.0, 0.0], metadata=metadata)
    assert scores.suspects().tolist() == [3, 2]


def test_without_plausibility_suspects_are_listed_lowest_first_without_the_unscored():
    scores = CLDScores([0.9, -0.2, NAN, 0.0, -0.7, 0.1, -0.9], [0, 0, 0, 0, 0, 0, OUTSIDE])
    assert scores.suspects().tolist() == [4, 1, 3]
    assert scores.suspects(0.1).tolist() == [4, 1, 3, 5]
    assert scores.suspects(-0.8).tolist() == []
    assert scores.suspects().dtype == torch.int64


def test_other_scores_have_no_suspects(tmp_path):
    scores = CLDScores([0.9, -0.2, 0.4], metadata={"scored_by": "lowest_cld"})
    with pytest.raises(ValueError, match=r"these scores are lowest_cld: .* Take the suspects of CLD scores"):
        scores.suspects()
    assert scores.to_csv(tmp_path / "scores.csv").read_text().splitlines()[1:] == ["1,,-0.2,", "2,,0.4,", "0,,0.9,"]


@pytest.mark.parametrize("limit", [-1.5, 2, NAN])
def test_suspects_refuse_what_is_no_correlation(limit):
    with pytest.raises(ValueError, match=r"max_score is a correlation and must lie in \[-1, 1\], got"):
        CLDScores([0.1]).suspects(limit)


# The rule "draw"


def test_a_draw_weights_by_plausibility_and_confidence():
    scores = CLDScores([0.9, 0.6, -0.5, 0.8], plausibility=[1.0, 0.5, 0.0, 0.0], confidence=[0.4, 0.8, 0.5, 0.5])
    # One of four samples is kept: c^(2 (1 - sqrt(1/4))^2) (c (1 - c))^(1/4).
    one, other = 0.4**0.5 * 0.24**0.25, 0.25 * 0.8**0.5 * 0.16**0.25
    expected, draws = one / (one + other), 1000
    first = sum(scores.select(size=1, rule="draw", seed=seed).item() == 0 for seed in range(draws))
    assert abs(first / draws - expected) < 5 * (expected * (1 - expected) / draws) ** 0.5
    assert scores.select(size=2, rule="draw").tolist() == [0, 1]
    assert scores.select(size=3, rule="draw").tolist() == [0, 1, 3]  # the third is the best-scored of the rest


def test_a_draw_has_the_budgets_of_the_top_and_stays_in_the_sampler():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (300,), generator=generator).masked_fill(torch.arange(300) % 7 == 0, OUTSIDE)
    values, plausibility = torch.rand(300, generator=generator), torch.rand(300, generator=generator)
    scores = CLDScores(values, classes, plausibility=plausibility)
    top, drawn = scores.select(fraction=0.2), scores.select(fraction=0.2, rule="draw")
    assert torch.equal(classes[top].bincount(), classes[drawn].bincount())
    assert not torch.equal(top, drawn)


def test_a_random_choice_needs_no_scores_and_keeps_the_classes():
    values = torch.linspace(-1, 1, 60).where(torch.arange(60) % 6 > 0, NAN)
    scores = CLDScores(values, torch.tensor([0, 1, 1]).repeat(20), metadata={"record": "step", "scored_by": "CLD"})
    counts, draws = np.zeros(60), 600
    for seed in range(draws):
        drawn = scores.select(fraction=0.2, rule="random", seed=seed)
        assert torch.equal(scores.classes[drawn].bincount(), torch.tensor([4, 8]))
        counts[drawn] += 1
    assert (np.abs(counts / draws - 0.2) < 5 * (0.2 * 0.8 / draws) ** 0.5).all()


@pytest.mark.parametrize(
    ("plausibility", "metadata", "told"),
    [
        ([1.0, 0.4, 0.0, NAN, 1.0], {}, "explain only 47% of the train samples"),  # of those in the sampler
        ([1.0, 0.5, 0.0, NAN, 0.0], {}, None),
        ([1.0, 0.4, 0.0, NAN, 1.0], {"record": "step"}, None),
        ([1.0, 0.4, 0.0, NAN, 1.0], {"augmented": True}, None),
    ],
    ids=["most", "half", "of steps", "augmented"],
)
def test_a_draw_warns_where_validation_explains_less_than_half(plausibility, metadata, told):
    scores = CLDScores([0.9] * 5, [0, 0, 0, 0, OUTSIDE], plausibility=plausibility, metadata=metadata)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores.select(size=1, rule="random")
        scores.select(size=1, rule="draw")
        scores.suspects()
    assert [told in str(warning.message) for warning in caught] == ([True] if told else [])


def test_a_draw_needs_the_plausibility():
    with pytest.raises(ValueError, match=r'rule="draw" weights by how plausible each label is.*Score logged losses'):
        CLDScores([0.1, 0.2]).select(size=1, rule="draw")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": "best"}, ValueError, "rule must be one of 'top', 'draw', 'random', got 'best'"),
        ({"seed": "0"}, TypeError, "seed must be a whole number, got '0'"),
    ],
    ids=str,
)
def test_bad_rules_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        CLDScores([0.1, 0.2], plausibility=[0.1, 0.1]).select(size=1, **arguments)


@pytest.mark.parametrize("name", ["plausibility", "confidence"])
def test_what_is_for_each_sample_must_have_its_shape(name):
    with pytest.raises(ValueError, match=rf"{name} must have shape \[2\], one value per score, got \[3\]"):
        CLDScores([0.1, 0.2], **{name: [0.1, 0.1, 0.1]})


@pytest.mark.parametrize("kind", [list, iter, np.array, SampleNames], ids=["list", "iterator", "ndarray", "names"])
def test_names_are_those_of_the_positions(kind):
    made = CLDScores([0.5, -0.25, 0.75], names=kind(["cat", "dog", "owl"]))
    assert isinstance(made.names, SampleNames)
    assert made.names[made.suspects()] == ["dog"]
    assert made.names[made.select(size=2)] == ["cat", "owl"]
    assert CLDScores([0.5]).names is None


@pytest.mark.parametrize("make", [CLDScores, lambda values, names: LossTrajectories([values], [values], names=names)])
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b", "a"], ValueError, r"one name for each of the 3 samples, all different, got 2 different names\."),
        (["a", "b"], ValueError, r"for each of the 3 samples, all different, got 2 different names\."),
        ([], ValueError, r"got 0 different names\."),
        (SampleNames("abcd"[place] for place in range(4)), ValueError, r"got 4 different names\."),
        ("abc", TypeError, r"names must be a list of text, got only 'abc'\."),
        ([0, 1, 2], TypeError, r"name of a sample must be text, got 0 of type int\."),
    ],
    ids=["twice", "few", "none", "many", "one text", "numbers"],
)
def test_names_that_are_not_one_a_sample_are_refused(make, names, error, message):
    with pytest.raises(error, match=message):
        make([0.5, -0.25, 0.75], names=names)


def test_epochs_to_settle_are_not_told_of_scores_from_fewer():
    settled = {"cutoff_epoch": "auto", "settled_epoch": 18}
    assert told(sound(metadata=settled))["settled"].startswith("after 18 epochs; ")
    assert "18" not in told(sound(metadata=settled, epochs=range(9)))["settled"]


def test_suspects_that_are_alike_but_for_the_score_come_by_it_without_the_unscored():
    scores = CLDScores([0.3, NAN, -0.2, 0.1], plausibility=[0.0] * 4, confidence=[0.0] * 4)
    assert scores.suspects().tolist() == [2, 3, 0]


@pytest.mark.parametrize("wrong", [-0.1, 1.5])
def test_a_plausibility_is_a_share(wrong):
    with pytest.raises(ValueError, match=rf"plausibility must lie in \[0, 1\], got {wrong}"):
        CLDScores([0.5, 0.5], plausibility=[1.0, wrong])


@pytest.mark.parametrize("rule", ["top", "draw", "random"])
def test_a_budget_below_the_number_of_classes_is_told(rule):
    scores = CLDScores(torch.rand(40), torch.arange(40) % 20, plausibility=torch.ones(40))
    with pytest.warns(UserWarning, match="5 samples can't have one of each of the 20 classes.*Keep more"):
        scores.select(size=5, rule=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores.select(size=20, rule=rule)

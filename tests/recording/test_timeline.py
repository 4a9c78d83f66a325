from __future__ import annotations

import warnings

import pytest
from lightning.pytorch import Callback
from toys import Blobs, fit

from lightning_cld import CLDCallback
from lightning_cld.recording import timeline
from lightning_cld.recording.timeline import Timeline

NINE_ROWS = 4 * 9 * (len(Blobs().train_set) + len(Blobs().val_set))
"""The bytes of nine checkpoints."""


class Ended(Exception):  # noqa: N818  # it is no error
    """Ends a fit before its first step."""


class Ends(Callback):
    def on_train_start(self, trainer, pl_module):
        raise Ended


def started(tmp_path, **arguments):
    """Starts a fit, for the warnings."""
    watching = {name: arguments.pop(name) for name in list(arguments) if name not in ("max_epochs", "max_steps")}
    with pytest.raises(Ended):
        fit(tmp_path, CLDCallback(dirpath=tmp_path, **watching), callbacks=[Ends()], **arguments)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"max_epochs": 8}, "With history='running' it would be 36 bytes per train sample"),
        ({"max_epochs": 90, "cutoff_epoch": 8}, "With history='running' it would"),
        ({"max_epochs": 40, "every_n_epochs": 5}, "With history='running' it would"),
        ({"max_epochs": 8, "cutoff_epoch": "auto"}, "With history='running' and a number as cutoff_epoch it would"),
    ],
    ids=str,
)
def test_losses_that_will_be_large_are_announced_with_the_remedy(tmp_path, monkeypatch, arguments, advice):
    monkeypatch.setattr(timeline, "LARGE_HISTORY", NINE_ROWS - 1)
    with pytest.warns(UserWarning, match="at 9 checkpoints will take") as caught:
        started(tmp_path, **arguments)
    (message,) = (str(warning.message) for warning in caught if "will take" in str(warning.message))
    assert "90 train and 30 validation samples" in message
    assert advice in message


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 8},
        {"max_epochs": 90, "cutoff_epoch": 8},
        {"max_epochs": 44, "every_n_epochs": 5},
        {"max_epochs": 90, "history": "running"},
        {"max_epochs": 90, "record": "step"},
        {"max_epochs": -1},  # how many there will be is not known
    ],
    ids=str,
)
def test_losses_that_stay_small_or_have_no_remedy_are_not_announced(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(timeline, "LARGE_HISTORY", NINE_ROWS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*will take")
        started(tmp_path, **arguments)


def test_the_size_that_is_announced_is_that_of_all_losses(recwarn):
    plan = Timeline(90, 1, stop_at_cutoff=False, history="full", record="sweep")
    plan.warn_of_size(2_899_100, 50_000)  # a little less than 1 GiB
    assert not recwarn
    plan.warn_of_size(12_811_670, 50_000)
    (warning,) = recwarn
    assert "12,811,670 train and 50,000 validation samples at 91 checkpoints will take 4.4 GiB" in str(warning.message)
    assert "36 bytes per train sample, 0.4 GiB" in str(warning.message)


def test_moments_that_would_take_more_than_the_losses_are_no_remedy(recwarn):
    plan = Timeline(4, 1, stop_at_cutoff=False, history="full", record="sweep")
    plan.warn_of_size(100_000_000, 50_000)  # 1.9 GiB of losses, 2.6 GiB of moments
    assert not recwarn


@pytest.mark.parametrize(
    ("cutoff", "every", "last", "planned", "half"),
    [
        (None, 1, 9, list(range(10)), 4),
        (None, 3, 14, [0, 3, 6, 9, 12], 6),
        (8, 2, 20, [0, 2, 4, 6, 8], 4),
        ("auto", 1, 6, list(range(7)), 3),
        (None, 4, 15, [0, 4, 8, 12], 4),
        (None, 1, None, [], None),
    ],
)
def test_the_plan_holds_all_checkpoints_and_the_one_at_half_of_the_epochs(cutoff, every, last, planned, half):
    plan = Timeline(cutoff, every, stop_at_cutoff=False, history="full", record="sweep")
    plan._max_epochs = last
    assert list(plan.planned) == planned
    assert plan.half_epoch == half


def test_a_plan_without_end_costs_nothing():
    plan = Timeline(None, 3, stop_at_cutoff=False, history="full", record="sweep")
    plan._max_epochs = 10**12
    assert plan.half_epoch == 499_999_999_998

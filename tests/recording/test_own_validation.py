"""The mean validation loss of a sweep beside the run's own."""

import warnings

import pytest
import torch
from toys import Blobs, Classifier, fit

from lightning_cld import CLDCallback

ANOTHER = "the sweep's mean validation loss is"


def warned(tmp_path, module, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, CLDCallback(**arguments.pop("watching", {})), module, **arguments)
    return [str(warning.message) for warning in caught if ANOTHER in str(warning.message)]


def validating(how):
    """A module whose validation makes `how(batch loss)` known in some way."""

    class Validates(Classifier):
        def __init__(self):
            super().__init__(lr=0.001)

        def validation_step(self, batch, batch_idx):
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            return how(self, loss)

    return Validates


def log(name, times=1.0):
    return lambda module, loss: module.log(name, times * loss)


NAMES = ["val_loss", "valid_loss", "validation_loss", "val/loss", "loss/val", "Val_Loss", "val_loss_epoch", "valloss"]


@pytest.mark.parametrize("name", NAMES)
def test_a_logged_loss_that_is_grossly_another_is_warned_of_once(tmp_path, name):
    messages = warned(tmp_path, validating(log(name, 3.0)))
    assert len(messages) == 1
    assert f"but the {name} that this run logged is" in messages[0]
    assert "cld_step" in messages[0]


@pytest.mark.parametrize("times", [1 / 3, 3.0])
@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: {"loss": loss, "more": 1}, lambda loss: loss[None]])
def test_a_returned_loss_is_compared_too(tmp_path, times, wrap):
    messages = warned(tmp_path, validating(lambda module, loss: wrap(times * loss)))
    assert len(messages) == 1
    assert "the loss that validation_step returned" in messages[0]


@pytest.mark.parametrize(
    "how",
    [
        log("val_loss"),
        log("val_loss", 1.3),  # a little label smoothing, say
        log("val_accuracy", 3.0),
        log("train_loss_of_validation", 3.0),
        log("val_loss_of_the_decoder", 3.0),
        lambda module, loss: None,
        lambda module, loss: {"predictions": loss.expand(5)},
        lambda module, loss: torch.tensor([1.0, 2.0]),
        lambda module, loss: 7,
    ],
)
def test_no_warning_of_the_same_loss_or_of_what_is_no_loss(tmp_path, how):
    assert warned(tmp_path, validating(how)) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"watching": {"val_dataloader": Blobs().val_dataloader()}},
        {"limit_val_batches": 1},
        {"limit_val_batches": 0},
        {"val_check_interval": 4},  # in an epoch of six steps
    ],
)
def test_other_samples_or_other_weights_are_not_compared(tmp_path, arguments):
    assert warned(tmp_path, validating(log("val_loss", 3.0)), **arguments) == []


def test_small_losses_may_differ(tmp_path):
    class Easy(validating(log("val_loss", 3.0))):
        def on_train_epoch_end(self):  # before the sweep, which then finds hardly any loss
            self.net[-1].weight.data *= 0
            self.net[-1].bias.data *= 0

        def cld_step(self, batch):
            losses = torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return (losses if self.trainer.global_step == 0 else 0.01 + 0 * losses), batch[1]

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 0.03)

    assert warned(tmp_path, Easy) == []


def test_it_is_compared_where_validation_comes_later(tmp_path):
    assert len(warned(tmp_path, validating(log("val_loss", 3.0)), check_val_every_n_epoch=3)) == 1

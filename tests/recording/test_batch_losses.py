"""From a batch to losses and classes: the user's step, remedies for wrong shapes, and outputs that are no logits."""

import re
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from toys import CLASSES, Blobs, Classifier, blobs, fit, plain_losses, quiet_trainer

from lightning_cld import CLDCallback, trajectories_from_checkpoints
from lightning_cld.recording.batch_losses import check_batch, check_loss, make_step


def per_sample(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


# step=


def keyed(samples):
    return {
        "points": torch.stack([point for point, _ in samples]),
        "label": torch.stack([label for _, label in samples]),
    }


class Library(Classifier):
    """As a library writes it: batches are dictionaries, forward takes all of one, and there is no cld_step."""

    def forward(self, batch):
        return {"logits": self.net(batch["points"])}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch)["logits"], batch["label"])

    validation_step = training_step


class NoForward(Library):
    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["points"]), batch["label"])

    validation_step = training_step


class OwnStep(Library):
    def cld_step(self, batch):
        return library_step(self, batch)


def library_step(module, batch):
    return per_sample(module.net(batch["points"]), batch["label"]), batch["label"]


def one_class(module, batch):
    return library_step(module, batch)[0], None


class StepModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, module, batch):
        outputs = module.net(batch["points"])
        return F.cross_entropy(outputs, batch["label"], self.weight, reduction="none"), batch["label"]


class Doubled:
    def __call__(self, module, batch):
        losses, classes = library_step(module, batch)
        return 2 * losses, classes


@pytest.fixture
def keyed_blobs():
    return Blobs(collate_fn=keyed), DataLoader(Blobs().val_set, 16, collate_fn=keyed)


def run(tmp_path, keyed_blobs, module=Library, **arguments):
    data, val = keyed_blobs
    data.val_dataloader = lambda: val
    cld = CLDCallback(dirpath=tmp_path, **arguments)
    trainer, module = fit(tmp_path, cld, module, data)
    return cld, trainer, module


@pytest.mark.parametrize("history", ["full", "running"])
@pytest.mark.parametrize("module", [Library, NoForward])
def test_a_step_does_what_the_method_does(tmp_path, keyed_blobs, module, history):
    by_step, _, _ = run(tmp_path / "a", keyed_blobs, module, step=library_step, history=history)
    by_method, _, _ = run(tmp_path / "b", keyed_blobs, OwnStep, history=history)
    assert torch.equal(by_step.scores.values, by_method.scores.values)
    assert torch.equal(by_step.scores.classes, by_method.scores.classes)


def test_the_losses_of_a_step_are_those_of_the_module_in_evaluation(tmp_path, keyed_blobs):
    cld, _, module = run(tmp_path, keyed_blobs, step=library_step)
    expected = plain_losses(module, keyed_blobs[0].train_set)
    torch.testing.assert_close(cld.trajectories.train_losses[-1], expected)


@pytest.mark.parametrize("step", [StepModule(), Doubled(), lambda module, batch: library_step(module, batch)])
def test_a_step_may_be_a_module_or_any_other_callable(tmp_path, keyed_blobs, step):
    cld, _, module = run(tmp_path, keyed_blobs, step=step)
    losses = plain_losses(module, keyed_blobs[0].train_set)
    factor = {StepModule: cld.trajectories.train_classes + 1, Doubled: 2}.get(type(step), 1)
    torch.testing.assert_close(cld.trajectories.train_losses[-1], losses * factor)


def test_a_step_that_is_a_module_is_moved_to_the_device():
    model, step = Classifier().to("meta"), StepModule()
    make_step(model, None, step)
    assert step.weight.device.type == "meta"


def test_a_step_without_classes_makes_one_class(tmp_path, keyed_blobs):
    cld, _, _ = run(tmp_path, keyed_blobs, step=one_class)
    assert cld.scores.classes is None


def test_a_step_is_used_on_saved_checkpoints_too(tmp_path, keyed_blobs):
    data, val = keyed_blobs
    files = [tmp_path / f"{epoch}.ckpt" for epoch in range(5)]

    class Saves(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(files[0])

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(files[trainer.current_epoch + 1])

    cld = CLDCallback(dirpath=tmp_path, step=library_step)
    data.val_dataloader = lambda: val
    fit(tmp_path, cld, Library, data, callbacks=[Saves()])
    arguments = {"train_dataloader": data.train_dataloader(), "val_dataloader": val}
    found = trajectories_from_checkpoints(quiet_trainer(tmp_path), Library(), files, step=library_step, **arguments)
    assert torch.equal(found.train_losses, cld.trajectories.train_losses)
    assert torch.equal(found.val_losses, cld.trajectories.val_losses)
    with pytest.raises(ValueError, match="Remove loss_fn"):
        trajectories_from_checkpoints(quiet_trainer(tmp_path), Library(), files, step=one_class, loss_fn=per_sample)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": library_step, "loss_fn": per_sample}, ValueError, "both given. Remove loss_fn: step already returns"),
        ({"step": 5}, TypeError, r"step must be a function of \(module, batch\).*got 5"),
        ({"step": StepModule}, TypeError, r"step must be a function of \(module, batch\), or an instance.*StepModule"),
        ({"step": "library_step"}, TypeError, "step must be a function.*got 'library_step'"),
    ],
)
def test_what_no_step_can_be_is_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        CLDCallback(**arguments)


@pytest.mark.parametrize(
    ("module", "arguments", "error", "message"),
    [
        (
            OwnStep,
            {"step": library_step},
            ValueError,
            "OwnStep has a cld_step, but step=.*Remove step to use cld_step",
        ),
        (OwnStep, {"loss_fn": per_sample}, ValueError, "cld_step, but loss_fn=.*Remove loss_fn to use cld_step"),
        (
            Library,
            {"step": lambda module, batch: library_step(module, batch)[0]},
            TypeError,
            "^step must return .losses",
        ),
        (Library, {"step": lambda m, b: [*library_step(m, b)]}, TypeError, "^step must return .losses.*a list of 2"),
        (
            Library,
            {"step": lambda module, batch: (library_step(module, batch)[0], batch["label"].float())},
            TypeError,
            "^step must return classes as integers.*float32",
        ),
        (
            Library,
            {"step": lambda module, batch: (library_step(module, batch)[0], batch["label"][:-1])},
            ValueError,
            r"one class per sample, \[16\] for this batch.*shape \[15\].*Return one class for each loss: give",
        ),
        (Library, {}, TypeError, r"batches \(inputs, targets, ...\), got a dict.*step=.*cld_step"),
        (NoForward, {}, TypeError, "NoForward has no forward.*step=.*cld_step"),
    ],
)
def test_steps_that_cannot_serve_are_refused_before_the_first_step(
    tmp_path, keyed_blobs, module, arguments, error, message
):
    model = module()
    with pytest.raises(error, match=message):
        run(tmp_path, keyed_blobs, model, **arguments)
    assert model.trainer.global_step == 0


@pytest.mark.parametrize("lacking", ["train", "validation"])
def test_classes_for_one_set_alone_are_said_to_be_so(tmp_path, keyed_blobs, lacking):
    def step(module, batch):
        is_train = len(batch["label"]) == 15  # the batch size of the train set alone
        return library_step(module, batch)[0], None if is_train == (lacking == "train") else batch["label"]

    data, val = keyed_blobs
    data.loader["batch_size"] = 15
    having = {"train": "validation", "validation": "train"}[lacking]
    with pytest.raises(
        ValueError, match=f"^step returned classes for the {having} set, but None for the {lacking} set"
    ):
        run(tmp_path, (data, DataLoader(val.dataset, 10, collate_fn=keyed)), step=step)


# Losses of a wrong shape


@pytest.mark.parametrize(
    ("shape", "samples"),
    [
        ((8, 5, 7), 8),  # pixels
        ((8, 6), 8),  # tokens, labels
        ((8, 1), 8),
        ((1, 1), 1),
        ((8, 2, 4, 4), 8),
        ((16,), 8),  # crops, or tokens in one row
        ((24,), 8),
        ((16, 3, 3), 8),  # crops of pixels
        ((5,), 1),
        ((5, 8), 8),  # time first
        ((3, 2, 8), 8),
    ],
)
def test_the_remedy_for_several_losses_gives_their_mean(shape, samples):
    losses = torch.rand(shape)
    with pytest.raises(ValueError, match=re.escape(f"floating point [{samples}] for this batch")) as error:
        check_batch(losses, None, samples)
    assert f"shape {list(shape)}" in str(error.value)
    (code,) = re.findall(r"losses\.[a-z(][^:]*?mean\(1\)(?:\.view\(-1, \d+\)\.mean\(1\))?", str(error.value))
    found = eval(code)
    check_batch(found, None, samples)
    samples_first = losses.numpy() if shape[0] % samples == 0 else np.moveaxis(losses.numpy(), shape.index(samples), 0)
    np.testing.assert_allclose(found.numpy(), samples_first.reshape(samples, -1).mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("losses", "samples", "message"),
    [
        (torch.tensor(0.5), 8, r"shape \[\]. The loss reduces the batch to one number. Use reduction='none' if"),
        (torch.tensor(0.5), 1, r"shape \[\]. The loss reduces the batch to one number"),
        (torch.tensor([0.5]), 8, r"shape \[1\]. The loss reduces the batch to one number"),
        (torch.tensor([[0.5]]), 8, r"shape \[1, 1\]. The loss reduces the batch to one number"),
        (torch.rand(16), 8, "2 losses per sample.*one view per sample: train_dataloader=.*val_dataloader="),
        (
            torch.rand(5),
            8,
            r"shape \[5\]. Return a loss for every sample.*return NaN for it: the sample is then unscored",
        ),
        (torch.rand(11), 8, "Return a loss for every sample"),
        (torch.rand(0), 8, "Return a loss for every sample"),
        (torch.rand(0, 8, 8), 4, "Return a loss for every sample"),
        (torch.ones(8, dtype=torch.int64), 8, "int64 tensor.*losses.float()"),
        (torch.ones(8, dtype=torch.bool), 8, "bool tensor.*losses.float()"),
        (0.5, 8, "a float. Return the losses alone, as one tensor"),
        ((torch.rand(8), {"dice": 0.5}), 8, "a tuple of 2. Return the losses alone"),
        ({"loss": torch.rand(8)}, 8, "a dict. Return the losses alone"),
        ([torch.rand(1)] * 8, 8, "a list of 8. Return the losses alone, as one tensor"),
        (None, 8, "a NoneType. Return the losses alone"),
    ],
)
def test_other_shapes_and_kinds_have_remedies_of_their_own(losses, samples, message):
    with pytest.raises(ValueError, match=message):
        check_batch(losses, None, samples)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_loss_per_sample_passes(dtype):
    check_batch(torch.rand(8).to(dtype), torch.zeros(8, dtype=torch.uint8), 8)
    check_batch(torch.rand(1).to(dtype), None, 1)


# Loss modules and their attribute `reduction`


class Dice(nn.modules.loss._Loss):
    """As in segmentation_models_pytorch: it takes no reduction, but inherits one."""

    def __init__(self):
        super().__init__()

    def forward(self, outputs, targets):
        return 1 - (outputs.softmax(1)[:, 1] * (targets == 1)).mean()


class PerSampleDice(Dice):
    def forward(self, outputs, targets):
        return 1 - outputs.softmax(1).gather(1, targets[:, None])[:, 0]


class Focal(nn.Module):
    """With None in place of "none"."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs, targets):
        losses = per_sample(outputs, targets)
        return losses.mean() if self.reduction == "mean" else losses


class NoneReduces(Focal):
    def forward(self, outputs, targets):
        return per_sample(outputs, targets).sum()


class NoArgument(nn.CrossEntropyLoss):
    """Its forward is torch's own, so its attribute can be set afterwards."""

    def __init__(self):
        super().__init__(label_smoothing=0.1)


def set_to_none(loss):
    loss.reduction = "none"
    return loss


def with_attribute(outputs, targets):
    return per_sample(outputs, targets)


with_attribute.reduction = "mean"


@pytest.mark.parametrize(
    "loss_fn",
    [
        PerSampleDice(),
        Focal(None),
        Focal("none"),
        set_to_none(NoArgument()),
        nn.NLLLoss(reduction="none"),
        with_attribute,
        nn.MultiMarginLoss(reduction="none"),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_loss_that_returns_one_per_sample_is_used_whatever_it_says(tmp_path, loss_fn):
    cld = CLDCallback(loss_fn=loss_fn)
    _, module = fit(tmp_path, cld)
    points = torch.stack([point for point, _ in Blobs().train_set])
    labels = torch.tensor([int(label) for _, label in Blobs().train_set])
    with torch.no_grad():
        expected = loss_fn(module.eval()(points), labels)
    torch.testing.assert_close(cld.trajectories.train_losses[-1], expected)


@pytest.mark.parametrize(
    "loss_fn", [Dice(), Focal(), NoneReduces(None), torch.compile(nn.CrossEntropyLoss(), backend="eager")]
)
def test_a_loss_that_reduces_is_refused_at_the_first_batch_and_its_remedy_works(tmp_path, loss_fn):
    module = Classifier()
    with pytest.raises(ValueError, match="The loss reduces the batch to one number") as error:
        fit(tmp_path, CLDCallback(loss_fn=loss_fn), module)
    assert module.trainer.global_step == 0
    (code,) = re.findall(r"loss_fn=(lambda .*\]\))\.$", str(error.value))
    cld = CLDCallback(loss_fn=eval(code, {"torch": torch, "loss": loss_fn}))
    _, module = fit(tmp_path, cld)
    point, label = Blobs().train_set[4]
    with torch.no_grad():
        expected = loss_fn(module.eval()(point[None]), label[None])
    torch.testing.assert_close(cld.trajectories.train_losses[-1, 4], expected)


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(reduction="sum"), NoArgument(), nn.NLLLoss(reduction=None)]
)
def test_a_loss_of_torch_that_reduces_is_refused_at_once(loss_fn):
    with pytest.raises(
        ValueError, match=r"does not return one loss per sample.*reduction='none', as an argument or an"
    ):
        check_loss(loss_fn, None)
    check_loss(set_to_none(loss_fn), None)


# Targets that are mixed, and outputs for other samples than the targets


def mixed(samples):
    points, labels = torch.utils.data.default_collate(samples)
    pair = v2.MixUp(num_classes=CLASSES)(points.view(-1, 1, 2, 2), labels)
    return pair[0].view(-1, 4), pair[1]


def cut(samples):
    points, labels = torch.utils.data.default_collate(samples)
    pair = v2.CutMix(num_classes=CLASSES)(points.view(-1, 1, 2, 2), labels)
    return pair[0].view(-1, 4), pair[1]


def two_labels(samples):
    points, labels = torch.utils.data.default_collate(samples)
    return (points + points.flip(0)) / 2, (labels, labels.flip(0), 0.5)


def one_hot(samples):
    points, labels = torch.utils.data.default_collate(samples)
    return points, F.one_hot(labels, CLASSES).float()


class Soft(Classifier):
    """Trains on any targets."""

    def training_step(self, batch, batch_idx):
        return any_targets(self(batch[0]), batch[1]).mean()

    def validation_step(self, batch, batch_idx):
        pass


def any_targets(outputs, targets):
    if isinstance(targets, tuple | list):
        return targets[2] * per_sample(outputs, targets[0]) + (1 - targets[2]) * per_sample(outputs, targets[1])
    return per_sample(outputs, targets)


VIEW = r"MixUp, CutMix\), give the un-augmented view of the train set: train_dataloader=.*cld_train_dataloader\(\)"


@pytest.mark.parametrize("collate", [mixed, cut, two_labels, one_hot])
@pytest.mark.filterwarnings("ignore:The train set shows the same sample differently")
def test_mixed_targets_of_the_train_set_name_the_view(tmp_path, collate):
    kind = rf"a float32 tensor of shape \[\d+, {CLASSES}\]"
    for arguments, error, said in (
        (
            {"loss_fn": any_targets},
            ValueError,
            "validation set are integer classes, but the targets of the train set are",
        ),
        ({}, TypeError, "but the targets are"),
    ):
        module = Soft()
        message = rf"{said} ({kind})\. If .*{VIEW}"
        if collate is two_labels:  # a half of each: the same in either order
            error, message = ValueError, r"sorts or mixes them.*: train_dataloader="
        with pytest.raises(error, match=message):
            fit(tmp_path, CLDCallback(**arguments), module, Blobs(collate_fn=collate))
        assert module.trainer.global_step == 0
        view = DataLoader(Blobs().train_set, 16)
        cld = CLDCallback(**arguments, train_dataloader=view)
        fit(tmp_path, cld, Soft, Blobs(collate_fn=collate))
        assert cld.scores.num_classes == CLASSES
        data = Blobs(collate_fn=collate)
        data.cld_train_dataloader = lambda view=view: view
        cld = CLDCallback(**arguments)
        fit(tmp_path, cld, Soft, data)
        assert cld.scores.num_classes == CLASSES


def test_soft_targets_of_the_validation_set_alone_are_told_apart(tmp_path):
    data = Blobs()
    data.val_dataloader = lambda: DataLoader(data.val_set, 16, collate_fn=one_hot)
    with pytest.raises(ValueError, match=r"of the train set are integer classes, but .* validation set are a float32"):
        fit(tmp_path, CLDCallback(loss_fn=any_targets), Soft, data)


def test_soft_targets_of_both_sets_make_one_class(tmp_path):
    data = Blobs(collate_fn=one_hot)
    data.val_dataloader = lambda: DataLoader(data.val_set, 16, collate_fn=one_hot)
    cld = CLDCallback(loss_fn=any_targets)
    fit(tmp_path, cld, Soft, data)
    assert cld.scores.classes is None


@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (8, 3, 5)])
def test_the_default_loss_of_pixels_says_how_to_average(shape):
    outputs, targets = torch.rand(shape), torch.randint(3, (shape[0], *shape[2:]))
    step = make_step(Returns(outputs), None)
    with pytest.raises(TypeError, match=r"logits \[B, C\].*returned a float32 tensor of shape") as error:
        step((None, targets))
    (code,) = re.findall(r"loss_fn=(lambda .*)\.$", str(error.value))
    losses, _, _ = make_step(Returns(outputs), eval(code, {"torch": torch}))((None, targets))
    check_batch(losses, None, 8)
    pixels = outputs.log_softmax(1).gather(1, targets[:, None]).numpy()
    np.testing.assert_allclose(losses.numpy(), -pixels.reshape(8, -1).mean(1), rtol=1e-5)


@pytest.mark.parametrize("rows", [40, 4])
def test_logits_for_other_samples_than_the_targets_are_told_apart(rows):
    step = make_step(Returns(torch.rand(rows, 3)), None)
    with pytest.raises(ValueError, match=f"logits for {rows} samples, but there are 8 targets.*crops.*step="):
        step((None, torch.zeros(8, dtype=torch.int64)))


class Returns(L.LightningModule):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs):
        return self.outputs


# Outputs that are no logits


class Ends(Classifier):
    """A classifier whose forward ends in something after the logits; it trains on the logits."""

    def __init__(self, end, classes=CLASSES):
        super().__init__()
        self.net[-1] = nn.Linear(16, classes)
        self.end = end

    def forward(self, inputs):
        return self.end(self.net(inputs))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


def softmax(logits):
    return logits.softmax(1)


def warned(tmp_path, module, pool=None, max_epochs=5, **arguments):
    """The warnings of ours in a run of several epochs."""
    cld = CLDCallback(dirpath=tmp_path, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, cld, module, Blobs(pool), max_epochs=max_epochs)
    return cld, [str(warning.message) for warning in caught if str(warning.message).startswith("CLD")]


@pytest.mark.parametrize(
    "end",
    [
        softmax,
        lambda logits: logits.softmax(1).bfloat16(),
        lambda logits: logits.softmax(1).half(),
        lambda logits: F.one_hot(logits.argmax(1), CLASSES).float(),
    ],
    ids=["float32", "bfloat16", "float16", "decisions"],
)
@pytest.mark.parametrize("history", ["full", "running"])
def test_probabilities_are_warned_of_once(tmp_path, end, history):
    _, (message,) = warned(tmp_path, Ends(end), history=history)
    assert re.search(
        r"Ends.forward seems to return probabilities.*give the loss that it uses, such as loss_fn=lambda", message
    )


def test_the_loss_that_the_warning_names_is_that_of_the_logits(tmp_path):
    _, (message,) = warned(tmp_path, Ends(softmax))
    (code,) = re.findall(r"loss_fn=(lambda .*)\.$", message)
    cld, messages = warned(tmp_path, module := Ends(softmax), loss_fn=eval(code, {"torch": torch}))
    assert messages == []
    expected = plain_losses(module, Blobs().train_set)
    torch.testing.assert_close(cld.trajectories.train_losses[-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "end",
    [
        nn.Identity(),
        nn.ReLU(),
        lambda logits: logits.log_softmax(1),
        nn.Sigmoid(),
        lambda logits: logits - logits.mean(1, keepdim=True) + 1 / CLASSES,  # rows sum to 1, with negative values
        lambda logits: torch.cat([logits[:1], logits[1:].softmax(1)]),  # all rows but one
    ],
    ids=["logits", "relu", "log", "sigmoid", "sum", "one row"],
)
def test_other_outputs_are_not_taken_for_probabilities(tmp_path, end):
    assert warned(tmp_path, Ends(end))[1] == []


def renumbered(*numbers):
    points, labels = blobs().tensors
    return TensorDataset(points, torch.tensor(numbers)[labels])


@pytest.mark.parametrize(
    ("columns", "numbers", "said"),
    [
        (12, (0, 1, 2), "12 columns.*higher than 2.*the classes 0 to 11"),
        (1000, (0, 1, 2), "1,000 columns.*higher than 2.*the classes 0 to 999"),
        (1000, (0, 5, 249), "1,000 columns.*higher than 249"),
        (11, (0, 1, 2), None),
        (1000, (0, 1, 250), None),
        (1000, (12, 700, 999), None),  # a few classes by the numbers that the model was made for
        (3, (0, 1, 2), None),
    ],
)
def test_far_more_columns_than_the_classes_need_are_warned_of_once(tmp_path, columns, numbers, said):
    _, messages = warned(tmp_path, Ends(nn.Identity(), columns), renumbered(*numbers))
    assert len(messages) == (said is not None)
    if said:
        assert re.search(
            rf"Ends.forward returns {said}.*That is right if.*features.*loss_fn=.*step=.*cld_step", *messages
        )


def test_the_classes_of_the_whole_sweep_count_not_those_of_a_batch(tmp_path):
    points, labels = renumbered(0, 0, 399).tensors
    order = labels.argsort()  # as in an image folder
    assert warned(tmp_path, Ends(nn.Identity(), 1000), TensorDataset(points[order], labels[order]))[1] == []


def test_a_second_run_is_warned_again_and_a_loss_of_ones_own_never(tmp_path):
    cld, messages = warned(tmp_path, Ends(softmax))
    with pytest.warns(UserWarning, match="seems to return probabilities"):
        fit(tmp_path, cld, Ends(softmax))
    assert len(messages) == 1
    assert warned(tmp_path, Ends(softmax), loss_fn=per_sample)[1] == []
    assert warned(tmp_path, Ends(softmax), step=lambda m, b: (per_sample(m(b[0]), b[1]), b[1]))[1] == []

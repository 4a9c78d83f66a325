from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch.utils.data import TensorDataset

from lightning_cld import CLDScores, LossTrajectories, plotting
from lightning_cld.showing import choice

NAN = float("nan")
CLASSES, VAL_CLASSES = torch.arange(60) % 3, torch.arange(12) % 3
IMAGES = TensorDataset(torch.rand(60, 1, 8, 8), CLASSES)


def timeline(classes=CLASSES, val_classes=VAL_CLASSES, rows=9, seed=3):
    generator = np.random.default_rng(seed)
    falling = 2.0 * np.exp(-np.arange(rows) / 4.0)[:, None]
    train, val = ((falling + generator.random((rows, n))).astype(np.float32) for n in (60, 12))
    return LossTrajectories(train, val, classes, val_classes)


TIMELINE = timeline()
SCORES = TIMELINE.score()

EVERY_KIND = {
    "scores": lambda **more: plotting.plot_scores(SCORES, fraction=0.2, **more),
    "extremes": lambda **more: plotting.plot_extremes(SCORES, IMAGES, **more),
    "trajectories": lambda **more: plotting.plot_trajectories(TIMELINE, 1, **more),
    "trajectories with images": lambda **more: plotting.plot_trajectories(TIMELINE, 1, dataset=IMAGES, **more),
    "agreement": lambda **more: plotting.plot_agreement(TIMELINE, **more),
}


def png(figure):
    """Draws the figure and returns it as an image, `[H, W, 4]`."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=60)
    return matplotlib.image.imread(io.BytesIO(stream.getvalue()))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_figure_is_drawn_without_touching_the_global_state(kind):
    backend, open_figures, random_state = matplotlib.get_backend(), pyplot.get_fignums(), torch.get_rng_state()
    settings = dict(matplotlib.rcParams)
    figure, axes = EVERY_KIND[kind]()
    assert isinstance(figure, Figure)
    assert all(ax.figure is figure for ax in np.atleast_1d(axes).flatten())
    assert png(figure).std() > 0.02
    assert (matplotlib.get_backend(), pyplot.get_fignums(), dict(matplotlib.rcParams)) == (backend, [], settings)
    assert open_figures == []
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("kind", ["trajectories", "trajectories with images", "agreement"])
def test_axes_that_are_given_are_drawn_on(kind):
    mine = Figure().subplots(1, 2)
    figure, ax = EVERY_KIND[kind](ax=mine[1])
    assert ax is mine[1]
    assert figure is mine[1].figure
    assert len(mine[0].lines) == 0 < len(ax.lines)


@pytest.mark.parametrize(("kind", "columns"), [("scores", 1), ("extremes", 2)])
def test_axes_that_are_given_for_each_class_are_drawn_on(kind, columns):
    mine = Figure().subplots(3, columns)
    figure, axes = EVERY_KIND[kind](ax=mine[1:].flatten(), classes=[2, 0])
    assert figure is mine.flat[0].figure
    assert axes.flatten().tolist() == mine[1:].flatten().tolist()
    assert all(ax.patches or ax.images for ax in axes.flatten())
    assert not any(ax.patches or ax.images for ax in np.atleast_1d(mine[0]))
    assert figure.get_suptitle() == ""


def test_one_class_is_drawn_on_single_axes():
    ax = Figure().subplots()
    assert plotting.plot_scores(SCORES, classes=[1], ax=ax)[1].tolist() == [ax]


@pytest.mark.parametrize(("kind", "told"), [("scores", "2 axes, one"), ("extremes", "4 axes, two")])
def test_too_few_axes_raise(kind, told):
    with pytest.raises(ValueError, match=f"ax must hold {told} for each class, got 3"):
        EVERY_KIND[kind](ax=Figure().subplots(1, 3), classes=[2, 0])


WITHOUT_MATPLOTLIB = """
import sys
from importlib import metadata

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def version(name, installed=metadata.version):
    if name == "matplotlib":
        raise metadata.PackageNotFoundError(name)
    return installed(name)

sys.meta_path.insert(0, Hidden)
metadata.version = version
import lightning_cld
from lightning_cld import plotting
scores = lightning_cld.CLDScores([0.1, 0.2])
scores.summary()
print("without")
plotting.plot_scores(scores)
"""


def test_without_matplotlib_all_but_the_figures_work_and_these_name_the_extra():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "without\n")
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: Figures need matplotlib, which is not installed: pip install matplotlib."
    )


# Scores


def bars(ax, colour):
    return [bar for bar in ax.patches if matplotlib.colors.to_hex(bar.get_facecolor()) == colour]


def heights(ax, colour):
    return [bar.get_height() for bar in bars(ax, colour)]


def test_histograms_count_the_samples_of_a_class_and_the_coreset():
    values = SCORES.values.clone()
    values[0] = NAN
    made = CLDScores(values, CLASSES)
    _, axes = plotting.plot_scores(made, per_class=4)
    for label, ax in enumerate(axes):
        own = values[(label == CLASSES) & ~values.isnan()].numpy()
        best = np.sort(own)[-4:]
        edges = sorted([*np.linspace(-1, 1, 41), best.min()])
        assert heights(ax, plotting.REST) == np.histogram(own, edges)[0].tolist()
        assert heights(ax, plotting.BEST) == np.histogram(best, edges)[0].tolist()
        assert min(bar.get_x() for bar in bars(ax, plotting.BEST) if bar.get_height()) == best.min()
        assert ax.lines[0].get_xdata()[0] == pytest.approx(best.min())
        assert ax.get_title() == f"class {label}\n4 of 20, from {best.min():+.3f}"


def test_without_a_budget_no_cut_is_drawn():
    _, axes = plotting.plot_scores(SCORES)
    assert len(axes) == 3
    assert not any(ax.lines for ax in axes)
    assert axes[0].get_title() == "class 0\n20 samples"


@pytest.mark.parametrize("classes", [[7], [3, 11, 0], range(5)], ids=len)
def test_only_the_classes_asked_for_are_drawn(classes):
    made = CLDScores(torch.linspace(-1, 1, 60), torch.arange(60) % 12)
    figure, axes = plotting.plot_scores(made, classes=classes)
    assert [ax.get_title().splitlines()[0] for ax in axes] == [f"class {c}" for c in classes]
    assert len(figure.axes) == len(classes)
    assert "not shown" not in figure.get_suptitle()


def test_of_a_thousand_classes_ten_are_drawn_and_the_others_counted():
    made = CLDScores(torch.linspace(1, -1, 3000), torch.arange(3000) // 3)
    figure, axes = plotting.plot_scores(made, per_class=1)
    assert [ax.get_title().splitlines()[0] for ax in axes] == [f"class {c}" for c in range(990, 1000)]
    assert "lowest mean scores; 990 more are not shown" in figure.get_suptitle()
    images = TensorDataset(torch.rand(3000, 1, 4, 4), torch.arange(3000) // 3)
    figure, axes = plotting.plot_extremes(made, images)
    assert axes.shape == (10, 2)
    assert "990 more are not shown" in figure.get_suptitle()
    assert png(figure).shape[0] < 700


def test_scores_without_classes_are_one_histogram():
    _, (ax,) = plotting.plot_scores(CLDScores(SCORES.values), size=6)
    assert ax.get_title().startswith("6 of 60, from ")


def test_other_scores_than_correlations_are_drawn_too():
    values = torch.linspace(-7, -2, 60)
    _, (ax,) = plotting.plot_scores(CLDScores(values), size=6)
    assert sum(heights(ax, plotting.REST)) == 60
    assert sum(heights(ax, plotting.BEST)) == 6


@pytest.mark.parametrize("values", [[2.0, 3.0, 4.0], [2.0, 2.0, 2.0]], ids=["apart", "equal"])
def test_a_coreset_of_the_highest_score_alone_has_its_bar_right_of_the_cut(values):
    _, (ax,) = plotting.plot_scores(CLDScores(values), size=1)
    (bar,) = (bar for bar in bars(ax, plotting.BEST) if bar.get_height())
    assert (bar.get_x(), bar.get_width() > 0) == (max(values), True)


@pytest.mark.parametrize("most", [1, 7, 60, 30_000])
def test_counts_are_labelled_by_whole_numbers_at_powers_of_ten(most):
    figure, (ax,) = plotting.plot_scores(CLDScores([-0.9] + [0.5] * most))
    figure.draw_without_rendering()
    lowest, highest = ax.get_ylim()
    shown = [label.get_text() for label in ax.get_yticklabels() if lowest <= label.get_position()[1] <= highest]
    assert shown == [f"{10**power:,}" for power in range(len(shown))]
    assert len(shown) >= 2
    assert not any(label.get_text() for label in ax.get_yticklabels(minor=True))


def test_a_class_without_any_score_is_drawn_empty():
    made = CLDScores([0.1, 0.2, NAN, NAN], [0, 0, 1, 1])
    _, axes = plotting.plot_scores(made)
    assert sum(heights(axes[1], plotting.REST)) == 0
    images = TensorDataset(torch.rand(4, 1, 4, 4), torch.tensor([0, 0, 1, 1]))
    figure, axes = plotting.plot_extremes(made, images)
    assert not axes[1, 0].images
    assert png(figure).std() > 0.02


# Extremes


def test_extremes_are_named_by_position_and_score_and_are_the_right_images():
    constant = TensorDataset(torch.arange(60.0)[:, None, None, None].expand(60, 1, 8, 8), CLASSES)
    _, axes = plotting.plot_extremes(SCORES, constant, samples=3, classes=[2])
    own = torch.nonzero(CLASSES == 2).flatten()
    ranked = own[SCORES.values[own].argsort(descending=True)].tolist()
    for ax, expected in zip(axes[0], (ranked[:3], ranked[:-4:-1]), strict=True):
        assert [label.get_text() for label in ax.get_xticklabels()] == [
            f"#{position}\n{SCORES.values[position]:+.2f}" for position in expected
        ]
        picture = ax.images[0].get_array()
        shown = [picture[4, int(tick)][0] for tick in ax.get_xticks()]
        assert np.argsort(shown).tolist() == np.argsort(expected).tolist()


def test_samples_of_a_stream_are_called_by_the_end_of_their_names():
    names = [f"shard-00017/$a_{position:03}$" for position in range(60)]
    names[0] = ""
    own = torch.nonzero(CLASSES == 0).flatten()
    values = SCORES.values.clone()
    values[0] = 1
    scores = CLDScores(values, CLASSES, names=names)
    best = own[values[own].argsort(descending=True)][:2].tolist()
    assert best[0] == 0
    _, axes = plotting.plot_extremes(scores, IMAGES, samples=2, classes=[0])
    texts = [label.get_text() for label in axes[0, 0].get_xticklabels()]
    assert texts == ["#0\n+1.00", rf"…7/\$a_{best[1]:03}\$" + f"\n{values[best[1]]:+.2f}"]
    for dataset in (IMAGES, None):
        figure, ax = plotting.plot_trajectories(TIMELINE, 0, scores=scores, samples=2, dataset=dataset)
        figure.savefig(io.BytesIO())  # what is between dollar signs is no formula
    labels = [line.get_label().split("\n") for line in ax.lines[1:3]]
    assert labels == [["#0  +1.00"], [f"#{best[1]}  {values[best[1]]:+.2f}", rf"…00017/\$a_{best[1]:03}\$"]]


def test_extremes_read_only_what_they_show():
    class Counting(TensorDataset):
        read = 0

        def __getitem__(self, position):
            self.read += 1
            return super().__getitem__(position)

    data = Counting(torch.rand(60, 1, 8, 8), CLASSES)
    data.targets = CLASSES
    plotting.plot_extremes(SCORES, data, samples=2, classes=[0, 1])
    assert data.read == 8


@pytest.mark.parametrize(
    "draw",
    [
        lambda data: plotting.plot_extremes(SCORES, data),
        lambda data: plotting.plot_trajectories(TIMELINE, 0, dataset=data),
    ],
)
def test_images_of_another_dataset_are_refused(draw):
    with pytest.raises(ValueError, match="The scores don't belong to this dataset: it has other labels"):
        draw(TensorDataset(torch.rand(60, 1, 8, 8), CLASSES.flip(0)))


@pytest.mark.parametrize(("samples", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_number_of_samples_that_is_none_raises(samples, error):
    for draw in (
        lambda: plotting.plot_extremes(SCORES, IMAGES, samples=samples),
        lambda: plotting.plot_trajectories(TIMELINE, samples=samples),
    ):
        with pytest.raises(error, match="samples must be"):
            draw()


# Trajectories


def test_lines_are_the_losses_of_the_best_and_worst_and_the_mean_of_the_class():
    _, ax = plotting.plot_trajectories(TIMELINE, 2, samples=2)
    own = torch.nonzero(CLASSES == 2).flatten()
    ranked = own[SCORES.values[own].argsort(descending=True)].tolist()
    np.testing.assert_allclose(
        ax.lines[0].get_ydata(), TIMELINE.val_losses[:, VAL_CLASSES == 2].double().mean(dim=1), rtol=1e-6
    )
    expected = [*ranked[:2], ranked[-1], ranked[-2]]
    assert [line.get_label().split()[0] for line in ax.lines[1:]] == [f"#{position}" for position in expected]
    for line, position in zip(ax.lines[1:], expected, strict=True):
        assert line.get_xdata().tolist() == list(range(9))
        assert line.get_ydata().tolist() == TIMELINE.train_losses[:, position].tolist()
    assert ax.get_title() == "Loss, class 2"


def test_without_a_class_that_of_the_lowest_mean_is_drawn():
    values = SCORES.values.clone()
    values[CLASSES == 1] -= 3
    _, ax = plotting.plot_trajectories(TIMELINE, scores=CLDScores(values, CLASSES))
    assert ax.get_title() == "Loss, class 1"


def test_trajectories_of_one_class_are_drawn():
    _, ax = plotting.plot_trajectories(timeline(None, None), samples=2)
    assert ax.get_title() == "Loss"
    assert len(ax.lines) == 5


def test_losses_that_are_missing_or_not_finite_are_left_out():
    train, val = TIMELINE.train_losses.clone(), TIMELINE.val_losses.clone()
    train[2], val[2], train[5, 0] = NAN, NAN, torch.inf
    figure, ax = plotting.plot_trajectories(LossTrajectories(train, val, CLASSES, VAL_CLASSES), 0)
    assert np.isnan(ax.lines[0].get_ydata()).tolist() == [row == 2 for row in range(9)]
    assert png(figure).std() > 0.02


def test_the_images_of_the_lines_stand_beside_them():
    figure, ax = plotting.plot_trajectories(TIMELINE, 2, samples=2, dataset=IMAGES)
    frames = [(artist.patch.get_linestyle(), artist.patch.get_edgecolor()) for artist in ax.artists]
    assert frames == [
        (line.get_linestyle(), matplotlib.colors.to_rgba(line.get_color(), line.get_alpha())) for line in ax.lines[1:]
    ]
    assert len(set(frames)) == 4
    assert [(text.get_text(), text.get_color()) for text in ax.texts] == [
        ("highest", plotting.BEST),
        ("lowest", plotting.WORST),
    ]
    right_of_axes = png(figure)[:, int(0.8 * 60 * figure.get_figwidth()) :, :3]
    assert (right_of_axes < 0.5).mean() > 0.05


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts() if text.get_text().strip()]


def test_a_legend_tells_the_highest_from_the_lowest():
    _, ax = plotting.plot_trajectories(TIMELINE, 2, samples=1, dataset=IMAGES)
    assert legend(ax) == ["reference", "highest scores", "lowest scores"]
    _, ax = plotting.plot_trajectories(TIMELINE, 2, samples=1)
    best, worst = (line.get_label() for line in ax.lines[1:])
    assert legend(ax) == ["reference", "highest scores", best, "lowest scores", worst]


@pytest.mark.parametrize("kind", ["trajectories", "trajectories with images", "agreement"])
def test_a_legend_stands_below_the_axes_and_hides_nothing(kind):
    figure, ax = EVERY_KIND[kind]()
    figure.draw_without_rendering()
    box = ax.get_legend().get_window_extent()
    assert box.y1 < ax.xaxis.label.get_window_extent().y0
    assert box.y0 >= 0


@pytest.mark.parametrize("samples", [3, 8])
def test_the_images_beside_the_lines_do_not_overlap(samples):
    figure, ax = plotting.plot_trajectories(TIMELINE, 2, samples=samples, dataset=IMAGES)
    figure.draw_without_rendering()
    tops = [text.get_window_extent().y0 for text in ax.texts[:1]]
    boxes = [artist.patch.get_window_extent() for artist in ax.artists[:samples]]
    assert all(above > box.y1 for above, box in zip([*tops, *(box.y0 for box in boxes)], boxes, strict=False))


def test_scores_and_trajectories_of_two_runs_are_refused():
    with pytest.raises(ValueError, match="The scores don't belong to these trajectories: there are 2 scores"):
        plotting.plot_trajectories(TIMELINE, scores=CLDScores([0.1, 0.2]))


def test_a_class_that_there_is_not_raises():
    for draw in (
        lambda: plotting.plot_trajectories(TIMELINE, 9),
        lambda: plotting.plot_scores(SCORES, classes=[9]),
        lambda: plotting.plot_extremes(SCORES, IMAGES, classes=[9]),
    ):
        with pytest.raises(ValueError, match="Can't show class 9: the scores are of classes 0, 1, 2"):
            draw()


# Agreement


def test_agreement_marks_the_epoch_from_which_the_coreset_stays(monkeypatch):
    monkeypatch.setattr(
        plotting, "agreement", lambda *_: ([3, 4, 5, 6, 7], [0.5, 0.6, NAN, 0.9, 1.0], [0.9, 0.8, 0.86, 0.9, 1.0])
    )
    _, ax = plotting.plot_agreement(TIMELINE)
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.6, NAN, 0.9, 1.0], nan_ok=True)
    assert ax.lines[1].get_ydata().tolist() == [0.9, 0.8, 0.86, 0.9, 1.0]
    assert ax.lines[3].get_xdata()[0] == 5
    assert ax.lines[3].get_label() == "85% or more at the points from epoch 5 on"
    assert legend(ax) == [ax.lines[place].get_label() for place in (0, 1, 3)]


@pytest.mark.parametrize(("fraction", "shown"), [(0.1, "10%"), (0.125, "12.5%"), (0.05, "5%"), (1 / 3, "33.3%")])
def test_agreement_names_the_share_that_is_kept(fraction, shown):
    _, ax = plotting.plot_agreement(TIMELINE, fraction=fraction)
    assert ax.lines[1].get_label() == f"overlap of the coresets of {shown}"


def test_histograms_of_other_scores_take_all_of_the_width():
    scores = CLDScores(torch.linspace(0.01, 0.05, 40), metadata={"scored_by": "dual"})
    _, axes = plotting.plot_scores(scores)
    assert sum(bar.get_height() > 0 for bar in axes[0].patches) > 30


def test_agreement_that_comes_only_at_the_end_is_not_marked(monkeypatch):
    monkeypatch.setattr(plotting, "agreement", lambda *_: ([3, 4, 5], [0.5, 0.6, 1.0], [0.1, NAN, 1.0]))
    _, ax = plotting.plot_agreement(TIMELINE)
    assert len(ax.lines) == 3


def test_agreement_of_training_steps_is_the_correlation_alone():
    train, val = TIMELINE.train_losses, TIMELINE.val_losses
    _, ax = plotting.plot_agreement(LossTrajectories(train, val, CLASSES, VAL_CLASSES, from_steps=True))
    (line,) = ax.lines
    assert legend(ax) == [line.get_label()] == ["rank correlation within the class"]
    assert line.get_ydata()[-1] == pytest.approx(1)


@pytest.mark.parametrize(("fraction", "error"), [("0.1", TypeError), (0, ValueError), (0.001, ValueError)])
def test_fractions_that_are_none_raise(fraction, error):
    with pytest.raises(error, match="fraction"):
        plotting.plot_agreement(TIMELINE, fraction=fraction)


def test_too_few_checkpoints_raise():
    with pytest.raises(ValueError, match="at least 4 checkpoints"):
        plotting.plot_agreement(timeline(rows=3))


# Arguments


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plotting.plot_scores("a.npz"), "scores must be CLDScores, got str. Load .* CLDScores.load"),
        (lambda: plotting.plot_scores(TIMELINE), "scores must be CLDScores, got LossTrajectories. .*score"),
        (lambda: plotting.plot_scores(SCORES, classes=3), r"classes must be a sequence .* such as \[3\], got 3"),
        (lambda: plotting.plot_scores(SCORES, classes="3"), r"classes must be a sequence .*, got '3'"),
        (lambda: plotting.plot_extremes(TIMELINE, IMAGES), "scores must be CLDScores, got LossTrajectories"),
        (lambda: plotting.plot_extremes(SCORES, IMAGES, classes=3), "classes must be a sequence"),
        (
            lambda: plotting.plot_trajectories(SCORES),
            "trajectories must be LossTrajectories, got CLDScores. Take .trajectories",
        ),
        (lambda: plotting.plot_trajectories(Path("a")), "trajectories must be .*Path. Load .* LossTrajectories.load"),
        (lambda: plotting.plot_trajectories(TIMELINE, scores=TIMELINE), "scores must be CLDScores"),
        (lambda: plotting.plot_trajectories(TIMELINE, [1]), r"of_class must be one class, .*got \[1\]"),
        (lambda: plotting.plot_agreement(SCORES), "trajectories must be LossTrajectories, got CLDScores"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(draw, message):
    with pytest.raises(TypeError, match=message):
        draw()


def test_agreement_from_samples_says_so(monkeypatch):
    assert "from" not in plotting.plot_agreement(TIMELINE)[1].get_title()
    train = torch.rand(6, 2_000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(choice, "MOST_SAMPLES", 1_000)
    _, ax = plotting.plot_agreement(LossTrajectories(train, train[:, :9]))
    assert ax.get_title() == "Agreement with the scores after 5 epochs\nfrom 1,000 of 2,000 samples"

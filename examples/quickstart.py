"""Is a coreset chosen by CLD better than a random one? Asked of real data, in two minutes, without a download.

    pip install -e ".[examples]"
    python examples/quickstart.py

A small proxy is trained under `CLDCallback` and stopped early. Its scores choose coresets of several sizes, by each of
the two rules, and a fresh model is trained on each of them through `CoresetDataModule`; on random subsets with as many
samples of every class; and on everything. All of that with the labels as they are, and again with a fifth of the train
labels wrong. Every model trained on a subset takes as many steps as the one trained on everything.

Another dataset: `--data fashion-mnist --root DIR`; see `--help`. The data and the models are in `_common.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import PRESETS, Classifier, Images, Splits, Ticks, flip_labels, load, quiet, quiet_trainer
from matplotlib.figure import Figure
from tqdm import tqdm

from lightning_cld import CLDCallback, CoresetDataModule, proportional_holdout, select_top

TOP, DRAWN, RANDOM, EVERYTHING = "CLD, top", "CLD, drawn", "random per class", "everything"
COLOURS = {TOP: "#0072b2", DRAWN: "#009e73", RANDOM: "#d55e00", EVERYTHING: "#555555"}


@dataclass(frozen=True)
class Run:
    """One trained target."""

    rate: float  # share of the train labels made wrong
    method: str
    fraction: float
    samples: int
    wrong: int  # how many of the samples have a wrong label
    accuracy: float  # on the test set, in percent
    selection: float  # seconds
    training: float  # seconds


def compare(args: argparse.Namespace, pool: Images, test: Images, rate: float, seed: int, bar: tqdm) -> list[Run]:
    """Trains the proxy and all targets for one rate of wrong labels and one seed.

    All but the test set follows from the seed; each draw gets a number of its own, so that none repeats another.
    """
    preset = PRESETS[args.data]
    train, val = proportional_holdout(pool.targets, preset.holdout, seed=seed)
    clean = pool.targets[train]
    # Only train labels are made wrong: the validation split is the reference that says what is right.
    train_set = Images(pool.images[train], flip_labels(clean, rate, 1000 + seed))
    wrong = train_set.targets != clean
    splits = Splits(train_set, Images(pool.images[val], pool.targets[val]), test, args.batch_size)

    def say(what: str) -> None:
        bar.set_description(f"{describe(rate)}, seed {seed}: {what}")

    # 1. The proxy: any model of yours, with the callback added.
    say("proxy")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # keep your own: CoresetDataModule takes the path of saved scores
        cld = CLDCallback(cutoff_epoch=args.cutoff, stop_at_cutoff=True, dirpath=folder)
        proxy = Classifier(args.data, train_set, preset.lr, seed=seed)
        quiet_trainer(args.epochs, cld, Ticks(bar)).fit(proxy, datamodule=splits)
    scores = cld.scores
    selection = time.perf_counter() - started

    # 2. The targets: the same datamodule, narrowed. With epoch_length="full" an epoch on a coreset has as many steps
    # as one on everything, so that what differs is the data.
    chance = torch.rand(len(scores), generator=torch.Generator().manual_seed(2000 + seed))
    choices = [(EVERYTHING, 1.0, splits)]
    for fraction in args.fractions:
        at_random = select_top(chance, scores.classes, fraction=fraction)
        chosen = {"fraction": fraction, "epoch_length": "full"}
        choices += [
            (TOP, fraction, CoresetDataModule(splits, scores, **chosen)),
            (DRAWN, fraction, CoresetDataModule(splits, scores, **chosen, rule="draw", seed=seed)),
            (RANDOM, fraction, CoresetDataModule(splits, at_random.tolist(), epoch_length="full")),
        ]
    runs = []
    for method, fraction, data in choices:
        say(method if method == EVERYTHING else f"{method} {percent(fraction)}")
        kept = data.indices if isinstance(data, CoresetDataModule) else range(len(train_set))
        # Not the proxy's seed: a coreset should serve other initial weights than those it was chosen with.
        target = Classifier(args.data, train_set, preset.lr, seed=3000 + seed)
        trainer = quiet_trainer(args.epochs, Ticks(bar))
        started = time.perf_counter()
        trainer.fit(target, datamodule=data)
        training = time.perf_counter() - started
        accuracy = 100 * trainer.test(target, datamodule=data, verbose=False)[0]["test_accuracy"]
        mistaken = int(wrong[list(kept)].sum())
        cost = selection if method in (TOP, DRAWN) else 0.0
        runs.append(Run(rate, method, fraction, len(kept), mistaken, accuracy, cost, training))
    return runs


# What came out


def percent(share: float) -> str:
    return f"{100 * share:g}%"


def describe(rate: float) -> str:
    return f"{percent(rate)} of the train labels wrong" if rate else "labels as they are"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation over the seeds (0 if there is only one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def pick(runs: list[Run], rate: float, method: str, fraction: float) -> list[Run]:
    """One run a seed, in the order of the seeds."""
    return [run for run in runs if (run.rate, run.method, run.fraction) == (rate, method, fraction)]


def print_table(runs: list[Run], rate: float, fractions: list[float]) -> None:
    print(f"\n{describe(rate).capitalize()}")
    print("trained on         kept  samples  wrong labels  test accuracy  selection s  training s")
    for method, fraction in [(EVERYTHING, 1.0), *itertools.product((TOP, DRAWN, RANDOM), fractions)]:
        cell = pick(runs, rate, method, fraction)
        accuracy, spread = mean_and_spread([run.accuracy for run in cell])
        around = f"+- {spread:.1f}" if len(cell) > 1 else ""
        wrong = statistics.fmean(run.wrong / run.samples for run in cell)
        selection = statistics.fmean(run.selection for run in cell)
        training = statistics.fmean(run.training for run in cell)
        print(
            f"{method:<16} {percent(fraction):>6} {cell[0].samples:>8,} {wrong:>13.1%}   "
            f"{accuracy:>5.1f} {around:<7}  {selection:>11.1f} {training:>11.1f}"
        )


def lead(runs: list[Run], rate: float, fraction: float, method: str, other: str) -> tuple[float, str]:
    """By how many points one method is ahead of another, and what to call that.

    Both were trained from the same seeds, so differences are taken seed by seed; one that is smaller than its spread
    over the seeds is called level.
    """
    ours = pick(runs, rate, method, fraction)
    theirs = pick(runs, rate, other, 1.0 if other == EVERYTHING else fraction)
    pairs = zip(ours, theirs, strict=True)
    points, spread = mean_and_spread([a.accuracy - b.accuracy for a, b in pairs])
    return points, "level" if abs(points) <= spread else "ahead" if points > 0 else "behind"


def print_findings(runs: list[Run], rates: list[float], fractions: list[float]) -> None:
    seeds = len(pick(runs, rates[0], EVERYTHING, 1.0))
    level = "level: less than the spread of the difference over the seeds" if seeds > 1 else "one seed: may be chance"
    print(f"\nWhat the two rules did, in points of test accuracy ({level})")
    for rate, method in itertools.product(rates, (TOP, DRAWN)):
        print(f"- {method}, {describe(rate)}:")
        for fraction in fractions:
            shown = []
            for other in (RANDOM, EVERYTHING):
                points, word = lead(runs, rate, fraction, method, other)
                shown.append(f"{points:+.1f} to {other} ({word})")
            print(f"    {percent(fraction):>4} kept: {', '.join(shown)}")
    for rate in filter(None, rates):
        most = max(fractions)
        all_wrong = sum(run.wrong for run in pick(runs, rate, EVERYTHING, 1.0))
        dropped = all_wrong - sum(run.wrong for run in pick(runs, rate, TOP, most))
        share = dropped / max(1, all_wrong)
        print(f"- {describe(rate)}: the {percent(1 - most)} with the lowest CLD held {share:.0%} of them")

    training = statistics.fmean(run.training for run in runs)
    selection = statistics.fmean(run.selection for run in runs if run.method in (TOP, DRAWN))
    least = min(fractions)
    trainings = math.ceil(selection / (training * (1 - least)))
    print(
        f"- time: selection took {selection:.1f} s, a target {training:.1f} s, at every size since steps were equal.\n"
        f'    With epoch_length="coreset" (an epoch is one pass) a target on {percent(least)} would take '
        f"{percent(least)} of that,\n    and the selection be earned back after {trainings} target(s)."
    )


def draw(runs: list[Run], rates: list[float], fractions: list[float], title: str, path: Path) -> None:
    figure = Figure(figsize=(1 + 4.2 * len(rates), 4.2), layout="constrained")
    figure.suptitle(f"{title}: what is lost by training on a part?")
    for axis, rate in zip(figure.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates, strict=True):
        accuracy, spread = mean_and_spread([run.accuracy for run in pick(runs, rate, EVERYTHING, 1.0)])
        axis.axhline(accuracy, color=COLOURS[EVERYTHING], linestyle="--", label=EVERYTHING)
        axis.axhspan(accuracy - spread, accuracy + spread, color=COLOURS[EVERYTHING], alpha=0.15, linewidth=0)
        for method, marker in ((RANDOM, "s"), (TOP, "o"), (DRAWN, "^")):
            cells = [[run.accuracy for run in pick(runs, rate, method, fraction)] for fraction in fractions]
            means, spreads = zip(*map(mean_and_spread, cells), strict=True)
            axis.errorbar(
                [100 * f for f in fractions],
                means,
                spreads,
                color=COLOURS[method],
                marker=marker,
                capsize=3,
                label=method,
            )
        axis.set_title(describe(rate))
        axis.set_xlabel("share of the train set kept (%)")
        axis.set_xticks([100 * f for f in fractions], [f"{100 * f:g}" for f in fractions])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compares coresets chosen by CLD with random subsets and with everything. On digits that takes a "
        "minute or two; the other datasets want a GPU, or fewer seeds, fractions and epochs.",
    )
    suits, known = "(default: what suits the dataset)", "(default: %(default)s)"
    add = parser.add_argument
    add("--data", choices=PRESETS, default="digits", help=f"dataset; all but digits come from --root {known}")
    add("--root", type=Path, default=Path("data"), help=f"folder of torchvision's datasets, for download too {known}")
    add("--epochs", type=int, help=f"epochs of every target {suits}")
    add("--cutoff", type=int, help="epochs after which the proxy is scored and stopped (default: half of --epochs)")
    add("--fractions", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75], help=f"shares to keep {known}")
    add("--seeds", type=int, default=3, help=f"how many seeds {known}")
    add("--label-noise", type=float, nargs="+", default=[0.0, 0.2], help=f"shares of train labels made wrong {known}")
    add("--batch-size", type=int, help=f"batch size of training {suits}")
    add("--figure", type=Path, default=Path("quickstart.png"), help=f"where to save the figure {known}")
    args = parser.parse_args(argv)

    args.epochs = PRESETS[args.data].epochs if args.epochs is None else args.epochs
    args.cutoff = args.epochs // 2 if args.cutoff is None else args.cutoff
    args.batch_size = PRESETS[args.data].batch_size if args.batch_size is None else args.batch_size
    args.fractions, args.label_noise = sorted(set(args.fractions)), sorted(set(args.label_noise))
    # Said now rather than after minutes of training.
    if not 3 <= args.cutoff <= args.epochs:
        parser.error(f"--cutoff {args.cutoff} must be from 3 (CLD needs that many epochs) to --epochs {args.epochs}.")
    if min(args.fractions) <= 0 or max(args.fractions) >= 1:
        parser.error(f"--fractions must lie between 0 and 1, got {args.fractions}.")
    if min(args.label_noise) < 0 or max(args.label_noise) >= 1:
        parser.error(f"--label-noise must be at least 0 and less than 1, got {args.label_noise}.")
    if args.seeds < 1 or args.batch_size < 1:
        parser.error(f"--seeds and --batch-size must be at least 1, got {args.seeds} and {args.batch_size}.")
    if not args.figure.absolute().parent.is_dir():
        parser.error(f"--figure {args.figure}: there is no directory {args.figure.absolute().parent}.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quiet(single_thread=args.data == "digits")
    pool, test = load(args.data, args.root)
    started, runs = time.perf_counter(), []
    epochs = args.cutoff + args.epochs * (1 + 3 * len(args.fractions))
    with tqdm(total=len(args.label_noise) * args.seeds * epochs, unit="epoch", mininterval=0.5) as bar:
        for rate, seed in itertools.product(args.label_noise, range(args.seeds)):
            runs += compare(args, pool, test, rate, seed, bar)

    preset, samples = PRESETS[args.data], pick(runs, args.label_noise[0], EVERYTHING, 1.0)[0].samples
    print(
        f"{preset.title}: {args.seeds} seed(s), {args.epochs} epochs of {samples:,} samples, CLD from the first "
        f"{args.cutoff}; {time.perf_counter() - started:.0f} s\n"
        f"Labels are made wrong in the train set only: the validation split ({percent(preset.holdout)} held out, the "
        f"reference of CLD)\nand the test set ({len(test):,} samples) keep theirs."
    )
    for rate in args.label_noise:
        print_table(runs, rate, args.fractions)
    print_findings(runs, args.label_noise, args.fractions)
    draw(runs, args.label_noise, args.fractions, PRESETS[args.data].title, args.figure)
    print(f"Figure: {args.figure}")


if __name__ == "__main__":
    main()

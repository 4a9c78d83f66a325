"""What a terminal emulator shows during a sweep."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pyte
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from toys import Blobs, Classifier, quiet_trainer

from lightning_cld import CLDCallback, trajectories_from_checkpoints
from lightning_cld.recording import progress_bar
from lightning_cld.recording.progress_bar import find_bar, progress

WIDTH, HEIGHT = 100, 40


class Terminal(io.StringIO):
    """Standard output that is a terminal and keeps its screen after each write."""

    def __init__(self) -> None:
        super().__init__()
        self.screen = pyte.Screen(WIDTH, HEIGHT)
        self.stream = pyte.Stream(self.screen)
        self.screen.set_mode(pyte.modes.LNM)  # a newline also returns the carriage, as in a tty driver
        self.displays: list[list[str]] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.stream.feed(text)
        self.displays.append([line.rstrip() for line in self.screen.display])
        return len(text)

    @property
    def frames(self) -> list[list[str]]:
        """The screen after each write, without empty lines."""
        return [[line for line in display if line] for display in self.displays]

    @property
    def lines(self) -> list[str]:
        """The screen now, without empty lines."""
        return self.frames[-1] if self.displays else []

    def rows(self, name: str) -> set[int]:
        """The rows in which lines starting with `name` have appeared."""
        return {row for display in self.displays for row, line in enumerate(display) if line.startswith(name)}

    def shown(self, name: str) -> list[str]:
        """The counts shown beside `name`, in order."""
        counts = [
            match[1]
            for frame in self.frames
            for line in frame
            if line.startswith(name) and (match := re.search(r"(\d+/\d+) ?[\[\d]", line))
        ]
        return list(dict.fromkeys(counts))


@pytest.fixture(autouse=True)
def size(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("LINES", str(HEIGHT))
    monkeypatch.delenv("TQDM_MINITERS", raising=False)


@pytest.fixture
def every_batch(monkeypatch):
    monkeypatch.setattr(progress_bar, "_INTERVAL", -1.0)


def make_bar(kind: str, **arguments):
    if kind == "tqdm":
        return TQDMProgressBar(**arguments)
    return RichProgressBar(console_kwargs={"force_terminal": True, "width": WIDTH}, **arguments)


def train(root: Path, *callbacks: L.Callback, module=None, **arguments) -> tuple[Terminal, L.Trainer]:
    L.seed_everything(7, verbose=False)
    trainer = quiet_trainer(root, *callbacks, **{"enable_progress_bar": True, "max_epochs": 3, **arguments})
    terminal = Terminal()
    with redirect_stdout(terminal):
        trainer.fit(Classifier() if module is None else module, datamodule=Blobs())
    return terminal, trainer


def without_times(lines: list[str]) -> list[str]:
    # And without tqdm's drawing, which fills what the rate beside it leaves: a column less at 100 batches/s than at 99.
    return [re.sub(r"\|.*\|", "|", re.split(r" *\[|\d:\d\d:\d\d", line)[0]) for line in lines]


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
@pytest.mark.parametrize("order", ["callback first", "bar first"])
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("leave", [False, True], ids=["one line", "leave"])
def test_a_sweep_has_a_line_of_its_own_that_is_gone_afterwards(tmp_path, every_batch, kind, order, sanity, leave):
    arguments = {"num_sanity_val_steps": sanity}
    plain, _ = train(tmp_path, make_bar(kind, leave=leave), **arguments)
    both = [CLDCallback(dirpath=tmp_path), make_bar(kind, leave=leave)]
    watched, _ = train(tmp_path, *(both if order == "callback first" else both[::-1]), **arguments)

    assert watched.shown("CLD train") == [f"{done}/6" for done in range(6)]
    assert watched.shown("CLD val") == ["0/2", "1/2"]
    assert watched.shown("Epoch 2") == ["0/6", "1/6", "2/6", "3/6", "4/6", "5/6", "6/6"] or kind == "rich"
    # The run's own lines equal those without the callback, except that rich may draw a validation line once too often.
    ours = [line for line in without_times(watched.lines) if "Validation" not in line]
    assert ours == [line for line in without_times(plain.lines) if "Validation" not in line]
    for frame in watched.frames:
        for line in frame:
            assert ("CLD" in line) + ("Epoch" in line) + ("Validation" in line) + ("Sanity" in line) <= 1, frame
        if any("Epoch 1" in line for line in frame) and "CLD" in frame[-1]:
            assert "Epoch 1" in frame[-2] or "Epoch 2" in frame[-2], frame
    assert any("Epoch 2" in frame[-2] and "CLD val" in frame[-1] for frame in watched.frames if len(frame) > 1)
    swept = [frame for frame in watched.frames if any("CLD" in line for line in frame)]
    assert len(swept) > 4 * 8
    # Before the first step our line is in the place of the training's line, or below it.
    assert "CLD" in swept[0][-1]
    assert len(swept[0]) <= 2


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_it_is_drawn_a_few_times_a_second_only(tmp_path, kind):
    trainer = quiet_trainer(tmp_path, make_bar(kind), enable_progress_bar=True)
    terminal = Terminal()
    with redirect_stdout(terminal), progress(trainer, "CLD train") as show:
        for done in range(2000):
            show(done, 2000)
    assert 1 <= len(terminal.shown("CLD train")) <= 2
    assert "CLD" not in "".join(terminal.lines)
    if kind == "rich":
        trainer.progress_bar_callback.progress.stop()


def test_the_refresh_rate_of_tqdm_is_respected(tmp_path, every_batch):
    terminal, _ = train(tmp_path, TQDMProgressBar(refresh_rate=3), CLDCallback(dirpath=tmp_path))
    assert terminal.shown("CLD train") == ["0/6", "3/6"]


def test_the_process_position_of_tqdm_is_respected(tmp_path, every_batch):
    terminal, _ = train(tmp_path, TQDMProgressBar(process_position=2), CLDCallback(dirpath=tmp_path))
    assert terminal.rows("Epoch") == {0, 4}  # tqdm leaves a closed bar in the first line
    assert terminal.rows("CLD") == {5}
    assert len(terminal.shown("CLD train")) == 6


class OtherBar(ProgressBar):
    is_enabled = True

    def disable(self) -> None:
        pass


def disabled(bar):
    bar.disable()
    return bar


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: TQDMProgressBar(refresh_rate=0),
        lambda: make_bar("rich", refresh_rate=0),
        lambda: disabled(TQDMProgressBar()),
        lambda: disabled(make_bar("rich")),
        OtherBar,
    ],
    ids=["none", "tqdm off", "rich off", "tqdm disabled", "rich disabled", "another"],
)
def test_nothing_is_shown_without_a_bar_that_it_knows(tmp_path, every_batch, make):
    bar = make()
    callbacks = [CLDCallback(dirpath=tmp_path)] if bar is None else [bar, CLDCallback(dirpath=tmp_path)]
    terminal, trainer = train(tmp_path, *callbacks, enable_progress_bar=bar is not None)
    assert find_bar(trainer) is None
    assert not any("CLD" in line for frame in terminal.frames for line in frame)


def test_only_rank_0_shows_anything():
    bar = TQDMProgressBar()
    assert find_bar(SimpleNamespace(progress_bar_callback=bar, is_global_zero=True)) is bar
    assert find_bar(SimpleNamespace(progress_bar_callback=bar, is_global_zero=False)) is None


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_a_bar_of_the_other_package_is_known_too(tmp_path, every_batch, kind):
    pl = pytest.importorskip("pytorch_lightning")
    rich = {"console_kwargs": {"force_terminal": True, "width": WIDTH}}
    bar = pl.callbacks.TQDMProgressBar() if kind == "tqdm" else pl.callbacks.RichProgressBar(**rich)
    assert not isinstance(bar, (TQDMProgressBar, RichProgressBar))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[bar], **quiet)
    terminal = Terminal()
    with redirect_stdout(terminal), progress(trainer, "CLD train") as show:
        for done in range(4):
            show(done, 4)
    assert terminal.shown("CLD train") == ["0/4", "1/4", "2/4", "3/4"]
    assert terminal.lines == []
    if kind == "rich":
        bar.progress.stop()


class Failing(Classifier):
    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch
        self.calls = 0

    def cld_step(self, batch):
        self.calls += 1
        if self.calls == 3 + 8 * self.epoch:
            raise RuntimeError("the third batch")
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none"), batch[1]


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.filterwarnings("ignore")
def test_after_an_error_its_line_is_gone_too(tmp_path, every_batch, kind, epoch):
    trainer = quiet_trainer(tmp_path, CLDCallback(dirpath=tmp_path), make_bar(kind), enable_progress_bar=True)
    terminal = Terminal()
    with redirect_stdout(terminal), pytest.raises(RuntimeError) if epoch == 0 else nullcontext() as caught:
        trainer.fit(Failing(epoch), datamodule=Blobs())
    assert (caught is not None) == (epoch == 0)  # `caught` also keeps the sweep's frames alive
    assert "2/6" in terminal.shown("CLD train")
    assert not any("CLD" in line for line in terminal.lines)
    assert not [line for line in Tqdm._instances if "CLD" in line.desc]


def test_the_tasks_of_rich_are_found_where_they_were(tmp_path):
    places = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            bar = trainer.progress_bar_callback
            places.append(bar.train_progress_bar.id == bar.train_progress_bar_id)

        def on_validation_batch_end(self, trainer, *_):
            bar = trainer.progress_bar_callback
            places.append(bar.val_progress_bar.id == bar.val_progress_bar_id)

    bar = make_bar("rich")
    train(tmp_path, CLDCallback(dirpath=tmp_path), Looks(), bar)
    assert len(places) == 3 * 8
    assert all(places)


@pytest.mark.filterwarnings("ignore:CLD. (none|. files)")
@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_checkpoints_that_are_scored_show_how_far_that_is(tmp_path, every_batch, kind):
    bar = make_bar(kind)
    _, trainer = train(tmp_path, bar, ModelCheckpoint(tmp_path, save_top_k=-1), enable_checkpointing=True)
    callbacks = list(trainer.callbacks)
    files = list(tmp_path.glob("*.ckpt"))
    scored = Terminal()
    with redirect_stdout(scored):
        trajectories_from_checkpoints(trainer, trainer.lightning_module, files, datamodule=Blobs())

    assert scored.shown("CLD checkpoints") == ["0/3", "1/3", "2/3"]
    assert scored.shown("CLD train") == [f"{done}/6" for done in range(6)]
    assert any("CLD checkpoints" in frame[0] and "CLD val" in frame[1] for frame in scored.frames if len(frame) == 2)
    assert max(map(len, scored.frames)) == 2
    assert scored.lines == []
    assert trainer.callbacks == callbacks


@pytest.mark.filterwarnings("ignore:CLD. (none|. files)")
def test_checkpoints_are_scored_quietly_where_the_trainer_shows_nothing(tmp_path, every_batch):
    _, trainer = train(tmp_path, ModelCheckpoint(tmp_path, save_top_k=-1), enable_checkpointing=True, max_epochs=1)
    files = list(tmp_path.glob("*.ckpt"))
    scored = Terminal()
    with redirect_stdout(scored):
        trajectories_from_checkpoints(quiet_trainer(tmp_path), trainer.lightning_module, files, datamodule=Blobs())
    assert scored.frames == []


SCRIPT = """
import sys, warnings
warnings.filterwarnings("ignore")
import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from toys import Blobs, Classifier
from lightning_cld import CLDCallback
import lightning_cld.recording.progress_bar
lightning_cld.recording.progress_bar._INTERVAL = -1.0
for bar in (TQDMProgressBar, RichProgressBar):
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[bar(), CLDCallback(dirpath=sys.argv[1])],
    )
    trainer.fit(Classifier(), datamodule=Blobs())
    print("done with", bar.__name__)
"""


def test_in_a_real_terminal(tmp_path):
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    for name in ("COLUMNS", "LINES", "TQDM_MINITERS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    terminal = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.ByteStream(terminal)
    raw = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # on Linux: the other end is closed
            break
        if not data:
            break
        raw += data
        stream.feed(data)
    os.close(ours)
    assert process.wait(timeout=60) == 0, raw.decode()
    lines = [line.rstrip() for line in terminal.display if line.strip()]

    text = raw.decode()
    for sweep, batches in (("CLD train", 6), ("CLD val", 2)):
        for done in range(batches):
            assert len(re.findall(rf"{sweep}[^\r\n]*[^\d]{done}/{batches}[^\d]", text)) >= 2 * 4, (sweep, done)
    assert "done with TQDMProgressBar" in lines
    assert "done with RichProgressBar" in lines
    # Messages from Lightning and from us share lines with the bars, as they do without a sweep.
    assert not [line for line in lines if "CLD train" in line or "CLD val" in line]
    assert [line for line in lines if line.startswith("Epoch 2: 100%|")]
    assert [line for line in lines if line.startswith("Epoch 2/2  ━")]

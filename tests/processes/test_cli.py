import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from lightning_cld import CLDCallback, CLDScores, CoresetDataModule, LossTrajectories

EXAMPLES = Path(__file__).parents[2] / "examples"
GUIDE = EXAMPLES / "guides" / "yaml.md"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))


def cli(*arguments, cwd):
    """Runs `examples/cli.py fit` as a reader would; returns the finished process."""
    return subprocess.run(
        [sys.executable, EXAMPLES / "cli.py", "fit", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def scored(tmp_path_factory):
    """A directory in which the unchanged proxy.yaml has run."""
    root = tmp_path_factory.mktemp("cli")
    done = cli("--config", EXAMPLES / "configs" / "proxy.yaml", cwd=root)
    assert done.returncode == 0, done.stderr
    return root


# The example configurations


def test_the_proxy_saves_scores_of_its_cutoff(scored):
    scores = CLDScores.load(scored / "runs/cli/proxy/cld-scores.npz")
    assert scores.epochs == list(range(16))
    assert scores.metadata["cutoff_epoch"] == 15
    (checkpoint,) = (scored / "runs/cli").rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 14  # stopped there


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_printed_read_back_and_run(config, scored, tmp_path):
    printed = cli("--config", config, "--print_config", cwd=scored)
    assert printed.returncode == 0, printed.stderr
    copy = tmp_path / "copy.yaml"
    copy.write_text(printed.stdout)
    done = cli("--config", copy, "--trainer.default_root_dir", tmp_path, cwd=scored)
    assert done.returncode == 0, done.stderr
    (saved,) = tmp_path.rglob("config.yaml")  # LightningCLI saves the configuration that it parsed
    expected = yaml.safe_load(printed.stdout)
    expected["trainer"]["default_root_dir"] = str(tmp_path)
    assert yaml.safe_load(saved.read_text()) == expected

    written = yaml.safe_load(config.read_text())
    data, callbacks = written["data"], written["trainer"].get("callbacks", [])
    assert all(callback["class_path"] == "lightning_cld.CLDCallback" for callback in callbacks)
    assert bool(callbacks) != (data["class_path"] == "lightning_cld.CoresetDataModule")
    for callback in callbacks:
        scores = CLDScores.load(scored / callback["init_args"]["dirpath"] / "cld-scores.npz")
        for name in callback["init_args"].keys() & {"cutoff_epoch", "every_n_epochs", "history"}:
            assert scores.metadata[name] == callback["init_args"][name]


def test_the_coreset_is_what_is_trained_on(scored):
    done = cli("--config", EXAMPLES / "configs/coreset.yaml", "--data.epoch_length", "coreset", cwd=scored)
    assert done.returncode == 0, done.stderr
    newest = max((scored / "runs/cli").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    # 115 of 1,146 samples in batches of 32, for 30 epochs
    assert torch.load(newest, weights_only=True)["global_step"] == 4 * 30


# Misuse


@pytest.mark.parametrize(
    ("config", "argument", "message"),
    [
        ("proxy", "--trainer.callbacks.cutof_epoch=3", "'cutof_epoch' is not (accepted|expected)"),
        ("proxy", "--trainer.callbacks.cutoff_epoch=2", "cutoff_epoch=2 .* needs at least 4. Train longer"),
        ("coreset", "--data.datamodule.wrong=0.5", "The scores are not of this train set"),
    ],
)
def test_misuse_says_what_is_wrong(config, argument, message, scored):
    done = cli("--config", EXAMPLES / "configs" / f"{config}.yaml", argument, cwd=scored)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr


# Types and defaults


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """A function that lets LightningCLI parse arguments without running anything."""
    monkeypatch.setattr(sys, "argv", ["cli.py"])  # LightningCLI warns about arguments in sys.argv
    monkeypatch.chdir(tmp_path)

    def parse(*arguments, **settings):
        return LightningCLI(Linear, args=[*arguments], run=False, **settings)

    return parse


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Rows(L.LightningDataModule):
    """Saves its hyperparameters and reads them later."""

    def __init__(self, rows: int = 6, seed: int = 0):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        labels = torch.arange(self.hparams.rows) % 2
        return DataLoader(TensorDataset(torch.rand(self.hparams.rows, 2), labels), self.hparams.get("batch_size", 2))


class EarlyRows(Rows):
    """Reads its hyperparameters in `__init__`."""

    def __init__(self, rows: int = 6):
        super().__init__()
        self.rows = self.hparams.rows


class NoRows(Rows):
    def __init__(self):
        super().__init__()


def per_sample(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


def unannotated(outputs, targets):
    return per_sample(outputs, targets)


def halved(module, batch):
    return per_sample(module(batch[0]), batch[1]) / 2, batch[1]


def annotated(module: L.LightningModule, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    return per_sample(module(batch[0]), batch[1]), None


class Scaled:
    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, module: L.LightningModule, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factor * per_sample(module(batch[0]), batch[1]), batch[1]


@pytest.mark.parametrize("cutoff", [None, 4, "auto"])
@pytest.mark.parametrize("loss_fn", [None, "test_cli.per_sample", "test_cli.unannotated", "torch.nn.CrossEntropyLoss"])
def test_every_argument_of_the_callback_can_be_given(parsed, cutoff, loss_fn):
    given = {
        "cutoff_epoch": cutoff,
        "stop_at_cutoff": cutoff is not None,
        "every_n_epochs": 1,
        "loss_fn": loss_fn,
        "step": None,  # which is instead of loss_fn; see below
        "train_dataloader": None,
        "val_dataloader": None,
        "batch_size": 64,
        "num_samples": 120,  # for streams; see below
        "history": "full",
        "record": "sweep",
        "buffer_device": "cpu",
        "dirpath": "runs",
        "filename": "mine",
    }
    assert list(given) == list(inspect.signature(CLDCallback).parameters)
    if loss_fn == "torch.nn.CrossEntropyLoss":
        given["loss_fn"] = {"class_path": loss_fn, "init_args": {"reduction": "none"}}
    given = {name: value for name, value in given.items() if value is not None}
    Path("given.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "lightning_cld.CLDCallback", "init_args": given}]}})
    )
    made = parsed("--config", "given.yaml")
    (callback,) = [callback for callback in made.trainer.callbacks if isinstance(callback, CLDCallback)]
    assert callback.cutoff_epoch == cutoff
    assert callback.scores_path == Path("runs/mine.npz")
    (config,) = yaml.safe_load(made.parser.dump(made.config))["trainer"]["callbacks"]
    if isinstance(given.get("loss_fn"), dict):
        given["loss_fn"]["init_args"] = {"reduction": "none", "ignore_index": -100, "label_smoothing": 0.0}  # defaults
    assert config["init_args"] == given


SCALED = {"class_path": "test_cli.Scaled", "init_args": {"factor": 3.0}}


@pytest.mark.parametrize("step", ["test_cli.halved", "test_cli.annotated", SCALED], ids=str)
def test_a_step_is_given_by_its_import_path(parsed, step):
    init_args = {"step": step, "dirpath": "runs"}
    callbacks = [{"class_path": "lightning_cld.CLDCallback", "init_args": init_args}]
    Path("given.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    made = parsed("--config", "given.yaml")
    (config,) = yaml.safe_load(made.parser.dump(made.config))["trainer"]["callbacks"]
    assert {name: config["init_args"][name] for name in init_args} == init_args


@pytest.mark.parametrize(
    ("step", "factor"), [("test_cli.halved", 0.5), ("test_cli.annotated", 1), (SCALED, 3)], ids=str
)
def test_a_run_from_a_configuration_takes_the_losses_of_its_step(scored, tmp_path, step, factor):
    config = yaml.safe_load((EXAMPLES / "configs/proxy.yaml").read_text())
    config["trainer"]["default_root_dir"] = str(tmp_path)
    (callback,) = config["trainer"]["callbacks"]
    callback["init_args"] |= {"step": step, "dirpath": str(tmp_path / "proxy")}
    (tmp_path / "step.yaml").write_text(yaml.safe_dump(config))
    done = cli("--config", tmp_path / "step.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = LossTrajectories.load(tmp_path / "proxy/cld-trajectories.npz")
    expected = LossTrajectories.load(scored / "runs/cli/proxy/cld-trajectories.npz")
    torch.testing.assert_close(found.train_losses, expected.train_losses * factor)
    assert (found.train_classes is None) == (step == "test_cli.annotated")


@pytest.mark.parametrize("coreset", ["[3, 0]", "scores.npz"])
def test_a_coreset_is_given_as_positions_or_path(parsed, coreset):
    CLDScores([0.9, 0.1, 0.2, 0.3, 0.8, 0.1], [0, 0, 0, 1, 1, 1]).save("scores.npz")
    budget = ["--data.per_class=1"] if coreset.endswith("npz") else []
    made = parsed(
        "--data=lightning_cld.CoresetDataModule",
        "--data.datamodule=test_cli.Rows",
        f"--data.coreset={coreset}",
        *budget,
    )
    assert made.datamodule.indices == ([0, 4] if budget else [3, 0])


def test_a_coreset_is_drawn_anew_where_the_configuration_says_so(parsed):
    scores = CLDScores(torch.rand(6), [0, 1, 0, 1, 0, 1], plausibility=torch.rand(6))
    scores.save("scores.npz")
    Path("coreset.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {
                    "class_path": "lightning_cld.CoresetDataModule",
                    "init_args": {
                        "datamodule": {"class_path": "test_cli.Rows"},
                        "coreset": "scores.npz",
                        "per_class": 1,
                        "rule": "draw",
                        "redraw": True,
                    },
                }
            }
        )
    )
    made = parsed("--config=coreset.yaml")
    assert yaml.safe_load(made.parser.dump(made.config))["data"]["init_args"]["redraw"] is True
    sampler = made.datamodule.train_dataloader().sampler
    for epoch in range(5):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == scores.select(per_class=1, rule="draw", seed=epoch).tolist()


class TwoSets(L.LightningDataModule):
    def train_dataloader(self):
        return {"labelled": Rows().train_dataloader(), "other": Rows().train_dataloader()}


def test_coresets_of_several_loaders_are_given_as_a_mapping(parsed):
    CLDScores([0.9, 0.1, 0.2, 0.3, 0.8, 0.1], [0, 0, 0, 1, 1, 1]).save("scores.npz")
    Path("coreset.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {
                    "class_path": "lightning_cld.CoresetDataModule",
                    "init_args": {
                        "datamodule": {"class_path": "test_cli.TwoSets"},
                        "coreset": {"labelled": "scores.npz", "other": None},
                        "per_class": 1,
                    },
                }
            }
        )
    )
    made = parsed("--config=coreset.yaml")
    assert made.datamodule.indices == {"labelled": [0, 4], "other": None}
    config = yaml.safe_load(made.parser.dump(made.config))["data"]["init_args"]
    assert config["coreset"] == {"labelled": "scores.npz", "other": None}


CORESET = ["--data=lightning_cld.CoresetDataModule", "--data.coreset=[0, 1]"]
INNER = [*CORESET, "--data.datamodule=test_cli.Rows"]
WATCH = ["--trainer.callbacks=lightning_cld.CLDCallback"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*WATCH, "--trainer.callbacks.history=short"], '"history":.*short'),
        ([*WATCH, "--trainer.callbacks.cutoff_epoch=soon"], '"cutoff_epoch":.*soon'),
        ([*WATCH, "--trainer.callbacks.loss_fn=5"], "loss_fn"),
        ([*WATCH, "--trainer.callbacks.step=5"], "step"),
        ([*WATCH, "--trainer.callbacks.step=test_cli.nowhere"], "nowhere"),
        ([*INNER, "--data.rule=best"], '"rule":.*best'),
        ([*INNER, "--data.epoch_length=short"], '"epoch_length":.*short'),
        ([*INNER, "--data.redraw=often"], '"redraw":.*often'),
        ([*INNER, "--data.fraction=much"], "much"),
        ([*CORESET, "--data.datamodule=test_cli.Linear"], "not correspond to a subclass of LightningDataModule"),
    ],
)
def test_a_wrong_type_is_refused_when_parsed(parsed, capsys, arguments, message):
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*INNER, "--data.size=9"], "Positions or names are the coreset itself"),
        ([*INNER, "--data.redraw=true"], "Positions are the same coreset each time"),
        ([*INNER, "--data.coreset=nowhere.npz", "--data.size=2"], "no file nowhere.npz.*CLDCallback"),
        (
            [*WATCH, "--trainer.callbacks.loss_fn=torch.nn.CrossEntropyLoss"],
            "does not return one loss per sample.*reduction='none'",
        ),
        (
            [*WATCH, "--trainer.callbacks.loss_fn=test_cli.per_sample", "--trainer.callbacks.step=test_cli.halved"],
            "step=... and loss_fn=... are both given. Remove loss_fn",
        ),
    ],
)
def test_what_a_constructor_refuses_is_passed_on(parsed, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        parsed(*arguments)


def test_the_configurations_in_the_guide(parsed):
    proxy, target = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    Path("proxy.yaml").write_text(proxy)
    (cld,) = [callback for callback in parsed("--config=proxy.yaml").trainer.callbacks if type(callback) is CLDCallback]
    assert (cld.cutoff_epoch, cld.stop_at_cutoff) == (45, True)
    assert "my_project.Cifar" in target
    Path("target.yaml").write_text(target.replace("my_project.Cifar", "test_cli.Rows"))
    cld.scores_path.parent.mkdir(parents=True)
    CLDScores(torch.rand(60), torch.arange(60) % 2, plausibility=torch.rand(60)).save(cld.scores_path)
    assert len(parsed("--config=target.yaml").datamodule.indices) == 6


# Hyperparameters of the inner datamodule


def test_an_inner_datamodule_gets_its_own_hyperparameters(parsed):
    made = parsed(*CORESET, "--data.datamodule=test_cli.Rows", "--data.datamodule.rows=8").datamodule
    alone = parsed("--data=test_cli.Rows", "--data.rows=8").datamodule
    assert made.datamodule.hparams == alone.hparams
    assert made.datamodule.hparams_initial == alone.hparams_initial
    assert made.hparams == alone.hparams
    assert {"rows": 8, "seed": 0}.items() <= made.hparams.items()
    assert len(made.train_dataloader().dataset) == 2


def test_also_that_of_a_coreset_of_a_coreset(parsed):
    made = parsed(
        *CORESET,
        "--data.datamodule=lightning_cld.CoresetDataModule",
        "--data.datamodule.coreset=[5, 4, 3]",
        "--data.datamodule.datamodule=test_cli.Rows",
        "--data.datamodule.datamodule.rows=7",
    ).datamodule
    assert made.hparams.rows == 7
    assert made.train_dataloader().dataset[0][1] == 1  # position 5


def test_one_that_takes_no_arguments_gets_none(parsed):
    made = parsed(*CORESET, "--data.datamodule=test_cli.NoRows").datamodule
    assert set(made.hparams) == {"_class_path", "_instantiator"}


has_remedy = pytest.mark.skipif(
    "load_from_checkpoint_support" not in inspect.signature(LightningCLI).parameters, reason="new in Lightning 2.5.2"
)


@has_remedy
def test_arguments_of_the_same_name_may_have_been_mixed_up(parsed):
    command = [*CORESET, "--data.datamodule=test_cli.Rows", "--data.datamodule.seed=3"]
    with pytest.raises(ValueError, match=r"both have seed.*LightningCLI\(\.\.\., load_from_checkpoint_support=False\)"):
        parsed(*command)
    assert parsed(*command, load_from_checkpoint_support=False).datamodule.hparams == {"rows": 6, "seed": 3}


@has_remedy
def test_one_that_reads_them_in_its_constructor_needs_what_the_guide_says(parsed):
    command = [*CORESET, "--data.datamodule=test_cli.EarlyRows"]
    with pytest.raises(ValueError, match="no attribute 'rows'"):
        parsed(*command)
    assert parsed(*command, load_from_checkpoint_support=False).datamodule.rows == 6
    assert "load_from_checkpoint_support=False" in GUIDE.read_text()


def test_hyperparameters_that_lightningcli_did_not_give_are_left_alone():
    class Wraps(L.LightningDataModule):
        def __init__(self, datamodule):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return self.hparams.datamodule.train_dataloader()

    inner = Rows()
    outer = CoresetDataModule(Wraps(inner), [0, 1])
    assert outer.hparams == {"datamodule": inner}

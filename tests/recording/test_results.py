"""Where the files of a run go."""

from pathlib import Path

import pytest
from toys import Classifier, fit

from lightning_cld import CLDCallback


@pytest.mark.parametrize("folder", ["s3://bucket/proxy", "gs://bucket", "memory://proxy", Path("s3://bucket/proxy")])
def test_a_url_is_refused_before_anything_is_made(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"dirpath is .*:/.* local folder"):
        CLDCallback(dirpath=folder)
    assert list(tmp_path.iterdir()) == []


def test_a_url_of_the_trainer_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the folder of the logger or the Trainer is memory://runs"):
        fit("memory://runs", CLDCallback())
    fit("memory://runs", CLDCallback(dirpath=tmp_path / "here"), Classifier)
    assert [path.name for path in tmp_path.glob("*")] == ["here"]


@pytest.mark.parametrize("folder", ["runs/proxy", "runs with: colon", "C:/runs"])
def test_other_folders_are_taken_as_they_are(folder):
    assert CLDCallback(dirpath=folder).dirpath == Path(folder)

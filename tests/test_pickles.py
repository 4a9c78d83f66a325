"""Objects that were pickled under former module paths can still be loaded."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_cld import CLDScores, IndexedDataset, LossTrajectories
from lightning_cld.functional import select_drawn
from lightning_cld.scores import scores_contents
from lightning_cld.storage.files import write

FORMER = {
    "lightning_cld.data.fingerprint": "lightning_cld.fingerprint",
    "lightning_cld.data.indexed": "lightning_cld.steps",
    "lightning_cld.functional.selection": "lightning_cld.selection",
}


def pickled_formerly(value: object) -> bytes:
    """A pickle that names the modules by their former paths."""
    content = pickle.dumps(value, protocol=0)  # protocol 0 stores names as text
    for path, former in FORMER.items():
        content = content.replace(path.encode(), former.encode())
    return content


@pytest.mark.parametrize("pickled", [pickle.dumps, pickled_formerly])
def test_scores_are_loaded(pickled):
    scores = pickle.loads(pickled(CLDScores([0.5, -0.25], [0, 1], epochs=[0, 1, 2, 3])))
    assert scores.values.tolist() == [0.5, -0.25]
    assert scores.fingerprint.length == 2


def test_scores_of_a_version_without_names_are_loaded():
    former = CLDScores([0.5, -0.25])
    del former.names
    assert pickle.loads(pickle.dumps(former)).names is None
    assert list(pickle.loads(pickle.dumps(CLDScores([0.5, -0.25], names=["a", "b"]))).names) == ["a", "b"]


def test_scores_that_held_an_uncertainty_are_loaded_and_say_why_they_can_not_draw(tmp_path):
    made = CLDScores([0.5, -0.25, 0.75, 0.125], metadata={"scored_by": "CLD"})
    state = {name: value for name, value in vars(made).items() if name not in ("plausibility", "confidence")}
    former = CLDScores.__new__(CLDScores)
    former.__setstate__({**state, "uncertainty": torch.rand(4)})
    contents = scores_contents(made)
    path = write(tmp_path / "scores.npz", contents._replace(arrays={**contents.arrays, "uncertainty": np.zeros(4)}))
    for scores in (former, pickle.loads(pickle.dumps(former)), CLDScores.load(path)):
        assert scores.values.tolist() == [0.5, -0.25, 0.75, 0.125]
        assert scores.plausibility is scores.confidence is None
        assert scores.suspects().tolist() == [1]
        assert scores.select(size=2).tolist() == [0, 2]
        with pytest.raises(ValueError, match=r"hold no plausibility \(they were made by an earlier version\)"):
            scores.select(size=2, rule="draw")


@pytest.mark.parametrize("pickled", [pickle.dumps, pickled_formerly])
def test_a_dataset_and_a_function_are_loaded(pickled):
    dataset = pickle.loads(pickled(IndexedDataset(TensorDataset(torch.tensor([0.5, 1.5])))))
    assert dataset[1][-1] == 1
    assert pickle.loads(pickled(select_drawn)) is select_drawn


def test_trajectories_of_plain_buffers_are_loaded_and_go_on():
    trajectories = LossTrajectories([[2.5, 1.0]], [[2.0]])
    state = {
        **vars(trajectories),
        "_train": torch.tensor([[2.5, 1.0], [0.0, 0.0]]),
        "_val": torch.tensor([[2.0], [0.0]]),
    }
    former = LossTrajectories.__new__(LossTrajectories)
    former.__setstate__({**state, "_owned": True})
    former.record(1, torch.tensor([1.5, 1.25]), torch.tensor([1.0]))
    assert former.train_losses.tolist() == [[2.5, 1.0], [1.5, 1.25]]
    assert pickle.loads(pickle.dumps(former)).val_losses.tolist() == [[2.0], [1.0]]

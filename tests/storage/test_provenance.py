import json
import platform

import torch

from lightning_cld.storage.provenance import provenance


def test_it_counts_the_references_of_each_class():
    classes = torch.tensor([0, 3, 3])
    found = provenance(classes, torch.tensor([3, 0, 3, 3, 8]), 5, None, scored_by="loss", every_n_epochs=2)
    assert found["reference_sizes"] == {"0": 1, "3": 3}  # class 8 is not trained
    assert "differences" not in found
    assert (found["scored_by"], found["scored_every_n_epochs"]) == ("loss", 2)


def test_without_classes_all_are_one():
    assert provenance(None, None, 7, 3)["reference_sizes"] == {"0": 7}


def test_it_is_plain_and_names_versions():
    found = provenance(None, None, 7, 3)
    assert found["differences"] == 3
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])

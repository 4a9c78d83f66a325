import json
import platform

import torch

from lightning_cld.storage.provenance import provenance


def test_it_counts_the_references_of_each_class():
    found = provenance(torch.tensor([3, 0, 3, 3]), 4, scored_by="loss", every_n_epochs=2)
    assert found["reference_sizes"] == {"0": 1, "3": 3}
    assert (found["scored_by"], found["scored_every_n_epochs"]) == ("loss", 2)


def test_without_classes_all_are_one():
    assert provenance(None, 7)["reference_sizes"] == {"0": 7}


def test_it_is_plain_and_names_versions():
    found = provenance(None, 7)
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])

"""Aleatoric uncertainty against its definition in float64."""

import warnings

import numpy as np
import pytest
import torch

from lightning_cld.functional import uncertainty
from lightning_cld.functional.uncertainty import aleatoric_uncertainty

NAN, INF = float("nan"), float("inf")


def oracle(losses):
    values = losses.double().numpy()
    chances = np.exp(-values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = np.nanmean(chances * (1 - chances), axis=0)
    return np.where(np.isinf(values).any(axis=0), np.nan, mean)


@pytest.mark.parametrize("slice_size", [7, 2**15])
def test_agrees_with_the_definition_where_losses_are_missing_infinite_or_huge(monkeypatch, slice_size):
    monkeypatch.setattr(uncertainty, "_SLICE", slice_size)
    losses = torch.rand(91, 200, generator=torch.Generator().manual_seed(0)) * 4
    losses[5, 3], losses[:, 4], losses[7, 11], losses[8, 150] = NAN, NAN, INF, -INF
    losses[3:5, 20] = torch.tensor([3e38, 2e38])  # finite, though their sum is not
    found = aleatoric_uncertainty(losses)
    np.testing.assert_allclose(found.numpy(), oracle(losses), rtol=0, atol=1e-6)
    assert found.isnan().nonzero().flatten().tolist() == [4, 11, 150]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_of_any_precision_are_left_as_they_are(dtype):
    losses = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = losses.clone()
    found = aleatoric_uncertainty(losses)
    assert (found.dtype, torch.equal(losses, before)) == (torch.float32, True)
    np.testing.assert_allclose(found.numpy(), oracle(losses), rtol=0, atol=1e-6)

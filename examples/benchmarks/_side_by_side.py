"""Small networks of the same shape, trained side by side: one batched matrix product computes a layer of all of them.

A network of one hidden layer keeps a CPU waiting for Python most of the time. Two hundred of them together don't.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_PEAK, _WARM_UP = 0.1, 0.2
_MOMENTUM, _WEIGHT_DECAY = 0.9, 5e-4


class Networks:
    """Networks with one hidden layer, trained by cross-entropy with SGD and Nesterov's momentum.

    Args:
        inputs: Number of inputs.
        hidden: Number of hidden units.
        classes: Number of classes.
        seeds: Seed of the initial weights of each network, which are those of `torch.nn.Linear`.
    """

    def __init__(self, inputs: int, hidden: int, classes: int, seeds: Sequence[int]) -> None:
        each = [_initial(inputs, hidden, classes, seed) for seed in seeds]
        self.parameters = [torch.stack(parts) for parts in zip(*each, strict=True)]
        self._momenta = [torch.zeros_like(parts) for parts in self.parameters]

    def step(self, inputs: Tensor, labels: Tensor, lr: float) -> None:
        """Updates every network by its own batch.

        Args:
            inputs: `[networks, batch, inputs]`.
            labels: int64, `[networks, batch]`.
            lr: The learning rate.
        """
        first, first_bias, second, second_bias = self.parameters
        hidden = torch.relu(torch.baddbmm(first_bias, inputs, first))
        output = torch.softmax(torch.baddbmm(second_bias, hidden, second), dim=2)
        # The gradient of cross-entropy is the probability, less 1 at the label.
        output.scatter_add_(2, labels[:, :, None], output.new_full((*labels.shape, 1), -1.0))
        output /= labels.shape[1]
        below = (output @ second.mT) * (hidden > 0)
        gradients = [inputs.mT @ below, below.sum(1, keepdim=True), hidden.mT @ output, output.sum(1, keepdim=True)]
        for weights, momentum, gradient in zip(self.parameters, self._momenta, gradients, strict=True):
            gradient.add_(weights, alpha=_WEIGHT_DECAY)
            momentum.mul_(_MOMENTUM).add_(gradient)
            weights.sub_(gradient.add_(momentum, alpha=_MOMENTUM), alpha=lr)

    def outputs(self, network: int, inputs: Tensor) -> Tensor:
        """The outputs of one network, `[N, classes]`, for inputs `[N, inputs]`."""
        first, first_bias, second, second_bias = (parts[network] for parts in self.parameters)
        return torch.relu(inputs @ first + first_bias) @ second + second_bias

    def losses(self, network: int, inputs: Tensor, labels: Tensor) -> Tensor:
        """The losses of one network, `[N]`."""
        return F.cross_entropy(self.outputs(network, inputs), labels, reduction="none")


def _initial(inputs: int, hidden: int, classes: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(rows: int, columns: int, fan_in: int) -> Tensor:
        return (2 * torch.rand(rows, columns, generator=generator) - 1) / math.sqrt(fan_in)

    return [
        uniform(inputs, hidden, inputs),
        uniform(1, hidden, inputs),
        uniform(hidden, classes, hidden),
        uniform(1, classes, hidden),
    ]


def train(
    networks: Networks,
    inputs: Tensor,
    order: Tensor,
    labels: Tensor,
    batch: int,
    after: Callable[[int], None] = lambda steps: None,
) -> None:
    """Trains every network once through its own order of samples, by one cycle of the learning rate.

    Args:
        networks: The networks.
        inputs: The samples that all networks read from, `[N, inputs]`.
        order: Positions in `inputs`, int64, `[networks, steps * batch]`.
        labels: The labels of those, `[networks, steps * batch]`.
        batch: The number of samples of a step.
        after: Called after each step with the number of steps so far.
    """
    steps = order.shape[1] // batch
    for step in range(steps):
        part = slice(step * batch, (step + 1) * batch)
        networks.step(inputs[order[:, part]], labels[:, part], one_cycle(step, steps))
        after(step + 1)


def one_cycle(step: int, steps: int) -> float:
    """The learning rate of a step: a cosine from a 25th of the peak up to it, and one down to zero."""
    warm = _WARM_UP * steps
    if step < warm:
        low = _PEAK / 25
        return low + (_PEAK - low) * (1 - math.cos(math.pi * step / warm)) / 2
    return _PEAK * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

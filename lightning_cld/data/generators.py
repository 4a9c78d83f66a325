"""`OwnGenerators`: random generators that a dataset keeps for itself, as the transforms of MONAI do."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KINDS = (np.random.RandomState, np.random.Generator, random.Random, torch.Generator)

_OTHERS = (str, bytes, int, float, Tensor, np.ndarray, type, ModuleType)

_DEPTH = 8
"""How deep attributes and containers are looked into."""

_LONG = 1000
"""Containers with more entries hold data, not transforms."""


class OwnGenerators:
    """The generators of torch, numpy and python that are found among the attributes of some objects.

    Args:
        owners: A dataset and a collate function, for example.

    Example:
        >>> import random
        >>> from types import SimpleNamespace
        >>> from lightning_cld.data.generators import OwnGenerators
        >>> dataset = SimpleNamespace(transform=[SimpleNamespace(rng=random.Random(0))])
        >>> own = OwnGenerators(dataset)
        >>> with own.rewound():
        ...     first = dataset.transform[0].rng.random()
        >>> dataset.transform[0].rng.random() == first
        True
    """

    def __init__(self, *owners: Any) -> None:
        self._found = list(_generators_in(owners, 0, set()))
        self._first = [_state_of(generator) for generator in self._found]

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Runs its body with every generator in the state in which it was found, and puts the present states back."""
        now = [_state_of(generator) for generator in self._found]
        self._set(self._first)
        try:
            yield
        finally:
            self._set(now)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Runs its body with every generator seeded anew, and puts the present states back."""
        now = [_state_of(generator) for generator in self._found]
        for generator in self._found:
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = type(generator.bit_generator)(seed).state
            elif isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            else:
                generator.seed(seed)
        try:
            yield
        finally:
            self._set(now)

    def _set(self, states: list[Any]) -> None:
        for generator, state in zip(self._found, states, strict=True):
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            else:
                generator.set_state(state)


def _generators_in(value: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, _KINDS):
        if id(value) not in seen:
            seen.add(id(value))
            yield value
        return
    if depth > _DEPTH or id(value) in seen or isinstance(value, _OTHERS):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values()) if len(value) <= _LONG else []
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value) if len(value) <= _LONG else []
    else:
        # Of its class too: all that was not seeded shares a generator there in MONAI.
        shared = (part for kind in type(value).__mro__ for part in vars(kind).values() if isinstance(part, _KINDS))
        parts = [*shared, *getattr(value, "__dict__", {}).values()]
    for part in parts:
        yield from _generators_in(part, depth + 1, seen)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()

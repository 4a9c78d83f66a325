"""Every public name has an example that runs. pytest's --doctest-modules runs the examples themselves."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import lightning_cld
from lightning_cld import plotting

EXAMPLES = {
    test.name: "".join(example.source for example in test.examples if doctest.SKIP not in example.options)
    for module in pkgutil.walk_packages(lightning_cld.__path__, "lightning_cld.")
    for test in doctest.DocTestFinder().find(importlib.import_module(module.name))
}


def public_functions():
    """The exported functions, and the public functions of exported modules and of `plotting` (an optional extra)."""
    for value in (plotting, *map(lightning_cld.__dict__.get, lightning_cld.__all__)):
        if inspect.ismodule(value):
            yield from (
                function
                for name, function in inspect.getmembers(value, inspect.isfunction)
                if not name.startswith("_") and function.__module__ == value.__name__
            )
        elif inspect.isfunction(value):
            yield value


def public_classes():
    return [value for value in map(lightning_cld.__dict__.get, lightning_cld.__all__) if inspect.isclass(value)]


def own_members(cls):
    """The public methods and properties that the class adds to Lightning's or torch's."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    return [name for name in vars(cls) if not name.startswith("_") and name not in inherited]


def name_of(value):
    return f"{value.__module__}.{value.__qualname__}"


@pytest.mark.parametrize("value", [*public_functions(), *public_classes()], ids=name_of)
def test_a_public_name_has_an_example(value):
    assert value.__name__ in EXAMPLES[name_of(value)]


MEMBERS = [
    (cls, name) for cls in public_classes() for name in own_members(cls) if not isinstance(vars(cls)[name], type)
]


@pytest.mark.parametrize(("cls", "name"), MEMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_public_member_is_in_an_example_of_its_class(cls, name):
    examples = "".join(text for where, text in EXAMPLES.items() if f"{where}.".startswith(f"{name_of(cls)}."))
    assert re.search(rf"\.{name}\b", examples)

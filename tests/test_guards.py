"""What a look at a module leaves as it was: the very objects, with what they held."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cld import CLDCallback
from lightning_cld.guards import evaluation
from tests.toys import Classifier, fit, quiet_trainer


class Holder(Classifier):
    """Holds one of everything that a forward pass can write."""

    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", torch.arange(4.0))
        self.register_buffer("other", torch.ones(3))
        self.values = torch.arange(6.0).view(2, 3)
        self.row = self.values[1]
        self.array = np.arange(3)
        self.count, self.text, self.nothing = 3, "text", None
        self.items = [torch.zeros(2), 1, [2]]
        self.table = {"b": torch.zeros(2), "a": {"deep": [1]}}
        self.group, self.recent = {1, 2}, deque([1, 2], maxlen=2)
        self.pair = (torch.zeros(2), [1])
        self.counts, self.ordered, self.lists = Counter("aab"), OrderedDict(x=1, y=2), defaultdict(list, z=[1])
        self.hidden = [nn.BatchNorm1d(2)]
        self.twin = nn.Module()
        self.twin.values, self.twin.items = self.values, self.items


def look(module, body=lambda module: None):
    trainer = quiet_trainer(None)
    trainer.strategy.connect(module)
    with evaluation(trainer, module):
        body(module)


def inside(thing, path="module"):
    """Pairs of a path and what is there, of all that a module holds."""
    yield path, thing
    if isinstance(thing, nn.Module):
        thing = vars(thing)
    if isinstance(thing, dict):
        for name, inner in thing.items():
            if name != "_trainer":
                yield from inside(inner, f"{path}.{name}")
    elif isinstance(thing, (list, tuple, deque)):
        for place, inner in enumerate(thing):
            yield from inside(inner, f"{path}.{place}")


def assert_left_alone(module, body):
    """Checks that after `body` the module holds the very objects that it held, and in them what they held."""
    before = list(inside(module))
    values = [copy.deepcopy(thing) if isinstance(thing, (Tensor, np.ndarray, set)) else None for _, thing in before]
    memory = [thing.detach() if isinstance(thing, Tensor) else None for _, thing in before]
    look(module, body)
    after = list(inside(module))
    assert [path for path, _ in after] == [path for path, _ in before]
    for (path, thing), (_, own), value, place in zip(after, before, values, memory, strict=True):
        assert thing is own, path
        if isinstance(thing, Tensor):
            assert thing.shape == value.shape, path
            assert torch.equal(thing, value), path
            assert thing.is_set_to(place), path
        elif isinstance(thing, (np.ndarray, set)):
            assert np.array_equal(list(thing), list(value)), path


def write_in_place(module):
    for tensor in (module.buffer, module.values, module.row, module.items[0], module.pair[0], module.table["b"]):
        tensor.add_(1)
    module.hidden[0](torch.randn(3, 2))
    module.array += 1


def write_past_the_version(module):
    module.buffer.data.add_(1)
    module.values.numpy()[:] = 7


def bind_anew(module):
    module.buffer, module.values, module.items, module.table = torch.ones(2), torch.ones(1), [], {}
    module.count, module.text, module.nothing, module.array = 4, "other", object(), np.zeros(1)
    module.group, module.recent, module.pair, module.hidden = set(), deque(), (), []


def move(module):
    for tensor in (module.buffer, module.values, module.items[0], *module.parameters()):
        tensor.data = torch.zeros(7)
    module.row.resize_(5)
    module.pair[0].t_().unsqueeze_(0)


def fill(module):
    module.items.append(torch.ones(1))
    module.items[2].append(3)
    module.table["c"] = 1
    module.table["a"]["deep"].clear()
    module.group.add(3)
    module.recent.append(3)
    module.pair[1].append(2)
    module.counts.update("abc")
    module.ordered.move_to_end("x")
    module.lists["new"].append(1)


def reorder(module):
    module.buffer = module._buffers.pop("buffer")
    del module.buffer
    module.register_buffer("buffer", torch.zeros(1), persistent=False)
    module.table["b"] = module.table.pop("b")
    module.items.reverse()


def add(module):
    module.new, module.layer, module.weight = torch.ones(1), nn.Linear(1, 1), nn.Parameter(torch.ones(1))
    module.register_buffer("more", torch.ones(1))
    module.net[0].register_forward_hook(lambda *_: None)
    module.net.append(nn.ReLU())


def take(module):
    del module.values, module.other, module.count, module.net[4].weight
    module.net[3] = nn.Identity()


def bind_weights_anew(module):
    module.net[0].weight = nn.Parameter(torch.ones(1))
    module.net[0].bias.data = module.net[0].bias.data + 1


def change_modes(module):
    module.net.train()
    module.net[1].eval()
    module.hidden[0].eval()


def log(module):
    module.log("anything", 1.0)
    module.log = print


@pytest.mark.parametrize(
    "body",
    [
        write_in_place,
        write_past_the_version,
        bind_anew,
        move,
        fill,
        reorder,
        add,
        take,
        bind_weights_anew,
        change_modes,
        log,
    ],
)
def test_a_module_holds_the_very_objects_that_it_held(body):
    assert_left_alone(Holder(), body)


def test_what_is_written_before_an_error_is_put_back():
    def fail(module):
        write_in_place(module)
        fill(module)
        raise OSError("in the middle")

    module = Holder()
    with pytest.raises(OSError, match="in the middle"):
        look(module, fail)
    assert module.buffer.tolist() == [0, 1, 2, 3]
    assert module.items[1:] == [1, [2]]
    assert "log" not in vars(module)


def test_what_is_shared_is_shared_still():
    module = Holder()

    def part(module):
        module.twin.values = module.values = module.values + 1
        module.twin.items = [*module.items, 2]
        module.row = module.row.clone()

    look(module, part)
    assert module.twin.items is module.items
    module.values += 1
    assert module.row.tolist() == [4, 5, 6]
    assert torch.equal(module.twin.values, module.values)


class Operations(TorchDispatchMode):
    """Counts the values that are copied to new memory, and those that are written to old."""

    copied, written = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.copied += args[0].numel() if function is torch.ops.aten.clone.default else 0
        self.written += args[0].numel() if function is torch.ops.aten.copy_.default else 0
        return function(*args, **(kwargs or {}))


def test_nothing_is_written_where_nothing_changed():
    module = Holder()  # some of whose tensors may lie in memory that can't be written to
    module.odd = torch.tensor([torch.nan])
    with Operations() as operations:
        look(module)
    assert operations.written == 0
    with Operations() as operations:
        look(module, lambda module: module.buffer.data.zero_())
    assert operations.written == 4


def read_only(folder):
    values = np.memmap(folder / "values", dtype="float32", mode="w+", shape=3)
    values[:] = np.nan, 1, 2
    values.flush()
    return torch.from_numpy(np.memmap(folder / "values", dtype="float32", mode="r", shape=3))


def made_in_inference_mode(folder):
    with torch.inference_mode():
        return torch.ones(3) + torch.tensor([torch.nan, 0, 0])


ODD = {
    "expanded": lambda folder: torch.zeros(2, 1).expand(2, 3),
    "expanded nan": lambda folder: torch.tensor([torch.nan]).expand(4),
    "expanded to nothing": lambda folder: torch.zeros(1).expand(0),
    "nan": lambda folder: torch.tensor([torch.nan, 1]),
    "complex": lambda folder: torch.randn(3, dtype=torch.complex64).conj(),
    "negated": lambda folder: torch.randn(3, dtype=torch.complex64).conj().imag,
    "overlapping": lambda folder: torch.arange(5.0).unfold(0, 3, 1),
    "of a graph": lambda folder: torch.randn(3, requires_grad=True) * 2,
    "made in inference mode": made_in_inference_mode,
    "read-only": read_only,
    "on the meta device": lambda folder: torch.empty(3, device="meta"),
    "sparse": lambda folder: torch.eye(3).to_sparse(),
    "sparse rows": lambda folder: torch.eye(3).to_sparse_csr(),
    "nested": lambda folder: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    "jagged": lambda folder: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["attribute", "buffer"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_do_no_harm(tmp_path, kind, where):
    module, odd = Holder(), ODD[kind](tmp_path)
    shown = str(odd)
    if where == "buffer":
        module.register_buffer("odd", odd)
    else:
        module.odd = odd
    look(module)
    assert module.odd is odd
    look(module, lambda module: setattr(module, "odd", torch.zeros(1)))
    assert module.odd is odd
    assert str(odd) == shown


NUMBERS = [
    *(torch.tensor([0, 1, 1]).to(dtype) for dtype in (torch.bool, torch.uint8, torch.int64, torch.complex64)),
    *(torch.tensor([0, 1, torch.nan]).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float8_e5m2)),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: str(number.dtype))
def test_every_type_of_number_is_put_back(number):
    module = Holder()
    module.odd = number.clone()
    look(module, lambda module: module.odd.copy_(torch.tensor([1, 1, 0])))
    assert str(module.odd) == str(number)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_is_put_back():
    module = Holder()
    module.odd = torch.quantize_per_tensor(torch.tensor([0.0, 1, 1]), 0.1, 0, torch.quint8)
    look(module, lambda module: module.odd.copy_(torch.tensor([1.0, 1, 0])))
    assert module.odd.dequantize().tolist() == [0, 1, 1]


def test_what_was_expanded_is_put_back_where_its_base_was_written():
    module = Holder()
    base = torch.zeros(2, 1)
    module.mask = base.expand(2, 3)
    look(module, lambda module: base.fill_(1))
    assert module.mask.tolist() == [[0, 0, 0]] * 2


def test_weights_are_not_copied_and_repeated_values_once():
    module = Classifier()
    module.mask = torch.zeros(1).expand(10_000)
    with Operations() as operations:
        look(module)
    assert operations.copied == sum(buffer.numel() for buffer in module.buffers()) + 1


def test_the_trainer_and_other_objects_of_the_modules_are_left_alone():
    class Helper:
        calls = 0

    module = Holder()
    module.helper, module.loop = Helper(), quiet_trainer(None)

    def use(module):
        module.helper.calls += 1
        module.loop.should_stop = True

    look(module, use)
    assert module.helper.calls == 1
    assert module.loop.should_stop


def test_a_modules_own_way_of_setting_attributes_is_not_used():
    class Strict(Holder):
        closed = False

        def __setattr__(self, name, value):
            if self.closed and name != "training":
                raise AttributeError(f"{name} can't be set")
            super().__setattr__(name, value)

    module = Strict()
    Strict.closed = True
    look(module, lambda module: vars(module).update(count=5))
    assert module.count == 3


def test_a_tensor_made_of_others_is_put_back():
    module = Holder()
    module.odd = torch.nested.nested_tensor([torch.zeros(2), torch.ones(3)], layout=torch.jagged)
    look(module, lambda module: module.odd.values().add_(1))
    assert module.odd.values().tolist() == [0, 0, 1, 1, 1]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_module_gets_its_own_back():
    module = Holder()
    module.net = torch.compile(module.net, backend="eager")
    look(module, lambda module: module.net.train()(torch.randn(3, 4)))
    assert module.net._orig_mod[1].num_batches_tracked == 0
    assert module.net.training


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [True, False])
def test_a_scripted_module_gets_its_own_back(mode):
    module = Holder()
    module.net[1] = torch.jit.script(nn.BatchNorm1d(16))
    module.net[1].training = mode
    look(module, lambda module: module.net.train()(torch.randn(3, 4)))
    assert module.net[1].training is mode
    look(module)
    assert module.net[1].training is mode
    assert module.net[1].num_batches_tracked == 0


class Lazy(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(3))


@pytest.mark.filterwarnings("ignore")
def test_lazy_layers_without_a_shape_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"net\.0\.weight of Lazy has no shape .*num_sanity_val_steps=1"):
        fit(tmp_path, CLDCallback(), Lazy)


@pytest.mark.filterwarnings("ignore")
def test_lazy_layers_are_the_same_where_the_trainer_has_given_them_a_shape(tmp_path):
    weights = [
        fit(tmp_path, cld, Lazy, num_sanity_val_steps=1)[1].state_dict()
        for cld in (None, CLDCallback(dirpath=tmp_path))
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])

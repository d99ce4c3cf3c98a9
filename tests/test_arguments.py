"""What public functions take as numbers, stages, pairs, banks and devices, and the errors for everything else: each
names the argument, what it must be and what came."""

import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gkd_fast import _arguments, distributed, functional
from gkd_fast.functional import adaptive_bandwidth, effective_neighbors, graph_conv, node_contrast, relation_kl
from gkd_fast.micro_batch import micro_batched

X = torch.ones(4, 3)
ARRAY = np.ones((4, 3), np.float32)
TRAINED = torch.tensor(0.1, requires_grad=True)
LOSSES = {"relation_kl": relation_kl, "node_contrast": node_contrast}


@pytest.mark.parametrize(
    "number",
    [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)],
    ids=repr,
)
def test_numbers_of_any_kind(number):
    x, y = torch.randn(2, 6, 3)
    for function in LOSSES.values():
        assert torch.equal(function(x, y, temperature=number), function(x, y, temperature=0.25))
    assert torch.equal(relation_kl(x, y, bandwidth=number), relation_kl(x, y, bandwidth=0.25))
    torch.testing.assert_close(graph_conv(x, y, bandwidth=number), graph_conv(x, y, bandwidth=0.25))
    torch.testing.assert_close(effective_neighbors(x, number), effective_neighbors(x, 0.25))


def test_whole_numbers():
    x, y = torch.randn(2, 6, 3)
    assert torch.equal(node_contrast(x, y, temperature=np.int64(1)), node_contrast(x, y, temperature=1.0))
    assert torch.equal(relation_kl(x, y, bandwidth=2), relation_kl(x, y, bandwidth=2.0))
    pairs = np.array([[0, 1]])
    assert torch.equal(relation_kl([x], [x, y], pairs=pairs), relation_kl([x], [x, y], pairs=[(0, 1)]))
    assert torch.equal(node_contrast(x, y, bank=x), node_contrast([x], [y], bank=[x]))
    assert torch.equal(relation_kl(x, y, bank=(x, y)), relation_kl([x], [y], bank=([x], [y])))
    linear = torch.nn.Linear(3, 2)
    assert micro_batched(linear, x, micro_batch=np.int64(4)).shape == (6, 2)


NUMBERS = [
    ("hot", TypeError, "must be a number, got str"),
    (None, TypeError, "must be a number, got NoneType"),
    (True, TypeError, "must be a number, got bool"),
    ([0.1], TypeError, "must be a number, got list"),
    (np.array([0.1]), TypeError, "must be a number, got ndarray"),
    (1j, TypeError, "must be a number, got complex"),
    (np.float32(0), ValueError, "must be positive and finite, got 0"),
    (torch.tensor(-1.0), ValueError, "must be positive and finite, got"),
    (torch.ones(1), TypeError, r"must be a number, got a Tensor of torch.float32 and shape \(1,\)"),
    (torch.tensor(True), TypeError, "must be a number, got a Tensor of torch.bool"),
    (torch.ones((), device="meta"), TypeError, r"a Tensor that is on meta: pass {name}.item\(\)"),
    (TRAINED, TypeError, r"a Tensor that requires gradient, which it would not get: pass {name}.item\(\)"),
]


@pytest.mark.parametrize(("number", "error", "message"), NUMBERS, ids=lambda x: None)
def test_what_is_no_number(number, error, message):
    for function, name in ((relation_kl, "temperature"), (relation_kl, "bandwidth"), (node_contrast, "temperature")):
        with pytest.raises(error, match=f"{name} .*{message.replace('{name}', name)}"):
            function(X, X, **{name: number})


def batches(*arguments):
    return list(distributed.until_all_end(*arguments))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(graph_conv, ARRAY, X), TypeError, "nodes must be a Tensor .*, got ndarray"),
        (partial(graph_conv, X, ARRAY), TypeError, "messages must be a Tensor, got ndarray"),
        (partial(graph_conv, None, X), TypeError, "nodes must be a Tensor .*, got NoneType"),
        (partial(graph_conv, [X], {"a": X}), TypeError, "messages must be a Tensor or a sequence of tensors, got dict"),
        (partial(graph_conv, X.to_sparse(), X), TypeError, "nodes must be dense, got .* torch.sparse_coo"),
        (partial(graph_conv, X.to(torch.float8_e4m3fn), X), TypeError, "nodes must be floating .* got torch.float8"),
        (partial(graph_conv, X, X, bandwidth=torch.tensor(1j)), TypeError, "bandwidth must be a real .* got .*complex"),
        (partial(graph_conv, X, X, normalization=["row"]), ValueError, r"normalization must be .* got \['row'\]"),
        (partial(graph_conv, X, X, normalization=np.ones(2)), ValueError, "normalization must be one of .* got array"),
        (partial(graph_conv, X, X, backend=None), ValueError, "backend must be one of .* got None"),
        (partial(graph_conv, X, X, backend=X), ValueError, "backend must be one of .* got tensor"),
        (partial(graph_conv, X, X, process_group="nccl"), TypeError, "process_group must be a ProcessGroup .* got str"),
        (partial(relation_kl, ARRAY, X), TypeError, "students must be a Tensor or a sequence of tensors, got ndarray"),
        (partial(relation_kl, X, {"a": X}), TypeError, "teachers must be a Tensor or a sequence of tensors, got dict"),
        (partial(relation_kl, X, "x"), TypeError, "teachers must be a Tensor or a sequence of tensors, got str"),
        (partial(relation_kl, 3, X), TypeError, "students must be a Tensor or a sequence of tensors, got int"),
        (partial(relation_kl, X, [[1.0, 2.0]]), TypeError, r"teachers\[0\] must be a Tensor, got list"),
        (partial(relation_kl, X, X.int()), TypeError, r"teachers\[0\] must be floating point, got torch.int32"),
        (partial(relation_kl, X, X, pairs=[0, 1]), TypeError, r"pairs must be a list of .*, got \[0, 1\]"),
        (partial(relation_kl, X, X, pairs="all"), TypeError, "pairs must be a list of .*, got 'all'"),
        (partial(relation_kl, X, X, pairs=3), TypeError, "pairs must be a list of .*, got 3"),
        (partial(node_contrast, X, X, pairs=[(0, 0, 0)]), TypeError, "pairs must be a list of"),
        (partial(node_contrast, X, X, pairs=[(0.5, 0)]), TypeError, "pairs must be a list of"),
        (partial(node_contrast, X, X, pairs=[(0, -1)]), ValueError, r"pairs must lie below \(1, 1\), got \(0, -1\)"),
        (partial(node_contrast, X, X, bank=torch.ones(())), ValueError, r"bank\[0\] must have 2 dimensions .*, got"),
        (partial(node_contrast, X, X, bank=3), TypeError, "bank must be a Tensor or a sequence of tensors, got int"),
        (partial(node_contrast, X, X, bank=[ARRAY]), TypeError, r"bank\[0\] must be .*, got ndarray"),
        (partial(node_contrast, X, X, bank=[X.int()]), TypeError, r"bank\[0\] must be .*, got torch.int32"),
        (partial(relation_kl, X, X, bank=X), TypeError, "bank must be a pair, .* got Tensor"),
        (partial(relation_kl, X, X, bank=[X]), TypeError, "bank must be a pair, .* got list"),
        (partial(relation_kl, X, X, bank=([X], [X, X])), ValueError, r"bank\[1\] must hold .* got 2"),
        (partial(adaptive_bandwidth, ARRAY), TypeError, "nodes must be a Tensor, got ndarray"),
        (partial(adaptive_bandwidth, X, process_group=0), TypeError, "process_group must be a ProcessGroup .* got int"),
        (partial(effective_neighbors, X, [1.0]), TypeError, "bandwidth must be a number, got list"),
        (partial(batches, 3, None), TypeError, "batches must be iterable, got int"),
        (partial(micro_batched, 3, X, micro_batch=2), TypeError, "forward must be a module or a callable, got int"),
        (partial(micro_batched, len, X, micro_batch="2"), ValueError, "micro_batch must be an int .*, got '2'"),
        (partial(micro_batched, len, X, micro_batch=2, modules=3), TypeError, "modules must be a module .*, got int"),
        (partial(micro_batched, len, X, micro_batch=2, modules=[3]), TypeError, "modules must be a module .*, got int"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_devices_without_kernels_are_told_of_once(monkeypatch):
    monkeypatch.setattr(_arguments, "_warned", set())
    for device in ("mps", "xpu"):
        x = SimpleNamespace(device=torch.device(device))
        with pytest.warns(RuntimeWarning, match=f"computes on {device} with the slow reference: there are no kernels"):
            assert _arguments.select_backend("auto", x) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _arguments.select_backend("auto", x) == "reference"
            assert _arguments.select_backend("reference", x) == "reference"


def test_tensors_without_memory_get_shapes_and_no_warning(monkeypatch):
    monkeypatch.setattr(_arguments, "_warned", set())
    x = torch.empty(5, 3, device="meta", requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = relation_kl(x, [x, x]) + node_contrast(x, [x, x])
        assert loss.shape == (5, 1, 2) and loss.device.type == "meta"
        assert functional.graph_conv(x, x).shape == (5, 3)
        loss.sum().backward()
    assert x.grad.shape == x.shape

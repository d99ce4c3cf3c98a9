"""Calls of the loss while a CUDA graph is captured, as far as a machine without a GPU shows them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_fast import GraphKDLoss, _column_bank, loss
from tests.ops_cases import GRAPHS, requires_cpp

# What gives the host what only the device knows.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "unique", "tolist"}


class Operations(TorchDispatchMode):
    """The names of the operations within, and of ``tolist``, which dispatches nothing on CPUs."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.patches = pytest.MonkeyPatch()

    def __enter__(self):
        plain = torch.Tensor.tolist
        self.patches.setattr(torch.Tensor, "tolist", lambda x: (self.names.add("tolist"), plain(x))[1])
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.fixture
def capturing(monkeypatch):
    def capture():
        for module in (loss, _column_bank):
            monkeypatch.setattr(module, "being_captured", lambda x: True)

    return capture


def step(criterion, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    students = [torch.randn(6, 5, generator=generator, requires_grad=True) for _ in range(2)]
    teachers = [torch.randn(6, 7, generator=generator) for _ in range(2)]
    # Probabilities: labels are read on CPUs, not on GPUs.
    target = torch.rand(6, 3, generator=generator).softmax(dim=1)
    value = criterion(students, teachers, target)
    return [value, *torch.autograd.grad(value, [*students, *criterion.parameters()])]


def loss_of(**options) -> GraphKDLoss:
    torch.manual_seed(0)
    return GraphKDLoss([5, 5], [7, 7], num_classes=3, embed_dim=8, **options)


@requires_cpp  # whose ops have names to be seen
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("column_bank", [0, 12])
def test_nothing_waits_for_the_device(capturing, column_bank, graph):
    """The first training call looks at diagnostics, and waits; under capture no call does."""
    criterion = loss_of(column_bank=column_bank, **graph)
    with Operations() as eager:
        step(criterion, 0)
    assert eager.names & WAITS
    step(criterion, 1)
    criterion._training_calls = 0
    capturing()
    with Operations() as captured:
        step(criterion, 2)
    assert not captured.names & WAITS
    assert any("relation_kl" in name for name in captured.names) and criterion._training_calls == 0


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_what_is_kept_stays_where_it_is(capturing, graph):
    """The full bank, and the bandwidth that is the next step's start."""
    plain, captured = loss_of(column_bank=8, **graph), loss_of(column_bank=8, **graph)
    for seed in range(2):
        for criterion in (plain, captured):
            step(criterion, seed)
    before = [x.data_ptr() for x in captured.buffers()]
    expected = [step(plain, seed) for seed in (2, 3)]
    capturing()
    found = [step(captured, seed) for seed in (2, 3)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [x.data_ptr() for x in captured.buffers()] == before
    torch.testing.assert_close(list(captured.buffers()), list(plain.buffers()), rtol=0, atol=0)


def test_a_bank_that_grows_cannot_be_captured(capturing):
    criterion = loss_of(column_bank=8)
    step(criterion, 0)
    capturing()
    with pytest.raises(RuntimeError, match="cannot hold a bank that still grows: it has 6 of 8 embeddings"):
        step(criterion, 1)

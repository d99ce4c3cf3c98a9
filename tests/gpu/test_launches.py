"""How the kernels are launched: streams, CUDA graphs, devices, determinism, torch.compile, sizes, memory."""

import pytest
import torch

from gkd_fast import functional

from .problems import DEVICE, OPS, problem
from .target import needs_gpu

pytestmark = needs_gpu
each_op = pytest.mark.parametrize("op", OPS)
CYCLES = 50_000_000  # some 30 ms of waiting on the device


def forward_backward(checked, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    output = checked.call("triton", leaves)
    upstream = checked.upstream.to(output.device, output.dtype, non_blocking=True)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


def leaves_of(checked, device=DEVICE) -> list[torch.Tensor]:
    return [x.detach().to(device).requires_grad_() for x in checked.inputs.values()]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


def on_a_side_stream(run) -> list[torch.Tensor]:
    """What ``run`` gives there, warm for a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            found = run()
    torch.cuda.current_stream().wait_stream(side)
    return found


@each_op
def test_repeats_give_the_same_bits(op):
    checked = problem(op, 1500, 64)
    leaves = leaves_of(checked)
    first = forward_backward(checked, leaves)
    for _ in range(100):
        assert_same(forward_backward(checked, leaves), first)


@each_op
@pytest.mark.parametrize("batch", [64, 1100])
def test_the_current_stream_is_used(op, batch):
    """Inputs that another stream writes late are read late."""
    checked = problem(op, batch, 32)
    expected = forward_backward(checked, leaves_of(checked))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.full_like(x, torch.nan) for x in checked.inputs.values()]
        torch.cuda._sleep(CYCLES)
        for x, value in zip(late, checked.inputs.values()):
            x.copy_(value)
        found = forward_backward(checked, [x.requires_grad_() for x in late])
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(found, expected)


@each_op
@pytest.mark.parametrize("batch", [64, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_capture_in_a_cuda_graph(op, batch, dtype):
    checked, other = (problem(op, batch, 32, dtype, kind=kind) for kind in ("normal", "zero"))
    upstream = checked.upstream.to(DEVICE, torch.float32 if "conv" not in op else dtype)
    static = leaves_of(checked)

    def run():
        output = checked.call("triton", static)
        return [output, *torch.autograd.grad(output, static, upstream)]

    on_a_side_stream(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for inputs in (other, checked):
        with torch.no_grad():
            for x, value in zip(static, inputs.inputs.values()):
                x.copy_(value)
        graph.replay()
        assert_same([x.clone() for x in captured], run())


@each_op
@pytest.mark.parametrize("batch", [64, 1100])
def test_nothing_waits_for_the_device(op, batch):
    checked = problem(op, batch, 32)
    leaves = leaves_of(checked)
    checked.upstream = checked.upstream.float().to(DEVICE)
    forward_backward(checked, leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(checked, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_second_order_waits_for_nothing_and_is_captured(op, dtype):
    checked = problem(op, 300, 32, dtype, stages=(1, 1))
    leaves = leaves_of(checked)
    upstream = checked.upstream.to(DEVICE, torch.float32 if "conv" not in op else dtype)
    cotangents = [torch.ones_like(x) for x in leaves]

    def run() -> list[torch.Tensor]:
        gradients = torch.autograd.grad(checked.call("triton", leaves), leaves, upstream, create_graph=True)
        return list(torch.autograd.grad(gradients, leaves, cotangents))

    expected = on_a_side_stream(run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert_same(captured, expected)


@each_op
def test_another_device_than_the_current(op):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, here is {torch.cuda.device_count()}")
    checked = problem(op, 300, 32)
    expected = forward_backward(checked, leaves_of(checked))
    with torch.cuda.device(0):
        found = forward_backward(checked, leaves_of(checked, "cuda:1"))
    assert all(x.device.index == 1 for x in found)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.cpu(), b.cpu())


@each_op
def test_torch_compile_for_changing_batch_sizes(op):
    torch._dynamo.reset()
    compiled_for = []

    def backend(graph, inputs):
        compiled_for.append(len(inputs))
        return graph.forward

    checked = problem(op, 33, 32)
    function = torch.compile(lambda *inputs: checked.call("triton", inputs), fullgraph=True, backend=backend)
    for batch in (33, 64, 257, 1500):
        sized = problem(op, batch, 32)
        assert torch.equal(function(*sized.inputs.values()), sized.call("triton", list(sized.inputs.values())))
    assert len(compiled_for) <= 2


@each_op
def test_inductor_gives_the_same_values_and_gradients(op):
    torch._dynamo.reset()
    checked = problem(op, 300, 32)
    function = torch.compile(lambda *inputs: checked.call("triton", inputs), fullgraph=True)
    leaves = leaves_of(checked)
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, checked.upstream.to(output.device, output.dtype))
    for a, b in zip([output, *gradients], forward_backward(checked, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_backend_auto_takes_the_kernels():
    inputs = list(problem("relation_kl", 100, 32, stages=(1, 1)).inputs.values())
    assert torch.equal(functional.relation_kl(*inputs), functional.relation_kl(*inputs, backend="triton"))


@pytest.mark.parametrize("op", ["relation_kl", "node_contrast"])
def test_few_rows_against_a_million_columns(op):
    """Offsets beyond 2^31 elements: 2,200,000 columns of width 1,024 are 9 GB in float32."""
    columns, dim, rows = 2_200_000, 1024, 3
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free device memory")
    matrix = torch.zeros(columns, dim, device=DEVICE)
    matrix[:, 0] = 1
    matrix[-rows:, 0], matrix[-rows:, 1] = 0, 1
    own, offset = [matrix[-rows:].contiguous()], columns - rows
    kernels = torch.ops.gkd_fast
    if op == "relation_kl":
        losses, sums, _ = kernels.relation_kl(own, own, 0.1, 1.0, "float32", [matrix], [matrix], offset)
        relations = torch.tensor([columns - rows, rows - 1, 1.0], dtype=torch.float64)
        logits = torch.tensor([-1.0, 0.0, -torch.inf], dtype=torch.float64).exp() * 10
        torch.testing.assert_close(losses.abs().max().item(), 0.0, rtol=0, atol=1e-4)
    else:
        _, sums, _ = kernels.node_contrast(own, own, [True], 0.1, "float32", False, [matrix], offset)
        relations = torch.tensor([columns - rows, rows], dtype=torch.float64)
        logits = torch.tensor([0.0, 10.0], dtype=torch.float64)
    expected = (relations * logits.exp()).sum().log().float().item()
    torch.testing.assert_close(sums.cpu(), torch.full_like(sums.cpu(), expected), rtol=1e-4, atol=0)


def extra_memory(checked) -> tuple[int, list[torch.Tensor]]:
    """The peak of forward and backward pass in bytes, beyond what there was before, and the output and gradients."""
    leaves = [x.detach().requires_grad_(k < checked.wanted) for k, x in enumerate(checked.inputs.values())]
    upstream = checked.upstream.to(DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = checked.call("triton", leaves)
    gradients = torch.autograd.grad(output, leaves[: checked.wanted], upstream.to(output.dtype))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, [output, *gradients]


@pytest.mark.parametrize(
    ("op", "megabytes"),
    [(op, 64) for op in ("relation_kl", "graph_conv symmetric", "graph_conv row", "neighbor_conv symmetric")],
)
def test_extra_memory_of_a_large_batch(op, megabytes):
    """Beyond inputs, float32 unit rows and messages, outputs and gradients, at B = 65,536."""
    batch, dim = 65_536, 128
    checked = problem(op, batch, dim, torch.bfloat16, stages=(1, 1), teachers_wanted=False)
    peak, results = extra_memory(checked)
    kept = sum(x.nbytes for x in results) + len(checked.inputs) * batch * dim * 4 * 3
    assert peak - kept < megabytes * 1e6


@pytest.mark.parametrize("teachers_wanted", [False, True], ids=["students", "both"])
def test_strips_of_wide_rows_keep_to_their_budget(monkeypatch, teachers_wanted):
    """Beside unit rows, weighted sums, gradients, operands, and what cuBLAS works in and vectors take."""
    from gkd_fast.kernels.common import strips

    monkeypatch.setattr(strips, "STRIP_BYTES", 64 * 2**20)
    batch, dim = 16_384, 512
    checked = problem("node_contrast", batch, dim, torch.bfloat16, stages=(1, 1), teachers_wanted=teachers_wanted)
    peak, _ = extra_memory(checked)
    matrices = 2 + 1 + 1.5 * checked.wanted + 1 + 1.25
    assert peak < 64 * 2**20 + matrices * batch * dim * 4

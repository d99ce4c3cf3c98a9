"""What holds for every op: the dispatcher's contract, determinism, frozen inputs, torch.compile, missing extensions."""

import math
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.library import opcheck

import gkd_fast
from gkd_fast import _arguments, functional, ops
from gkd_fast.ops import backends
from tests import ops_cases
from tests.ops_cases import (
    D64,
    FUNCTIONS,
    MISSING,
    Calls,
    check,
    requires_cpp,
    results,
    rows,
    same_bits,
    threads,
    upstream_like,
)

SOURCES = Path(__file__).resolve().parents[1]
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def problem(name: str, batch: int, dtype: torch.dtype = D64):
    make, widths = FUNCTIONS[name]
    return make("cpp"), make("reference"), [x.to(dtype) for x in rows(batch, *widths)]


@requires_cpp
@every_function
def test_gradcheck(tile_rows, name):
    tile_rows(32)
    for batch in (1, 2, 35):
        function, _, inputs = problem(name, batch)
        assert gradcheck(function, [x.requires_grad_() for x in inputs], fast_mode=batch > 2)


def op_calls() -> list[tuple[str, tuple]]:
    """Calls of every op, with and without a column set."""
    x, y, messages = (e.detach() for e in (*ops.unit_rows(rows(7, 3, 3), D64), rows(7, 2)[0]))
    columns, column_messages = (e[2:5].clone() for e in (x, messages))
    upstream = torch.randn(7, 1, 1, dtype=D64)
    calls, both = torch.ops.gkd_fast, [True, True]
    settings = (0.4, 0.8, "float64")
    relation = calls.relation_kl([x], [y], *settings)
    contrast = calls.node_contrast([x], [y], [True], 0.4, "float64", True)
    variance = torch.tensor(2.0, dtype=D64)
    conv = calls.graph_conv(x, messages, variance, "symmetric", "float64")
    tangent, rates = torch.randn(7, 3, dtype=D64), torch.randn(7, dtype=D64)
    log_sums = calls.neighbor_sums(x, variance, "float64")[0]
    of_others = (variance, "symmetric", "float64")
    others = calls.neighbor_conv(x, messages, log_sums, *of_others)
    moving = ([x], [y], [tangent], [True, False])
    relation_tangents = calls.relation_kl_tangent(*moving, *relation, *settings)
    contrast_tangents = calls.node_contrast_tangent(*moving, *contrast[1:], [True], 0.4, "float64")
    unit, norms = calls.unit_rows([x, y], D64)
    part, row_upstream = slice(2, 5), upstream.flatten()
    info = calls.info_nce(x, y, 0.4, "float64")
    pairs = [x, y], torch.rand(2, 7, dtype=D64) / 7, torch.tensor([1e-7], dtype=D64)
    along = [tangent], [True, False], torch.rand(2, 7, dtype=D64), torch.zeros(1, dtype=D64)
    counts, graph_upstream = torch.tensor([4, 0, 2]), torch.randn(3, 5, dtype=D64)
    graphs = [torch.randn(3, 5, 2, dtype=D64) for _ in range(2)], torch.rand(2, 3, 5, dtype=D64), pairs[2].expand(1, 3)
    graphs_along = graphs[0][:1], [True, False], torch.rand(2, 3, 5, dtype=D64), torch.zeros(1, 3, dtype=D64)
    return [
        ("unit_rows", ([x.clone().requires_grad_(), y], D64)),
        ("unit_rows_backward", (unit, unit, norms, torch.float32)),
        ("relation_kl", ([x.clone().requires_grad_()], [y], *settings)),
        ("relation_kl", ([columns], [y[part]], *settings, [x], [y], 2)),
        ("relation_kl_backward", (upstream, [x], [y], *relation, *settings, [False, True])),
        ("relation_kl_keep", ([x], [y], *settings)),
        ("node_contrast", ([x.clone().requires_grad_()], [y], [True], 0.4, "float64", True)),
        ("node_contrast", ([columns], [y[part]], [True], 0.4, "float64", False, [y], 2)),
        ("node_contrast_backward", (upstream, [x], [y], *contrast[1:], [True], 0.4, "float64", both)),
        ("graph_degrees", (x, variance, "float64")),
        ("graph_degrees", (columns, variance, "float64", x, 2)),
        ("graph_conv", (x.clone().requires_grad_(), messages, variance, "symmetric", "float64")),
        ("graph_conv", (columns, column_messages, variance, "row", "float64", x, messages, 2)),
        ("graph_conv_keep", (x, messages, variance, "symmetric", "float64")),
        ("graph_conv_backward", (messages, x, messages, *conv, variance, "symmetric", "float64", both)),
        ("neighbor_sums", (x, variance, "float64")),
        ("neighbor_sums", (columns, variance, "float64", x, 2)),
        ("neighbor_conv", (x.clone().requires_grad_(), messages, log_sums, *of_others)),
        ("neighbor_conv", (columns, column_messages, log_sums[2:5], variance, "row", "float64", x, messages, 2)),
        ("neighbor_conv_keep", (x, messages, *of_others)),
        ("neighbor_conv_backward", (messages, x, messages, log_sums, rates, *of_others)),
        ("neighbor_conv_terms", (messages, messages, others, others, "float64")),
        ("neighbor_conv_terms", (messages, messages, others, None, "float64", messages, messages)),
        ("neighbor_conv_gradients", (messages, x, messages, others, log_sums, *of_others, both)),
        ("neighbor_sums_tangent", (x, tangent, log_sums, variance, "float64")),
        ("neighbor_conv_tangent", (x, tangent, messages, messages, log_sums, rates, *of_others)),
        ("neighbor_conv_double_backward",
         (messages, x, tangent, messages, messages, log_sums, rates, rates, rates, *of_others)),
        ("info_nce", (x.clone().requires_grad_(), y, 0.4, "float64")),
        ("info_nce_backward", (row_upstream, x, y, info[1], 0.4, "float64", both)),
        ("pair_sums", ("pkt", *pairs, "float64")),
        ("pair_sums", ("pkt", [columns, y[part]], pairs[1][:, part], pairs[2], "float64", *pairs[:2], 2)),
        ("pair_sums_backward", ("pkt", row_upstream, *pairs, "float64", both)),
        ("pair_sums_tangent", ("pkt", *pairs, *along, "float64")),
        ("pair_sums_double_backward", ("pkt", row_upstream, *pairs, *along, "float64", both)),
        ("batched_pair_sums", ("pkt", *graphs, "float64", counts)),
        ("batched_pair_sums_backward", ("pkt", graph_upstream, *graphs, "float64", both, counts)),
        ("batched_pair_sums_tangent", ("pkt", *graphs, *graphs_along, "float64", counts)),
        ("batched_pair_sums_double_backward", ("pkt", graph_upstream, *graphs, *graphs_along, "float64", both, counts)),
        ("batched_rkd_angle", (graphs[0][0].clone().requires_grad_(), graphs[0][1], counts)),
        ("batched_rkd_angle_backward", (graph_upstream, *graphs[0], both, counts)),
        ("rkd_angle", (x.clone().requires_grad_(), y)),
        ("rkd_angle_backward", (row_upstream, x, y, both)),
        ("relation_kl_tangent", (*moving, *relation, *settings)),
        ("relation_kl_double_backward", (upstream, *moving, *relation, *relation_tangents, *settings, both)),
        ("node_contrast_tangent", (*moving, *contrast[1:], [True], 0.4, "float64")),
        ("node_contrast_double_backward",
         (upstream, *moving, *contrast[1:], contrast_tangents[1], [True], 0.4, "float64", both)),
        ("graph_degrees_tangent", (x, tangent, variance, "float64")),
        ("graph_conv_tangent", (x, tangent, [messages], [rates], messages, variance, "float64")),
        ("graph_conv_double_backward",
         (x, tangent, messages, messages, rates, rates, messages, rates, rates, variance, "float64")),
    ]  # fmt: skip


@requires_cpp
def test_opcheck_of_every_op():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gkd_fast::")}
    # Triton kernels alone, whose tests check these.
    stages = {f"gkd_fast::{name}" for name in import_module("gkd_fast.ops.graph_conv_stages").OPS}
    assert {f"gkd_fast::{name}" for name, _ in op_calls()} == registered - stages
    for name, arguments in op_calls():
        opcheck(getattr(torch.ops.gkd_fast, name).default, arguments)


@requires_cpp
@every_function
def test_inputs_stay_and_a_second_backward_gives_the_same_bits(tile_rows, name):
    tile_rows(32)
    function, _, inputs = problem(name, 67, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    value, upstream = output.detach().clone(), upstream_like(output)
    given = upstream.clone()
    first, second = (torch.autograd.grad(output, leaves, upstream, retain_graph=True) for _ in range(2))
    assert same_bits(first, second)
    assert same_bits([*leaves, upstream, output], [*inputs, given, value])


@requires_cpp
@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(name, dtype):
    function, _, inputs = problem(name, 37, dtype)
    wide = [torch.stack([x, torch.full_like(x, math.nan)], dim=2)[..., 0] for x in inputs]
    transposed = [x.T.contiguous().T for x in inputs]
    expected = results(function, inputs)
    assert not any(x.is_contiguous() for x in wide)
    assert same_bits(results(function, wide), expected) and same_bits(results(function, transposed), expected)
    # One row for all, and an upstream that is one number for all.
    shared = [x[:1].expand(x.shape) for x in inputs]
    assert same_bits(results(function, shared), results(function, [x.contiguous() for x in shared]))
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    summed, ones = (torch.autograd.grad(y, leaves, g, retain_graph=True) for y, g in
                    ((output.sum(), None), (output, torch.ones_like(output))))  # fmt: skip
    assert same_bits(summed, ones)


@requires_cpp
@every_function
def test_gradients_are_computed_where_they_are_wanted_and_nowhere_else(name):
    function, definition, inputs = problem(name, 9)
    op = name.split()[0].rstrip(",")
    for wanted in ([k] for k in range(len(inputs))):
        leaves = [x.clone().requires_grad_(k in wanted) for k, x in enumerate(inputs)]
        with Calls() as calls:
            output = function(*leaves)
            gradients = torch.autograd.grad(output, [leaves[k] for k in wanted], upstream_like(output))
        (call,) = calls.arguments("neighbor_conv_gradients" if op == "neighbor_conv" else f"{op}_backward")
        assert [bool(x) for x in call["needs"]] == [k in wanted for k in range(len(inputs))]
        assert len(calls.arguments("unit_rows_backward")) == (not op.endswith("_conv") or wanted == [0])
        expected = results(definition, inputs)[1:]
        torch.testing.assert_close(gradients, tuple(expected[k] for k in wanted), rtol=1e-10, atol=1e-10)
    with Calls() as calls:
        output = function(*inputs)
    assert not output.requires_grad and calls.arguments(op)
    if op == "node_contrast":
        assert not calls.arguments(op)[0]["keep_weighted"]


@requires_cpp
@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time_and_for_any_number_of_threads(tile_rows, name, dtype):
    """Five blocks of rows, which two and three threads share unequally."""
    tile_rows(32)
    function, _, inputs = problem(name, 131, dtype)
    with threads(1):
        expected = results(function, inputs)
    for count, repeats in ((1, 20), (2, 50), (3, 30)):
        with threads(count):
            assert all(same_bits(results(function, inputs), expected) for _ in range(repeats))


@requires_cpp
@pytest.mark.parametrize("blocks", [2, 7, 16, 17, 24, 31, 47, 64, 66, 71])
def test_the_symmetric_walk_serves_any_number_of_blocks(tile_rows, blocks):
    """From 16 blocks on they meet in groups of two and more, the last of which can be smaller."""
    tile_rows(32)
    nodes, messages = rows(32 * blocks - 5, 3, 2)
    function, definition = ops_cases.graph_conv(), ops_cases.graph_conv(backend="reference")
    expected = results(function, [nodes, messages])
    for found, exact in zip(expected, results(definition, [nodes, messages]), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    for count in (2, 3, 4):
        with threads(count):
            assert same_bits(results(function, [nodes, messages]), expected)


@requires_cpp
@every_function
def test_every_instruction_set(tile_rows, instruction_sets, name):
    tile_rows(32)
    available, use = instruction_sets
    assert available[-1] == "baseline"
    # 1/τ
    gain = 100 if "own shifts" in name else 10
    for dtype in (D64, torch.float32, torch.bfloat16):
        function, definition, inputs = problem(name, 67, dtype)
        for instruction_set in available:
            use(instruction_set)
            check(function, definition, [inputs], dtype, gain)


@requires_cpp
def test_an_unknown_instruction_set_or_tile_is_an_error():
    from gkd_fast import _C

    with pytest.raises(ValueError, match="no instruction set mmx"):
        _C._set_instruction_set("mmx")
    with pytest.raises(ValueError, match="multiple of 32"):
        _C._set_block(33)


@requires_cpp
@every_function
def test_compiled_functions_follow_the_batch_size(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for batch in (5, 9, 33, 2, 70):
        function, _, inputs = problem(name, batch)
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        assert same_bits(results(compiled, inputs), results(function, inputs))
    assert counter.frame_count <= 2


@requires_cpp
def test_compiled_by_the_default_backend():
    torch._dynamo.reset()
    function, _, inputs = problem("relation_kl", 9)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs), results(function, inputs), rtol=1e-12, atol=1e-12)


@requires_cpp
def test_every_compilation_takes_the_product_setting_of_its_time():
    before = torch.get_float32_matmul_precision()
    function, _, inputs = problem("relation_kl", 9, torch.float32)
    used = []

    def backend(graph, _):
        used.extend(a for node in graph.graph.nodes for a in node.args if a in ("float32", "tf32", "bfloat16"))
        return graph

    try:
        for setting in ("highest", "high", "medium"):
            torch._dynamo.reset()
            torch.set_float32_matmul_precision(setting)
            torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    finally:
        torch.set_float32_matmul_precision(before)
        torch._dynamo.reset()
    assert used == ["float32", "tf32", "bfloat16"]


@requires_cpp
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ("relation_kl", [x], [x[:2]], 0.1, 1.0, "float32"), "teachers must have 5 rows, got 2"),
        (lambda x: ("relation_kl", [x], [x.double()], 0.1, 1.0, "float32"), "teachers must be Float, got Double"),
        (
            lambda x: ("relation_kl", [x.half()], [x.half()], 0.1, 1.0, "float16"),
            "must be float32 or float64, got Half",
        ),
        (lambda x: ("relation_kl", [x], [x], 0.1, 1.0, "int8"), "unknown product precision int8"),
        (
            lambda x: ("relation_kl", [x], [x], 0.1, 1.0, "float32", [x]),
            "student_columns and teacher_columns go together",
        ),
        (lambda x: ("node_contrast", [x], [x[:, :2]], [True], 0.1, "float32", True), "all stages must have width 3"),
        (
            lambda x: ("node_contrast", [x], [x], [True, True], 0.1, "float32", True),
            "wanted must have an entry per pair",
        ),
        (lambda x: ("graph_conv", x, x[:2], x[0, 0], "row", "float32"), "messages must have 5 rows, got 2"),
        (lambda x: ("graph_conv", x, x, x[0], "row", "float32"), "inverse_variance must have no dimensions"),
        (
            lambda x: ("graph_conv", x, x, x[0, 0], "column", "float32"),
            "normalization must be row or symmetric, got column",
        ),
        (lambda x: ("graph_conv", x, x, x[0, 0], "symmetric", "float32", x, x), "needs both sides' degrees"),
    ],
)
def test_bad_arguments_of_an_op_say_what_is_wrong(call, message):
    name, *arguments = call(torch.ones(5, 3))
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.gkd_fast, name)(*arguments)


def test_a_compiler_gives_the_extension():
    """Else the tests of the kernels would be skipped without a word."""
    if backends.INTERPRETED or os.environ.get("GKD_FAST_NO_EXTENSION") == "1" or not shutil.which("c++"):
        pytest.skip("the extension was left out on purpose, or there is no compiler")
    assert MISSING is None


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A package folder of its own for the loader."""
    monkeypatch.setattr(backends, "PACKAGE", tmp_path)
    monkeypatch.setattr(backends, "BUILT_FOR", tmp_path / "_C.torch-version.txt")
    return tmp_path


def test_a_missing_extension_says_how_to_build_it(elsewhere):
    assert backends._load_extension() == f"the C++ extension is not built: {ops.HOW_TO_BUILD}"


@pytest.mark.parametrize(("recorded", "said"), [("1.0.0", "1.0.0"), (None, "an unknown version")])
def test_an_extension_of_another_pytorch_is_named_and_not_opened(elsewhere, monkeypatch, recorded, said):
    (elsewhere / "_C.abi.so").touch()
    if recorded:
        (elsewhere / "_C.torch-version.txt").write_text(recorded + "\n")
    monkeypatch.setattr(backends, "import_module", lambda name: pytest.fail(f"{name} was opened"))
    reason = backends._load_extension()
    assert reason.startswith(f"the C++ extension was built for PyTorch {said}, but {torch.__version__} is installed")
    assert "rebuild the C++ extension with `make install`" in reason


def test_auto_warns_once_where_the_extension_is_missing(monkeypatch, recwarn):
    monkeypatch.setattr(backends, "CPP_MISSING", "no such luck")
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(_arguments, "_warned", set())
    x, y = rows(5, 3, 3)
    for _ in range(2):
        assert torch.equal(functional.relation_kl(x, y), functional.relation_kl(x, y, backend="reference"))
    warnings = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert warnings == ["gkd_fast computes on cpu with the slow reference: no such luck"]
    with pytest.raises(RuntimeError, match="backend='cpp' is not available: no such luck"):
        functional.relation_kl(x, y, backend="cpp")


def test_the_package_works_without_its_extension_and_with_a_broken_one(tmp_path):
    package = tmp_path / "gkd_fast"
    shutil.copytree(Path(gkd_fast.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    script = "import torch, gkd_fast; print(gkd_fast.functional.relation_kl(*torch.randn(2, 5, 3)).shape)"

    def run() -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )

    without = run()
    assert "torch.Size([5, 1, 1])" in without.stdout
    assert (
        without.stderr.count("RuntimeWarning") == 1 and "build the C++ extension with `make install`" in without.stderr
    )
    suffix = ".so" if os.name == "posix" else ".pyd"
    (package / f"_C{suffix}").write_bytes(b"no library")
    (package / "_C.torch-version.txt").write_text(torch.__version__)
    broken = run()
    assert "torch.Size([5, 1, 1])" in broken.stdout and "the C++ extension does not load" in broken.stderr


def test_without_triton_the_package_imports_and_says_what_is_missing():
    script = """
import sys, torch
sys.modules["triton"] = None
from gkd_fast import functional
x = torch.randn(5, 3)
print(functional.relation_kl(x, x).shape)
try:
    functional.relation_kl(x, x, backend="triton")
except RuntimeError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=SOURCES, env=environment, capture_output=True, text=True, check=True)
    assert "torch.Size([5, 1, 1])" in done.stdout
    assert "backend='triton' is not available: Triton is missing" in done.stdout
    assert "install the triton package" in done.stdout


@pytest.mark.skipif(not (SOURCES / "setup.py").exists(), reason="needs the source folder")
def test_the_package_builds_without_the_extension_where_that_is_asked_for(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    environment = os.environ | {"GKD_FAST_NO_EXTENSION": "1"}
    subprocess.run(command, cwd=SOURCES, env=environment, capture_output=True, check=True)
    (package,) = tmp_path.glob("lib*/gkd_fast")
    assert (package / "functional.py").exists() and (package / "kernels" / "__init__.py").exists()
    assert not list(package.glob("_C*"))


@requires_cpp
@pytest.mark.parametrize("name", ["neighbor_sums", "neighbor_conv", "neighbor_conv_backward"])
def test_kernels_stand_before_the_strips(name):
    # Ops with a default for any device would give the right values without them.
    assert ops.has_kernels(name, torch.device("cpu")) and not ops.has_kernels(name, torch.device("xpu"))

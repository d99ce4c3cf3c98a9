"""How many launches an op makes in a CUDA graph, counted without a GPU: its launchers run on CPU tensors, with the
kernels left out."""

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.allocations import kernels_left_out, op_run
from bench.gpu.plans import Work

# From launch to launch in a graph on an H200, which small kernels take whatever they do: of the first version's ops at
# 1,024 rows, what was measured beyond the kernels' own predicted time, over their launches.
SECONDS = 2.5e-6
UNLAUNCHED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Counter(TorchDispatchMode):
    """Counts PyTorch's operations that write something."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        schema = function._schema
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in schema.arguments)
        if not is_view and schema.name.removeprefix("aten::") not in UNLAUNCHED:
            self.count += 1
        return function(*arguments, **(keywords or {}))


def counted(run: Callable[[], object]) -> int:
    launched: list = []
    with kernels_left_out(launched), Counter() as counter:
        run()
    return counter.count + len(launched)


def of(work: Work) -> int:
    """Of forward and backward on unit rows; node_contrast keeps its weighted sums where that spares a product."""
    options = {"normalization": work.normalization, "teachers_wanted": work.teachers_wanted}
    keep = not work.teachers_wanted
    return counted(op_run(work.op, work.batch, work.dim, work.stages, work.dtype, keep_weighted=keep, **options))

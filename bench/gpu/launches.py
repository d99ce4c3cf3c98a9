"""How many launches an op makes in a CUDA graph, counted without a GPU: its launchers run on CPU tensors, with the
kernels left out."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.allocations import kernels_left_out, op_run
from bench.gpu.plans import Work

UNLAUNCHED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Counter(TorchDispatchMode):
    """Counts PyTorch's operations that write something, if only one number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        schema = function._schema
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in schema.arguments)
        first = arguments[0] if arguments else None
        is_empty = isinstance(first, torch.Tensor) and first.numel() == 0
        if not is_view and not is_empty and schema.name.removeprefix("aten::") not in UNLAUNCHED:
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

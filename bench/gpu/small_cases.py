"""``python -m bench.gpu.small_cases``: every op, forward and backward, small, on a GPU: to be run under a sanitizer.

Few rows take the kernels of small batches, others the large ones, whose tiles here are ragged; wide rows go in strips.
"""

from bench import peers
from bench.cases import OPS, Case, problem

ROWS = (40, 300)
WIDTHS = (16, 100, 300)
DTYPES = ("bfloat16", "float32")


def small_cases(device: str = "cuda") -> list[Case]:
    return [
        Case(op, rows, width, 1, "symmetric" if op == "graph_conv" else None, dtype, device)
        for op in OPS for dtype in DTYPES for rows in ROWS for width in WIDTHS
    ]  # fmt: skip


def main() -> None:
    for case in small_cases():
        problem(case).results(peers.build("triton", case))
        print(case.name(), flush=True)


if __name__ == "__main__":
    main()

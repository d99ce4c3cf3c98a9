"""The check kernel: attention forward with an online softmax, whose like has been timed in public on these devices.

Not part of the library. It is compiled and read like the library's kernels, so that what the model predicts for it can
be held against published times (:data:`PUBLISHED`).
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from bench.gpu.devices import DEVICES
from bench.gpu.disassembly import read
from bench.gpu.model import DoesNotFit, predict
from gkd_fast.kernels import Specialization, compile


@triton.jit
def attention_forward(
    queries, keys, values, output, scale, length,
    HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_ROWS queries of one head and walks the keys; ``length`` is a multiple of both blocks."""
    head = tl.program_id(1).to(tl.int64) * length * HEAD
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    width = tl.arange(0, HEAD)
    q = tl.load(queries + head + rows[:, None] * HEAD + width[None, :])  # [BLOCK_ROWS, HEAD]
    largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, HEAD], tl.float32)
    key_tile = keys + head + columns[None, :] * HEAD + width[:, None]
    value_tile = values + head + columns[:, None] * HEAD + width[None, :]
    scale *= 1.4426950408889634  # log2 e: exponentials are taken in base 2
    for _ in range(0, length, BLOCK_COLUMNS):
        logits = tl.dot(q, tl.load(key_tile))  # [BLOCK_ROWS, BLOCK_COLUMNS]
        larger = tl.maximum(largest, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(values.dtype.element_ty), tl.load(value_tile), sums * shrink[:, None])
        largest = larger
        key_tile += BLOCK_COLUMNS * HEAD
        value_tile += BLOCK_COLUMNS * HEAD
    tl.store(output + head + rows[:, None] * HEAD + width[None, :], (sums / total[:, None]).to(output.dtype.element_ty))


def attention(arch: str, head: int, block_rows: int, block_columns: int, warps: int, stages: int) -> Specialization:
    pointers = dict.fromkeys(("queries", "keys", "values", "output"), "*fp16")
    constants = {"HEAD": head, "BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
    signature = pointers | {"scale": "fp32", "length": "i32"} | dict.fromkeys(constants, "constexpr")
    return Specialization(
        "attention", "attention_forward", "forward", arch, "float16", head, attention_forward, signature, constants,
        warps, stages, block_rows, block_columns, products=2, exponentials=1, polynomials=0, exemption=None,
        grid=lambda length: (length // block_rows, length // block_columns),
    )  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published speed of a Triton kernel like this one, not causal, float16, batch · heads · head = ``width``."""

    device: str
    head: int
    length: int
    width: int
    teraflops: float
    source: str

    def operations(self) -> float:
        return 4 * self.length**2 * self.width


FLASH_3 = "Shah et al., FlashAttention-3 (2024), figure 5, the bars named Triton"
TRITON_BENCH = "pytorch/benchmark, pull request {}, triton_tutorial_flash_v2"
PUBLISHED = (
    Published("A100", 64, 16384, 4 * 32 * 64, 166.6, "Triton's documentation, tutorial 06-fused-attention"),
    Published("H100", 64, 16384, 2048, 403, FLASH_3),
    Published("H100", 128, 16384, 2048, 395, FLASH_3),
    Published("H100", 128, 16384, 128 * 8 * 128, 420, TRITON_BENCH.format(2296)),
    Published("H100", 128, 16384, 2048, 477, TRITON_BENCH.format(2391)),
    Published("B200", 128, 32768, 2048, 1605 / 2.7, "Zadouri et al., FlashAttention-4 (2026): 1,605, 2.7 × Triton's"),
)
# Of what the published kernel's tuner chooses from, the ones that can hold a head of 128.
TILES = ((128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 32, 4), (64, 64, 4))
STAGES = 3


@dataclass(frozen=True)
class Check:
    published: Published
    predicted: float  # TFLOP/s of the best tile sizes
    tile: tuple[int, int, int]  # rows, columns, warps


def check(published: Published) -> Check:
    """The model's best over the tile sizes, as the published figure is the tuner's best."""
    device = next(device for device in DEVICES if device.name == published.device)
    found = []
    for tile in TILES:
        spec = attention(device.arch, published.head, *tile, STAGES)
        binary = read(compile(spec))
        programs = spec.programs(published.length) * published.width // published.head
        try:
            prediction = predict(binary, device, programs, spec.trips(published.length))
        except DoesNotFit:
            continue
        found.append(Check(published, published.operations() / prediction.seconds / 1e12, tile))
    return max(found, key=lambda x: x.predicted)

"""Published ceilings of the devices that times are predicted for, and the limits that decide how many programs fit.

Sources, by the letters in :data:`DEVICES`:

[A] NVIDIA A100 Tensor Core GPU Architecture (whitepaper): multiprocessors, boost clock, products per clock, caches.
[H] NVIDIA H100 Tensor Core GPU Architecture (whitepaper): the same for Hopper; 989.4 TFLOP/s is 132 · 4,096 · 1.83 GHz.
[D] NVIDIA's data sheets of the H200 and of the HGX B200: bandwidths, and 2.25 PFLOP/s of dense bfloat16.
[C] CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" and "Technical Specifications per
    Compute Capability": lanes per clock, registers, shared memory, resident warps and blocks.
[F] Zadouri et al., FlashAttention-4 (2026), section 2: per multiprocessor of a B200 8,192 operations of the matrix
    unit, 16 exponentials and 128 bytes of shared memory per clock.
[L] Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking (2024):
    the warp-wide matrix instruction reaches 63 % of what the warpgroup-wide one does on Hopper.
[K] Chips and Cheese, Nvidia's H100: Funny L2, and Tons of Bandwidth (2023): 5.5 TB/s from the second-level cache,
    which the whitepaper does not give.
Ours, for want of a published figure: the B200's second-level cache at twice the H100's (two dies), its warp-wide matrix
instruction at Hopper's absolute rate, its tensor memory at 512 bytes per clock; integer lanes serve packed conversions.
"""

from dataclasses import dataclass

KIBIBYTE = 1024
REGISTERS = 65536
REGISTER_UNIT = 8  # a thread's registers are allotted in units of eight
RESERVED_SHARED = KIBIBYTE  # the driver's own part of every block's shared memory
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Device:
    """Rates are per clock and multiprocessor, for the whole multiprocessor."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    products: dict[str, int]  # multiply-adds of the matrix unit by operand type
    float_lanes: int
    double_lanes: int
    shared_memory: int  # bytes that resident programs share
    memory_bandwidth: float  # bytes per second
    cache_bandwidth: float  # bytes per second from the second-level cache
    warp_matrix_share: float = 1.0  # what the warp-wide matrix instruction (HMMA) reaches of ``products``
    integer_lanes: int = 64
    exponential_lanes: int = 16
    shared_bytes: int = 128
    tensor_memory_bytes: int = 512
    issue_slots: int = 4
    max_warps: int = 64
    max_programs: int = 32

    def seconds(self, cycles: float) -> float:
        return cycles / (self.gigahertz * 1e9)

    def resident_programs(self, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
        """How many programs one multiprocessor holds at a time; 0 if not even one fits."""
        per_thread = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
        limits = [self.max_programs, self.max_warps // warps, REGISTERS // max(1, per_thread * 32 * warps)]
        limits.append(self.shared_memory // (shared + RESERVED_SHARED))
        if tensor_columns:
            limits.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
        return min(limits)


    def cache_bytes(self) -> float:
        """Bytes per clock and multiprocessor from the second-level cache, all multiprocessors reading."""
        return self.cache_bandwidth / (self.gigahertz * 1e9) / self.multiprocessors


def _hopper(name: str, memory_bandwidth: float) -> Device:
    return Device(
        name, "sm_90", 132, 1.83, {"16-bit": 2048, "tf32": 1024, "float64": 128}, 128, 64, 228 * KIBIBYTE,
        memory_bandwidth, 5.5e12, warp_matrix_share=0.63,
    )  # fmt: skip


DEVICES = (
    # [A] [C]; the cache reads 5,120 bytes per clock
    Device(
        "A100", "sm_80", 108, 1.41, {"16-bit": 1024, "tf32": 512, "float64": 64}, 64, 32, 164 * KIBIBYTE, 2.039e12,
        5120 * 1.41e9,
    ),
    _hopper("H100", 3.35e12),  # [H] [C] [L] [K]
    _hopper("H200", 4.8e12),  # [D]: the H100's multiprocessors with faster memory
    # [D] [C] [F]
    Device(
        "B200", "sm_100", 148, 1.85, {"16-bit": 4096, "tf32": 2048, "float64": 64}, 128, 64, 228 * KIBIBYTE, 8e12, 11e12,
        warp_matrix_share=0.315,
    ),
)  # fmt: skip


def of_arch(arch: str) -> list[Device]:
    return [device for device in DEVICES if device.arch == arch]

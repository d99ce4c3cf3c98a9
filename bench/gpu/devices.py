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

from dataclasses import dataclass, field

KIBIBYTE = 1024


@dataclass(frozen=True)
class Limits:
    """What the programs resident on one multiprocessor share."""

    shared_memory: int
    max_warps: int
    max_programs: int
    registers: int = 65536
    register_unit: int = 8  # a thread's registers are allotted in units
    reserved_shared: int = KIBIBYTE  # the driver's own part of each program's shared memory
    threads_per_warp: int = 32
    tensor_columns: int = 512

    def resident_programs(self, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
        """How many programs one multiprocessor holds at a time; 0 if not even one fits."""
        per_thread = max(1, -(-registers // self.register_unit)) * self.register_unit
        fitting = [self.max_programs, self.max_warps // warps]
        fitting.append(self.registers // (per_thread * self.threads_per_warp * warps))
        fitting.append(self.shared_memory // (shared + self.reserved_shared) if shared else self.max_programs)
        if tensor_columns:
            fitting.append(self.tensor_columns // tensor_columns)
        return min(fitting)


# [C]; gfx942: AMD CDNA 3 Instruction Set Architecture, four SIMDs of 512 registers × 64 lanes, 64 KiB of shared memory.
LIMITS = {
    "sm_80": Limits(164 * KIBIBYTE, 64, 32),
    "sm_86": Limits(100 * KIBIBYTE, 48, 16),
    "sm_90": Limits(228 * KIBIBYTE, 64, 32),
    "sm_100": Limits(228 * KIBIBYTE, 64, 32),
    "gfx942": Limits(64 * KIBIBYTE, 32, 32, registers=4 * 512 * 64, reserved_shared=0, threads_per_warp=64),
}


@dataclass(frozen=True)
class Calibration:
    """What measured times say beyond the published rates."""

    clocks: dict[str, float] = field(default_factory=dict)  # factors of a unit's clocks; 1 for the others
    wait: float = 0  # clocks per wait of a step (bench.gpu.units.WAITS)
    shallow: float = 0  # clocks per step whose loads have two stages: a tile's load is longer than a tile's products
    apart: float = 0  # share of a step in which the groups of four warps of a program are out of step
    together: float = (
        0  # share of a step's loads that resident programs make together: the same columns, which come once
    )


@dataclass(frozen=True)
class Device:
    """Rates are per clock for a whole multiprocessor, bandwidths in bytes per second for the whole device."""

    name: str
    arch: str
    multiprocessors: int
    gigahertz: float
    products: dict[str, int]  # multiply-adds of the matrix unit by operand type
    float_lanes: int
    double_lanes: int
    memory_bandwidth: float
    cache_bandwidth: float  # of the second-level cache, reading
    warp_matrix_share: float = 1.0  # what the warp-wide matrix instruction (HMMA) reaches of ``products``
    integer_lanes: int = 64
    exponential_lanes: int = 16
    shared_bytes: int = 128
    tensor_memory_bytes: int = 512
    issue_slots: int = 4
    calibration: Calibration = Calibration()

    def seconds(self, cycles: float) -> float:
        return cycles / (self.gigahertz * 1e9)

    def cache_bytes(self) -> float:
        """Bytes per clock and multiprocessor from the second-level cache, all multiprocessors reading."""
        return self.cache_bandwidth / (self.gigahertz * 1e9) / self.multiprocessors


# From launch to launch in a CUDA graph on an H200, which the smallest kernels take whatever they do.
LAUNCH_SECONDS = 2.5e-6

# What bench.gpu.calibration.fit finds on every second one of the times measured on an H200. A fit, not
# properties of the chip: factors below 1 also stand for what a program's own units do at the same time.
HOPPER_CALIBRATION = Calibration(
    {"integer": 1.0, "exponential": 0.8, "matrix": 1.1, "cache": 0.9}, wait=30, shallow=350, apart=0.3, together=0.4
)


def _hopper(name: str, memory_bandwidth: float) -> Device:
    products = {"16-bit": 2048, "tf32": 1024, "float64": 128}
    return Device(
        name, "sm_90", 132, 1.83, products, 128, 64, memory_bandwidth, 5.5e12,
        warp_matrix_share=0.63, calibration=HOPPER_CALIBRATION,
    )  # fmt: skip


AMPERE_PRODUCTS = {"16-bit": 1024, "tf32": 512, "float64": 64}
BLACKWELL_PRODUCTS = {"16-bit": 4096, "tf32": 2048, "float64": 64}
DEVICES = (
    Device("A100", "sm_80", 108, 1.41, AMPERE_PRODUCTS, 64, 32, 2.039e12, 5120 * 1.41e9),  # [A] [C]
    _hopper("H100", 3.35e12),  # [H] [C] [L] [K]
    _hopper("H200", 4.8e12),  # [D]: the H100's multiprocessors with faster memory
    Device(
        "B200", "sm_100", 148, 1.85, BLACKWELL_PRODUCTS, 128, 64, 8e12, 11e12, warp_matrix_share=0.315
    ),  # [D] [C] [F]
)


def of_arch(arch: str) -> list[Device]:
    return [device for device in DEVICES if device.arch == arch]

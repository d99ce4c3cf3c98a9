"""What is timed as one, and what a pass of it launches, copies and multiplies."""

from dataclasses import dataclass

from bench.gpu import devices

SMALL_BATCH = 256  # gkd_fast.kernels.common.small's, which needs Triton
# Rows are copied as products take them, in so many bytes a number.
COPIED_TYPES = {"bfloat16": 2, "float16": 2, "tf32": 4, "tf32x3": 4, "float32": 4}
PLANNED = ("relation_kl", "node_contrast", "graph_conv", "unit_rows")
# What cuBLAS reached of the published rate on an H200, on strips of 4,096 rows 768 wide in bfloat16.
CUBLAS_SHARE = 0.64
# What is timed: forward; forward and backward; these and the double backward.
DIRECTIONS = ("forward", "backward", "double backward")


@dataclass(frozen=True)
class Work:
    """What is timed as one: an op's direction at one size on one device, with those before it in ``DIRECTIONS``."""

    device: str
    op: str
    direction: str
    dtype: str
    dim: int
    stages: int
    batch: int
    normalization: str = "symmetric"  # of graph_conv
    teachers_wanted: bool = False  # whether teachers have gradients too


@dataclass(frozen=True)
class Plan:
    """The kernels that a direction of an op launches, the matrices [B, D] that are copied in the product's type for
    them, and the products [B, B] × [B, D] that are cuBLAS's.
    """

    kernels: tuple[str, ...] = ()
    copies: int = 0
    products: int = 0


def plan(work: Work) -> Plan:
    """Of one direction alone, of rows that fit a program; gradients to students, or to nodes and messages. Empty for
    ops that are not timed.
    """
    if work.op not in PLANNED:
        return Plan()
    if work.direction == "double backward":
        return second_order_plan(work)
    return small_plan(work) if work.batch <= SMALL_BATCH else large_plan(work)


def small_plan(work: Work) -> Plan:
    forward = work.direction == "forward"
    if work.op == "unit_rows":
        return large_plan(work)
    if work.op == "relation_kl":
        return Plan(("relation_small_losses" if forward else "relation_small_gradients",))
    if work.op == "node_contrast":
        return Plan(("contrast_small_losses" if forward else "contrast_small_gradients",))
    name = "graph_small_sums, symmetric"
    return Plan((name,) if forward else (f"{name}, backward", "graph_small_gradients"))


def large_plan(work: Work) -> Plan:
    forward, stages = work.direction == "forward", work.stages
    if work.op == "relation_kl":
        kernels = ("relation_sums",) if forward else ("relation_factors", "relation_gradients")
        return Plan(kernels, 2 * stages)
    if work.op == "node_contrast":
        if keeps_weighted(work):
            return Plan(("contrast_sums",), 2 * stages) if forward else Plan(("contrast_differences",))
        kernels = ("contrast_sums without weighted",) if forward else ("contrast_gradients of students",)
        return Plan(kernels, 2 * stages)
    if work.op == "unit_rows":
        return Plan(("unit_rows_forward" if forward else "unit_rows_gradient",))
    # Operands of the nodes and of one (H) or two (H', G') lists of values.
    operands = ("row_sums of graph_conv", "round_rows of graph_conv")
    if forward and work.normalization == "row":
        return Plan((*operands * 2, "graph_sums, row"))
    if forward:
        return Plan((*operands * 2, "graph_degree_sums", "graph_sums, symmetric"))
    return Plan((*operands * 3, "graph_sums, symmetric", "graph_terms", "graph_gradients"))


def wide_seconds(work: Work, device: devices.Device) -> float:
    """Forward and backward of rows that go in strips, S = T = 1: cuBLAS's products, and the kernels' passes over strips
    that memory limits.

    The strips' weights are of the product's type; the float32 similarities are read as often as products are not
    gathers.
    """
    size = COPIED_TYPES.get(work.dtype, 8 if work.dtype == "float64" else 4)
    sums = max(size, 4)
    if work.op == "relation_kl":
        products, entry = 5 + work.teachers_wanted, 4 * sums + size * (1 + work.teachers_wanted)
    elif work.op == "node_contrast":
        products, entry = (4, 2 * sums + size) if work.teachers_wanted else (2, sums + size)
    else:
        degrees = work.normalization == "symmetric"
        products, entry = 8 + degrees, (4 + degrees) * sums + 3 * size
    rate = device.products.get("16-bit" if size == 2 else work.dtype, device.float_lanes) * CUBLAS_SHARE
    clocks = products * work.batch**2 * work.dim / (rate * device.multiprocessors)
    return device.seconds(clocks) + entry * work.batch**2 / device.memory_bandwidth


def second_order_plan(work: Work) -> Plan:
    """Students, or nodes and messages, move. Rows and their tangents are copied for every pass, columns and theirs too,
    and in relation_kl and graph_conv for every strip of rows. Not counted: sums and products of vectors, and
    unit_rows', which PyTorch makes.
    """
    from gkd_fast.kernels.common.strips import strip_rows

    stages, strips = work.stages, -(-work.batch // strip_rows(work.dim))
    if work.op == "relation_kl":
        kernels = ("relation_tangent_sums, students moving", "relation_double_gradients of students, students moving")
        return Plan(kernels, len(kernels) * stages**2 * 3 * (1 + strips), 2 * stages**2)
    if work.op == "node_contrast":
        kernels = ("contrast_double_gradients of students, student moving",)
        if not keeps_weighted(work):
            kernels = ("contrast_tangent_sums, student moving", *kernels)
        return Plan(kernels, len(kernels) * stages**2 * 4, stages**2)
    if work.op == "unit_rows":
        return Plan()
    weights, gradients = "graph_tangent_weights", "graph_double_gradients, nodes and messages moving"
    # Degrees: nodes and tangents; twice the weights: also two operands; gradients: also G', H' and extra.
    return Plan(("graph_degree_tangents", weights, weights, gradients), (2 + 2 * 2 + 5) + strips * (2 + 2 * 4 + 5), 6)


def keeps_weighted(work: Work) -> bool:
    """Whether node_contrast keeps the weighted sums of its forward pass."""
    from gkd_fast.ops.node_contrast import KEEP_WEIGHTED_BYTES

    return work.stages**2 * work.batch * work.dim * 4 <= KEEP_WEIGHTED_BYTES


def cublas_seconds(work: Work, device: devices.Device, products: int) -> tuple[float, str]:
    """Products of strips of weights at the published ceilings; the strips, just written, come from the cache."""
    kind = {"bfloat16": "16-bit", "float16": "16-bit"}.get(work.dtype, work.dtype)
    rate = device.products.get(kind, device.float_lanes)  # float32 has no matrix unit
    clocks = products * work.batch**2 * work.dim / (rate * device.multiprocessors)
    weights = products * work.batch**2 * COPIED_TYPES.get(work.dtype, 8 if work.dtype == "float64" else 4)
    return max((device.seconds(clocks), "matrix"), (weights / device.cache_bandwidth, "cache"))

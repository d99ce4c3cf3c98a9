"""Checks of the public functions' arguments, and what follows from them: types, the backend, the product precision."""

import math
import numbers
import operator
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gkd_fast import ops
from gkd_fast._autocast import autocast_enabled

BACKENDS = ("auto", "reference", "cpp", "triton")
# What neighbors="auto" and self_weight="auto" stand for where bandwidth="auto", chosen on validation images
# (docs/results.md); elsewhere for None: a graph with K_ii = 1.
DEFAULT_NEIGHBORS: float | None = 8.0
DEFAULT_SELF_WEIGHT: float | None = 0.8
NORMALIZATIONS = ("symmetric", "row")


def check_bandwidth(bandwidth: float | Tensor | str) -> float | Tensor | str:
    """A bandwidth that :func:`graph_conv` takes, numbers of any kind as floats; ValueError or TypeError for others."""
    if isinstance(bandwidth, str):
        if bandwidth != "auto":
            raise ValueError(f"bandwidth must be a positive number or 'auto', got {bandwidth!r}")
        return bandwidth
    return check_width("bandwidth", bandwidth)


def check_width(name: str, width: float | Tensor) -> float | Tensor:
    """A positive number, any kind as a float, or a 0-dim tensor; ValueError or TypeError for others."""
    if isinstance(width, Tensor):
        if width.dim() != 0:
            raise ValueError(f"{name} must have no dimensions when it is a Tensor, got {tuple(width.shape)}")
        if width.is_complex() or width.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number, got a Tensor of {width.dtype}")
        return width
    return check_positive(name, width)


def check_graph(
    bandwidth: float | Tensor | str, neighbors: float | str | None, self_weight: float | str | None
) -> tuple[float | Tensor | str, float | None, float | None]:
    """Bandwidth, neighbours and the own message's weight as :func:`graph_conv` takes them, the last two resolved."""
    bandwidth = check_bandwidth(bandwidth)
    is_auto = isinstance(bandwidth, str)
    if isinstance(neighbors, str):
        if neighbors != "auto":
            raise ValueError(f"neighbors must be a number, None or 'auto', got {neighbors!r}")
        neighbors = DEFAULT_NEIGHBORS if is_auto else None
    elif neighbors is not None:
        neighbors = check_positive("neighbors", neighbors)
        if neighbors < 1:
            raise ValueError(f"neighbors must be at least 1, got {neighbors}")
        if not is_auto:
            raise ValueError(f"neighbors={neighbors:g} finds the bandwidth, which must then be 'auto', got {bandwidth}")
    if isinstance(self_weight, str):
        if self_weight != "auto":
            raise ValueError(f"self_weight must be a number, None or 'auto', got {self_weight!r}")
        self_weight = DEFAULT_SELF_WEIGHT if is_auto else None
    elif self_weight is not None:
        self_weight = check_factor("self_weight", self_weight)
        if self_weight > 1:
            raise ValueError(f"self_weight must be from 0 to 1, got {self_weight}")
    return bandwidth, neighbors, self_weight


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_flag(name: str, value: bool) -> bool:
    """The value, True or False of any kind or 1 or 0, as a bool; TypeError for others."""
    if isinstance(value, (bool, numbers.Integral)) or type(value).__name__ == "bool_":
        if value in (0, 1):
            return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def select_backend(backend: str, tensor: Tensor) -> str:
    """The backend that runs, or an error that says what is missing."""
    check_choice("backend", backend, BACKENDS)
    device = tensor.device
    if backend == "auto":
        chosen = {"cpu": "cpp", "cuda": "triton"}.get(device.type)
        reason = ops.missing(chosen, device) if chosen else "there are no kernels for this device"
        if chosen and reason is None:
            return chosen
        if device.type == "meta":  # Nothing is computed.
            return "reference"
        warn_once(f"gkd_fast computes on {device.type} with the slow reference: {reason}")
        return "reference"
    if backend != "reference" and (reason := ops.missing(backend, device)) is not None:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    return backend


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """A RuntimeWarning, the first time that it is given."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def product_precision(x: Tensor) -> str:
    """The type in which tiles are multiplied: the inputs' own, autocast's, or PyTorch's choice for float32."""
    dtype = x.dtype
    if autocast_enabled(x) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return _float32_products() if dtype == torch.float32 else str(dtype).removeprefix("torch.")


_PRODUCTS_OF_SETTING = {"highest": "float32", "high": "tf32", "medium": "bfloat16"}


def _float32_products() -> str:
    """PyTorch's setting for float32 products; a compiled function keeps the one that it was compiled under."""
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The newer per-backend settings are in use, which this one cannot express.
        setting = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    return _PRODUCTS_OF_SETTING[setting]


# What torch.compiler.assume_constant_result does once it has imported torch._dynamo, which takes two seconds.
_float32_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_features(name: str, x: Tensor, may_be_empty: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got a Tensor of layout {x.layout}")
    shape = x.shape
    if len(shape) != 2:
        raise ValueError(f"{name} must have 2 dimensions [batch, width], got shape {tuple(shape)}")
    if shape[1] == 0 or (shape[0] == 0 and not may_be_empty):
        raise ValueError(f"{name} must not be empty, got shape {tuple(shape)}")


def check_positive(name: str, value: float) -> float:
    """The value, a number of any kind, as a float; TypeError or ValueError unless it is positive and finite."""
    number = value if type(value) is float else _number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def check_factor(name: str, value: float) -> float:
    """The same of a number that may be 0."""
    number = _number(name, value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return number


def check_count(name: str, value: int, least: int = 1) -> int:
    """The value, a whole number of any kind, as an int; TypeError or ValueError unless it is at least ``least``."""
    if not is_whole(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def is_whole(value: object) -> bool:
    """Whether it is a whole number of any kind, NumPy's among them."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _number(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a number, got a Tensor of {value.dtype} and shape {tuple(value.shape)}")
        if value.device.type != "cpu" or value.requires_grad:
            why = "requires gradient, which it would not get" if value.requires_grad else f"is on {value.device}"
            raise TypeError(f"{name} must be a number, got a Tensor that {why}: pass {name}.item() if that is meant")
        return float(value.item())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def stages_of(name: str, stages: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A tensor, or several, as a list; TypeError for anything else."""
    if isinstance(stages, Tensor):
        return [stages]
    if isinstance(stages, (str, bytes, Mapping)) or hasattr(stages, "__array__") or not hasattr(stages, "__iter__"):
        raise TypeError(f"{name} must be a Tensor or a sequence of tensors, got {type(stages).__name__}")
    return list(stages)


def check_graph_stages(
    nodes: Sequence[Tensor], messages: Tensor | Sequence[Tensor], may_be_empty: bool
) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    nodes = stages_of("nodes", nodes)
    if isinstance(messages, Tensor):
        raise TypeError(
            f"nodes must be a Tensor, got {type(nodes).__name__}, or "
            "messages must be a sequence of tensors where nodes are one, got a Tensor"
        )
    messages = stages_of("messages", messages)
    if not nodes or len(messages) != len(nodes):
        raise ValueError(f"messages must hold as many stages as nodes ({len(nodes)}, at least 1), got {len(messages)}")
    named = {f"nodes[{k}]": x for k, x in enumerate(nodes)} | {f"messages[{k}]": x for k, x in enumerate(messages)}
    for name, x in named.items():
        check_features(name, x, may_be_empty)
        if x.shape[0] != nodes[0].shape[0]:
            raise ValueError(f"{name} must have as many rows as nodes[0] ({nodes[0].shape[0]}), got {x.shape[0]}")
    return nodes, messages, compute_dtype(named)


def check_stages(
    students: Tensor | Sequence[Tensor], teachers: Tensor | Sequence[Tensor], may_be_empty: bool
) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    students, teachers = stages_of("students", students), stages_of("teachers", teachers)
    named: dict[str, Tensor] = {}
    for side, stages in (("students", students), ("teachers", teachers)):
        if not stages:
            raise ValueError(f"{side} must hold at least one stage, got none")
        for k, x in enumerate(stages):
            named[f"{side}[{k}]"] = x
    for name, x in named.items():
        check_features(name, x, may_be_empty)
    batch = students[0].shape[0]
    for name, x in named.items():
        if x.shape[0] != batch:
            raise ValueError(f"{name} must have the batch size of students[0] ({batch}), got {x.shape[0]}")
    return students, teachers, compute_dtype(named)


def check_pairs(
    pairs: Sequence[tuple[int, int]] | None, num_students: int, num_teachers: int
) -> list[tuple[int, int]] | None:
    """The wanted pairs, sorted and each once; None for all."""
    if pairs is None:
        return None
    try:
        found = sorted({(operator.index(s), operator.index(t)) for s, t in pairs})
    except (TypeError, ValueError):
        raise TypeError(f"pairs must be a list of (student stage, teacher stage), got {pairs!r}") from None
    for s, t in found:
        if not (0 <= s < num_students and 0 <= t < num_teachers):
            raise ValueError(f"pairs must lie below ({num_students}, {num_teachers}), got ({s}, {t})")
    return None if len(found) == num_students * num_teachers else found


def check_bank(name: str, bank: Sequence[Tensor] | None, stages: Sequence[Tensor]) -> list[Tensor] | None:
    """The bank's tensors, None where it is empty."""
    if bank is None:
        return None
    bank = stages_of(name, bank)
    if len(bank) != len(stages):
        raise ValueError(f"{name} must hold a tensor for each of {len(stages)} stages, got {len(bank)}")
    for k, (x, stage) in enumerate(zip(bank, stages)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}[{k}] must be a floating point Tensor, got {got}")
        if x.dim() != 2:
            raise ValueError(f"{name}[{k}] must have 2 dimensions [size, width], got shape {tuple(x.shape)}")
        if x.shape[1] != stage.shape[1] or len(x) != len(bank[0]) or x.device != stage.device:
            raise ValueError(
                f"{name}[{k}] must have shape [{len(bank[0])}, {stage.shape[1]}] on {stage.device}, got "
                f"{tuple(x.shape)} on {x.device}"
            )
    return bank if len(bank[0]) else None


def check_banks(
    bank: tuple[Sequence[Tensor], Sequence[Tensor]] | None, students: list[Tensor], teachers: list[Tensor]
) -> list[Tensor] | None:
    """The bank's tensors of students and then of teachers, None where it is empty."""
    if bank is None:
        return None
    if not isinstance(bank, (tuple, list)) or len(bank) != 2:
        raise TypeError(f"bank must be a pair, tensors of the students and of the teachers, got {type(bank).__name__}")
    both: list[Tensor] = []
    for k, (side, stages) in enumerate(zip(bank, (students, teachers))):
        tensors = stages_of(f"bank[{k}]", side)
        if len(tensors) != len(stages):
            raise ValueError(f"bank[{k}] must hold a tensor for each of {len(stages)} stages, got {len(tensors)}")
        both += tensors
    return check_bank("bank", both, [*students, *teachers])


def bank_size(bank: list[Tensor] | None) -> int:
    return 0 if bank is None else len(bank[0])


def compute_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """float64 for float64 inputs, else float32; mixed types are an error, except under autocast, which mixes them."""
    (first_name, first), *others = tensors.items()
    device, dtype, is_double = first.device, first.dtype, first.dtype == torch.float64
    for name, x in others:
        if x.device != device:
            raise ValueError(f"{name} must be on the device of {first_name} ({device}), got {x.device}")
        if x.dtype != dtype:
            if not autocast_enabled(first):
                raise TypeError(f"{name} must have the type of {first_name} ({dtype}), got {x.dtype}")
            is_double = is_double or x.dtype == torch.float64
    return torch.float64 if is_double else torch.float32

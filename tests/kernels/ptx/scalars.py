"""What one thread's registers hold, and the instructions that work on them alone.

A register is an array of 64-bit words, one for each thread, or of one where all hold the same. Predicates are bool.
"""

import numpy as np

Array = np.ndarray
SHIFT = {16: 48, 32: 32, 64: 0}


def bits_of(kind: str) -> int:
    return 32 if kind == "tf32" else 16 if kind == "bf16" else int(kind.lstrip("bsuf"))


def as_type(words: Array, kind: str) -> Array:
    """The numbers that words hold: floating point, or 64-bit integers (unsigned if unsigned and 64 bits long)."""
    if kind == "f64":
        return words.view(np.float64)
    if kind == "f32":
        return words.astype(np.uint32).view(np.float32)
    if kind == "f16":
        return words.astype(np.uint16).view(np.float16)
    if kind == "bf16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "tf32":
        return (words.astype(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    shift = SHIFT[bits_of(kind)]
    if kind[0] == "s":
        return (words << np.uint64(shift)).view(np.int64) >> shift
    return (words << np.uint64(shift)) >> np.uint64(shift)


def to_words(numbers: Array, kind: str) -> Array:
    if kind == "f64":
        return np.ascontiguousarray(numbers, np.float64).view(np.uint64)
    if kind == "f32":
        return np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
    if kind == "f16":
        return np.ascontiguousarray(numbers, np.float16).view(np.uint16).astype(np.uint64)
    if kind == "bf16":
        bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        return np.where(np.isnan(numbers), np.uint64(0x7FFF), rounded)
    words = numbers if numbers.dtype == np.uint64 else numbers.astype(np.int64).view(np.uint64)
    return as_type(words, f"u{bits_of(kind)}")


FLOATS = ("f64", "f32", "f16", "bf16")


def _divide(x: Array, y: Array) -> Array:
    """Towards zero."""
    quotient = np.abs(x) // np.maximum(np.abs(y), 1)
    return np.where((x < 0) != (y < 0), -quotient, quotient)


_ARITHMETIC = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "neg": lambda x: -x, "abs": np.abs,
    "mad": lambda x, y, z: x * y + z, "fma": lambda x, y, z: x * y + z, "max": np.fmax, "min": np.fmin,
}  # fmt: skip
_FUNCTIONS = {
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "rcp": lambda x: 1 / x,
    "sin": np.sin, "cos": np.cos,
}  # fmt: skip
ROUNDINGS = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}
_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)), "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}  # fmt: skip
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def arithmetic(operation: tuple[str, ...], words: list[Array]) -> Array:
    name, kind = operation[0], operation[-1]
    if kind in FLOATS:
        numbers = [as_type(w, kind) for w in words]
        # A fused sum is rounded once; in float64 numpy has none.
        if name == "fma" or kind == "f16":
            numbers = [x.astype(np.float64) for x in numbers]
        if name == "div":
            return to_words(numbers[0] / numbers[1], kind)
        if "NaN" in operation:
            return to_words({"max": np.maximum, "min": np.minimum}[name](*numbers), kind)
        return to_words(_ARITHMETIC[name](*numbers), kind)
    bits = bits_of(kind)
    numbers = [as_type(w, kind) for w in words]
    if "wide" in operation and name == "mad":
        numbers[2] = words[2].view(numbers[0].dtype)
    if name in ("div", "rem"):
        quotient = _divide(*numbers) if kind[0] == "s" else numbers[0] // np.maximum(numbers[1], np.uint64(1))
        return to_words(quotient if name == "div" else numbers[0] - quotient * numbers[1], kind)
    if "hi" in operation:
        if bits != 32:
            raise NotImplementedError(".".join(operation))
        upper = (numbers[0] * numbers[1]) >> numbers[0].dtype.type(32)
        return to_words(upper + numbers[2] if name == "mad" else upper, kind)
    return to_words(_ARITHMETIC[name](*numbers), "u64" if "wide" in operation else kind)


def function(operation: tuple[str, ...], words: Array) -> Array:
    kind = operation[-1]
    return to_words(_FUNCTIONS[operation[0]](as_type(words, kind).astype(np.float64)), kind)


def compare(operation: tuple[str, ...], x: Array, y: Array) -> Array:
    """``setp``; an unordered comparison ("neu") is true of NaNs, an ordered one is not."""
    name, kind = operation[1], operation[-1]
    x, y = as_type(x, kind), as_type(y, kind)
    is_float = kind in FLOATS
    if is_float and name.endswith("u") and name[:-1] in _COMPARISONS:
        return _COMPARISONS[name[:-1]](x, y) | np.isnan(x) | np.isnan(y)
    result = _COMPARISONS[name](x, y)
    return result & ~(np.isnan(x) | np.isnan(y)) if is_float and name == "ne" else result


def logic(operation: tuple[str, ...], words: list[Array]) -> Array:
    name, kind = operation[0], operation[-1]
    words = words if kind == "pred" else [as_type(w, f"u{bits_of(kind)}") for w in words]
    if name == "not":
        return ~words[0] if kind == "pred" else to_words(~words[0], kind)
    return _LOGIC[name](*words)


def shift(operation: tuple[str, ...], words: Array, by: Array) -> Array:
    name, kind = operation[0], operation[-1]
    count = np.minimum(as_type(by, "u32"), np.uint64(63))
    if name == "shl":
        shifted = as_type(words, f"u{bits_of(kind)}") << count
        return to_words(np.where(as_type(by, "u32") > 63, np.uint64(0), shifted), kind)
    numbers = as_type(words, kind)
    return to_words(numbers >> (count.astype(np.int64) if kind[0] == "s" else count), kind)


def field(operation: tuple[str, ...], words: list[Array]) -> Array:
    """``bfe``: some bits out of a word, of which the last may be a sign."""
    kind = operation[-1]
    first, count = (as_type(w, "u32") & np.uint64(255) for w in words[1:])
    taken = (as_type(words[0], f"u{bits_of(kind)}") >> first) & ((np.uint64(1) << count) - np.uint64(1))
    if kind[0] == "s":
        sign = (taken >> (np.maximum(count, np.uint64(1)) - np.uint64(1))) & np.uint64(1)
        taken = np.where(sign == 1, taken - (np.uint64(1) << count), taken)
    return to_words(taken, kind)


def permute(words: list[Array]) -> Array:
    """``prmt``: four of the eight bytes of two words."""
    both = as_type(words[0], "u32") | as_type(words[1], "u32") << np.uint64(32)
    taken = np.zeros_like(both + words[2])
    for k in range(4):
        choice = words[2] >> np.uint64(4 * k)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(choice & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        taken |= byte << np.uint64(8 * k)
    return taken


def funnel(operation: tuple[str, ...], words: list[Array]) -> Array:
    """``shf``: 32 bits out of the 64 of two words."""
    both = as_type(words[0], "u32") | as_type(words[1], "u32") << np.uint64(32)
    count = as_type(words[2], "u32")
    count = np.minimum(count, np.uint64(32)) if "clamp" in operation else count & np.uint64(31)
    return to_words(both >> count if "r" in operation else (both << count) >> np.uint64(32), "b32")


def look_up(words: list[Array], table: int) -> Array:
    """``lop3``: a function of three words by its table of eight bits."""
    a, b, c = (as_type(w, "u32") for w in words)
    result = np.zeros_like(a + b + c)
    for k in range(8):
        if table >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return to_words(result, "b32")


def convert(operation: tuple[str, ...], words: list[Array]) -> Array:
    modifiers, source = operation[1:-1], operation[-1]
    if modifiers[-1] in ("bf16x2", "f16x2"):
        kind = modifiers[-1].removesuffix("x2")
        upper, lower = (to_words(as_type(w, source), kind) for w in words)
        return upper << np.uint64(16) | lower
    target, numbers = modifiers[-1], as_type(words[0], source)
    if target == "tf32":  # to the nearest, halves away from zero
        return (as_type(words[0], "u32") + np.uint64(0x1000)) & np.uint64(0xFFFFE000)
    for name, rounding in ROUNDINGS.items():
        if name in modifiers:
            numbers = rounding(numbers)
    if target[0] in "su" and source in FLOATS:
        numbers = np.nan_to_num(numbers).astype(np.int64)
    return to_words(numbers, target)

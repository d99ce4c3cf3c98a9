"""Runs a program of compiled PTX for sm_90 on numpy: all its threads at once, an instruction at a time.

What is checked is the compiler's work above ptxas: addresses, layouts, masks, operands, barriers. Instructions act in
the order of the code; asynchronous copies arrive when they are waited for, and until then nobody may touch a product's
registers and operands. An access out of bounds and an instruction that is not known raise ``Fault``; ``hazards`` has
what is done out of order.
"""

import re
from collections.abc import Sequence

import numpy as np

from . import matrices, scalars
from .memory import Fault, Global, Shared
from .program import Instruction, Program, members
from .scalars import as_type, bits_of, to_words

Array = np.ndarray
MOST_STEPS = 10**6
# What all threads of a warp, a group of warps or the program do together.
TOGETHER = ("bar", "barrier", "ldmatrix", "mma", "shfl", "stmatrix", "wgmma")


class Machine:
    def __init__(
        self, program: Program, arguments: Sequence[int], memory: Global, shared_bytes: int,
        place: tuple[int, int, int], grid: tuple[int, int, int],
    ):  # fmt: skip
        self.program, self.memory, self.shared = program, memory, Shared(shared_bytes)
        self.threads = program.threads
        self.warp = np.arange(self.threads) // 32
        # Beyond the kernel's own: Triton's scratch memories, which no kernel here uses.
        values = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
        # Their memory has 8 bytes for each; a name is an address in it.
        self.parameters = np.array([value % 2**64 for value in values], np.uint64)
        addresses = {name: word(8 * k) for k, name in enumerate(program.parameters)}
        self.registers: dict[str, Array] = {"%tid.x": np.arange(self.threads, dtype=np.uint64), "global_smem": word(0)}
        self.registers |= addresses
        for axis, at, size in zip("xyz", place, grid, strict=True):
            self.registers |= {f"%ctaid.{axis}": word(at), f"%nctaid.{axis}": word(size)}
        self.registers |= {"%tid.y": word(0), "%tid.z": word(0), "%ntid.x": word(self.threads)}
        # Copies by group, (places, data, warps); registers of products, that nobody has waited for.
        self.copies: list[list[tuple[Array, Array, Array]]] = []
        self.open_copies: list[tuple[Array, Array, Array]] = []
        self.flying: list[set[str]] = []
        self.open_products: set[str] = set()
        self.busy: set[str] = set()

    @property
    def hazards(self) -> set[str]:
        return self.shared.hazards

    def run(self) -> None:
        """Threads that went different ways wait for each other at what they do together; those least far go first."""
        everyone = np.ones(self.threads, bool)
        groups, steps = {0: everyone}, 0
        while groups:
            index = min(groups) if len(groups) == 1 else self._first_to_go(groups)
            active = groups.pop(index)
            x, steps = self.program.instructions[index], steps + 1
            if steps > MOST_STEPS:
                raise Fault(f"no end after {steps} instructions")
            guard = np.broadcast_to(self._predicate(x.guard), (self.threads,)) if x.guard else everyone
            name, acting = x.operation[0], active & guard
            stays = active
            if name in ("bra", "ret"):
                stays = active & ~guard
                if name == "bra" and acting.any():
                    self._go(groups, self.program.labels[x.operands[0]], acting)
            elif name in TOGETHER and not active.all():
                raise Fault(f"not all threads come to {x}")
            else:
                if self.busy and name != "wgmma" and not self.busy.isdisjoint(x.registers):
                    self.hazards.add(f"registers of a product in flight: {x}")
                self._step(x, None if acting.all() else acting)
            if stays.any() and index + 1 < len(self.program.instructions):
                self._go(groups, index + 1, stays)

    def _first_to_go(self, groups: dict[int, Array]) -> int:
        waits = [k for k in groups if self.program.instructions[k].operation[0] in TOGETHER]
        return min((k for k in groups if k not in waits), default=min(groups))

    @staticmethod
    def _go(groups: dict[int, Array], index: int, threads: Array) -> None:
        groups[index] = groups[index] | threads if index in groups else threads

    def _step(self, x: Instruction, mask: Array | None) -> None:
        act = getattr(self, f"_{x.operation[0]}", None)
        try:
            if act is not None:
                act(x, mask)
            else:
                self._put(x.operands[0], self._computed(x), mask)
        except Fault as fault:
            raise Fault(f"{fault}: {x}") from None
        except (KeyError, NotImplementedError, ValueError) as error:
            raise Fault(f"{type(error).__name__} {error} in {x}") from error

    def _computed(self, x: Instruction) -> Array:
        operation, name = x.operation, x.operation[0]
        if operation[-1] == "pred":
            return scalars.logic(operation, [self._predicate(v) for v in x.operands[1:]])
        if name == "selp":
            first, second = (self._get(v) for v in x.operands[1:3])
            return np.where(self._predicate(x.operands[3]), first, second)
        if name == "setp":
            found = scalars.compare(operation, *(self._get(v) for v in x.operands[1:3]))
            if len(x.operands) > 3:
                raise NotImplementedError("a comparison with more operands")
            return found
        if name == "lop3":
            return scalars.look_up([self._get(v) for v in x.operands[1:4]], int(x.operands[4], 0))
        words = [self._get(v) for v in x.operands[1:]]
        with np.errstate(all="ignore"):
            if name in ("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs"):
                return scalars.arithmetic(operation, words)
            if name in ("ex2", "lg2", "sqrt", "rsqrt", "rcp", "sin", "cos"):
                return scalars.function(operation, words[0])
            if name in ("and", "or", "xor", "not"):
                return scalars.logic(operation, words)
            if name in ("shl", "shr"):
                return scalars.shift(operation, *words)
            if name == "cvt":
                return scalars.convert(operation, words)
            if name == "cvta":
                return words[0]
            by_words = {"bfe": lambda: scalars.field(operation, words), "prmt": lambda: scalars.permute(words),
                        "shf": lambda: scalars.funnel(operation, words)}  # fmt: skip
            return by_words[name]()

    # Registers.

    def _get(self, operand: str) -> Array:
        if operand in self.registers:
            return self.registers[operand]
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", operand):
            found = word(int(operand[2:], 16))
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            found = word(int(operand.rstrip("U"), 0))
        else:
            raise Fault(f"{operand} is read and was never written")
        self.registers[operand] = found
        return found

    def _all(self, operand: str) -> Array:
        return np.broadcast_to(self._get(operand), (self.threads,))

    def _predicate(self, operand: str) -> Array:
        if operand.startswith("!"):
            return ~self._get(operand[1:])
        found = self._get(operand)
        return found if found.dtype == bool else found != 0

    def _put(self, register: str, words: Array, mask: Array | None) -> None:
        if register == "_":
            return
        if mask is not None and not mask.all():
            before = self.registers.get(register, np.zeros(1, bool) if words.dtype == bool else UNSET)
            words = np.where(mask, words, before)
        self.registers[register] = words

    def _mov(self, x: Instruction, mask: Array | None) -> None:
        target, source = x.operands
        width = 0 if x.operation[-1] == "pred" else bits_of(x.operation[-1])
        if not width:
            self._put(target, self._predicate(source), mask)
        elif source.startswith("{"):
            names = members(source)
            part, total = width // len(names), word(0)
            for k, name in enumerate(names):
                total = total | as_type(self._get(name), f"u{part}") << np.uint64(k * part)
            self._put(target, total, mask)
        elif target.startswith("{"):
            names = members(target)
            part, words = width // len(names), self._get(source)
            for k, name in enumerate(names):
                self._put(name, as_type(words >> np.uint64(k * part), f"u{part}"), mask)
        else:
            self._put(target, to_words(self._get(source), f"b{width}"), mask)

    def _shfl(self, x: Instruction, mask: Array | None) -> None:
        lane, by = np.arange(self.threads) % 32, self._all(x.operands[2]).astype(np.int64)
        clamp = int(x.operands[3], 0)
        kind = x.operation[2]
        source = {"idx": by & 31, "bfly": lane ^ by, "down": lane + by, "up": lane - by}[kind]
        inside = (source >= 0) & (source <= clamp) if kind != "up" else source >= 0
        source = np.where(inside, source, lane)
        self._put(x.operands[0].split("|")[0], self._all(x.operands[1])[self.warp * 32 + source], mask)

    # Memory.

    def _address(self, operand: str) -> Array:
        match = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        return np.broadcast_to(self._get(match[1]) + np.uint64(int(match[2] or "0", 0) % 2**64), (self.threads,))

    def _ld(self, x: Instruction, mask: Array | None) -> None:
        target, source = x.operands
        if x.operation[1] == "param":
            words = as_type(self.parameters[(self._address(source) // np.uint64(8)).astype(np.int64)], x.operation[-1])
            self._put(target, words.view(np.uint64), mask)
            return
        active = np.arange(self.threads) if mask is None else np.flatnonzero(np.broadcast_to(mask, (self.threads,)))
        names, size = members(target), bits_of(x.operation[-1]) // 8
        address = self._address(source)[active]
        if x.operation[1] == "shared":
            places = self.shared.places(address, size * len(names))
            data = self.shared.load(places, self.warp[active], str(x))
        else:
            data = self.memory.load(address, size * len(names))
        words = np.ascontiguousarray(data).view(f"<u{size}").astype(np.uint64)
        for k, name in enumerate(names):
            whole = np.array(np.broadcast_to(self.registers.get(name, UNSET), (self.threads,)))
            whole[active] = words[:, k]
            self._put(name, whole, None)

    def _st(self, x: Instruction, mask: Array | None) -> None:
        target, source = x.operands
        active = np.arange(self.threads) if mask is None else np.flatnonzero(np.broadcast_to(mask, (self.threads,)))
        size = bits_of(x.operation[-1]) // 8
        words = np.stack([self._all(name)[active] for name in members(source)], 1)
        data = words.astype(f"<u{size}").view(np.uint8).reshape(len(active), size * words.shape[1])
        address = self._address(target)[active]
        if x.operation[1] == "shared":
            places = self.shared.places(address, data.shape[1])
            self.shared.store(places, data, self.warp[active], str(x))
        else:
            self.memory.store(address, data)

    def _cp(self, x: Instruction, mask: Array | None) -> None:
        """``cp.async``: what is beyond the bytes to be read is zero."""
        if x.operation[2] == "commit_group":
            self.copies.append(self.open_copies)
            self.open_copies = []
        elif x.operation[2] == "wait_group":
            self._arrive(int(x.operands[0], 0))
        elif x.operation[2] in ("ca", "cg"):
            active = np.arange(self.threads) if mask is None else np.flatnonzero(np.broadcast_to(mask, (self.threads,)))
            size = int(x.operands[2], 0)
            given = self._all(x.operands[3])[active] if len(x.operands) > 3 else np.full(len(active), size, np.uint64)
            data = np.zeros((len(active), size), np.uint8)
            sources = self._address(x.operands[1])[active]
            for count in np.unique(given[given > 0]):
                some = given == count
                data[some, : int(count)] = self.memory.load(sources[some], int(count))
            places = self.shared.places(self._address(x.operands[0])[active], size)
            self.shared.claim(places, self.warp[active], str(x))
            self.open_copies.append((places, data, self.warp[active]))
        else:
            raise NotImplementedError(".".join(x.operation))

    def _arrive(self, left: int) -> None:
        while len(self.copies) > left:
            for places, data, warps in self.copies.pop(0):
                self.shared.store(places, data, warps, "an asynchronous copy", ordinary=False)

    def _ldmatrix(self, x: Instruction, mask: Array | None) -> None:
        address, transposed = self._address(x.operands[1]).reshape(-1, 32), "trans" in x.operation
        warps = np.arange(self.threads // 32).repeat(8)
        for k, name in enumerate(members(x.operands[0])):
            places = self.shared.places(address[:, 8 * k : 8 * k + 8].reshape(-1), 16)
            rows = np.ascontiguousarray(self.shared.load(places, warps, str(x))).view(np.uint16)
            self._put(name, matrices.tile_rows(rows.reshape(-1, 8, 8), transposed), None)

    def _stmatrix(self, x: Instruction, mask: Array | None) -> None:
        address, transposed = self._address(x.operands[0]).reshape(-1, 32), "trans" in x.operation
        warps = np.arange(self.threads // 32).repeat(8)
        for k, name in enumerate(members(x.operands[1])):
            places = self.shared.places(address[:, 8 * k : 8 * k + 8].reshape(-1), 16)
            rows = matrices.lane_rows(self._all(name), transposed)
            self.shared.store(places, rows.reshape(-1, 8).view(np.uint8), warps, str(x))

    # Order.

    def _bar(self, x: Instruction, mask: Array | None) -> None:
        if x.operation[1] not in ("sync", "warp"):
            raise NotImplementedError(".".join(x.operation))
        if x.operation[1] == "sync":
            self.shared.barrier()

    _barrier = _bar

    def _fence(self, x: Instruction, mask: Array | None) -> None:
        if x.operation[1:3] == ("proxy", "async"):
            self.shared.fence()

    # Products.

    def _mma(self, x: Instruction, mask: Array | None) -> None:
        rows, _, depth = matrices.shape_of(x.operation)
        kind, total = x.operation[-3], x.operation[-1]
        a, b, c = ([self._all(name) for name in members(v)] for v in x.operands[1:4])
        products = matrices.left(a, depth, kind, rows) @ matrices.right(b, depth, kind).swapaxes(1, 2)
        for r, (name, before) in enumerate(zip(members(x.operands[0]), c, strict=True)):
            row, column = matrices.result_place(r)
            numbers = as_type(before, total).astype(np.float64) + products[:, row, column].reshape(-1)
            self._put(name, to_words(numbers, total), None)

    def _wgmma(self, x: Instruction, mask: Array | None) -> None:
        what = x.operation[1]
        if what == "commit_group":
            self.shared.commit()
            self.flying.append(self.open_products)
            self.open_products = set()
        elif what == "wait_group":
            self.shared.wait(int(x.operands[0], 0))
            self.flying = self.flying[len(self.flying) - min(int(x.operands[0], 0), len(self.flying)) :]
        elif what == "mma_async":
            self._group_product(x)
        self.busy = self.open_products.union(*self.flying)

    def _group_product(self, x: Instruction) -> None:
        rows, columns, depth = matrices.shape_of(x.operation)
        kind, names = x.operation[-1], members(x.operands[0])
        in_registers = x.operands[1].startswith("{")
        scales, transposed = [int(v) for v in x.operands[4:6]], [v == "1" for v in x.operands[6:]]
        keep = self._predicate(x.operands[3])
        if not (keep.all() or not keep.any()) or scales != [1, 1]:
            raise NotImplementedError("products that are negated, or added for some threads alone")
        self.open_products |= set(names) | (set(members(x.operands[1])) if in_registers else set())
        found = []
        for group in range(self.threads // matrices.GROUP):
            mine = slice(group * matrices.GROUP, (group + 1) * matrices.GROUP)
            warps = 0b1111 << 4 * group
            if in_registers:
                parts = [self._all(name)[mine] for name in members(x.operands[1])]
                a = matrices.left(parts, depth, kind).reshape(rows, depth)
            else:
                a = self._operand(x.operands[1], mine, rows, depth, kind, bool(transposed) and transposed[0], warps, x)
            b = self._operand(x.operands[2], mine, columns, depth, kind, bool(transposed) and transposed[-1], warps, x)
            found.append((a @ b.T).reshape(-1, 16, columns))
        products = np.concatenate(found)  # [warps, 16, columns]
        for r, name in enumerate(names):
            row, column = matrices.result_place(r)
            numbers = products[:, row, column].reshape(-1)
            if keep.all():
                numbers = numbers + as_type(self._all(name), "f32")
            self._put(name, to_words(numbers, "f32"), None)

    def _operand(self, register, mine, rows, depth, kind, transposed, warps, x) -> Array:
        descriptors = self._all(register)[mine]
        if (descriptors != descriptors[0]).any():
            raise Fault("threads give the matrix unit different descriptors")
        return matrices.operand(self.shared, int(descriptors[0]), rows, depth, kind, transposed, warps, str(x))


def word(value: int) -> Array:
    return np.array([value % 2**64], np.uint64)


# What a register holds where no thread wrote it: NaN as a number, far away as an address.
UNSET = word(0x7FC0DEAD7FC0DEAD)

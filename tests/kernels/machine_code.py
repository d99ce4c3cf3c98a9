"""Whether the machine code of a Hopper kernel hands its matrix units what it says: three analyses of ``sass.Code``.

``wrong_descriptors``: an HGMMA takes operands in shared memory by descriptors of 64 bits: above a constant (strides,
swizzle), below an address, masked, plus a constant. Constants and masked addresses are propagated along all paths; a
descriptor that is anything else on one of them, the first step of a loop included, is wrong.
``disturbed``: nothing but another HGMMA may touch an HGMMA's accumulators, nor write its operand in registers, until
the warpgroup has waited for it.
``read_before_set``: no register is read that was not written on every path from the entry.
"""

import re

from .sass import Code, Instruction, opposite

VARIES, ADDRESS = "varies", "address"  # anything; a masked address plus a constant
# A number, one of the two, or the exclusive or of a set of numbers and addresses (registers are exchanged by it).
Value = int | str | frozenset
WORD = 0xFFFFFFFF
LARGEST_MASK = 0x7FFF


def faults(listing: str) -> list[str]:
    """What is wrong with a disassembled kernel, in words; nothing if nothing is."""
    code = Code(listing)
    return [*wrong_descriptors(code), *disturbed(code), *read_before_set(code)]


def wrong_descriptors(code: Code) -> list[str]:
    before, found = code.solve({}, _propagate, _agree), []
    for index, x in enumerate(code.instructions):
        state = before.get(index)
        for low, high in x.descriptors if state is not None else ():
            if state.get(low, VARIES) != ADDRESS or not isinstance(state.get(high, VARIES), int):
                values = f"{low} {state.get(low, VARIES)}, {high} {state.get(high, VARIES)}"
                found.append(f"descriptor not set on every path: {x}: {values}")
    return found


def _agree(a: dict[str, Value], b: dict[str, Value]) -> dict[str, Value]:
    """What holds on both paths; names without an entry vary."""
    return {name: value for name, value in a.items() if b.get(name, VARIES) == value}


def _propagate(state: dict[str, Value], x: Instruction) -> dict[str, Value]:
    if x.is_a("STL", "LDL"):
        new = _spill(state, x)
    elif not x.writes:
        return state
    else:
        new = dict.fromkeys(x.writes, VARIES)
        target = next((name for name in x.writes if "P" not in name), None)
        if target is not None:
            new |= _result(state, x, target)
    changed = dict(state)
    for name, value in new.items():
        if x.guard and state.get(name, VARIES) != value:
            value = VARIES
        changed.pop(name, None)
        if value != VARIES:
            changed[name] = value
    return changed


def _spill(state: dict[str, Value], x: Instruction) -> dict[str, Value]:
    """A thread's own memory, by its distance from the stack pointer."""
    is_store = x.is_a("STL")
    place, register = x.operands if is_store else x.operands[::-1]
    match = re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", place)
    count = 4 if ".128" in x.opcode else 2 if ".64" in x.opcode else 1
    first = re.fullmatch(r"R(\d+)", register)
    names = [f"R{int(first[1]) + k}" for k in range(count)] if first else ["RZ"] * count
    if match is None:
        # Some place of the memory: all of it may change.
        stored = [name for name in state if name.startswith("stack")]
        return dict.fromkeys(stored if is_store else names, VARIES)
    slots = [f"stack {int(match[1] or '0', 16) + 4 * k}" for k in range(count)]
    pairs = zip(slots, names) if is_store else zip(names, slots)
    return {to: 0 if source == "RZ" else state.get(source, VARIES) for to, source in pairs}


def _value(state: dict[str, Value], operand: str) -> Value:
    if re.fullmatch(r"U?RZ|SRZ|!?U?P(\d|T)", operand):
        return 0  # predicates are carries here: a masked address plus a little has none
    if re.fullmatch(r"-?0x[0-9a-f]+", operand):
        return int(operand, 16) & WORD
    if re.fullmatch(r"-U?R\d+", operand):
        value = state.get(operand[1:], VARIES)
        return -value & WORD if isinstance(value, int) else VARIES
    return state.get(operand, VARIES)


def _result(state: dict[str, Value], x: Instruction, target: str) -> dict[str, Value]:
    """The values of the result in ``target`` (and, of a pair, in the next register)."""
    sources, opcode = x.operands[x.results :], x.opcode
    values = [_value(state, s) for s in sources]
    if opcode in ("MOV", "UMOV", "R2UR", "IMAD.MOV", "IMAD.MOV.U32") or (
        opcode == "IMAD.U32" and sources[:2] == ("RZ", "RZ")
    ):
        return {target: values[2] if opcode.startswith("IMAD") else values[0]}
    if opcode == "UIADD3.64":
        above = [_upper(state, s) for s in sources]
        return dict(zip(x.writes, (_sum(values), _sum(above))))
    if opcode.removesuffix(".X") in ("IADD3", "UIADD3", "VIADD"):
        return {target: _sum(values)}
    if opcode in ("IMAD.IADD", "IMAD.X"):
        factor = values[0] if values[1] == 1 else values[1] if values[0] == 1 else 0 if 0 in values[:2] else VARIES
        return {target: _sum([factor, *values[2:]])}
    if opcode in ("SGXT.U32", "USGXT.U32") and isinstance(values[1], int) and (1 << values[1]) - 1 <= LARGEST_MASK:
        return {target: ADDRESS}
    if opcode in ("LOP3.LUT", "ULOP3.LUT"):
        return {target: _logic(values[:3], int(sources[3], 16))}
    if opcode == "CS2R" and sources[0] == "SRZ":
        return dict.fromkeys(x.writes, 0)
    return {}


def _upper(state: dict[str, Value], source: str) -> Value:
    """The upper half of a term of a sum of 64 bits, of which the operand names the lower one."""
    if match := re.fullmatch(r"(-?)(U?R)(\d+)", source):
        pair, next_one = match[2] + match[3], f"{match[2]}{int(match[3]) + 1}"
        high = _value(state, match[1] + next_one)
        if not match[1] or high == VARIES:
            return high
        low = state.get(pair, VARIES)
        return VARIES if not isinstance(low, int) else (high - (low != 0)) & WORD
    return WORD if source.startswith("-") else 0


def _sum(values: list[Value]) -> Value:
    terms = [v for v in values if v != 0]
    numbers = [v for v in terms if isinstance(v, int)]
    others = [v for v in terms if not isinstance(v, int)]
    if not others:
        return sum(numbers) & WORD
    return ADDRESS if others == [ADDRESS] else VARIES


def _logic(values: list[Value], table: int) -> Value:
    """A function of three words by its table of eight bits."""
    a, b, c = values
    if all(isinstance(v, int) for v in values):
        return sum(
            (table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | c >> k & 1) & 1) << k
            for k in range(32)
        )  # fmt: skip
    masks = any(isinstance(v, int) and 0 < v <= LARGEST_MASK for v in (a, b))
    if masks and (table == 0xC0 or (table == 0xF8 and isinstance(c, int))):  # a & b, (a & b) | c
        return ADDRESS
    if table == 0xFC and VARIES not in (a, b):  # a | b: further fields of the lower half
        return _sum([a, b])
    if table == 0x3C and VARIES not in (a, b):  # a ^ b
        terms = frozenset.symmetric_difference(*(v if isinstance(v, frozenset) else frozenset([v]) for v in (a, b)))
        return next(iter(terms)) if len(terms) == 1 else terms or 0
    return VARIES


def disturbed(code: Code) -> list[str]:
    """Accesses to the registers of products in flight.

    State: the products not committed yet, then the committed groups, newest first; each as (accumulators, factors).
    """
    before, found = code.solve((), _fly, _either), []
    for index, x in enumerate(code.instructions):
        if x.is_a("HGMMA") or index not in before:
            continue
        for accumulators, factors in before[index]:
            hit = accumulators & (x.reads | set(x.writes)) or factors & set(x.writes)
            if hit:
                found.append(f"touches a product in flight: {x}: {', '.join(sorted(hit))}")
                break
    return found


Flight = tuple[tuple[frozenset[str], frozenset[str]], ...]
NOTHING = (frozenset(), frozenset())
MOST_GROUPS = 8


def _fly(groups: Flight, x: Instruction) -> Flight:
    if x.is_a("HGMMA"):
        (accumulators, factors), *committed = groups or (NOTHING,)
        current = accumulators | set(x.accumulators), factors | set(x.factors)
        if not x.operands[-1].startswith("gsb"):
            return (current, *committed)
        if len(committed) == MOST_GROUPS:  # the oldest are one
            committed[-2:] = [tuple(p | q for p, q in zip(*committed[-2:]))]
        return (NOTHING, current, *committed)
    if x.opcode.startswith("WARPGROUP.DEPBAR"):
        return groups[: 1 + int(x.operands[-1], 16)]
    return groups


def _either(a: Flight, b: Flight) -> Flight:
    longest = max(len(a), len(b))
    a, b = (groups + (NOTHING,) * (longest - len(groups)) for groups in (a, b))
    return tuple((p[0] | q[0], p[1] | q[1]) for p, q in zip(a, b))


Unset = frozenset[tuple[str, str]]  # a register, and the predicate if under it alone the register is unset


def read_before_set(code: Code) -> list[str]:
    entry = frozenset((name, "") for x in code.instructions for name in (*x.reads, *x.writes))
    before, found = code.solve(entry, _set, frozenset.union, _under), []
    for index, x in enumerate(code.instructions):
        unset = {name for name, when in before.get(index, ()) if name in x.reads and when != opposite(x.guard or "-")}
        if unset:
            found.append(f"read before it is set: {x}: {', '.join(sorted(unset))}")
    return found


def _set(unset: Unset, x: Instruction) -> Unset:
    if not x.writes:
        return unset
    written, left = set(x.writes), set()
    for name, when in unset:
        if name in written:
            # Threads beyond a masked load keep what they have on purpose: what they make of it is not used.
            if not x.guard or when == x.guard or x.is_a("LDS", "LDG", "LD", "LDSM"):
                continue
            when = when or opposite(x.guard)
        if when.removeprefix("!") in written:
            when = ""
        left.add((name, when))
    return frozenset(left)


def _under(unset: Unset, condition: str) -> Unset:
    return frozenset((name, when) for name, when in unset if when != opposite(condition))

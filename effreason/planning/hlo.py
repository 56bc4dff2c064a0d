"""Compiled programs as text (XLA's HLO), read into instructions, shapes and loop lengths.

The text is what `jax.stages.Compiled.as_text()` gives: one line for an instruction, computations in braces.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Memory of an array, from the S(n) of its layout; without one it is the device's own memory.
DEVICE, ON_CHIP, HOST = 0, 1, 5

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array, and which memory it lies in."""

    dtype: str
    dimensions: tuple[int, ...]
    memory: int = DEVICE

    @property
    def elements(self) -> int:
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> float:
        return self.elements * _bits(self.dtype) / 8

    def bytes_in(self, memory: int) -> float:
        return self.bytes if self.memory == memory else 0.0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]       # what it makes; several for a tuple
    operands: tuple[str, ...]       # names of instructions of the same computation
    inside: str                     # the text between the operands' parentheses
    attributes: str                 # the text behind them
    root: bool

    def attribute(self, name: str) -> str | None:
        """A simple attribute, such as calls=%fused or direction=LT, without the %."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def integers(self, name: str) -> tuple[int, ...]:
        """An attribute of the form name={0,1}; () where there is none."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, found[1].split(","))) if found and found[1] else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions; the root is what it returns."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next((each for each in self.instructions.values() if each.root), next(reversed(
            self.instructions.values())))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for operand in dict.fromkeys(each.operands):
                if operand in found:
                    found[operand].append(each)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(each.inside): each for each in self.instructions.values() if each.opcode == "parameter"}

    def through(self, name: str, opcodes: tuple[str, ...] = ("copy", "bitcast", "convert", "reshape")) -> Instruction:
        """The instruction of that name, or what it only passes on."""
        found = self.instructions[name]
        while found.opcode in opcodes and found.operands:
            found = self.instructions[found.operands[0]]
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program, for one of the devices that run it."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """The text of a compiled program. Raises: ValueError where it has no entry."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name, instructions = _NAME.search(line)[1], {}      # type: ignore[index]
            entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions)
        elif line.startswith("  ") and " = " in line and name:
            instruction = _instruction(line)
            instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("no compiled program: the text has no line that begins with ENTRY")
    found = re.search(r"\bnum_partitions=(\d+)", text[:100_000].partition("\n")[0])
    return Module(computations, entry, int(found[1]) if found else 1)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, where that follows from the text; None where it depends on the data.

    XLA for CPUs notes it; for TPUs it is read from the condition: a counter, its first value, its step, its bound."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    compared = _comparison(module, condition)
    if compared is None:
        return None
    counter, bound, inclusive = compared
    start = computation.through(loop.operands[0]) if loop.operands else None
    if start is None or start.opcode != "tuple" or counter >= len(start.operands):
        return None
    if isinstance(bound, str):                          # a part of the loop's state: a constant from outside
        place = int(bound)
        if _passed(body, place) is not True:
            return None
        bound = _constant(computation, start.operands[place])
    first, step = _constant(computation, start.operands[counter]), _step(module, body, counter)
    if bound is None or first is None or not step or step < 0:
        return None
    return max(-(-(bound + inclusive - first) // step), 0)


def _comparison(module: Module, condition: Computation) -> tuple[int, int | str | None, int] | None:
    """(place of the counter, bound or the place that holds it, 1 where the bound itself is reached)."""
    root, inner, sources = condition.root, condition, {}
    if root.opcode == "fusion":
        inner = module.computations[root.attribute("calls") or ""]
        sources = {inner.parameters[index].name: operand for index, operand in enumerate(root.operands)}
        root = inner.root
    if root.opcode != "compare" or root.attribute("direction") not in ("LT", "LE"):
        return None

    def side(name: str) -> Instruction:
        found = inner.through(name)
        return condition.through(sources[found.name]) if found.name in sources else found

    left, right = (side(name) for name in root.operands[:2])
    if left.opcode != "get-tuple-element":
        return None
    bound: int | str | None = None
    if right.opcode == "constant":
        bound = _integer(right)
    elif right.opcode == "get-tuple-element":
        bound = right.attribute("index")
    return int(left.attribute("index") or 0), bound, int(root.attribute("direction") == "LE")


def _passed(body: Computation, place: int) -> bool:
    """Whether a loop leaves this part of its state as it is."""
    if body.root.opcode != "tuple":
        return False
    found = body.through(body.root.operands[place])
    return found.opcode == "get-tuple-element" and int(found.attribute("index") or -1) == place


def _step(module: Module, body: Computation, place: int) -> int | None:
    """What a loop adds to its counter each time."""
    if body.root.opcode != "tuple":
        return None
    found = body.through(body.root.operands[place])
    if found.opcode == "fusion":                        # the addition of a counter, alone in a fusion
        inner = module.computations[found.attribute("calls") or ""]
        added = inner.through(inner.root.name)
        operands = [inner.through(name) for name in added.operands]
    else:
        added, operands = found, [body.through(name) for name in found.operands]
    if added.opcode != "add":
        return None
    steps = [_integer(each) for each in operands if each.opcode == "constant"]
    return steps[0] if len(steps) == 1 else None


def _constant(computation: Computation, name: str) -> int | None:
    found = computation.through(name)
    return _integer(found) if found.opcode == "constant" else None


def _integer(constant: Instruction) -> int | None:
    return int(constant.inside) if re.fullmatch(r"-?\d+", constant.inside) else None


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    made, rest = right[:end], right[end:]
    opcode = _OPCODE.match(rest)
    assert opcode is not None, line[:200]
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close - 1]
    return Instruction(name=left.removeprefix("ROOT ").lstrip("%"), opcode=opcode[1], arrays=tuple(arrays(made)),
                       operands=tuple(_NAME.findall(inside)), inside=inside, attributes=rest[close:],
                       root=left.startswith("ROOT "))


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def arrays(text: str) -> Iterator[Array]:
    """The arrays of a type, one or a tuple of them: bf16[8,128]{1,0:T(8,128)(2,1)S(1)}."""
    for dtype, dimensions, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.strip("<= ")) for size in dimensions.split(",") if size.strip())
        yield Array(dtype, sizes, int(space[1]) if space else DEVICE)


def _bits(dtype: str) -> int:
    """Bits of an element: those of its name but for a few."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)             # f32, s4, u8, f8e4m3fn
    return int(found[1]) if found else 0

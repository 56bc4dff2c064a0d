"""Parses the text of compiled programs (XLA's HLO) into instructions, shapes and loop lengths.

The text comes from `jax.stages.Compiled.as_text()`: one line for each instruction, computations in
braces.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Memory spaces, the n in S(n) of an array's layout; without S(n) it is the device's own memory.
DEVICE, ON_CHIP, HOST = 0, 1, 5

PASSING = ("copy", "bitcast", "convert", "reshape")     # opcodes that keep the value

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of an array and its memory space."""

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
    arrays: tuple[Array, ...]       # results; several for a tuple
    operands: tuple[str, ...]       # names of instructions of the same computation
    inside: str                     # text in the operands' parentheses
    attributes: str                 # text after them
    root: bool

    def attribute(self, name: str) -> str | None:
        """Returns a simple attribute, such as calls=%fused or direction=LT, without the %."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns an attribute of the form name={0,1}; () if there is none."""
        match = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, match[1].split(","))) if match and match[1] else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions; it returns the root."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        last = next(reversed(self.instructions.values()))
        return next((instruction for instruction in self.instructions.values() if instruction.root),
                    last)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in users:
                    users[operand].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(instruction.inside): instruction for instruction in self.instructions.values()
                if instruction.opcode == "parameter"}

    def through(self, name: str, opcodes: tuple[str, ...] = PASSING) -> Instruction:
        """Returns the instruction of that name or, if these opcodes only pass it on, its source."""
        source = self.instructions[name]
        while source.opcode in opcodes and source.operands:
            source = self.instructions[source.operands[0]]
        return source


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program, as one of its devices runs it."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """Parses the text of a compiled program. Raises: ValueError if it has no entry."""
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

    match = re.search(r"\bnum_partitions=(\d+)", text[:100_000].partition("\n")[0])
    return Module(computations, entry, int(match[1]) if match else 1)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often the body of a `while` runs; None if that depends on the data.

    XLA for CPUs states it. For TPUs it follows from the condition: a counter, its first value, its
    step, its bound.
    """
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if stated:
        return int(stated[1])

    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    comparison = _comparison(module, condition)
    if comparison is None:
        return None

    counter, bound, inclusive = comparison
    start = computation.through(loop.operands[0]) if loop.operands else None
    if start is None or start.opcode != "tuple" or counter >= len(start.operands):
        return None

    if isinstance(bound, str):  # part of the loop's state: a constant from outside
        index = int(bound)
        if not _is_unchanged(body, index):
            return None
        bound = _constant(computation, start.operands[index])

    first, step = _constant(computation, start.operands[counter]), _step(module, body, counter)
    if bound is None or first is None or not step or step < 0:
        return None
    return max(-(-(bound + inclusive - first) // step), 0)


def _comparison(module: Module, condition: Computation) -> tuple[int, int | str | None, int] | None:
    """Returns the counter's index in the state, the bound or (as str) its index, 1 for <=."""
    root, inner, sources = condition.root, condition, {}
    if root.opcode == "fusion":
        inner = module.computations[root.attribute("calls") or ""]
        sources = {inner.parameters[index].name: operand
                   for index, operand in enumerate(root.operands)}
        root = inner.root

    if root.opcode != "compare" or root.attribute("direction") not in ("LT", "LE"):
        return None

    def side(name: str) -> Instruction:
        source = inner.through(name)
        return condition.through(sources[source.name]) if source.name in sources else source

    left, right = (side(name) for name in root.operands[:2])
    if left.opcode != "get-tuple-element":
        return None

    bound: int | str | None = None
    if right.opcode == "constant":
        bound = _integer(right)
    elif right.opcode == "get-tuple-element":
        bound = right.attribute("index")
    return int(left.attribute("index") or 0), bound, int(root.attribute("direction") == "LE")


def _is_unchanged(body: Computation, index: int) -> bool:
    """Returns whether the loop keeps this part of its state."""
    if body.root.opcode != "tuple":
        return False
    source = body.through(body.root.operands[index])
    return source.opcode == "get-tuple-element" and int(source.attribute("index") or -1) == index


def _step(module: Module, body: Computation, index: int) -> int | None:
    """Returns what the loop adds to this part of its state, its counter."""
    if body.root.opcode != "tuple":
        return None

    source = body.through(body.root.operands[index])
    if source.opcode == "fusion":                       # of nothing but the addition
        inner = module.computations[source.attribute("calls") or ""]
        addition = inner.through(inner.root.name)
        operands = [inner.through(name) for name in addition.operands]
    else:
        addition, operands = source, [body.through(name) for name in source.operands]

    if addition.opcode != "add":
        return None
    steps = [_integer(operand) for operand in operands if operand.opcode == "constant"]
    return steps[0] if len(steps) == 1 else None


def _constant(computation: Computation, name: str) -> int | None:
    source = computation.through(name)
    return _integer(source) if source.opcode == "constant" else None


def _integer(constant: Instruction) -> int | None:
    return int(constant.inside) if re.fullmatch(r"-?\d+", constant.inside) else None


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    result_type, rest = right[:end], right[end:]
    opcode = _OPCODE.match(rest)
    assert opcode is not None, line[:200]

    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end():close - 1]
    return Instruction(name=left.removeprefix("ROOT ").lstrip("%"), opcode=opcode[1],
                       arrays=tuple(arrays(result_type)), operands=tuple(_NAME.findall(inside)),
                       inside=inside, attributes=rest[close:], root=left.startswith("ROOT "))


def _closing(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def arrays(text: str) -> Iterator[Array]:
    """Yields the arrays of a type, an array or a tuple: bf16[8,128]{1,0:T(8,128)(2,1)S(1)}."""
    for dtype, dimensions, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.strip("<= ")) for size in dimensions.split(",") if size.strip())
        yield Array(dtype, sizes, int(space[1]) if space else DEVICE)


def _bits(dtype: str) -> int:
    """Returns the bits of an element."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)             # f32, s4, u8, f8e4m3fn
    return int(match[1]) if match else 0

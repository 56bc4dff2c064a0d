"""What one device does in a compiled program: FLOPs, bytes moved, collectives, calls of kernels; loops multiplied out.

XLA's own cost analysis counts the body of a loop once, whatever its length, and a kernel not at all. Here a loop counts
as often as it runs, an array in on-chip memory costs no traffic, and kernels are listed with the shapes they were
called with, for others to say what they cost.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from effreason.planning import hlo
from effreason.planning.hlo import DEVICE, HOST, Array, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# They move nothing: names, tuples, and the ends of copies that were counted where they began.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "optimization-barrier", "iota", "add-dependency", "domain")
SLICES = ("dynamic-slice", "slice", "gather")
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "__cudnn$fmhaSoftmax")


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one device sends in collectives of one kind over groups of one size."""

    kind: str
    group: int                      # devices
    count: float
    bytes: float                    # over the links of one device, all of them together


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a kernel that XLA cannot look into."""

    name: str                       # the call's path in the program that was traced
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    count: float

    @property
    def bytes(self) -> float:
        """All its arrays once, in device memory: what it moves where nothing better is known."""
        return sum(array.bytes_in(DEVICE) for array in (*self.operands, *self.results))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device; without what kernels cost."""

    flops: float = 0.0              # of products alone: dots and convolutions
    bytes: float = 0.0              # read and written in device memory
    host_bytes: float = 0.0         # between device and host memory
    collectives: tuple[Collective, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    open_loops: int = 0             # loops whose length depends on the data

    def __add__(self, other: "Cost") -> "Cost":
        return total((self, other))

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times, self.host_bytes * times,
                    tuple(dataclasses.replace(each, count=each.count * times, bytes=each.bytes * times)
                          for each in self.collectives),
                    tuple(dataclasses.replace(each, count=each.count * times) for each in self.kernels),
                    self.open_loops)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum, with collectives of one kind and group, and calls of one kernel, as one entry."""
    flops = moved = host = 0.0
    open_loops = 0
    collectives: dict[tuple[str, int], Collective] = {}
    kernels: dict[tuple[str, tuple[Array, ...]], Kernel] = {}
    for cost in costs:
        flops, moved, host = flops + cost.flops, moved + cost.bytes, host + cost.host_bytes
        open_loops += cost.open_loops
        for each in cost.collectives:
            old = collectives.get((each.kind, each.group), Collective(each.kind, each.group, 0, 0))
            collectives[each.kind, each.group] = dataclasses.replace(
                each, count=old.count + each.count, bytes=old.bytes + each.bytes)
        for call in cost.kernels:
            before = kernels.get((call.name, call.operands))
            count = call.count + (before.count if before else 0)
            kernels[call.name, call.operands] = dataclasses.replace(call, count=count)
    return Cost(flops, moved, host, tuple(collectives.values()), tuple(kernels.values()), open_loops)


def read(text: str, *, trips: float = 1) -> Cost:
    """What one device does when the program runs once.

    Args: text, of a compiled program; trips, how often a loop runs whose length the text does not say."""
    return _Counter(hlo.parse(text), trips).of(None)


class _Counter:
    """Costs of the computations of a module, each worked out once."""

    def __init__(self, module: Module, trips: float) -> None:
        self._module, self._trips = module, trips
        self._known: dict[str, Cost] = {}

    def of(self, name: str | None) -> Cost:
        """Of a computation that is executed instruction by instruction. Args: name, None for the entry."""
        computation = self._module.computations[name or self._module.entry]
        if computation.name not in self._known:
            parts, seen = [], set[tuple[str, str]]()
            for instruction in computation.instructions.values():
                parts.append(self._instruction(computation, instruction))
                parts += self._collectives(computation, instruction, seen)
            self._known[computation.name] = total(parts)
        return self._known[computation.name]

    def _instruction(self, computation: Computation, each: Instruction) -> Cost:
        kind = each.opcode
        if kind in FREE or kind.endswith("-done") or _collective_kind(kind):
            return Cost()
        if kind == "while":
            body = self.of(each.attribute("body"))
            length = hlo.trip_count(self._module, computation, each)
            if length is None:
                return dataclasses.replace(body * self._trips, open_loops=body.open_loops + 1)
            return body * length
        if kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
            names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else [
                each.attribute("true_computation"), each.attribute("false_computation")]
            return max((self.of(name) for name in names), key=lambda cost: (cost.flops, cost.bytes))
        if kind in ("call", "async-start"):
            return self.of(each.attribute("to_apply") or each.attribute("calls"))
        if kind == "custom-call":
            return self._custom_call(computation, each)
        if kind == "fusion":
            return self._fusion(computation, each)
        flops = self._flops(computation, each)
        read, written, host = self._traffic(computation, each)
        return Cost(flops=flops, bytes=read + written, host_bytes=host)

    def _custom_call(self, computation: Computation, each: Instruction) -> Cost:
        target = re.search(r'custom_call_target="([^"]*)"', each.attributes)
        if target is None or not target[1].startswith(KERNELS):
            return Cost()               # the compiler's own: buffers, the beginnings and ends of collectives
        path = re.search(r'op_name="([^"]*)"', each.attributes)
        name = path[1] if path else each.name
        return Cost(kernels=(Kernel(name, self._operands(computation, each), each.arrays, 1),))

    def _collectives(self, computation: Computation, each: Instruction, seen: set[tuple[str, str]]) -> list[Cost]:
        """Those that an instruction is or, on a TPU, holds in its fusion: begun, carried on and ended in three."""
        found = []
        for inner, instruction in self._within(computation, each):
            kind = _collective_kind(instruction.opcode)
            channel = instruction.attribute("channel_id") or f"%{instruction.name}"
            if kind is None or (kind, channel) in seen:
                continue
            seen.add((kind, channel))
            found.append(Cost(collectives=(self._collective(inner, instruction, kind),)))
        return found

    def _within(self, computation: Computation, each: Instruction) -> Iterable[tuple[Computation, Instruction]]:
        yield computation, each
        if each.opcode == "fusion":
            fused = self._module.computations[each.attribute("calls") or ""]
            for instruction in fused.instructions.values():
                yield from self._within(fused, instruction)

    def _collective(self, computation: Computation, each: Instruction, kind: str) -> Collective:
        group = _group_size(each.attributes, self._module.partitions)
        given = sum(array.bytes for array in self._operands(computation, each))
        share = (group - 1) / group if group else 0.0
        sent = {"all-gather": given * (group - 1), "reduce-scatter": given * share, "all-reduce": 2 * given * share,
                "all-to-all": given * share}.get(kind, given)
        return Collective(kind, group, 1, sent)

    def _operands(self, computation: Computation, each: Instruction) -> tuple[Array, ...]:
        return tuple(array for name in each.operands if name in computation.instructions
                     for array in computation.instructions[name].arrays)

    def _fusion(self, computation: Computation, each: Instruction) -> Cost:
        fused = self._module.computations[each.attribute("calls") or ""]
        flops = sum(self._flops(inner, instruction) for inner, instruction in self._within(computation, each))
        read = host = 0.0
        for index, name in enumerate(each.operands):
            for array in computation.instructions[name].arrays[:1]:
                size = min(self._read(fused, index), array.bytes)
                read += size if array.memory == DEVICE else 0.0
                host += size if array.memory == HOST else 0.0
        written, sent = self._written(fused, each)
        return Cost(flops=flops, bytes=read + written, host_bytes=host + sent)

    def _read(self, fused: Computation, index: int) -> float:
        """Bytes of a fusion's operand that it reads: of one that is only sliced, the slices."""
        if index not in fused.parameters:
            return 0.0
        return self._reads_of(fused, fused.parameters[index])

    def _reads_of(self, fused: Computation, source: Instruction) -> float:
        whole, read = source.arrays[0].bytes, 0.0
        if source.root:                 # passed on: whoever asked reads it
            return whole
        for user in fused.users[source.name]:
            if user.opcode in SLICES and user.operands[0] == source.name:
                read += user.arrays[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
                continue                # written in place
            elif user.opcode in ("bitcast", "reshape"):
                read += self._reads_of(fused, user)
            elif user.opcode == "fusion":
                inner = self._module.computations[user.attribute("calls") or ""]
                read += sum(self._read(inner, place) for place, name in enumerate(user.operands) if name == source.name)
            else:
                return whole
        return min(read, whole)

    def _written(self, fused: Computation, each: Instruction) -> tuple[float, float]:
        """Bytes that a fusion writes into device memory and into the host's."""
        root = fused.root
        results = [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = host = 0.0
        for array, result in zip(each.arrays, results, strict=False):
            source = fused.through(result.name, ("bitcast", "reshape"))
            size = array.bytes
            if source.opcode == "dynamic-update-slice":
                size = fused.instructions[source.operands[1]].arrays[0].bytes
            written += size if array.memory == DEVICE else 0.0
            host += size if array.memory == HOST else 0.0
        return written, host

    def _traffic(self, computation: Computation, each: Instruction) -> tuple[float, float, float]:
        """(read, written) in device memory and what goes to or from the host's, of one that stands alone."""
        operands, results = self._operands(computation, each), each.arrays
        if each.opcode in (*SLICES, "copy-start", "slice-start"):
            # What a copy makes comes first, what a slice makes behind its source.
            made = results[1 if each.opcode == "slice-start" else 0]
            operands, results = (dataclasses.replace(made, memory=operands[0].memory),), (made,)
        elif each.opcode == "dynamic-update-slice":
            update = operands[1]
            operands, results = (update,), (dataclasses.replace(update, memory=results[0].memory),)
        elif each.opcode == "scatter":
            operands = operands[1:]
            results = tuple(dataclasses.replace(operands[-1], memory=array.memory) for array in results[:1])
        read = sum(array.bytes_in(DEVICE) for array in operands)
        written = sum(array.bytes_in(DEVICE) for array in results)
        host = sum(array.bytes_in(HOST) for array in (*operands, *results))
        return read, written, host

    def _flops(self, computation: Computation, each: Instruction) -> float:
        if each.opcode == "dot":
            left = computation.instructions[each.operands[0]].arrays[0]
            summed = math.prod(left.dimensions[axis] for axis in each.integers("lhs_contracting_dims"))
            return 2.0 * each.arrays[0].elements * summed
        if each.opcode == "convolution":
            left, right = (computation.instructions[name].arrays[0] for name in each.operands[:2])
            return convolution_flops(left, right, each)
        return 0.0


def convolution_flops(left: Array, right: Array, each: Instruction) -> float:
    """FLOPs of a convolution, without those on padding or between dilated entries.

    A TPU's products with several axes are convolutions whose windows pick one entry of each."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        return 0.0
    images, weights, result = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    spatial = sorted(letter for letter in result if letter.isdigit())
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    stride, dilation, base, padding = (values(name, default) for name, default in (
        ("stride", "1"), ("rhs_dilate", "1"), ("lhs_dilate", "1"), ("pad", "0_0")))
    taps = 1.0
    for place, letter in enumerate(spatial):
        taps *= _taps(left.dimensions[images.index(letter)], right.dimensions[weights.index(letter)],
                      each.arrays[0].dimensions[result.index(letter)], int(stride[place]), int(dilation[place]),
                      int(base[place]), int(padding[place].split("_")[0]))
    groups = int(each.attribute("batch_group_count") or 1)
    return (2.0 * taps * left.dimensions[images.index("b")] / groups * right.dimensions[weights.index("i")]
            * right.dimensions[weights.index("o")])


@functools.cache
def _taps(size: int, window: int, outputs: int, stride: int, dilation: int, base: int, low: int) -> float:
    """Pairs of an output and an entry of the window that meet an entry of the input."""
    at = np.arange(outputs)[:, None] * stride + np.arange(window)[None, :] * dilation - low
    return float(np.sum((at >= 0) & (at < (size - 1) * base + 1) & (at % base == 0)))


def _collective_kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _group_size(attributes: str, partitions: int) -> int:
    """Devices of one group: {{0,1},{2,3}}, [8,2]<=[16], axes of a mesh: mesh['a'=2,'b'=8] {'b'}, or pairs in a ring."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _cycle(re.findall(r"(\d+),(\d+)", found[1]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    return partitions


def _cycle(pairs: list[tuple[str, str]]) -> int:
    """Devices that hand something round, in the longest ring. Args: pairs of a sender and who it sends to."""
    targets, longest, seen = dict(pairs), 1, set[str]()
    for first in targets:
        at, count = first, 0
        while at in targets and at not in seen:
            seen.add(at)
            at, count = targets[at], count + 1
        longest = max(longest, count + (at not in targets))     # a row of devices ends with one that sends nothing
    return longest

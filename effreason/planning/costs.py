"""Counts what one device does in a compiled program: FLOPs, bytes moved, collectives, kernel calls.

XLA's own cost analysis counts the body of a loop once, whatever its length, and ignores kernels.
Here a loop counts as often as it runs, arrays in on-chip memory cost no traffic, and kernel calls
are listed with the shapes of their arguments, from which estimates.py computes their cost.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from effreason.planning import hlo
from effreason.planning.hlo import DEVICE, HOST, Array, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
               "collective-broadcast")
# Opcodes that move nothing. The end of a copy is among them: a copy is counted at its start.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id", "optimization-barrier", "iota", "add-dependency", "domain")
SLICES = ("dynamic-slice", "slice", "gather")
# Of what changes a part of its first operand in place: the index of the operand written there.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
FUSIONS = ("fusion", "fusion-start")
CUDNN = "__cudnn$fmha"
KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", CUDNN)


@dataclasses.dataclass(frozen=True)
class Collective:
    """The traffic of one device in collectives of one kind over groups of one size."""

    kind: str
    group: int                      # devices
    count: float
    bytes: float                    # over all links of one device


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """Calls of a kernel that XLA cannot analyse."""

    name: str                       # path of the call in the traced program; cuDNN's own name
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    count: float

    @property
    def bytes(self) -> float:
        """All arrays in device memory once: the traffic of one call if nothing better is known."""
        return sum(array.bytes_in(DEVICE) for array in (*self.operands, *self.results))

    @property
    def workspace_bytes(self) -> float:
        """What cuDNN's backward pass needs besides, which XLA learns only from the library.

        The gradient of the queries and a number for each of them in float32; if heads are grouped,
        gradients of keys and values for every query head. A forward pass needs next to nothing.
        """
        if not self.name.startswith(CUDNN) or "Backward" not in self.name:
            return 0.0
        query, key = self.operands[:2]
        _, _, heads, head_dim = query.dimensions
        kv_heads, key_heads = key.dimensions[2], key.bytes * heads / key.dimensions[2]
        return 4 * query.elements * (1 + 1 / head_dim) + 2 * key_heads * (heads > kv_heads)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a program on one device, without its kernels."""

    flops: float = 0.0              # of dots and convolutions only
    bytes: float = 0.0              # read and written in device memory
    host_bytes: float = 0.0         # between device and host memory
    collectives: tuple[Collective, ...] = ()
    kernels: tuple[KernelCall, ...] = ()
    open_loops: int = 0             # loops of data-dependent length

    def __add__(self, other: "Cost") -> "Cost":
        return total((self, other))

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times, self.host_bytes * times,
                    tuple(dataclasses.replace(collective, count=collective.count * times,
                                              bytes=collective.bytes * times)
                          for collective in self.collectives),
                    tuple(dataclasses.replace(kernel, count=kernel.count * times)
                          for kernel in self.kernels),
                    self.open_loops)


def total(costs: Iterable[Cost]) -> Cost:
    """Adds costs; collectives of one kind and group size become one, and calls of one kernel."""
    flops = moved = host = 0.0
    open_loops = 0
    collectives: dict[tuple[str, int], Collective] = {}
    kernels: dict[tuple[str, tuple[Array, ...]], KernelCall] = {}

    for cost in costs:
        flops, moved, host = flops + cost.flops, moved + cost.bytes, host + cost.host_bytes
        open_loops += cost.open_loops
        for new in cost.collectives:
            old = collectives.get((new.kind, new.group), Collective(new.kind, new.group, 0, 0))
            collectives[new.kind, new.group] = dataclasses.replace(
                new, count=old.count + new.count, bytes=old.bytes + new.bytes)
        for call in cost.kernels:
            previous = kernels.get((call.name, call.operands))
            count = call.count + (previous.count if previous else 0)
            kernels[call.name, call.operands] = dataclasses.replace(call, count=count)

    return Cost(flops, moved, host, tuple(collectives.values()), tuple(kernels.values()),
                open_loops)


def read(text: str, *, trips: float = 1) -> Cost:
    """Returns the cost of running a program once on one device.

    Args: text, of a compiled program; trips, runs of a loop whose length is not in the text.
    """
    return _CostCounter(hlo.parse(text), trips).computation_cost(None)


class _CostCounter:
    """Computes the costs of a module's computations, each once."""

    def __init__(self, module: Module, trips: float) -> None:
        self._module, self._trips = module, trips
        self._costs: dict[str, Cost] = {}

    def computation_cost(self, name: str | None) -> Cost:
        """Returns the cost of a computation, by its instructions. Args: name, None = the entry."""
        computation = self._module.computations[name or self._module.entry]
        if computation.name not in self._costs:
            parts, seen = [], set[tuple[str, str]]()
            for instruction in computation.instructions.values():
                parts.append(self._instruction(computation, instruction))
                parts += self._collectives(computation, instruction, seen)
            self._costs[computation.name] = total(parts)
        return self._costs[computation.name]

    def _instruction(self, computation: Computation, instruction: Instruction) -> Cost:
        kind = instruction.opcode
        if kind in FREE or kind.endswith("-done") or _collective_kind(kind):
            return Cost()
        if kind == "while":
            body = self.computation_cost(instruction.attribute("body"))
            length = hlo.trip_count(self._module, computation, instruction)
            if length is None:
                return dataclasses.replace(body * self._trips, open_loops=body.open_loops + 1)
            return body * length

        if kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = (re.findall(r"%([\w.\-]+)", branches[1]) if branches else
                     [instruction.attribute("true_computation"),
                      instruction.attribute("false_computation")])
            return max((self.computation_cost(name) for name in names),
                       key=lambda cost: (cost.flops, cost.bytes))

        if kind in ("call", "async-start"):
            return self.computation_cost(instruction.attribute("to_apply")
                                         or instruction.attribute("calls"))
        if kind == "custom-call":
            return self._custom_call(computation, instruction)
        if kind == "fusion":
            return self._fusion(computation, instruction)
        if kind == "fusion-start":      # its operands come first among its results
            first = len(self._operands(computation, instruction))
            started = dataclasses.replace(instruction, arrays=instruction.arrays[first:])
            return self._fusion(computation, started)
        flops = self._flops(computation, instruction)
        read, written, host = self._traffic(computation, instruction)
        return Cost(flops=flops, bytes=read + written, host_bytes=host)

    def _custom_call(self, computation: Computation, instruction: Instruction) -> Cost:
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if target is None or not target[1].startswith(KERNELS):
            return Cost()  # the compiler's own: buffers, starts and ends of collectives
        path = re.search(r'op_name="([^"]*)"', instruction.attributes)
        # Programs that a compilation cache keeps have no paths. Partitioning takes cuDNN's calls
        # out of theirs.
        name = instruction.name if path is None else path[1]
        if target[1].startswith(CUDNN):
            name = target[1]
        return Cost(kernels=(KernelCall(name, self._operands(computation, instruction),
                                        instruction.arrays, 1),))

    def _collectives(self, computation: Computation, instruction: Instruction,
                     seen: set[tuple[str, str]]) -> list[Cost]:
        """Returns the instruction's collectives; one with parts in several fusions counts once."""
        collectives = []
        for inner, part in self._within(computation, instruction):
            kind = _collective_kind(part.opcode)
            channel = part.attribute("channel_id") or f"%{part.name}"
            if kind is None or (kind, channel) in seen:
                continue
            seen.add((kind, channel))
            root = inner.root
            # TPUs write a reduce-scatter as a fusion that keeps a slice of a sum.
            if (kind, root.opcode) == ("all-reduce", "dynamic-slice") and (
                    root.operands[0] == part.name):
                kind = "reduce-scatter"
            collectives.append(Cost(collectives=(self._collective(inner, part, kind),)))

        return collectives

    def _within(self, computation: Computation,
                instruction: Instruction) -> Iterable[tuple[Computation, Instruction]]:
        """Yields the instruction and, if it is a fusion, everything inside it."""
        yield computation, instruction
        if instruction.opcode in FUSIONS:
            fused = self._module.computations[instruction.attribute("calls") or ""]
            for part in fused.instructions.values():
                yield from self._within(fused, part)

    def _collective(self, computation: Computation, instruction: Instruction,
                    kind: str) -> Collective:
        group = _group_size(instruction.attributes, self._module.partitions)
        operand_bytes = sum(array.bytes for array in self._operands(computation, instruction))
        share = (group - 1) / group if group else 0.0
        sent = {"all-gather": operand_bytes * (group - 1), "reduce-scatter": operand_bytes * share,
                "all-reduce": 2 * operand_bytes * share,
                "all-to-all": operand_bytes * share}.get(kind, operand_bytes)
        return Collective(kind, group, 1, sent)

    def _operands(self, computation: Computation, instruction: Instruction) -> tuple[Array, ...]:
        return tuple(array for name in instruction.operands if name in computation.instructions
                     for array in computation.instructions[name].arrays)

    def _fusion(self, computation: Computation, instruction: Instruction) -> Cost:
        fused = self._module.computations[instruction.attribute("calls") or ""]
        flops = sum(self._flops(*part) for part in self._within(computation, instruction))

        read = host = 0.0
        for index, name in enumerate(instruction.operands):
            for array in computation.instructions[name].arrays[:1]:
                source = fused.parameters.get(index)
                size = min(self._bytes_read(fused, source), array.bytes) if source else 0.0
                read += size if array.memory == DEVICE else 0.0
                host += size if array.memory == HOST else 0.0

        written, host_written = self._bytes_written(fused, instruction)
        return Cost(flops=flops, bytes=read + written, host_bytes=host + host_written)

    def _bytes_read(self, fused: Computation, source: Instruction) -> float:
        """Returns the bytes of an array that a fusion reads: the slices if it is only sliced."""
        whole, read = source.arrays[0].bytes, 0.0
        if source.root:                 # returned: the caller reads it
            return whole

        for user in fused.users[source.name]:
            if user.opcode in SLICES and user.operands[0] == source.name:
                read += user.arrays[0].bytes
            elif user.opcode in UPDATES and user.operands[0] == source.name:
                continue                # written in place
            elif user.opcode in ("bitcast", "reshape"):
                read += self._bytes_read(fused, user)
            elif user.opcode == "fusion":
                inner = self._module.computations[user.attribute("calls") or ""]
                read += sum(self._bytes_read(inner, inner.parameters[index])
                            for index, name in enumerate(user.operands)
                            if name == source.name and index in inner.parameters)
            else:
                return whole

        return min(read, whole)

    def _bytes_written(self, fused: Computation, instruction: Instruction) -> tuple[float, float]:
        """Returns the bytes that a fusion writes into device memory and into the host's."""
        root = fused.root
        results = [root]
        if root.opcode == "tuple":
            results = [fused.instructions[name] for name in root.operands]
        written = host = 0.0

        for array, result in zip(instruction.arrays, results, strict=False):
            source = fused.through(result.name, ("bitcast", "reshape"))
            size = array.bytes
            if source.opcode in UPDATES:
                update = source.operands[UPDATES[source.opcode]]
                size = fused.instructions[update].arrays[0].bytes
            written += size if array.memory == DEVICE else 0.0
            host += size if array.memory == HOST else 0.0

        return written, host

    def _traffic(self, computation: Computation,
                 instruction: Instruction) -> tuple[float, float, float]:
        """Returns an instruction's bytes: read, written, and moved to or from the host."""
        operands, results = self._operands(computation, instruction), instruction.arrays
        if instruction.opcode in (*SLICES, "copy-start", "slice-start"):
            # A copy-start returns its result first, a slice-start after its source.
            result = results[1 if instruction.opcode == "slice-start" else 0]
            operands, results = (dataclasses.replace(result, memory=operands[0].memory),), (result,)
        elif instruction.opcode == "dynamic-update-slice":
            update = operands[1]
            operands, results = (update,), (dataclasses.replace(update, memory=results[0].memory),)
        elif instruction.opcode == "scatter":
            operands = operands[1:]
            results = tuple(dataclasses.replace(operands[-1], memory=array.memory)
                            for array in results[:1])

        read = sum(array.bytes_in(DEVICE) for array in operands)
        written = sum(array.bytes_in(DEVICE) for array in results)
        host = sum(array.bytes_in(HOST) for array in (*operands, *results))
        return read, written, host

    def _flops(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode == "dot":
            left = computation.instructions[instruction.operands[0]].arrays[0]
            contracted = math.prod(left.dimensions[axis]
                                   for axis in instruction.integers("lhs_contracting_dims"))
            return 2.0 * instruction.arrays[0].elements * contracted
        if instruction.opcode == "convolution":
            left, right = (computation.instructions[name].arrays[0]
                           for name in instruction.operands[:2])
            return convolution_flops(left, right, instruction)
        return 0.0


def convolution_flops(left: Array, right: Array, instruction: Instruction) -> float:
    """Returns the FLOPs of a convolution, without those on padding or between dilated entries.

    TPUs write matrix products with several axes as convolutions whose windows pick single entries.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    images, weights, result = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    spatial = sorted(letter for letter in result if letter.isdigit())
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    stride, dilation, base, padding = (values(name, default) for name, default in (
        ("stride", "1"), ("rhs_dilate", "1"), ("lhs_dilate", "1"), ("pad", "0_0")))
    taps = 1.0

    for axis, letter in enumerate(spatial):
        taps *= _taps(left.dimensions[images.index(letter)],
                      right.dimensions[weights.index(letter)],
                      instruction.arrays[0].dimensions[result.index(letter)], int(stride[axis]),
                      int(dilation[axis]), int(base[axis]), int(padding[axis].split("_")[0]))

    groups = int(instruction.attribute("batch_group_count") or 1)
    return (2.0 * taps * left.dimensions[images.index("b")] / groups
            * right.dimensions[weights.index("i")] * right.dimensions[weights.index("o")])


@functools.cache
def _taps(size: int, window: int, outputs: int, stride: int, dilation: int, base: int,
          low: int) -> float:
    """Counts the pairs of an output and a window entry that fall on an entry of the input."""
    position = np.arange(outputs)[:, None] * stride + np.arange(window)[None, :] * dilation - low
    return float(np.sum((position >= 0) & (position < (size - 1) * base + 1)
                        & (position % base == 0)))


def _collective_kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _group_size(attributes: str, partitions: int) -> int:
    """Returns the devices of one group.

    Forms: {{0,1},{2,3}}; [8,2]<=[16]; mesh axes as mesh['a'=2,'b'=8] {'b'}; the pairs of a ring.
    """
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)

    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _longest_ring(re.findall(r"(\d+),(\d+)", match[1]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    return partitions


def _longest_ring(pairs: list[tuple[str, str]]) -> int:
    """Returns the size of the longest ring. Args: pairs, each of a sender and its receiver."""
    receivers, longest, seen = dict(pairs), 1, set[str]()
    for first in receivers:
        device, count = first, 0
        while device in receivers and device not in seen:
            seen.add(device)
            device, count = receivers[device], count + 1
        # the last device of a line sends nothing
        longest = max(longest, count + (device not in receivers))

    return longest

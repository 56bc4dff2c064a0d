"""The machines a plan can be made for: figures of a chip, how chips are connected, names.

Peak figures are the manufacturers'; the share that a program reaches is an input
(estimates.Efficiency). Imports no jax.
"""

import dataclasses
import importlib.util
import math
import os
import re

from effreason.runtime.config import GIB
from effreason.runtime.errors import UserError

DEFAULT_SHAPES = "tpu:v5e:4x4, tpu:v5p:2x2x4, tpu:v6e:4x4, gpu:h100:8, gpu:h200:2x8, cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiprocessors:
    """What XLA needs to know of a GPU to compile for it: its multiprocessors and its cache."""

    capability: tuple[int, int]     # compute capability
    count: int
    cores: int                      # of one multiprocessor, for float32
    shared_bytes: int               # memory that the threads of one multiprocessor share
    cache_bytes: int                # L2 cache
    clock_ghz: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator, as its manufacturer describes it."""

    name: str                       # for people
    hbm_bytes: float                # available to a program
    flops: float                    # a second, dense bfloat16 products
    hbm_bandwidth: float            # bytes a second
    link_bandwidth: float  # bytes a second, one way: of one torus link (TPU), of all NVLinks (GPU)
    network_bandwidth: float = 0.0  # bytes a second, one way, for each GPU, between nodes
    host_bandwidth: float           # bytes a second between the chip and its host's memory
    latency: float                  # seconds before a collective moves anything
    watts: float                    # of the chip under load, without its host and cooling
    chips_per_host: int
    axes: int = 1                   # of the torus; 1 = all to all inside a node
    wraps_at: int = 0  # a torus axis whose size is a multiple of this is a ring, otherwise a line
    most: int = 0                   # chips that one interconnect joins
    multiprocessors: Multiprocessors | None = None      # of a GPU


# TPU: cloud.google.com/tpu/docs/v5e, v5p, v6e (HBM, FLOP/s, bandwidths). The usable HBM is the
# limit the compiler reports for a program that does not fit. Link rates, one way, and rings:
# jax-ml.github.io/scaling-book/tpus. Google publishes no power for these chips; TPU v4 draws 170 W
# on average (arXiv 2304.01433). The figures here are round guesses in proportion: pass --watts for
# your own. Latencies are rounded from measurements: a few microseconds, ten through NCCL.
# GPU: NVIDIA's data sheets for the SXM modules (dense bfloat16 is half the figure "with sparsity";
# NVLink is counted both ways there); one 400 Gb/s adapter per GPU, 200 Gb/s for the A100; 92 % of
# the HBM, as a run is started with. Multiprocessors: NVIDIA's white papers for the A100 and the
# H100, and the CUDA programming guide's table of compute capabilities.
_HOPPER = Multiprocessors(capability=(9, 0), count=132, cores=128, shared_bytes=228 * 1024,
                          cache_bytes=50 * 2**20, clock_ghz=1.98)
CHIPS = {
    "tpu:v5e": Chip(
        name="TPU v5e", hbm_bytes=15.75 * GIB, flops=197e12, hbm_bandwidth=819e9,
        link_bandwidth=45e9, host_bandwidth=15e9, latency=3e-6, watts=200, chips_per_host=4,
        axes=2, wraps_at=16, most=256),
    "tpu:v5p": Chip(
        name="TPU v5p", hbm_bytes=95.74 * GIB, flops=459e12, hbm_bandwidth=2765e9,
        link_bandwidth=90e9, host_bandwidth=15e9, latency=3e-6, watts=400, chips_per_host=4,
        axes=3, wraps_at=4, most=8960),
    "tpu:v6e": Chip(
        name="TPU v6e", hbm_bytes=31.25 * GIB, flops=918e12, hbm_bandwidth=1640e9,
        link_bandwidth=90e9, host_bandwidth=15e9, latency=3e-6, watts=300, chips_per_host=4,
        axes=2, wraps_at=16, most=256),
    "gpu:a100": Chip(
        name="A100 80 GB", hbm_bytes=0.92 * 79 * GIB, flops=312e12, hbm_bandwidth=2039e9,
        link_bandwidth=300e9, network_bandwidth=25e9, host_bandwidth=25e9, latency=10e-6,
        watts=400, chips_per_host=8, most=8, multiprocessors=Multiprocessors(
            capability=(8, 0), count=108, cores=64, shared_bytes=164 * 1024,
            cache_bytes=40 * 2**20, clock_ghz=1.41)),
    "gpu:h100": Chip(
        name="H100 80 GB", hbm_bytes=0.92 * 79 * GIB, flops=989e12, hbm_bandwidth=3350e9,
        link_bandwidth=450e9, network_bandwidth=50e9, host_bandwidth=50e9, latency=10e-6,
        watts=700, chips_per_host=8, most=8, multiprocessors=_HOPPER),
    "gpu:h200": Chip(
        name="H200 141 GB", hbm_bytes=0.92 * 139 * GIB, flops=989e12, hbm_bandwidth=4800e9,
        link_bandwidth=450e9, network_bandwidth=50e9, host_bandwidth=50e9, latency=10e-6,
        watts=700, chips_per_host=8, most=8, multiprocessors=_HOPPER),
}


def gpu_description(chip: Chip) -> str:
    """Returns what XLA compiles for instead of a GPU that is present: a GpuTargetConfigProto."""
    parts = chip.multiprocessors
    assert parts is not None
    major, minor = parts.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{chip.name}"
        dnn_version_info {{ major: 9 minor: 12 }}
        runtime_version {{ major: 13 minor: 0 patch: 0 }}
        gpu_device_info {{
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            device_memory_size: {int(chip.hbm_bytes)}
            memory_bandwidth: {int(chip.hbm_bandwidth)}
            core_count: {parts.count}
            fpus_per_core: {parts.cores}
            clock_rate_ghz: {parts.clock_ghz}
            l2_cache_size: {parts.cache_bytes}
            shared_memory_per_core: {parts.shared_bytes}
            shared_memory_per_block: 49152
            shared_memory_per_block_optin: {parts.shared_bytes - 1024}
            registers_per_core_limit: 65536
            registers_per_block_limit: 65536
            threads_per_core_limit: 2048
            threads_per_block_limit: 1024
            threads_per_warp: 32
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
        }}"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A machine: connected chips."""

    text: str                       # as given on the command line
    kind: str                       # tpu | gpu | cpu
    chip: Chip
    shape: tuple[int, ...]          # of the torus; (nodes, GPUs in each); (devices,) of a CPU

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        return -(-self.chips // self.chip.chips_per_host)

    @property
    def topology(self) -> str:
        """The name that libtpu uses."""
        return f"{self.text.split(':')[1]}:{'x'.join(map(str, self.shape))}"

    def bandwidth(self, group: int, stride: int = 1) -> float:
        """Returns the bytes a second that one chip sends in a collective over a group of chips.

        A TPU group uses as many torus axes, largest first, as it needs to hold all its chips. GPUs
        of one node use its links, those of several nodes the network, through all adapters of a
        node if the group holds whole nodes.
        Args: stride, between neighbours of the group.
        """
        if group <= 1 or self.kind == "cpu":
            return math.inf if group <= 1 else self.chip.link_bandwidth

        if self.kind == "gpu":
            node = self.shape[-1]
            if group * stride <= node:
                return self.chip.link_bandwidth
            members = max(node // stride, 1)            # of the group, on one node
            return min(self.chip.link_bandwidth, members * self.chip.network_bandwidth)

        bandwidth, covered = 0.0, 1
        for size in sorted(self.shape, reverse=True):
            if size > 1 and covered < group:
                links = 2 if size % self.chip.wraps_at == 0 else 1      # a ring sends both ways
                bandwidth, covered = bandwidth + links * self.chip.link_bandwidth, covered * size
        return bandwidth


def has_compiler(kind: str) -> bool:
    """Returns whether programs for chips of this kind can be compiled here, without such a chip."""
    packages = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"),
                "cpu": ("jaxlib",)}[kind]
    return any(importlib.util.find_spec(package) is not None for package in packages)


def parse(text: str) -> Target:
    """Parses a target: tpu:v5e:4x4, gpu:h100:2x8 (nodes x GPUs), cpu:8 (virtual devices).

    Raises: UserError.
    """
    family, _, rest = text.partition(":")
    if family == "cpu":
        if rest and not re.fullmatch(r"[1-9]\d{0,3}", rest):
            raise UserError(f"--chips {text}: expected cpu or cpu:N with a number "
                            f"of virtual devices, found {rest!r}")
        return cpu(int(rest or 1))

    name, _, size = rest.partition(":")
    chip = CHIPS.get(f"{family}:{name}")
    if chip is None:
        raise UserError(
            f"--chips {text}: expected cpu or one of {', '.join(CHIPS)} with a size, such as "
            f"{DEFAULT_SHAPES}")

    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        example = {"tpu": "4x4" if chip.axes == 2 else "2x2x4", "gpu": "8 or 2x8"}[family]
        raise UserError(f"--chips {text}: expected a size after {family}:{name}, "
                        f"such as {example}, found {size!r}")

    shape = tuple(map(int, size.split("x")))
    target = Target(text=text, kind=family, chip=chip, shape=shape)
    (_check_tpu if family == "tpu" else _check_gpu)(target)
    return target


def _check_tpu(target: Target) -> None:
    chip, shape = target.chip, target.shape
    if len(shape) != chip.axes:
        example = "x".join(["4"] * chip.axes)
        raise UserError(f"--chips {target.text}: a {chip.name} slice has {chip.axes} axes, such as "
                        f"{example}, found {len(shape)}")
    if target.chips > chip.most:
        raise UserError(
            f"--chips {target.text}: a {chip.name} slice has at most {chip.most:,} chips, found "
            f"{target.chips:,}")
    if target.chips > 1 and any(size % 2 for size in shape[:2]):
        raise UserError(f"--chips {target.text}: a host holds 2x2 chips, so the first two sizes "
                        f"must be even (or all 1), found {'x'.join(map(str, shape))}")


def _check_gpu(target: Target) -> None:
    if len(target.shape) > 2:
        raise UserError(f"--chips {target.text}: expected GPUs or NODESxGPUS, "
                        f"found {len(target.shape)} numbers")
    if target.shape[-1] > target.chip.most:
        raise UserError(
            f"--chips {target.text}: a node holds at most {target.chip.most} GPUs, found "
            f"{target.shape[-1]}; several nodes are NODESxGPUS, such as 2x8")


def cpu(devices: int) -> Target:
    """Returns this machine, shared by virtual devices; only its memory and counts mean anything."""
    cores = os.cpu_count() or 1
    # half is left for the rest of a run
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2

    chip = Chip(name="this machine's CPU" if devices == 1 else f"1/{devices} of this machine's CPU",
                hbm_bytes=memory / devices, flops=40e9 * cores / devices,
                hbm_bandwidth=20e9 / devices, link_bandwidth=5e9 / devices,
                host_bandwidth=10e9 / devices, latency=50e-6, watts=10 * cores / devices,
                chips_per_host=devices, most=devices)
    return Target(text="cpu" if devices == 1 else f"cpu:{devices}", kind="cpu", chip=chip,
                  shape=(devices,))

"""Measures how much memory and time a checkpoint takes to load, and that the host holds no second
copy of it.

    python -m benchmarks.models.loading --model DIR [--devices 8] [--json]

Peak memory is what the process held at most while loading, file pages included, less what it held
before. The overhead is that peak less the weights themselves, which on the CPU live in the same
memory. The largest tensor group is the largest of our weights: one matrix of all layers, or the
embedding.
"""

import argparse
import json
import math
import os
import time


def memory(entry: str) -> int:
    """Bytes, from this process's status: VmRSS, what it holds now; VmHWM, at most so far."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(entry))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--devices", type=int, default=1,
                        help="virtual CPU devices; the weights are split over them")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args()
    # JAX reads these when it is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} "
                               f"--xla_force_host_platform_device_count={options.devices}").strip()
    import jax

    from effreason.lm import model
    from effreason.lm.hf import hub, weights
    from effreason.lm.hf.config import read_config
    from effreason.runtime import sharding

    directory, _ = hub.find(options.model, None, ())
    config = read_config(directory)
    targets = sharding.tree_sharding(sharding.make_mesh(fsdp=options.devices),
                                     model.logical_axes(config))
    leaves = jax.tree.leaves(model.abstract_params(config))
    before, started, processed = memory("VmRSS"), time.perf_counter(), time.process_time()
    params = jax.block_until_ready(weights.read_weights(directory, config, targets))
    seconds, processor = time.perf_counter() - started, time.process_time() - processed
    peak = memory("VmHWM") - before
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    row = {"model": directory.name, "devices": options.devices, "parameters": result // 4,
           "result_bytes": result,
           "peak_bytes": peak, "overhead_bytes": peak - result, "largest_group_bytes": largest,
           "overhead_over_largest_group": (peak - result) / largest, "seconds": seconds,
           "cpu_seconds": processor}
    if options.json:
        print(json.dumps(row))
        return
    print(f"{row['model']}: {row['parameters']:,} parameters on "
          f"{options.devices} device(s) in {seconds:.1f} s "
          f"({processor:.1f} s of processor time)")
    for name, size in (("weights in float32", result), ("peak memory", peak),
                       ("overhead", peak - result),
                       ("largest tensor group", largest)):
        print(f"  {name:22} {size / 2**20:9,.0f} MiB")


if __name__ == "__main__":
    main()

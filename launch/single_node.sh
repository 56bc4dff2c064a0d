#!/usr/bin/env bash
# One machine with several GPUs: one process drives all of them. docs/launch/single-node.md
#
#   RUN=runs/r1 launch/single_node.sh [--section.field VALUE ...]
#
# The same command begins a run and goes on with it, as RUN/config.yaml has it.
set -euo pipefail

CONFIG=${CONFIG:-configs/r1_distill_1p5b.yaml}
RUN=${RUN:-runs/r1_distill_1p5b}        # on a disk that outlives the machine, if it may be taken away
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}     # they share the weights, the optimiser's state and the batch
EFFREASON=${EFFREASON:-effreason}       # the command, where it is not on the PATH

# JAX takes three quarters of a GPU's memory for itself if nothing else is said.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

resume=false
if [[ -e $RUN/config.yaml ]]; then
    resume=true CONFIG=$RUN/config.yaml     # as it began, whatever the recipe says by now
fi
exec "$EFFREASON" train --config "$CONFIG" --mesh.data 1 --mesh.fsdp "$GPUS" --mesh.tensor 1 \
    --update.rows_per_micro_batch "$GPUS" --run.directory "$RUN" --run.resume "$resume" "$@"

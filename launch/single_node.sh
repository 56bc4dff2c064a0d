#!/usr/bin/env bash
# Trains on one machine with several GPUs, all driven by one process. docs/launch/single-node.md
#
#   RUN=runs/r1 launch/single_node.sh [--section.field VALUE ...]
#
# CONFIG names a recipe for these GPUs: mesh and rows are taken from it. For others, see docs/launch/single-node.md.
# The same command starts a run, and resumes it later with the settings in RUN/config.yaml.
set -euo pipefail

GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
if ((GPUS == 1)); then recipe=r1_distill_1p5b_h100; else recipe=r1_distill_1p5b_8xh100; fi
CONFIG=${CONFIG:-configs/$recipe.yaml}
RUN=${RUN:-runs/r1_distill_1p5b}        # on a disk that outlives the machine, if it can be preempted
EFFREASON=${EFFREASON:-effreason}       # the command, if it is not on the PATH

resume=false
if [[ -e $RUN/config.yaml ]]; then
    resume=true CONFIG=$RUN/config.yaml     # as it started, even if the recipe has changed
fi
exec "$EFFREASON" train --config "$CONFIG" --run.directory "$RUN" --run.resume "$resume" "$@"

#!/usr/bin/env bash
# Trains on a TPU pod slice, by running the same command on every host. docs/launch/tpu-pod.md
#
#   export TPU=NAME ZONE=ZONE PROJECT=PROJECT EXPORT=ADDRESS:/SHARE HOSTS=4
#   launch/tpu_pod.sh install       once, on a new slice
#   launch/tpu_pod.sh train [--section.field VALUE ...]     starts or resumes the run
#   launch/tpu_pod.sh log           shows the output of process 0, until Ctrl-C
#   launch/tpu_pod.sh stop          saves and stops the run
set -euo pipefail

TPU=${TPU:?the name of the slice}
ZONE=${ZONE:?its zone}
PROJECT=${PROJECT:?its project}
EXPORT=${EXPORT:?a network disk (NFS, Filestore), mounted on every host: runs outlive the slice there}
HOSTS=${HOSTS:?how many hosts the slice has, such as 4 for v5e 4x4}
NAME=${NAME:-r1_distill_1p5b}           # of the run, one word
CONFIG=${CONFIG:-configs/r1_distill_1p5b.yaml}
SOURCE=${SOURCE:-$PWD}                  # this repository, copied to every host
GCLOUD=${GCLOUD:-gcloud}

on() {                                  # hosts (all, or a number), a command
    "$GCLOUD" compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --project "$PROJECT" --worker "$1" --command "$2"
}

# These are run by the shells of the hosts, so ~ is the home directory there.
# shellcheck disable=SC2016
MOUNT='set -eu
mkdir -p ~/shared
command -v mount.nfs > /dev/null || { sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common; } > /dev/null
mountpoint -q ~/shared || sudo mount -t nfs "$EXPORT" ~/shared'
# shellcheck disable=SC2016
INSTALL='test -d ~/effreason/.venv || python3 -m venv ~/effreason/.venv
~/effreason/.venv/bin/pip install --quiet -e "$HOME/effreason[tpu]"
~/effreason/.venv/bin/effreason --help > /dev/null
echo "$(hostname): installed"'
# shellcheck disable=SC2016
TRAIN='if kill -0 "$(cat ~/effreason.pid 2> /dev/null)" 2> /dev/null; then echo "a run is under way"; exit 1; fi
cd ~/effreason
nohup .venv/bin/effreason train "$@" > ~/effreason.log 2>&1 < /dev/null &
echo $! > ~/effreason.pid'
# shellcheck disable=SC2016
STOP='pid=$(cat ~/effreason.pid)
kill -TERM "$pid" 2> /dev/null || true
while kill -0 "$pid" 2> /dev/null; do sleep 1; done
tail -n 1 ~/effreason.log'

command=${1:-}
shift || true
mount="EXPORT=$(printf %q "$EXPORT"); $MOUNT"
case $command in
install)
    "$GCLOUD" compute tpus tpu-vm scp --recurse "$SOURCE" "$TPU:effreason" --zone "$ZONE" --project "$PROJECT" \
        --worker all
    on all "$mount; $INSTALL"
    ;;
train)
    # Decided once, here: all hosts must be told the same.
    found=$(on 0 "$mount; test ! -e ~/shared/runs/$NAME/config.yaml || echo a run")
    resume=false recipe=$(printf %q "$CONFIG")
    if [[ $found == *"a run"* ]]; then
        # shellcheck disable=SC2088  # ~ is the host's
        resume=true recipe="~/shared/runs/$NAME/config.yaml"    # as it started
    fi
    # JAX finds the other hosts of a slice by itself; finding another number than this is an error.
    arguments=$(printf '%q ' --distributed.mode auto --distributed.processes "$HOSTS" --run.resume "$resume" "$@")
    # shellcheck disable=SC2088  # ~ is the host's
    on all "$mount; set -- --config $recipe $arguments --run.directory ~/shared/runs/$NAME; $TRAIN"
    ;;
log)
    on 0 'tail -n 100 -f ~/effreason.log'
    ;;
stop)
    on all "$STOP"
    ;;
*)
    echo "usage: launch/tpu_pod.sh install | train [--section.field VALUE ...] | log | stop" >&2
    exit 2
    ;;
esac

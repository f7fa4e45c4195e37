#!/usr/bin/env bash
# Train on several machines; run the same line on each of them, with a folder that all see as run.output_dir:
#   NODES=2 HEAD=node1:29500 bash run_scripts/launch_nodes.sh --cfg-path projects/blip2/paper/pretrain_stage1_vitg.yaml
# NODES: how many machines. HEAD: the address of one of them, with a free port. NPROC: processes on each (its GPUs).
# JOB: tells runs that share a head apart. A machine that drops out is waited for RESTARTS times (3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
cd "$repository"

: "${NODES:?set NODES to the number of machines}" "${HEAD:?set HEAD to host:port of one of the machines}"
# A mistake in the configuration is said once, here, and not by every process at every start.
.venv/bin/python train.py "$@" --print-config > /dev/null
gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
# So long a stopped process has to finish its step, or an evaluation, and to save; torchrun's own limit is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-110}"
exec .venv/bin/python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$nproc" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-lavis_lite}" \
    --max-restarts="${RESTARTS:-3}" train.py "$@"

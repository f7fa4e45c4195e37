#!/usr/bin/env bash
# Train on one machine, a process for each GPU (or NPROC of them; on CPUs 1 unless NPROC says otherwise):
#   bash run_scripts/launch_node.sh --cfg-path projects/blip2/pretrain_stage1.yaml --options run.max_steps=100
# A process that dies is started again with all the others, RESTARTS times (3), and they go on from the last checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
cd "$repository"

# A mistake in the configuration is said once, here, and not by every process at every start.
.venv/bin/python train.py "$@" --print-config > /dev/null
gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
# So long a stopped process has to finish its step, or an evaluation, and to save; torchrun's own limit is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-110}"
exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node="$nproc" \
    --max-restarts="${RESTARTS:-3}" train.py "$@"

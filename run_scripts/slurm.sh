#!/usr/bin/env bash
#SBATCH --job-name=lavis_lite
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# Train under SLURM; what stands above can be overridden on the line:
#   sbatch --nodes=4 run_scripts/slurm.sh --cfg-path projects/blip2/paper/pretrain_stage1.yaml
# Preempted, or two minutes before its time is over, the job saves, ends, and is queued again until the run is finished:
# the same command then goes on from the checkpoint (run.resume: auto).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch from the repository}"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES=$SLURM_JOB_NUM_NODES HEAD="$head:$((20000 + SLURM_JOB_ID % 20000))" JOB=$SLURM_JOB_ID

preempted=0 step=
stop_step() { [ -z "$step" ] || kill -TERM "$step" 2>/dev/null || true; }
trap 'preempted=1; stop_step' TERM
srun --kill-on-bad-exit=1 bash run_scripts/launch_nodes.sh "$@" &
step=$!
if [ "$preempted" = 1 ]; then stop_step; fi # the signal came before there was a step to stop
status=0
# The trap interrupts the first wait; the second is for the ranks, which save.
wait "$step" || status=$?
if [ "$preempted" = 1 ]; then
    wait "$step" || true
    echo "preempted: job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"

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
#   sbatch --nodes=4 run_scripts/slurm.sh --cfg-path projects/blip2/paper/pretrain_stage1_vitg.yaml
# Preempted, or two minutes before its time is over, the job saves, ends, and is queued again until the run is finished:
# the same command then goes on from the checkpoint (run.resume: auto).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch from the repository}"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES=$SLURM_JOB_NUM_NODES HEAD="$head:$((20000 + SLURM_JOB_ID % 20000))" JOB=$SLURM_JOB_ID

preempted=0 step=
# srun itself would answer the signal by killing its processes; scancel hands it to them, and not to this script.
stop_step() { [ -z "$step" ] || scancel --signal=TERM "$SLURM_JOB_ID" || true; }
# Told once: a second signal would end the step while it saves.
told() { [ "$preempted" = 1 ] || stop_step; preempted=1 interrupted=1; }
trap told TERM
srun --kill-on-bad-exit=1 bash run_scripts/launch_nodes.sh "$@" &
step=$!
if [ "$preempted" = 1 ]; then stop_step; fi # the signal came before there was a step to stop
# Every signal cuts a wait short: wait until the step is gone, whose ranks save.
status=0 interrupted=1
while [ "$interrupted" = 1 ]; do
    interrupted=0 code=0
    wait "$step" || code=$?
    if [ "$code" != 127 ]; then status=$code; fi # 127: it was waited for already
done
# A run that was finished before the signal reached it ends with 0.
if [ "$preempted" = 1 ] && [ "$status" != 0 ]; then
    echo "preempted: job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"

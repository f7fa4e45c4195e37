#!/usr/bin/env bash
# The main job on a fresh machine: install into .venv, then pre-train stage 1 of BLIP-2 on the embedded world.
# Arguments go to train.py, e.g.: bash run_scripts/quickstart.sh --options run.max_steps=100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "" # without the "" it would see our own arguments
cd "$repository"
exec .venv/bin/python train.py --cfg-path projects/blip2/pretrain_stage1.yaml "$@"

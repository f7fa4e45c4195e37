#!/usr/bin/env bash
# Every check: style, types, direction of imports, tests on all cores. Arguments go to pytest: -m 'not slow' -k loader
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$repository"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
# A process for each core needs one thread; a file stays with one process, for its fixtures may cost minutes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest --numprocesses=auto --dist=loadfile "$@"

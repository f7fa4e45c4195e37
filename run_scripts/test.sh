#!/usr/bin/env bash
# Every check: style, types, direction of imports, tests. Arguments go to pytest, e.g.: -m 'not slow' -k loader
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$repository"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
exec .venv/bin/python -m pytest "$@"

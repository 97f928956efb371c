#!/usr/bin/env bash
# Runs every test that this machine can run: lint, then pytest (its arguments may be given here). Installs what it needs.
# Files of tests are shared out over the cores, one thread each; where there is a GPU, which they would share, they take turns.
[ -n "${BASH_VERSION:-}" ] || { echo "tests/run.sh: this shell is not bash: start it with bash." >&2; exit 1; }
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(./run.sh --python tests/requirements.txt)
"$python" -m ruff check --ignore E501 .  # long lines are for a test marked record: an experiment may have one
workers=(-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
if timeout 30 nvidia-smi -L >/dev/null 2>&1; then workers=(); else export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
exec "$python" -m pytest -q --durations=10 "${workers[@]}" "$@"

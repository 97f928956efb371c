#!/usr/bin/env bash
# Runs every test that this machine can run: lint, then pytest (its arguments may be given here). Installs what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(./run.sh --python tests/requirements.txt)
"$python" -m ruff check .
exec "$python" -m pytest -q --durations=10 "$@"

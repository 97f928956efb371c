#!/usr/bin/env bash
# What only a GPU can show, in stages (docs/first_gpu.md). Installs nothing: takes .venv or python3, the one whose torch
# has a GPU.
[ -n "${BASH_VERSION:-}" ] || { echo "tests/gpu.sh: this shell is not bash: start it with bash." >&2; exit 1; }
set -euo pipefail
[[ ${DATA_PATH:-/} = /* ]] || export DATA_PATH=$PWD/$DATA_PATH
cd "$(dirname "$0")/.."
sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
python=python3
if [ -x .venv/bin/python ] && { sees_gpu .venv/bin/python || ! sees_gpu python3; }; then python=.venv/bin/python; fi
exec "$python" records/tools/bench/stages.py "$@"

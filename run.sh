#!/usr/bin/env bash
# One command from a bare machine to a training run. ./run.sh --help says more.
[ -n "${BASH_VERSION:-}" ] || { echo "run.sh: this shell is not bash: start it with bash run.sh." >&2; exit 1; }
set -euo pipefail
# The caller names paths from the caller's folder.
for name in DATA_PATH TRAIN_SCRIPT RESUME_FROM; do
    [[ -z ${!name:-} || ${!name} = /* ]] || export "$name=$PWD/${!name}"
done
[[ ${1:-} != --python || -z ${2:-} || $2 = /* ]] || set -- --python "$PWD/$2"
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: ./run.sh [PRESET]

Sets up Python, looks at the machine and trains. It says what it finds and does, and it is safe to run again.
  no GPU    makes shards from text that Python carries and trains `tiny`: 2 to 5 minutes on 2 cores
            (`small`: half as wide and deep, 240 steps, for comparisons)
  GPUs      fetches the FineWeb shards that are missing and trains `medium` (the record), or the preset named
            (`baseline`: the same without Smear-MTP, 5,550 steps), on the largest of 8, 4, 2, 1 of them with torchrun

The environment: an active one that satisfies requirements.txt is used as it is; otherwise .venv is made and filled.
The shards: the preset's folder below data/, or the folder that DATA_PATH names.
The script: train_gpt_medium.py, or the one that TRAIN_SCRIPT names (an edited copy of it, for comparisons).
Paths are meant from the folder in which you are.

A preset is one of the script's: medium, baseline, short, tiny and small, or one of your own. Without TRAIN_SCRIPT it may
be one of another recipe's in records/: mudd, mudd_smear, mudd_short and mudd_tiny (for a CPU), or 1b.

  ./run.sh --presets         list them: name, gpu or cpu, constants (on a terminal, what differs from the first)
  ./run.sh --check [PRESET]  only look: GPUs, driver, torch, all-reduce, memory, shards, disks, duration
  ./run.sh --python [FILE]   only set up Python (for FILE instead of requirements.txt) and print its interpreter
TEXT
}

die() { echo "run.sh: $*" >&2; exit 1; }

[ -f "${TRAIN_SCRIPT:-train_gpt_medium.py}" ] ||
    die "TRAIN_SCRIPT names $TRAIN_SCRIPT, which does not exist: name a training script."

# True if interpreter $1 has every package of file $2 in the version pinned there, and the files it refers to.
satisfies() {
    "$1" - "$2" <<'PYTHON' 2>/dev/null
import importlib.metadata, pathlib, sys

def check(path):
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            check(path.parent / line[3:])
        elif line:
            name, _, version = line.partition("==")
            if version not in ("", importlib.metadata.version(name).split("+")[0]):
                sys.exit(1)

check(pathlib.Path(sys.argv[1]))
PYTHON
}

# Prints an interpreter that satisfies requirements file $1; what it does is said on stderr.
set_up_python() {
    local requirements=$1 active
    [ -f "$requirements" ] || die "$requirements does not exist: name a requirements file."
    active=$(command -v python3) || die "python3 is not installed: install Python 3.10 to 3.13."
    if satisfies "$active" "$requirements"; then echo "$active"; return; fi
    if ! satisfies .venv/bin/python "$requirements"; then
        "$active" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
            die "$("$active" --version) cannot run the pinned packages: put Python 3.10 to 3.13 first on PATH."
        echo "run.sh: installing $requirements into .venv (once; on a GPU machine this is some GB)" >&2
        "$active" -m venv .venv >&2 ||  # what is in it already stays; pip is added where `uv venv` left it out
            die "python3 cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" >&2 ||
            die "installing $requirements failed: see pip's message above; running this again continues."
    fi
    echo "$PWD/.venv/bin/python"
}

# What is trained, from where: set by the look at the machine, which ends this script where something is wrong.
plan() {
    local line
    line=$("$python" data/preflight/preflight.py --plan "$1")
    read -r preset nproc num_shards script <<<"$line"
}

train_on_cpu() {
    local data=${DATA_PATH:-data/text} output losses
    if ls "$data"/*_train_*.bin >/dev/null 2>&1; then
        echo "I train the preset $preset on the shards in $data:"
    else
        echo "I make shards of Python's own documentation in $data and train the preset $preset:"
        "$python" data/shards.py text "$data"
    fi
    output=$(mktemp)
    trap "rm -f '$output'" EXIT
    "$python" "$script" "$preset" | tee "$output"
    losses=($(sed -n 's/.*val_loss:\([0-9.]*\) .*/\1/p' "$output"))
    cat <<TEXT

Trained the $preset model on $data: validation loss ${losses[0]} before, ${losses[-1]} after (nats per byte).
Log, with the full source and every constant: $(sed -n 's/^preset .*, log //p' "$output")
On 8xH100, ./run.sh trains the record instead: 5,535 steps of FineWeb to a loss of 2.92 (published: 23 minutes).
TEXT
}

train_on_gpus() {
    local data=${DATA_PATH:-data/fineweb10B}
    # Shards that are not FineWeb's, synthetic ones for example, are taken as they are.
    if find -L "$data" -maxdepth 1 -name '*_train_*.bin' ! -name 'fineweb_*' 2>/dev/null | grep -q .; then
        echo "I train the preset $preset on $nproc GPUs with torchrun."
    else
        echo "I fetch what FineWeb shards are missing in $data and train the preset $preset on $nproc GPUs with torchrun."
        "$python" data/shards.py get "$data" --shards "$num_shards"
    fi
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc" "$script" "$preset"
}

case "${1:-}" in
    -h | --help) usage ;;
    --python) set_up_python "${2:-requirements.txt}" ;;
    --check)
        python=$(set_up_python requirements.txt)
        exec "$python" data/preflight/preflight.py ${2:+"$2"} ;;
    --presets)
        python=$(set_up_python requirements.txt)
        exec "$python" data/preflight/preflight.py --presets ;;
    -*) usage >&2; die "'$1' is not an option." ;;
    *)
        python=$(set_up_python requirements.txt)
        plan "${1:-}"
        if [ "$nproc" = 0 ]; then train_on_cpu; else train_on_gpus; fi ;;
esac

"""An experiment is one edit of the recipe: every patch of tests/edits, applied to a copy of the repository, trains."""
import difflib
import json
import shutil
import socket
import subprocess
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import train_gpt_medium as tgm
from compare import compare_sides, read_side
from edited import SIZES, constants_of, run_copy
from fault_driver import SERVER
from helpers import ALONE, ROOT, TRAINER, environment, random_ids, small_config, write_shard
from run_log import Run, read_log

PATCHES = ROOT / "tests" / "edits"
C, V, SLICE = 64, 257, SIZES["seq_len"]
LIMIT_S = 300  # for the processes of an edit, on a machine that others use too


class Edit(NamedTuple):
    """What an edit changes in the script and in a run of four steps; all else stays."""
    hunks: int = 1
    constants: dict[str, str] = {}  # defaults of Config: a part of the new one
    banks: dict[str, int] = {}  # how many numbers, padded to 128
    num_slices: tuple[int, ...] = (8, 8, 8, 8)  # by step
    windows: tuple[int, ...] = (1, 4, 4, 5)  # by step, in blocks


EDITS = {
    "attention_gate": Edit(hunks=3, constants={"groups": "name='attn_gate'"},
                           banks={"attn_gate": 15 * 2 * 12 + 24}),  # layers, heads, channels
    "batch_ramp": Edit(constants={"stages": "num_slices=4"}, num_slices=(2, 2, 4, 8)),
    "linear_window": Edit(windows=(1, 2, 4, 6)),
    "mlp_factor": Edit(constants={"mlp_factor": "3"}, banks={"mlp_fc": 16 * 3 * C * C, "mlp_proj": 16 * 3 * C * C}),
    "newton_schulz": Edit(constants={"groups": f"newton_schulz=({', '.join(['(3.4445, -4.775, 2.0315)'] * 4)})"}),
    "no_smear_mtp": Edit(hunks=2, constants={"num_iterations": "5550", "smear_mtp": "False"}),
    "twelve_layers": Edit(hunks=2, constants={"layers": "attention=False", "backout_from": "8"}, banks={
        "mlp_fc": 12 * 4 * C * C, "mlp_proj": 12 * 4 * C * C, "qkvo": 11 * 4 * C * C}),
    "value_embeddings": Edit(hunks=2, constants={"groups": "betas=(0.75, 0.95)"}, banks={
        "value_embeds": 5 * V * C + 64, "embeds": 2 * V * C}),
}


def copy_with(patch: Path, copy: Path) -> str:
    """The repository with the patch applied to its script, which is returned."""
    copy.mkdir()
    for name in ("data", "records", "pyproject.toml"):
        (copy / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TRAINER, copy)
    applied = subprocess.run(["git", "apply", "-C1", str(patch)], cwd=copy, capture_output=True, text=True)
    if applied.returncode:
        pytest.fail(f"tests/edits/{patch.name} does not apply to {TRAINER.name}: make its edit by hand and write the "
                    f"patch again with git diff.\n{applied.stderr}", pytrace=False)
    return (copy / TRAINER.name).read_text()


def outside_of_part_1(script: str) -> tuple[str, str]:
    above, banner, rest = script.partition("# Part 1: the recipe\n")
    _, next_banner, below = rest.partition("# Part 2: the machine\n")
    assert banner and next_banner
    return above, below


def write_shards(folder: Path, edit: Edit) -> None:
    """The slices of a step are equal, so that one rank and two compute the same bits; those of two steps are not."""
    config = small_config(**SIZES)
    slices = random_ids(len(edit.num_slices) * SLICE, config).view(-1, SLICE)
    slices[:, 0] = config.doc_token  # which is the last target of every slice
    write_shard(folder / "text_train_000001.bin", [*torch.repeat_interleave(
        slices, torch.tensor(edit.num_slices), 0).flatten(), config.doc_token])
    write_shard(folder / "text_val_000000.bin", random_ids(config.val_tokens + 1, config, seed=1))


def run_processes(copy: Path) -> None:
    """One rank, and two that share the work."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), OMP_NUM_THREADS="1")
    processes = {}
    for size, rank in ((1, 0), (2, 0), (2, 1)):
        (copy / f"ranks_{size}").mkdir(exist_ok=True)
        process = SERVER.Process(target=run_copy, args=(copy, rank, size, variables))
        processes[copy / f"ranks_{size}" / f"console_{rank}.txt"] = process
        process.start()
    try:
        for console, process in processes.items():
            process.join(LIMIT_S)
            assert process.exitcode == 0, console.read_text()
    finally:
        for process in processes.values():
            process.kill()


def losses(run: Run) -> list[tuple]:
    return [(v.step, v.loss, v.extras) for v in run.validations]


@pytest.mark.parametrize("name", sorted(patch.stem for patch in PATCHES.glob("*.patch")))
def test_an_edit_of_the_recipe_is_all_that_an_experiment_takes(name, tmp_path):
    edit, copy, published = EDITS[name], tmp_path / "copy", TRAINER.read_text()
    edited = copy_with(PATCHES / f"{name}.patch", copy)
    diff = list(difflib.unified_diff(published.splitlines(), edited.splitlines(), lineterm=""))
    assert sum(line.startswith("@@") for line in diff) == edit.hunks, "\n".join(diff)
    assert outside_of_part_1(edited) == outside_of_part_1(published)
    write_shards(copy / "shards", edit)
    run_processes(copy)

    constants, before = json.loads((copy / "ranks_1" / "constants.json").read_text()), constants_of(tgm.Config())
    assert {field for field in constants if constants[field] != before.get(field)} == edit.constants.keys()
    assert all(part in constants[field] for field, part in edit.constants.items())
    shards = tgm.load_part(next(copy.glob("ranks_1/checkpoints/*/step_000004/rank_0.pt")))["shards"]
    config = small_config(**SIZES)
    assert {bank: shard.numel() for bank, shard in shards.items()} == edit.banks | {
        name: bank.shard.numel() for name, bank in tgm.Optimizer(config.make_model(), config, ALONE).banks.items()
        if name not in edit.banks}

    straight, resumed = sorted(map(read_log, copy.glob("ranks_1/logs/*.txt")), key=lambda run: run.resumed_from)
    shared, = map(read_log, copy.glob("ranks_2/logs/*.txt"))
    assert [step for step, *_ in losses(straight)] == [0, 2, 4]
    assert losses(shared) == losses(straight) and losses(resumed) == losses(straight)[1:]
    assert straight.windows.tolist() == list(edit.windows)
    assert straight.tokens.tolist() == [SLICE * n for n in accumulate(edit.num_slices, initial=0)]
    rows = compare_sides(read_side(straight.path), read_side(shared.path))["ms_per_step_at_equal_window"]
    kinds = list(zip(edit.num_slices, edit.windows))
    assert {(row["tokens"] // SLICE, *row["windows"]): (row["steps_a"], row["steps_b"]) for row in rows} == {
        (num_slices, w, w): 2 * (kinds.count((num_slices, w)),) for num_slices, w in kinds}

"""An experiment is one edit of the recipe: every patch of tests/edits, applied to a copy of the repository, trains."""
import difflib
import json
import shutil
import subprocess
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import train_gpt_medium as tgm
from edited import SIZES, constants_of, run_copy
from helpers import ALONE, FEW_LAYERS, ROOT, SERVER, TRAINER, environment, free_port, random_ids, small_config, \
    write_shard
from run_log import Run, read_log

PATCHES = ROOT / "tests" / "edits"
C, V, SLICE = 64, 257, SIZES["seq_len"]
LIMIT_S = 300  # for the processes of an edit, on a machine that others use too


class Edit(NamedTuple):
    """What an edit changes in the script and in a run of four steps; all else stays."""
    constants: dict[str, str] = {}  # defaults of Config: a part of the new one, or nothing for one that is gone
    kept: tuple[str, ...] = ()  # tables that are not replaced by smaller ones, because the edit is of them
    banks: dict[str, int] = {}  # how many numbers, padded to 128; 0: there is none
    num_slices: tuple[int, ...] = (2, 2, 2, 2)  # by step
    windows: tuple[int, ...] = (1, 4, 4, 5)  # by step, in blocks
    step_fields: set[str] = set()  # further ones of a step's line
    scalars: tuple[str, ...] = ("smear_lambda", "backout_lambda_0", "backout_lambda_1")  # of a validation's line

    @property
    def shared(self) -> bool:
        """Whether two ranks train it, too: with banks or batches of its own, or norms over all ranks."""
        return bool(self.banks or "stages" in self.kept or "clip_norm" in self.constants)


BACKOUT = ("backout_lambda_0", "backout_lambda_1")
EDITS = {
    "attention_gate": Edit(constants={"groups": "name='attn_gate'"}, banks={
        "attn_gate": 3 * 2 * 12 + 56}),  # layers, heads, channels
    "batch_ramp": Edit(constants={"stages": "num_slices=4"}, kept=("stages",), num_slices=(2, 2, 4, 8)),
    "clipping": Edit(constants={"clip_norm": "0.1"}),
    "grouped_queries": Edit(constants={"heads_per_key": "2", "groups": "name='kv'"}, kept=("layers",), banks={
        "mlp_fc": 16 * 4 * C * C, "mlp_proj": 16 * 4 * C * C, "qkvo": 0, "qo": 15 * 2 * C * C, "kv": 15 * C * C,
        "scalars": 128, "embeds": 7 * V * C + 64}),
    "linear_window": Edit(windows=(1, 2, 4, 6)),
    "logged_fields": Edit(step_fields={"lr_factor", "muon_momentum"}, scalars=(
        "smear_lambda", *BACKOUT, *(f"skip_weight_{i}" for i in range(4)))),
    "mlp_factor": Edit(constants={"mlp_factor": "3"}, banks={"mlp_fc": 4 * 3 * C * C, "mlp_proj": 4 * 3 * C * C}),
    "newton_schulz": Edit(constants={"groups": f"newton_schulz=({', '.join(['(3.4445, -4.775, 2.0315)'] * 4)})"}),
    "no_smear_mtp": Edit(constants={"num_iterations": "5550", "smear_mtp": "False"}, scalars=BACKOUT),
    "smear_by_channel": Edit(scalars=("smear_lambda_mean", *BACKOUT)),
    "twelve_layers": Edit(constants={"layers": "attention=False", "backout_from": "8"}, kept=("layers",),
                          banks={"mlp_fc": 12 * 4 * C * C, "mlp_proj": 12 * 4 * C * C, "qkvo": 11 * 4 * C * C,
                                 "embeds": 7 * V * C + 64}),
    "two_latents": Edit(scalars=("smear_lambda_0", "smear_lambda_1", *BACKOUT)),
    "value_embeddings": Edit(constants={"groups": "betas=(0.75, 0.95)"}, banks={
        "value_embeds": V * C + 64, "embeds": 2 * V * C}),
    "warmup_cosine": Edit(constants={"warmup_share": "0.05", "flat_share": ""}),
    "z_loss": Edit(constants={"fused_head": "False"}),
}


def published() -> str:
    """The script, of whose recipe the edits are; they are left out where that is edited itself."""
    committed = subprocess.run(["git", "show", f"HEAD:{TRAINER.name}"], cwd=ROOT, capture_output=True, text=True)
    script = TRAINER.read_text()
    if committed.returncode == 0 and part_1(committed.stdout) != part_1(script):
        pytest.skip("the recipe is edited: these edits are of the committed one")
    return script


def part_1(script: str) -> str:
    return script.partition("# Part 1: the recipe\n")[2].partition("# Part 2: the machine\n")[0]


def copy_with(patch: Path, copy: Path) -> str:
    """The repository with the patch applied to its script, which is returned."""
    copy.mkdir()
    for name in ("data", "records", "pyproject.toml"):
        (copy / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TRAINER, copy)
    applied = subprocess.run(["git", "apply", str(patch)], cwd=copy, capture_output=True, text=True)
    if applied.returncode:
        pytest.fail(f"tests/edits/{patch.name} does not apply to {TRAINER.name}: make its edit by hand and write the "
                    f"patch again with git diff.\n{applied.stderr}", pytrace=False)
    return (copy / TRAINER.name).read_text()


def outside_of_part_1(script: str) -> tuple[str, str]:
    assert part_1(script)
    above, _, below = script.partition(part_1(script))
    return above, below


def write_shards(folder: Path, edit: Edit) -> None:
    """The slices of a step are equal, so that one rank and two compute the same bits; those of two steps are not."""
    config = small_config(**SIZES, num_slices=2)
    slices = random_ids(len(edit.num_slices) * SLICE, config).view(-1, SLICE)
    slices[:, 0] = config.doc_token  # which is the last target of every slice
    write_shard(folder / "text_train_000001.bin", [*torch.repeat_interleave(
        slices, torch.tensor(edit.num_slices), 0).flatten(), config.doc_token])
    write_shard(folder / "text_val_000000.bin", random_ids(config.val_tokens + 1, config, seed=1))


def run_processes(copy: Path, edit: Edit) -> None:
    """One rank, and where the edit changes what ranks send or share, two that share the work."""
    variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), OMP_NUM_THREADS="1")
    processes = {}
    for size, rank in ((1, 0), (2, 0), (2, 1))[:3 if edit.shared else 1]:
        (copy / f"ranks_{size}").mkdir(exist_ok=True)
        process = SERVER.Process(target=run_copy, args=(copy, rank, size, edit.kept, variables))
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


NAMES = sorted(patch.stem for patch in PATCHES.glob("*.patch"))
PLAIN = ("linear_window", "logged_fields", "mlp_factor", "newton_schulz", "no_smear_mtp", "warmup_cosine")


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_is_a_few_hunks_of_part_1(name, tmp_path):
    script, edited = published(), copy_with(PATCHES / f"{name}.patch", tmp_path / "copy")
    diff = list(difflib.unified_diff(script.splitlines(), edited.splitlines(), lineterm=""))
    assert 1 <= sum(line.startswith("@@") for line in diff) <= 4, "\n".join(diff)
    assert outside_of_part_1(edited) == outside_of_part_1(script)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in PLAIN)) for name in NAMES])
def test_what_an_edit_makes_trains_and_resumes(name, tmp_path):
    edit, copy, _ = EDITS.get(name, Edit()), tmp_path / "copy", published()
    copy_with(PATCHES / f"{name}.patch", copy)
    write_shards(copy / "shards", edit)
    run_processes(copy, edit)

    constants, before = json.loads((copy / "ranks_1" / "constants.json").read_text()), constants_of(tgm.Config())
    assert {field for field in constants | before if constants.get(field) != before.get(field)} == edit.constants.keys()
    assert all(part in constants.get(field, "") for field, part in edit.constants.items())
    shards = tgm.load_part(next(copy.glob("ranks_1/checkpoints/*/step_000004/rank_0.pt")))["shards"]
    config = small_config(**SIZES, layers=FEW_LAYERS, backout_from=1)
    banks = edit.banks | {name: bank.shard.numel() for name, bank in tgm.Optimizer(
        config.make_model(), config, ALONE).banks.items() if name not in edit.banks}
    assert {bank: shard.numel() for bank, shard in shards.items()} == {
        name: numbers for name, numbers in banks.items() if numbers}

    straight, resumed = sorted(map(read_log, copy.glob("ranks_1/logs/*.txt")), key=lambda run: run.resumed_from)
    shared = [*map(read_log, copy.glob("ranks_2/logs/*.txt"))]
    assert len(shared) == edit.shared
    assert [step for step, *_ in losses(straight)] == [0, 2, 4]
    assert losses(resumed) == losses(straight)[1:] and all(losses(run) == losses(straight) for run in shared)
    assert [tuple(v.extras) for v in straight.validations] == [edit.scalars] * 3
    fields = {"tokens", "window_blocks", "train_loss", *(f"grad_norm_{name}" for name in shards), *edit.step_fields}
    assert [straight.step_fields[step].keys() for step in (1, 2, 3, 4)] == [fields] * 4
    for other, steps in (*((run, (1, 2, 3, 4)) for run in shared), (resumed, (3, 4))):  # norms: sums of other parts
        assert other.step_fields == {step: pytest.approx(straight.step_fields[step], rel=1e-4) for step in steps}
    assert straight.windows.tolist() == list(edit.windows)
    assert straight.tokens.tolist() == [SLICE * n for n in accumulate(edit.num_slices, initial=0)]

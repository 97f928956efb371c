"""Real faults in real processes: each ends in one sentence, nothing that was complete is lost, and runs resume."""
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import records
import train_gpt_medium as tgm
from fault_driver import Started, is_alive, wait_for, write_copy
from helpers import ALONE, FEW_LAYERS, ROOT, random_ids, same, small_config, tensors, write_shard

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists() or torch.cuda.is_available(),
                                reason="reads the state of processes in /proc, and starts ranks without GPUs")
PIECE = 128  # tokens; two are a batch
NUM_STEPS = 8
DOWN_S = 30  # until all processes are down after one was lost


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> tgm.Config:
    """Both pieces of a batch are equal, so that one rank and two compute the same bits (test_distributed.py)."""
    config = small_config(layers=FEW_LAYERS, backout_from=1, num_slices=2, seq_len=PIECE, val_seq_len=PIECE,
                          val_tokens=256, num_iterations=NUM_STEPS, kernel_warmup_steps=0, checkpoint_every=2,
                          dtype=torch.float32)
    folder = tmp_path_factory.mktemp("shards")
    pieces = random_ids(NUM_STEPS * PIECE, config).view(NUM_STEPS, 1, PIECE).repeat(1, 2, 1)
    pieces[:, :, 0] = config.doc_token  # which is the last target of every piece
    write_shard(folder / "text_train_000001.bin", [*pieces.flatten(), config.doc_token])
    write_shard(folder / "text_val_000000.bin", random_ids(config.val_tokens + 1, config, seed=1))
    return tgm.replace(config, data_dir=str(folder))


@pytest.fixture
def place(config, tmp_path) -> Path:
    """A folder with a copy of the script that keeps checkpoints."""
    write_copy(tmp_path / "train.py", config)
    return tmp_path


def run(folder: Path, fault: str = "none 0 0", ranks: int = 0, **variables) -> tuple[int, str]:
    with Started(folder, fault, ranks, **variables) as started:
        return started.finish()


def newest_log(folder: Path) -> str:
    return max(folder.glob("logs/*.txt"), key=os.path.getmtime).read_text()


def losses(log: str) -> dict[int, str]:
    """Of the validations, digit by digit, with the learned scalars."""
    lines = re.findall(r"^step:(\d+)/\d+ val_loss:(\S+) .* step_avg:\S+ (.*)$", log, re.M)
    return {int(step): f"{loss} {scalars}" for step, loss, scalars in lines}


def last_step(log: str) -> int:
    return int(re.findall(r"^step:(\d+)/.*\n", log, re.M)[-1])


def sentence(console: str) -> str:
    """The one that the script's guard prints, the same on all ranks that print it."""
    (found,) = set(re.findall(r"^error: (.+)$", console, re.M))
    return found


def saved(folder: Path, ranks: int = 1) -> list[str]:
    """The checkpoints that all ranks completed, oldest first."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob("checkpoints/*/step_*")
                  if all((path / f"rank_{rank}.pt").exists() for rank in range(ranks)))


def check(folder: Path, capsys) -> str:
    """What records.py says of the last log alone."""
    only = folder / "last"
    only.mkdir()
    shutil.copy(max(folder.glob("logs/*.txt"), key=os.path.getmtime), only)
    assert records.main(["check", str(only)]) == 1
    shutil.rmtree(only)
    return capsys.readouterr().out


def assert_unfinished(folder: Path, capsys) -> None:
    """The last log tells what was completed, and no tool takes it for a whole run."""
    report, step = check(folder, capsys), last_step(newest_log(folder))
    assert ": unfinished: " in report and f" ends at step {step} of {NUM_STEPS}\n" in report


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """A run without a fault: its folder, with the checkpoints of steps 6 and 8, and its losses."""
    folder = tmp_path_factory.mktemp("straight")
    write_copy(folder / "train.py", config)
    code, console = run(folder)
    assert code == 0, console
    assert [Path(path).name for path in saved(folder)] == ["step_000006", "step_000008"]
    whole = losses(newest_log(folder))
    assert list(whole) == [0, 4, 8]
    return folder, whole


def assert_resumes(folder: Path, where: str, first_step: int, straight, ranks: int = 0) -> None:
    """RESUME_FROM=where ends as a run without a fault did."""
    code, console = run(folder, ranks=ranks, RESUME_FROM=where)
    assert code == 0, console
    log = newest_log(folder)
    assert re.search(rf"^resumed from checkpoints/\S+/step_{first_step:06d}: not eligible", log, re.M)
    assert losses(log) == {step: loss for step, loss in straight[1].items() if step >= first_step}


# ---- a rank is lost

def lose_a_rank(folder: Path, fault: str, capsys, lost: int = 1) -> tuple[int, str]:
    """Its process id and what was printed. All others are down in time, and the launcher says that it failed."""
    with Started(folder, fault, ranks=2) as started:
        pids = [started.pid(rank) for rank in started.ranks]
        wait_for(lambda: not is_alive(pids[lost]))
        code, console = started.finish(DOWN_S)
        assert code != 0 and not any(map(is_alive, pids))
    assert last_step(newest_log(folder)) == 4
    assert_unfinished(folder, capsys)
    return pids[lost], console


@pytest.mark.parametrize("lost, every", [(1, 0), (0, 2)])
def test_a_killed_rank_takes_the_others_down(config, tmp_path, straight, capsys, lost, every):
    """every: checkpoint_every; with it the other rank has its own handlers of signals, and waits in a collective."""
    write_copy(tmp_path / "train.py", tgm.replace(config, checkpoint_every=every))
    pid, console = lose_a_rank(tmp_path, f"die {lost} 5", capsys, lost)
    assert re.search(rf"rank\s*: {lost}.*\n.*exitcode\s*: -9 \(pid: {pid}\)", console), console
    assert (tmp_path / "checkpoints").exists() == bool(every)
    if every:
        (*_, path) = saved(tmp_path, 2)
        assert path.endswith("step_000004")
        assert_resumes(tmp_path, path, 4, straight, ranks=2)


def test_the_traceback_of_the_rank_that_failed_comes_first(place, capsys):
    _, console = lose_a_rank(place, "fail 1 5", capsys)
    errors = re.findall(r"^(?:\[rank\d\]: )?(?:\w+\.)*(\w+Error): ?(.*)", console, re.M)
    assert errors[0] == ("RuntimeError", "this rank has a fault of its own"), console
    assert errors[-1][0] == "ChildFailedError"
    assert [Path(path).name for path in saved(place, 2)] == ["step_000002", "step_000004"]


@pytest.mark.parametrize("stops", [[signal.SIGHUP], pytest.param([signal.SIGTERM, signal.SIGINT],
                                                                 marks=pytest.mark.slow)])
def test_two_ranks_resume_after_one_fault_after_the_other(place, straight, capsys, stops):
    """Killed while it saves, told to stop through the launcher by a signal, one nan: the end is a straight run's.

    Where one rank alone has the newest checkpoint, all resume from the one before it.
    """
    lose_a_rank(place, "die_writing 1 written", capsys)
    (path,) = saved(place, 2)
    assert path.endswith("step_000002") and [Path(path).name for path in saved(place)] == ["step_000002", "step_000004"]
    where, first = str(Path(path).parent), 2  # the run's folder: its last checkpoint is meant
    for last, number in enumerate(stops, start=8 - len(stops)):  # the last at 7: until 8 nothing is saved
        with Started(place, f"wait * {last}", ranks=2, RESUME_FROM=where) as started:
            for rank in started.ranks:
                started.reach(f"waiting_{rank}")
            started.send(number)
            code, console = started.finish()
        assert re.search(rf"^resumed from \S+/step_{first:06d}: not", newest_log(place), re.M)
        (path,) = (path for path in saved(place, 2) if path.endswith(f"step_{last:06d}"))
        ended = f"{number.name} ended the run after step {last}. RESUME_FROM={path} resumes from the last checkpoint."
        assert code != 0 and sentence(console) == ended
        assert newest_log(place).endswith(f"\nstopped: {ended}\n")
        assert_unfinished(place, capsys)
        where, first = path, last
    code, console = run(place, "spoil 1 8", ranks=2, RESUME_FROM=where)
    assert code != 0 and re.fullmatch(r"the mlp_proj gradient of step 8 was not finite: .+\. "
                                      rf"RESUME_FROM={where} resumes from the last checkpoint\.", sentence(console))
    assert len(re.findall("^error: ", console, re.M)) == 1  # which both ranks found
    assert losses(newest_log(place)) == {}
    assert_resumes(place, where, first, straight, ranks=2)
    code, console = run(place, RESUME_FROM=where)
    assert code == 1 and f"{where}/rank_0.pt was made with another number of ranks (2, here 1): " in sentence(console)


# ---- signals to stop

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step(place, straight, capsys, number):
    with Started(place, "wait 0 3") as started:
        started.reach("waiting_0")
        started.send(number)
        code, console = started.finish()
    (*_, path) = saved(place)
    ended = f"{number.name} ended the run after step 3. RESUME_FROM={path} resumes from the last checkpoint."
    assert path.endswith("step_000003") and code == 1 and sentence(console) == ended
    assert console.endswith(f"\nerror: {ended}\n") and newest_log(place).endswith(f"\nstopped: {ended}\n")
    assert last_step(newest_log(place)) == 3
    assert_unfinished(place, capsys)
    if number == signal.SIGTERM:
        assert_resumes(place, path, 3, straight)
        assert f" was resumed from {path}\n" in check(place, capsys)


@pytest.mark.parametrize("number, ranks", [(signal.SIGHUP, 0), (signal.SIGTERM, 2)])
def test_without_checkpoints_a_signal_ends_the_run_at_once(config, tmp_path, capsys, number, ranks):
    write_copy(tmp_path / "train.py", tgm.replace(config, checkpoint_every=0))
    with Started(tmp_path, "wait * 3", ranks) as started:
        for rank in started.ranks or (0,):
            started.reach(f"waiting_{rank}")
        started.send(number)
        code, _ = started.finish(DOWN_S)
        assert not any(is_alive(started.pid(rank)) for rank in started.ranks)
    assert code != 0 and last_step(newest_log(tmp_path)) == 2
    assert_unfinished(tmp_path, capsys)
    assert not (tmp_path / "checkpoints").exists()


# ---- a checkpoint that was not completed, is damaged, or is another run's

@pytest.mark.parametrize("where, last", [("none", 2), ("half", 2), ("written", 2), ("renamed", 4)])
def test_killed_while_a_checkpoint_is_written(place, straight, capsys, where, last):
    code, console = run(place, f"die_writing 0 {where}")
    assert code == -signal.SIGKILL, console
    assert_unfinished(place, capsys)
    (folder,) = place.glob("checkpoints/*")
    assert saved(place)[-1].endswith(f"step_{last:06d}")
    assert len(list(folder.glob("*/*.unfinished"))) == (last == 2)
    assert_resumes(place, str(folder.relative_to(place)), last, straight)


@pytest.fixture
def copied(straight, tmp_path) -> Path:
    """The run without a fault, with what it left."""
    return Path(shutil.copytree(straight[0], tmp_path / "copied"))


def test_a_damaged_checkpoint_names_the_one_before_it(copied, straight):
    before, path = saved(copied)
    part = copied / path / "rank_0.pt"
    part.write_bytes(part.read_bytes()[:-1])
    for where in (path, str(Path(path).parent)):
        code, console = run(copied, RESUME_FROM=where)
        assert code == 1 and console == (f"error: {path}/rank_0.pt is torn or damaged: RESUME_FROM={before} "
                                         f"resumes from the one before it.\n")
    assert len(list((copied / "logs").iterdir())) == 1  # that of the straight run
    assert_resumes(copied, before, 6, straight)


def test_a_flipped_bit_is_found_or_changes_nothing(config, copied, monkeypatch):
    """Anywhere in the file: what the check sums do not cover is not read. A file that is cut is found as well."""
    monkeypatch.chdir(copied)
    path = saved(copied)[-1]
    part = Path(path) / "rank_0.pt"
    data = bytearray(part.read_bytes())
    saved_part = torch.load(part, weights_only=True)
    whole = tensors(saved_part)
    checkpoints = tgm.Checkpoints(config, "", tgm.find_shards(config)[0], "run", 0, ALONE)
    checkpoints.made_by = saved_part["made_by"]

    def is_refused(content: bytes) -> bool:
        part.write_bytes(content)
        try:
            read = tensors(checkpoints.read(path))
        except tgm.UserError as error:
            assert re.fullmatch(rf"{part} is torn or damaged: RESUME_FROM=\S+ resumes from the one before it\.",
                                str(error))
            return True
        assert read.keys() == whole.keys() and all(same(read[key], whole[key]) for key in whole)
        return False

    assert all(is_refused(data[:length]) for length in (0, 1, len(data) // 2, len(data) - 1))
    anywhere = torch.randint(len(data), (100,), generator=torch.Generator().manual_seed(0)).tolist()
    refused = 0
    for position in (*anywhere, *range(len(data) - 100, len(data))):
        data[position] ^= 16
        refused += is_refused(data)
        data[position] ^= 16
    assert refused > 100


def test_another_runs_checkpoint_is_refused_with_what_differs(config, copied, tmp_path_factory):
    path = saved(copied)[-1]
    other_data = tmp_path_factory.mktemp("other")
    shutil.copytree(config.data_dir, other_data, dirs_exist_ok=True)
    write_shard(other_data / "text_train_000001.bin", random_ids(NUM_STEPS * 2 * PIECE + 2, config))
    source = (copied / "train.py").read_text()
    for word, changed, data in (
            ("logit_softcap (15.0, here 14.0)", source.replace("logit_softcap=15.0", "logit_softcap=14.0"),
             config.data_dir),
            (r"script (", source + "# another one\n", config.data_dir), ("set of shards (", source, other_data)):
        (copied / "train.py").write_text(changed)
        code, console = run(copied, DATA_PATH=str(data), RESUME_FROM=path)
        assert code == 1 and console.startswith(f"error: {path}/rank_0.pt was made with another {word}")
        assert console.count("\n") == 1


def test_a_checkpoint_that_is_not_there(place):
    for where, reason in (("nowhere/step_000002", "No such file or directory"), ("train.py", "Not a directory")):
        code, console = run(place, RESUME_FROM=where)
        assert code == 1 and console.count("\n") == 1
        assert console.startswith(f"error: {where}/rank_0.pt cannot be read ({reason}): ")


# ---- disks and folders

def test_a_disk_too_small_for_the_second_checkpoint(place, straight, mount, capsys):
    size = (straight[0] / saved(straight[0])[-1] / "rank_0.pt").stat().st_size
    mount(place / "checkpoints", f"size={size * 3 // 2}")
    code, console = run(place)
    (before,) = saved(place)
    path = f"{Path(before).parent}/step_000004/rank_0.pt"
    assert before.endswith("step_000002") and code == 1
    assert re.fullmatch(rf"{path} cannot be written \(.+; 0 MiB free\): make room\. "
                        rf"RESUME_FROM={before} resumes from the last checkpoint\.", sentence(console))
    assert not list(place.rglob("*.unfinished"))
    assert_unfinished(place, capsys)
    mount(place / "checkpoints", f"size={size * 8}")
    assert_resumes(place, before, 2, straight)


def test_a_disk_too_small_for_the_log(place, mount, capsys):
    """Full from the start, then in the middle."""
    mount(place / "logs", "size=16k")
    code, console = run(place)
    full = r"cannot be written \(.*No space left on device; 0 MiB free\): make room\."
    assert code == 1 and re.fullmatch(rf"error: logs/\S+\.txt {full}\n", console), console
    mount(place / "logs", "size=256k")
    code, console = run(place, "fill 0 3")
    (path,) = (path for path in place.glob("logs/*.txt") if path.stat().st_size > 2 ** 14)
    assert code == 1 and re.fullmatch(rf"logs/{path.name} {full} RESUME_FROM={saved(place)[-1]} resumes from the last "
                                      r"checkpoint\.", sentence(console))
    assert last_step(path.read_text()) == 2
    assert_unfinished(place, capsys)


@pytest.mark.parametrize("name", ["logs", "checkpoints"])
def test_a_file_in_a_folders_place(place, name):
    (place / name).write_text("here")
    code, console = run(place)
    assert code == 1 and re.fullmatch(rf"error: {name}/\S+ cannot be written \(.*File exists.*\): .+\.\n", console)
    assert (place / name).read_text() == "here"


def test_the_readme_lists_every_fault_and_every_file():
    text = (ROOT / "tests" / "README.md").read_text()
    faults = {name for name in globals() if name.startswith("test_") and "readme" not in name}
    assert faults == set(re.findall(r"`(test_\w+)`", text))
    listed = {folder.strip("/`"): set(re.findall(r"`(\w+\.py)`", rows)) for folder, rows in re.findall(
        r"^\| (`\w+/`|beside them) \|.*\n((?:\|.*\n)+)", text, re.M)}
    there = {}
    for path in (ROOT / "tests").rglob("*.py"):
        there.setdefault("beside them" if path.parent.name == "tests" else path.parent.name, set()).add(path.name)
    assert listed == there

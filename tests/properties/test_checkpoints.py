"""Stop and resume equal a straight run bit for bit; what is kept; what a run without checkpoints does not do."""
import os
import re
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import memory
import train_gpt_medium as tgm
from helpers import ALONE, FEW_LAYERS, enter, random_ids, run_main, run_ranks, same, small_config, train_few_layers, \
    write_shard

STOP_AFTER = 3  # steps: between two outer ones, in the middle of the second of three shards
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> tgm.Config:
    """Six steps on three shards of two batches each; every kind of layer, in the record's dtypes: with mantissas."""
    config = small_config(layers=FEW_LAYERS, backout_from=1, num_slices=4, seq_len=128, val_seq_len=128, val_tokens=512,
                          kernel_warmup_steps=1, seed=None)
    folder = tmp_path_factory.mktemp("shards")
    for number in (1, 2, 3):
        write_shard(folder / f"text_train_{number:06d}.bin", random_ids(2 * 512 + 7, config, seed=number))
    write_shard(folder / "text_val_000000.bin", random_ids(513, config))
    return tgm.replace(config, data_dir=str(folder))


def straight_and_resumed(world: tgm.World, config: tgm.Config, folder: Path) -> dict:
    os.chdir(folder)
    saving = tgm.replace(config, checkpoint_minutes=1000.0, seed=7)
    straight = run_main(world, tgm.replace(config, seed=7))
    assert not Path("checkpoints").exists()  # off unless asked for
    stopped = run_main(world, saving, stop_after=STOP_AFTER)
    resumed = run_main(world, saving, resume_from=str(next(Path("checkpoints").iterdir())))
    return dict(straight=straight, stopped=stopped, resumed=resumed)


def lines_of(folder: Path) -> list[tuple[str, list]]:
    """Of every log, oldest first: its head, and its steps and losses with all that follows the times."""
    texts = [path.read_text() for path in sorted((folder / "logs").iterdir(), key=os.path.getmtime)]
    step = re.compile(r"^step:(\d+)/6 (?:(val_loss:\S+) )?train_time:\d+ms step_avg:\S+ (.*)$", re.M)
    return [(text.split("=" * 100 + "\n")[-2], step.findall(text)) for text in texts]


@pytest.mark.parametrize("size", [1, 4])
def test_stop_and_resume_equal_a_straight_run_bit_for_bit(config, tmp_path, size):
    reports = run_ranks(size, straight_and_resumed, config, tmp_path, folder=tmp_path / "ranks")
    for rank, report in enumerate(reports):
        straight, stopped, resumed = (report[name] for name in ("straight", "stopped", "resumed"))
        assert straight["ended"] == resumed["ended"] == ""
        assert re.fullmatch(r"SIGTERM ended the run after step 3\. RESUME_FROM=checkpoints/\S+/step_000003 resumes "
                            r"from the last checkpoint\.", stopped["ended"]), rank
        assert straight["state"].keys() == resumed["state"].keys()
        assert [key for key, x in straight["state"].items() if not same(x, resumed["state"][key])] == []
        assert any(not same(x, stopped["state"][key]) for key, x in straight["state"].items())
    (_, whole), (_, first), (head, rest) = lines_of(tmp_path)
    assert [int(step) for step, *_ in first + rest] == [0, 1, 2, 3, 4, 4, 5, 6, 6]
    assert first + rest == whole  # digit by digit
    assert re.search(r"^resumed from checkpoints/\S+/step_000003: not eligible as a timed record$", head, re.M)
    assert "seed drawn or given: 7\n" in head


def test_the_last_two_are_kept_and_resumed(tmp_path):
    """To the end, with the clock going on, or after the end: then the last validation is repeated."""
    handlers = [signal.getsignal(number) for number in STOPS]
    config, run = train_few_layers(tmp_path, num_iterations=6, checkpoint_every=2)
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == [
        "step_000004", "step_000004/rank_0.pt", "step_000006", "step_000006/rank_0.pt"]
    expected = memory.checkpoint_bytes(config)  # what the disk is looked at for
    assert 0 < (run / "step_000006" / "rank_0.pt").stat().st_size - expected < 2**16  # random states, constants, names
    with pytest.MonkeyPatch.context() as patch:
        enter(tmp_path, patch)
        for where in (run / "step_000004", run):
            tgm.main(config, str(where))
    assert [signal.getsignal(number) for number in STOPS] == handlers
    (_, whole), (_, rest), (_, end) = lines_of(tmp_path)
    assert (rest, end) == (whole[-4:], whole[-1:]) and [step for step, *_ in rest] == ["4", "5", "6", "6"]
    log = sorted((tmp_path / "logs").iterdir(), key=os.path.getmtime)[1].read_text()
    milliseconds = [int(ms) for ms in re.findall(r"^step:\d+/6 .*train_time:(\d+)ms", log, re.M)]
    saved = tgm.load_part(run / "step_000004" / "rank_0.pt")
    assert milliseconds[0] == round(1000 * saved["seconds"]) > 0 and milliseconds == sorted(milliseconds)


def test_minutes_count_from_the_last_one(tmp_path, monkeypatch):
    """A clock of its own: every look at it is half a minute later."""
    now, saved, save = iter(range(0, 10_000, 30)), [], tgm.Checkpoints.save
    monkeypatch.setattr(tgm.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(tgm.Checkpoints, "save",
                        lambda self, step, *rest: saved.append(step) or save(self, step, *rest))
    train_few_layers(tmp_path, num_iterations=6, checkpoint_every=0, checkpoint_minutes=1.0)
    assert saved == [2, 4, 6]


@pytest.fixture
def checkpoints(config, tmp_path, monkeypatch) -> tgm.Checkpoints:
    monkeypatch.chdir(tmp_path)
    return tgm.Checkpoints(config, "source", tgm.find_shards(config)[0], "run", 0, ALONE)


@pytest.mark.parametrize("content", [{"model": 1}, [1, 2], {"made_by": {}}])
def test_a_file_of_something_else_is_refused(checkpoints, tmp_path, content):
    torch.save(content, tmp_path / "rank_0.pt")
    refused = r"rank_0\.pt (is torn or damaged|was made with another preset \(None, here)"
    with pytest.raises(tgm.UserError, match=refused):
        checkpoints.read(str(tmp_path))


@pytest.fixture
def heard():
    """The signals as a shell in the foreground leaves them: in the background, or under nohup, some are ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_between_two_looks_is_not_forgotten(heard, checkpoints, number):
    """It comes while the ranks tell each other that there was none; a second one changes nothing."""
    gather = checkpoints._gather
    with checkpoints.signals_noted():
        checkpoints._gather = lambda value: (gather(value), os.kill(os.getpid(), number))[0]
        assert not checkpoints.due(1)
        checkpoints._gather = gather
        os.kill(os.getpid(), number)
        assert checkpoints.due(2) and checkpoints.stopped_by == number


def test_content_and_names_are_on_disk_before_older_ones_are_deleted(config, checkpoints, monkeypatch):
    """The order of what reaches the file system when the third checkpoint is saved."""
    optimizer = tgm.Optimizer(tgm.GPT(config), config, ALONE)
    for step in (1, 2):
        checkpoints.save(step, 0.0, optimizer)
    calls, unlink = [], Path.unlink
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name)), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", Path(a).name, b.name)), replace(a, b)))
    monkeypatch.setattr(Path, "unlink", lambda path, **rest: (
        calls.append(("unlink", path.parent.name)) if path.exists() else None, unlink(path, **rest)))
    checkpoints.save(3, 0.0, optimizer)
    assert calls == [("fsync", "rank_0.pt.unfinished"), ("replace", "rank_0.pt.unfinished", "rank_0.pt"),
                     ("fsync", "step_000003"), ("fsync", "run"), ("fsync", "checkpoints"), ("unlink", "step_000001")]


class Operations(TorchDispatchMode):
    """The operations on tensors, by name, but for looks at hyperparameters (fp64), which never were on the device."""
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.float64):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations_of_steps(config: tgm.Config, checkpoints: tgm.Checkpoints | None) -> tuple[list[str], int]:
    """Of `train`, between its first and its last step; how often it waits for the device."""
    torch.manual_seed(0)
    train_shards, val_shard = tgm.find_shards(config)
    model, loader = tgm.GPT(config), tgm.TrainLoader(train_shards, config, ALONE)
    mode, marks, train_step = Operations(), [], tgm.train_step

    def marked(*arguments):
        marks.append(len(mode.names))
        return train_step(*arguments)

    with mode, mock.patch.object(tgm, "train_step", marked), mock.patch.object(tgm.Clock, "_wait_for_all") as waits:
        tgm.train(model, tgm.Optimizer(model, config, ALONE), loader, val_shard, ALONE, tgm.Log("run", ALONE),
                  checkpoints)
    loader.close()
    assert len(marks) == config.num_iterations
    return mode.names[marks[0]:marks[-1]], waits.call_count


def test_steps_do_nothing_for_checkpoints_that_are_off_or_not_due(config, checkpoints):
    """Nothing is read back from the device in a run's steps, and none of them waits."""
    config = tgm.replace(config, dtype=torch.float32, val_every=100)
    off, num_waits = operations_of_steps(config, None)
    assert len(off) > 1000 and not [name for name in off if "_local_scalar_dense" in name]
    assert num_waits == 2  # before the first step, after the last
    assert operations_of_steps(config, checkpoints)[0] == off

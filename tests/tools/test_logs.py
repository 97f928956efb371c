"""records/tools/run_log.py: the logs of two years are read, and damaged ones end in one sentence."""
import gzip
import math
from dataclasses import replace

import numpy as np
import pytest

import records
import synthetic_logs as logs
from run_log import RecordError, find_logs, read_log

SPEC = logs.Spec(loss=2.918765, seed=7)
# As the project's scripts wrote it in the autumn of 2024: = first, nan before the clock's reset at step 10.
LINES_OF_2024 = ["step:0/20 val_loss:10.8258 train_time:228ms step_avg:nanms"]
LINES_OF_2024 += [f"step:{i}/20 train_loss:9.1234 train_time:{300 * i}ms step_avg:nanms" for i in range(1, 11)]
LINES_OF_2024 += [f"step:{i + 10}/20 train_loss:8.4321 train_time:{150 * i}ms step_avg:150.00ms" for i in range(1, 11)]
LINES_OF_2024 += ["step:20/20 val_loss:3.2781 train_time:1500ms step_avg:150.00ms"]
LOG_OF_2024 = "\n".join([
    "=" * 100, "import torch", "val_tokens : int = 10485760 # how many tokens", "=" * 100,
    "Running pytorch 2.6.0.dev20241203+cu124 compiled for CUDA 12.4", "nvidia-smi:",
    "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |",
    *(f"|   {i}  NVIDIA H100 80GB HBM3          On  | 00000000:19:00.0 Off |          0 |" for i in range(8)),
    "=" * 100, *LINES_OF_2024]) + "\n"
OUR_TAIL = """Running Python 3.11.7 (main, Jan  8 2024) [GCC 12.2.0]
Running PyTorch 2.13.0+cpu compiled for CUDA None
on 2 x CPU process
no nvidia-smi on this machine
SMEAR_MTP = True
num_iterations = 4
max_window = 512
stages = (Stage(until=0.5, num_slices=2), Stage(until=1.0, num_slices=8))
val_tokens = 16384
seed = None
seed drawn or given: 3141592653
training shards: data/text/text_train_000001.bin to data/text/text_train_000001.bin
"""


def test_a_log_as_it_was_written(tmp_path):
    run = read_log(logs.write_log(tmp_path, SPEC))
    assert run.finished and run.num_iterations == 200 and run.final_loss == 2.918765
    assert run.source == SPEC.source.format(num_iterations=200).strip("\n")
    assert run.environment.gpus == SPEC.gpus and run.environment.hardware == "8x H100 80GB HBM3"
    assert (run.environment.torch, run.environment.cuda, run.environment.driver, run.environment.python) == (
        SPEC.torch, "12.6", "550.127.05", "3.12.7")
    assert [v.step for v in run.validations] == list(range(0, 201, 25)) and len(run.step_ms) == 200
    assert run.validations[-1].extras == {"smear_lambda": 0.0078, "backout_lambda_0": 0.8, "backout_lambda_1": -0.3}
    assert run.peak_memory_mib == 38000 and run.constants["drawn seed"] == "7"


def test_windows_and_durations(tmp_path):
    run = read_log(logs.write_log(tmp_path, SPEC))
    windows = logs.window_blocks(SPEC)
    assert (run.windows == windows).all() and (np.diff(run.tokens) == logs.batch_tokens(SPEC)).all()
    durations = run.step_durations()
    assert durations.sum() == pytest.approx(run.validations[-1].train_ms, abs=1e-6)
    # Whole milliseconds: each end is off by half a unit at most; a jitter of 0.2 ms, at most 5 deviations.
    assert np.abs(durations - (SPEC.ms_per_step + SPEC.ms_per_block * windows)).max() <= 1 + 5 * 0.2


def test_durations_without_step_lines_are_spread_evenly(tmp_path):
    path = logs.write_log(tmp_path, SPEC)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "/200 train_time" not in line))
    run = read_log(path)
    assert run.step_ms == []
    assert (run.step_durations()[:25] == run.validations[1].train_ms / 25).all()


def test_a_log_of_2024(tmp_path):
    (tmp_path / "log.txt").write_text(LOG_OF_2024)
    run = read_log(tmp_path / "log.txt")
    assert run.finished and run.final_loss == 3.2781 and run.train_seconds == 1.5
    assert "val_tokens : int = 10485760" in run.source and run.environment.torch == "2.6.0.dev20241203+cu124"
    assert len(run.environment.gpus) == 8 and math.isnan(run.validations[0].step_avg_ms)
    durations = run.step_durations()
    assert np.isnan(durations[:10]).all() and (durations[10:] == 150).all()  # the clock starts after ten steps


def test_a_nan_average_of_step_0_alone_moves_no_clock(tmp_path):
    """It is 0 / 0. Only averages that leave out ten steps tell of a clock that was reset."""
    path = logs.write_log(tmp_path, SPEC)
    plain = read_log(path).step_durations()
    path.write_text(path.read_text().replace("train_time:0ms step_avg:0.00ms", "train_time:0ms step_avg:nanms"))
    assert math.isnan(read_log(path).validations[0].step_avg_ms) and (read_log(path).step_durations() == plain).all()


@pytest.mark.parametrize("stated, windows, tokens", [
    (["", "", "", ""], None, None),  # before the step lines stated it
    ([f" tokens:{n} window_blocks:{w}" for n, w in ((512, 3), (1024, 1), (3072, 1), (5120, 7))],
     [3, 1, 1, 7], [0, 512, 1024, 3072, 5120]),
    (["", *[" tokens:512 window_blocks:1"] * 3], None, None),
    ([" tokens:512 window_blocks:nan"] * 4, None, [0, 512, 512, 512, 512])])
def test_our_own_log(tmp_path, stated, windows, tokens):
    steps = [f"step:{i}/4 train_time:{10 * i}ms step_avg:10.00ms{text}" for i, text in enumerate(stated, 1)]
    final = "step:4/4 val_loss:2.7 train_time:40ms step_avg:10.00ms smear_lambda:0.25"
    resumed = "resumed from checkpoints/0a/step_000002: not eligible as a timed record"
    (tmp_path / "log.txt").write_text("\n".join([
        "import torch", "=" * 100, OUR_TAIL + resumed, "=" * 100, *steps, final, "peak memory: 1234 MiB resident",
        "stopped: the loss was not finite. RESUME_FROM=checkpoints/0a goes on from the last checkpoint."]))
    run = read_log(tmp_path / "log.txt")
    assert run.resumed_from == "checkpoints/0a/step_000002" and run.constants["SMEAR_MTP"] == "True"
    assert run.environment.gpus == ("CPU process",) * 2 and run.environment.torch == "2.13.0+cpu"
    assert run.constants["val_tokens"] == "16384" and run.peak_memory_mib == 1234
    assert [None if x is None else x.tolist() for x in (run.windows, run.tokens)] == [windows, tokens]


def test_a_live_log_may_end_within_a_line(tmp_path):
    text = logs.log_text(SPEC)
    for cut in range(text.index("step:50/200 val_loss"), text.index("step:51/200")):
        (tmp_path / "log.txt").write_text(text[:cut])
        run = read_log(tmp_path / "log.txt")
        assert not run.finished and run.last_step == 50


DAMAGED = [
    ("empty", " \n", "no step lines"),
    ("no steps", "import torch\n" + "=" * 100 + "\nRunning Python 3.12\n", "no step lines"),
    ("garbled", logs.log_text(SPEC).replace("step:60/200 train_time:", "step:60/200 tr#in"), "is damaged"),
    ("not a number", logs.log_text(SPEC).replace("step:50/200 val_loss:", "step:50/200 val_loss:x"), "is damaged"),
    ("two runs", logs.log_text(SPEC) * 2, "more than one run"),
    ("too long", logs.log_text(SPEC) + "step:201/200 train_time:9ms step_avg:1.00ms\n", "counts its steps"),
]


@pytest.mark.parametrize("content, word", [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_damage_ends_in_one_sentence(tmp_path, capsys, content, word):
    path = tmp_path / "0123.log"
    path.write_text(content)
    with pytest.raises(RecordError, match=word) as error:
        read_log(path)
    assert str(path) in str(error.value)
    assert records.main(["compare", str(path), str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and word in captured.err and captured.out == ""


def test_which_files_are_logs(tmp_path):
    for name, content in (("requirements.txt", "torch"), ("notes.txt", "a text"), ("sub/run.log", ""),
                          ("a.txt", "step:0/1 val_loss:1"), ("train.py", "step:0/1"), ("B.Txt", "Running Python 3.12"),
                          ("0a1b2c3d-0000-0000-0000-000000000000.txt", "cut"), (".ipynb_checkpoints/run.log", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "lost.log").symlink_to("nowhere")
    assert {str(path.relative_to(tmp_path)) for path in find_logs(tmp_path)} == {
        "sub/run.log", "a.txt", "0a1b2c3d-0000-0000-0000-000000000000.txt", "B.Txt", "lost.log"}
    with pytest.raises(RecordError, match="lost.log cannot be read"):
        read_log(tmp_path / "lost.log")
    with pytest.raises(RecordError, match="does not exist"):
        find_logs(tmp_path / "none")


def test_a_compressed_log_is_the_log(tmp_path, capsys):
    """Read, found and compared as it was; cut or damaged, it ends in one sentence."""
    plain = logs.write_log(tmp_path / "plain", SPEC)
    for name in (plain.name + ".gz", "x.log.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(plain.read_bytes()))
        assert path in find_logs(tmp_path) and replace(read_log(path), path=plain) == read_log(plain)
    assert read_log(tmp_path / f"{plain.name}.gz").name == read_log(plain).name == SPEC.run_id
    for content in (path.read_bytes()[:-100], b"no gzip", path.read_bytes()[:40] + b"\xff" * 40):
        path.write_bytes(content)
        assert records.main(["compare", str(path), str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and "is damaged" in captured.err

"""tests/gpu.sh: its stages are processes of their own, and what they found outlives whatever becomes of them."""
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import memory
import shards
import stages
import train_gpt_medium as tgm
from helpers import ROOT, environment, write_text_folder

# Stand-ins for the stages: a works, b fails with what it has found, c never ends, d works.
FAKE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import stages

def work(job):
    job.keep("parts", [1, 2], "is | done")

def fail(job):
    job.keep("half", 0.5, "half done")
    raise stages.StageError("out of luck")

def hang(job):
    job.keep("begun", True, "has begun")
    if os.fork() == 0:
        open(job.folder.parent / "grandchild", "w").write(str(os.getpid()))
    time.sleep(600)

stages.SCRIPT, stages.WRITE_SECONDS = Path(__file__), 0.2
stages.FACTS = "import json; print(json.dumps(dict(gpu='NVIDIA X', torch='2.11.0+cu130', triton='3.6.0')))"
stages.STAGES = (stages.Stage("a", "works", 2, work), stages.Stage("b", "fails", 2, fail),
                 stages.Stage("c", "hangs", {minutes}, hang), stages.Stage("d", "works too", 2, work))
sys.exit(stages.main(sys.argv[1:]))
"""


@pytest.fixture
def fake(tmp_path):
    """Starts the fake stages with these arguments. minutes: the limit of the one that hangs."""
    def start(*arguments: str, minutes: float) -> subprocess.Popen:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(folder=str(ROOT / "records" / "tools" / "bench"), minutes=minutes))
        return subprocess.Popen([sys.executable, str(script), "--results", str(tmp_path / "results"), *arguments],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return start


def runs(folder: Path) -> list[dict]:
    return json.loads((folder / "gpu_nvidia_x_torch_2.11.0.json").read_text())["runs"]


def assert_dies(folder: Path) -> None:
    """The process that the hanging stage has started."""
    stat, deadline = Path("/proc", (folder / "grandchild").read_text(), "stat"), time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stage_that_fails_or_hangs_leaves_what_it_has_and_the_next_begins(fake, tmp_path):
    process = fake("--copy", str(tmp_path / "copy"), minutes=0.1)
    out, _ = process.communicate()
    assert process.returncode == 1, out
    found = runs(tmp_path / "results")
    assert found == runs(tmp_path / "copy")
    assert [(run["stage"], run["status"]) for run in found] == [
        ("a", "ok"), ("b", "failed"), ("c", "too long"), ("d", "ok")]
    assert [run["result"] for run in found][:3] == [
        {"parts": [1, 2], "says": {"parts": "is | done"}}, {"half": 0.5, "says": {"half": "half done"}},
        {"begun": True, "says": {"begun": "has begun"}}]
    assert found[1]["output"][0] == "Traceback (most recent call last):"
    assert found[1]["output"][-1].endswith("StageError: out of luck")
    assert {"date", "source", "gpu", "torch", "triton", "seconds", "nvidia-smi"} <= found[0].keys()
    assert_dies(tmp_path / "results")
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"gpu_nvidia_x_torch_2.11.0.json", "grandchild"}


def test_done_stages_are_skipped_failed_ones_and_named_ones_are_not(fake, tmp_path):
    def begun(*arguments: str) -> list[str]:
        out, _ = fake(*arguments, minutes=0.01).communicate()
        return [line[1] for line in out.splitlines() if line.endswith(" ...")]

    assert begun("a", "b") == ["a", "b"]
    assert begun("a") == ["a"]
    assert begun() == ["c", "d", "b"]  # those that have not been tried first
    path, = (tmp_path / "results").glob("gpu_*.json")
    book = json.loads(path.read_text())
    assert [run["stage"] for run in book["runs"]] == ["a", "b", "a", "c", "d", "b"]
    book["runs"][4]["source"] = "of another trainer"
    path.write_text(json.dumps(book))
    assert begun("--minutes", "0.9") == []  # not half of what d may take
    assert begun("--minutes", "10") == ["d", "b", "c"]


def test_killed_at_any_moment_leaves_earlier_results_and_what_was_found(fake, tmp_path):
    process, results = fake(minutes=1), tmp_path / "results"
    while not (results / "grandchild").exists() or runs(results)[-1]["result"].get("begun") is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 1
    assert_dies(results)
    *found, killed = runs(results)
    assert [run["status"] for run in found] == ["ok", "failed"]
    assert killed["result"]["begun"] is True and stages.describe(killed).startswith("killed: ")


def a_run(key: str, **changes) -> dict:
    stage = stages.STAGES["abcdefghij".index(key)]
    return {"stage": key, "status": "ok", "date": "2026-12-01T10:00:00", "source": stages.source_of(stage),
            "output": [], "result": {"says": {"run": f"{key} | fine", "time": "2 ms"}}} | changes


def test_a_worse_run_takes_no_result_away_but_an_older_sources():
    for before, kept in (([], "running"), ([("failed", "s")], "running"), ([("ok", "s")], "ok"),
                         ([("ok", "older")], "running"), ([("ok", "s"), ("failed", "s")], "ok")):
        book = {"runs": [a_run("a", status=status, source=source) for status, source in [*before, ("running", "s")]]}
        assert stages.last_run(book, stages.STAGES[0])["status"] == kept
    assert stages.last_run(book, stages.STAGES[1]) is None


def test_the_table_shows_what_has_run_where_and_what_is_owed(tmp_path, capsys):
    failed = a_run("c", status="failed", output=["Traceback", "torch.CudaError: no | luck", "see the docs", ""])
    books = [{"gpu": "X", "torch": "2.11", "runs": [a_run("a"), failed]},
             {"gpu": "Y", "torch": "2.13", "runs": [a_run("a", source="another"), a_run("b")]}]
    for number, content in enumerate(books):
        stages.write_json(tmp_path / f"gpu_{number}.json", content)
    assert stages.main(["--list", "--results", str(tmp_path)]) == 0
    *table, empty, owed = capsys.readouterr().out.splitlines()
    what = {stage.key: stage.what for stage in stages.STAGES}
    assert table == ["| what | where | result |", "|---|---|---|",
                     f"| {what['a']} | X, torch 2.11, 2026-12-01 | a / fine; 2 ms |",
                     f"| {what['a']} | Y, torch 2.13, 2026-12-01 | a / fine; 2 ms |",
                     f"| {what['b']} | Y, torch 2.13, 2026-12-01 | b / fine; 2 ms |",
                     f"| {what['c']} | X, torch 2.11, 2026-12-01 | failed: torch.CudaError: no / luck |"]
    owes = [f"({key}) {what[key]}" for key in "cdefghij"]
    assert (empty, owed) == ("", f"Still owed to a GPU: {'; '.join([*owes, stages.BEYOND])}.")


def test_the_readme_has_the_table():
    books = [json.loads(path.read_text()) for path in sorted((ROOT / "records" / "tools" / "bench").glob("gpu_*.json"))]
    _, made, _ = (ROOT / "README.md").read_text().split("<!-- tests/gpu.sh --list -->")
    assert made.strip("\n") == stages.as_table(books)


def test_every_stage_is_explained_and_ends_within_a_call_of_ten_minutes():
    text = (ROOT / "docs" / "first_gpu.md").read_text()
    for stage in stages.STAGES:
        assert f"| {stage.key} | {stage.what} |" in text and stage.minutes < 9
        assert all((ROOT / file).is_file() for file in stage.files)


@pytest.mark.parametrize("key, num_configs, says", [
    ("a", 1, ["loss 9.00 to 9.00, 2 ms a step, 3 MiB"]),
    ("g", 2, ["cold 1 s to the first validation", "warm 1 s to the first validation"]),
    ("i", 6, [f"pieces of {n}: 3 MiB, estimated 5" for n in ("65,536", "16,384", "4,096")]),
    ("j", 1, ["loss 9.00 to 9.00, 2 ms a step, 3 MiB"])])
def test_runs_at_full_size_have_possible_constants_and_enough_shards(key, num_configs, says, monkeypatch, tmp_path):
    """The commands of a GPU, parsed and not executed."""
    made, configs = [], []

    def call(script, *options, **_):
        if script != "-c":
            made.append(shards.parse([*map(str, options)]))
            return []
        _, recipe, preset, constants = options
        configs.append(replace(import_module(recipe).PRESETS[preset](), **json.loads(constants)))
        return [(1.0, "step:0/1 val_loss:9.0 train_time:0ms step_avg:2.0ms"), (2.0, "peak memory: 3 MiB allocated")]

    monkeypatch.setattr(stages, "call", call)
    monkeypatch.setattr(memory, "count", lambda config, size: configs.append(config) or 5 << 20)
    stages.STAGES["abcdefghij".index(key)].run(job=stages.Job(tmp_path))
    for config in configs:
        shard = tgm.Shard(made[0].folder, made[0].tokens)
        assert len([*tgm.batch_places([shard], config)]) == config.num_iterations and config.needs_gpu
        assert made[0].val_tokens > config.val_tokens
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(configs) == num_configs and [*found["says"].values()] == says


def test_without_a_gpu_a_sentence_says_so():
    done = subprocess.run([str(ROOT / "tests" / "gpu.sh"), "a"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "sees no CUDA GPU, run this on a GPU machine: " in done.stderr


@pytest.mark.slow  # a CPU minute
def test_a_resumed_run_is_compared_and_its_weights_evaluated(tmp_path, monkeypatch):
    job = stages.Job(tmp_path)
    job.preset, job.val_tokens = "tiny", 2**11
    monkeypatch.setattr(job, "make_shards", lambda steps: write_text_folder(tmp_path / "shards", tgm.PRESETS["tiny"]()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stages.resumes(job)
    assert job.found["different"] == []
    assert re.fullmatch(r"audit of \S+ ends with ok .+", job.found["says"]["audit"])

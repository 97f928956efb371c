"""tests/gpu.sh: its stages are processes of their own, and what they found outlives whatever becomes of them."""
import json
import os
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
from helpers import ROOT, environment

# Stand-ins for the stages: a works, b fails with what it has found, c never ends, d works.
FAKE = """
import json, os, sys, time
sys.path.insert(0, {folder!r})
import stages

def work(job):
    job.keep(parts=[1, 2], says=f"{{job.preset}} is | done")

def fail(job):
    job.keep(half=0.5)
    raise stages.StageError("out of luck")

def hang(job):
    job.keep(begun=True)
    if os.fork() == 0:
        open(job.folder.parent / "grandchild", "w").write(str(os.getpid()))
    time.sleep(600)

stages.SCRIPT, stages.SAMPLE_SECONDS = __file__, 0.2
stages.FACTS = "import json; print(json.dumps(dict(gpu='NVIDIA X', uuid=None, torch='2.11.0+cu130')))"
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


def book(folder: Path) -> dict:
    path, = folder.glob("gpu_*.json")
    assert path.name == "gpu_nvidia_x_torch_2.11.0.json"
    return json.loads(path.read_text())


def assert_dies(folder: Path) -> None:
    """The process that the hanging stage has started."""
    stat, deadline = Path("/proc", (folder / "grandchild").read_text(), "stat"), time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stage_that_fails_or_hangs_leaves_what_it_has_and_the_next_begins(fake, tmp_path):
    (tmp_path / "copy").mkdir()
    process = fake("--copy", str(tmp_path / "copy"), minutes=0.1)
    out, _ = process.communicate()
    assert process.returncode == 1, out
    found = book(tmp_path / "results")
    assert found == book(tmp_path / "copy") and found["gpu"] == "NVIDIA X" and "running" not in found
    entries = found["stages"]
    assert {key: entry["status"] for key, entry in entries.items()} == {
        "a": "ok", "b": "failed", "c": "too long", "d": "ok"}
    assert [entry["result"] for entry in entries.values()][:3] == [
        {"parts": [1, 2], "says": "short is | done"}, {"half": 0.5}, {"begun": True}]
    assert entries["b"]["output"][0] == "Traceback (most recent call last):"
    assert entries["b"]["output"][-1].endswith("StageError: out of luck")
    assert {"date", "source", "torch", "triton", "driver", "seconds", "load"} <= entries["a"].keys()
    assert_dies(tmp_path / "results")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "gpu_nvidia_x_torch_2.11.0.json", "grandchild"]


def test_done_stages_are_skipped_failed_ones_and_named_ones_are_not(fake, tmp_path):
    def begun(*arguments: str) -> list[str]:
        out, _ = fake(*arguments, minutes=0.01).communicate()
        return [line[1] for line in out.splitlines() if line.endswith(" ...")]

    assert begun("a", "b") == ["a", "b"]
    assert begun("a") == ["a"]
    assert begun() == ["c", "d", "b"]  # those that have not been tried first
    results, = (tmp_path / "results").glob("gpu_*.json")
    content = json.loads(results.read_text())
    content["stages"]["d"]["source"] = "of another trainer"
    results.write_text(json.dumps(content))
    assert begun("--minutes", "0.9") == []  # not half of what d may take
    assert begun("--minutes", "10") == ["d", "b", "c"]


def test_a_stage_that_is_killed_takes_no_result_away_but_a_worse_one(tmp_path):
    running = {"stage": "a", "status": "running", "source": "s", "result": {"half": 1}}
    for before, kept in (({}, "killed"), ({"status": "failed", "source": "s"}, "killed"),
                         ({"status": "ok", "source": "s"}, "ok"), ({"status": "ok", "source": "older"}, "killed")):
        stages.write_json(tmp_path / "book.json", {"stages": {"a": before} if before else {}, "running": running})
        found = stages.read_book(tmp_path / "book.json")
        assert found["stages"]["a"]["status"] == kept and "running" not in found


def test_killed_at_any_moment_leaves_earlier_results_and_what_was_found(fake, tmp_path):
    process = fake(minutes=1)
    for line in process.stdout:
        if line.startswith("(c)"):
            break
    results = tmp_path / "results"
    while book(results).get("running", {}).get("result") != {"begun": True} or not (results / "grandchild").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 1
    assert_dies(results)
    path, = results.glob("gpu_*.json")
    found = stages.read_book(path)["stages"]
    assert {key: entry["status"] for key, entry in found.items()} == {"a": "ok", "b": "failed", "c": "killed"}
    assert found["c"]["result"] == {"begun": True}


def entry(key: str, **changes) -> dict:
    stage = next(stage for stage in stages.STAGES if stage.key == key)
    return {"status": "ok", "date": "2026-12-01T10:00:00", "source": stages.source_of(stage), "output": [],
            "result": {"says": f"{key} | fine"}} | changes


def test_the_table_shows_what_has_run_where_and_what_is_owed(tmp_path, capsys):
    output = ["Traceback", "torch.CudaError: no | luck", "see the docs", ""]
    failed = entry("c", status="failed", output=output, source="another")
    books = [{"gpu": "X", "torch": "2.11", "stages": {"a": entry("a"), "c": failed}},
             {"gpu": "Y", "torch": "2.13", "stages": {"a": entry("a", source="another"), "b": entry("b")}}]
    for number, content in enumerate(books):
        stages.write_json(tmp_path / f"gpu_{number}.json", content)
    assert stages.main(["--list", "--results", str(tmp_path)]) == 0
    *table, empty, owed, x, y = capsys.readouterr().out.splitlines()
    what = {stage.key: stage.what for stage in stages.STAGES}
    assert table == ["| what | where | result |", "|---|---|---|",
                     f"| {what['a']} | X, torch 2.11, 2026-12-01 | a / fine |",
                     f"| {what['a']} | Y, torch 2.13, 2026-12-01 | a / fine |",
                     f"| {what['b']} | Y, torch 2.13, 2026-12-01 | b / fine |",
                     f"| {what['c']} | X, torch 2.11, 2026-12-01 | failed: torch.CudaError: no / luck |"]
    owes = [f"({key}) {what[key]}" for key in "cdefghi"]
    assert (empty, owed) == ("", f"Still owed to a GPU: {'; '.join([*owes, stages.BEYOND])}.")
    assert x.endswith("would run b c d e f g h i") and y.endswith("would run a c d e f g h i")


def test_the_readme_has_the_table():
    books = [stages.read_book(path) for path in sorted((ROOT / "records" / "tools" / "bench").glob("gpu_*.json"))]
    _, made, _ = (ROOT / "README.md").read_text().split("<!-- tests/gpu.sh --list -->")
    assert made.strip("\n") == stages.as_table(books)


def test_every_stage_is_explained_and_ends_within_a_call_of_ten_minutes():
    text = (ROOT / "docs" / "first_gpu.md").read_text()
    for stage in stages.STAGES:
        assert f"| {stage.key} | {stage.what} |" in text and stage.minutes < 9
        assert all((ROOT / file).is_file() for file in stage.files)


def test_what_nvidia_smi_says_is_summed_up():
    names = [*stages.SAMPLED]
    rows = [dict(zip(names, row)) for row in (
        ["1980", "2619", "690.10", "41000", "60", "100", "0x0000000000000004"],
        ["1700", "2619", "700.00", "52000", "64", "98", "0x0000000000000020"],
        ["345", "2619", "[N/A]", "0", "30", "0", "0x0000000000000001"], ["Unknown error"], [])]
    assert stages.summarise(rows) == {
        "samples": 2, "sm_mhz": [1700, 1840, 1980], "memory_mhz": [2619] * 3, "power_w": [690.1, 695.05, 700],
        "used_mib": [41000, 46500, 52000], "celsius": [60, 62, 64], "busy": [98, 99, 100],
        "throttle": ["power cap", "heat"]}
    assert stages.summarise([{}, {}]) == {"samples": 0, "throttle": []}


@pytest.mark.parametrize("run, num_configs, says", [
    (stages.first_look, 1, "kernels, attention and its gradients within 1.00% of fp32; loss 9.00 to 9.00, 2 ms a step"),
    (stages.starts, 2, "1 s to the first validation cold, 1 s warm"),
    (stages.memory_peaks, 6, "; ".join(f"pieces of {n}: 3 MiB, estimated 5" for n in ("65,536", "16,384", "4,096"))),
    (stages.second_experiment, 1, "loss 9.00 to 9.00, 2 ms a step, 3 MiB")])
def test_runs_at_full_size_have_possible_constants_and_enough_shards(run, num_configs, says, monkeypatch, tmp_path):
    """What a rehearsal, which is tiny, does not show: the commands of a GPU, parsed and not executed."""
    made, configs = [], []

    def call(script, *options, **_):
        if script != "-c":
            made.append(shards.parse([*map(str, options)]))
            return []
        _, recipe, preset, constants = options
        configs.append(replace(import_module(recipe).PRESETS[preset](), **json.loads(constants)))
        return [(1.0, "step:0/1 val_loss:9.0 train_time:0ms step_avg:2.0ms"), (2.0, "peak memory: 3 MiB allocated")]

    monkeypatch.setattr(stages, "call", call)
    for name in ("kernel_errors", "attention_errors"):
        monkeypatch.setattr(stages, name, lambda config, T, device, name=name: [(f"{name} {T} {device}", 0.01)])
    monkeypatch.setattr(memory, "count", lambda config, size: configs.append(config) or 5 << 20)
    run(stages.Job(tmp_path, tiny=False))
    for config in configs:
        shard = tgm.Shard(made[0].folder, made[0].tokens)
        assert len([*tgm.batch_places([shard], config)]) == config.num_iterations and config.needs_gpu
        assert made[0].val_tokens > config.val_tokens
    assert len(configs) == num_configs and json.loads((tmp_path / "found.json").read_text())["says"] == says


@pytest.mark.parametrize("error", [0.03, float("nan")])
def test_a_kernel_that_is_wrong_fails_the_first_stage(error, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "kernel_errors", lambda *_: [("good", 0.01), ("bad", error)])
    monkeypatch.setattr(stages, "attention_errors", lambda *_: [])
    monkeypatch.setattr(stages, "call", lambda *_, **__: [(1.0, "step:0/1 val_loss:9.0 train_time:0ms step_avg:2.0ms")])
    with pytest.raises(stages.StageError, match=f"not within 2% of fp32: {{'bad': {error}}}"):
        stages.first_look(stages.Job(tmp_path, tiny=False))
    assert json.loads((tmp_path / "found.json").read_text())["run"]["step_ms"] == 2  # it trained all the same


def test_without_a_gpu_a_sentence_says_so():
    done = subprocess.run([str(ROOT / "tests" / "gpu.sh"), "a"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.endswith("sees no CUDA GPU: run this on a GPU machine, or --rehearse.\n")


@pytest.mark.slow  # three CPU minutes
def test_the_rehearsal_runs_every_stage(tmp_path):
    done = subprocess.run([str(ROOT / "tests" / "gpu.sh"), "--rehearse", "--results", str(tmp_path)],
                          env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    path, = tmp_path.iterdir()
    found = stages.read_book(path)["stages"]
    assert {key: entry["status"] for key, entry in found.items()} == dict.fromkeys("abcdefghi", "ok")
    assert found["g"]["result"]["different"] == {} and os.listdir(tmp_path) == [path.name]

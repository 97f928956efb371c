"""records/tools/check.py: every rule has a folder that keeps it and one that breaks it alone."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import check
import records
import synthetic_logs as logs
from helpers import RECORDS, ROOT, TRAINER
from run_log import RecordError


@pytest.fixture(scope="module")
def sound_record(tmp_path_factory):
    return logs.write_record(tmp_path_factory.mktemp("records") / "sound")


@pytest.fixture
def record(sound_record, tmp_path):
    return Path(shutil.copytree(sound_record, tmp_path / "record"))


def broken_rules(path: Path) -> dict[str, list[str]]:
    return {f.rule.id: f.messages for f in check.apply_rules(check.read_folder(path)) if f.status == "broken"}


def rewrite(record: Path, **changes) -> None:
    """All of the record's and the baseline's logs again, with the README that goes with them."""
    shutil.rmtree(record)
    logs.write_record(record, logs.record_specs(**changes), logs.baseline_specs(**changes))


def with_losses(record: Path, losses) -> None:
    shutil.rmtree(record)
    logs.write_record(record, logs.record_specs(losses))


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new))


def first_log(record: Path) -> Path:
    return record / f"{logs.Spec().run_id}.txt"


def readme_row(record: Path) -> str:
    """The table row of the first run."""
    return next(line for line in (record / "README.md").read_text().splitlines() if line.startswith("| 1 |")) + "\n"


def add_source(line: str):
    return lambda record: rewrite(record, source=logs.SOURCE + line + "\n")


SPEC, FIRST, BASELINE = logs.Spec(), logs.record_specs()[0], logs.baseline_specs()
RESUMED = "\nresumed from checkpoints/0a1b/step_000100: not eligible as a timed record"
SPREAD = [2.9185 + 0.003 * x for x in (1, -1, 1.1, -1.1, 0.9, -0.9, 1.2, -1.2)]
BREAKS = [
    ("readme", lambda record: (record / "README.md").write_text("\n")),
    ("readable", lambda record: (record / "a.log").write_bytes(b"\x7fELF\0\0")),
    ("finished", lambda record: logs.write_log(record / "baseline", replace(BASELINE[0], last_step=60))),
    ("finished", lambda record: logs.write_log(record / "baseline", replace(BASELINE[0], loss=float("nan")))),
    ("all-counted", lambda record: logs.write_log(record / "failed", replace(SPEC, loss=2.9222, seed=50))),
    ("unique", lambda record: shutil.copy(next((record / "baseline").iterdir()), record / "baseline" / "again.txt")),
    ("seeds", lambda record: logs.write_log(record, replace(
        logs.record_specs()[1], constants="seed drawn or given: 0"))),
    ("target-t", lambda record: with_losses(record, SPREAD)),
    ("target-z", lambda record: with_losses(record, (2.919900, 2.919901))),  # they agree by luck
    ("readme-has-runs", lambda record: replace_in(record / "README.md", readme_row(record), "")),
    ("readme-has-runs", lambda record: (record / "README.md").write_text(
        (record / "README.md").read_text().split("All 8")[0] + ", ".join(f"{loss:.6f}" for loss in logs.LOSSES))),
    ("readme-from-logs", lambda record: replace_in(record / "README.md", "| 1 |", "| 0 | 2.918111 | 48.2 |\n| 1 |")),
    ("readme-from-logs", lambda record: replace_in(record / "README.md", "All 8 runs.", "All 30 runs.")),
    ("one-source", lambda record: logs.write_log(record, replace(FIRST, source=logs.SOURCE + "x = 1\n"))),
    ("one-source", lambda record: logs.write_log(record, replace(
        FIRST, constants="seed drawn or given: 0\nmuon_lr = 0.02"))),
    ("one-step-count", lambda record: [logs.write_log(record / "baseline", replace(
        spec, source="import torch\nval_tokens = 10485760", num_iterations=210 + spec.seed % 2)) for spec in BASELINE]),
    ("source-complete", add_source("import my_kernels as kernels")),
    *(("compile-flags", add_source(line)) for line in (
        "torch._inductor.config.max_autotune = True",
        "from torch._inductor import config\nconfig.max_autotune = True",
        "from torch._inductor import config as inductor\ninductor.max_autotune = True")),
    ("compile-flags", add_source('f = torch.compile(g, mode="max-autotune")')),
    ("val-tokens", lambda record: rewrite(record, source=logs.SOURCE.replace("10485760", "20 * 262144"))),
    ("data", lambda record: logs.write_log(record, replace(
        FIRST, constants="seed drawn or given: 0\ntraining shards: a to b (SYNTHETIC tokens)"))),
    ("gpus", lambda record: rewrite(record, gpus=SPEC.gpus[:7])),
    ("gpus", lambda record: rewrite(record, torch="2.10\non 4 x NVIDIA H100 80GB HBM3\n#")),  # of the eight shown
    ("one-environment", lambda record: logs.write_log(record, replace(FIRST, driver="570.1"))),
    ("times", lambda record: replace_in(first_log(record), "step:100/200 train_time:", "step:100/200 train_time:9")),
    ("times", lambda record: replace_in(first_log(record), "ms step_avg:24", "ms step_avg:23")),
    ("times", lambda record: first_log(record).write_text("".join(
        line for line in first_log(record).read_text().splitlines(True) if not line.startswith("step:77/")))),
    ("resumed", lambda record: logs.write_log(record, replace(FIRST, constants=FIRST.constants + RESUMED))),
    ("resumed", lambda record: logs.write_log(record / "baseline", replace(
        BASELINE[0], constants=BASELINE[0].constants + RESUMED))),
    ("resumed", lambda record: [logs.write_log(record, replace(
        spec, constants=spec.constants + "\ncheckpoint_minutes = 0.5")) for spec in logs.record_specs()]),
    ("baseline", lambda record: shutil.rmtree(record / "baseline")),
    ("baseline", lambda record: [logs.write_log(record / "baseline", spec)
                                 for spec in logs.baseline_specs(torch="2.9.0+cu126")]),
]


def test_a_sound_record_keeps_every_rule(sound_record):
    findings = check.apply_rules(check.read_folder(sound_record))
    assert {f.rule.id: f.status for f in findings} == {rule.id: "ok" for rule in check.RULES}
    assert check.verdict_of(check.read_folder(sound_record), findings) == "holds: every rule is kept"


@pytest.mark.parametrize("rule, break_it", BREAKS, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(BREAKS)])
def test_a_rule_is_broken_alone(record, rule, break_it):
    break_it(record)
    assert set(broken_rules(record)) == {rule}
    severity = next(r.severity for r in check.RULES if r.id == rule)
    assert check.check(record, as_json=False) == (severity == "error")


def test_every_rule_has_a_folder_that_breaks_it():
    assert {rule for rule, _ in BREAKS} == {rule.id for rule in check.RULES}


def test_the_readme_lists_the_rules_and_shows_real_output(capsys):
    text = (RECORDS / "README.md").read_text()
    for rule in check.RULES:
        assert f"| {rule.id} | {rule.severity} | {rule.why} | {rule.origin} |" in text
    for command in (["check", "records/2025-11-02_SmearMTP"], ["power", "--margin", "0.0005", "0.0007", "-n", "5"]):
        records.main([part.replace("records/", f"{RECORDS}/") for part in command])
        shown = capsys.readouterr().out.replace(f"{RECORDS}/", "records/").split("\n\nok:")[0].strip()
        assert f"$ python records/records.py {' '.join(command)}\n{shown}\n" in text


@pytest.mark.parametrize("command", ["", "check", "compare", "follow", "report", "power", "campaign", "new"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        records.main([*command.split(), "--help"])
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_sentence(record, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert records.main(["report", str(record), "--out", str(tmp_path / "file" / "x.html")]) == 2
    assert re.fullmatch(rf"records.py: {tmp_path}/file/x.html.*: Not a directory: name another place.*\n",
                        capsys.readouterr().err)
    for script, packages in (("records/records.py", "records/tools/requirements.txt"),
                             ("data/shards.py", "requirements.txt")):
        done = subprocess.run([sys.executable, "-S", ROOT / script, "--help"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == f"{Path(script).name}: numpy is not installed: pip install -r {packages}\n"


@pytest.mark.parametrize("losses, advice", [([2.9301, 2.9299], "above 2.92"), ([2.9175], "one run")])
def test_losses_that_are_no_test(record, losses, advice):
    with_losses(record, losses)
    assert advice in broken_rules(record)["target-t"][0]


def test_several_sources_in_a_log_and_names_defined_there_count(record):
    """A module may be pasted under its file name, or its definitions alone."""
    rewrite(record, source=logs.SOURCE + "from triton_kernels import XXT\nfrom extra import (a, # first\n b as c)\n"
            + "-" * 40 + "\n# triton_kernels.py\n" + "-" * 40 + "\nimport triton\n\ndef a(): pass\nb = 3\n")
    assert broken_rules(record) == {}


def test_a_log_cut_anywhere_is_of_an_unfinished_run(tmp_path, capsys):
    """In its head, between lines, within any of them, and within the last validation, whose loss would be another."""
    text = logs.log_text(replace(SPEC, num_iterations=20, val_every=5))
    head, end = text.index("step:0/"), text.index("peak memory")
    for cut in (0, 1, len(SPEC.source) // 2, text.index("Running Python"), *range(head - 1, end, 29), end - 1):
        (tmp_path / f"{SPEC.run_id}.txt").write_text(text[:cut])
        assert check.check(tmp_path, as_json=False) == 1
        shown = capsys.readouterr().out
        assert ": unfinished: no run of the record has a final loss\n" in shown, cut
        assert (" of 20" if cut > text.index("step:1/") else "") in shown
    (tmp_path / f"{SPEC.run_id}.txt").write_text(text[:end])
    assert not broken_rules(tmp_path).keys() & {"finished", "readable"}


def move_logs(record: Path, name: str) -> None:
    (record / name).mkdir()
    for path in record.glob("*.txt"):
        path.rename(record / name / path.name)


def every_average_of_its_interval(path: Path) -> None:
    text, (step, ms) = path.read_text(), (0, 0)
    for match in re.finditer(r"step:(\d+)/\d+ val_loss:\S+ train_time:(\d+)ms step_avg:\S+ms", text):
        average = (int(match[2]) - ms) / max(int(match[1]) - step, 1)
        text = text.replace(match[0], f"{match[0].rpartition(':')[0]}:{average:.2f}ms")
        step, ms = int(match[1]), int(match[2])
    path.write_text(text)


@pytest.mark.parametrize("change", [
    lambda record: [path.rename(path.with_name(f"old_run{i}.log")) for i, path in enumerate(record.glob("*.txt"))],
    lambda record: [logs.write_log(record / "failed_runs", spec) for spec in (
        replace(SPEC, seed=60, last_step=60), replace(SPEC, seed=61, constants=SPEC.constants + RESUMED))],
    lambda record: move_logs(record, "results"),
    lambda record: replace_in(record / "README.md", "All 8", "Another's loss is 2.9181, after 8 of 9 steps. All 8"),
    lambda record: list(map(every_average_of_its_interval, record.glob("*.txt")))])
def test_what_breaks_no_rule(record, change):
    change(record)
    assert broken_rules(record) == {}


@pytest.mark.parametrize("num_runs, verdict", [
    (2, "a comparison of B with A: keeps every rule but those of the record's task, with 0 warnings"),
    (1, "a comparison that shows nothing yet: a side has one run, so no interval and no test; 0 warnings")])
def test_a_campaigns_folder_is_a_comparison(tmp_path, capsys, num_runs, verdict):
    """Two sides of other scripts and lengths, which share their seeds, and no README."""
    for side, source, steps in (("A", logs.SOURCE, 200), ("B", logs.SOURCE + "x = 1\n", 210)):
        for seed in range(num_runs):
            logs.write_log(tmp_path / side, logs.Spec(
                seed=seed, loss=2.95 + 0.001 * seed, source=source, num_iterations=steps), f"{side}{seed}.txt")
    assert records.main(["check", str(tmp_path)]) == 0
    assert f": {verdict}\n" in capsys.readouterr().out
    logs.write_log(tmp_path / "B", logs.Spec(seed=9, num_iterations=190))
    assert set(broken_rules(tmp_path)) == {"one-source", "one-step-count"}


def test_figures_only(capsys):
    assert records.main(["check", str(RECORDS / "2025-11-02_SmearMTP"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert report["verdict"] == "figures only, cannot be verified"
    assert report["statistics"]["n"] == 26 and report["statistics"]["t_p"] < 0.01
    status = {rule["id"]: rule["status"] for rule in report["rules"]}
    assert [*status] == [rule.id for rule in check.RULES]
    assert "broken" not in status.values() and status["target-t"] == "ok" and status["times"] == "not applicable"


def test_an_empty_folder_is_no_record(tmp_path, capsys):
    assert records.main(["check", str(tmp_path)]) == 1
    assert "nothing to judge" in capsys.readouterr().out
    with pytest.raises(RecordError, match="is not a folder"):
        check.read_folder(tmp_path / "none")


def test_two_presets_of_the_trainer_s_own_source_keep_every_rule(record):
    both = {"source": TRAINER.read_text().replace("{", "{{").replace("}", "}}")}
    shutil.rmtree(record)
    logs.write_record(record, logs.record_specs(constants=SPEC.constants + "\nsmear_mtp = True", **both),
                      logs.baseline_specs(constants=SPEC.constants + "\nsmear_mtp = False", **both))
    assert broken_rules(record) == {}

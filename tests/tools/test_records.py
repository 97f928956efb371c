"""The published figures agree with each other, and the READMEs with them; links resolve."""
import json
import re
import statistics
from pathlib import Path

import pytest

import check
from helpers import RECORDS, ROOT

FOLDER = RECORDS / "2025-11-02_SmearMTP"

DATA = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
RECORD, PREVIOUS = DATA["record"], DATA["previous_record"]
TIMES, CURVE = RECORD["train_time_s"], RECORD["mean_curve"]
MUDD_FOLDER = RECORDS / "2026-04-27_MUDD"
MUDD = json.loads((MUDD_FOLDER / "published.json").read_text(encoding="utf-8"))["record"]


def prose(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("record, num_runs", [(RECORD, 26), (MUDD, 6)])
def test_published_figures_agree_with_each_other(record, num_runs):
    losses, times, last = record["val_loss"], record["train_time_s"], record["mean_curve"][-1]
    assert len(losses) == len(times) == num_runs
    assert last["step"] == record["num_iterations"]
    assert last["val_loss"] == round(statistics.mean(losses), 6)
    assert last["val_loss_std"] == round(statistics.stdev(losses), 6)
    assert last["train_time_ms"] == round(1000 * statistics.mean(times))


def test_the_mean_curve_of_mudd_is_that_of_its_runs():
    for points, mean in zip(zip(*MUDD["runs"], strict=True), MUDD["mean_curve"], strict=True):
        losses, times = ([point[name] for point in points] for name in ("val_loss", "train_time_ms"))
        assert {point["step"] for point in points} == {mean["step"]}
        assert (mean["val_loss"], mean["val_loss_std"], mean["train_time_ms"]) == (
            round(statistics.mean(losses), 6), round(statistics.stdev(losses), 6), round(statistics.mean(times)))
    assert [run[-1]["val_loss"] for run in MUDD["runs"]] == MUDD["val_loss"]
    assert [run[-1]["train_time_ms"] / 1000 for run in MUDD["runs"]] == MUDD["train_time_s"]


@pytest.mark.parametrize("folder", [FOLDER, MUDD_FOLDER])
def test_every_published_run_is_listed_and_no_other_loss(folder):
    findings = {finding.rule.id: finding.status for finding in check.apply_rules(check.read_folder(folder))}
    assert findings["readme-has-runs"] == findings["readme-from-logs"] == "ok"


def test_figures_in_the_text():
    """Of the record's README and the repository's."""
    old_steps, last = PREVIOUS["num_iterations"], RECORD["one_log_curve"][-1]
    negative = [point["step"] for point in CURVE if point["smear_lambda"] < 0]
    without, with_it = (DATA["scale_up_1b"][name][-1]["val_loss"] for name in ("baseline", "smear_mtp"))
    for path, sentences in ((FOLDER / "README.md", [
        f"{RECORD['num_iterations']:,} steps instead of {old_steps:,}.",
        f"published mean train time {PREVIOUS['train_time_s_mean']} s.",
        f"negative up to step {max(negative):,} and positive from",
        f"It ends at loss {last['val_loss']:.6f} after {last['train_time_ms'] / 1000:.3f} s.",
        f"last losses are {without} without and {with_it} with it",
    ]), (ROOT / "README.md", [
        f"saved {old_steps - RECORD['num_iterations']} of {old_steps:,} steps", f"{statistics.mean(TIMES) / 60:.2f}.",
        f"negative up to step {max(negative):,} and ends at {CURVE[-1]['smear_lambda']:+.4f}",
    ])):
        for sentence in sentences:
            assert sentence in prose(path)


EVERY_README = ["README.md", *(str(path.relative_to(ROOT)) for folder in ("data", "docs", "records", "tests")
                              for path in sorted((ROOT / folder).rglob("*.md")))]


@pytest.mark.parametrize("readme", EVERY_README)
def test_relative_links_resolve(readme):
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / readme).read_text(encoding="utf-8")):
        assert re.match(r"[a-z]+:", target) or ((ROOT / readme).parent / target).exists(), target

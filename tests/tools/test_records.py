"""The READMEs under records/ print exactly the figures that the published JSON gives, and their links resolve."""
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from scipy import stats

from helpers import RECORDS, ROOT

FOLDER = RECORDS / "2025-11-02_SmearMTP"
READMES = [RECORDS / "README.md", FOLDER / "README.md"]
TARGET = 2.92  # nats/token

DATA = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
RECORD, PREVIOUS = DATA["record"], DATA["previous_record"]
LOSSES, TIMES, CURVE = RECORD["val_loss"], RECORD["train_time_s"], RECORD["mean_curve"]
MUDD_FOLDER = RECORDS / "2026-04-27_MUDD"
MUDD = json.loads((MUDD_FOLDER / "published.json").read_text(encoding="utf-8"))["record"]


def read_tables(path: Path) -> list[list[list[str]]]:
    """All markdown tables of a file, each a list of rows of cells: the header first, the dashes dropped."""
    tables, rows = [], []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            assert set("".join(rows[1])) == {"-"}, f"{path}: no line of dashes under {rows[0]}"
            assert all(len(row) == len(rows[0]) for row in rows), f"{path}: ragged table {rows[0]}"
            tables.append([rows[0], *rows[2:]])
            rows = []
    return tables


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


LOSS, SECONDS = "val loss (nats/token)", "train time (s)"


def tables_of_runs(record: dict, digits: int) -> dict[str, list[list[str]]]:
    """Body rows of the tables that every record's README begins with, by header; `digits` of a run's published loss."""
    losses, times = record["val_loss"], record["train_time_s"]
    standard_error = statistics.stdev(losses) / math.sqrt(len(losses))
    margin = TARGET - statistics.mean(losses)
    statistics_of = {"mean": statistics.mean, "sample std (n - 1)": statistics.stdev, "standard error": lambda values: (
        statistics.stdev(values) / math.sqrt(len(values))), "min": min, "max": max}
    tests = {
        "n (runs)": str(len(losses)),
        "degrees of freedom": str(len(losses) - 1),
        "t": f"{-margin / standard_error:.3f}",
        "one-sided p": f"{stats.ttest_1samp(losses, TARGET, alternative='less').pvalue:.2e}",
        "margin below 2.92 (nats/token)": f"{margin:.6f}",
        "margin below 2.92 (standard errors)": f"{margin / standard_error:.2f}",
        "runs above 2.92": f"{sum(loss > TARGET for loss in losses)} of {len(losses)}",
    }
    return {
        "item|value": [
            *([name, record[name]] for name in ("date", "hardware", "torch")),
            ["steps", f"{record['num_iterations']:,}"],
            ["runs", str(len(losses))], ["peak memory (MiB per GPU)", f"{record['peak_memory_MiB']:,}"]],
        f"statistic|{LOSS}|{SECONDS}": [[name, f"{function(losses):.6f}", f"{function(times):.3f}"]
                                        for name, function in statistics_of.items()],
        "test of mean loss <= 2.92|value": [*map(list, tests.items())],
        f"run|{LOSS}|{SECONDS}": [[str(run), f"{loss:.{digits}f}", f"{seconds:.3f}"]
                                  for run, (loss, seconds) in enumerate(zip(losses, times), 1)],
    }


def expected_tables() -> dict[str, list[list[str]]]:
    """Body rows of every table of the first record's README, by its header."""
    old_steps, new_steps = PREVIOUS["num_iterations"], RECORD["num_iterations"]
    old_time, new_time = PREVIOUS["train_time_s_mean"], statistics.mean(TIMES)
    quantities = [
        ("steps", old_steps, new_steps, ",d"),
        ("mean train time (s)", old_time, new_time, ".3f"),
        ("mean train time per step (ms)", 1000 * old_time / old_steps, 1000 * new_time / new_steps, ".2f"),
    ]
    difference, fewer_steps = new_time - old_time, old_time * (new_steps - old_steps) / old_steps
    label = f"fewer steps alone: {old_steps - new_steps} of {old_steps:,} at the previous mean time per step"
    parts = [(label, fewer_steps), ("rest", difference - fewer_steps), ("all", difference)]
    return {
        **tables_of_runs(RECORD, 6),
        f"step|val loss mean (nats/token)|val loss std|mean {SECONDS}|smear_lambda mean|smear_lambda std|"
        "backout_lambda 0|backout_lambda 1": [
            [f"{point['step']:,}", f"{point['val_loss']:.6f}", f"{point['val_loss_std']:.6f}",
             f"{point['train_time_ms'] / 1000:.3f}", f"{point['smear_lambda']:.6f}", f"{point['smear_lambda_std']:.6f}",
             f"{point['backout_lambda_0']:.4f}", f"{point['backout_lambda_1']:.4f}"] for point in CURVE],
        f"quantity|previous record ({PREVIOUS['date']})|this record ({RECORD['date']})|difference|"
        "difference (% of previous)": [
            [name, format(old, spec), format(new, spec), format(new - old, spec), f"{100 * (new - old) / old:.2f} %"]
            for name, old, new, spec in quantities],
        "part of the time difference|s|% of previous mean|% of difference": [
            [name, f"{part:.3f}", f"{100 * part / old_time:.2f}", f"{100 * part / difference:.1f}"]
            for name, part in parts],
    }


def expected_tables_of_mudd() -> dict[str, list[list[str]]]:
    """As `expected_tables`; the time of a step is that between validations."""
    rows, before = [], {"step": 0, "train_time_ms": 0}
    for point in MUDD["mean_curve"]:
        steps = point["step"] - before["step"]
        per_step = f"{(point['train_time_ms'] - before['train_time_ms']) / steps:.1f}" if steps else ""
        rows.append([f"{point['step']:,}", f"{point['val_loss']:.6f}", f"{point['val_loss_std']:.6f}",
                     f"{point['train_time_ms'] / 1000:.3f}", per_step])
        before = point
    return tables_of_runs(MUDD, 4) | {
        f"step|val loss mean (nats/token)|val loss std|mean {SECONDS}|ms per step since the row above": rows}


def test_every_table_prints_the_published_figures():
    found = {"|".join(header): rows for header, *rows in read_tables(READMES[1])}
    expected = expected_tables()
    assert [*found] == [*expected]
    for header, rows in found.items():
        if header.startswith("step|"):  # some points of the curve, the first and the last among them
            points = expected[header]
            assert f"{len(rows)} of the {len(points)} published points" in prose(READMES[1])
            assert [rows[0], rows[-1]] == [points[0], points[-1]]
            expected[header] = [point for point in points if point in rows]
        assert rows == expected[header]


def test_every_table_of_mudd_prints_the_published_figures():
    found = {"|".join(header): rows for header, *rows in read_tables(MUDD_FOLDER / "README.md")}
    expected = expected_tables_of_mudd()
    assert {header: found[header] for header in expected} == expected
    assert found.keys() - expected.keys() == {"published|here|the same?", "preset|what it is"}


def test_headers_of_the_tables_of_rules_and_tools():
    """Other tests look at their rows; a new table fails here until a test covers it."""
    assert ["|".join(table[0]) for table in read_tables(READMES[0])] == [
        "date|name|mean loss +- std (nats/token)|mean train time (s)|n (runs)|hardware|torch|folder|status",
        "command|what it does",
        "rule|severity|why|where it comes from",
        "entry|content",  # test_weights.py
        "check|what must hold",  # test_audit.py
    ]


def test_figures_in_the_text():
    """Of the record's README and the repository's."""
    old_steps, last = PREVIOUS["num_iterations"], RECORD["one_log_curve"][-1]
    negative = [point["step"] for point in CURVE if point["smear_lambda"] < 0]
    without, with_it = (DATA["scale_up_1b"][name][-1]["val_loss"] for name in ("baseline", "smear_mtp"))
    for path, sentences in ((READMES[1], [
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

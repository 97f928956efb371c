"""report.py: what the page holds, and how it behaves in a browser."""
import gzip
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

import compare
import records
import report
import synthetic_logs as logs
from helpers import RECORDS
from run_log import RecordError, read_log

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\"><!--"
BYTES = logs.SOURCE.replace("10485760", "65536")  # a source of another task


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record's folder whose sources differ in a line that tries to be markup."""
    folder = tmp_path_factory.mktemp("report") / "record"
    source = logs.SOURCE + f"# {EVIL}\n"
    specs = [replace(spec, source=source, constants=f"evil = {EVIL}\n{spec.constants}") for spec in logs.record_specs()]
    return logs.write_record(folder, specs)


def data_of(text: str) -> dict:
    """What a page holds; the strings within must not end its element."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# ----------------------------------------------------------------------------------------------------------------------
# What the page holds

def test_the_page_holds_every_validation_of_every_log(record):
    groups = report.gather(record)["groups"]
    assert [(group["label"], len(group["runs"])) for group in groups] == [("A", 4), ("B", 8)]
    for group, folder in zip(groups, (record / "baseline", record)):
        for run, path in zip(group["runs"], sorted(folder.glob("*.txt"))):
            log = read_log(path)
            assert run["name"] == log.name
            points = zip(run["step"], run["loss"], run["ms"], *run["scalars"].values(), strict=True)
            assert [*points] == [(v.step, v.loss, v.train_ms, *v.extras.values()) for v in log.validations]
            assert [*run["scalars"]] == ["smear_lambda", "backout_lambda_0", "backout_lambda_1"]
        mean = compare.mean_curve(compare.read_side(folder))
        assert group["mean"]["loss"] == pytest.approx(mean.losses, abs=1e-7)


@pytest.mark.parametrize("loss, words", [(0, "below"), (0.01, "above")])
def test_claims_are_what_compare_says_whatever_the_sign(tmp_path, loss, words):
    folder = logs.write_record(tmp_path, [replace(spec, loss=spec.loss + loss) for spec in logs.record_specs()])
    r = compare.compare_sides(*map(compare.read_side, (folder / "baseline", folder)))
    data = report.gather(folder)
    text = "\n".join([data["headline"], *data["sentences"]])
    assert f"{'not shown to be ' if loss else ''}below" in data["headline"] and "8 runs end" in data["headline"]
    for name, spec in (("loss_difference", ".6f"), ("seconds_difference", ".3f")):
        found = r[name]
        assert f"{abs(found['value']):{spec}}" in text and f"{found['low']:+{spec}} to {found['high']:+{spec}}" in text
    steps = r["steps_at_equal_loss"]["difference"]
    assert f"takes {abs(steps['value']):.1f} steps {'more' if loss else 'fewer'} (95% interval of B - A: " in text
    assert f"{steps['low']:+.1f} to {steps['high']:+.1f}, p = " in text and f"nats/token {words} A: mean" in text
    assert ("No difference in loss is shown" in text) == (r["loss_difference"]["p"] >= 0.05)
    assert data["difference"].rows[0][1] == f"{r['loss_difference']['value']:+.6f}"


@pytest.mark.parametrize("where", ["campaign", "experiments/2026-01-01_x"])
def test_another_task_is_not_held_against_the_target(tmp_path, where):
    """A campaign's folder of a byte model on one CPU: the claim is the difference, and `check` says what it says."""
    tmp_path = tmp_path / where
    specs = [logs.Spec(loss=1.5 + 0.001 * i, seed=i, source=BYTES, gpus=()) for i in range(3)]
    logs.write_logs(tmp_path / "A", [replace(spec, loss=spec.loss + 0.5, seed=spec.seed + 9) for spec in specs])
    logs.write_logs(tmp_path / "B", specs)
    logs.write_log(tmp_path / "B" / "failed", replace(specs[0], seed=20, last_step=60))
    data = report.gather(tmp_path)
    assert data["target"] is None and data["headline"].startswith("B ends 0.500000 nats/token below A: mean 1.501000")
    assert [(group["label"], len(group["runs"])) for group in data["groups"]] == [("A", 3), ("B", 3), ("failed", 1)]
    assert ("readme" in {row[1] for row in data["check"]["table"].rows}) == (where != "campaign")


def test_logs_that_no_statistic_covers_are_shown_all_the_same(tmp_path):
    """Of several lengths, unfinished, compressed; a damaged one is told by `check`."""
    logs.write_logs(tmp_path, [logs.Spec(seed=1), logs.Spec(seed=2, num_iterations=100),
                               logs.Spec(seed=3, last_step=60)])
    path = logs.write_log(tmp_path, logs.Spec(seed=4))
    (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    (tmp_path / "x.log").write_text("nothing\n")
    data = report.gather(tmp_path)
    assert [len(group["runs"]) for group in data["groups"]] == [4] and data["groups"][0]["mean"] is None
    assert [run["step"][-1] for run in data["groups"][0]["runs"]] == [200, 100, 50, 200]
    assert data["headline"] == "The runs are of 100, 200 steps: there is no mean over them."
    assert any("is at step 60 of 200, validation loss 3.364083 at step 50." in text for text in data["sentences"])
    assert ["readable"] == [row[1] for row in data["check"]["table"].rows if "x.log" in row[2]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="holds no log"):
        report.gather(tmp_path / "empty")


@pytest.mark.parametrize("arguments, name", [([], "logs/2025-11-02_SmearMTP.html"), (["--out", "x.html"], "x.html")])
def test_published_figures_are_shown(tmp_path, capsys, monkeypatch, arguments, name):
    folder = tmp_path / "2025-11-02_SmearMTP"
    folder.mkdir()
    for file in ("published.json", "README.md"):
        (folder / file).write_bytes((RECORDS / folder.name / file).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert records.main(["report", str(folder), *arguments]) == 0 and capsys.readouterr().out.strip() == name
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "published.json"]
    data = data_of((tmp_path / name).read_text())
    assert "26 runs end at a mean loss of 2.919309" in data["headline"] and "2.919035 to 2.919583" in data["headline"]
    assert data["sentences"] == ["By the rules of check: figures only, cannot be verified."]
    assert len(data["groups"][0]["runs"]) == 26 and len(data["groups"][0]["mean"]["step"]) == 46


def test_thinned_curves_keep_every_peak_and_only_what_was_logged():
    rng = np.random.default_rng(0)
    for size in (5, 100, 101, 5535):
        x, y = np.arange(1, size + 1), rng.normal(size=size).round(3)
        y[rng.integers(size, size=3)] += [50, -50, 20]
        thin = report.thin(x, y, 100)
        assert len(thin["x"]) == size if size <= 100 else len(thin["x"]) <= 102
        points, logged = dict(zip(thin["x"], thin["y"])), dict(zip(x.tolist(), y.tolist()))
        assert points.items() <= logged.items() and {1, size} <= points.keys()
        width = size // 50 + 1
        for start in range(0, size, width):
            nearby = [points[s] for s in points if start - width < s <= start + 2 * width]
            assert min(nearby) <= y[start:start + width].min() and max(nearby) >= y[start:start + width].max()


def test_fifty_two_runs_stay_below_a_megabyte(tmp_path):
    for side, steps in (("A", 5550), ("B", 5535)):
        logs.write_logs(tmp_path / side, [logs.Spec(seed=i + steps, loss=2.919 + 0.0001 * i, num_iterations=steps,
                                                    val_every=125) for i in range(26)])
    path = sorted((tmp_path / "B").iterdir())[7]  # every step after 3000 ends 900 ms later: one step of 1,150 ms
    path.write_text(re.sub(r"(step:(\d+)/5535 .*?train_time:)(\d+)", lambda m: m[1] + str(
        int(m[3]) + 900 * (int(m[2]) > 3000)), path.read_text()))
    text = report.render(report.gather(tmp_path), report.read_parts())
    assert len(text.encode()) < 1_000_000
    run = data_of(text)["groups"][1]["runs"][7]["step_ms"]
    assert dict(zip(run["x"], run["y"]))[3001] == max(run["y"]) > 1100


# ----------------------------------------------------------------------------------------------------------------------
# In a browser

# What a user's pointer and clicks do, behind the page's own script.
DRIVER = """
const over = document.querySelector("#loss-chart .u-over"), result = {problems, readings: []};
const pointer = (type, x, y, target = over) => {
  const box = over.getBoundingClientRect(), at = {clientX: box.left + x * box.width, clientY: box.top + y * box.height};
  target.dispatchEvent(new MouseEvent(type, {...at, movementX: 1, bubbles: true}));
};
const read = (x, y) => {
  pointer("mousemove", x, y);
  result.readings.push(document.querySelector("#loss-chart output").textContent);
};
const ink = () => {  // blue and orange pixels
  const canvas = document.querySelector("#loss-chart canvas"), found = {A: 0, B: 0};
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 100) {
    if (pixels[i + 2] > pixels[i] + 60) found.A++; else if (pixels[i] > pixels[i + 2] + 60) found.B++; }
  return found;
};
const drawn = () => new Promise(resolve => setTimeout(resolve, 50));
(async () => {
  document.querySelectorAll("#legend .group-head label:nth-of-type(1) input").forEach(mean => mean.click());
  for (const x of [0.05, 0.3, 0.5, 0.7, 0.97]) read(x, 0.9);
  pointer("mousedown", 0.4, 0.5);
  pointer("mousemove", 0.6, 0.5);
  pointer("mouseup", 0.6, 0.5, document);
  await drawn();
  for (const x of [0.01, 0.99]) read(x, 0.5);
  pointer("dblclick", 0.5, 0.5);
  pointer("mouseleave", 0.5, 2);
  await drawn();
  result.both = ink();
  document.querySelector("#legend .group:nth-of-type(2) .group-head label:nth-of-type(2) input").click();
  await drawn();
  result.alone = ink();
  document.querySelector("#legend .group:nth-of-type(2) .group-runs input").click();
  await drawn();
  result.one = ink();
  result.checked = [...document.querySelectorAll("#legend .group:nth-of-type(2) input")].map(box => box.checked);
  result.texts = ["diff", "constants-differ"].map(id => document.getElementById(id).textContent);
  result.images = document.querySelectorAll("img").length;
  result.title = document.title;
  result.charts = document.querySelectorAll(".chart canvas").length;
  result.width = [document.documentElement.scrollWidth, innerWidth];
  document.body.dataset.result = JSON.stringify(result);
})();
"""
WATCH = """
const problems = [];
for (const kind of ["error", "securitypolicyviolation"]) addEventListener(kind, event => problems.push(
  event.message || event.blockedURI));
"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 600])
def test_the_page_in_a_browser(record, tmp_path, width):
    """The pointer reads the log's values, a drag zooms, runs are hidden and shown, what logs say is text, and nothing
    is wider than the window, asked for, or wrong."""
    parts = report.read_parts()
    parts["script"] = WATCH + parts["script"] + DRIVER
    page = tmp_path / "report.html"
    page.write_text(report.render(report.gather(record), parts))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900", "--virtual-time-budget=5000",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(html.unescape(re.search('data-result="([^"]*)"', done.stdout)[1]))
    assert found["problems"] == [] and found["title"] == "record" and found["width"] == [width, width]
    assert found["images"] == 0 and all(EVIL in text for text in found["texts"]) and found["charts"] == 7
    steps = []
    for reading in found["readings"]:
        group, run, step, loss, ms = re.match(
            r"(\w), run (\d+) .*? step (\d+): loss ([\d.]+), ([\d,]+) ms", reading).groups()
        log = sorted((record / "baseline" if group == "A" else record).glob("*.txt"))[int(run) - 1].read_text()
        assert re.search(rf"^step:{step}/\d+ val_loss:{loss} train_time:{ms.replace(',', '')}ms", log, re.M), reading
        steps.append(int(step))
    assert steps[:5] == sorted(set(steps[:5])) and steps[4] >= 200 and steps[5:] == [100, 125]  # zoomed to 90 to 130
    both, alone, one = found["both"], found["alone"], found["one"]
    assert min(both.values()) > 100 and alone["B"] == 0 and alone["A"] >= both["A"] and 0 < one["B"] < both["B"]
    assert found["checked"] == [False, True, True, *[False] * 7]  # the mean, all, the runs

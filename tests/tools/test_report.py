"""report.py and serve.py: what the page holds, how it behaves in a browser, and what a server gives away."""
import gzip
import json
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import chromium
import compare
import records
import report
import synthetic_logs as logs
from helpers import RECORDS
from run_log import RecordError, read_log

needs_chromium = pytest.mark.skipif(not chromium.FOUND, reason="no Chromium on this machine: apt-get install chromium")
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


def test_a_campaigns_headline_is_the_difference(tmp_path):
    """Of the record's task: the target is told, too."""
    for side, specs in (("A", logs.baseline_specs()), ("B", logs.record_specs())):
        logs.write_logs(tmp_path / side, specs)
    data = report.gather(tmp_path)
    assert "B ends" in data["headline"] and data["target"] == 2.92 and "8 runs end" in data["sentences"][2]
    assert data["sentences"][-1].startswith("By the rules of check: a comparison of B with A: keeps every rule")


def test_tables_that_differ_show_the_rows_that_do(tmp_path):
    """A rate within a group, a group more, and a layer less; what is no table is shown whole."""
    a = "Group(name='mlp', rule=Muon(lr=0.03))", "Group(name='head', rule=AdamW(betas=(0.8, 0.95)))"
    b = "Group(name='new', rule=AdamW())", a[0].replace("3", "2"), a[1]
    for side, rows, layers in (("A", a, "(Layer(), Layer())"), ("B", b, "(Layer(),)")):
        logs.write_log(tmp_path / side, logs.Spec(
            constants=f"groups = ({', '.join(rows)})\nlayers = {layers}\nbetas = (1, {len(rows)})\nother = ()"))
    differing, shared = report.gather(tmp_path)["constants"]
    assert differing.rows == [["groups[mlp]", a[0], b[1]], ["layers[1]", "Layer()", "not stated"],
                                 ["betas", "(1, 2)", "(1, 3)"], ["groups[new]", "not stated", b[0]]]
    assert shared.rows == [["groups[head]", a[1]], ["layers[0]", "Layer()"], ["other", "()"]]


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
    assert records.main(["report", str(folder), "--out", "nowhere/x.html"]) == 2
    assert "name another file" in capsys.readouterr().err


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

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(record, browser, tmp_path):
    """The record's report at 1280 pixels, and afterwards nothing on its console."""
    report.report(record, tmp_path / "report.html", True)
    browser.open((tmp_path / "report.html").as_uri())
    yield browser
    assert browser.evaluate("document.title") == "record" and browser.problems == []
    assert browser.requests == [(tmp_path / "report.html").as_uri()]


BOX = "(box => [box.left, box.top, box.width, box.height])(document.querySelector('.u-over').getBoundingClientRect())"
PICTURE = "document.querySelector('#loss-chart canvas').toDataURL()"
READING = "document.querySelector('#loss-chart output').textContent"
FOCUS = "document.querySelector('#loss-chart .plot').focus()"


def told(page, record: Path) -> tuple[str, int]:
    """(group and run, step) of the loss chart's read-out, which must be a line of that run's log."""
    text = page.evaluate(READING)
    group, run, step, loss, ms = re.match(r"(\w), run (\d+) .*? step (\d+): loss ([\d.]+), ([\d,]+) ms", text).groups()
    log = sorted((record / "baseline" if group == "A" else record).glob("*.txt"))[int(run) - 1].read_text()
    assert re.search(rf"^step:{step}/\d+ val_loss:{loss} train_time:{ms.replace(',', '')}ms", log, re.M), text
    return f"{group}{run}", int(step)


def hide_means(page) -> None:
    page.evaluate("document.querySelectorAll('#legend [data-key$=mean]').forEach(box => box.click())")


@needs_chromium
def test_the_pointer_reads_the_logs_values(page, record):
    hide_means(page)
    page.evaluate("document.querySelector('#loss-chart').scrollIntoView()")
    left, top, width, height = page.evaluate(BOX)
    steps = []
    for share in (0.05, 0.3, 0.5, 0.7, 0.97):
        page.move(left + share * width, top + 0.9 * height)
        steps.append(told(page, record)[1])
    assert steps == sorted(set(steps)) and steps[-1] >= 200
    page.move(5, 5)
    before = page.evaluate(PICTURE)
    page.drag(left + 0.4 * width, top + 0.5 * height, left + 0.6 * width)  # steps 90 to 130
    for share, step in ((0.01, 100), (0.99, 125)):
        page.move(left + share * width, top + 0.5 * height)
        assert told(page, record)[1] == step
    page.evaluate(FOCUS)
    page.press("0")
    page.move(5, 5)
    assert page.evaluate(PICTURE) == before


@needs_chromium
def test_the_keyboard_walks_zooms_and_resets(page, record):
    hide_means(page)
    page.evaluate(FOCUS)
    before = page.evaluate(PICTURE)
    for key, expected in (("ArrowLeft", ("B8", 200)), ("ArrowLeft", ("B8", 175)), ("ArrowDown", ("B7", 175)),
                          ("ArrowRight", ("B7", 200)), ("ArrowUp", ("B8", 200)), ("ArrowUp", ("A1", 200))):
        page.press(key)
        assert told(page, record) == expected
    page.press("Escape")
    pictures = {before}
    for key, shift in (("-", False), ("+", False), ("+", False), ("ArrowLeft", True)):
        page.press(key, shift)
        pictures.add(page.evaluate(PICTURE))
    assert len(pictures) == 5
    page.press("0")
    assert page.evaluate(PICTURE) == before and page.evaluate(READING) == ""


COUNT = """(() => { const canvas = document.querySelector('#loss-chart canvas'), found = {A: 0, B: 0};
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 100) {
    if (pixels[i + 2] > pixels[i] + 60) found.A++; else if (pixels[i] > pixels[i + 2] + 60) found.B++; }
  return found; })()"""  # blue and orange pixels


@needs_chromium
def test_runs_are_hidden_and_shown(page, record):
    both = page.evaluate(COUNT)
    assert both["A"] > 300 and both["B"] > 300
    head = "document.querySelectorAll('#legend .group-head')[1].querySelectorAll('input')"
    page.evaluate(f"{head}.forEach(box => box.click())")  # B's mean and all its runs
    alone = page.evaluate(COUNT)
    assert alone["B"] == 0 and alone["A"] >= both["A"]
    page.evaluate("document.querySelector(\"[data-key='0 mean']\").click()")
    page.evaluate("document.querySelectorAll('#legend .group-runs')[0].querySelectorAll('input')[2].focus()")
    page.press(" ")
    page.evaluate(FOCUS)
    seen = set()
    for _ in range(8):
        page.press("ArrowUp")
        seen.add(told(page, record)[0])
    assert seen == {"A1", "A2", "A4"}
    assert page.evaluate("document.querySelectorAll('#legend .group-head input')[1].indeterminate")
    page.evaluate(f"{head}.forEach(box => box.click())")
    assert page.evaluate(COUNT)["B"] > 300


@needs_chromium
def test_what_logs_say_is_text(page):
    assert EVIL in page.evaluate("document.getElementById('diff').textContent")
    assert EVIL in page.evaluate("document.getElementById('constants-differ').textContent")
    assert page.evaluate("document.querySelectorAll('img').length") == 0


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_every_width(page, tmp_path, width):
    page.open((tmp_path / "report.html").as_uri(), width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.querySelectorAll('.chart canvas').length") == 7


@needs_chromium
def test_the_last_tick_is_whole(browser, tmp_path):
    """Of 4,000 steps it stands at the plot's edge; no ink of its label reaches the canvas's."""
    report.report(logs.write_log(tmp_path, logs.Spec(num_iterations=4000, val_every=1000)), tmp_path / "x.html", True)
    browser.open((tmp_path / "x.html").as_uri())
    assert not browser.evaluate("""(() => { const canvas = document.querySelector('#loss-chart canvas');
        return canvas.getContext('2d').getImageData(canvas.width - 1, 0, 1, canvas.height).data.some(x => x); })()""")


# ----------------------------------------------------------------------------------------------------------------------
# The server

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`follow --serve` of a log that holds no step yet: (port, log, the whole log's text)."""
    folder = tmp_path_factory.mktemp("server")
    reference = logs.write_logs(folder / "reference", logs.record_specs())
    text = logs.log_text(logs.Spec(seed=60, loss=2.9184))
    log = folder / "live.txt"
    log.touch()
    (folder / "link.txt").symlink_to(reference)
    process = subprocess.Popen(
        [sys.executable, RECORDS / "records.py", "follow", log, "--serve", "--reference", reference], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    line = process.stdout.readline()
    yield int(re.match(r"http://127\.0\.0\.1:(\d+)/ shows ", line)[1]), log, text
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


def ask(port: int, target: str, method: str = "GET", more: str = "Host: 127.0.0.1:PORT") -> tuple[int, str, str]:
    """(status, head, body) of a request that no client library has tidied; `more` are its headers."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{method} {target} HTTP/1.1\r\n{more}\r\n\r\n".replace("PORT", str(port)).encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), head, body


@pytest.mark.parametrize("target", [
    "/live.txt", "/link.txt", "/reference", "/../live.txt", "/./data.json", "/%2e%2e/live.txt", "/..%2flive.txt",
    "/data.json/", "/data.json?x", "/data.json/../../live.txt", "/report.js", "//etc/passwd", "/etc/passwd",
    "file:///etc/passwd", "http://127.0.0.1/data.json", "*", "live.txt", "/\\..\\live.txt"])
def test_nothing_else_can_be_reached(server, target):
    status, head, body = ask(server[0], target)
    assert status == 404 and body == "Here are / and /data.json.\n"


@pytest.mark.parametrize("names", ["Host: evil.example", "Host: evil.example:PORT", "Host: 127.0.0.1",
                                   "Host: 127.0.0.1:1", "Host: localhost.evil.example:PORT", "Host:",
                                   "Host: 127.0.0.1:PORT\r\nHost: evil.example:PORT",
                                   "Host: [::1]:PORT", "X-Forwarded-Host: 127.0.0.1:PORT"])
def test_other_hosts_names_are_refused(server, names):
    for target in ("/", "/data.json"):
        status, _, body = ask(server[0], target, more=names)
        assert status == 403 and "groups" not in body


def test_it_shows_only_and_to_this_machine_alone(server):
    port = server[0]
    for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND"):
        status, head, _ = ask(port, "/", method)
        assert status == 405 and "Allow: GET" in head
    for target in ("/", "/data.json"):
        status, head, body = ask(port, target, more="Host: localhost:PORT")
        assert status == 200 and "Cache-Control: no-store" in head and "default-src 'none'" in head and len(body) > 500
        assert "Access-Control" not in head
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert records.main(["follow", str(server[1]), "--serve", "--port", str(port)]) == 2  # taken


@needs_chromium
def test_a_growing_log_is_shown_as_it_grows(server, browser):
    """New lines arrive; what was hidden, zoomed and read out stays so."""
    port, log, text = server
    browser.open(f"http://127.0.0.1:{port}/")
    headline = "document.getElementById('headline').textContent"
    assert "No step is logged yet" in browser.evaluate(headline)
    log.write_text(text[:text.index("step:60/200") + 9])
    browser.wait(f"{headline}.includes('is at step 59 of 200')")
    browser.evaluate("document.querySelector(\"[data-key='0 mean']\").click()")  # the reference
    browser.evaluate(FOCUS)
    browser.press("ArrowLeft")
    reading = browser.evaluate(READING)
    assert "step 50: loss" in reading
    browser.press("+")
    browser.press("+")  # steps 40 to 87
    log.write_text(text)
    browser.wait("document.getElementById('sentences').textContent.includes('Finished: reproducing')")
    assert browser.evaluate(READING) == reading
    assert not browser.evaluate("document.querySelector(\"[data-key='0 mean']\").checked")
    for part in ("runs", "legend"):
        assert "2.918400" in browser.evaluate(f"document.getElementById('{part}').textContent")
    browser.press("Escape")
    browser.press("ArrowLeft")  # to the last point in view
    assert "step 75: loss" in browser.evaluate(READING)
    browser.evaluate(FOCUS.replace("loss", "step"))
    browser.press("ArrowLeft")
    assert "step 200: " in browser.evaluate(READING.replace("loss", "step")) and browser.problems == []
    assert {address.rsplit("/", 1)[0] for address in browser.requests} == {f"http://127.0.0.1:{port}"}

"""data/fetch.py against a server on this machine that speaks the hub's protocol: real transfers, processes, faults."""
import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import fetch
import shards
from helpers import ROOT

DATA = ROOT / "data"
constants = fetch.load_hub().constants
SHARD_TOKENS, VAL_TOKENS, CHUNK_BYTES = 100_000, 70_000, 4096
SMALL = {"SHARD_TOKENS": SHARD_TOKENS, "VAL_TOKENS": VAL_TOKENS}
VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
# The command with small shards, as a process of its own.
CHILD = f"""
import sys
sys.path.insert(0, {str(DATA)!r})
import fetch, shards
vars(fetch).update({SMALL!r})
fetch.load_hub().constants.DOWNLOAD_CHUNK_SIZE = {CHUNK_BYTES}
shards.main(sys.argv[1:])
"""


def shard(seed, num_tokens=SHARD_TOKENS, **header):
    ids = np.random.default_rng(seed).integers(0, 50257, num_tokens).astype("<u2")
    fields = {"magic": 20240520, "version": 1, "tokens": num_tokens, "vocab_size": 0, "doc_id": 0} | header
    return struct.pack("<256i", *fields.values(), *[0] * 251) + ids.tobytes()


def flipped(content, position=5000):
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1:]


class Hub(ThreadingHTTPServer):
    """The hub's part of the protocol: a redirect that describes the file, then its bytes from another host name."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {VAL: shard(0, VAL_TOKENS), ONE: shard(1), TWO: shard(2)}
        self.with_sha, self.ignore_ranges = True, False
        self.statuses, self.served, self.cuts, self.stalls = {}, {}, {}, {}  # name: what the next requests get
        self.on_transfer = lambda: None
        self.log, self.ended = [], threading.Event()  # (method, name, first byte) of the requests

    def transfers(self, name=None):
        """(name, first byte) of the transfers so far, those of one file if it is named."""
        return [entry[1:] for entry in self.log if entry[0] == "GET" and name in (None, entry[1])]


class Handler(BaseHTTPRequestHandler):
    """HEAD describes a file or answers with a status; GET sends it whole, up to a cut, or to a stall that stays."""
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        assert self.path == f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}"
        hub.log.append(("HEAD", name, 0))
        status = hub.statuses[name].pop(0) if hub.statuses.get(name) else 302 if name in hub.files else 404
        if status == "stall":
            hub.ended.wait()
            return
        self.send_response(status)
        if status == 302:
            sha256 = hashlib.sha256(hub.files[name]).hexdigest()
            self.send_header("Location", f"http://localhost:{hub.server_port}/storage/{name}")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Linked-Size", str(len(hub.files[name])))
            self.send_header("X-Linked-Etag", f'"{sha256}"' if hub.with_sha else f'"{sha256[:32]}"')
            self.send_header("X-Xet-Hash", sha256)  # another way of transfer, not to be taken
            self.send_header("X-Xet-Refresh-Route", f"{hub.url}/xet")
        self.end_headers()

    def do_GET(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        content = hub.served.get(name, [hub.files[name]])
        content = content.pop(0) if len(content) > 1 else content[0]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and not hub.ignore_ranges else 0
        stall = hub.stalls.pop(name, None)
        end = stall or (hub.cuts[name].pop(0) if hub.cuts.get(name) else len(content))
        hub.on_transfer()
        hub.log.append(("GET", name, start))
        self.close_connection = True
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:end])
        if stall:
            hub.ended.wait()


@pytest.fixture
def hub(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(fetch, name, value)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two tries; the server does not sleep
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield hub
    hub.ended.set()
    hub.shutdown()
    hub.server_close()


def get(hub, folder, num_shards=1):
    fetch.get(folder, num_shards, hub.url)


def start(hub, folder, **env):
    """The command as a process of its own, in an environment that asks for the other ways of transfer."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": f"{folder}.home", "HF_HUB_DOWNLOAD_TIMEOUT": "300",
           "HF_HUB_ENABLE_HF_TRANSFER": "1", "HF_HUB_DISABLE_XET": "0", **env}
    return subprocess.Popen([sys.executable, "-c", CHILD, "get", folder, "--shards", "1"], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    stdout, stderr = process.communicate(timeout=40)
    return process.returncode, stdout, stderr


def assert_complete(hub, folder, names=(VAL, ONE)):
    """The named shards as the server has them, a manifest that says the truth, and nothing left of the way there."""
    assert sorted(os.listdir(folder)) == sorted([".get.lock", "manifest.json", *names])
    manifest = fetch.read_manifest(folder)
    assert sorted(manifest) == sorted(names)
    for name in names:
        content, sha256 = hub.files[name], hashlib.sha256(hub.files[name]).hexdigest()
        assert (folder / name).read_bytes() == content
        assert manifest[name] == {"bytes": len(content), "tokens": (len(content) - 1024) // 2, "sha256": sha256,
                                  "mtime_ns": (folder / name).stat().st_mtime_ns}


def assert_refused(hub, folder, words, absent=ONE):
    """One sentence with the words and the way out by hand; the absent shard is not there, what is there is whole."""
    with pytest.raises(fetch.ShardError, match=words) as caught:
        get(hub, folder)
    assert re.fullmatch(f"cannot fetch .*kjj0/fineweb10B-gpt2 into {folder} by hand", str(caught.value))
    there = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    assert absent not in there and there.items() <= hub.files.items()


def partial_bytes(folder, name=ONE):
    return max((path.stat().st_size for path in (folder / ".partial" / name).rglob("*.incomplete")), default=0)


@pytest.mark.parametrize("with_sha", [True, False])
def test_fetches_what_was_asked_for_and_then_only_looks(hub, tmp_path, with_sha, monkeypatch):
    hub.with_sha, folder = with_sha, tmp_path / "new" / "folder"
    get(hub, folder)
    assert_complete(hub, folder)
    get(hub, folder, 2)  # more of them later
    assert_complete(hub, folder, (VAL, ONE, TWO))
    assert sorted(hub.transfers()) == sorted((name, 0) for name in hub.files)
    monkeypatch.setattr(fetch, "examine", None)  # a call raises
    monkeypatch.setattr(fetch, "load_hub", None)
    get(hub, folder, 2)


@pytest.mark.parametrize("manifest", ["good", None, "{", "[]", '{"files": []}', '{"files": {"a": 1}}', "\xff"])
def test_files_that_the_manifest_does_not_vouch_for_are_read_once_and_kept(hub, tmp_path, monkeypatch, manifest):
    get(hub, tmp_path)
    os.utime(tmp_path / ONE, ns=(1, 1))
    if manifest is None:
        (tmp_path / "manifest.json").unlink()  # as if the files had been put there by hand
    elif manifest != "good":
        (tmp_path / "manifest.json").write_text(manifest, encoding="latin-1")
    hub.log.clear()
    examined, examine = [], fetch.examine
    monkeypatch.setattr(fetch, "examine", lambda path, *known: examined.append(path.name) or examine(path, *known))
    get(hub, tmp_path)
    get(hub, tmp_path)
    assert examined == ([ONE] if manifest == "good" else [VAL, ONE]) and not hub.log
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("spoil, word", [
    (lambda good: good[:-1000], "should be"), (lambda good: flipped(good, 0), "magic number"),
    (lambda good: flipped(good, 9), "promises"), (lambda good: flipped(good, 13), "vocabulary"), (flipped, "SHA-256")])
def test_a_damaged_file_is_named_and_replaced_once_it_can_be_had(hub, tmp_path, capsys, spoil, word):
    get(hub, tmp_path)
    content = spoil(hub.files[ONE])
    (tmp_path / ONE).write_bytes(content)
    hub.log.clear()
    hub.statuses[ONE] = [404]
    with pytest.raises(fetch.ShardError, match=ONE):
        get(hub, tmp_path)
    assert (tmp_path / ONE).read_bytes() == content
    capsys.readouterr()
    get(hub, tmp_path)
    first_line = capsys.readouterr().out.splitlines()[0]
    assert ONE in first_line and "is damaged" in first_line and word in first_line
    assert hub.transfers() == [(ONE, 0)]
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("name, wrong, words", [
    (ONE, {"magic": 20240521}, "magic"), (ONE, {"version": 2}, "version"), (ONE, {"tokens": 99_999}, "promises"),
    (ONE, {"vocab_size": 50304}, "50,304"), (ONE, {"doc_id": 7}, "id 7"), (VAL, {"num_tokens": 69_999}, "69,999"),
    (ONE, {"num_tokens": 99_999}, "99,999"), (ONE, {"num_tokens": 100_001}, "100,001")])
def test_a_file_that_is_no_published_shard_never_gets_the_final_name(hub, tmp_path, name, wrong, words):
    hub.files[name] = shard(1, **wrong)
    assert_refused(hub, tmp_path, f"{name} came damaged 5 times.*{words}", absent=name)
    assert len(hub.transfers(name)) == 5
    hub.files[name] = shard(1, vocab_size=50257, doc_id=50256)  # zeros may be spelled out
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)


def test_content_other_than_the_hubs_or_the_manifests_is_fetched_again_or_refused(hub, tmp_path):
    good = hub.files[ONE]
    hub.served[ONE] = [flipped(good), good]
    get(hub, tmp_path)
    assert len(hub.transfers(ONE)) == 2
    assert_complete(hub, tmp_path)
    (tmp_path / ONE).unlink()
    hub.with_sha, hub.served = False, {ONE: [flipped(good)]}
    assert_refused(hub, tmp_path, f"{ONE} came damaged.*SHA-256.*instead of {hashlib.sha256(good).hexdigest()[:12]}")


def test_broken_transfers_are_resumed_where_they_broke(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.cuts[ONE], hub.stalls[VAL] = [30_000, 30_500, 90_000, 150_001], 50_000
    breaks = {ONE: [0, *hub.cuts[ONE]], VAL: [0, 50_000]}
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)
    for name, ends in breaks.items():  # what came is not sent again, but for the piece that broke
        resumed = [first for _, first in hub.transfers(name)]
        assert all(0 <= end - first < CHUNK_BYTES for end, first in zip(ends, resumed, strict=True))


@pytest.mark.parametrize("spoil, ignore_ranges", [
    (lambda part: bytes(len(part)), False), (lambda part: 5 * part, False), (lambda part: part, True)])
def test_what_came_and_cannot_be_resumed_is_fetched_again(hub, tmp_path, spoil, ignore_ranges):
    hub.cuts[ONE] = [50_000] * 5
    assert_refused(hub, tmp_path, "IncompleteRead")
    part, = (tmp_path / ".partial" / ONE).rglob("*.incomplete")
    part.write_bytes(spoil(part.read_bytes()))
    hub.ignore_ranges = ignore_ranges
    get(hub, tmp_path)
    assert hub.transfers(ONE)[-1] == (ONE, 0)
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("fault, words", [
    ({"statuses": {ONE: [404]}}, f"404.*{ONE}"), ({"statuses": {ONE: [401]}}, "401.*Unauthorized"),
    ({"statuses": {ONE: [503] * 99}}, "503"), ({"statuses": {ONE: ["stall"] * 99}}, "timed out"),
    ({"statuses": {ONE: [302] + [503] * 99}}, "503"), ({"url": "http://127.0.0.1:1"}, "refused"),
    ({"statuses": {ONE: [200] * 99}}, "does not seem to be on huggingface.co"),  # some other server answered
    ({"cuts": {ONE: [0] * 99}}, "Incomplete"), ({"cuts": {ONE: [9_000] * 99}, "ignore_ranges": True}, "Incomplete")])
def test_what_cannot_be_had_is_one_sentence(hub, tmp_path, monkeypatch, fault, words):
    vars(hub).update(fault)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    assert_refused(hub, tmp_path, f"from {hub.url}: .*{words}")
    assert len(hub.log) < 20  # requests: what the library has repeated is not repeated again


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_process_is_continued(hub, tmp_path, end):
    hub.stalls = {ONE: 120_000, VAL: 90_000}
    process = start(hub, tmp_path)
    while partial_bytes(tmp_path) < 100_000 or partial_bytes(tmp_path, VAL) < 80_000:
        assert process.poll() is None
        threading.Event().wait(0.005)
    process.send_signal(end)
    code, stdout, stderr = finish(process)
    assert not list(tmp_path.glob("*.bin"))
    if end == signal.SIGINT:
        assert re.fullmatch(f"\ninterrupted; .* {tmp_path}, .*\n", stderr)
    assert code == (130 if end == signal.SIGINT else -signal.SIGKILL)
    hub.log.clear()
    code, stdout, stderr = finish(start(hub, tmp_path))
    assert code == 0 and not stderr and "waiting" not in stdout
    assert len(hub.transfers()) == 2 and all(first > 80_000 for _, first in hub.transfers())
    assert_complete(hub, tmp_path)


def test_two_at_once_fetch_each_file_once(hub, tmp_path):
    holding = threading.Event()
    hub.on_transfer = lambda: holding.wait(30)
    processes = [start(hub, tmp_path), start(hub, tmp_path)]
    first_lines = [process.stdout.readline() for process in processes]  # so far each can come
    assert sorted("waiting" in line for line in first_lines) == [False, True]
    holding.set()
    for process in processes:
        code, stdout, stderr = finish(process)
        assert code == 0 and not stderr and "holds the validation shard and 1 training shards" in stdout
    assert sorted(hub.transfers()) == sorted((name, 0) for name in (VAL, ONE))
    assert_complete(hub, tmp_path)


def test_the_command(hub, tmp_path):
    hub.statuses[ONE] = [500, 503]  # a busy server is asked again, and the library must not complain on its own
    code, stdout, stderr = finish(start(hub, tmp_path))
    assert code == 0 and not stderr  # bars are for terminals
    assert f"{tmp_path / ONE}: 100,000 tokens, 0.2 MB" in stdout and "done in" in stdout
    hub.log.clear()
    code, stdout, stderr = finish(start(hub, tmp_path / "other", HF_HUB_OFFLINE="1"))
    assert code == 1 and stderr.count("\n") == 1 and stderr.startswith("shards.py: cannot fetch from ")
    assert "HF_HUB_OFFLINE" in stderr and not hub.log


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk_is_said_and_what_came_is_resumed(hub, tmp_path, mount):
    disk = mount(tmp_path / "disk", "size=180k")  # less than the training shard needs
    with pytest.raises(OSError, match="No space left on device"):
        get(hub, disk)
    assert not (disk / ONE).exists() and partial_bytes(disk) > 0
    mount(disk, "size=400k")
    there = partial_bytes(disk)
    get(hub, disk)
    assert hub.transfers(ONE)[-1][1] == there
    assert_complete(hub, disk)


def test_how_many_and_where(monkeypatch, tmp_path):
    """As many as the preset needs, or as are named, of those that are published."""
    pytest.importorskip("torch")
    asked = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("DATA_PATH", "/elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "get", lambda folder, num_shards: asked.append((folder, num_shards)))
        for arguments in ([], ["--preset", "short"], ["/here", "--shards", "5"]):
            shards.main(["get", *arguments])
    assert asked == [(Path("/elsewhere"), 30), (Path("/elsewhere"), 2), (Path("/here"), 5)]
    with pytest.raises(SystemExit):
        shards.parse(["get", "--preset", "short", "--shards", "1"])
    for preset, words in (("tiny", "does not train on FineWeb"), ("huge", "choose one of medium, ")):
        with pytest.raises(fetch.ShardError, match=words):
            fetch.count_shards(preset)
    assert fetch.shard_names(103)[-1] == "fineweb_train_000103.bin"
    for number in (0, 104):
        with pytest.raises(fetch.ShardError, match="1 to 103"):
            fetch.get(tmp_path / "new", number)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package, words", [
    ("torch", "torch is not installed.*--shards"), ("huggingface_hub", "huggingface_hub is not installed.*install ")])
def test_without_a_package(monkeypatch, package, words):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "train_gpt_medium", raising=False)
    with pytest.raises(fetch.ShardError, match=words):
        fetch.count_shards("medium") if package == "torch" else fetch.load_hub()


@pytest.mark.parametrize("name, value", [("HF_TOKEN", "hf_\u201cabc\u201d"), ("HF_HUB_ETAG_TIMEOUT", "ten")])
def test_settings_of_the_library_that_will_not_do(hub, tmp_path, name, value):
    done = subprocess.run([sys.executable, DATA / "shards.py", "get", tmp_path, "--shards", "1"], text=True,
                          capture_output=True, env=os.environ | {"HF_ENDPOINT": hub.url, name: value})
    assert done.returncode == 1 and re.fullmatch(rf"shards.py: .*; correct or unset .*{name}.*\n", done.stderr)

"""data/fetch.py against a server on this machine that speaks the hub's protocol: real transfers, processes, faults."""
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as constants
import numpy as np
import pytest

import fetch
import shards
from helpers import ROOT, write_shard

SHARD_TOKENS, VAL_TOKENS, CHUNK_BYTES = 100_000, 70_000, 4096
SMALL = {"SHARD_TOKENS": SHARD_TOKENS, "VAL_TOKENS": VAL_TOKENS}
VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
# The command with small shards, as a process of its own.
CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT / "data")!r})
import fetch, shards, huggingface_hub.constants
vars(fetch).update({SMALL!r})
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = {CHUNK_BYTES}
shards.main(sys.argv[1:])
"""


class Hub(ThreadingHTTPServer):
    """The hub's part of the protocol: a redirect that describes the file, then its bytes from another host name."""
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.folder, self.files = f"http://127.0.0.1:{self.server_port}", folder, {}
        for seed, name in enumerate((VAL, ONE, TWO)):
            self.fill(name, seed)
        self.status, self.cuts, self.stalls = {}, {}, {}  # by name: what is answered, where transfers end or hang
        self.log, self.ended = [], threading.Event()  # (name, first byte) of the transfers

    def fill(self, name, seed, num_tokens=None, **header):
        num_tokens = num_tokens or (VAL_TOKENS if name == VAL else SHARD_TOKENS)
        ids = np.random.default_rng(seed).integers(0, 50257, num_tokens)
        self.files[name] = write_shard(self.folder / name, ids, 0, 0, **header).read_bytes()


class Handler(BaseHTTPRequestHandler):
    """HEAD describes a file or answers with a status; GET sends it whole, up to a cut, or to a stall that stays."""
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        assert self.path == f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}"
        status = hub.status.get(name, 302 if name in hub.files else 404)
        self.send_response(status)
        if status == 302:
            sha256 = hashlib.sha256(hub.files[name]).hexdigest()
            self.send_header("Location", f"http://localhost:{hub.server_port}/storage/{name}")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Linked-Size", str(len(hub.files[name])))
            self.send_header("X-Linked-Etag", f'"{sha256}"')
            self.send_header("X-Xet-Hash", sha256)  # another way of transfer, not to be taken
            self.send_header("X-Xet-Refresh-Route", f"{hub.url}/xet")
        self.end_headers()

    def do_GET(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        content = hub.files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        stall = hub.stalls.pop(name, None)
        end = stall or (hub.cuts[name].pop(0) if hub.cuts.get(name) else len(content))
        hub.log.append((name, start))
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
def hub(monkeypatch, tmp_path_factory):
    for name, value in SMALL.items():
        monkeypatch.setattr(fetch, name, value)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # as the command sets it before the import
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two tries; the server does not sleep
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    hub = Hub(tmp_path_factory.mktemp("hub"))
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield hub
    hub.ended.set()
    hub.shutdown()
    hub.server_close()


def get(hub, folder, num_shards=1):
    fetch.get(folder, num_shards, hub.url)


def start(hub, folder):
    """The command as a process of its own."""
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": f"{folder}.home", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    return subprocess.Popen([sys.executable, "-c", CHILD, "get", folder, "--shards", "1"], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def assert_complete(hub, folder, names=(VAL, ONE)):
    """The named shards as the server has them, their sums, and nothing left of the way there."""
    assert sorted(os.listdir(folder)) == sorted([".get.lock", "SHA256SUMS", *names])
    assert all((folder / name).read_bytes() == hub.files[name] for name in names)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == {*names}


def assert_refused(hub, folder, words, absent=ONE):
    """One sentence with the words and the way out by hand; the absent shard is not there, what is there is whole."""
    with pytest.raises(fetch.ShardError, match=words) as caught:
        get(hub, folder)
    assert re.fullmatch(f"cannot fetch from {hub.url}: .*kjj0/fineweb10B-gpt2 into {folder} by hand", str(caught.value))
    there = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    assert absent not in there and there.items() <= hub.files.items()


def test_fetches_what_was_asked_for_and_then_only_looks(hub, tmp_path):
    folder = tmp_path / "new" / "folder"
    get(hub, folder)
    assert_complete(hub, folder)
    get(hub, folder, 2)  # more of them later
    get(hub, folder, 2)
    assert_complete(hub, folder, (VAL, ONE, TWO))
    assert sorted(hub.log) == sorted((name, 0) for name in hub.files)


@pytest.mark.parametrize("spoil, word", [
    (lambda good: good[:-1000], "should be"), (lambda good: b"\0" + good[1:], "magic number")])
def test_a_damaged_file_is_named_and_replaced_once_it_can_be_had(hub, tmp_path, capsys, spoil, word):
    get(hub, tmp_path)
    content = spoil(hub.files[ONE])
    (tmp_path / ONE).write_bytes(content)
    hub.status[ONE] = 404
    with pytest.raises(fetch.ShardError, match=ONE):
        get(hub, tmp_path)
    assert (tmp_path / ONE).read_bytes() == content
    hub.status.clear()
    capsys.readouterr()
    get(hub, tmp_path)
    first_line = capsys.readouterr().out.splitlines()[0]
    assert ONE in first_line and "is damaged" in first_line and word in first_line
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("name, wrong, words", [
    (ONE, {"header": {0: 1}}, "magic"), (ONE, {"header": {3: 50304}}, "50,304"),
    (VAL, {"num_tokens": 69_999}, "69,999"), (ONE, {"num_tokens": 99_999}, "99,999")])
def test_a_file_that_is_no_published_shard_never_gets_the_final_name(hub, tmp_path, name, wrong, words):
    hub.fill(name, 1, **wrong)
    assert_refused(hub, tmp_path, f"{name} came damaged.*{words}", absent=name)
    hub.fill(name, 1, header={3: 50257, 4: 50256})  # zeros may be spelled out
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)


def test_content_other_than_the_hubs_is_refused_and_fetched_again(hub, tmp_path):
    hub.cuts[ONE] = [150_000] * fetch.MAX_TRIES
    assert_refused(hub, tmp_path, "IncompleteRead")
    part, = (tmp_path / ".partial").rglob("*.incomplete")
    content = bytearray(part.read_bytes())
    content[5000] ^= 4
    part.write_bytes(content)
    assert_refused(hub, tmp_path, f"{ONE} came damaged: its SHA-256 begins with")
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)


def test_broken_transfers_are_resumed_where_they_broke(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.cuts[ONE], hub.stalls[VAL] = [30_000, 30_500, 90_000, 150_001], 50_000
    breaks = {ONE: [0, *hub.cuts[ONE]], VAL: [0, 50_000]}
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)
    for name, ends in breaks.items():  # what came is not sent again, but for the piece that broke
        resumed = [first for sent, first in hub.log if sent == name]
        assert all(0 <= end - first < CHUNK_BYTES for end, first in zip(ends, resumed, strict=True))


@pytest.mark.parametrize("fault, words", [
    ({"status": {ONE: 404}}, f"404.*{ONE}"), ({"status": {ONE: 401}}, "401.*Unauthorized"),
    ({"status": {ONE: 503}}, "503"), ({"url": "http://127.0.0.1:1"}, "refused"),
    ({"cuts": {ONE: [0] * 99}}, "Incomplete")])
def test_what_cannot_be_had_is_one_sentence(hub, tmp_path, fault, words):
    vars(hub).update(fault)
    assert_refused(hub, tmp_path, words)
    assert len(hub.log) < 10


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_process_is_continued(hub, tmp_path, end):
    hub.stalls = {ONE: 120_000, VAL: 90_000}
    process = start(hub, tmp_path)
    while sum(path.stat().st_size for path in (tmp_path / ".partial").rglob("*.incomplete")) < 180_000:
        assert process.poll() is None
        threading.Event().wait(0.005)
    process.send_signal(end)
    stdout, _ = process.communicate(timeout=40)
    assert process.returncode == -end and "resumes" in stdout and not list(tmp_path.glob("*.bin"))
    hub.log.clear()
    process = start(hub, tmp_path)
    assert "done in" in process.communicate(timeout=40)[0] and process.returncode == 0
    assert len(hub.log) == 2 and all(first > 60_000 for _, first in hub.log)
    assert_complete(hub, tmp_path)


def test_two_at_once_fetch_each_file_once(hub, tmp_path):
    processes = [start(hub, tmp_path), start(hub, tmp_path)]
    for process in processes:
        stdout, _ = process.communicate(timeout=40)
        assert process.returncode == 0 and "holds the validation shard and 1 training shards" in stdout
    assert sorted(hub.log) == sorted((name, 0) for name in (VAL, ONE))
    assert_complete(hub, tmp_path)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk_is_said_and_what_came_is_resumed(hub, tmp_path, mount):
    disk = mount(tmp_path / "disk", "size=180k")  # less than the training shard needs
    with pytest.raises(OSError, match="No space left on device"):
        get(hub, disk)
    assert not (disk / ONE).exists()
    mount(disk, "size=500k")
    hub.log.clear()
    get(hub, disk)
    assert min(first for _, first in hub.log) > 0
    assert_complete(hub, disk)


def test_how_many_and_where(monkeypatch, tmp_path):
    """As many as the preset needs, or as are named, of those that are published."""
    asked = []
    monkeypatch.setenv("DATA_PATH", "/elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "get", lambda folder, num_shards: asked.append((folder, num_shards)))
        for arguments in ([], ["--preset", "short"], ["/here", "--shards", "5"]):
            shards.main(["get", *arguments])
    assert asked == [(Path("/elsewhere"), 30), (Path("/elsewhere"), 2), (Path("/here"), 5)]
    for preset, words in (("tiny", "does not train on FineWeb"), ("huge", "KeyError: 'huge'")):
        with pytest.raises(fetch.ShardError, match=f"{words}.*--shards"):
            fetch.count_shards(preset)
    assert fetch.shard_names(103)[-1] == "fineweb_train_000103.bin"
    for number in (0, 104):
        with pytest.raises(fetch.ShardError, match="1 to 103"):
            fetch.get(tmp_path / "new", number)
    assert not (tmp_path / "new").exists()

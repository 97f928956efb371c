"""data/fetch.py against a server on this machine that speaks the hub's protocol: real transfers, processes, faults."""
import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import fetch  # noqa: E402
import shards  # noqa: E402
from shard_format import ShardError  # noqa: E402

pytest.importorskip("huggingface_hub")
from huggingface_hub import constants  # noqa: E402

SHARD_TOKENS, VAL_TOKENS, CHUNK_BYTES = 100_000, 70_000, 4096
SHARD_BYTES = 1024 + 2 * SHARD_TOKENS
SMALL = {"SHARD_TOKENS": SHARD_TOKENS, "MIN_VAL_TOKENS": VAL_TOKENS, "CHUNK_BYTES": CHUNK_BYTES, "PATIENCE_S": 0.3,
         "FIRST_WAIT_S": 0.01, "MAX_WAIT_S": 0.05}
VAL, ONE, TWO = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
# The command with small shards, as a process of its own.
CHILD = f"""
import sys
sys.path.insert(0, {str(DATA)!r})
import fetch, shards
vars(fetch).update({SMALL!r})
shards.main(sys.argv[1:])
"""


def shard(seed, num_tokens=SHARD_TOKENS, header=(20240520, 1, None, 0, 0)):
    ids = np.random.default_rng(seed).integers(0, 50257, num_tokens).astype("<u2")
    header = [num_tokens if value is None else value for value in header]
    return struct.pack("<256i", *header, *[0] * (256 - len(header))) + ids.tobytes()


class Hub(ThreadingHTTPServer):
    """The hub's part of the protocol: a redirect that describes the file, then its bytes from another host name."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.files = {VAL: shard(0, VAL_TOKENS), ONE: shard(1), TWO: shard(2)}
        self.served = {}  # name: what is really sent, where it differs
        self.with_sha = True
        self.ignore_ranges = False
        self.statuses = {}  # name: statuses of the next requests for its description
        self.cuts = {}  # name: bytes after which the next transfers end
        self.stalls = {}  # name: bytes after which the next transfer stands still until the test ends
        self.pause_s = 0  # after each piece
        self.on_transfer = None
        self.log = []  # [method, name, first byte, bytes sent]
        self.ended = threading.Event()

    def transfers(self, name=None):
        return [tuple(entry[1:]) for entry in self.log if entry[0] == "GET" and name in (None, entry[1])]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # a client that was killed
            pass

    def do_HEAD(self):
        self.describe()

    def do_GET(self):
        if self.path.startswith("/storage/"):
            self.send()
        else:
            self.describe()

    def describe(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        if self.path != f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}":
            self.send_error(404)  # some versions of the library ask for more, and do without
            return
        if self.command == "HEAD":
            hub.log.append(["HEAD", name, 0, 0])
        status = hub.statuses[name].pop(0) if hub.statuses.get(name) else 302 if name in hub.files else 404
        if status == "stall":
            hub.ended.wait()
            return
        self.send_response(status)
        if status == 302:
            content = hub.files[name]
            sha256 = hashlib.sha256(content).hexdigest()
            self.send_header("Location", f"{hub.storage}/{name}")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-Etag", f'"{sha256}"' if hub.with_sha else f'"{sha256[:32]}"')
        elif status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        content = hub.served.get(name, [hub.files[name]])
        content = content.pop(0) if len(content) > 1 else content[0]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and not hub.ignore_ranges else 0
        end = hub.cuts[name].pop(0) if hub.cuts.get(name) else len(content)
        stall = hub.stalls.pop(name, None)
        if hub.on_transfer:
            hub.on_transfer(name)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.close_connection = True
        position, entry = start, ["GET", name, start, 0]
        hub.log.append(entry)
        while position < end:
            piece = content[position:min(position + CHUNK_BYTES, end, stall or end)]
            if not piece:
                hub.ended.wait()
                break
            position += len(piece)
            entry[3] += len(piece)
            self.wfile.write(piece)
            hub.ended.wait(hub.pause_s)


@pytest.fixture
def hub(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(fetch, name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library's own waits; the server does not sleep
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.ended.set()
    hub.shutdown()
    thread.join()
    hub.server_close()


def get(hub, folder, num_shards=1):
    fetch.fetch(folder, num_shards, hub.url)


def start(hub, folder, stderr=subprocess.PIPE):
    """The command as a process of its own."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder) + ".home", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    return subprocess.Popen([sys.executable, "-c", CHILD, "get", folder, "--shards", "1"], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=stderr)


def finish(process):
    stdout, stderr = process.communicate(timeout=40)
    return process.returncode, stdout, stderr


def assert_complete(hub, folder, names=(VAL, ONE)):
    """The named shards as the server has them, a manifest that says the truth, and nothing left of the way there."""
    assert sorted(os.listdir(folder)) == sorted([".get.lock", "manifest.json", *names])
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(manifest) == sorted(names)
    for name in names:
        content, entry, stat = hub.files[name], manifest[name], (folder / name).stat()
        assert (folder / name).read_bytes() == content
        assert (entry["bytes"], entry["mtime_ns"]) == (len(content), stat.st_mtime_ns)
        assert entry["tokens"] == (len(content) - 1024) // 2
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def assert_refused(hub, folder, *words, absent=ONE):
    """One sentence with the words and the way out by hand; a shard that is there is whole, the absent one is not."""
    with pytest.raises(ShardError) as caught:
        get(hub, folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and "by hand" in sentence and str(folder) in sentence
    assert "kjj0/fineweb10B-gpt2" in sentence
    for word in words:
        assert word in sentence
    there = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    assert absent not in there and there.items() <= hub.files.items()


def wait_until(condition):
    for _ in range(4000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("waited in vain")


# ---- what is there afterwards

@pytest.mark.parametrize("with_sha", [True, False])
def test_fetches_what_was_asked_for(hub, tmp_path, with_sha, capsys):
    hub.with_sha = with_sha
    get(hub, tmp_path / "new" / "folder", 2)
    assert_complete(hub, tmp_path / "new" / "folder", (VAL, ONE, TWO))
    assert sorted(hub.transfers()) == sorted((name, 0, len(content)) for name, content in hub.files.items())
    for name, entry in fetch.read_manifest(tmp_path / "new" / "folder").items():
        assert entry["hub_sha256"] == (entry["sha256"] if with_sha else None)
    get(hub, tmp_path / "one")
    assert_complete(hub, tmp_path / "one")
    get(hub, tmp_path / "one", 2)  # more of them later
    assert_complete(hub, tmp_path / "one", (VAL, ONE, TWO))


def test_second_start_neither_asks_nor_hashes(hub, tmp_path, monkeypatch):
    get(hub, tmp_path)
    hub.log.clear()
    monkeypatch.setattr(fetch, "hash_file", None)  # a call raises
    monkeypatch.setattr(fetch, "load_hub", None)
    get(hub, tmp_path)
    assert not hub.log


def count_hashes(monkeypatch):
    hashed, hash_file = [], fetch.hash_file

    def count(path, *rest):
        hashed.append(path.name)
        return hash_file(path, *rest)

    monkeypatch.setattr(fetch, "hash_file", count)
    return hashed


def test_a_touched_file_is_hashed_once_and_kept(hub, tmp_path, monkeypatch):
    get(hub, tmp_path)
    hub.log.clear()
    hashed = count_hashes(monkeypatch)
    os.utime(tmp_path / ONE, ns=(1, 1))
    get(hub, tmp_path)
    get(hub, tmp_path)
    assert hashed == [ONE] and not hub.log
    assert_complete(hub, tmp_path)
    assert fetch.read_manifest(tmp_path)[ONE]["hub_sha256"]


def test_files_placed_by_hand_are_taken_over_without_network(hub, tmp_path, monkeypatch):
    for name in (VAL, ONE):
        (tmp_path / name).write_bytes(hub.files[name])
    hashed = count_hashes(monkeypatch)
    get(hub, tmp_path)
    assert sorted(hashed) == sorted([VAL, ONE]) and not hub.log
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "\xff"])
def test_a_broken_manifest_is_made_anew(hub, tmp_path, text):
    get(hub, tmp_path)
    hub.log.clear()
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    get(hub, tmp_path)
    assert not hub.log
    assert_complete(hub, tmp_path)


# ---- damage

def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[-1000:]
    else:
        content[{"magic": 0, "tokens": 9, "vocabulary": 13, "id": 5000}[how]] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how, word", [
    ("truncated", "should be"), ("magic", "magic number"), ("tokens", "promises"), ("vocabulary", "vocabulary of"),
    ("id", "SHA-256")])
def test_a_damaged_file_is_named_and_fetched_again(hub, tmp_path, capsys, how, word):
    get(hub, tmp_path)
    hub.log.clear()
    capsys.readouterr()
    damage(tmp_path / ONE, how)
    get(hub, tmp_path)
    first_line = capsys.readouterr().out.splitlines()[0]
    assert ONE in first_line and "is damaged" in first_line and word in first_line
    assert hub.transfers() == [(ONE, 0, SHARD_BYTES)]
    assert_complete(hub, tmp_path)


def test_a_damaged_file_stays_while_it_cannot_be_fetched(hub, tmp_path):
    get(hub, tmp_path)
    damage(tmp_path / ONE, "id")
    hub.statuses[ONE] = [404]
    with pytest.raises(ShardError, match=ONE):
        get(hub, tmp_path)
    assert (tmp_path / ONE).exists()
    get(hub, tmp_path)  # the manifest still knows better
    assert_complete(hub, tmp_path)


def wrong_sizes():
    return {"short": shard(1, SHARD_TOKENS - 1), "long": shard(1, SHARD_TOKENS + 1), "empty": b""}


@pytest.mark.parametrize("size", wrong_sizes())
def test_a_wrong_size_is_refused_before_any_transfer(hub, tmp_path, size):
    hub.files[ONE] = wrong_sizes()[size]
    assert_refused(hub, tmp_path, ONE, "instead of 100,000")
    hub.files[ONE], hub.files[VAL] = shard(1), shard(0, VAL_TOKENS - 1)
    assert_refused(hub, tmp_path, VAL, "70,000")
    assert not hub.transfers()


@pytest.mark.parametrize("header, word", [
    ((20240521, 1, None), "magic"), ((20240520, 2, None), "version"), ((20240520, 1, SHARD_TOKENS - 1), "promises"),
    ((20240520, 1, None, 50304, 50256), "50,304"), ((20240520, 1, None, 0, 7), "id 7")])
def test_a_wrong_header_never_gets_the_final_name(hub, tmp_path, header, word):
    hub.files[ONE] = shard(1, header=header)
    assert_refused(hub, tmp_path, ONE, word, "damaged 2 times")
    assert len(hub.transfers(ONE)) == 2


def test_published_vocabulary_may_be_spelled_out(hub, tmp_path):
    hub.files[ONE] = shard(1, header=(20240520, 1, None, 50257, 50256))
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)


def flipped(content):
    return content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]


def test_content_other_than_the_hubs_is_fetched_again(hub, tmp_path):
    hub.served[ONE] = [flipped(hub.files[ONE]), hub.files[ONE]]
    get(hub, tmp_path)
    assert len(hub.transfers(ONE)) == 2
    assert_complete(hub, tmp_path)


def test_content_that_stays_wrong_is_refused(hub, tmp_path):
    hub.files = {VAL: hub.files[VAL], ONE: hub.files[ONE]}
    hub.served[ONE] = [flipped(hub.files[ONE])]
    with pytest.raises(ShardError, match=f"{ONE}: it came damaged 2 times.*the hub's"):
        get(hub, tmp_path)
    assert not (tmp_path / ONE).exists()


def test_content_other_than_the_manifests_is_refused(hub, tmp_path):
    hub.with_sha = False
    get(hub, tmp_path)
    (tmp_path / ONE).unlink()
    hub.files[ONE] = flipped(hub.files[ONE])
    with pytest.raises(ShardError, match=f"{ONE}: it came damaged 2 times.*manifest.json's"):
        get(hub, tmp_path)
    assert not (tmp_path / ONE).exists()


# ---- the network

def test_cut_connections_are_continued_where_they_broke(hub, tmp_path):
    cuts = [30_000, 30_500, 90_000, 150_001]
    hub.cuts[ONE] = list(cuts)
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)
    starts = [first for _, first, _ in hub.transfers(ONE)]
    assert len(starts) == 5 and starts[0] == 0
    for cut, first in zip(cuts, starts[1:]):
        assert cut - CHUNK_BYTES < first <= cut  # what came is not sent again, but for the piece that broke


def test_patience_starts_anew_with_each_byte(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.03)
    hub.cuts[ONE] = list(range(8000, SHARD_BYTES, 5000))  # all the waits together are longer than PATIENCE_S
    get(hub, tmp_path)
    assert len(hub.transfers(ONE)) == len(range(8000, SHARD_BYTES, 5000)) + 1
    assert_complete(hub, tmp_path)


def test_other_ways_of_transfer_stay_off(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", True, raising=False)  # it cannot continue
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("with_sha", [True, False])
def test_a_server_that_ignores_ranges(hub, tmp_path, with_sha):
    hub.ignore_ranges, hub.with_sha, hub.cuts[ONE] = True, with_sha, [30_000]
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)


def test_a_server_that_ignores_ranges_and_always_cuts(hub, tmp_path):
    hub.ignore_ranges, hub.cuts[ONE] = True, [30_000] * 10_000
    assert_refused(hub, tmp_path, ONE, "no connection")


def test_connections_that_always_break_at_once(hub, tmp_path):
    hub.cuts[VAL] = [0] * 10_000
    assert_refused(hub, tmp_path, VAL, hub.url[7:], absent=VAL)


@pytest.mark.parametrize("status, words", [
    (404, ["does not have it", "404"]), (403, ["refuses", "403"]), (401, ["refuses", "401", "HF_TOKEN"])])
def test_refusals_are_final(hub, tmp_path, status, words):
    hub.statuses[ONE] = [status]
    assert_refused(hub, tmp_path, ONE, *words)
    assert not hub.transfers()
    assert [entry[1] for entry in hub.log].count(ONE) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(hub, tmp_path, status):
    hub.statuses[ONE] = [status] * 2
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)


def test_a_server_that_stays_busy(hub, tmp_path):
    hub.statuses[ONE] = [503] * 10_000
    assert_refused(hub, tmp_path, ONE, "cannot serve it now", "503")


def test_a_refused_port(hub, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        hub.url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert_refused(hub, tmp_path, "fineweb_", "Connection refused", hub.url[7:])


def test_offline_mode(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, stderr = finish(start(hub, tmp_path))
    assert code == 1 and stderr.count("\n") == 1 and "HF_HUB_OFFLINE" in stderr and "by hand" in stderr
    assert not hub.log


def test_a_server_that_does_not_answer(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.statuses[ONE] = ["stall"] * 10_000
    assert_refused(hub, tmp_path, ONE, "did not answer in time")


def test_a_transfer_that_stands_still_is_taken_up_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.stalls[ONE] = 50_000
    get(hub, tmp_path)
    assert_complete(hub, tmp_path)
    (_, _, sent), (_, first, _) = hub.transfers(ONE)
    assert sent == 50_000
    assert 50_000 - CHUNK_BYTES < first <= 50_000


def test_a_slow_server_is_waited_for(hub, tmp_path):
    hub.pause_s = 0.02  # 50 pieces: longer than PATIENCE_S
    get(hub, tmp_path)
    assert len(hub.transfers()) == 2
    assert_complete(hub, tmp_path)


def test_partial_files_of_another_version_are_removed(hub, tmp_path):
    (tmp_path / ".partial").mkdir()
    sha256 = hashlib.sha256(hub.files[ONE]).hexdigest()
    (tmp_path / ".partial" / f"{ONE}.{'0' * 16}.part").write_bytes(bytes(1000))
    (tmp_path / ".partial" / f"{ONE}.{sha256[:16]}.part").write_bytes(bytes(SHARD_BYTES + 1))
    get(hub, tmp_path)
    assert hub.transfers(ONE) == [(ONE, 0, SHARD_BYTES)]
    assert_complete(hub, tmp_path)


def test_a_wrong_partial_file_costs_one_more_transfer(hub, tmp_path):
    (tmp_path / ".partial").mkdir()
    sha256 = hashlib.sha256(hub.files[ONE]).hexdigest()
    (tmp_path / ".partial" / f"{ONE}.{sha256[:16]}.part").write_bytes(bytes(50_000))
    get(hub, tmp_path)
    assert [first for _, first, _ in hub.transfers(ONE)] == [50_000, 0]
    assert_complete(hub, tmp_path)


# ---- processes

def partial_bytes(folder, name=ONE):
    return sum(path.stat().st_size for path in folder.glob(f".partial/{name}.*.part"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_process_is_continued(hub, tmp_path, end):
    hub.stalls = {ONE: 120_000, VAL: 90_000}
    process = start(hub, tmp_path)
    wait_until(lambda: partial_bytes(tmp_path) > 100_000 and partial_bytes(tmp_path, VAL) > 80_000)
    process.send_signal(end)
    code, stdout, stderr = finish(process)
    assert not list(tmp_path.rglob("*.bin"))
    hub.log.clear()
    if end == signal.SIGINT:
        assert code == 130 and stderr.count("\n") == 1 and str(tmp_path) in stderr
    else:
        assert code == -signal.SIGKILL
    code, stdout, stderr = finish(start(hub, tmp_path))
    assert code == 0 and not stderr and "waiting" not in stdout
    assert [first > 80_000 for _, first, _ in hub.transfers()] == [True] * 2
    assert_complete(hub, tmp_path)


def test_two_at_once_fetch_each_file_once(hub, tmp_path):
    holding = threading.Event()
    hub.on_transfer = lambda name: holding.wait(30)
    processes = [start(hub, tmp_path), start(hub, tmp_path)]
    wait_until(lambda: len(hub.log) >= 2)
    lines = {}
    for process in processes:  # both have got as far as they can
        thread = threading.Thread(target=lambda p=process: lines.setdefault(p, p.stdout.readline()))
        thread.start()
        thread.join(30)
    assert sorted("waiting" in line for line in lines.values()) == [False, True]
    holding.set()
    for process in processes:
        code, stdout, stderr = finish(process)
        assert code == 0 and not stderr and "holds the validation shard and 1 training shards" in stdout
    assert sorted(hub.transfers()) == sorted((name, 0, len(hub.files[name])) for name in (VAL, ONE))
    assert_complete(hub, tmp_path)
    assert all(entry["hub_sha256"] for entry in fetch.read_manifest(tmp_path).values())  # nobody wrote an older one


def test_the_bar_on_a_terminal(hub, tmp_path):
    hub.pause_s = 0.01
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = start(hub, tmp_path, stderr=stderr)
    os.close(stderr)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nothing more comes
        while piece := os.read(terminal, 1000):
            shown += piece
    assert finish(process)[0] == 0
    frames = [frame for frame in re.split(r"[\r\n]+", shown.decode()) if frame.startswith("2 files:")]
    assert any("/342k" in frame and "<00:" in frame and "B/s" in frame for frame in frames)  # bytes of the whole, ETA
    assert "100%" in frames[-1] and "fineweb_train_000001.bin:" not in shown.decode()
    os.close(terminal)


def test_the_command(hub, tmp_path):
    hub.statuses[ONE] = [503]  # the library must not complain on its own
    code, stdout, stderr = finish(start(hub, tmp_path))
    assert code == 0 and not stderr  # the bar is for terminals
    assert f"{tmp_path / ONE}: 100,000 tokens, 0.2 MB" in stdout and "done in" in stdout
    hub.files.clear()
    code, stdout, stderr = finish(start(hub, tmp_path / "other"))
    assert code == 1 and stderr.count("\n") == 1 and stderr.startswith("shards.py: cannot fetch fineweb_")


# ---- disks

@pytest.fixture
def disk(tmp_path):
    """A memory disk of 256 KB, less than a set needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_too_little_space_is_refused_before_the_transfer(hub, disk):
    needed, free = SHARD_BYTES + 1024 + 2 * VAL_TOKENS, shutil.disk_usage(disk).free
    with pytest.raises(ShardError, match=f"needs {needed:,} bytes more and its disk has {free:,} free"):
        get(hub, disk)
    assert not hub.transfers() and not list(disk.rglob("*.bin"))


def test_a_disk_that_fills_up_midway(hub, disk):
    hub.files = {name: hub.files[name] for name in (VAL, ONE)}
    (disk / VAL).write_bytes(shard(0, 71_000)[:1024 + 2 * 71_000])
    subprocess.run(["mount", "-o", "remount,size=400k", disk], check=True)
    hub.on_transfer = lambda name: (disk / "other").write_bytes(bytes(100_000))
    with pytest.raises(ShardError) as caught:
        get(hub, disk)
    assert "No space left on device; free some space" in str(caught.value) and "\n" not in str(caught.value)
    assert partial_bytes(disk) > 50_000 and not (disk / ONE).exists()
    (disk / "other").unlink()
    hub.on_transfer, there = None, partial_bytes(disk)
    get(hub, disk)
    assert hub.transfers(ONE)[-1] == (ONE, there, SHARD_BYTES - there)
    assert (disk / ONE).read_bytes() == hub.files[ONE]


def test_a_manifest_that_finds_no_space_leaves_the_old_one(hub, disk):
    (disk / ONE).write_bytes(bytes(1000))
    old = {ONE: fetch.make_entry(disk / ONE, 1, "0" * 64, None)}
    fetch.write_manifest(disk, old)
    with pytest.raises(OSError, match="No space left"):
        fetch.write_manifest(disk, {str(number): old[ONE] for number in range(10_000)})
    assert fetch.read_manifest(disk) == old and sorted(os.listdir(disk)) == [ONE, "manifest.json"]


def test_a_set_on_a_disk_that_cannot_be_written(hub, disk, capsys):
    subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    for name in (VAL, ONE):
        (disk / name).write_bytes(hub.files[name])
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    get(hub, disk)
    assert "cannot be written" in capsys.readouterr().out and not hub.log
    with pytest.raises(OSError):  # what is missing cannot be put there
        get(hub, disk, 2)


# ---- how many, where, with what

@pytest.mark.parametrize("number", [0, -1, 104])
def test_numbers_that_are_not_published(number, tmp_path):
    with pytest.raises(ShardError, match="1 to 103"):
        fetch.fetch(tmp_path / "new", number)
    assert not (tmp_path / "new").exists()
    assert fetch.shard_names(103)[-1] == "fineweb_train_000103.bin"


def test_as_many_as_the_schedule_needs():
    pytest.importorskip("torch")
    assert fetch.count_shards("medium") == 30 and fetch.count_shards("short") == 2


def test_without_torch_the_number_must_be_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "train_gpt_medium", raising=False)
    with pytest.raises(ShardError, match="torch is not installed.*--shards"):
        fetch.get(tmp_path, "medium")


def test_without_the_library(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ShardError, match="huggingface_hub is not installed.*requirements.txt"):
        get(hub, tmp_path)


def test_arguments(monkeypatch):
    monkeypatch.delenv("DATA_PATH", raising=False)
    args = shards.parse(["get"])
    assert (args.folder, args.preset, args.shards) == (DATA / "fineweb10B", "medium", None)
    monkeypatch.setenv("DATA_PATH", "/elsewhere")
    assert shards.parse(["get", "--preset", "short"]).folder == Path("/elsewhere")
    assert shards.parse(["get", "/here"]).folder == Path("/here")
    for wrong in (["get", "--preset", "tiny"], ["get", "--preset", "short", "--shards", "1"], ["get", "--shards", "x"]):
        with pytest.raises(SystemExit):
            shards.parse(wrong)

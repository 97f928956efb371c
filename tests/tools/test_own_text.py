"""data/shards.py make: what becomes of one's own text, at any number of processes, and what is said if it cannot be."""
import fcntl
import gzip
import io
import json
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import generate
import own_text
import shards
import train_gpt_medium
from helpers import ROOT

TOOL = ROOT / "data" / "shards.py"

TEXTS = ["one", "zwei äöü\n\n", " 三 𝟜 ", "<|endoftext|> is text", "five\r\n\tfive"]
NO_TIKTOKEN = "raise ImportError(\"No module named 'tiktoken'\")"
# Ids as GPT-2's are spread, from a rule that a test can repeat; refuses what only the real one may be asked.
FAKE_TIKTOKEN = """
class Encoding:
    def encode_ordinary(self, text):
        return [ord(character) * 7 % 50256 for character in text]

def get_encoding(name):
    assert name == "gpt2"
    return Encoding()
"""
# As requests does behind a cut network: its ConnectionError is an OSError with a long message.
OFFLINE_TIKTOKEN = """
class ConnectionError(OSError):
    pass

def get_encoding(name):
    raise ConnectionError("HTTPSConnectionPool(host='example.invalid', port=443): Max retries exceeded\\nwith url")
"""


def start(*args, tiktoken=NO_TIKTOKEN, **options):
    """The command as a process, under a module `tiktoken` of that source."""
    args = [str(arg) for arg in args]
    fake = Path(args[args.index("--out") + 1]).parent / "modules"
    fake.mkdir(parents=True, exist_ok=True)
    (fake / "tiktoken.py").write_text(tiktoken)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, TOOL, "make", *args], text=True,
                            env={**os.environ, "PYTHONPATH": str(fake)}, **options)


def make(*args, **options):
    process = start(*args, **options)
    try:
        process.stdout_text, process.stderr_text = process.communicate(timeout=60)
    finally:
        process.kill()  # nothing to do unless the time was up
    return process


def assert_made(process):
    assert process.returncode == 0 and not process.stderr_text, process.stderr_text
    return process.stdout_text


def assert_one_sentence(process, *words):
    assert process.returncode == 1, process.stdout_text
    assert process.stderr_text.count("\n") == 1 and process.stderr_text.startswith("shards.py: "), process.stderr_text
    for word in words:
        assert str(word) in process.stderr_text


def read(path):
    """(tokens, vocabulary size, document id) of the header, and the ids."""
    header = np.fromfile(path, "<i4", 256)
    assert header[:2].tolist() == [20240520, 1] and not header[5:].any()
    return tuple(header[2:5].tolist()), np.fromfile(path, "<u2", offset=1024)


def read_set(folder, prefix, doc_id=256):
    """The ids of each shard of a set, validation first; each is of doc_id's vocabulary and begins with a document."""
    paths = [folder / f"{prefix}_val_000000.bin", *sorted(folder.glob(f"{prefix}_train_*.bin"))]
    assert sorted(os.listdir(folder)) == sorted(path.name for path in paths)
    assert [path.name[-10:-4] for path in paths] == [f"{i:06d}" for i in range(len(paths))]
    shards_of_ids = []
    for path in paths:
        header, ids = read(path)
        assert header == (ids.size, doc_id + 1, doc_id) and ids[0] == doc_id
        shards_of_ids.append(ids)
    return shards_of_ids


def documents(shards_of_ids, doc_id=256):
    """The documents of a set, those that a border cut included twice or more, as lists of ids."""
    ids = np.concatenate(shards_of_ids)
    return [part[1:].tolist() for part in np.split(ids, np.flatnonzero(ids == doc_id)[1:])]


def as_bytes(shards_of_ids):
    return [bytes(document) for document in documents(shards_of_ids)]


def joined(shards_of_ids, doc_id):
    """The ids without those that opened a document: what no cut may change."""
    ids = np.concatenate(shards_of_ids)
    return ids[ids != doc_id]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))
    return path


def write_parquet(path, columns, **options):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


# ---- what the shards hold

def test_folder_of_txt_in_sorted_order(tmp_path):
    names = ["a/2.txt", "a/10.TXT", "b.txt", "a.txt", "c/deep/er/x.txt.gz"]
    for name, text in zip(names, TEXTS):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (tmp_path / "in" / "a" / "ignored.md").write_text("no")
    assert_made(make(tmp_path / "in", "--out", tmp_path / "out", "--val-tokens", 16, "--processes", 2))
    wanted = [dict(zip(names, TEXTS))[name].encode() for name in sorted(names, key=lambda name: Path(name))]
    val, train = read_set(tmp_path / "out", "out")
    assert val.size == 16
    # The 16th token lies in the second or third document; its rest opens the training shard.
    found = as_bytes([val, train])
    assert b"".join(found) == b"".join(wanted) and len(found) == len(wanted) + 1
    assert [document for document in found if document in wanted] == wanted[:1] + wanted[2:]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
def test_round_trip(tmp_path, kind):
    if kind.startswith("txt"):
        inputs = [tmp_path / f"{i}.{kind}" for i in range(len(TEXTS))]
        for path, text in zip(inputs, TEXTS):
            path.write_bytes(text.encode())
    elif kind.startswith("jsonl"):
        inputs = [write_jsonl(tmp_path / f"a.{kind}", TEXTS, "body")]
    else:
        inputs = [write_parquet(tmp_path / "a.parquet", {"id": list(range(len(TEXTS))), "body": TEXTS})]
    if kind.endswith("gz"):
        for path in inputs:
            path.write_bytes(gzip.compress(path.read_bytes()))
    inputs.reverse()  # the order is that of the command line
    out = assert_made(make(*inputs, "--out", tmp_path / "out", "--field", "body", "--val-tokens", 4))
    found = as_bytes(read_set(tmp_path / "out", "out"))
    wanted = [text.encode() for text in (TEXTS[::-1] if kind.startswith("txt") else TEXTS)]
    if kind.startswith("txt"):  # its first document is longer than 3 bytes, so the border cuts it
        found[:2] = [b"".join(found[:2])]
    assert found == wanted
    assert "documents:  5, and 0 empty ones skipped" in out


def test_empty_documents_are_skipped_and_counted(tmp_path):
    (tmp_path / "1.txt").write_bytes(b"")
    (tmp_path / "2.txt").write_bytes(b"\xef\xbb\xbf")  # nothing but a byte order mark
    (tmp_path / "3.txt").write_bytes(b"\xef\xbb\xbfabc")
    lines = [b'\xef\xbb\xbf{"text": ""}', b"", b"  \r", b'{"text": "defghijklmnopqrstuvwxyz"}\r', b'{"text": " "}']
    (tmp_path / "4.jsonl").write_bytes(b"\n".join(lines))
    out = assert_made(make(tmp_path, "--out", tmp_path / "new" / "out"))
    assert as_bytes(read_set(tmp_path / "new" / "out", "out")) == [b"ab", b"c", b"defghijklmnopqrstuvwxyz", b" "]
    assert "documents:  3, and 5 empty ones skipped" in out


def test_parquet_rows(tmp_path):
    texts = [f"row {i} " * (i % 50) for i in range(3000)]
    texts[7] = None
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=700)
    out = assert_made(make(path, "--out", tmp_path / "out", "--val-tokens", 2))
    found = as_bytes(read_set(tmp_path / "out", "out"))
    assert found[0] + found[1] == texts[1].encode()
    assert found[2:] == [text.encode() for text in texts[2:] if text]
    assert f"documents:  2,939, and {3000 - 2939} empty ones skipped" in out


def test_shards_are_cut_to_size(tmp_path):
    texts = ["a" * 9, "b" * 9, "c" * 25, "d" * 3, "e"]  # 10, 10, 26, 4, 2 tokens with their ids
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert_made(make(path, "--out", tmp_path / "out", "--val-tokens", 10, "--shard-tokens", 12))
    found = [[bytes(part) for part in documents([ids])] for ids in read_set(tmp_path / "out", "out")]
    assert found == [[b"a" * 9], [b"b" * 9, b"c"], [b"c" * 11], [b"c" * 11], [b"c" * 2, b"d" * 3, b"e"]]
    # 3 + 4 + 2 tokens make the last one shorter than the others; before, a shard ended right behind an opening id.
    path = write_jsonl(tmp_path / "b.jsonl", ["a" * 9, "b" * 9, "c" * 25])
    assert_made(make(path, "--out", tmp_path / "out2", "--val-tokens", 10, "--shard-tokens", 11))
    assert [ids.size for ids in read_set(tmp_path / "out2", "out2")] == [10, 11, 11, 11, 6]


def test_smallest_shards(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "de"])
    assert_made(make(path, "--out", tmp_path / "out", "--val-tokens", 2, "--shard-tokens", 2))
    assert [ids.tolist() for ids in read_set(tmp_path / "out", "out")] == [[256, byte] for byte in b"abcde"]


def test_validation_is_a_tenth_by_default(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 99] * 1000)
    own_text.make_own_text([path], tmp_path / "tenth", "text", "bytes", 10**8, None, 1)
    assert read_set(tmp_path / "tenth", "tenth")[0].size == 10_000
    monkeypatch.setattr(own_text, "VAL_TOKENS", 2_000)  # as with ten times more text than it takes
    monkeypatch.setattr(own_text, "BLOCK_BYTES", 1_000)
    own_text.make_own_text([path], tmp_path / "most", "text", "bytes", 10**8, None, 1)
    val, train = read_set(tmp_path / "most", "most")
    assert (val.size, train.size) == (2_000, 98_000)
    assert b"".join(as_bytes([val, train])) == b"x" * 99_000


def test_default_validation_suffices_for_the_record():
    assert own_text.VAL_TOKENS == train_gpt_medium.Config().val_tokens + 1


@pytest.mark.parametrize("name, prefix", [
    ("my text", "my-text"), ("a_train_b", "a-train-b"), ("val", "val"), ("[x]*", "x"), ("__", "text"), ("日本", "日本"),
])
def test_prefix_is_fit_for_the_trainer(tmp_path, name, prefix):
    assert own_text.prefix_for(tmp_path / name) == own_text.prefix_for(tmp_path / name / "a" / "..") == prefix


def test_trainer_takes_the_result(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["some words of text " * 100] * 500)
    out = assert_made(make(tmp_path / "a.jsonl", "--out", tmp_path / "my_train_ text", "--shard-tokens", 150_000))
    command = out.split("to train:")[1].splitlines()[0]
    assert shlex.split(command) == [f"DATA_PATH={tmp_path / 'my_train_ text'}", "./run.sh", "tiny"]
    config = replace(train_gpt_medium.PRESETS["tiny"](), data_dir=str(tmp_path / "my_train_ text"))
    train, val = train_gpt_medium.find_shards(config)
    assert [shard.num_tokens for shard in train] == [150_000] * 2 and val.num_tokens == 95_050
    assert train[1].path.name == "my-train-text_train_000002.bin"


# ---- the same from any number of processes

def words(rng, count):
    return "".join(rng.choice(("word", "Wörter", "123", "…", "don't")) + rng.choice(("  ", " ", "\n", ", ", "\n\n "))
                   for _ in range(count))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Some MB in files of all sizes: long documents that are divided, many short ones, and jsonl of several blocks."""
    folder, rng = tmp_path_factory.mktemp("corpus") / "in", random.Random(1)
    folder.mkdir()
    (folder / "long.txt").write_text(words(rng, 600_000))
    for i in range(20):
        (folder / f"short{i}.txt").write_text(words(rng, rng.randrange(3) * 50))
    write_jsonl(folder / "lines.jsonl", [words(rng, rng.randrange(400)) for _ in range(3000)])
    return folder


@pytest.mark.parametrize("tiktoken", [NO_TIKTOKEN, FAKE_TIKTOKEN])
def test_same_bytes_from_any_number_of_processes(tmp_path, corpus, tiktoken):
    made = []
    for num_processes in (1, 2, 3):
        folder = tmp_path / str(num_processes) / "out"
        folder.parent.mkdir()
        assert_made(make(corpus, "--out", folder, "--processes", num_processes, "--shard-tokens", 1_000_000,
                         tiktoken=tiktoken))
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(made[0]) > 4
    assert made[0] == made[1] == made[2]


def test_long_documents_stay_whole(tmp_path, corpus):
    assert_made(make(corpus / "long.txt", "--out", tmp_path / "out", "--val-tokens", 100_000))
    shards_of_ids = read_set(tmp_path / "out", "out")
    assert [np.count_nonzero(ids == 256) for ids in shards_of_ids] == [1, 1]
    assert joined(shards_of_ids, 256).astype(np.uint8).tobytes() == (corpus / "long.txt").read_bytes()


@pytest.mark.parametrize("text", [
    "", "abc", "a b", "é" * 999, "字。\n" * 400, " " * 999, "\n".join("ab" * 50), "x\u3000 y" * 99,
    "word " * 300])
def test_parts_of_a_long_document(monkeypatch, text):
    monkeypatch.setattr(own_text, "BLOCK_BYTES", 64)
    parts = [part for part, in own_text.read_txt(io.BytesIO(text.encode()), None, None)]
    assert b"".join(parts).decode() == text
    assert max(map(len, parts)) <= 2 * 64 and len(parts) >= len(text.encode()) // 128
    for part, following in zip(parts, parts[1:]):
        part.decode()  # or it would cut a character
        if "word" in text:
            assert part.endswith(b"word") and following.startswith(b" ")


# ---- GPT-2's BPE

def test_gpt2_by_tiktoken(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [text * 5 for text in TEXTS])
    for tokenizer in ("auto", "gpt2"):
        out = assert_made(make(path, "--out", tmp_path / tokenizer, "--tokenizer", tokenizer, "--processes", 2,
                               tiktoken=FAKE_TIKTOKEN))
        shards_of_ids = read_set(tmp_path / tokenizer, tokenizer, 50256)
        wanted = [ord(character) * 7 % 50256 for text in TEXTS for character in text * 5]
        assert joined(shards_of_ids, 50256).tolist() == wanted
        assert len(documents(shards_of_ids, 50256)) == len(TEXTS) + 1  # validation cuts one
        assert "tokenizer:  gpt2, vocabulary 50,257; tiktoken" in out
        assert "./run.sh short" in out


@pytest.mark.parametrize("tiktoken, why", [
    (NO_TIKTOKEN, "cannot be imported (No module named 'tiktoken'; pip install tiktoken)"),
    (OFFLINE_TIKTOKEN, "cannot get the GPT-2 vocabulary (ConnectionError)")])
def test_without_the_vocabulary(tmp_path, tiktoken, why):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = assert_made(make(path, "--out", tmp_path / "auto", tiktoken=tiktoken))
    read_set(tmp_path / "auto", "auto", 256)
    assert out.splitlines()[0].endswith(f"tokenizer bytes: tiktoken {why}")
    assert f"tokenizer:  bytes, vocabulary 257; tiktoken {why}" in out
    out = assert_made(make(path, "--out", tmp_path / "bytes", "--tokenizer", "bytes", tiktoken=tiktoken))
    assert "tokenizer bytes: as asked" in out
    assert_one_sentence(make(path, "--out", tmp_path / "gpt2", "--tokenizer", "gpt2", tiktoken=tiktoken), why,
                        "--tokenizer bytes")
    assert not (tmp_path / "gpt2").exists()


def test_the_real_tiktoken(tmp_path, monkeypatch, corpus):
    tiktoken = pytest.importorskip("tiktoken")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    # GPT-2's own division into words, and merges enough that a wrong cut would change the ids.
    ranks = {bytes([byte]): byte for byte in range(256)}
    for merge in (b"wo", b"rd", b"word", b" word", b"  ", b"\n\n", b", ", b"12", b"\n ", b"don", b"'t", b" don"):
        ranks[merge] = len(ranks)
    encoding = tiktoken.Encoding("gpt2", pat_str=public.r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    monkeypatch.setattr(own_text, "BLOCK_BYTES", 1000)  # so that thousands of cuts are tried
    (tmp_path / "in").mkdir()
    long = (corpus / "long.txt").read_text()[:500_000]
    (tmp_path / "in" / "a.txt").write_text(long)
    write_jsonl(tmp_path / "in" / "b.jsonl", TEXTS)
    own_text.make_own_text([tmp_path / "in"], tmp_path / "out", "text", "gpt2", 10**8, 100, 2)
    val, train = read_set(tmp_path / "out", "out", 50256)
    assert val.size == 100
    wanted = [encoding.encode_ordinary(text) for text in (long, *TEXTS)]
    found = documents([val, train], 50256)
    found[:2] = [found[0] + found[1]]
    assert found == wanted
    assert max(map(max, wanted)) > 256  # merges did occur


def test_offline_the_real_tiktoken_is_explained(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(own_text.importlib.import_module("tiktoken.registry"), "ENCODINGS", {})
    tokenizer = own_text.choose_tokenizer("auto")
    assert tokenizer.name == "bytes" and tokenizer.why.endswith("cannot get the GPT-2 vocabulary (ProxyError)")


# ---- memory and progress

MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import shards
shards.main(sys.argv[2:])
# Not ru_maxrss of the process itself: it inherits that of the one that started it.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    peaks = []
    text = words(random.Random(0), 30_000)
    line = text if kind == "txt" else json.dumps({"text": text}) + "\n"
    for size in (10_000_000, 60_000_000):
        path = tmp_path / f"{size}.{kind}"
        with open(path, "w") as file:
            for _ in range(size // len(line.encode())):
                file.write(line)
        arguments = ["make", path, "--out", tmp_path / f"out{size}", "--tokenizer", "bytes", "--val-tokens", "1000",
                     "--processes", "2"]
        result = subprocess.run([sys.executable, "-c", MEASURE, TOOL.parent, *arguments], capture_output=True,
                                text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        peaks.append([int(word) for word in result.stdout.split("peak")[1].split()])
        path.unlink()
    # 50 MB more to read are 100 MB more to write.
    for small, large in zip(*peaks):
        assert 10_000 < small < 150_000 and large - small < 15_000, peaks


def test_progress_on_a_terminal(tmp_path, corpus):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # no bar fits into the usual 0 lines
    process = start(corpus, "--out", tmp_path / "out", stderr=theirs)
    out = process.communicate(timeout=60)[0]
    os.set_blocking(ours, False)
    shown = os.read(ours, 100_000).decode()
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 0 and "to train" in out
    size = sum(path.stat().st_size for path in corpus.iterdir())
    bar = re.findall(r"(\d+)%\|.*?/(\d+\.\d+)M \[\d+:\d+<(\S+), .*?B/s\]", shown)  # with the time that is left
    assert {total for _, total, _ in bar} == {f"{size / 1e6:.2f}"}
    assert 0 < int(bar[-1][0]) <= 100 and ":" in bar[-1][2]
    assert shown.endswith("\r") and not shown.split("\r")[-2].strip()  # cleared in the end


# ---- what cannot be done is said in one sentence, and leaves nothing

BAD = {
    "latin1.txt": b"fine\nnot so: \xe9\nfine",
    "latin1.jsonl": b'{"text": "fine"}\n{"text": "\xe9"}\n',
    "broken.jsonl": b'{"text": "fine"}\n\n{"text": "fine\n{"text": "fine"}\n',
    "deep.jsonl": b'{"text": "fine"}\n' + b"[" * 200_000,
    "list.jsonl": b'{"text": "fine"}\n["text"]\n',
    "missing.jsonl": b'{"text": "fine"}\n{"body": "fine"}\n',
    "null.jsonl": b'{"text": "fine"}\n{"text": null}\n',
    "surrogate.jsonl": b'{"text": "fine"}\n{"text": "\\ud800"}\n',
    "notgz.txt.gz": b"plain text",
    "cut.jsonl.gz": gzip.compress(b'{"text": "fine"}\n' * 1000)[:-20],
    "flipped.jsonl.gz": gzip.compress(b"some text" * 9999)[:30] + b"\xff" * 9999,
}


@pytest.mark.parametrize("name, says", [
    ("latin1.txt", ["line 2 is not UTF-8", "convert"]),
    ("latin1.jsonl", ["line 2 is not UTF-8", "convert"]),
    ("broken.jsonl", ["line 3 is not JSON (Invalid control character at)", "mend or remove"]),
    ("deep.jsonl", ["line 2 is not JSON", "recursion"]),
    ("list.jsonl", ["line 2 has no text in a field 'text'", "--field"]),
    ("missing.jsonl", ["line 2 has no text in a field 'text'", "--field"]),
    ("null.jsonl", ["line 2 has no text in a field 'text'", "--field"]),
    ("surrogate.jsonl", ["line 2 holds half a surrogate pair", "mend or remove"]),
    ("notgz.txt.gz", ["cannot be read (Not a gzipped file", "mend it or leave it out"]),
    ("cut.jsonl.gz", ["cannot be read (Compressed file ended", "mend it or leave it out"]),
    ("flipped.jsonl.gz", ["cannot be read (Error -3", "mend it or leave it out"]),
])
def test_bad_input(tmp_path, name, says):
    good = write_jsonl(tmp_path / "good.jsonl", ["x" * 50] * 1000)
    (tmp_path / name).write_bytes(BAD[name])
    process = make(good, tmp_path / name, "--out", tmp_path / "out", "--val-tokens", 100, "--shard-tokens", 1000)
    assert_one_sentence(process, tmp_path / name, *says)
    assert os.listdir(tmp_path / "out") == []


def test_line_numbers_beyond_the_first_block(tmp_path):
    lines = ["x" * 99] * 30_000
    lines[25_432] += "\udce9"
    (tmp_path / "a.txt").write_text("\n".join(lines), errors="surrogateescape")
    assert_one_sentence(make(tmp_path / "a.txt", "--out", tmp_path / "out"), "a.txt, line 25,433 is not UTF-8")
    lines = ['{"text": "' + "x" * 99 + '"}'] * 30_000
    lines[25_432] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert_one_sentence(make(tmp_path / "a.jsonl", "--out", tmp_path / "out"), "a.jsonl, line 25,433 is not JSON")


def test_bad_parquet(tmp_path):
    good = write_parquet(tmp_path / "good.parquet", {"body": ["a", "b"], "number": [1, 2]})
    assert_one_sentence(make(good, "--out", tmp_path / "out"), good, "no column 'text'", "body, number", "--field")
    assert_one_sentence(make(good, "--out", tmp_path / "out", "--field", "number"), good, "'number'", "not hold text")
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-9])
    assert_one_sentence(make(tmp_path / "cut.parquet", "--out", tmp_path / "out"), "cut.parquet", "not a whole parquet")
    import pyarrow
    rows = pyarrow.array([b"fine\n", b"\n\xe9"], pyarrow.binary())
    bad = write_parquet(tmp_path / "bad.parquet", {"text": rows})
    assert_one_sentence(make(bad, "--out", tmp_path / "out"), f"{bad}, row 2 is not UTF-8")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(own_text.importlib.util, "find_spec", {"pyarrow": None}.__getitem__)
    with pytest.raises(own_text.ShardError, match="a.parquet needs pyarrow, .* pip install pyarrow"):
        own_text.list_inputs([tmp_path])


def test_no_input(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("no")
    out = ["--out", tmp_path / "out"]
    assert_one_sentence(make(tmp_path / "in", *out), "no .txt, .jsonl, .parquet file in", tmp_path / "in")
    assert_one_sentence(make(tmp_path / "in" / "a.md", *out), "a.md is of no kind that can be read")
    assert_one_sentence(make(tmp_path / "gone.txt", *out), "gone.txt is no file that can be found")
    assert make(*out).returncode == 2  # argparse's usage
    assert not (tmp_path / "out").exists()


def test_too_little_input(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert_one_sentence(make(tmp_path / "a.txt", "--out", tmp_path / "out"), "makes 0 tokens", "at least 20")
    (tmp_path / "a.txt").write_text("x" * 18)
    assert_one_sentence(make(tmp_path / "a.txt", "--out", tmp_path / "out"), "makes 19 tokens", "at least 20")
    for val_tokens in (19, 1000):
        process = make(tmp_path / "a.txt", "--out", tmp_path / "out", "--val-tokens", val_tokens)
        assert_one_sentence(process, "validation takes all of the 19 tokens", "--val-tokens")
    assert os.listdir(tmp_path / "out") == []
    assert_made(make(tmp_path / "a.txt", "--out", tmp_path / "out", "--val-tokens", 18))


@pytest.mark.parametrize("option, value, word", [
    ("--shard-tokens", 1, "1 tokens"), ("--val-tokens", 2**31, "2,147,483,648"), ("--processes", 0, "0 processes")])
def test_sizes_that_cannot_be(tmp_path, option, value, word):
    (tmp_path / "a.txt").write_text("x" * 99)
    assert_one_sentence(make(tmp_path / "a.txt", "--out", tmp_path / "out", option, value), word, "ask for")
    assert not (tmp_path / "out").exists()


def test_more_processes_than_there_can_be(tmp_path):
    import resource
    (tmp_path / "a.txt").write_text("x" * 99)
    process = make(tmp_path / "a.txt", "--out", tmp_path / "out", "--processes", 200,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)))
    assert_one_sentence(process, "cannot start 200 processes (Too many open files)", "ask for fewer")


@pytest.mark.parametrize("there", ["out_val_000000.bin", "other_train_000007.bin"])
def test_a_folder_with_other_shards(tmp_path, there):
    (tmp_path / "a.txt").write_text("x" * 99)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_bytes(b"old")
    assert_one_sentence(make(tmp_path / "a.txt", "--out", tmp_path / "out"), there, "name another folder")
    assert os.listdir(tmp_path / "out") == [there] and (tmp_path / "out" / there).read_bytes() == b"old"


def test_shards_that_come_in_the_meantime_survive(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 99)

    def meanwhile(*args):
        (tmp_path / "out" / "out_val_000000.bin").write_bytes(b"of another run")
        return write_set(*args)

    write_set = own_text.write_set
    monkeypatch.setattr(own_text, "write_set", meanwhile)
    with pytest.raises(own_text.ShardError, match="already holds out_val_000000.bin"):
        own_text.make_own_text([tmp_path / "a.txt"], tmp_path / "out", "text", "bytes", 50, None, 1)
    assert os.listdir(tmp_path / "out") == ["out_val_000000.bin"]
    assert (tmp_path / "out" / "out_val_000000.bin").read_bytes() == b"of another run"


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 99)
    assert_one_sentence(make(tmp_path / "a.txt", "--out", tmp_path / "a.txt"), tmp_path / "a.txt", "another folder")


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    try:
        (tmp_path / "a.txt").write_text("x" * 3_000_000)
        process = make(tmp_path / "a.txt", "--out", disk / "out", "--shard-tokens", 50_000)
        assert_one_sentence(process, disk / "out", "No space left", "free some space")
        assert os.listdir(disk / "out") == []
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- ended in the middle

@pytest.fixture
def endless(tmp_path):
    """(a process that makes shards of a document that does not end, its folder, a function for its workers' ids)"""
    # A .gz of zeros unpacks to a thousand times its size: minutes of work from little disk.
    (tmp_path / "long.txt.gz").write_bytes(gzip.compress(b"a word " * 20_000_000, 1) * 100)
    process = start(tmp_path / "long.txt.gz", "--out", tmp_path / "out", "--processes", 2, "--shard-tokens", 5_000_000,
                    "--val-tokens", 1000, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: len(list(tmp_path.glob("out/*/*.bin"))) >= 2)  # whole shards, not yet in their place
    workers = [int(pid) for pid in children.read_text().split()]
    assert len(workers) == 2
    yield process, tmp_path / "out", workers
    process.kill()
    for pid in filter(is_alive, workers):  # which the tests take for a failure
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.025)
    raise AssertionError("waited for 30 s")


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


@needs_proc
@pytest.mark.parametrize("to_group", [True, False])
def test_ctrl_c(endless, to_group):
    process, folder, workers = endless
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)  # a terminal sends it to the group
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == "shards.py: interrupted; nothing was made\n"
    assert os.listdir(folder) == []
    assert not any(map(is_alive, workers))


@needs_proc
def test_kill(endless, tmp_path):
    process, folder, workers = endless
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_alive, workers)))
    assert not list(folder.glob("*.bin"))
    left, = folder.iterdir()
    assert left.name.startswith("unfinished-") and left.suffix == ".tmp"
    (tmp_path / "a.txt").write_text("x" * 99)
    assert_made(make(tmp_path / "a.txt", "--out", folder))  # what is left is in nobody's way


@needs_proc
def test_a_killed_worker(endless):
    process, folder, workers = endless
    os.kill(workers[0], signal.SIGKILL)
    process.stdout_text, process.stderr_text = process.communicate(timeout=30)
    assert_one_sentence(process, "long.txt.gz", "want of memory", "fewer --processes")
    assert os.listdir(folder) == [] and not is_alive(workers[1])


def test_a_worker_killed_within_a_message():
    ours, theirs = own_text.multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"x" * 99)  # the message's length, and a part of it
    theirs.close()
    with pytest.raises(own_text.ShardError, match="worker that encoded a.txt from line 5 on was ended"):
        own_text.collect(ours, own_text.Block(Path("a.txt"), 5, [b""], True, 0))


def test_defaults():
    args = shards.parse(["make", "a", "b", "--out", "c"])
    assert args.inputs == [Path("a"), Path("b")] and args.folder == Path("c") and args.field == "text"
    assert args.shard_tokens == generate.SHARD_TOKENS and args.val_tokens is None and args.processes >= 1
    assert args.tokenizer == "auto"

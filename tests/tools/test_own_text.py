"""data/shards.py make: what becomes of one's own text, and what is said if it cannot be."""
import json
import os
import shlex
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import own_text
import shards
import train_gpt_medium

TEXTS = ["one", "zwei äöü\n\n", " three 𝟜 ", "<|endoftext|> is text", "five\r\n\tfive"]


def make(*args) -> None:
    shards.main(["make", *map(str, args)])


def refusal(capsys, *args) -> str:
    """The one sentence with which the command ends."""
    with pytest.raises(SystemExit) as error:
        make(*args)
    capsys.readouterr()
    assert str(error.value).startswith("shards.py: ") and "\n" not in str(error.value)
    return str(error.value)


def read_set(folder: Path, doc_id: int = 256) -> list[np.ndarray]:
    """The ids of each shard, validation first. Nothing else lies there; each begins with a document."""
    found = []
    for number, path in enumerate(sorted(folder.iterdir(), key=lambda path: path.name[-10:])):
        assert path.name == f"{folder.name}_{'train' if number else 'val'}_{number:06d}.bin"
        header, ids = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
        assert header[:5].tolist() == [20240520, 1, ids.size, doc_id + 1, doc_id] and ids[0] == doc_id
        found.append(ids)
    return found


def documents(ids: np.ndarray, doc_id: int = 256) -> list[list[int]]:
    return [part[1:].tolist() for part in np.split(ids, np.flatnonzero(ids == doc_id)[1:])]


def write_jsonl(path: Path, texts, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_every_document_in_order_behind_its_id(tmp_path, capsys, kind):
    source, texts = tmp_path / "in" / "a", ["first", *TEXTS, ""]
    source.mkdir(parents=True)
    if kind == "txt":
        for i, text in enumerate(texts):
            (source / f"{i}.TXT").write_bytes(b"\xef\xbb\xbf" * (i == 2) + text.encode())  # a mark that is no text
    else:
        write_jsonl(source / "a.jsonl", texts, "body")
    (source / "ignored.md").write_text("no")
    make(source.parent, "--out", tmp_path / "out", "--field", "body", "--val-tokens", 6, "--tokenizer", "bytes")
    found = documents(np.concatenate(read_set(tmp_path / "out")))
    assert [bytes(document).decode() for document in found] == texts[:-1]
    assert "\n6 documents: 6 tokens for validation, " in capsys.readouterr().out


def test_shards_are_cut_to_size_and_a_cut_document_goes_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a" * 9, "b" * 9, "c" * 25, "d" * 3, "e"])
    make(path, "--out", tmp_path / "out", "--val-tokens", 10, "--shard-tokens", 12, "--tokenizer", "bytes")
    found = [[bytes(document).decode() for document in documents(ids)] for ids in read_set(tmp_path / "out")]
    assert found == [["a" * 9], ["b" * 9, "c"], ["c" * 11], ["c" * 11], ["c" * 2, "d" * 3, "e"]]


def test_the_first_tenth_validates_and_the_trainer_takes_the_set(tmp_path, capsys, monkeypatch):
    path, folder = write_jsonl(tmp_path / "a.jsonl", ["some words of text " * 100] * 500), tmp_path / "my_train_ text"
    make(path, "--out", folder, "--shard-tokens", 150_000, "--tokenizer", "bytes")
    command = capsys.readouterr().out.split("to train:")[1].splitlines()[0]
    assert shlex.split(command) == [f"DATA_PATH={folder}", "./run.sh", "tiny"]
    train, val = train_gpt_medium.find_shards(replace(train_gpt_medium.PRESETS["tiny"](), data_dir=str(folder)))
    assert ([shard.num_tokens for shard in train], val.num_tokens) == ([150_000] * 2, 95_050)
    assert own_text.VAL_TOKENS == train_gpt_medium.Config().val_tokens + 1
    monkeypatch.setattr(own_text, "VAL_TOKENS", 2_000)
    make(path, "--out", tmp_path / "most", "--tokenizer", "bytes")
    assert read_set(tmp_path / "most")[0].size == 2_000


def test_gpt2_ids_are_those_of_its_tokenizer(tmp_path, capsys, monkeypatch):
    tiktoken, public = pytest.importorskip("tiktoken"), pytest.importorskip("tiktoken_ext.openai_public")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"wo": 256, b"rd": 257, b"word": 258, b" word": 259}
    encoding = tiktoken.Encoding("gpt2", pat_str=public.r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    texts = ["one word", *TEXTS] * 20  # more than are encoded at once
    make(write_jsonl(tmp_path / "a.jsonl", texts), "--out", tmp_path / "out", "--val-tokens", 8)
    val, train = read_set(tmp_path / "out", 50256)
    val, train = documents(val, 50256), documents(train, 50256)
    assert [*val[:-1], val[-1] + train[0], *train[1:]] == list(map(encoding.encode_ordinary, texts))
    assert "tokenizer gpt2, vocabulary 50,257" in capsys.readouterr().out


def test_without_the_vocabulary_it_is_bytes_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # as if it were not installed
    path, why = write_jsonl(tmp_path / "a.jsonl", ["x" * 99]), "no GPT-2 vocabulary (ModuleNotFoundError): pip install"
    make(path, "--out", tmp_path / "out")
    assert f"tokenizer bytes, vocabulary 257: {why}" in capsys.readouterr().out and read_set(tmp_path / "out")
    assert why in refusal(capsys, path, "--out", tmp_path / "gpt2", "--tokenizer", "gpt2")


FINE = b'{"text": "fine"}\n'


@pytest.mark.parametrize("name, content, options, says", [
    ("a.txt", b"fine\nnot so: \xe9\nfine", [], "a.txt cannot be read ('utf-8' codec can't decode byte 0xe9"),
    ("a.jsonl", FINE + b'{"text": "\xe9"}\n', [], "a.jsonl: line 2 is not JSON in UTF-8 with text in a field 'text'"),
    ("a.jsonl", FINE + b'{"text": "\\ud800"}\n', [], "a.jsonl: line 2 is not JSON"),  # half a surrogate pair
    ("a.jsonl", FINE + b'\n{"text": "fine\n' + FINE, [], "a.jsonl: line 3 is not JSON"),
    ("a.jsonl", FINE + b'{"text": null}\n', [], "a.jsonl: line 2 is not JSON"),
    ("a.md", b"text", [], "a.md neither is nor holds a .txt or .jsonl file"),
    ("a.txt", b"x" * 18, [], "makes 19 tokens; give it at least 20"),
    ("a.txt", b"x" * 99, ["--val-tokens", 100], "takes all of the 100 tokens; lower --val-tokens"),
    ("a.txt", b"x" * 99, ["--shard-tokens", 1], "cannot hold 1 tokens; ask for")], ids=map(str, count()))
def test_bad_input_is_told_in_one_sentence_and_nothing_is_made(tmp_path, capsys, monkeypatch, name, content, options,
                                                               says):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    assert says in refusal(capsys, name, "--out", "out", "--tokenizer", "bytes", *options)
    assert Path(name).read_bytes() == content and not list(Path().glob("out/*"))


def test_other_shards_stay_as_they_are(tmp_path, capsys):
    path, there = tmp_path / "a.txt", tmp_path / "out" / "out_val_000000.bin"
    path.write_text("x" * 99)
    there.parent.mkdir()
    there.write_bytes(b"old")
    assert "already holds out_val_000000.bin" in refusal(capsys, path, "--out", there.parent, "--tokenizer", "bytes")
    assert os.listdir(there.parent) == [there.name] and there.read_bytes() == b"old"


def test_ctrl_c_leaves_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 99)
    monkeypatch.setattr(own_text, "write_shard", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as error:
        make(tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert error.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []

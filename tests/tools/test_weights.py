"""weights/: what was trained is what is exported, evaluates to the log's digits, and speaks; bad input."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

import plain_twin
import train_gpt_medium as tgm
import weights
from helpers import CPU, FEW_LAYERS, RECORDS, environment, random_ids, randomise, run_main, run_ranks, \
    small_config, train_few_layers, write_shard, write_text_folder


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DATA_PATH", raising=False)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> tuple[tgm.Config, Path]:
    return train_few_layers(tmp_path_factory.mktemp("run"))


def train_ranks(world: tgm.World, config: tgm.Config, folder: Path) -> dict:
    os.chdir(folder)
    return run_main(world, config)["state"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, one_rank) -> tuple[tgm.Config, Path, dict]:
    """The same without Smear-MTP, in bf16 on two ranks, whose banks have padding; and the state at the end."""
    folder = tmp_path_factory.mktemp("two")
    config = write_text_folder(folder / "shards", tgm.replace(one_rank[0], dtype=torch.bfloat16, num_iterations=2,
                                                              smear_mtp=False, val_every=1, checkpoint_every=1))
    state, _ = run_ranks(2, train_ranks, config, folder, folder=folder / "ranks")
    return config, next((folder / "checkpoints").iterdir()), state


@pytest.fixture(scope="module")
def exported(one_rank, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model.safetensors"
    assert weights.main(["export", str(one_rank[1]), str(out)]) == 0
    return out


def logged_losses(run: Path) -> dict[int, str]:
    log, = (run.parent.parent / "logs").iterdir()
    return {int(step): loss for step, loss in re.findall(r"^step:(\d+)/\d+ val_loss:(\S+) ", log.read_text(), re.M)}


def refusal(capsys, *argv) -> str:
    """What a command that ends with status 1 says: one sentence on stderr, nothing on stdout."""
    capsys.readouterr()
    assert weights.main([str(argument) for argument in argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("weights.py: ") and err.endswith(".\n") or "pip install" in err, err
    assert err.count("\n") == 1
    return err


# ---- export

def test_two_ranks_shards_become_the_parameters(two_ranks, tmp_path, capsys):
    _, run, state = two_ranks
    trained = {name.removeprefix("model/"): x for name, x in state.items() if name.startswith("model/")}
    assert weights.main(["export", str(run), str(tmp_path / "model.safetensors")]) == 0
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert written.keys() == trained.keys()
    for name, p in trained.items():
        assert written[name].dtype == p.dtype and torch.equal(written[name], p), name
    assert {p.dtype for p in written.values()} == {torch.bfloat16, torch.float32}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    count = sum(p.numel() for p in trained.values())
    assert f"{len(trained)} parameters, {count:,} numbers, after step 2 of run {run.name}" in capsys.readouterr().out
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    in_file = sum(p.numel() * p.element_size() for p in trained.values())
    assert (tmp_path / "model.safetensors").stat().st_size < in_file + 10_000  # views do not drag their buffers along


def test_the_metadata_is_what_the_readme_says(exported, one_rank):
    config, run = one_rank
    with safetensors.safe_open(exported, framework="pt") as file:
        metadata, params = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    table = re.findall(r"^\| metadata `(\w+)` \|", (RECORDS / "README.md").read_text(), re.M)
    assert table == ["format", "config", "step", "script", "run_id", "sha256"] and set(table) == metadata.keys()
    assert metadata["format"] == "smear-mtp weights 1" and metadata["step"] == "8" and metadata["run_id"] == run.name
    assert metadata["script"] == hashlib.sha256(Path(tgm.__file__).read_bytes().strip()).hexdigest()
    content = b"".join(f"{name} {p.dtype} {list(p.shape)}\n".encode() + p.numpy().tobytes()
                       for name, p in sorted(params.items()))
    assert metadata["sha256"] == hashlib.sha256(content).hexdigest()
    constants = json.loads(metadata["config"])
    assert constants["vocab_size"] == 257 and constants["dtype"] == "torch.float32"


@pytest.mark.parametrize("preset", tgm.PRESETS)
def test_the_constants_of_every_preset_are_read_back(preset, tmp_path):
    config = tgm.replace(tgm.PRESETS[preset](), logit_softcap=14.0, layers=FEW_LAYERS, backout_from=1,
                         stages=(tgm.Stage(until=0.5, num_slices=4, window=384), tgm.Stage()))
    constants = json.loads(json.dumps(asdict(config), default=str))
    del constants["data_dir"]
    assert weights.parse_config(constants, tmp_path) == config


def test_the_last_step_that_all_ranks_completed_counts(two_ranks, tmp_path, capsys):
    run = Path(shutil.copytree(two_ranks[1], tmp_path / "run"))
    (run / "step_000002" / "rank_1.pt").unlink()
    assert weights.find_step(run).name == "step_000001"
    assert "rank_1.pt is missing" in refusal(capsys, "export", run / "step_000002", tmp_path / "x")
    (run / "step_000001" / "rank_0.pt").unlink()
    assert "holds no step with the parts of all ranks" in refusal(capsys, "export", run, tmp_path / "x")


# ---- evaluate

def test_a_log_s_digits_again(one_rank, exported, capsys):
    """Of a step, of a run's last one, and of the file, each with the window of its step."""
    config, run = one_rank
    assert config.model_inputs(4) != config.model_inputs(8)
    for source, step in ((run / "step_000004", 4), (run, 8), (exported, 8)):
        capsys.readouterr()
        assert weights.main(["evaluate", str(source), "--data", config.data_dir]) == 0
        out, err = capsys.readouterr()  # nor does it say that another script made them
        assert (out, err) == (f"step:{step}/8 val_loss:{logged_losses(run)[step]}\n", "")


def test_train_script_names_the_script(one_rank, tmp_path):
    """Its own presets and machine are what the checkpoint is read with; a thin one's: test_second_recipe.py."""
    script = tmp_path / "mine.v2.py"
    script.write_text(Path(tgm.__file__).read_text() + "# another\n")
    done = subprocess.run([sys.executable, RECORDS / "tools" / "weights" / "weights.py", "evaluate", one_rank[1]],
                          env=environment(TRAIN_SCRIPT=str(script), DATA_PATH=one_rank[0].data_dir),
                          capture_output=True, text=True)
    assert f"val_loss:{logged_losses(one_rank[1])[8]}\n" in done.stdout, done.stderr
    assert "made by another version of mine.v2.py" in done.stderr


# ---- sample

@pytest.fixture
def model() -> tgm.GPT:
    """With as many embeddings as the record has, and no zeros."""
    torch.manual_seed(0)
    model = tgm.GPT(small_config(dtype=torch.float32))
    randomise(model)
    return model


def draw(model, prompt=(), num_tokens=5, temperature=1.0, seed=0, step=3) -> list[int]:
    return list(weights.sample_ids(model, step, list(prompt), num_tokens, temperature, seed))


def test_tokens_are_drawn_by_what_the_whole_text_says_at_their_place(model):
    """Looked up in one pass over the finished text, padded otherwise, past the first block's border; the padded rows of
    the head have no part in it."""
    prompt = random_ids(124, model.config, mean_doc=10**9).tolist()
    ids = draw(model, prompt, num_tokens=12, temperature=1.5, seed=7)
    text = [model.config.doc_token, *prompt, *ids]
    padded = torch.tensor(text + [model.config.doc_token] * (256 - len(text)))
    with torch.no_grad():
        latents = model.latents(padded, **tgm.inputs_at(3, model.config, CPU))
    logits = plain_twin.GPT.logits(model, latents)[len(prompt):len(text) - 1].detach()
    rng = torch.Generator().manual_seed(7)
    expected = [(row[:257].double() / 1.5).softmax(0).multinomial(1, generator=rng).item() for row in logits]
    assert ids == expected and len(set(ids)) > 6
    assert draw(model, prompt, num_tokens=1, temperature=0) == [logits[0, :257].argmax().item()]


def test_a_document_token_ends_the_text(model, monkeypatch):
    for token, text in ((11, [11] * 5), (model.config.doc_token, [])):
        monkeypatch.setattr(weights, "next_probabilities", lambda *_: F.one_hot(torch.tensor(token), 257).double())
        assert draw(model) == text


def test_the_command_prints_prompt_and_text(exported, capsys):
    assert weights.main(["sample", str(exported), "--prompt", "naïve ", "--tokens", "7"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("naïve ") and len(text) > len("naïve \n")
    assert "exceed the 512 positions" in refusal(capsys, "sample", exported, "--tokens", 512)


# ---- bad input

def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edited(edit):
    def rewrite(path: Path) -> None:
        part = torch.load(path, weights_only=True)
        edit(part)
        torch.save(part, path)
    return rewrite


@pytest.mark.parametrize("spoil, sentence", [
    (flip_a_byte, "torn or damaged"),
    (lambda path: torch.save({"model": torch.ones(3)}, path), "not a part of a checkpoint"),
    (edited(lambda part: part.update(seed=5)), "of another run or step than rank_0.pt"),
    (edited(lambda part: part["shards"].update(embeds=torch.ones(3))), "other parameters")])
def test_a_bad_part_is_refused_by_name(two_ranks, tmp_path, capsys, spoil, sentence):
    step = Path(shutil.copytree(two_ranks[1] / "step_000002", tmp_path / "step_000002"))
    spoil(step / "rank_1.pt")
    said = refusal(capsys, "export", step, tmp_path / "out")
    assert "rank_1.pt" in said and sentence in said and not (tmp_path / "out").exists()


def test_other_constants_are_named(one_rank, tmp_path, capsys):
    step = Path(shutil.copytree(one_rank[1] / "step_000008", tmp_path / "step_000008"))
    edited(lambda part: part["made_by"].update(new_idea="1"))(step / "rank_0.pt")
    assert "other constants than this train_gpt_medium.py's ('new_idea')" in refusal(capsys, "evaluate", step)


@pytest.mark.parametrize("spoil, sentence", [
    (Path.unlink, "does not exist"),
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "torn or not a safetensors file"),
    (lambda path: safetensors.torch.save_file({"x": torch.ones(3)}, path), "is of format None"),
    (flip_a_byte, "its tensors do not give the SHA-256 in its metadata"),
    (lambda path: (path.unlink(), path.mkdir()), "holds no checkpoint")])
def test_a_bad_file_is_refused_by_name(exported, tmp_path, capsys, spoil, sentence):
    path = Path(shutil.copy(exported, tmp_path / "weights.bin"))
    spoil(path)
    said = refusal(capsys, "evaluate", path)
    assert "weights.bin" in said and sentence in said


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_the_validation_shard_is_one_and_of_the_run(exported, one_rank, tmp_path, capsys, command):
    path = Path(shutil.copy(Path(one_rank[0].data_dir) / "text_val_000000.bin", tmp_path))
    other = write_shard(path.with_name("mine_val_000000.bin"), [1] * 2049, 50257, 50256)
    assert "holds 2 files" in refusal(capsys, command, exported, "--data", tmp_path)
    other.rename(path)
    assert "vocabulary of 50257" in refusal(capsys, command, exported, "--data", tmp_path)


def test_what_cannot_be_written_leaves_nothing(one_rank, tmp_path, capsys):
    for out in (tmp_path / "no folder" / "out", tmp_path):
        assert "cannot be written" in refusal(capsys, "export", one_rank[1], out)
    assert not [*tmp_path.iterdir(), *tmp_path.parent.glob("*.unfinished")]


def test_without_safetensors_checkpoints_still_serve(one_rank, exported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    sentence = "safetensors is not installed: pip install -r records/tools/requirements.txt"
    assert sentence in refusal(capsys, "evaluate", exported)
    assert weights.main(["evaluate", str(one_rank[1]), "--data", one_rank[0].data_dir]) == 0

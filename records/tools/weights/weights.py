"""What a run trained, put to use: its checkpoint as one file, its loss again, text from it, an audit of its honesty.

    python records/tools/weights/weights.py export checkpoints/<run id> model.safetensors
    weights.py evaluate model.safetensors --data data/text    # the log's val_loss at that step
    weights.py sample model.safetensors --prompt "The "
    weights.py audit model.safetensors --data data/text       # exit status 1 if a check fails

A checkpoint (a step's folder, or a run's, whose last complete step is meant) serves in place of the file everywhere.
The script is train_gpt_medium.py, or the one that TRAIN_SCRIPT names. Needs torch, and safetensors for files. Runs on a
GPU if there is one: written for that, but not run on one yet.
"""
import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "data" / "preflight"))
try:
    import torch
    from memory import load_script
    recipe = load_script()
except ModuleNotFoundError as error:
    sys.exit(f"weights.py: {error.name} is not installed: pip install -r requirements.txt")
SCRIPT = Path(recipe.__file__)
# The machine: of an edited copy itself, of a thin script the one that it imports. `audit` gets it under this name, too.
sys.modules["train_gpt_medium"] = sys.modules[recipe.Run.__module__]
import train_gpt_medium as tgm
from torch import Tensor, nn

import audit
from train_gpt_medium import UserError

FORMAT = "smear-mtp weights 1"  # the number changes when files can no longer be read by earlier tools
NOT_CONSTANTS = "number of ranks", "version of torch", "script", "set of shards"  # in a checkpoint's made_by
CPU = torch.device("cpu")


class Weights(NamedTuple):
    """Parameters by the trainer's names, on the CPU, and where they come from."""
    params: dict[str, Tensor]
    config: tgm.Config
    constants: dict  # the config, as JSON values by name
    step: int  # completed ones
    script: str  # sha256 of the trainer's source, without the line's end after it
    run_id: str


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def read_weights(path: Path) -> Weights:
    """Of a file or a checkpoint. Raises UserError; says on stderr if another version of the trainer made them."""
    weights = read_checkpoint(find_step(path)) if path.is_dir() else read_file(path)
    if weights.script != hashlib.sha256(tgm.read_sources(weights.config, recipe.__file__).strip().encode()).hexdigest():
        print(f"note: {path} was made by another version of {SCRIPT.name}; this one computes with it.",
              file=sys.stderr)
    return weights


def parse_config(constants: dict, path: Path) -> tgm.Config:
    """The constants of a run, JSON values by name, as the trainer's own. Raises UserError where they are others.

    The groups and the outer optimizer stay the script's: weights are read and run without their numbers.
    """
    def as_own(value, own):
        """In the type of the script's own constant: a table's rows, pairs, a dtype."""
        if isinstance(own, tuple):
            return tuple(type(own[0])(*row) if hasattr(own[0], "_fields") else row for row in value)
        return getattr(torch, value.removeprefix("torch.")) if isinstance(own, torch.dtype) else value

    try:
        own = recipe.PRESETS.get(constants["preset"], next(iter(recipe.PRESETS.values())))()
        known = {field.name for field in fields(own)} - {"data_dir"}
        if constants.keys() != known:
            raise KeyError(min(constants.keys() ^ known))
        values = {name: as_own(constants[name], getattr(own, name)) for name in known - {"groups", "snoo"}}
        return tgm.replace(own, **values, data_dir=os.environ.get("DATA_PATH") or own.data_dir)
    except (LookupError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path} holds other constants than this {SCRIPT.name}'s ({error}): use the script at "
                        f"the head of its run's log.") from error


def find_step(folder: Path) -> Path:
    """A step's folder: this one, or the last one in a run's folder of which every rank's part is there."""
    if folder.name.startswith("step_"):
        return folder
    steps = sorted(folder.glob("step_*"), reverse=True)
    if not steps:
        raise UserError(f"{folder} holds no checkpoint: name a folder below checkpoints/, or one of its steps.")
    for step in steps:
        parts = list(step.glob("rank_*.pt"))
        if parts and len(parts) == read_part(parts[0])["made_by"]["number of ranks"]:
            return step
    raise UserError(f"{folder} holds no step with the parts of all ranks: its run was stopped while it saved the first "
                    f"one, or parts were lost.")


@cache  # to look for a run's last step reads a part of it already, and its check sums take the whole file
def read_part(path: Path) -> dict:
    """One rank's part of a checkpoint, mapped into memory. Raises UserError if it is torn or foreign."""
    try:
        part = tgm.load_part(path, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: all ranks' parts are needed.") from error
    except Exception as error:
        raise UserError(f"{path} is torn or damaged: use an earlier step's checkpoint.") from error
    made_by = part.get("made_by") if isinstance(part, dict) else None
    if not isinstance(made_by, dict) or not (set(NOT_CONSTANTS) <= made_by.keys()
                                             and {"step", "seed", "shards"} <= part.keys()):
        raise UserError(f"{path} is not a part of a checkpoint of train_gpt_medium.py.")
    return part


def read_checkpoint(folder: Path) -> Weights:
    """All ranks' shards, put together by the optimizer's own banks. Raises UserError."""
    first = read_part(folder / "rank_0.pt")
    made_by, size = first["made_by"], first["made_by"]["number of ranks"]
    parts = {folder / f"rank_{rank}.pt": first if rank == 0 else read_part(folder / f"rank_{rank}.pt")
             for rank in range(size)}
    constants = {name: json.loads(value) for name, value in made_by.items() if name not in NOT_CONSTANTS}
    config = parse_config(constants, folder)
    model = config.make_model()
    banks = tgm.Optimizer(model, config, tgm.World(0, size, CPU)).banks
    ours, theirs = ([(name, list(roles)) for name, roles, *_ in groups]
                    for groups in (config.groups, constants["groups"]))
    for rank, (path, part) in enumerate(parts.items()):
        if any(part[name] != first[name] for name in ("made_by", "step", "seed")):
            raise UserError(f"{path} is of another run or step than rank_0.pt: do not mix parts.")
        if ours != theirs or {name: (shard.shape, shard.dtype) for name, shard in part["shards"].items()} != {
                name: (bank.shard.shape, bank.shard.dtype) for name, bank in banks.items()}:
            raise UserError(f"{path} holds other parameters than this {SCRIPT.name}'s: use the script at the "
                            f"head of its run's log.")
        for name, bank in banks.items():
            bank.buffer.view(size, -1)[rank] = part["shards"][name].flatten()
    return Weights(model.state_dict(), config, constants, first["step"], made_by["script"],
                   folder.resolve().parent.name)


def load_safetensors():
    """The library, with its functions for torch. Raises UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("safetensors is not installed: pip install -r records/tools/requirements.txt") from error
    return safetensors


def hash_params(params: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, p in sorted(params.items()):
        digest.update(f"{name} {p.dtype} {list(p.shape)}\n".encode())
        digest.update(p.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_file(path: Path) -> Weights:
    """A file that `export` wrote. Raises UserError if it is missing, torn, foreign or holds other tensors than then."""
    safetensors = load_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            params = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: name a checkpoint's folder or a file that export wrote.") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is torn or not a safetensors file ({error}): export it again.") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is of format {metadata.get('format')!r}, not {FORMAT!r}: name a file that export "
                        f"wrote.")
    constants = json.loads(metadata["config"])
    config = parse_config(constants, path)
    if metadata.get("sha256") != hash_params(params):
        raise UserError(f"{path} is damaged, its tensors do not give the SHA-256 in its metadata: export it again.")
    return Weights(params, config, constants, int(metadata["step"]), metadata["script"], metadata["run_id"])


def build_model(weights: Weights) -> nn.Module:
    """On the GPU if there is one, where blocks are compiled as in the trainer, once a kind and length."""
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    with device:
        model = weights.config.make_model()
    model.load_state_dict(weights.params)
    if device.type == "cuda":
        tgm.compile_model(model, whole=False)
    return model


def needs_gpu(model: nn.Module) -> bool:
    """Whether whole sequences of training or validation are too much for this machine: as the trainer has it."""
    return audit.device_of(model) == CPU and model.config.needs_gpu


def open_validation(config: tgm.Config, folder: Path) -> tgm.Shard:
    """The folder's validation shard. Raises UserError if it has none, several, or a foreign one."""
    paths = sorted(folder.glob("*_val_000000.bin"))
    if len(paths) != 1:
        raise UserError(f"{folder} holds {len(paths)} files *_val_000000.bin: name the run's data with --data.")
    return tgm.open_shard(paths[0], config)


# ----------------------------------------------------------------------------------------------------------------------
# Commands

def export(source: Path, out: Path) -> None:
    """One safetensors file, complete or not there: records/README.md describes it. Raises UserError."""
    weights, safetensors = read_weights(source), load_safetensors()
    metadata = {"format": FORMAT, "config": json.dumps(weights.constants), "step": str(weights.step),
                "script": weights.script, "run_id": weights.run_id, "sha256": hash_params(weights.params)}
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        safetensors.torch.save_file(weights.params, unfinished, metadata)
        unfinished.chmod(mode)  # safetensors leaves a file that its owner alone may read
        tgm.force_to_disk(unfinished)
        os.replace(unfinished, out)
        tgm.force_to_disk(out.parent)
    except (safetensors.SafetensorError, OSError) as error:
        if unfinished.exists():
            unfinished.unlink()
        raise UserError(f"{out} cannot be written ({error}): name a file in a folder with room for it.") from error
    num_numbers = sum(p.numel() for p in weights.params.values())
    print(f"{out}: {len(weights.params)} parameters, {num_numbers:,} numbers, after step {weights.step} of run "
          f"{weights.run_id}")


def evaluate(source: Path, data: Path | None) -> None:
    """The validation line of the log again: the trainer's own evaluation, with the window of the step."""
    weights = read_weights(source)
    config, model = weights.config, build_model(weights)
    if needs_gpu(model):
        raise UserError(f"preset {config.preset} validates in sequences of {config.val_piece_len:,} tokens, which need "
                        f"a CUDA GPU, and none is visible.")
    shard = open_validation(config, data or Path(config.data_dir))
    val_loss = tgm.evaluate(model, shard, weights.step, tgm.World(0, 1, audit.device_of(model)))
    print(f"step:{weights.step}/{config.num_iterations} val_loss:{val_loss:.6f}")


def find_vocabulary(config: tgm.Config) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Encodes and decodes: bytes, or GPT-2's tokens by tiktoken. Raises UserError for another vocabulary."""
    if config.vocab_size == 257:
        return lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace")
    if config.vocab_size != 50257:
        raise UserError(f"text needs the vocabulary of bytes (257 ids) or GPT-2's (50257), not one of "
                        f"{config.vocab_size} ids.")
    import tiktoken
    encoding = tiktoken.get_encoding("gpt2")
    return encoding.encode_ordinary, encoding.decode


def next_probabilities(logits: Tensor, token_losses: Callable[[Tensor, Tensor], Tensor], vocab_size: int,
                       temperature: float) -> Tensor:
    """[vocab_size], fp64, of a row of logits [V], not yet capped; the padded rows, which stand for no id, are left out.

    The loss operation itself caps them: between z and 0, the losses of the two targets differ by the capped z.
    Temperature 0 is its limit: the most probable token, and the first of equals.
    """
    z = logits[:vocab_size]
    if temperature == 0:
        return nn.functional.one_hot(z.argmax(), len(z)).double()
    pairs, target = torch.stack((z, torch.zeros_like(z)), 1), torch.zeros(len(z), dtype=torch.int64, device=z.device)
    loss_of_z, loss_of_zero = (token_losses(pairs, target + i).double() for i in range(2))
    return ((loss_of_zero - loss_of_z) / temperature).softmax(0)


def sample_ids(model: nn.Module, step: int, prompt: list[int], num_tokens: int, temperature: float,
               seed: int) -> Iterator[int]:
    """Up to `num_tokens` ids that follow the prompt in a document of their own; a drawn document token ends them.

    What precedes, the document token first, is padded to whole blocks, of which later tokens see nothing; on a GPU to
    the final length, for which alone is compiled. Every token runs the whole sequence again: short texts, few lines.
    """
    config = model.config
    context, rng = [config.doc_token, *prompt], torch.Generator().manual_seed(seed)
    final = len(context) + num_tokens
    for _ in range(num_tokens):
        length = -(-(len(context) if audit.device_of(model) == CPU else final) // tgm.BLOCK_SIZE) * tgm.BLOCK_SIZE
        ids = torch.zeros(length, dtype=torch.int32)
        ids[:len(context)] = torch.tensor(context)
        logits, token_losses, _ = audit.record_logits(model, ids, step)
        chances = next_probabilities(logits[len(context) - 1].cpu(), token_losses, config.vocab_size, temperature)
        token = int(chances.multinomial(1, generator=rng))
        if token == config.doc_token:
            return
        context.append(token)
        yield token


def sample(source: Path, prompt: str, num_tokens: int, temperature: float, seed: int) -> None:
    """Prints the prompt and the model's text after it."""
    weights = read_weights(source)
    (encode, decode), model = find_vocabulary(weights.config), build_model(weights)
    prompt_ids, longest = encode(prompt), max(model.config.piece_len, model.config.val_piece_len)
    if 1 + len(prompt_ids) + num_tokens > longest:
        raise UserError(f"a prompt of {len(prompt_ids):,} tokens and {num_tokens:,} more exceed the {longest:,} "
                        f"positions of the model, the document token included: shorten either.")
    ids = sample_ids(model, weights.step, prompt_ids, num_tokens, temperature, seed)
    print(decode([*prompt_ids, *ids]))


def run_audit(source: Path, data: Path | None) -> int:
    """A line a check of `audit`; the exit status, 1 if any failed."""
    weights = read_weights(source)
    config, model = weights.config, build_model(weights)
    shard = open_validation(config, data or Path(config.data_dir))
    ids, steps = audit.audited_ids(shard, config), audit.audited_steps(weights.step, config)
    checks = [partial(audit.check_suffixes, model, ids, steps), partial(audit.check_documents, model, ids, steps),
              partial(audit.check_probabilities, model, ids, weights.step),
              partial(audit.check_validation, config, shard, weights.step)]
    if needs_gpu(model):
        checks.append(partial(audit.Outcome, "warm-up", None, f"preset {config.preset} trains on a CUDA GPU alone"))
    else:
        checks.append(partial(audit.check_warm_up, model, tgm.World(0, 1, audit.device_of(model))))
    failed = False
    for check in checks:
        outcome = check()
        print(outcome, flush=True)
        failed |= outcome.passed is False
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show a letter of a sample
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run: Callable, name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        command.add_argument("source", type=Path, metavar="FILE_OR_CHECKPOINT")
        return command

    add(export, "export", "write a checkpoint's parameters as one file").add_argument(
        "out", type=Path, metavar="OUT.safetensors")
    for command in (add(evaluate, "evaluate", "compute the validation loss again"),
                    add(run_audit, "audit", "check for leaks, and what else a loss stands on; exit status 1 if a "
                                            "check fails")):
        command.add_argument("--data", type=Path, help="folder of the validation shard; None: as in training")
    sampling = add(sample, "sample", "generate text; a document token ends it")
    sampling.add_argument("--prompt", default="", help="the text's beginning")
    sampling.add_argument("--tokens", type=int, default=200, dest="num_tokens", help="at most")
    sampling.add_argument("--temperature", type=float, default=0.8, help="0: the most probable token")
    sampling.add_argument("--seed", type=int, default=0, help="of the draws")
    options = vars(parser.parse_args(argv))
    try:
        return options.pop("run")(**options) or 0
    except UserError as error:
        print(f"weights.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

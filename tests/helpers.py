"""What several tests need: the golden weights, small configurations, shards, processes, and runs that are watched."""
import copy
import json
import multiprocessing
import os
import signal
import socket
import struct
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._pytree import tree_leaves

import audit
import memory
import train_gpt_medium as tgm
from plain_twin import twin_of

ROOT = Path(__file__).resolve().parent.parent
RECORDS, GOLDEN = ROOT / "records", ROOT / "tests" / "golden"
TRAINER = ROOT / "train_gpt_medium.py"
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALONE = tgm.World(rank=0, size=1, device=CPU)
# Processes are forked from a server that has imported torch, which takes seconds, and nothing of the repository.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["numpy", "torch._dynamo.callback", "torch.distributed.launcher.api", "tqdm", "triton",
                               "torch.nn.attention.flex_attention"])
NUM_STEPS = 3  # outer steps of Snoo after the first and the third


def golden(name: str):
    return json.loads((GOLDEN / name).read_text())


def small_config(preset: str = next(iter(tgm.PRESETS)), snoo_every: int = 2, num_slices: int | None = None,
                 **changes) -> tgm.Config:
    """A preset of the script at width 64, with slices of 256 tokens: only sizes and lengths are replaced.

    num_slices: one stage of such batches in place of the script's stages.
    """
    config = tgm.PRESETS[preset]()
    if num_slices is not None:
        changes["stages"] = (tgm.Stage(num_slices=num_slices),)
    if config.snoo:
        changes.setdefault("snoo", tgm.replace(config.snoo, every=snoo_every))
    sizes = dict(shard_prefix="text", vocab_size=257, doc_token=256, num_heads=2, head_dim=32, seq_len=256,
                 val_seq_len=512, val_tokens=2048, val_every=4, num_iterations=6, max_window=512,
                 momentum_warmup_steps=3, kernel_warmup_steps=2, seed=1, needs_gpu=False)
    return tgm.replace(config, **({name: size for name, size in sizes.items() if hasattr(config, name)} | changes))


# The first of those that are alike at this size.
DISTINCT_PRESETS = list({
    repr(tgm.replace(small_config(name), preset="", data_dir="", coordinate_descent_tuning=False)): name
    for name in reversed(tgm.PRESETS)}.values())


def as_window(blocks: int) -> torch.Tensor:
    """The model's window_blocks."""
    return torch.tensor(blocks, dtype=torch.int32)


def golden_weights(model: tgm.GPT, seed: int) -> None:
    """The weights of SPEC section 8: role k is randn(seed + k) times its standard deviation, then the offsets."""
    params = twin_of(dict(model.named_parameters()))
    layers = range(len(model.config.layers))
    std_matrix = model.config.model_dim ** -0.5
    scalars = ("skip_weights", "block_lambdas", "attn_lambdas", "smear_lambda", "backout_lambdas")
    roles = [("embed1", 1.0), ("embed2", 1.0), *((f"value_embeds.{i}", 1.0) for i in range(5)),
             *((f"blocks.{i}.qkvo", 0.5 * std_matrix) for i in layers if i != 7),
             *((f"blocks.{i}.mlp_fc", 0.5 * std_matrix) for i in layers),
             *((f"blocks.{i}.mlp_proj", 0.25 * std_matrix) for i in layers), ("lm_head", 2 * std_matrix),
             *((name, 0.3) for name in scalars)]
    assert {name for name, _ in roles} == params.keys()
    with torch.no_grad():
        for k, (name, std) in enumerate(roles):
            params[name].copy_(torch.randn(params[name].shape, generator=torch.Generator().manual_seed(seed + k)) * std)
        model.skip_weights += 1
        model.attn_lambdas += 0.5
        model.block_lambdas[:, 0] += 1
        model.backout_lambdas[0] += 1


def relative(ours: torch.Tensor, answer) -> float:
    """Error relative to the answer's norm, so that small vectors are judged as a whole."""
    answer = torch.as_tensor(answer, dtype=torch.float64)
    return ((ours.double() - answer).norm() / answer.norm()).item()


def randomise(model: tgm.GPT, seed: int = 0) -> None:
    """Move every parameter a little, scalars by a tenth, so that no path of the model is dead."""
    generator, C = torch.Generator().manual_seed(seed), model.config.model_dim
    with torch.no_grad():
        for p in model.parameters():
            std = 0.1 if p.numel() < C else 0.5 * C ** -0.5
            p += (torch.randn(p.shape, generator=generator) * std).to(p.dtype)


def random_ids(num_tokens: int, config: tgm.Config, seed: int = 0, mean_doc: int = 100) -> torch.Tensor:
    """Ids with documents of about `mean_doc` tokens, [num_tokens] int32."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.doc_token, (num_tokens,), generator=generator)
    ids[torch.rand(num_tokens, generator=generator) < 1 / mean_doc] = config.doc_token
    return ids.int()


def write_shard(path: Path, ids, vocab_size: int = 257, doc_token: int = 256, header: dict[int, int] = {}) -> Path:
    """A shard as SPEC section 2 describes it, written without the code under test; `header` overrides single fields."""
    ids = [int(i) for i in ids]
    fields = [20240520, 1, len(ids), vocab_size, doc_token] + [0] * 251
    for index, value in header.items():
        fields[index] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<256i", *fields) + struct.pack(f"<{len(ids)}H", *ids))
    return path


def write_text_folder(folder: Path, config: tgm.Config, seed: int = 0) -> tgm.Config:
    """A training and a validation shard of random ids that suffice for `config`, which is returned pointing there."""
    num_tokens = sum(map(config.batch_tokens, range(config.num_iterations))) + 1
    write_shard(folder / "text_train_000001.bin", random_ids(num_tokens, config, seed))
    write_shard(folder / "text_val_000000.bin", random_ids(config.val_tokens + 1, config, seed + 1))
    return tgm.replace(config, data_dir=str(folder))


# What launchers set in a process of theirs.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Runs are a CPU's in `folder`, on any machine."""
    patch.setattr(torch.cuda, "is_available", lambda: False)
    for name in (*LAUNCHED, "DATA_PATH"):
        patch.delenv(name, raising=False)
    patch.chdir(folder)


# Every kind of layer.
FEW_LAYERS = (tgm.Layer(value_embed=0, long_window=True), tgm.Layer(), tgm.Layer(attention=False),
              tgm.Layer(skip_from=1, value_embed=0, long_window=True))


def train_few_layers(folder: Path, **changes) -> tuple[tgm.Config, Path]:
    """`main` in `folder`: eight fp32 steps of four layers, with checkpoints after 4 and 8; the run's checkpoints."""
    config = write_text_folder(folder / "shards", small_config(**(dict(
        layers=FEW_LAYERS, backout_from=1, dtype=torch.float32, num_slices=2, num_iterations=8, val_every=4,
        checkpoint_every=4) | changes)))
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        tgm.main(config)
    return config, next((folder / "checkpoints").iterdir())


def free_port() -> str:
    """Of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _rank_main(rank: int, size: int, port: str, function, args, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.save(function(tgm.World(rank, size, CPU), *args), folder / f"{rank}.pt")
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_ranks(size: int, function, *args, folder: Path) -> list:
    """`function(world, *args)` in `size` gloo processes; its results by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_rank_main, (size, free_port(), function, args, folder), size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def environment(**changes) -> dict[str, str]:
    """Of a process that a user starts: without GPUs, without what this process was told of ranks and data."""
    removed = (*LAUNCHED, "DATA_PATH", "PYTEST_CURRENT_TEST")
    clean = {name: value for name, value in os.environ.items() if name not in removed}
    # The interpreter of the tests is the active environment that run.sh finds first.
    return clean | {"PATH": f"{os.path.dirname(sys.executable)}:{clean['PATH']}", "CUDA_VISIBLE_DEVICES": ""} | changes


def tensors(tree) -> dict:
    """Copies of all leaves of nested dicts and lists, by path."""
    return copy.deepcopy(dict(audit.leaves(tree)))


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def run_main(world: tgm.World, config: tgm.Config, stop_after: int = 0, resume_from: str | None = None) -> dict:
    """`main` in a process group that exists already. Returns all that training changed, and the sentence that ended it.

    stop_after: steps; SIGTERM reaches the last rank, and it alone, during the last of them.
    """
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size))
    found, originals = {}, (tgm.train, tgm.train_step, dist.init_process_group, dist.destroy_process_group)

    def train(model, optimizer, *rest):
        found.update(model=model, optimizer=optimizer)
        tgm.train_step = interrupted
        return originals[0](model, optimizer, *rest)

    def interrupted(model, optimizer, inputs, targets, step):
        if step + 1 == stop_after and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        torch.rand(1)  # so that the random state moves, which nothing else in training does
        return originals[1](model, optimizer, inputs, targets, step)

    tgm.train, dist.init_process_group, dist.destroy_process_group = train, lambda *_, **__: None, lambda: None
    ended = ""
    try:
        tgm.main(config, resume_from)
    except tgm.UserError as error:
        ended = str(error)
    finally:
        tgm.train, tgm.train_step, dist.init_process_group, dist.destroy_process_group = originals
    return dict(ended=ended, state=tensors({"model": found["model"].state_dict(), "rng": torch.get_rng_state(),
                                            "optimizer": found["optimizer"].state_dict()}))


def train_and_report(world: tgm.World, config: tgm.Config) -> dict:
    """A few steps from fixed weights: parameters, validation loss, and what this rank saw and lost in each."""
    torch.manual_seed(5)
    model = config.make_model()
    randomise(model)
    optimizer = tgm.Optimizer(model, config, world)
    train_shards, val_shard = tgm.find_shards(config)
    loader, seen, losses = tgm.TrainLoader(train_shards, config, world), [], []
    for step in range(NUM_STEPS):
        inputs, targets = next(loader)
        seen.append(inputs)
        losses.append(tgm.train_step(model, optimizer, inputs, targets, step).item())
    loader.close()
    return dict(params={name: p.detach().clone() for name, p in model.named_parameters()}, seen=seen, losses=losses,
                val_loss=tgm.evaluate(model, val_shard, NUM_STEPS, world))


def assert_one_run(ranks: list[dict], alone: dict, bound: float = 1e-5) -> None:
    """Reports of `train_and_report`: the ranks together are the one that was alone, and never drift apart.

    bound: of a parameter's relative error, which comes of the order of fp32 sums.
    """
    for step, (parts, batch) in enumerate(zip(zip(*(rank["seen"] for rank in ranks)), alone["seen"], strict=True)):
        assert torch.equal(torch.cat(parts), batch), f"step {step}: not the whole batch"
        loss = sum(rank["losses"][step] for rank in ranks) / len(ranks)
        assert loss == pytest.approx(alone["losses"][step], rel=1e-5)
    for number, rank in enumerate(ranks):
        apart = [name for name, p in rank["params"].items() if not torch.equal(p, ranks[0]["params"][name])]
        errors = {name: relative(p, alone["params"][name]) for name, p in rank["params"].items()}
        assert apart == [], f"ranks {number} and 0 of {len(ranks)} differ"
        assert {name: error for name, error in errors.items() if not error < bound} == {}
        assert rank["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-5)


def give_gradients(model: tgm.GPT, world: tgm.World, step: int) -> None:
    """To every parameter, another one on every rank."""
    generator = torch.Generator().manual_seed(100 * step + world.rank)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p)


class Watch(memory.Watch):
    """Also the collectives that reach the process group, in order. What exists already does not count, nor do copies to
    the host, `x.to("cpu", copy=True)`: they would not take a GPU's memory. All these are held, so that no address is
    used twice.
    """
    def __init__(self, existing: list[torch.Tensor]):
        super().__init__([])
        self.collectives, self.held = [], []
        self._hold(existing)

    def _hold(self, uncounted: list[torch.Tensor]) -> None:
        self.held += uncounted
        self.known |= {x.untyped_storage()._cdata for x in uncounted}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.collectives.append((function.overloadpacket.__name__, str(tensors[0].dtype), tensors[0].nbytes))
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == CPU:
            self._hold([function(*args, **kwargs)])
            return self.held[-1]
        return super().__torch_dispatch__(function, types, args, kwargs)


def num_bytes(tree) -> int:
    return sum(x.nbytes for x in tree_leaves(tree) if isinstance(x, torch.Tensor))


def watch_a_step(world: tgm.World, config: tgm.Config) -> dict:
    """Collectives of all steps, outer ones first and last; memory of the second, when all states are there."""
    model = config.make_model()
    optimizer = tgm.Optimizer(model, config, world)
    watches = []
    for step in range(NUM_STEPS):
        give_gradients(model, world, step)
        states = [x for x in tree_leaves(optimizer.state_dict()) if isinstance(x, torch.Tensor)]
        watches.append(Watch([*model.parameters(), *(p.grad for p in model.parameters()), *states]))
        with watches[-1]:
            optimizer.step(step)
    return dict(collectives=[watch.collectives for watch in watches], step_bytes=watches[1].peak,
                state_bytes={name: num_bytes(state) for name, state in optimizer.state_dict().items()},
                padding_is_zero=all(not bank.buffer[len(bank.buffer) - bank.padding:].any()
                                    for bank in optimizer.banks.values()))

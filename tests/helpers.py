"""What several tests need: the golden weights, small configurations, shards, and gloo processes."""
import json
import os
import socket
import struct
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import train_gpt_medium as tgm
from plain_twin import twin_of

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CPU = torch.device("cpu")
ALONE = tgm.World(rank=0, size=1, device=CPU)


def golden(name: str):
    return json.loads((GOLDEN / name).read_text())


def small_config(**changes) -> tgm.Config:
    """All 16 layers at width 64, in the record's dtypes; slices of 256 tokens."""
    constants = dict(preset="tiny", vocab_size=257, doc_token=256, num_heads=2, head_dim=32, seq_len=256,
                     val_seq_len=512, val_tokens=2048, num_iterations=6, max_window=512, snoo_every=2,
                     momentum_warmup_steps=3, val_every=4, warmup_steps=2, seed=1)
    return tgm.Config(**(constants | changes))


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


def assert_known_answer(case: dict, answer: dict) -> None:
    """A case of golden/model*.json at one of its windows: losses, all gradient norms, attended pairs."""
    T, window_blocks = case["seq_len"], answer["window_blocks"]
    config = tgm.Config(seq_len=T, val_seq_len=T, val_tokens=T, dtype=torch.float32, **{
        name: case[name] for name in ("vocab_size", "doc_token", "num_heads", "head_dim")})
    model = tgm.GPT(config)
    golden_weights(model, case["seed"])
    ids = torch.randint(0, case["doc_token"], (T + 1,), generator=torch.Generator().manual_seed(case["seed"] + 10000))
    ids[case["doc_starts"]] = case["doc_token"]
    inputs, targets, window = ids[:-1], ids[1:], tgm.as_window(window_blocks, CPU)
    loss = model(inputs, targets, window)
    loss.backward()
    with torch.no_grad():
        eval_loss = model(inputs, targets, window)

    # fp32 rounding, as SPEC section 8 states it for a straightforward implementation.
    assert relative(loss.detach(), answer["train_loss"]) < 5e-7
    assert relative(eval_loss, answer["eval_loss"]) < 5e-7
    grads = twin_of({name: p.grad for name, p in model.named_parameters()})
    for role, grad_norm in answer["grad_norm"].items():
        kind, *number = role.split(".")
        name = role if role in grads else f"blocks.{number[0]}.{kind}"
        assert relative(grads.pop(name).double().norm(), grad_norm) < 1e-6, role
    assert not grads
    for name, ours in (("smear_lambda_grad", model.smear_lambda.grad),
                       ("backout_lambdas_grad", model.backout_lambdas.grad),
                       ("block_lambdas_grad_layer9", model.block_lambdas.grad[9])):
        assert relative(ours, answer[name]) < 2e-6, name
    for name, mask in zip(("long", "short"), tgm.block_masks(inputs, window, case["doc_token"])):
        attended = tgm.dense_mask(mask).sum(1)
        assert attended.sum() == answer[f"{name}_attended_pairs"]["total"]
        assert (attended * (torch.arange(T) % 997)).sum() == answer[f"{name}_attended_pairs"]["weighted"]


def randomise(model: tgm.GPT, seed: int = 0) -> None:
    """Replace every initial zero by something, so that no path of the model is dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.1 if p.ndim < 2 or "lambdas" in name else 0.5 * model.config.model_dim ** -0.5
            if "embed" not in name:
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
    num_tokens = config.num_iterations * config.batch_tokens + 1
    write_shard(folder / "text_train_000001.bin", random_ids(num_tokens, config, seed))
    write_shard(folder / "text_val_000000.bin", random_ids(config.val_tokens + 1, config, seed + 1))
    return tgm.replace(config, data_dir=str(folder))


# Every kind of layer.
FEW_LAYERS = (tgm.Layer(value_embed=0, long_window=True), tgm.Layer(), tgm.Layer(attention=False),
              tgm.Layer(skip_from=1, value_embed=0, long_window=True))


def train_few_layers(folder: Path, **changes) -> tuple[tgm.Config, Path]:
    """`main` in `folder`: eight fp32 steps of four layers, with checkpoints after 4 and 8; the run's checkpoints."""
    config = write_text_folder(folder / "shards", small_config(**(dict(
        layers=FEW_LAYERS, backout_from=1, dtype=torch.float32, num_slices=2, num_iterations=8, val_every=4,
        checkpoint_every=4) | changes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        tgm.main(config)
    return config, next((folder / "checkpoints").iterdir())


def _rank_main(rank: int, size: int, port: int, function, args, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        if size > 1:
            dist.init_process_group("gloo", rank=rank, world_size=size)
        torch.save(function(tgm.World(rank, size, CPU), *args), Path(folder) / f"{rank}.pt")
        if size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        raise


def run_ranks(size: int, function, *args, folder: Path) -> list:
    """`function(world, *args)` in `size` gloo processes; its results by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank_main, args=(size, port, function, args, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]

"""The constants and schedules of the record, and the refusal of constants that cannot work."""
import dataclasses
import math

import pytest
import torch

import train_gpt_medium as tgm
from helpers import golden, small_config

RECORD = tgm.Config()


def test_schedules_are_the_records():
    answers = golden("schedule.json")
    assert RECORD.num_iterations == answers["num_iterations"]
    assert {step: tgm.lr_factor(int(step), RECORD) for step in answers["lr"]} == answers["lr"]
    momentum = answers["muon_momentum"]
    assert {step: tgm.muon_momentum(int(step), RECORD) for step in momentum} == momentum
    windows = [tgm.num_window_blocks(step, RECORD) for step in range(RECORD.num_iterations + 1)]
    changes = [[step, w] for step, w in enumerate(windows) if step == 0 or w != windows[step - 1]]
    assert changes == answers["window_blocks_first_step"]
    assert windows[-1] == 27  # the last validation


def test_constants_of_the_record():
    """SPEC sections 1 to 5, value by value; schedules, layer plan and parameters have tests of their own."""
    expected = dict(
        vocab_size=50257, doc_token=50256, seq_len=65536, num_slices=8, piece_len=65536, num_pieces=8,
        val_tokens=10485760, val_seq_len=262144, val_piece_len=262144, val_loss_chunks=4, num_heads=8, head_dim=128,
        smear_mtp=True, backout_from=11, attention_scale=0.12, rotary_base=1024, logit_softcap=15, init_scale=0.5,
        dtype=torch.bfloat16, head_lr=1 / 320, embed_lr=0.3, scalar_lr=0.015, adam_betas=(0.8, 0.95), adam_eps=1e-10,
        muon_lr=0.03, muon_decay=0.01, mlp_decay_factor=2, update_smoothing=0.2, snoo_every=28, snoo_lr=0.68,
        snoo_momentum=0.37, num_iterations=5535, val_every=125, seed=None)
    assert {name: getattr(RECORD, name) for name in expected} == expected
    assert RECORD.warmup_steps > 0


def test_layer_plan_of_the_record():
    layers = RECORD.layers
    assert len(layers) == 16
    assert [i for i, layer in enumerate(layers) if layer.long_window] == [0, 4, 11, 15]
    assert [i for i, layer in enumerate(layers) if not layer.attention] == [7]
    assert {i: layer.value_embed for i, layer in enumerate(layers) if layer.value_embed is not None} == {
        **{i: i for i in range(5)}, **{i: i - 11 for i in range(11, 16)}}
    assert {i: layer.skip_from for i, layer in enumerate(layers) if layer.skip_from is not None} == {9: 6, 10: 4, 11: 2}


def test_parameters_of_the_record():
    with torch.device("meta"):
        model = tgm.GPT(RECORD)
    V, C, bf16, fp32 = 50257, 1024, torch.bfloat16, torch.float32
    expected = {"embeds": ((7, V, C), bf16),
                **{f"blocks.{i}.qkvo": ((4, C, C), bf16) for i in range(16) if i != 7},
                **{f"blocks.{i}.mlp_fc": ((4 * C, C), bf16) for i in range(16)},
                **{f"blocks.{i}.mlp_proj": ((C, 4 * C), bf16) for i in range(16)},
                "lm_head": ((50304, C), fp32), "skip_weights": ((16,), fp32), "block_lambdas": ((16, 3), fp32),
                "attn_lambdas": ((16, 2), fp32), "smear_lambda": ((), fp32), "backout_lambdas": ((2,), fp32)}
    assert {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()} == expected


def test_initial_values():
    config = small_config(vocab_size=1500, doc_token=1499)
    torch.manual_seed(0)
    params = dict(tgm.GPT(config).named_parameters())
    bound = math.sqrt(3) * 0.5 / math.sqrt(config.model_dim)
    for name, p in params.items():
        if "embed" in name:  # standard error of mean and deviation of n draws: 1 / sqrt(n), 1 / sqrt(2n)
            assert abs(p.float().mean()) < 5 / p.numel() ** 0.5
            assert abs(p.float().std() - 1) < 5 / (2 * p.numel()) ** 0.5
        elif name.endswith("qkvo") or name.endswith("mlp_fc"):
            drawn = p[:3].float() if p.ndim == 3 else p.float()
            assert 0.99 * bound < drawn.abs().max() <= bound * (1 + 2 ** -8)  # bf16 rounds by half a unit at most
            assert abs(drawn.mean()) < 5 * bound / (3 * drawn.numel()) ** 0.5
            assert p.ndim == 2 or (p[3] == 0).all()
        elif name.endswith("mlp_proj") or name == "lm_head":
            assert (p == 0).all()
    assert (params["skip_weights"] == 1).all() and (params["block_lambdas"] == torch.tensor([1.0, 0, 0])).all()
    assert (params["attn_lambdas"] == 0.5).all() and params["smear_lambda"] == 0
    assert params["backout_lambdas"].tolist() == [1, 0]


def test_presets():
    assert tgm.PRESETS["medium"] == RECORD
    for name, config in tgm.PRESETS.items():
        assert config.preset == name
        for world_size in (1, 2, 4, 8):
            assert config.num_slices % world_size == 0
    short, tiny = tgm.PRESETS["short"], tgm.PRESETS["tiny"]
    assert short.num_iterations == 300 and short.val_tokens == 2 ** 20
    with torch.device("meta"):
        assert [p.shape for p in tgm.GPT(short).parameters()] == [p.shape for p in tgm.GPT(RECORD).parameters()]
    assert tiny.layers == RECORD.layers
    assert len({tgm.num_window_blocks(step, tiny) for step in range(tiny.num_iterations)}) >= 3
    assert tiny.num_iterations > tiny.snoo_every


@pytest.mark.parametrize("changes, word", [
    (dict(seq_len=100), "seq_len"),
    (dict(micro_seq_len=0), "micro_seq_len"),
    (dict(micro_seq_len=64), "micro_seq_len"),
    (dict(seq_len=512, micro_seq_len=384), "micro_seq_len"),
    (dict(seq_len=512, micro_seq_len=128, val_seq_len=256), "cannot be cut"),
    (dict(val_seq_len=500), "val_seq_len"),
    (dict(val_tokens=1000), "val_tokens"),
    (dict(val_loss_chunks=3), "val_loss_chunks"),
    (dict(head_dim=30), "head_dim"),
    (dict(doc_token=257), "doc_token"),
    (dict(backout_from=16), "backout_from"),
    (dict(backout_from=-1), "backout_from"),
    (dict(num_slices=6), "num_slices"),
    (dict(val_every=0), "val_every"),
    (dict(layers=(tgm.Layer(), tgm.Layer(skip_from=-1)), backout_from=0), "skips"),
    (dict(layers=(tgm.Layer(),), backout_from=0), "no layer has a skip_from"),
    (dict(layers=(tgm.Layer(value_embed=3),), backout_from=0), "value_embeds"),
    (dict(layers=(tgm.Layer(attention=False, value_embed=0),), backout_from=0), "without attention"),
    (dict(layers=(tgm.Layer(), tgm.Layer(skip_from=1))), "skips"),
])
def test_constants_that_cannot_work_are_refused(changes, word):
    with pytest.raises(tgm.UserError, match=word):
        small_config(**changes)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.seed = 1


@pytest.mark.parametrize("arguments", [["large"], ["medium", "seed=1"], ["--help"]])
def test_only_presets_are_accepted(arguments):
    with pytest.raises(tgm.UserError, match="medium, short, tiny"):
        tgm.choose_config(arguments)


def test_data_path_overrides_the_folder(monkeypatch):
    monkeypatch.delenv("DATA_PATH", raising=False)
    assert tgm.choose_config([]) == RECORD
    monkeypatch.setenv("DATA_PATH", "/elsewhere")
    assert tgm.choose_config(["tiny"]) == dataclasses.replace(tgm.PRESETS["tiny"], data_dir="/elsewhere")

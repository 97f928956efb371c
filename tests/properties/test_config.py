"""Every preset's constants work together, constants that cannot work are refused, and a command line names a preset."""
import dataclasses
import math

import pytest

import train_gpt_medium as tgm
from helpers import small_config

NUM_LAYERS = len(small_config().layers)


def test_numbers_that_are_not_positive_are_refused_by_name():
    config = small_config()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in (int, float):
            for bad in (-1, 0) if field.name not in config.may_be_zero else (-1,):
                with pytest.raises(tgm.UserError, match=rf"^Config: {field.name} {bad} is not positive\.$"):
                    tgm.replace(config, **{field.name: bad})


@pytest.mark.parametrize("changes, sentence", [
    (dict(seq_len=100), "seq_len 100 is not a multiple"),
    (dict(micro_seq_len=64), "micro_seq_len 64 must divide"),
    (dict(seq_len=512, micro_seq_len=384), "micro_seq_len 384 must divide"),
    (dict(seq_len=512, micro_seq_len=128, val_seq_len=256), "val_seq_len 256 .* is not a multiple"),
    (dict(val_seq_len=500), "val_seq_len 500 .* is not a multiple"),
    (dict(val_tokens=1000), "val_tokens 1000 is not a multiple"),
    (dict(doc_token=257), "doc_token 257 is not below"),
    (dict(stages=()), "stages' ends"),
    (dict(stages=(tgm.Stage(0.5), tgm.Stage(0.9))), r"ends \[0.5, 0.9\] do not rise to 1.0"),
    (dict(stages=(tgm.Stage(0.5), tgm.Stage(0.5), tgm.Stage(1.0))), "do not rise"),
    (dict(stages=(tgm.Stage(1.0, num_slices=0),)), "num_slices"),
    (dict(groups=(tgm.Group("one", ("a", "b"), None), tgm.Group("other", ("b", "c"), None))), "b is a role in two"),
    (dict(groups=(tgm.Group("one", ("a",), None), tgm.Group("one", ("b",), None))), "the same name"),
    (dict(stages=(tgm.Stage(seq_len=192),)), "seq_len is not a multiple"),
    (dict(stages=(tgm.Stage(seq_len=512),)), "seq_len is not .* at most seq_len"),
    (dict(snoo_every=0), "every"),
    (dict(snoo=None, groups=(tgm.Group("one", ("a",), None, every=0),)), "group's `every`"),
    (dict(snoo=tgm.Snoo(), groups=(tgm.Group("one", ("a",), None, every=2),)), "Snoo needs"),
    (dict(snoo=None, checkpoint_every=3, groups=(tgm.Group("one", ("a",), None, every=2),)), "not a multiple of 2"),
    # The recipe's own.
    (dict(val_loss_chunks=3), "val_loss_chunks"),
    (dict(head_dim=31), "head_dim"),
    (dict(rotary_share=1.5), "rotary_share"),
    (dict(backout_from=NUM_LAYERS), "backout_from"),
    (dict(layers=(tgm.Layer(), tgm.Layer(skip_from=-1)), backout_from=0), "skips"),
    (dict(layers=(tgm.Layer(), tgm.Layer(skip_from=1)), backout_from=0), "skips"),
    (dict(layers=(tgm.Layer(value_embed=3),), backout_from=0), "value_embeds"),
    (dict(layers=(tgm.Layer(attention=False, value_embed=0),), backout_from=0), "without attention"),
])
def test_constants_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(tgm.UserError, match=sentence):
        small_config(**changes)


@pytest.mark.parametrize("preset", tgm.PRESETS)
def test_schedules_of_a_preset_are_numbers_that_a_run_can_use(preset):
    """In every step, and after the last one, where only the model's inputs are asked for."""
    config = tgm.PRESETS[preset]()
    assert config.preset == preset
    for step in range(config.num_iterations):
        for group in config.groups:
            numbers = group.rule.hyperparameters(step, config)
            assert all(math.isfinite(x) and x >= 0 for x in numbers.values()), (step, group.name, numbers)
            assert numbers.get("lr", 1) > 0 or step == 0, (step, group.name, numbers)
            assert numbers.get("momentum", 0) < 1, (step, group.name, numbers)
    for step in range(config.num_iterations + 1):
        inputs = config.model_inputs(step)
        assert all(type(x) in (int, float) and math.isfinite(x) for x in inputs.values()), (step, inputs)
        assert inputs.get("window_blocks", 1) >= 1, (step, inputs)


def test_a_stage_holds_until_its_share_of_the_steps_is_done():
    first, second, third = (tgm.Stage(0.25, 2), tgm.Stage(0.5, 4, window=3 * 128), tgm.Stage(1.0, 8, lr_factor=0.5))
    config = small_config(num_iterations=8, stages=(first, second, third))
    assert [config.stage(step) for step in range(9)] == [first] * 2 + [second] * 2 + [third] * 5
    assert [config.batch_tokens(step) // config.seq_len for step in range(8)] == [2, 2, 4, 4, 8, 8, 8, 8]
    assert [tgm.num_window_blocks(step, config) for step in (2, 3)] == [3, 3]
    plain = tgm.replace(config, stages=(tgm.Stage(1.0, 8),))
    for step, factor in enumerate([1] * 4 + [0.5] * 4):
        assert tgm.lr_factor(step, config) == factor * tgm.lr_factor(step, plain)


@pytest.mark.parametrize("arguments", [["large"], [*list(tgm.PRESETS)[:1], "seed=1"], ["--help"]])
def test_only_presets_are_accepted(arguments):
    with pytest.raises(tgm.UserError, match=", ".join(tgm.PRESETS)):
        tgm.choose_config(tgm.PRESETS, arguments)


def test_data_path_overrides_the_folder(monkeypatch):
    first, *_, last = tgm.PRESETS
    monkeypatch.delenv("DATA_PATH", raising=False)
    assert tgm.choose_config(tgm.PRESETS, []) == tgm.PRESETS[first]()
    monkeypatch.setenv("DATA_PATH", "/elsewhere")
    assert tgm.choose_config(tgm.PRESETS, [last]) == tgm.replace(tgm.PRESETS[last](), data_dir="/elsewhere")

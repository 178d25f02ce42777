"""A run that begins with another run's weights."""

import json

import jax
import numpy as np
import pytest
from training.test_loop import toy_train
from training.toy import CONFIG, assert_same_bits, toy_method

from diffusion_jax.training import (
    CheckpointError,
    CheckpointMismatch,
    ConfigChanged,
    TrainConfig,
    restore_params,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    toy_train(folder)
    return folder


def test_the_averaged_weights_are_the_first_ones(teacher, tmp_path):
    result = toy_train(tmp_path, steps=0, init_from=str(teacher))
    average = restore_params(teacher, "ema_0.9")
    assert_same_bits(result.state.params, average)
    for decay in ("0.9", "0.5"):
        assert_same_bits(result.state.ema[decay], average)
    moments = [np.abs(v).max() for v in jax.tree.leaves(result.state.opt_state)]
    assert max(moments) == 0  # the optimiser begins anew
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["train"]["init_from"] == str(teacher)


def test_without_averages_the_weights_themselves(tmp_path):
    toy_train(tmp_path / "a", steps=2, ema=())
    result = toy_train(tmp_path / "b", steps=0, ema=(), init_from=str(tmp_path / "a"))
    assert_same_bits(result.state.params, restore_params(tmp_path / "a", "params"))


def test_a_resumed_run_does_not_read_the_other_folder_again(tmp_path):
    toy_train(tmp_path / "a", steps=2)
    whole = toy_train(tmp_path / "whole", steps=6, init_from=str(tmp_path / "a"))
    toy_train(tmp_path / "b", steps=3, init_from=str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "gone")
    resumed = toy_train(tmp_path / "b", steps=6, init_from=str(tmp_path / "a"))
    assert_same_bits(resumed.state.params, whole.state.params)
    # what a run began with belongs to it
    with pytest.raises(ConfigChanged, match=r"train.init_from: .* -> \"elsewhere\""):
        toy_train(tmp_path / "b", steps=6, init_from="elsewhere")


def test_the_methods_state_is_made_of_these_weights(teacher, tmp_path):
    class Taught:
        init, loss = staticmethod(toy_method().init), staticmethod(toy_method().loss)

        @staticmethod
        def init_state(key, params, batch):
            return {"teacher": params}

    result = toy_train(tmp_path, method=Taught, steps=1, init_from=str(teacher))
    assert_same_bits(result.state.method_state["teacher"], restore_params(teacher))


def test_pmap_begins_with_them_too(teacher, tmp_path):
    result = toy_train(tmp_path, steps=0, init_from=str(teacher), parallel={"mode": "pmap"})
    assert_same_bits(result.state.params, restore_params(teacher))


def test_other_parameters_are_named(teacher, tmp_path):
    words = (
        r"train.init_from: checkpoint .*hidden.* is float32\[8\] in the checkpoint,"
        r" float32\[5\] here \(and 2 more\)"
    )
    with pytest.raises(CheckpointMismatch, match=words):
        toy_train(tmp_path, method=toy_method(width=5), init_from=str(teacher))


def test_folders_that_do_not_serve(tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for folder, words in (
        ("none", "no checkpoints in .*none"),
        ("empty", "train.init_from: no checkpoint in .*empty"),
        ("run", "train.init_from is the run folder itself"),
    ):
        with pytest.raises(CheckpointError, match=words):
            toy_train(tmp_path / "run", init_from=str(tmp_path / folder))
        assert not (tmp_path / "run" / "config.json").exists()


def test_configs_of_runs_without_it_stay_as_they_were():
    assert "init_from" not in TrainConfig.from_mapping(CONFIG).to_dict()
    given = TrainConfig(init_from="runs/a")
    assert TrainConfig.from_mapping(given.to_dict()) == given
    assert TrainConfig(init_from=None).init_from == ""

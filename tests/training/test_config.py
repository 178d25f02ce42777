import json

import ml_collections
import numpy as np
import pytest

from diffusion_jax.training import TrainConfig
from diffusion_jax.training.runfolder import ConfigChanged, config_changes, open_run, read_config


def test_round_trip_through_json():
    config = TrainConfig(
        steps=5, ema=(0.9, 0.99), parallel={"rules": [("kernel", [None, "model"])]}
    )
    assert TrainConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config


def test_takes_config_dicts_and_numpy_numbers():
    values = ml_collections.ConfigDict({"steps": 7, "optimizer": {"name": "sgd"}, "ema": (0.5,)})
    values.seed = np.int64(3)
    config = TrainConfig.from_mapping(ml_collections.FrozenConfigDict(values))
    assert (config.steps, config.seed, config.ema) == (7, 3, (0.5,))
    assert config.optimizer == {"name": "sgd"}


def test_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match="'step'; did you mean 'steps'"):
        TrainConfig.from_mapping({"step": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1e6}, "train.steps must be an integer >= 0; got 1000000.0"),
        ({"batch_size": 0}, "train.batch_size must be an integer >= 1; got 0"),
        ({"ema": (1.0,)}, "a decay lies in \\[0, 1\\); got 1.0"),
        ({"ema": (0.9, 0.9)}, "decays must differ"),
        ({"batch_size": 10, "microbatches": 4}, "10 is not a multiple of train.microbatches 4"),
        ({"log_every": True}, "train.log_every"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_a_single_decay_may_be_a_number():
    assert TrainConfig(ema=0.5).ema == (0.5,)


def test_config_changes_ignore_what_changes_no_bits():
    old = {"network": {"width": 64}, "train": {"steps": 10, "seed": 0}, "sample": {"nfe": 3}}
    new = {"network": {"width": 64}, "train": {"steps": 20, "seed": 0}, "sample": {"nfe": 5}}
    assert config_changes(old, new) == []
    new["network"] = {"width": 128, "depth": 2}
    assert config_changes(old, new) == ["network.width: 64 -> 128", "network.depth: absent -> 2"]


def test_run_folder_refuses_another_model(tmp_path):
    open_run(tmp_path, {"network": {"width": 64}}, started=False)
    open_run(tmp_path, {"network": {"width": 32}}, started=False)
    assert read_config(tmp_path) == {"network": {"width": 32}}
    with pytest.raises(ConfigChanged, match=r"network\.width: 32 -> 8; use another run folder"):
        open_run(tmp_path, {"network": {"width": 8}}, started=True)
    assert read_config(tmp_path) == {"network": {"width": 32}}
    open_run(tmp_path, {"network": {"width": 8}}, started=True, accept_changes=True)
    assert read_config(tmp_path) == {"network": {"width": 8}}
    assert json.loads((tmp_path / "config.0.json").read_text()) == {"network": {"width": 32}}
    assert json.loads((tmp_path / "versions.json").read_text())["jax"]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        read_config(tmp_path)

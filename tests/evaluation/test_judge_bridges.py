"""Bridges of images without classes are judged too: by their distance to the truth, and by filters."""

import jax
import numpy as np
import pytest

from configs import restoration
from diffusion_jax import builder, judge
from diffusion_jax import run as runs


def untrained(tmp_path, **data):
    """A run whose network gives 0: its x0_hat is the state itself, its samples are the source."""
    pairs = {"name": "paired", "data": "photos", "size": 8, "stride": 8, "corruption": "blur"}
    config = restoration.i2sb(pairs | data, beta_max=0.3)
    config.network.update(channels=4, channel_mults=(1, 1))
    source = builder.build_data(config, "train")
    built = builder.build_method(config, source.spec)
    params = built.method.init(jax.random.key(0), source.spec.zeros(2))
    plain = builder.to_plain(config)
    return runs.Run(tmp_path, plain, source.spec, built.method, params, "params", 0)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    run = untrained(tmp_path_factory.mktemp("run"))
    return run, judge.judge(run, num=120, samplers=({"name": "i2sb", "nfe": 2},))


@pytest.mark.slow
def test_rows_of_a_bridge_without_classes(judged):
    run, result = judged
    rows = {row["sampler"]: row for row in result["rows"]}
    assert set(rows) == {"i2sb", "source", "held-out data", "noise"}
    one, source = rows["i2sb"], rows["source"]
    assert one["psnr_gain"] == pytest.approx(one["psnr"] - source["psnr"])
    expected = np.mean((result["batch"]["source"] - result["batch"]["image"]) ** 2, axis=(1, 2, 3))
    assert source["psnr"] == pytest.approx(np.mean(10 * np.log10(4 / expected)), rel=1e-5)
    assert 0 < one["ssim"] < source["ssim"] < 1
    distances = [rows[name]["frechet"] for name in ("held-out data", "source", "noise")]
    assert distances == sorted(distances)
    assert one["accuracy"] is None and run.spec.num_classes is None
    text = judge.table(result["rows"])
    assert "SSIM" in text and "class accuracy" not in text


@pytest.mark.slow
def test_few_images_are_judged_by_their_truth_alone(judged):
    run, _ = judged
    rows = judge.judge(run, num=10, samplers=({"name": "i2sb", "nfe": 2},))["rows"]
    assert len(rows) == 1 and rows[0]["psnr"] > 0 and "frechet" not in rows[0]

"""Presets name what exists: every config is built, and its network is the published one."""

import jax
import numpy as np
import pytest

from diffusion_jax import builder
from diffusion_jax.interop import import_torch, mapping, presets

# The papers' own counts of the largest networks that they publish weights of; of random features and fixed
# tables, those that are parameters here.
COUNTS = {
    "DiT-XL-2-256x256": 674_834_720,
    "DiT-XL-2-512x512": 674_834_720,
    "uvit-cifar10-S-2": 44_255_328,
    "uvit-celeba64-S-4": 44_292_228,
    "uvit-imagenet64-M-4": 130_940_292,
    "uvit-imagenet64-L-4": 286_827_652,
    "uvit-imagenet256-L-2": 286_763_172,
    "uvit-imagenet256-H-2": 500_832_016,
    "uvit-imagenet512-L-4": 286_861_524,
    "uvit-imagenet512-H-4": 500_942_656,
    "edm-cifar10-32x32-uncond-vp": 55_733_891,
    "edm-cifar10-32x32-uncond-ve": 56_397_827 + 128,
    "edm-cifar10-32x32-cond-vp": 55_735_299,
    "edm-cifar10-32x32-cond-ve": 56_400_643 + 128,
    "edm-ffhq-64x64-uncond-vp": 61_805_571,
    "edm-ffhq-64x64-uncond-ve": 62_761_091 + 128,
    "edm-imagenet-64x64-cond-adm": 295_899_267,
    "edm2-img512-xs": 124_713_253 + 512,
    "edm2-img512-xxl": 1_523_164_773 + 1152,
    "edm2-img64-s": 280_209_381 + 640,
    "sedd-small": 169_627_218,
    "sedd-medium": 424_477_010,
    "mdlm-owt": 169_627_218,
    "ADM-64x64": 295_904_454,
    "ADM-128x128": 421_529_606,
    "ADM-256x256": 553_838_086,
    "ADM-256x256-uncond": 552_814_086,
    "ADM-512x512": 558_997_638,
}
# of most networks one in every run, the others with `make test-slow`
QUICK = (
    "DiT-XL-2-256x256",
    "uvit-imagenet256-H-2",
    "uvit-imagenet64-L-4",
    "edm-cifar10-32x32-cond-vp",
    "sedd-medium",
    "mdlm-owt",
    "radd-small",
    "ddbm-edges2handbags",
)


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in presets.PRESETS],
)
def test_a_preset_is_a_config_with_a_layout(name):
    preset = presets.get(name)
    config = preset.config()
    assert set(config) <= set(builder.SECTIONS)
    built = builder.build_method(config, preset.spec())
    shapes = import_torch.abstract_params(built)
    found = {mapping._path(p): v for p, v in jax.tree_util.tree_leaves_with_path(shapes)}
    layout = import_torch.layout(config, built)
    assert sorted(leaf.ours for leaf in layout.leaves) == sorted(found)
    count = sum(int(np.prod(v.shape)) for v in found.values())
    assert count == COUNTS.get(name, count)
    assert built.method.default_sampler.nfe == config["method"]["nfe"]
    batch = jax.tree.map(jax.numpy.asarray, built.spec.zeros(1))
    drawn = jax.eval_shape(lambda p, b: built.method.sample(p, jax.random.key(0), b), shapes, batch)
    assert drawn.shape == (1, *built.spec.shape)


def test_the_table_says_where_each_file_comes_from():
    lines = presets.table()
    for name, preset in presets.PRESETS.items():
        assert name in lines and preset.repository in lines and preset.file in lines
    assert import_torch.main(["list"]) == 0


def test_unknown_names_and_tokenizers():
    with pytest.raises(ValueError, match="unknown preset 'sedd-smal'; did you mean 'sedd-small'"):
        presets.get("sedd-smal")
    with pytest.raises(ValueError, match="a tokenizer is for text"):
        presets.get("DiT-XL-2-256x256").spec("tokenizer.json")

"""Configs name what exists; those of full scale are built and traced on a few pictures."""

import importlib
import inspect
import pkgutil

import jax
import numpy as np
import pytest

import configs
from diffusion_jax import builder, registry
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.methods.base import Context
from diffusion_jax.processes.preconditioning import TIME_INPUTS
from diffusion_jax.registry import check_choice
from diffusion_jax.run import train_config

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(configs.__path__, "configs.")
    if not m.ispkg and m.name not in ("configs.common", "configs.restoration")
)
FOLDERS = (
    "configs.dbim.imagenet_inpainting",
    "configs.ddbm.diode",
    "configs.ddbm.edges2handbags",
    *(m for m in MODULES if m.startswith(("configs.cdbm.", "configs.i2sb."))),
)


@pytest.mark.parametrize("module", MODULES)
def test_a_config_names_what_exists(module):
    found = importlib.import_module(module)
    assert "--config=" + module.replace(".", "/") + ".py" in found.__doc__
    config = found.get_config()
    builder.check_sections(config)
    for kind in ("data", "process", "network", "method"):
        if kind not in config:
            continue
        name, options = builder.section(config, kind)
        takes = inspect.signature(registry.get(kind, name)).parameters
        if kind == "network" and "size" in options:
            options |= registry.entry(kind, name).meta["sizes"][options.pop("size")]
        if kind == "network" and "time_input" in options:
            check_choice("time_input", options.pop("time_input"), TIME_INPUTS)
        if not any(p.kind == p.VAR_KEYWORD for p in takes.values()):
            assert set(options) <= set(takes), kind
    train_config(config)


TEXTS = (
    "configs.mdlm.lm1b",
    pytest.param("configs.mdlm.openwebtext", marks=pytest.mark.slow),
    pytest.param("configs.radd.openwebtext", marks=pytest.mark.slow),
    pytest.param("configs.radd.openwebtext:medium", marks=pytest.mark.slow),
    "configs.sedd.openwebtext",
    "configs.sedd.openwebtext:uniform",
    "configs.udlm.text8",
    "configs.bd3lm.openwebtext",
)


@pytest.mark.parametrize("module", TEXTS)
def test_text_of_full_scale_from_tokens_to_losses(module):
    """Shapes alone, with as many tokens as GPT-2's vocabulary has."""
    name, _, size = module.partition(":")
    config = importlib.import_module(name).get_config(*([size] if size else []))
    length = config.data.length
    elements = {"tokens": Element((length,), "int32")}
    spec = DataSpec(kind="tokens", elements=elements, vocab_size=50_257)
    built = builder.build_method(config, spec)
    key, batch = jax.random.key(0), spec.zeros(2)
    params = jax.eval_shape(built.method.init, key, batch)
    loss = lambda p, b: built.method.loss(p, key, b, Context(batch_size=2))
    value, metrics = jax.eval_shape(loss, params, batch)
    assert {value.shape, *(m.shape for m in metrics.values())} == {()}
    drawn = jax.eval_shape(lambda p, b: built.method.sample(p, key, b), params, batch)
    assert (drawn.shape, drawn.dtype) == ((2, length), np.int32)


LATENTS = DataSpec(
    kind="image",
    elements={"image": Element((32, 32, 4), "float32"), "label": Element((), "int32")},
    num_classes=1000,
)
IMAGES = ("configs.dit.imagenet256:B/4", "configs.uvit.imagenet", "configs.uvit.imagenet:64-M")


@pytest.mark.parametrize("module", IMAGES)
def test_images_of_full_scale_from_shapes_to_losses(module):
    name, _, size = module.partition(":")
    config = importlib.import_module(name).get_config(*([size] if size else []))
    config.method.nfe = 4
    built = builder.build_method(config, LATENTS)
    key, batch = jax.random.key(0), LATENTS.zeros(2)
    params = jax.eval_shape(built.method.init, key, batch)
    loss = lambda p, b: built.method.loss(p, key, b, Context(batch_size=2))
    value, metrics = jax.eval_shape(loss, params, batch)
    assert {value.shape, *(m.shape for m in metrics.values())} == {()}
    drawn = jax.eval_shape(lambda p, b: built.method.sample(p, key, b), params, batch)
    assert drawn.shape == batch["image"].shape


# ten seconds each: three of different kinds in every run, the others in `make test-slow`
_EVERY_RUN = ("configs.ddbm.edges2handbags", "configs.i2sb.super_resolution", "configs.cdbm.diode")


@pytest.mark.parametrize(
    "module",
    [m if m in _EVERY_RUN else pytest.param(m, marks=pytest.mark.slow) for m in FOLDERS],
)
def test_bridges_of_full_scale_from_files_to_losses(module, tmp_path):
    """Shapes alone: nothing of this size runs in a test."""
    PIL = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 32, 3), np.uint8)
    for i, image in enumerate(pixels):
        path = tmp_path / ("train", "test")[i % 2] / f"class{i // 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.fromarray(image).save(path)
    config = importlib.import_module(module).get_config()
    config.data.root = str(tmp_path)
    source = builder.build_data(config, "train")
    size = config.data.size
    assert source.spec.shape == source.spec.elements["source"].shape == (size, size, 3)
    built = builder.build_method(config, source.spec)
    batch = source.take(np.arange(2)) | {"index": np.arange(2, dtype=np.int32)}
    key = jax.random.key(0)
    params = jax.eval_shape(built.method.init, key, batch)
    loss = lambda p, b: built.method.loss(p, key, b, Context(batch_size=2))
    value, metrics = jax.eval_shape(loss, params, batch)
    assert {value.shape, *(m.shape for m in metrics.values())} == {()}
    drawn = jax.eval_shape(lambda p, b: built.method.sample(p, key, b), params, batch)
    assert drawn.shape == batch["image"].shape
    for options in config.evaluate.samplers:
        name = options["name"]
        rest = {k: v for k, v in options.items() if k != "name"}
        assert built.method.build_sampler(name, **rest).nfe == options["nfe"]

"""From an official file to samples: the whole path, against the authors' arithmetic."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import __main__, builder, processes
from diffusion_jax import run as runs
from diffusion_jax.data import described
from diffusion_jax.interop import files, import_torch
from diffusion_jax.interop.mapping import export_state
from diffusion_jax.methods import score
from diffusion_jax.methods.told import Told
from diffusion_jax.networks import DiT
from diffusion_jax.processes import preconditioning
from diffusion_jax.training import restore_params
from tests.golden_files import golden
from tests.quick_jit import quick_jit

DIT = {
    "data": {"name": "described", "kind": "image", "shape": (8, 8, 4), "num_classes": 7},
    "process": {"name": "discrete_vp"},
    "network": {
        "name": "dit",
        "patch_size": 2,
        "width": 48,
        "depth": 2,
        "heads": 4,
        "out_channels": 8,
        "time_input": "index",
        "time_scale": 1.0,
    },
    "method": {
        "name": "score",
        "parameterization": "eps",
        "weighting": "eps",
        "learned_variance": True,
        "guidance": 1.5,
        "guided_channels": 3,
        "clip": False,
        "sampler": "ddim",
        "nfe": 4,
        "sampler_options": {"grid": "respaced"},
    },
}
SEDD = {
    "data": {"name": "described", "kind": "tokens", "shape": (11,), "vocab_size": 28},
    "process": {"name": "absorbing", "schedule": {"name": "linear", "eps_end": 1e-3}},
    "network": {"name": "ddit", "width": 48, "depth": 2, "heads": 3, "condition_width": 24},
    "method": {
        "name": "score_entropy",
        "label_dropout": 0.0,
        "sampler": "score_analytic",
        "nfe": 5,
    },
}
EDM = {
    "data": {"name": "described", "kind": "image", "shape": (16, 16, 3), "num_classes": 5},
    "process": {"name": "edm"},
    "network": {
        "name": "song_unet",
        "channels": 16,
        "channel_mults": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "augment_dim": 9,
    },
    "method": {"name": "score", "clip": False, "sampler": "edm_heun", "nfe": 3},
}
CASES = {
    "dit": (DIT, "systems_net_dit"),
    "ddit": (SEDD, "systems_net_ddit"),
    "song_unet": (EDM, "systems_net_edm_ddpmpp"),
}


def official(name):
    """The state dict in a golden file."""
    return {k[2:]: v for k, v in golden(name).items() if k.startswith("w/")}


@pytest.fixture
def import_file(tmp_path):
    """Runs the command on a config and a state dict: `(exit status, run folder)`."""

    def run(config, state, *more, name="weights.safetensors"):
        (tmp_path / "config.py").write_text(
            f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({config!r})\n"
        )
        file = tmp_path / name
        if state is not None:
            files.write_state(file, state)
        arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
        return import_torch.main([str(file), *arguments, *more]), tmp_path / "run"

    return run


@pytest.mark.parametrize("case", CASES)
def test_in_and_out_again(case, import_file, tmp_path, capsys):
    config, name = CASES[case]
    state = official(name)
    wrapped = {f"model.{key}": value for key, value in state.items()}
    status, workdir = import_file(config, wrapped | {"other.table": np.ones(2)})
    said = capsys.readouterr().out
    assert status == 0 and "left out" in said and "other.table" in said
    fixed = state.get("pos_embed", np.zeros(0)).size
    count = json.loads(str(golden(name)["config"]))["n_params"] - fixed
    assert f"{count:,} parameters" in said
    assert (workdir / "spec.json").is_file() and (workdir / "config.json").is_file()

    out = tmp_path / "out" / "again.safetensors"
    assert import_torch.main([f"--export={out}", f"--workdir={workdir}"]) == 0
    again = files.read_state(out)
    assert set(again) <= set(state)
    missing = set(state) - set(again)
    assert all("rotary" in key for key in missing), missing
    for key, value in again.items():
        np.testing.assert_allclose(value, state[key], rtol=0, atol=2e-7, err_msg=key)


def respaced_ddim(network, x, labels, null, weight, channels, steps):
    """guided-diffusion's loop on whole indices: its respacing, DDIM without noise, DiT's guidance."""
    kept = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    indices, at = [], 0.0
    for _ in range(steps):
        indices.append(round(at))
        at += 999 / (steps - 1)
    x = np.asarray(x, np.float64)
    for n in reversed(range(steps)):
        index = np.full(len(x), indices[n], np.float32)
        now, before = kept[indices[n]], kept[indices[n - 1]] if n else 1.0
        told = np.asarray(network(x, index, labels), np.float64)[..., : x.shape[-1]]
        free = np.asarray(network(x, index, 0 * labels + null), np.float64)[..., : x.shape[-1]]
        eps = told.copy()
        eps[..., :channels] = (free + weight * (told - free))[..., :channels]
        x0 = (x - np.sqrt(1.0 - now) * eps) / np.sqrt(now)
        x = np.sqrt(before) * x0 + np.sqrt(1.0 - before) * eps
    return x


def test_an_official_dit_draws_what_its_authors_loop_draws(import_file, tmp_path):
    status, workdir = import_file(DIT, official("systems_net_dit"))
    assert status == 0
    command = ["sample", f"--workdir={workdir}", "--num=3", f"--out={tmp_path / 'x.npz'}"]
    assert __main__.main([*command, "--seed=5"]) == 0
    with np.load(tmp_path / "x.npz") as drawn:
        samples, labels = drawn["samples"], drawn["label"]

    run = runs.open_run(workdir)
    fields = {k: v for k, v in DIT["network"].items() if k not in ("name", "time_input")}
    module = DiT(num_classes=7, **fields)
    network = quick_jit(lambda x, t, y: module.apply({"params": run.params}, x, t, label=y))
    start, _ = jax.random.split(jax.random.key(5))
    x = run.method.process.prior(start, (3, 8, 8, 4))
    call = lambda x, t, y: network(x.astype(np.float32), t, y)
    expected = respaced_ddim(call, x, labels, 7, 1.5, 3, 4)
    assert np.abs(expected).max() < 1e3 and expected.std() > 0.1
    np.testing.assert_allclose(samples, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_an_official_sedd_gives_its_authors_scores(import_file):
    stored = golden("systems_net_ddit")
    status, workdir = import_file(SEDD, official("systems_net_ddit"))
    assert status == 0
    run = runs.open_run(workdir)
    tokens, sigma = stored["in/idx"].astype(np.int32), stored["in/sigma"]
    t = -np.expm1(-sigma) / (1 - 1e-3)
    denoise = lambda x, t: run.method.denoiser(run.params, {})(x, t)
    found = np.asarray(quick_jit(denoise)(tokens, jnp.asarray(t, jnp.float32)))
    other = np.arange(28) != tokens[..., None]  # of a token to itself the authors write 0
    expected = stored["out/sedd_log_score_f64"][..., :28]
    np.testing.assert_allclose(found[other], expected[other], rtol=0, atol=5e-5)


class Recorder:
    """A network that notes what it is told as the time."""

    num_classes = None

    def __init__(self):
        self.told = []

    def init(self, key, x, t):
        return {"params": {}}

    def apply(self, variables, x, t):
        self.told.append(np.asarray(t))
        return 0.0 * x


def told_of(process, kind="time", **method):
    """What a network is told on the way of a sampler."""
    network = Recorder()
    module = network if kind == "time" else Told(network, process, kind)
    made = score(process, module, described("image", (2, 2, 1)).spec, **method)
    with jax.disable_jit():
        made.sample({}, jax.random.key(0), {"index": jnp.arange(1)})
    return np.array(network.told).reshape(-1)


@pytest.mark.parametrize("kind, first", [("index", 0), ("step", 1)])
def test_networks_are_told_whole_official_steps(kind, first):
    process = processes.discrete_vp("scaled_linear")
    options = {
        "parameterization": "eps",
        "sampler": "ddim",
        "sampler_options": {"grid": "respaced"},
    }
    told = told_of(process, kind, nfe=5, **options)
    indices = [round(n * 999 / 4) for n in range(5)]
    assert told.dtype == np.float32
    np.testing.assert_array_equal(told, np.array(indices[::-1], np.float32) + first)


def test_every_level_is_whole_in_float32():
    for process in (processes.discrete_vp(), processes.discrete_vp("cosine")):
        count = process.num_train_steps
        t = (np.arange(count) + 1) / count
        for times in (t, jnp.asarray(t, jnp.float32)):
            index = preconditioning.time_input("index", process, times)
            np.testing.assert_array_equal(index, np.arange(count))
            step = preconditioning.time_input("step", process, times)
            np.testing.assert_array_equal(step, np.arange(count) + 1)
    between = preconditioning.time_input("index", process, jnp.asarray([0.0, 0.5005, 1.0]))
    np.testing.assert_allclose(between, [0.0, 0.5005 * count - 1, count - 1], atol=1e-4)


def test_edms_networks_are_told_a_quarter_of_the_logarithm():
    process = processes.EDM()
    told = told_of(process, parameterization="edm", sampler="edm_heun", nfe=5)
    steps = np.arange(3) / 2
    sigma = (80 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    calls = np.append(sigma[0], np.repeat(sigma[1:], 2))
    np.testing.assert_allclose(told, np.log(calls) / 4, rtol=2e-7, atol=1e-7)


def test_what_training_from_weights_reads(import_file):
    status, workdir = import_file(DIT, official("systems_net_dit"))
    assert status == 0
    spec = runs.read_spec(workdir)
    built = builder.build_method(DIT, spec)
    shapes = import_torch.abstract_params(built)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    params = restore_params(workdir, target=shapes)  # what `train.init_from` calls
    mine = params["blocks"]["block"]["attention"]["qkv"]["kernel"][1]
    np.testing.assert_array_equal(mine, official("systems_net_dit")["blocks.1.attn.qkv.weight"].T)
    run = runs.open_run(workdir)
    assert (run.step, run.weights) == (0, "params")
    with pytest.raises(ValueError, match="'described', shapes without examples"):
        run.source("train").take([0])


@pytest.mark.parametrize("case", ["architecture", "size", "truncated", "pickle", "unet", "nan"])
def test_what_does_not_fit_writes_nothing(case, import_file, tmp_path, capsys):
    config, state, name = DIT, official("systems_net_dit"), "weights.safetensors"
    if case == "architecture":
        state, words = (
            official("systems_net_ddit"),
            ("missing: 31", "blocks.0.adaLN_modulation.1.bias", "unknown: "),
        )
    if case == "size":
        config = DIT | {"network": DIT["network"] | {"width": 96}}
        words = ("of another size", "blocks.0.attn.qkv.weight has shape (144, 48)", "(2, 96, 288)")
    if case == "truncated":
        path = files.write_state(tmp_path / name, state)
        path.write_bytes(path.read_bytes()[:-1000])
        state, words = None, ("damaged, or no safetensors file",)
    if case == "pickle":
        name = "network.pkl"
        (tmp_path / name).write_bytes(pickle.dumps({"ema": Touch(tmp_path / "ran")}))
        state, words = None, ("runs code when it is read", "convert it once")
    if case == "unet":
        config = DIT | {"network": {"name": "unet"}, "method": {"name": "score"}}
        words = ("'unet' has no official weights", "song_unet")
    if case == "nan":
        state = state | {"x_embedder.proj.bias": np.full(48, np.nan, np.float32)}
        words = ("x_embedder.proj.bias holds numbers that are not finite",)
    status, workdir = import_file(config, state, name=name)
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("import_torch: ")
    for word in words:
        assert word in said
    assert not workdir.exists() and not (tmp_path / "ran").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_run_is_not_overwritten(import_file, capsys):
    assert import_file(EDM, official("systems_net_edm_ddpmpp"))[0] == 0
    before = capsys.readouterr()
    status, workdir = import_file(EDM, official("systems_net_edm_ddpmpp"))
    assert status == 2 and "holds a run already" in capsys.readouterr().err
    assert before.err == "" and runs.open_run(workdir).step == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["edm-cifar10-cond-vp", "x.pt"], "did you mean 'edm-cifar10-32x32-cond-vp'"),
        (["x.pt"], "PRESET FILE, or FILE with --config=CONFIG"),
        (["sedd-small", "x.safetensors", "--set=metod.nfe=3"], "section.field=value"),
        (
            ["sedd-small", "x.safetensors", "--set=method.nef=3"],
            "'score_entropy' has no such argument",
        ),
        (["sedd-small", "x.safetensors"], "no file 'x.safetensors'"),
        (["DiT-XL-2-256x256", "x.pt", "--tokenizer=t.json"], "a tokenizer is for text"),
        (["sedd-small", "x.safetensors", "--confg=3"], "unknown argument '--confg=3'"),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, tmp_path, capsys):
    assert import_torch.main([*arguments, f"--workdir={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_are_json_or_text():
    config = import_torch.changed(
        {"method": {"nfe": 3, "options": {"a": 1}}},
        ["method.nfe=50", "method.options.b=x y", 'data={"name": "tfds"}', "process.name=vp"],
    )
    assert config == {
        "method": {"nfe": 50, "options": {"a": 1, "b": "x y"}},
        "data": {"name": "tfds"},
        "process": {"name": "vp"},
    }


def test_text_is_read_through_the_tokenizer_given(import_file, tiny_tokenizer, tmp_path):
    """Weights made up, of a model of 280 tokens, under the names of the authors' wrapper."""
    tokenizer = tiny_tokenizer(tmp_path, "to be or not to be " * 20)
    fields = {"width": 12, "depth": 1, "heads": 2, "condition_width": 8}
    config = {
        "data": {"name": "described", "kind": "tokens", "shape": (8,), "vocab_size": 280},
        "process": {"name": "absorbing", "schedule": "linear"},
        "network": {"name": "ddit", "time_conditioned": False, **fields},
        "method": {"name": "masked", "label_dropout": 0.0, "nfe": 3},
    }
    config["data"]["tokenizer"] = str(tokenizer)
    built = builder.build_method(config, described("tokens", (8,), vocab_size=280).spec)
    shapes = import_torch.abstract_params(built)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    state = export_state(import_torch.layout(config, built), params)
    status, workdir = import_file(config, {f"backbone.{k}": v for k, v in state.items()})
    assert status == 0
    tokenizer.unlink()  # the folder has its own
    out = tmp_path / "x.txt"
    assert __main__.main(["sample", f"--workdir={workdir}", "--num=2", f"--out={out}"]) == 0
    assert out.read_text().strip()


@pytest.mark.slow
def test_training_goes_on_from_imported_weights(import_file, tmp_path):
    network = {"name": "dit", "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
    data = {"name": "described", "kind": "image", "shape": (8, 8, 1), "num_classes": 10}
    config = {"process": {"name": "vp"}, "network": network, "method": {"name": "score"}}
    built = builder.build_method(config, described("image", (8, 8, 1), num_classes=10).spec)
    shapes = import_torch.abstract_params(built)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    state = export_state(import_torch.layout(config, built), params)
    status, workdir = import_file(config | {"data": data}, state)
    assert status == 0
    train = {"steps": 1, "batch_size": 8, "init_from": str(workdir), "sample_every": 0}
    train |= {
        "optimizer": {"name": "adam", "learning_rate": 1e-9},
        "ema": (0.5,),
        "progress": False,
    }
    fine = tmp_path / "fine"
    runs.train_run(config | {"data": {"name": "digits"}, "train": train}, fine)
    found = runs.open_run(fine).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, params)

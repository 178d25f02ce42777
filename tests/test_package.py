"""What importing costs, and which module may import which."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

import diffusion_jax

ROOT = pathlib.Path(diffusion_jax.__file__).parent
MODULES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))

# Layers of the design: a module imports from its own part and from those below.
LAYERS = (
    {"__init__", "typing", "numerics", "registry", "array_files", "placement"},
    {"processes", "oracles", "data"},
    {"denoisers", "fields"},
    {"objectives", "samplers", "guidance", "networks"},
    {"methods"},
    {"training", "evaluation"},
    {
        "builder",
        "doctor",
        "run",
        "judge",
        "judge_features",
        "judge_text",
        "commands",
        "evaluate_commands",
        "interop",
        "__main__",
    },
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
CORE = {"typing", "numerics", "registry", "array_files", "placement", "processes", "oracles"}
CORE |= {"denoisers", "fields", "objectives", "samplers", "guidance", "methods"}


def part_of(path):
    return path.split("/")[0].removesuffix(".py")


def imports(path):
    """`(module, names, whether at module level)` of every import in a file."""
    tree = ast.parse((ROOT / path).read_text(), path)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, (), id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, tuple(a.name for a in node.names), id(node) not in inside


def own_parts(module, names):
    """Parts of this package that an import reaches."""
    pieces = module.split(".")
    if pieces[0] != "diffusion_jax":
        return set()
    if len(pieces) > 1:
        return {pieces[1]}
    return {n for n in names if n in RANK} or {"__init__"}


def test_every_module_has_a_layer():
    assert {part_of(path) for path in MODULES} <= set(RANK)


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_down(path):
    part = part_of(path)
    for module, names, _ in imports(path):
        for other in own_parts(module, names) - {part, "__init__"}:
            same_layer = RANK[other] == RANK[part]
            assert RANK[other] < RANK[part] or (same_layer and RANK[part] == len(LAYERS) - 1), (
                f"{path} imports {module}: {other} is not below {part}"
            )


@pytest.mark.parametrize("path", MODULES)
def test_third_party_imports_stay_where_they_belong(path):
    part = part_of(path)
    allowed = {
        "flax": {"networks", "training", "interop"},
        "ml_collections": {"builder", "commands"},
        "tensorflow": set(),
        "tensorflow_datasets": {"data"},
        "grain": {"data"},
        "array_record": {"data"},
        "sklearn": {"data"},
        "librosa": {"data", "evaluation"},
        "soundfile": {"data"},
        "torch": {"interop"},
        "matplotlib": {"evaluation"},
        "diffrax": {"samplers"},
        "equinox": {"samplers"},
    }
    lazy = {
        "diffrax",
        "equinox",
        "tensorflow_datasets",
        "grain",
        "array_record",
        "sklearn",
        "librosa",
        "soundfile",
        "matplotlib",
        "PIL",
        "torch",
    }
    for module, _, top in imports(path):
        package = module.split(".")[0]
        if package in allowed:
            assert part in allowed[package], f"{path} imports {package}"
        if package in lazy:
            assert not top, f"{path} imports {package} at module level"
        if part in CORE:
            known = {"jax", "numpy", "diffusion_jax"} | sys.stdlib_module_names
            known |= {"diffrax", "equinox", "optax"} if part == "samplers" else set()
            known |= {"optax"} if part == "methods" else set()  # a discriminator's optimizer
            assert package in known and not (top and package == "optax"), (
                f"{path}: core modules import jax and numpy only, not {package}"
            )


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_importing_the_package_imports_next_to_nothing():
    code = """
import json, sys, time
start = time.perf_counter()
import diffusion_jax
seconds = time.perf_counter() - start
heavy = ["jax", "numpy", "flax", "optax", "orbax", "matplotlib", "ml_collections", "tensorflow"]
print(json.dumps([seconds, [m for m in heavy if m in sys.modules], dir(diffusion_jax)]))
"""
    seconds, loaded, names = run_python(code)
    assert seconds < 0.5 and loaded == []
    assert {"processes", "samplers", "sample", "Sampler", "Denoiser", "__version__"} <= set(names)


def test_the_core_needs_jax_and_numpy_only():
    code = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError(f"{name} is not here")
refused = ["flax", "optax", "orbax", "ml_collections", "matplotlib", "tensorflow", "sklearn", "PIL",
           "tensorflow_datasets", "grain", "clu", "chex", "torch", "tqdm", "absl"]
sys.meta_path.insert(0, Refuse())
import diffusion_jax as dj
process = dj.processes.VP()
oracle = dj.oracles.Gaussian(process, [0.5], [[0.25]])
dj.objectives, dj.guidance, dj.methods, dj.denoisers, dj.data
import jax
sampler = dj.samplers.dpm_solver_pp(process, num_steps=3)
x = dj.sample(sampler, oracle, jax.random.key(0), process.prior(jax.random.key(1), (2, 1)))
print(json.dumps([list(x.shape), [m for m in refused if m in sys.modules]]))
"""
    shape, loaded = run_python(code)
    assert shape == [2, 1] and loaded == []


def test_public_names_resolve():
    for name in diffusion_jax.__all__:
        assert getattr(diffusion_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'proceses'"):
        getattr(diffusion_jax, "proceses")  # noqa: B009

"""Every command and every example of the README is run here; one that is not known fails the test."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TINY = [
    "--config.train.steps=4",
    "--config.train.batch_size=16",
    "--config.train.sample_every=0",
    "--config.train.progress=false",
    "--config.train.optimizer.schedule.warmup_steps=1",
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    """The commands of the shell blocks, without comments and with continued lines joined."""
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(line.split("#")[0].split())
            if command:
                yield command


def run(command, cwd, status=0, timeout=600, more=()):
    words = command.split()
    assert words[:2] == ["python", "-m"], command
    done = subprocess.run(
        [sys.executable, *words[1:], *more],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def command_for(*words):
    (found,) = {c for c in commands() if all(w in c.split() or w in c for w in words)}
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like a clone: run folders land in it, not in the repository."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "experiments", "diffusion_jax", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_command_line_section(checkout):
    trained = command_for("train", "--workdir=runs/score")
    run(trained, checkout, more=TINY)
    run(command_for("sample", "--out=runs/grid.png"), checkout)
    assert "bits per dimension" in run(command_for("likelihood"), checkout)
    assert "256 examples" in run(command_for("diffusion_jax statistics"), checkout)
    run(command_for("sample", "--sampler=dpm_solver_v3"), checkout)
    assert (checkout / "runs" / "v3.png").is_file()
    assert (checkout / "runs" / "grid.png").is_file()
    assert "held-out data" in run(command_for("evaluate", "--workdir=runs/score"), checkout)
    assert "FLOP" in run(command_for("inspect"), checkout)
    assert "dpmpp_2m" in run(command_for("diffusion_jax list"), checkout)
    assert "all well" in run(command_for("doctor"), checkout)


def test_commands_that_need_what_is_not_here_say_so(checkout, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(checkout / "none"))
    fashion = command_for("train", "fashion_mnist.py")
    assert "diffusion_jax.data.prepare" in run(fashion, checkout, status=2)
    pod = command_for("train", "--distributed")
    message = run(pod, checkout, status=2)
    assert len(message.strip().splitlines()) == 1
    prepare = command_for("diffusion_jax.data.prepare")
    assert "--manual_dir" in run(prepare.split(" --")[0] + " --help", checkout)


@pytest.mark.parametrize(
    "words, said",
    [
        (("import_torch", "runs/dit", "DiT-XL-2-256x256.pt"), "DiT-XL-2-256x256.pt"),
        (("import_torch", "--export=dit.safetensors"), "runs/dit"),
        (("interop.convert",), "pt_inception-2015-12-05-6726825d.pth"),
        (("--features=inception",), "runs/cifar"),
        (("--text_model=gpt2-large",), "runs/text"),
    ],
)
def test_what_needs_files_of_others_names_them(checkout, words, said):
    message = run(command_for(*words), checkout, status=2)
    assert said in message and len(message.strip().splitlines()) == 1


def test_presets_are_listed(checkout):
    listed = run(command_for("import_torch list"), checkout)
    assert "DiT-XL-2-256x256" in listed and "facebookresearch/DiT" in listed


def test_make_targets_run_what_the_readme_says(checkout):
    expected = {"make demo": "experiments.demo", "make test": "pytest"}
    for command, needle in expected.items():
        assert command in set(commands())
        shown = subprocess.run(
            ["make", "-n", command.split()[1]], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert needle in shown
    assert "`make benchmark`" in README


@pytest.mark.slow
def test_demo_runs_and_reports_honestly(checkout):
    # so few steps teach nothing: the demo must say so, and write everything all the same
    shown = run("python -m experiments.demo --workdir=runs/demo --steps=102", checkout, status=1)
    assert "does not hold" in shown and "| score" in shown and "noise" in shown
    demo = checkout / "runs" / "demo"
    for name in ("metrics.json", "table.md", "overview.png", "score/trajectory.png"):
        assert (demo / name).is_file()
    for family in ("score", "bridge", "masked"):
        assert len(list((demo / family).glob("*.png"))) >= 3


def test_no_command_is_left_out():
    known = (
        "make demo",
        "make test",
        "python -m diffusion_jax ",
        "python -m diffusion_jax.data.prepare",
        "python -m diffusion_jax.interop.",
    )
    for command in commands():
        assert command.startswith(known), f"no test runs {command!r}"
    assert len(set(commands())) == 20


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples(number, capsys):
    example = blocks("python")[number]
    exec(compile(example, f"README example {number}", "exec"), {})
    printed = capsys.readouterr().out
    if "adams_bashforth" in example:
        errors = [float(line.split()[1]) for line in printed.splitlines()]
        assert errors[0] / errors[1] > 3.0 and errors[1] / errors[2] > 3.0  # second order
    elif "token_table" in example:
        found = re.search(r"bound ([\d.]+) exact ([\d.]+)", printed)
        assert abs(float(found[1]) - float(found[2])) < 0.2  # 500 draws, an error of about 0.05
        assert "radd 4" in printed
    elif "dbim_encode" in example:
        assert float(printed.split("off by ")[1].split()[0]) < 1e-4
        assert "(4, 3)" in printed
    else:
        assert "network calls" in printed

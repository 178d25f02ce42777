import json
import os
import signal
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.toy import (
    CONFIG,
    ToyMethod,
    ToyPipeline,
    assert_same_bits,
    run_python,
    start_python,
    toy_method,
)

from diffusion_jax.methods.base import Context
from diffusion_jax.training import (
    CheckpointError,
    Checkpoints,
    ConfigChanged,
    NonFiniteError,
    restore_params,
    train,
)
from diffusion_jax.training.console import catch_signals
from diffusion_jax.training.metrics import read_rows
from diffusion_jax.training.state import SAMPLE_FOLD

TIMES = {"steps_per_second", "examples_per_second"}


def toy_train(folder, pipeline=None, method=None, **changes):
    options = {k: changes.pop(k) for k in list(changes) if k in ("sample_fn", "accept_changes")}
    options |= {k: changes.pop(k) for k in list(changes) if k in ("fallback", "resolved")}
    config = CONFIG | changes
    return train(method or toy_method(), pipeline or ToyPipeline(), config, folder, **options)


def rows_of(folder):
    return [
        {k: v for k, v in row.items() if k not in TIMES}
        for row in read_rows(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps: its folder and its result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, toy_train(folder)


def test_a_run_leaves_what_it_promises(whole):
    folder, result = whole
    assert (result.status, result.step) == ("finished", 12)
    assert [row["step"] for row in rows_of(folder)] == [4, 8, 12]
    assert {"loss", "absolute", "grad_norm", "param_norm", "learning_rate"} < set(
        rows_of(folder)[0]
    )
    assert TIMES < set(read_rows(folder / "metrics.jsonl")[0])
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["seed"] == 0 and config["train"]["optimizer"]["name"] == "adam"
    assert json.loads((folder / "versions.json").read_text())["jax"] == jax.__version__
    assert json.loads((folder / "report.json").read_text())["parameters"] == 4 * 8 + 8 + 8
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 8, 12]
    assert_same_bits(restore_params(folder), result.state.ema["0.9"])
    assert_same_bits(restore_params(folder, "params"), result.state.params)


def test_rows_are_means_of_the_losses(whole):
    folder, _ = whole
    method, losses = toy_method(), []
    with Checkpoints(folder, read_only=True) as checkpoints:
        params = checkpoints.restore_item("params", step=4)
    # Only the parameters of steps 4, 8, 12 are kept: the first loss of the second row is known.
    key = jax.random.fold_in(jax.random.key(0), 4)
    losses.append(method.loss(params, key, ToyPipeline().batch(4), Context(batch_size=16))[0])
    one = toy_train(folder.parent / "every", log_every=1, steps=8)
    each = [row["loss"] for row in rows_of(folder.parent / "every")]
    assert each[4] == pytest.approx(float(losses[0]), rel=1e-6)
    for row, part in zip(rows_of(folder), (each[:4], each[4:])):
        assert row["loss"] == pytest.approx(np.mean(part), rel=1e-7)
    assert one.metrics["loss"] == each[-1]


def test_two_runs_have_the_same_bits(whole, tmp_path):
    folder, result = whole
    assert_same_bits(toy_train(tmp_path).state, result.state)
    assert rows_of(tmp_path) == rows_of(folder)


@pytest.mark.parametrize("stop", [5, 8])
def test_a_resumed_run_has_the_same_bits(whole, tmp_path, stop):
    folder, result = whole
    first = toy_train(tmp_path, steps=stop)
    assert (first.status, first.step) == ("finished", stop)
    # The last row of a run that ends between rows is not one of the longer run's.
    second = toy_train(tmp_path)
    assert_same_bits(second.state, result.state)
    if stop == 8:
        assert rows_of(tmp_path) == rows_of(folder)


def test_a_finished_run_is_left_alone(whole):
    folder, result = whole
    before = (folder / "metrics.jsonl").read_text()
    again = toy_train(folder)
    assert (again.status, again.step, again.metrics) == ("finished", 12, {})
    assert_same_bits(again.state, result.state)
    assert (folder / "metrics.jsonl").read_text() == before


RUN = """
import os, signal, sys, logging
from training.toy import CONFIG, ToyPipeline, toy_method
from diffusion_jax.training import train

class Slow(ToyPipeline):
    def iterate(self, start):
        import time
        for step, batch in super().iterate(start):
            print("STEP", step, flush=True)
            {at_step}
            yield step, batch

result = train(toy_method(), Slow(), dict(CONFIG, **{changes}), {folder!r})
print("RESULT", result.status, result.step)
"""


def child(folder, at_step="pass", **changes):
    return textwrap.dedent(RUN).format(folder=str(folder), at_step=at_step, changes=changes)


def test_kill_9_and_resume_has_the_same_bits(whole, tmp_path):
    folder, result = whole
    # Killed in step 10, two steps after the checkpoint of step 8 was begun.
    process = start_python(
        child(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if step == 10 else 0")
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert [row["step"] for row in rows_of(tmp_path)] == [4, 8]
    resumed = toy_train(tmp_path)
    assert_same_bits(resumed.state, result.state)
    assert rows_of(tmp_path) == rows_of(folder)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == 12
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_sigterm_saves_and_ends_cleanly(whole, tmp_path):
    folder, result = whole
    process = start_python(child(tmp_path, "time.sleep(0.3)", steps=10_000))
    for line in process.stdout:
        if line.startswith("STEP 6"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    status, step = output.split("RESULT")[1].split()
    assert status == "preempted" and 6 <= int(step) < 12
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == int(step)
    resumed = toy_train(tmp_path)
    assert_same_bits(resumed.state, result.state)
    # Rows in the middle of which the run was stopped are those of the uninterrupted run too.
    assert rows_of(tmp_path) == rows_of(folder)


def test_signals_are_caught_once_and_handlers_restored(request):
    started_with = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, started_with))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with catch_signals() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.time() + 5
        while not interrupted() and time.time() < deadline:
            time.sleep(0.01)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_training_works_outside_the_main_thread(whole, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(toy_train(tmp_path, steps=4)))
    thread.start()
    thread.join()
    assert results[0].step == 4


def test_not_finite_names_the_step_and_keeps_the_state(whole, tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"step 6: loss nan.*kept: step 6's checkpoint"
    ) as caught:
        toy_train(tmp_path, ToyPipeline(poison=6))
    assert (caught.value.step, caught.value.kept) == (6, 6)
    good = toy_train(tmp_path.parent / "six", steps=6)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 6]
        assert_same_bits(checkpoints.restore_item("params"), good.state.params)
        assert_same_bits(checkpoints.restore_item("ema_0.5"), good.state.ema["0.5"])
    # With the data mended the run goes on to the bits of the one that never failed.
    assert_same_bits(toy_train(tmp_path).state, whole[1].state)
    assert rows_of(tmp_path) == rows_of(whole[0])


def test_parameters_that_blow_up_keep_the_last_good_checkpoint(tmp_path):
    schedule = {"name": "warmup", "warmup_steps": 1}
    optimizer = {"name": "sgd", "learning_rate": 1e38, "schedule": schedule}
    with pytest.raises(
        NonFiniteError, match=r"step 1: .* param_norm inf; kept: step 1's"
    ) as caught:
        toy_train(tmp_path, optimizer=optimizer, checkpoint_every=1, log_every=1)
    assert (caught.value.step, caught.value.kept) == (1, 1)
    assert np.isfinite(restore_params(tmp_path, "params")["out"]["kernel"]).all()


def test_samples_are_drawn_with_the_first_average_and_one_key(tmp_path):
    seen = []

    def sample_fn(params, key, step):
        seen.append((params, jax.random.key_data(key), step))
        return jax.random.uniform(key, (3, 4, 4, 1))

    result = toy_train(tmp_path, sample_fn=sample_fn, sample_every=5, steps=7)
    assert [step for _, _, step in seen] == [5, 7]
    assert_same_bits(seen[-1][0], result.state.ema["0.9"])
    expected = jax.random.key_data(jax.random.fold_in(jax.random.key(0), SAMPLE_FOLD))
    assert all((key == expected).all() for _, key, _ in seen)
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == ["samples_00000005.png", "samples_00000007.png"]
    pngs = [p.read_bytes() for p in (tmp_path / "samples").iterdir()]
    assert pngs[0] == pngs[1]


def test_a_users_exception_is_seen_as_it_is(tmp_path):
    def sample_fn(params, key, step):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        toy_train(tmp_path, sample_fn=sample_fn, sample_every=4)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4]  # saved before the samples were drawn


def test_another_config_is_refused_unless_accepted(tmp_path):
    toy_train(tmp_path, steps=4, resolved={"network": {"width": 8}})
    with pytest.raises(ConfigChanged, match=r"network\.width: 8 -> 9"):
        toy_train(tmp_path, steps=8, resolved={"network": {"width": 9}})
    with pytest.raises(ConfigChanged, match=r"train\.seed: 0 -> 1"):
        toy_train(tmp_path, resolved={"network": {"width": 8}}, seed=1)
    message = r"params/hidden/bias is float32\[8\] in the checkpoint, float32\[9\] here"
    with pytest.raises(CheckpointError, match=message):
        toy_train(tmp_path, method=toy_method(width=9), accept_changes=True)
    assert toy_train(tmp_path, steps=8, accept_changes=True, seed=1).step == 8


def test_a_damaged_checkpoint_is_an_error_and_a_fallback(whole, tmp_path):
    toy_train(tmp_path)
    (table,) = (tmp_path / "checkpoints" / "12" / "opt" / "d").iterdir()
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="checkpoints/12 is damaged: opt/"):
        toy_train(tmp_path)
    resumed = toy_train(tmp_path, fallback=True)
    assert_same_bits(resumed.state, whole[1].state)
    assert rows_of(tmp_path) == rows_of(whole[0])
    assert (tmp_path / "checkpoints" / "12.damaged").exists()
    assert toy_train(tmp_path).step == 12


def test_a_pipeline_may_have_batches_only(whole, tmp_path):
    class Batches:
        batch = staticmethod(ToyPipeline().batch)

    assert_same_bits(toy_train(tmp_path, Batches()).state, whole[1].state)


def test_a_pipeline_is_closed(tmp_path):
    closed = []

    class Closing(ToyPipeline):
        def iterate(self, start):
            try:
                yield from super().iterate(start)
            finally:
                closed.append(True)

    toy_train(tmp_path, Closing(), steps=2)
    assert closed == [True]


def test_no_average_no_checkpoints_no_steps(tmp_path):
    result = toy_train(tmp_path / "a", ema=(), checkpoint_every=0, steps=3)
    with Checkpoints(tmp_path / "a", read_only=True) as checkpoints:
        assert checkpoints.steps() == [3]
    assert_same_bits(restore_params(tmp_path / "a"), result.state.params)
    nothing = toy_train(tmp_path / "b", steps=0)
    assert (nothing.step, nothing.metrics) == (0, {})
    assert_same_bits(toy_train(tmp_path / "b", steps=3, ema=CONFIG["ema"]).state.step, jnp.int32(3))


def test_method_state_is_saved_and_resumed(tmp_path):
    base = toy_method()

    class Counting(ToyMethod):
        def init_state(self, key, params, batch):
            return {"count": jnp.zeros(())}

    def loss(params, key, batch, context):
        value, metrics = base.loss(params, key, batch, context)
        return value, metrics | {"method_state": {"count": context.state["count"] + 1}}

    method = Counting(base.init, loss)
    toy_train(tmp_path, method=method, steps=4)
    assert float(toy_train(tmp_path, method=method, steps=6).state.method_state["count"]) == 6.0


def test_importing_the_package_is_cheap():
    code = """
    import sys
    import diffusion_jax.training as training
    training.TrainConfig(), training.make_schedule
    print([m for m in ("orbax", "flax", "tensorboard", "ml_collections", "tqdm") if m in sys.modules])
    """
    assert run_python(textwrap.dedent(code)).strip() == "[]"

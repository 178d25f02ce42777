import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training.toy import BATCH, CONFIG, ToyMethod, ToyPipeline, assert_same_bits, toy_method

from diffusion_jax.methods.base import Context
from diffusion_jax.training import TrainConfig, Trainer, create_state, make_optimizer, update_ema
from diffusion_jax.training.state import BAD_GRADIENT, BAD_UPDATE, RUNNING, ema_rate
from diffusion_jax.training.step import make_train_step

ADAM = {"name": "adam", "learning_rate": 1e-2, "clip_norm": 1.0}


class Run:
    """Steps of the toy method, kept one by one."""

    def __init__(self, steps, method=None, pipeline=None, optimizer=ADAM, decays=(), **options):
        self.method, self.pipeline = method or toy_method(), pipeline or ToyPipeline()
        self.optimizer = make_optimizer(optimizer)
        self.key = jax.random.key(0)
        step = make_train_step(
            self.method, self.optimizer, batch_size=BATCH, decays=decays, **options
        )
        first = self.pipeline.batch(0)
        self.states = [create_state(self.method, self.optimizer, decays, self.key, first)]
        self.metrics = []
        self.step = jax.jit(step)
        for n in range(steps):
            state, metrics = self.step(self.states[-1], self.pipeline.batch(n), self.key)
            self.states.append(state)
            self.metrics.append(metrics)

    def params(self, n):
        return jax.tree.map(lambda x: np.asarray(x, np.float64), self.states[n].params)


def test_averages_follow_the_recursion():
    decays = (0.9, 0.5)
    run = Run(6, decays=decays)
    for decay in decays:
        expected = run.params(0)
        for n in range(1, 7):
            expected = jax.tree.map(
                lambda e, p, d=decay: d * e + (1 - d) * p, expected, run.params(n)
            )
        found = run.states[-1].ema[str(decay)]
        jax.tree.map(
            lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found, expected
        )


def test_average_warm_up():
    run = Run(4, decays=(0.999,), ema_warmup=True)
    expected = run.params(0)
    for n, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13]):
        expected = jax.tree.map(
            lambda e, p, d=decay: d * e + (1 - d) * p, expected, run.params(n + 1)
        )
    found = run.states[-1].ema["0.999"]
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found, expected
    )
    assert float(ema_rate(0.9, 10**6, warmup=True)) == pytest.approx(0.1)


def test_equal_parameters_are_a_fixed_point_of_the_average():
    params = {"w": jax.random.normal(jax.random.key(0), (1000,))}
    ema = params
    for _ in range(100):
        ema = update_ema(ema, params, 1.0 - 0.99999)
    assert_same_bits(ema, params)


def test_averages_wait_for_accumulated_updates():
    run = Run(6, optimizer=ADAM | {"accumulate": 3}, decays=(0.5,))
    changed = [
        not np.array_equal(a.ema["0.5"]["out"]["kernel"], b.ema["0.5"]["out"]["kernel"])
        for a, b in zip(run.states, run.states[1:])
    ]
    assert changed == [False, False, True, False, False, True]
    expected = (run.params(0)["out"]["kernel"] + run.params(3)["out"]["kernel"]) / 2
    np.testing.assert_allclose(run.states[3].ema["0.5"]["out"]["kernel"], expected, rtol=1e-6)


def test_metrics_are_what_they_say():
    run = Run(2)
    params, batch = run.states[1].params, run.pipeline.batch(1)
    loss = lambda p: run.method.loss(
        p, jax.random.fold_in(jax.random.key(0), 1), batch, Context(batch_size=BATCH)
    )[0]
    value, gradient = jax.value_and_grad(loss)(params)
    norm = lambda tree: np.sqrt(
        sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree))
    )
    metrics = run.metrics[1]
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norm(gradient), rel=1e-5)
    assert float(metrics["param_norm"]) == pytest.approx(norm(run.states[2].params), rel=1e-6)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)
    assert {"absolute", "halt"} < set(metrics)


def test_the_update_is_optax():
    run = Run(1)
    loss = lambda p: run.method.loss(
        p, jax.random.fold_in(run.key, 0), run.pipeline.batch(0), Context(batch_size=BATCH)
    )[0]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    start = run.states[0].params
    updates, _ = tx.update(jax.grad(loss)(start), tx.init(start), start)
    expected = optax.apply_updates(start, updates)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-7),
        run.states[1].params,
        expected,
    )


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_microbatches_change_nothing_but_rounding(parts):
    whole, split = Run(3, decays=(0.9,)), Run(3, decays=(0.9,), microbatches=parts)
    for a, b in zip(whole.metrics, split.metrics):
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-5), name
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-6),
        split.states[-1].params,
        whole.states[-1].params,
    )


@pytest.mark.parametrize("selected", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(selected, monkeypatch):
    if selected:  # the form for accelerators
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    run = Run(5, pipeline=ToyPipeline(poison=2), decays=(0.9,))
    assert [int(s.halt) for s in run.states] == [RUNNING] * 3 + [BAD_GRADIENT] * 3
    assert [int(s.step) for s in run.states] == [0, 1, 2, 2, 2, 2]
    for later in run.states[3:]:
        assert_same_bits(later.replace(halt=run.states[2].halt), run.states[2])
    assert np.isnan(run.metrics[2]["loss"]) and np.isfinite(run.metrics[3]["loss"])


def test_selection_and_branch_agree(monkeypatch):
    branch = Run(3, decays=(0.9,))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    select = Run(3, decays=(0.9,))
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-7),
        branch.states[-1],
        select.states[-1],
    )


def test_parameters_that_are_not_finite_halt_the_run():
    run = Run(3, optimizer={"name": "sgd", "learning_rate": 1e38})
    halts = [int(s.halt) for s in run.states]
    assert halts[-1] == BAD_UPDATE and halts[0] == RUNNING
    bad = halts.index(BAD_UPDATE)
    assert np.isinf(run.metrics[bad - 1]["param_norm"]) and np.isfinite(
        run.metrics[bad - 1]["loss"]
    )
    assert int(run.states[-1].step) == bad


def test_method_state_rides_along_and_is_seen_by_the_loss():
    base = toy_method()

    class Stateful(ToyMethod):
        def init_state(self, key, params, batch):
            return {"count": jnp.zeros(()), "teacher": params}

    def loss(params, key, batch, context):
        value, _ = base.loss(params, key, batch, context)
        pull = context.state["teacher"]["out"]["kernel"] - params["out"]["kernel"]
        state = {**context.state, "count": context.state["count"] + 1}
        seen = context.state["count"]
        return value + jnp.sum(pull**2), {"seen": seen, "method_state": state}

    run = Run(3, method=Stateful(base.init, loss))
    assert [float(m["seen"]) for m in run.metrics] == [0.0, 1.0, 2.0]
    assert "method_state" not in run.metrics[0]
    assert_same_bits(run.states[-1].method_state["teacher"], run.states[0].params)
    assert float(run.states[-1].method_state["count"]) == 3.0


def test_context_has_the_first_average_and_the_step():
    seen = {}

    def loss(params, key, batch, context):
        seen.update(ema=context.ema, batch_size=context.batch_size)
        gap = params["out"]["kernel"] - context.ema["out"]["kernel"]
        return toy_method().loss(params, key, batch, context)[0], {
            "gap": jnp.abs(gap).max(),
            "at": context.step,
        }

    run = Run(2, method=ToyMethod(toy_method().init, loss), decays=(0.9, 0.0))
    assert seen["batch_size"] == BATCH
    assert [float(m["at"]) for m in run.metrics] == [0.0, 1.0]
    # With decay 0 the average is the parameters, with 0.9 it is not: the first one is given.
    assert float(run.metrics[0]["gap"]) == 0.0 < float(run.metrics[1]["gap"])


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        Run(1, decays=(0.9,), microbatches=2)


def test_one_trace_and_donated_buffers():
    traces = []
    pipeline = ToyPipeline()
    trainer = Trainer(toy_method(traces=traces), pipeline.batch(0), TrainConfig(**CONFIG))
    state = trainer.create(pipeline.batch(0))
    old = state
    for n in range(4):
        state, _ = trainer.step(state, pipeline.batch(n))
    assert traces == [BATCH]
    assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.ema, old.opt_state)))


def test_a_batch_of_another_shape_is_refused_in_one_line():
    trainer = Trainer(toy_method(), ToyPipeline().batch(0), TrainConfig(**CONFIG))
    state = trainer.create(ToyPipeline().batch(0))
    with pytest.raises(ValueError, match="a batch differs from the first one"):
        trainer.step(state, ToyPipeline(inputs=5).batch(0))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda e: (e, {}), "the loss of a method is a scalar; got shape \\(16,\\)"),
        (lambda e: (e.mean(), {"each": e}), "metric 'each' must be a scalar; got shape \\(16,\\)"),
    ],
)
def test_losses_and_metrics_are_scalars(result, message):
    def loss(params, key, batch, context):
        return result(batch["y"] * params["out"]["kernel"].sum())

    with pytest.raises(ValueError, match=message):
        Run(1, method=ToyMethod(toy_method().init, loss))


def test_bfloat16_parameters_keep_their_dtype():
    base = toy_method()
    low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    method = ToyMethod(
        lambda key, batch: low(base.init(key, batch)),
        lambda p, *rest: (base.loss(p, *rest)[0].astype(jnp.float32), {}),
    )
    run = Run(2, method=method, decays=(0.9,))
    kinds = {str(x.dtype) for x in jax.tree.leaves((run.states[-1].params, run.states[-1].ema))}
    assert kinds == {"bfloat16"} and run.metrics[-1]["grad_norm"].dtype == jnp.float32

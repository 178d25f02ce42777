"""LSD and LSD+: coefficients and times of a few steps, learned from many (arXiv 2509.19962).

The teacher is the same model walked in many steps; nothing of the network is trained. Along a teacher's
path x_0 .. x_N let P_n be the law of its step n, and Q_n(k, phi) what the student makes of that step: the
prediction of the call at the beginning of its own step k, held, with its coefficient. What is fitted is
  (1) coefficients  phi_k = argmin E sum over n in step k of d(P_n, Q_n(k, phi)), by Adam on log phi
  (2) times (LSD+)  the grid of least E sum_k sum over n in step k of d(P_n, Q_n(k, 1)), among all grids on
      a set of teacher times, by dynamic programming
with d "kl", the divergence of the two laws (summed over a path it bounds the KL divergence from the
teacher's samples to the student's), or "squared", the paper's squared distance of the scores. Calls of the
network are the teacher's alone: the tables of (2) and (1) are made of the same outputs.

Deviations from the paper and its code:
- teacher and student are compared at the same state. The paper compares scores on two separate paths; of
  independent draws that distance is least for a coefficient below 1 even where the student is exact,
  because it regresses one on the other. `states="student"` keeps what its way brings: the states are the
  student's own, errors of its earlier steps included, and the teacher goes on from each of them;
- a step is compared with what the teacher does during all of it, not at its beginning;
- the best grid is found, not descended to: the printed loss of LSD+ compares a student's step with one of
  the teacher's N, and has no gradient through the times at which the network is called;
- no factor 1.15 on the teacher's outputs; the divisibility of N by M is not asked for.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import join_traced, split_traced
from diffusion_jax.processes import Absorbing
from diffusion_jax.registry import check_choice
from diffusion_jax.samplers.lsd import (
    COEFFICIENTS,
    RULES,
    LearnedSteps,
    check_graph,
    jump_rate,
    lsd,
    scale_jumps,
    sequence_entropy,
    step_probs,
    stretch,
)
from diffusion_jax.samplers.scan import Sampler, sample

DISTANCES = ("kl", "squared")
STATES = ("teacher", "student")
_LEFT = 1e-3  # an Euler step that has surely revealed by now


class LSDReport(NamedTuple):
    """What a fit did; distances are sums over a path, means over the starts.

    Attributes:
      steps: the `LearnedSteps`, what `save_lsd` keeps.
      start: distance of the plain student: uniform times, phi = 1.
      regridded: with the times of the result and phi = 1.
      fitted: of the result.
      entropy_teacher, entropy_start, entropy: `sequence_entropy` of samples of the teacher, the plain
        student and the result. A result well below the teacher's repeats itself.
      seconds: wall time, compilation included.
    """

    steps: LearnedSteps
    start: float
    regridded: float
    fitted: float
    entropy_teacher: float
    entropy_start: float
    entropy: float
    seconds: float


def _check_options(process, nfe, teacher_steps, candidates, relax, iterations, states):
    check_graph(process)
    for name, value, low in (
        ("nfe", nfe, 1),
        ("teacher_steps", teacher_steps, 1),
        ("candidates", candidates, 1),
        ("iterations", iterations, 0),
    ):
        if not isinstance(value, int | np.integer) or value < low:
            raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")
    if teacher_steps < nfe or candidates < nfe:
        raise ValueError(
            f"{nfe} steps need a teacher of at least as many and as many times to choose from, got "
            f"{teacher_steps} and candidates={candidates}"
        )
    if not 0.0 <= relax < 1.0 or (relax and states != "student"):
        raise ValueError(f"relax must lie in [0, 1), and be 0 unless states='student'; got {relax}")


def _distance(kind, p, q, dt):
    """Distance of step laws `[B, L, S]`, mean over B."""
    if kind == "kl":
        small = jnp.finfo(p.dtype).tiny
        each = p * (jnp.log(jnp.maximum(p, small)) - jnp.log(jnp.maximum(q, small)))
    else:
        each = jnp.square(p - q) / dt
    return each.sum(axis=(1, 2)).mean()


def _best_grid(costs, steps):
    """Indices `[steps + 1]` from 0 to C of least total cost; `costs[a, b]` is that of a step a -> b."""
    size = costs.shape[0]
    best = np.full((steps + 1, size + 1), np.inf)
    came = np.zeros((steps + 1, size + 1), int)
    best[0, 0] = 0.0
    for m in range(1, steps + 1):
        for b in range(m, size + 1):
            totals = best[m - 1, :b] + costs[:b, b]
            came[m, b] = int(np.argmin(totals))
            best[m, b] = totals[came[m, b]]
    path = [size]
    for m in range(steps, 0, -1):
        path.append(came[m, path[-1]])
    return np.array(path[::-1])


def _even(count, steps):
    return np.round(np.linspace(0, count, steps + 1)).astype(int)


def fit_lsd(
    process,
    denoise: Callable,
    key: Any,
    x_init: Any,
    *,
    nfe: int,
    length: int | None = None,
    coefficient: str | None = "rate",
    fit_times: bool = True,
    rule: str = "ancestral",
    teacher: Sampler | None = None,
    teacher_steps: int = 256,
    candidates: int = 64,
    least_gain: float = 0.1,
    states: str = "teacher",
    relax: float = 0.0,
    distance: str = "kl",
    iterations: int = 150,
    learning_rate: float = 0.05,
    t_start: float | None = None,
    t_end: float | None = None,
    **drawing,
) -> tuple[Sampler, LSDReport]:
    """Fits `nfe` steps of a discrete model to its own walk in many steps.

    Memory: `candidates` outputs of the network, `[candidates, B, L, V]` in float32.

    Args:
      process: an `Absorbing` or `Uniform` process.
      denoise: the denoiser the steps will serve, `(tokens, t) -> logits [B, L, V]`; on the uniform graph
        of p(x0^i | x_t without position i).
      key: a `jax.random.key`.
      x_init: the number of starts B, or starts `[B, L]`.
      nfe: M, network calls of the result.
      length: sequence length, where `x_init` is a number.
      coefficient: "rate" (the paper's), "log_score" (the released code's: a temperature), or None: phi = 1.
      fit_times: LSD+; False keeps uniform times (LSD).
      rule: of the student, "ancestral" or "euler".
      teacher: a sampler; default the ancestral rule in `teacher_steps` uniform steps.
      teacher_steps: N.
      candidates: how many of the teacher's times, evenly chosen, the student's are chosen from, at most.
      least_gain: what share of the distance another grid must save to be taken, on paths that it was not
        chosen by. The distance is that of whole paths: small gains in it are none at their ends.
      states: where the coefficients are fitted: at states of the "teacher", or of the "student", from
        which the teacher goes on.
      relax: fraction of the start's tokens that are drawn anew (Hamming distance), for states="student".
      distance: "kl" or "squared".
      iterations, learning_rate: of Adam.
      t_start, t_end: ends of the student's and the default teacher's times.
      drawing: of the student's samples and of the default teacher's, see `categorical.build_draw`.
    Returns:
      `(sampler, LSDReport)`.
    Raises:
      ValueError: another process, an option out of range, more steps than the teacher's.
    """
    began = time.perf_counter()
    check_choice("rule", rule, RULES)
    check_choice("coefficient", coefficient, (None, *COEFFICIENTS))
    check_choice("distance", distance, DISTANCES)
    check_choice("states", states, STATES)
    own = teacher_steps if teacher is None else teacher.nfe
    _check_options(process, nfe, own, candidates, relax, iterations, states)
    ends = {"t_start": t_start, "t_end": t_end}
    if teacher is None:
        teacher = lsd(process, teacher_steps, length=length, **ends, **drawing)
    clock = np.append(np.asarray(teacher.times), float(teacher.xs["next"]["t"][-1]))
    # a multiple of nfe, so that uniform times are among them
    choices = nfe * max(1, min(candidates, len(clock) - 1) // nfe)
    chosen = _even(len(clock) - 1, choices)
    clock = clock[chosen]
    keys = iter(jax.random.split(key, 8))
    walk_key = next(keys)
    drawn, path = sample(teacher, denoise, walk_key, x_init, trajectory=True)
    path = path[chosen]
    fit = _Fit(process, denoise, rule, coefficient, distance, iterations, learning_rate)
    outputs = fit.outputs(path[:-1], clock[:-1])
    halves = [
        fit.costs(outputs[:, i::2], path[:, i::2], clock) for i in range(min(2, path.shape[1]))
    ]
    costs = sum(halves) / len(halves)
    even = _even(len(clock) - 1, nfe)
    total = lambda grid, costs=costs: float(sum(costs[a, b] for a, b in itertools.pairwise(grid)))
    places = even
    if fit_times:
        # what a grid of one half of the paths saves on the other half
        found = sum(total(_best_grid(a, nfe), b) for a, b in zip(halves, halves[::-1]))
        if found < (1.0 - least_gain) * sum(total(even, half) for half in halves):
            places = _best_grid(costs, nfe)
    phi, fitted = np.ones(nfe), total(places)
    if coefficient is not None and states == "teacher":
        phi, fitted = fit.at_the_teacher(outputs, path, clock, places)
    elif coefficient is not None:
        start = _relaxed(process, next(keys), path[0], relax)
        phi, fitted = fit.at_the_student(next(keys), start, clock[places], teacher_steps)
    plain = lsd(process, nfe, length=length, rule=rule, **ends, **drawing)
    times = clock[places]
    if places is even:  # exactly, where the teacher's times are only close
        times = np.append(plain.times, plain.xs["next"]["t"][-1])
    steps = LearnedSteps(times, phi, coefficient or "rate", rule)
    sampler = steps.sampler(process, length, **drawing)
    entropies = [
        sequence_entropy(x, process.num_states)
        for x in (drawn, *(sample(s, denoise, walk_key, x_init) for s in (plain, sampler)))
    ]
    seconds = time.perf_counter() - began
    return sampler, LSDReport(steps, total(even), total(places), fitted, *entropies, seconds)


def _relaxed(process, key, tokens, share):
    """`tokens [B, L]` with a share of each sequence's positions drawn uniformly from the clean tokens."""
    if not share:
        return tokens
    where, what = jax.random.split(key)
    count = int(np.ceil(share * tokens.shape[1]))
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(where, tokens.shape), axis=1), axis=1)
    fresh = jax.random.randint(what, tokens.shape, 0, process.vocab_size, tokens.dtype)
    return jnp.where(rank < count, fresh, tokens)


class _Fit:
    """The compiled parts of a fit."""

    def __init__(self, process, denoise, rule, coefficient, distance, iterations, learning_rate):
        import optax

        self.process, self.denoise = process, denoise
        self.rule, self.coefficient = rule, coefficient
        # the last step on the absorbing graph reveals what is left
        self.last = "ancestral" if isinstance(process, Absorbing) else rule
        arrays, static = split_traced(denoise)
        optimizer = optax.adam(learning_rate)

        def log_probs(arrays, tokens, t):
            logits, _ = evaluate(join_traced(arrays, static), tokens, process.point(t))
            return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

        call = jax.jit(log_probs)
        self.outputs = lambda path, times: jnp.stack(
            [call(arrays, x, jnp.float32(t)) for x, t in zip(path, times)]
        )

        def target(log_p, tokens, t, s):
            return step_probs(process, "ancestral", jnp.exp(log_p), tokens, t, s)

        def student(log_p, tokens, t, s, phi, begin, rule):
            if coefficient == "log_score" and phi is not None:
                log_p, phi = jax.nn.log_softmax(phi * log_p, axis=-1), None
            made = step_probs(process, rule, jnp.exp(log_p), tokens, t, s, None, begin)
            if rule == "euler":
                phi = 1.0 if phi is None else phi
            if rule == "euler" and isinstance(process, Absorbing):
                # of the one reveal of the whole step, what is left after the time since its beginning
                rate = jump_rate(process, begin)
                phi = phi / jnp.maximum(1.0 - phi * rate * (begin - t), _LEFT)
            return made if phi is None else scale_jumps(made, tokens, phi)

        def apart(held, log_p, tokens, t, s, phi, begin, rule):
            made = student(held, tokens, t, s, phi, begin, rule)
            return _distance(distance, target(log_p, tokens, t, s), made, t - s)

        @functools.partial(jax.jit, static_argnums=4)
        def costs_from(a, outputs, path, clock, rule):
            """Costs of one student step from teacher time a to each later one, `[C]`."""

            def one(n, row):
                stretch = (path[n], clock[n], clock[n + 1], None, clock[a], rule)
                return row.at[n].set(apart(outputs[a], outputs[n], *stretch))

            row = jax.lax.fori_loop(a, len(outputs), one, jnp.zeros(len(outputs)))
            return jnp.cumsum(row)

        def costs(outputs, path, clock):
            clock = jnp.asarray(clock, jnp.float32)
            size = len(outputs)
            table = np.full((size, size + 1), np.inf)
            for a in range(size):
                row = np.asarray(costs_from(a, outputs, path, clock, rule))
                table[a, a + 1 :] = row[a:]
                if rule != self.last:
                    table[a, size] = costs_from(a, outputs, path, clock, self.last)[-1]
            return table

        self.costs = costs

        @functools.partial(jax.jit, static_argnums=6)
        def fitted(held, outputs, path, t, s, count, rule):
            """`(phi, distance)` of one step over its first `count` stretches."""

            def loss(log_phi):
                def one(total, n):
                    stretch = (path[n], t[n], s[n], jnp.exp(log_phi), t[0], rule)
                    value = apart(held, outputs[n], *stretch)
                    return total + jnp.where(n < count, value, 0.0), None

                return jax.lax.scan(one, jnp.float32(0.0), jnp.arange(len(outputs)))[0]

            def descend(carry, _):
                log_phi, state = carry
                updates, state = optimizer.update(jax.grad(loss)(log_phi), state)
                return (log_phi + updates, state), None

            begin = jnp.float32(0.0)
            carry = (begin, optimizer.init(begin))
            (log_phi, _), _ = jax.lax.scan(descend, carry, length=iterations)
            before, after = loss(begin), loss(log_phi)
            better = after < before
            return jnp.where(better, jnp.exp(log_phi), 1.0), jnp.where(better, after, before)

        def of_step(outputs, path, clock, rule):
            count = len(outputs)
            padded = 1 << (count - 1).bit_length()  # few shapes, few programs
            pad = lambda v: jnp.concatenate([v, jnp.repeat(v[-1:], padded - count, axis=0)])
            clock = jnp.asarray(clock, jnp.float32)
            parts = [pad(v) for v in (outputs, path, clock[:-1], clock[1:])]
            phi, value = fitted(outputs[0], *parts, count, rule)
            return float(phi), float(value)

        self.of_step = of_step

    def at_the_teacher(self, outputs, path, clock, places):
        """`(phi [M], distance)`: each step fitted on the teacher's way."""
        found = []
        for a, b in itertools.pairwise(places):
            rule = self.last if b == places[-1] else self.rule
            found.append(self.of_step(outputs[a:b], path[a:b], clock[a : b + 1], rule))
        phi, losses = np.array(found, np.float64).T
        return phi, float(losses.sum())

    def at_the_student(self, key, x, times, teacher_steps):
        """`(phi [M], distance)`: each step fitted at the states that the earlier ones lead to."""
        size, found = max(1, teacher_steps // (len(times) - 1)), []
        for k, (t, s) in enumerate(itertools.pairwise(times)):
            fine = np.linspace(t, s, size + 1)
            rule = self.last if k + 2 == len(times) else self.rule
            fine_key, own_key = jax.random.split(jax.random.fold_in(key, k))
            teach = stretch(self.process, fine)
            _, path = sample(teach, self.denoise, fine_key, x, trajectory=True)
            outputs = self.outputs(path[:-1], fine[:-1])
            found.append(self.of_step(outputs, path[:-1], fine, rule))
            one = stretch(self.process, (t, s), [found[-1][0]], self.coefficient, rule)
            x = sample(one, self.denoise, own_key, x)
        phi, losses = np.array(found, np.float64).T
        return phi, float(losses.sum())

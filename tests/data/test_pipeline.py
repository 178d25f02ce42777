import collections
import gc
import subprocess
import sys
import threading

import numpy as np
import pytest

from diffusion_jax.data import ArraySource, DataSpec, Element, Pipeline, Source, eval_batches


def numbered(count):
    """A source whose rows say which they are."""
    spec = DataSpec(
        "points",
        {"points": Element((2,), "float32"), "label": Element((), "int32")},
        num_classes=count,
    )
    points = np.stack([np.arange(count), -np.arange(count)], 1).astype(np.float32)
    return ArraySource({"points": points, "label": np.arange(count, dtype=np.int32)}, spec)


class Failing(Source):
    """Raises at one row; counts the reads."""

    def __init__(self, count, bad=None):
        self._inner = numbered(count)
        self.spec = self._inner.spec
        self._bad = bad
        self.reads = []

    def __len__(self):
        return len(self._inner)

    def _take(self, rows):
        self.reads.append(int(rows[0]))
        if self._bad in rows:
            raise FloatingPointError("row of the test")
        return self._inner.take(rows)


def data_threads():
    return [t for t in threading.enumerate() if t.name.startswith("data")]


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def test_batch_is_a_pure_function_of_seed_and_step():
    first = Pipeline(numbered(37), 8, seed=5)
    forward = [first.batch(step) for step in range(12)]
    again = Pipeline(numbered(37), 8, seed=5)
    for step in reversed(range(12)):
        equal(again.batch(step), forward[step])


def test_batch_is_the_same_in_another_process():
    code = (
        "from diffusion_jax import data\n"
        "p = data.Pipeline(data.arrays({'tokens': [[i] for i in range(23)]}), 7, seed=4)\n"
        "print([p.batch(s)['tokens'][:, 0].tolist() for s in (0, 5, 900)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = Pipeline(numbered(23), 7, seed=4)
    assert done.stdout.strip() == str([here.batch(s)["label"].tolist() for s in (0, 5, 900)])


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("shuffle", [True, False])
def test_any_host_split_gives_the_global_batch(hosts, shuffle):
    source = numbered(31)
    for step in (0, 2, 7, 1_000_000):
        whole = Pipeline(source, 12, seed=1, shuffle=shuffle).batch(step)
        assert whole["index"].tolist() == list(range(12))
        assert whole["index"].dtype == np.int32
        parts = [
            Pipeline(source, 12, seed=1, shuffle=shuffle, host=(h, hosts)).batch(step)
            for h in range(hosts)
        ]
        assert {len(part["label"]) for part in parts} == {12 // hosts}
        equal({k: np.concatenate([part[k] for part in parts]) for k in whole}, whole)


@pytest.mark.parametrize("count, size", [(10, 4), (12, 4), (7, 5), (3, 8), (5, 17), (1, 2)])
def test_every_example_once_an_epoch(count, size):
    pipeline = Pipeline(numbered(count), size, seed=2)
    steps = 4 * count
    seen = np.concatenate([pipeline.batch(s)["label"] for s in range(steps)])
    epochs = seen[: len(seen) // count * count].reshape(-1, count)
    assert len(epochs) == 4 * size
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(count), (len(epochs), 1)))


def test_order_differs_by_epoch_and_seed():
    def epoch(seed, number):
        return tuple(Pipeline(numbered(50), 50, seed=seed).batch(number)["label"].tolist())

    orders = {epoch(seed, number) for seed in range(4) for number in range(4)}
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


def test_without_shuffle_the_order_is_that_of_the_source():
    pipeline = Pipeline(numbered(5), 3, shuffle=False)
    labels = [pipeline.batch(s)["label"].tolist() for s in range(4)]
    assert labels == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


@pytest.mark.parametrize("prefetch, workers", [(0, 1), (1, 1), (2, 1), (5, 3)])
def test_prefetched_order_is_the_direct_order(prefetch, workers):
    pipeline = Pipeline(numbered(29), 8, seed=3)
    got = list(pipeline.iterate(11, 40, prefetch=prefetch, workers=workers))
    assert [step for step, _ in got] == list(range(11, 40))
    for step, batch in got:
        equal(batch, pipeline.batch(step))
    assert not data_threads()


def test_reading_ahead_is_bounded():
    source = Failing(1000)
    pipeline = Pipeline(source, 1, shuffle=False)
    iterator = pipeline.iterate(0, prefetch=3)
    assert not source.reads and not data_threads()
    next(iterator)
    deadline = threading.Event()
    for _ in range(200):
        if len(source.reads) == 4:
            break
        deadline.wait(0.01)
    deadline.wait(0.05)
    assert source.reads == [0, 1, 2, 3]
    iterator.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_exceptions_surface_at_their_step(prefetch):
    pipeline = Pipeline(Failing(100, bad=25), 10, shuffle=False)
    seen = []
    with pytest.raises(FloatingPointError, match="row of the test"):
        for step, _ in pipeline.iterate(0, prefetch=prefetch):
            seen.append(step)
    assert seen == [0, 1]
    assert not data_threads()


def test_no_thread_is_left_when_the_consumer_stops():
    pipeline = Pipeline(numbered(20), 4)
    for step, _ in pipeline.iterate(prefetch=4, workers=2):
        if step == 3:
            assert data_threads()
            break
    gc.collect()
    assert not data_threads()

    iterator = pipeline.iterate()
    next(iterator)
    iterator.close()
    assert not data_threads()

    pipeline.iterate()  # never started
    assert not data_threads()

    with pytest.raises(KeyError):
        for _ in pipeline.iterate():
            raise KeyError("of the consumer")
    gc.collect()
    assert not data_threads()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(global_batch=0), "batch size 0"),
        (dict(global_batch=2.0), "batch size 2.0"),
        (dict(host=(2, 2)), r"host=\(2, 2\)"),
        (dict(host=(0, 3)), "8 is not divisible by 3 hosts"),
        (dict(seed=-1), "seed=-1"),
        (dict(augment="flop"), "did you mean 'flip'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(numbered(4), **{"global_batch": 8, **arguments})


def test_bad_steps():
    pipeline = Pipeline(numbered(4), 2)
    with pytest.raises(ValueError, match="step=-1"):
        pipeline.batch(-1)
    for wrong in (dict(start_step=-1), dict(prefetch=-1), dict(workers=0)):
        with pytest.raises(ValueError, match="must"):
            pipeline.iterate(**wrong)


@pytest.mark.parametrize("hosts", [1, 2])
def test_eval_batches_padded(hosts):
    labels = collections.Counter()
    for host in range(hosts):
        batches = list(eval_batches(numbered(10), 4, host=(host, hosts)))
        assert len(batches) == 3
        for batch in batches:
            assert len(batch["label"]) == 4 // hosts
            assert batch["valid"].dtype == bool
            expected = np.arange(4 // hosts) + host * 4 // hosts
            np.testing.assert_array_equal(batch["index"], expected)
            labels.update(batch["label"][batch["valid"]].tolist())
    assert labels == collections.Counter(range(10))


def test_eval_batches_short():
    batches = list(eval_batches(numbered(10), 4, pad=False))
    assert [len(b["label"]) for b in batches] == [4, 4, 2]
    assert np.concatenate([b["label"] for b in batches]).tolist() == list(range(10))
    assert "valid" not in batches[0]
    with pytest.raises(ValueError, match="pad=True"):
        eval_batches(numbered(10), 4, pad=False, host=(0, 2))

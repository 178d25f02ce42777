"""Traces of a few steps in the run folder; compiled programs that a second start finds."""

import gzip
import json
import textwrap

import pytest
from training.toy import CONFIG, ToyPipeline, run_python, toy_method

from diffusion_jax.training import TrainConfig, train


def test_a_trace_holds_the_steps_asked_for(tmp_path):
    profile = {"first": 3, "steps": 2}
    train(toy_method(), ToyPipeline(), CONFIG | {"profile": profile}, tmp_path)
    (trace,) = tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    assert len(list(trace.parent.glob("*.xplane.pb"))) == 1  # TensorBoard's
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(map(int, steps)) == [3, 4]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["profile"] == profile


@pytest.mark.slow
def test_the_first_step_counts_from_the_resumption_and_a_short_run_ends_its_trace(tmp_path):
    train(toy_method(), ToyPipeline(), CONFIG | {"steps": 8}, tmp_path)
    assert not (tmp_path / "profile").exists()
    train(toy_method(), ToyPipeline(), CONFIG | {"profile": {"first": 2, "steps": 9}}, tmp_path)
    (trace,) = tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(map(int, steps)) == [10, 11]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"steps": -1}, r"train\.profile\.steps must be an integer >= 0; got -1"),
        ({"first": 1.5}, r"train\.profile\.first must be an integer >= 0; got 1\.5"),
        ({"step": 1}, r"unknown train\.profile field 'step'.*steps"),
        ({"processes": "none"}, r"train\.profile\.processes must be one of first, all; got 'none'"),
    ],
)
def test_bad_options_are_refused(profile, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(profile=profile)


def test_options_that_do_nothing_leave_the_config_as_it_was():
    off = TrainConfig(profile={"first": 10, "steps": 0, "processes": "first"}).to_dict()
    assert off == TrainConfig().to_dict() and not {"profile", "compilation_cache"} & set(off)


START = """
import os
for name in ("DIR",):
    os.environ.pop("JAX_COMPILATION_CACHE_" + name, None)
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
from diffusion_jax.training import train
from training.toy import CONFIG, ToyPipeline, toy_method
jax.numpy.ones(3).block_until_ready()  # JAX has looked for a cache before the config is read
cache = {cache!r}
result = train(toy_method(), ToyPipeline(), CONFIG | {{"compilation_cache": cache}}, {folder!r})
hits, misses = (events.count("cache_" + name) for name in ("hits", "misses"))
print("COUNTS", hits, misses, float(result.state.params["out"]["kernel"].sum()))
"""


@pytest.mark.slow
def test_a_second_start_finds_the_compiled_programs(tmp_path):
    found = []
    for run in ("first", "second"):
        options = {"cache": str(tmp_path / "cache"), "folder": str(tmp_path / run)}
        output = run_python(textwrap.dedent(START).format(**options))
        hits, misses, total = output.split("COUNTS")[1].split()
        found.append((int(hits), int(misses), float(total)))
    (_, first_misses, expected), (hits, misses, total) = found
    assert first_misses > 0 and hits >= first_misses and misses == 0
    assert total == expected
    assert len(list((tmp_path / "cache").iterdir())) >= first_misses

"""What the compiled step sends on 8 devices, and how that is read from a program."""

import collections

import pytest

from experiments.benchmarks import hlo_traffic, sharding

PROGRAM = """HloModule step, entry_computation_layout={()->f32[8]{0}}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0), metadata={op_name="x"}
  %w = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %all-gather.1 = f32[32,8]{1,0} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %sum = f32[32,8]{1,0} all-reduce(%all-gather.1), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %moved = f32[8,32]{0,1} transpose(%sum), dimensions={1,0}
  %slice = f32[8,16]{1,0} dynamic-slice(%moved, %i, %j), dynamic_slice_sizes={8,16}
  ROOT %t = (s32[], /*index=1*/f32[4,8]{1,0}) tuple(%k, %w)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[8] {
  %a = f32[4,8]{1,0} parameter(0)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %known = (s32[], f32[4,8]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %grads = (bf16[64]{0}, f32[]) all-reduce(%x, %y), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, to_apply=%add
  %far = f32[16]{0} collective-permute(%a), source_target_pairs={{0,1}}
  ROOT %use = f32[8]{0} add(%grads, %far)
}
"""
MESH = {"data": 2, "fsdp": 4, "model": 1}


def test_collectives_of_a_program():
    found = {c.what + c.kind: c for c in hlo_traffic.collectives(PROGRAM, MESH)}
    gather = found["f32[32,8]{1,0}all-gather"]
    assert gather == ("all-gather", 4 * 32 * 8, 4, 5 + 3, "fsdp", "f32[32,8]{1,0}")
    assert gather.wire == 8 * 1024 * 3 / 4
    # Of the sum nothing is used but a slice.
    scatter = found["f32[32,8]{1,0}reduce-scatter"]
    assert (scatter.group, scatter.axes, scatter.wire) == (2, "data", 8 * 1024 / 2)
    total = found["(bf16[64]{0}, f32[])all-reduce"]
    assert (total.size, total.times, total.wire) == (128 + 4, 1, 2 * 132 * 3 / 4)
    permute = found["f32[16]{0}collective-permute"]
    assert permute.wire == 64 and len(found) == 4


@pytest.mark.parametrize(
    ("text", "first", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3), "fsdp"),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3), "fsdp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4), "data"),
        ("replica_groups=[1,8]<=[8]", tuple(range(8)), "data+fsdp"),
        ("replica_groups=[4,2]<=[8]", (0, 1), ""),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3), "fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4), "data"),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4), "data"),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3), "fsdp"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4), "data"),
        ("dimensions={0}", tuple(range(8)), "data+fsdp"),
    ],
)
def test_groups_in_all_ways_of_writing(text, first, axes):
    found = hlo_traffic.groups(text, 8)
    assert tuple(found[0]) == first
    assert sorted(n for group in found for n in group) == list(range(8))
    assert hlo_traffic.axes_of(found, MESH) == axes


def test_bytes_and_large_arrays():
    assert hlo_traffic.num_bytes("(f32[2,3]{1,0}, /*index=1*/bf16[4], pred[], s64[2])") == 49
    assert hlo_traffic.num_bytes("f8e4m3fn[16]") == 16
    found = hlo_traffic.with_dimension(PROGRAM, 32, 1024)
    assert {f[0] for f in found} == {"all-gather", "all-reduce", "transpose"}
    assert hlo_traffic.with_dimension(PROGRAM, 32, 1025) == []


def test_a_loop_without_a_bound_is_refused():
    program = PROGRAM.replace("constant(5)", "parameter(0)")
    with pytest.raises(ValueError, match="loop loop: its number of rounds is not in the program"):
        hlo_traffic.collectives(program, MESH)


def kinds(row):
    """Bytes of the large collectives by kind and axes, and how many run."""
    found = collections.Counter()
    for c in row["collectives"]:
        if c["size"] == "arrays":
            found[c["kind"], c["axes"]] += c["bytes"]
    return found


@pytest.fixture(scope="module")
def rows():
    cases = {
        "data": ("tiny_dit", {"data": 8}, 4),
        "fsdp": ("tiny_ddit", {"fsdp": 8}, 1),
        "all": ("tiny_dit", {"data": 2, "fsdp": 2, "model": 2}, 1),
    }
    return {
        name: sharding.measure(network, mesh, microbatches=parts, large=2**17)
        for name, (network, mesh, parts) in cases.items()
    }


def test_data_parallel_sums_the_gradients_once(rows):
    """In four microbatches."""
    row = rows["data"]
    found, gradients = kinds(row), 4 * row["parameters"]
    assert set(found) == {("all-reduce", "data")}
    assert 0.99 * gradients < found["all-reduce", "data"] < 1.01 * gradients
    assert row["wire"] == pytest.approx(2 * 7 / 8 * gradients, rel=0.01)
    assert row["factor"] == pytest.approx(1.0, abs=0.02)


def test_fsdp_gathers_a_layer_at_a_time_and_scatters_its_gradient(rows):
    row = rows["fsdp"]
    found, parameters = kinds(row), 4 * row["parameters"]
    # Each parameter once or (in the blocks, which are rematerialised) twice; gradients once.
    assert parameters < found["all-gather", "fsdp"] < 2 * parameters
    assert 0.95 * parameters < found["reduce-scatter", "fsdp"] <= 1.01 * parameters
    assert sum(found.values()) < 1.02 * sum(
        found[kind, "fsdp"] for kind in ("all-gather", "reduce-scatter")
    )
    assert row["factor"] == pytest.approx(1.0, abs=0.05)
    layers = row["depth"] * 128 * 128 * 4
    assert row["largest_gather"] < max(4 * layers, 1024 * 128 * 4 + 1)  # no stack of layers at once
    # Parameters, average and two moments: an eighth of them, but for the short vectors.
    whole = 4 * parameters
    assert whole / 8 <= row["state"] < 1.2 * whole / 8
    assert row["arguments"] == pytest.approx(row["state"] + row["batch"], rel=0.01)


def test_all_three_axes(rows):
    row = rows["all"]
    assert row["factor"] < 1.45
    whole = 4 * 4 * row["parameters"]
    assert whole / 4 <= row["state"] < 1.3 * whole / 4  # labels are not split over `model`
    found = kinds(row)
    sums = 6 * row["depth"] * row["activation"]  # two forward, two backward, two again
    assert sums <= found["all-reduce", "model"] < 1.3 * sums


@pytest.mark.parametrize("name", ["data", "fsdp", "all"])
def test_nothing_large_lies_whole_by_accident(rows, name):
    assert rows[name]["whole_parameters"] == {}
    assert rows[name]["whole_activations"] == []
    assert sum(c["runs"] for c in rows[name]["collectives"]) < 250


def test_the_table_names_everything(rows):
    text = sharding.tables(list(rows.values()))
    assert "| tiny_dit | data=2 fsdp=2 model=2 |" in text and "reduce-scatter (arrays)" in text

"""Collectives, their bytes and how often they run, read from the text of a compiled (or partitioned) program.

Bytes on the wire, by a device in a group of n, for an array of b bytes that is whole (ring algorithms):

  all-reduce      2 (n - 1) / n b     of what is summed
  all-gather        (n - 1) / n b     of the result
  reduce-scatter    (n - 1) / n b     of what is summed
  all-to-all        (n - 1) / n b     of what a device holds
  permute                       b

What stands in the body of a loop counts as often as the loop runs. The CPU backend, and the partitioner of
XLA itself, know no reduce-scatter: they sum everything and take a slice. GPU and TPU compilers make a
reduce-scatter of that pair, so an all-reduce of which nothing but slices is used counts as one here.
"""

import collections
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTH = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([a-z][\w\-]*)\((.*)$"
)
_CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
# What may lie between a sum and the slice of it that is used.
_MOVES = {"transpose", "reshape", "bitcast", "copy", "convert", "get-tuple-element"}


class Instruction(NamedTuple):
    """One line of a program: `name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions it reads."""
        depth = 1
        for end, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                return re.findall(r"%([\w.\-]+)", self.rest[:end])
        return []


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of the whole array, see the top of this file.
      group: number of devices that take part together.
      times: how often it runs in a step.
      axes: the mesh axes it runs over, "" if these are none.
      what: the type of its result.
    """

    kind: str
    size: int
    group: int
    times: int
    axes: str
    what: str

    @property
    def wire(self) -> float:
        """Bytes a device sends in a step."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.size * factor


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays `(dtype, shape)` of a type, several of a tuple."""
    return [
        (dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", text.replace("<=", ""))
    ]


def num_bytes(text: str) -> int:
    """Bytes of a type."""
    total = 0
    for dtype, shape in shapes(text):
        bits = re.sub(r"^\D+", "", dtype.split("e")[0] if dtype.startswith("f8") else dtype)
        width = _WIDTH.get(dtype) or max(int(bits or 32) // 8, 1)
        total += width * math.prod(shape)
    return total


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """`(computation -> its instructions, name of the entry computation)` of a program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found:
                current = computations.setdefault(found.group(2), [])
                entry = found.group(2) if found.group(1) else entry
        elif line.startswith("}"):
            current = None
        else:
            found = _INSTRUCTION.match(line)
            if found:
                current.append(Instruction(*found.groups()))
    return computations, entry


def trip_count(loop: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> int:
    """How often a loop runs: what the compiler has found, or the bound that its counter is compared to.

    Raises:
      ValueError: neither is in the program.
    """
    known = re.search(r"known_trip_count\D+(\d+)", loop.rest)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    bounds = [
        int(i.rest.split(")")[0])
        for i in computations.get(condition.group(1), ())
        if i.opcode == "constant" and re.match(r"[su](32|64)\[\]", i.type)
    ]
    if len(bounds) != 1:
        raise ValueError(f"loop {loop.name}: its number of rounds is not in the program")
    return bounds[0]


def times(computations: Mapping[str, Sequence[Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    counts: dict[str, int] = collections.Counter()

    def visit(name: str, many: int) -> None:
        counts[name] += many
        for instruction in computations.get(name, ()):
            loop = instruction.opcode == "while"
            rounds = trip_count(instruction, computations) if loop else 1
            for one, several in _CALLED.findall(instruction.rest):
                for called in re.findall(r"[\w.\-]+", one or several):
                    visit(called, many * rounds)

    visit(entry, 1)
    return counts


def groups(rest: str, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices of a collective, in any of the forms in which XLA writes them."""
    explicit = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
    if explicit:
        found = re.findall(r"\{([\d, ]*)\}", explicit.group(1))
        return [tuple(int(n) for n in group.split(",")) for group in found]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, sizes, axes = ([int(n) for n in g.split(",")] if g else None for g in iota.groups())
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)
        return [tuple(row) for row in ids.reshape(shape).tolist()]
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}",
        rest,
    )
    if named:
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        split = {}  # an axis, or a part of one: (size of what comes before it in the axis, its size)
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named.group(4)):
            split.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
        dims, inside = [], []
        for name, size in sizes.items():
            done = 1
            for before, part in sorted(split.get(name, ())):
                dims += [before // done, part]
                inside += [False, True]
                done = before * part
            dims.append(size // done)
            inside.append(False)
        ids = np.arange(math.prod(dims))
        if named.group(2):
            shape, axes = (
                [int(n) for n in g.split(",")] if g else None for g in named.groups()[1:3]
            )
            ids = ids.reshape(shape).transpose(axes)
        ids = ids.reshape(dims)
        order = [i for i, taken in enumerate(inside) if not taken]
        order += [i for i, taken in enumerate(inside) if taken]
        size = math.prod(d for d, taken in zip(dims, inside) if taken)
        return [tuple(row) for row in ids.transpose(order).reshape(-1, size).tolist()]
    return [tuple(range(devices))]


def axes_of(found: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> str:
    """The mesh axes that groups of devices run over, joined by "+"; "" if they are of no axes."""
    names = [name for name, size in mesh.items() if size > 1]
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    wanted = {frozenset(group) for group in found}
    for many in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, many):
            places = [list(mesh).index(name) for name in chosen]
            rest = [i for i in range(len(mesh)) if i not in places]
            size = math.prod(mesh[name] for name in chosen)
            rows = ids.transpose(rest + places).reshape(-1, size)
            if {frozenset(row) for row in rows.tolist()} == wanted:
                return "+".join(chosen)
    return ""


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program over a mesh (name -> size, devices numbered in row-major order)."""
    computations, entry = parse(text)
    counts, devices = times(computations, entry), math.prod(mesh.values())
    found = []
    for name, many in counts.items():
        body = computations.get(name, ())
        users = collections.defaultdict(list)
        for instruction in body:
            for operand in instruction.operands:
                users[operand].append(instruction)
        types = {i.name: i.type for i in body}
        for instruction in body:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            own = groups(instruction.rest, devices)
            size = num_bytes(instruction.type)
            if kind in ("reduce-scatter", "all-to-all") or instruction.opcode != kind:
                size = sum(num_bytes(types.get(o, "")) for o in instruction.operands)
                size *= len(own[0]) if instruction.opcode == "all-gather-start" else 1
            if kind == "all-reduce" and _sliced(instruction.name, users):
                kind = "reduce-scatter"
            place = axes_of(own, mesh)
            found.append(Collective(kind, size, len(own[0]), many, place, instruction.type))
    return found


def _sliced(name: str, users: Mapping[str, Sequence[Instruction]]) -> bool:
    """Whether nothing of a result is used but slices at places that the device's number decides."""
    readers = users.get(name, ())
    return bool(readers) and all(
        reader.opcode == "dynamic-slice"
        or (reader.opcode == "fusion" and "dynamic-slice" in reader.name)
        or (reader.opcode in _MOVES and _sliced(reader.name, users))
        for reader in readers
    )


def with_dimension(text: str, dimension: int, least: int) -> list[tuple[str, str, int]]:
    """Arrays of a partitioned program with an axis of a size that should have been split.

    Args:
      text: the program.
      dimension: the size of the axis before it was split, such as the global batch.
      least: arrays of fewer bytes are left out.

    Returns:
      `(opcode, type, bytes)` of each instruction, largest first.
    """
    found = {
        (i.opcode, i.type, num_bytes(i.type))
        for body in parse(text)[0].values()
        for i in body
        if not i.type.startswith("(")
        and any(dimension in shape for _, shape in shapes(i.type))
        and num_bytes(i.type) >= least
    }
    return sorted(found, key=lambda item: -item[2])

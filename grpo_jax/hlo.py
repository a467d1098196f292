"""Compiled programs read as text: collectives, loops and bytes moved, by loop body times trip count.

`cost_analysis` counts the body of a loop once, so this reads the optimised HLO (`compiled.as_text()`) itself. Sizes in
the text of a partitioned program are those of one device.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

WIDTHS = {"pred": 1, "token": 0, "opaque": 0, "bf16": 2}  # other dtypes say their bits: f32, s8, u4, f8e4m3fn
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Instructions that move no bytes of their own.
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "add-dependency", "domain",
)  # fmt: skip
PREFETCHES = {"copy-start": 0, "slice-start": 1}  # place of what they make among their shapes: libtpu differs by kind
SLICES = ("dynamic-slice", "slice", "gather")  # read as much as they write

_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[a-z]+\d+[a-z0-9]*)\[([\d,<=?]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program; `fast` where it lies in a chip's fast memory (memory space 1) and not in its main one."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def near(self) -> bool:
        """Whether reading it costs nothing: fast memory, or a lone number."""
        return self.fast or not self.dims

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = 8 * WIDTHS[self.dtype] if self.dtype in WIDTHS else int(digits[0]) if digits else 0
        return math.ceil(math.prod(self.dims) * bits * (2 if self.dtype.startswith("c") else 1) / 8) if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, scopes included."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        """Bytes of all that it makes."""
        return sum(shape.bytes for shape in self.shapes)

    def called(self, *keys: str) -> list[str]:
        """Computations that it calls, under these attributes (all of them without any)."""
        if not keys:
            branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
            more = _NAME.findall(branches[1]) if branches else []
            return _CALLED.findall(self.attributes) + more
        found = (re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.attributes) for key in keys)
        return [match[1] for match in found if match]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while` of the program, trips by the compiler (None: it does not know) and the scopes it is in."""

    body: str
    op_name: str
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, as often as the loops around it turn.

    Attributes:
      kind: all-gather, all-reduce, ...
      bytes: of the larger of what one device gives and gets.
      devices: that take part together.
      dims: of what one device has after it.
      times: how often it runs.
      loops: scopes of the loops around it, outermost first.
      op_name: where in the traced function it comes from.
    """

    kind: str
    bytes: int
    devices: int
    dims: tuple[int, ...]
    times: int
    loops: tuple[str, ...]
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, in a ring."""
        share = (self.devices - 1) / self.devices
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


Trips = Callable[[Loop], int]


class Program:
    """The computations of an HLO text, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._read(text)
        if not self.entry:
            raise ValueError("not the text of a compiled program: it has no ENTRY")

    def _read(self, text: str) -> None:
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if current is None:
                header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
                if header:
                    current = self.computations.setdefault(header[2], {})
                    self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                current = None
            else:
                made = read_instruction(line)
                if made is not None:
                    current[made.name] = made

    def loops(self, inside: str = "") -> list[Loop]:
        """The loops of the program (of a computation), nested ones too."""
        found = []
        for _, instruction, _, _ in self.walk(lambda loop: 1, inside or self.entry):
            if instruction.opcode == "while":
                found.append(self.loop(instruction))
        return found

    def loop(self, instruction: Instruction) -> Loop:
        """A `while`, its trips as the compiler says or as its condition does: a counter below a constant."""
        said = _TRIPS.search(instruction.attributes)
        trips = int(said[1]) if said else self._counted(instruction)
        return Loop(instruction.called("body")[0], instruction.op_name, trips)

    def _counted(self, instruction: Instruction) -> int | None:
        """Trips of a loop whose condition is counter < constant; jax's counters start at 0 and go up by 1."""
        condition = self.computations.get(instruction.called("condition")[0], {})
        root = next((inner for inner in condition.values() if inner.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        bound = condition.get(root.operands[1])
        if bound is not None and bound.opcode == "get-tuple-element":
            bound = self._initial(instruction, bound)
        value = re.match(r"\((\d+)\)", bound.attributes) if bound is not None and bound.opcode == "constant" else None
        return int(value[1]) if value else None

    def _initial(self, loop: Instruction, element: Instruction) -> Instruction | None:
        """What a loop is handed as this element of its tuple; a bound is carried unchanged."""
        scope = next((c for c in self.computations.values() if c.get(loop.name) is loop), {})
        given = scope.get(loop.operands[0])
        place = re.search(r"index=(\d+)", element.attributes)
        if given is None or given.opcode != "tuple" or place is None:
            return None
        found = scope.get(given.operands[int(place[1])])
        while found is not None and found.opcode == "copy":
            found = scope.get(found.operands[0])
        return found

    def walk(
        self, trips: Trips, computation: str = "", times: int = 1, loops: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, Instruction, int, tuple[str, ...]]]:
        """(computation, instruction, how often it runs, loops around it), depth first; insides of fusions left out."""
        computation = computation or self.entry
        for instruction in self.computations.get(computation, {}).values():
            yield computation, instruction, times, loops
            if instruction.opcode == "while":
                loop = self.loop(instruction)
                known = loop.trips if loop.trips is not None else trips(loop)
                for name in instruction.called("condition", "body"):
                    yield from self.walk(trips, name, times * known, (*loops, loop.op_name))
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for name in instruction.called():
                    yield from self.walk(trips, name, times, loops)

    def collectives(self, trips: Trips) -> list[Collective]:
        """Every collective; one that the compiler has spread over several fusions counts once."""
        found, seen = [], set()
        for where, instruction, times, loops in self.walk(trips):
            for inner, scattered in self._fused(instruction):
                kind = inner.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                channel = re.search(r"channel_id=(\d+)", inner.attributes)
                key = (where, channel[1] if channel else inner.name)
                if key in seen:
                    continue
                seen.add(key)
                kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
                dims = max(inner.shapes, key=lambda shape: shape.bytes).dims
                size = self._collective_bytes(inner)
                found.append(Collective(kind, size, group_size(inner), dims, times, loops, inner.op_name))
        return found

    def _fused(self, instruction: Instruction) -> Iterator[tuple[Instruction, bool]]:
        """The instruction, or those inside its fusion; True inside a fusion that is a reduce-scatter."""
        if instruction.opcode != "fusion":
            yield instruction, False
            return
        for name in instruction.called("calls"):
            for inner in self.computations.get(name, {}).values():
                if inner.opcode == "fusion":
                    yield from self._fused(inner)
                else:
                    yield inner, "reduce-scatter" in name or "all-reduce-scatter" in name

    def made_anew(self, computation: str, instruction: Instruction) -> list[Shape]:
        """Arrays that an instruction writes whole into main memory: neither in place nor handed on."""
        opcode = instruction.opcode
        if opcode in (*FREE, "dynamic-update-slice") or opcode.endswith("-done"):
            return []
        shapes = instruction.shapes if opcode not in PREFETCHES else instruction.shapes[PREFETCHES[opcode] :][:1]
        in_place: set[tuple[Shape, ...]] = set()
        if opcode == "fusion":
            inside = self.computations.get(instruction.called("calls")[0], {})
            in_place = {tuple(inside[name].shapes) for name in self._updated(inside).values()}
        return [shape for shape in shapes if not shape.near and not _like(shape, in_place)]

    def inputs(self, computation: str, instruction: Instruction) -> list[Instruction]:
        """What an instruction reads."""
        if instruction.opcode in FREE:
            return []
        scope = self.computations[computation]
        return [scope[name] for name in instruction.operands if name in scope]

    def _collective_bytes(self, instruction: Instruction) -> int:
        """The larger of what goes in and what comes out; a -start's result holds both, and numbers besides."""
        if instruction.opcode.endswith("-start"):
            return max((shape.bytes for shape in instruction.shapes), default=0)
        scope = next((c for c in self.computations.values() if c.get(instruction.name) is instruction), {})
        given = sum(scope[name].bytes for name in instruction.operands if name in scope)
        return max(given, instruction.bytes)

    def traffic(self, computation: str, trips: Trips) -> int:
        """Bytes that one run of a computation reads from and writes to main memory, inner loops by their trips.

        What a fusion only slices counts as the slice, what it updates in place as the update; arrays in fast memory
        cost nothing. It is an upper bound where a compiler keeps an array in cache without saying so.
        """
        return sum(
            times * self.instruction_traffic(where, instruction)
            for where, instruction, times, _ in self.walk(trips, computation)
        )

    def instruction_traffic(self, computation: str, instruction: Instruction) -> int:
        """Bytes that one run of an instruction moves between main memory and the rest of the chip."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done") or opcode.removesuffix("-start") in COLLECTIVES:
            return 0
        scope = self.computations[computation]
        made = sum(shape.bytes for shape in instruction.shapes if not shape.near)
        if opcode in SLICES:
            source = scope.get(instruction.operands[0])
            read = 0 if source is not None and _is_fast(source) else instruction.bytes
            return read + made
        if opcode == "dynamic-update-slice":
            update = scope.get(instruction.operands[1])
            return 2 * update.bytes if update is not None and made else 0
        if opcode in PREFETCHES:
            target = instruction.shapes[PREFETCHES[opcode]]
            source = scope.get(instruction.operands[0])
            read = 0 if source is not None and _is_fast(source) else target.bytes
            return read + (0 if target.fast else target.bytes)
        if opcode == "fusion":
            return self._fusion_traffic(scope, instruction)
        read = [scope[name] for name in instruction.operands if name in scope]
        return made + sum(x.bytes for x in read if not _is_fast(x))

    def _fusion_traffic(self, scope: dict[str, Instruction], fusion: Instruction) -> int:
        inside = self.computations.get(fusion.called("calls")[0], {})
        numbers = {}  # parameter's name -> its number
        for inner in inside.values():
            if inner.opcode == "parameter":
                numbers[inner.name] = int(re.match(r"\((\d+)", inner.attributes)[1])  # pyright: ignore
        updated = self._updated(inside)
        total = 0
        for name, number in numbers.items():
            source = scope.get(fusion.operands[number]) if number < len(fusion.operands) else None
            if source is None or _is_fast(source):
                continue
            if name not in updated:
                total += self._read_of(inside, name)
        writes = [inner for inner in inside.values() if inner.name in set(updated.values())]
        in_place = {tuple(inner.shapes) for inner in writes}
        for inner in writes:
            update = inside.get(inner.operands[1])
            total += update.bytes if update is not None else 0
        for shape in fusion.shapes:
            if not shape.near and not _like(shape, in_place):
                total += shape.bytes
        return total

    def _updated(self, inside: dict[str, Instruction]) -> dict[str, str]:
        """Parameters of a fusion that it updates in place -> the update (a dynamic-update-slice into them)."""
        found = {}
        for inner in inside.values():
            if inner.opcode == "dynamic-update-slice":
                into = _through(inside, inner.operands[0])
                if inside[into].opcode == "parameter":
                    found[into] = inner.name
        return found

    def _read_of(self, inside: dict[str, Instruction], name: str) -> int:
        """Bytes of a fusion's parameter that it reads: slices where there is nothing else."""
        users = [inner for inner in inside.values() if name in inner.operands]
        aliases = [inner for inner in users if inner.opcode == "bitcast"]
        if users and all(inner.opcode in SLICES and inner.operands[0] == name for inner in users):
            return sum(inner.bytes for inner in users)
        if users and len(aliases) == len(users):
            return sum(self._read_of(inside, alias.name) for alias in aliases)
        nested = [inner for inner in users if inner.opcode == "fusion"]
        if users and len(nested) == len(users):
            return max(self._nested_read(inner, name) for inner in nested)
        return inside[name].bytes

    def _nested_read(self, fusion: Instruction, name: str) -> int:
        inside = self.computations.get(fusion.called("calls")[0], {})
        number = fusion.operands.index(name)
        for inner in inside.values():
            if inner.opcode == "parameter" and inner.attributes.startswith(f"({number})"):
                return self._read_of(inside, inner.name)
        return 0


def read_instruction(line: str) -> Instruction | None:
    """An instruction from its line; None for lines that are none."""
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if found is None:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inner, attributes = rest[len(opcode) : close + 1], rest[close + 1 :]
    if opcode in ("parameter", "constant"):
        attributes = inner + attributes
    return Instruction(found[2], opcode, read_shapes(shape), tuple(_NAME.findall(inner)), attributes, bool(found[1]))


def read_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape, those of a tuple one after another."""
    return tuple(
        Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), "S(1)" in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def group_size(instruction: Instruction) -> int:
    """Devices of one group of a collective; 1 where the text does not say."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]) if axis in sizes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    return 2 if "source_target_pairs" in text else 1


def totals(collectives: list[Collective]) -> dict[str, tuple[int, int]]:
    """(runs, bytes of all runs) by kind."""
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for one in collectives:
        runs, size = found[one.kind]
        found[one.kind] = (runs + one.times, size + one.times * one.bytes)
    return dict(found)


def _is_fast(instruction: Instruction) -> bool:
    return bool(instruction.shapes) and all(shape.near for shape in instruction.shapes)


def _like(shape: Shape, updated: set[tuple[Shape, ...]]) -> bool:
    """Whether a result is one of the arrays updated in place, in other words of the same numbers."""
    return any(
        one.dtype == shape.dtype and math.prod(one.dims) == math.prod(shape.dims) for each in updated for one in each
    )


def _through(inside: dict[str, Instruction], name: str) -> str:
    """What a chain of bitcasts starts from."""
    while inside[name].opcode in ("bitcast", "copy") and inside[name].operands:
        name = inside[name].operands[0]
    return name


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes the first one from `start`."""
    depth = 0
    for place in range(text.index("(", start), len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")

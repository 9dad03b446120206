"""A compiled program's text (XLA's HLO), taken apart: computations, instructions, loops.

XLA's own cost analysis counts a loop's body once and custom kernels not at all. Here `runs` says
how often each computation runs, and `accounts.py` counts by it.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

WIDTH = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
    "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8,
}  # fmt: skip
ARRAY = re.compile(rf"\b({'|'.join(WIDTH)})\[([\d,]*)\](\{{[^}}]*\}})?")
ELSEWHERE = re.compile(r"S\([1-9]\)")  # a memory space other than the device's main one
HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
NAME = re.compile(r"%([\w.\-]+)")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
LOOP = ("body", "condition")
TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


class Array(NamedTuple):
    """A type with its sizes; `near` says that it lies in the chip's own memory, not in HBM.

    >>> Array("bf16", (8, 128), False).bytes
    2048
    """

    kind: str
    sizes: tuple[int, ...]
    near: bool

    @property
    def bytes(self) -> int:
        return WIDTH[self.kind] * prod(self.sizes)


class Instruction(NamedTuple):
    """`%name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]  # names; of a parameter its number, of a constant its value
    attributes: str
    root: bool = False  # what its computation results in

    @property
    def arrays(self) -> list[Array]:
        """What it results in: one array, or those of a tuple."""
        return arrays(self.type)

    def computations(self) -> list[str]:
        """The computations that it calls, a loop's body and condition left out."""
        found = CALLED.findall(self.attributes)
        for listed in BRANCHES.findall(self.attributes):
            found += NAME.findall(listed)
        return found


Computation = dict[str, Instruction]  # in the order of the text


class Module(NamedTuple):
    """Computations by name, and the one that the program begins with."""

    entry: str
    computations: dict[str, Computation]


class Runs(NamedTuple):
    """How often each computation runs, and the loops whose trips nobody said."""

    times: dict[str, float]
    unknown: tuple[str, ...]


def arrays(text: str) -> list[Array]:
    """The arrays that a type names.

    >>> arrays("(f32[4]{0:S(1)}, (s32[], pred[2,3]))")[0]
    Array(kind='f32', sizes=(4,), near=True)
    """
    return [
        Array(kind, tuple(map(int, filter(None, sizes.split(",")))), bool(ELSEWHERE.search(layout)))
        for kind, sizes, layout in ARRAY.findall(text)
    ]


def parse(text: str) -> Module:
    """Takes a module's text apart.

    >>> text = 'ENTRY %main (a: f32[2]) -> f32[2] {\\n  ROOT %b = f32[2]{0} negate(%a)\\n}'
    >>> parse(text).computations["main"]["b"].operands
    ('a',)
    """
    entry, computations = "", dict[str, Computation]()
    inside: Computation = {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            inside = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif (found := INSTRUCTION.match(line)) and (made := _instruction(*found.groups())):
            inside[made.name] = made
    return Module(entry, computations)


def _instruction(root: str | None, name: str, rest: str) -> Instruction | None:
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    begin = rest.find("(")
    if begin < 0:
        return None
    close = _closing(rest, begin)
    operands = tuple(NAME.findall(rest[begin:close]))
    if rest[:begin] in ("parameter", "constant"):
        operands = (rest[begin + 1 : close - 1],)
    return Instruction(name, kind, rest[:begin], operands, rest[close:], root is not None)


def _closing(text: str, begin: int) -> int:
    """The place after the bracket that closes the one at `begin`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def loop(instruction: Instruction) -> tuple[str, str] | None:
    """The body and the condition of a while, None of anything else.

    >>> loop(Instruction("w", "s32[]", "while", ("x",), ", condition=%c, body=%b"))
    ('b', 'c')
    """
    if instruction.opcode != "while":
        return None
    found = (re.search(rf"{part}=%([\w.\-]+)", instruction.attributes) for part in LOOP)
    body, condition = (match[1] for match in found if match)
    return body, condition


def _trips(
    each: Instruction, body: Computation, condition: Computation, outside: Computation
) -> int | None:
    """How often a loop runs: as XLA says it, or by a condition that counts up to a constant."""
    if known := TRIPS.search(each.attributes):
        return int(known[1])
    test = next((inside for inside in condition.values() if inside.root), None)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (condition.get(name) for name in test.operands)
    place = re.search(r"index=(\d+)", counter.attributes) if counter else None
    if not (place and bound and bound.opcode == "constant"):
        return None
    start = _source(each.operands[0], outside)
    first = _source(start.operands[int(place[1])], outside) if start else None
    begin = int(first.operands[0]) if first and first.opcode == "constant" else 0
    return max(-(-(int(bound.operands[0]) - begin) // _pace(body, int(place[1]))), 0)


def _pace(body: Computation, place: int) -> int:
    """What a loop adds to its counter: 2 where XLA has written its body out twice."""
    root = next((inside for inside in body.values() if inside.root), None)
    grown = _source(root.operands[place], body) if root and root.opcode == "tuple" else None
    if grown is None or grown.opcode != "add":
        return 1
    added = (body.get(name) for name in grown.operands)
    return next((int(own.operands[0]) for own in added if own and own.opcode == "constant"), 1)


def _source(name: str, computation: Computation) -> Instruction | None:
    """What an instruction is a copy of."""
    found = computation.get(name)
    while found and found.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        found = computation.get(found.operands[0])
    return found


def runs(module: Module, trips: Sequence[Sequence[int]] = ()) -> Runs:
    """How often every computation runs when the program runs once.

    A loop's body counts as often as the compiler knows that it runs. Where it does not know,
    `trips` say it, in the order in which the program comes to such loops: of each the trips, then
    of the loops within it that are not known either, level by level. A loop that they say nothing
    of counts once, and is named.

    >>> text = '''
    ... %body (x: s32[]) -> s32[] {
    ...   ROOT %y = s32[] negate(%x)
    ... }
    ... ENTRY %main (a: s32[]) -> s32[] {
    ...   ROOT %w = s32[] while(%a), condition=%body, body=%body
    ... }'''
    >>> runs(parse(text), [(7,)]).times["body"], runs(parse(text)).unknown
    (14.0, ('w',))
    """
    times: dict[str, float] = defaultdict(float)
    unknown: list[str] = []
    waiting = iter(trips)

    def visit(name: str, count: float, levels: Sequence[int] | None) -> None:
        times[name] += count
        own_body = module.computations.get(name, {})
        for each in own_body.values():
            parts, within, factor = each.computations(), levels, 1
            if whiles := loop(each):
                parts = list(whiles)
                body, until = (module.computations.get(part, {}) for part in whiles)
                known = _trips(each, body, until, own_body)
                if known is not None:
                    factor = known
                else:
                    own = next(waiting, ()) if levels is None else levels
                    factor, within = (own[0], own[1:]) if own else (1, ())
                    unknown.extend([each.name] * (not own))
            for part in parts:
                visit(part, count * factor, within)

    visit(module.entry, 1.0, None)
    return Runs(dict(times), tuple(unknown))


def in_loops(module: Module) -> set[str]:
    """The computations that run within a loop, however deep they are called.

    >>> in_loops(Module("main", {"main": {}}))
    set()
    """
    found: set[str] = set()
    bodies = [part for each in _all(module) for part in loop(each) or ()]
    while bodies:
        name = bodies.pop()
        if name not in found:
            found.add(name)
            for each in module.computations.get(name, {}).values():
                bodies += each.computations()
                bodies += loop(each) or ()
    return found


def _all(module: Module) -> Iterator[Instruction]:
    for computation in module.computations.values():
        yield from computation.values()

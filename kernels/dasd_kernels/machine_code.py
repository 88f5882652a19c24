"""What a compiler made of a kernel: registers, stack, spills, and what its loops hold (SASS and GCN listings)."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}  # each chip's own
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"  # cuobjdump and nvdisasm come with Triton
TMA = 1024  # stands for a load by the tensor memory accelerator, wider than any instruction's bits


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies on tensor cores."""

    products: tuple[str, ...]  # opcodes
    others: int  # instructions that are no products
    loads: tuple[int, ...]  # bits of its global loads


@dataclass(frozen=True)
class Machine:
    """One kernel. `spill` counts loads and stores of spilled registers; `loads` holds the bits of all global loads;
    `around` counts the instructions of the loop around all `loops`, less theirs."""

    regs: int
    stack: int
    spill: int
    shared: int
    products: tuple[str, ...]
    loads: tuple[int, ...]
    loops: tuple[Loop, ...]
    around: int


@dataclass(frozen=True)
class Syntax:
    """How a listing writes its products, branches (group 1: the label) and what a path ends with."""

    product: str
    branch: str
    ends: str


SASS = Syntax(
    r"(?:@\S+ )?([A-Z]*MMA)\b", r"(?:@\S+ )?(?:BRA|BRX|JMP|CALL)\b.*?\(?(\.L\w+)", r"(?:BRA|JMP) `?\(?\.L|EXIT|RET|BPT"
)
GCN = Syntax(r"(v_mfma)", r"s_c?branch\w* (\.L\w+)", r"s_branch |s_endpgm")


def read_sass(cubin: bytes) -> Machine:
    """Of a cubin that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = disassemble(Path(file.name))
    regs, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    return of_sass(regs, stack, 0, sass)


def disassemble(cubin: Path) -> tuple[str, str]:
    """(what its kernels use, SASS) of a cubin."""
    usage, sass = (
        subprocess.run([TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    return usage, sass


def of_sass(regs: int, stack: int, shared: int, sass: str) -> Machine:
    """By one kernel's listing and what it uses."""
    lines = re.findall(r"^(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\d+\s+)?[A-Z][^;]*)", sass, re.M)
    code = [label or re.sub(r"\s+", " ", text) for label, text in lines]
    spill = sum(bool(re.match(r"(?:@\S+ )?(STL|LDL)\b", text)) for text in code)
    return Machine(regs, stack, spill, shared, *parts(code, SASS))


def read_gcn(text: str) -> Machine:
    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])

    lines = re.findall(r"^(\.L\w+):|^\s+([a-z]\w+[^\n;]*)", text, re.M)
    code = [label or line for label, line in lines]
    regs, stack, spill = number("vgpr_count"), number("private_segment_fixed_size"), number("vgpr_spill_count")
    return Machine(regs, stack, spill, number("group_segment_fixed_size"), *parts(code, GCN))


def load_bits(text: str) -> int | None:
    """Bits that an instruction loads from global memory; None for any other instruction."""
    opcode = re.sub(r"^@\S+ ", "", text).split()[0]
    if opcode.startswith("UTMALDG"):
        return TMA
    if re.match(r"LDG(STS)?\b", opcode):
        return int((re.findall(r"\.(64|128|256)\b", opcode) or ["32"])[0])
    if re.match(r"(global|buffer|flat)_load", opcode):
        return 32 * int((re.findall(r"x(\d)$", opcode) or ["1"])[0])
    return None


def parts(code: list[str], syntax: Syntax) -> tuple[tuple[str, ...], tuple[int, ...], tuple[Loop, ...], int]:
    """`code`: labels and instructions in order. Returns its products, loads, innermost product loops, and the number
    of instructions around those."""
    matches = [re.match(syntax.product, text) for text in code]
    opcode = [match[1] if match else "" for match in matches]
    bits = [load_bits(text) for text in code]
    size = [not text.startswith(".L") for text in code]
    loops = [body for body in natural_loops(code, syntax) if any(opcode[i] for i in body)]
    inner = [body for body in loops if not any(other < body for other in loops)]
    found = []
    for body in inner:
        products = tuple(opcode[i] for i in sorted(body) if opcode[i])
        loads = tuple(b for i in sorted(body) if (b := bits[i]))
        found.append(Loop(products, sum(size[i] for i in body) - len(products), loads))
    around = 0
    if outer := [body for body in loops if body not in inner]:  # of several, a compiler's versions, the fullest
        held = lambda body: [one for one in inner if one < body]  # noqa: E731
        whole = max(outer, key=lambda body: (len(held(body)), -len(body)))
        around = sum(size[i] for i in whole.difference(*held(whole)))
    return tuple(o for o in opcode if o), tuple(b for b in bits if b), tuple(found), around


def natural_loops(code: list[str], syntax: Syntax) -> list[frozenset[int]]:
    """Positions of the instructions of each loop. A branch to an earlier address is no loop by itself: waits for a
    barrier are laid out at the end and jump back. It is one if every path to it passes its target."""
    begins = {0} | {i for i, text in enumerate(code) if text.startswith(".L")}
    begins |= {i + 1 for i, text in enumerate(code) if re.match(syntax.branch, text) and i + 1 < len(code)}
    starts = sorted(begins)
    block_at = {start: block for block, start in enumerate(starts)}
    label = {code[i]: block for i, block in block_at.items() if code[i].startswith(".L")}
    spans = list(zip(starts, [*starts[1:], len(code)], strict=True))
    before: list[set[int]] = [set() for _ in spans]
    for block, (_, end) in enumerate(spans):
        last = code[end - 1]
        target = re.match(syntax.branch, last)
        if target and target[1] in label:
            before[label[target[1]]].add(block)
        if not re.match(syntax.ends, last) and block + 1 < len(spans):
            before[block + 1].add(block)
    dominators = [1] + [-1] * (len(spans) - 1)  # bit sets; -1 holds every block
    changed = True
    while changed:
        changed = False
        for block in range(1, len(spans)):
            common = -1
            for earlier in before[block]:
                common &= dominators[earlier]
            if (now := common | 1 << block) != dominators[block]:
                dominators[block], changed = now, True
    bodies: dict[int, set[int]] = {}
    for head in range(len(spans)):
        for tail in before[head]:
            if dominators[tail] >> head & 1 and dominators[tail] != -1:
                body, stack = bodies.setdefault(head, {head}), [tail]
                while stack:
                    if (block := stack.pop()) not in body:
                        body.add(block)
                        stack += before[block]
    return [frozenset(i for block in body for i in range(*spans[block])) for body in bodies.values()]

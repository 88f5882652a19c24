"""Compiles every Triton kernel ahead of time, no GPU needed, and checks what came out against what is promised.
The CUDA kernels of csrc/packing are read from the module that nvcc made of them, where there is one.

    python -m dasd_kernels.compile_report [--arch sm_90 ...] [--only TEXT] [--json]

A line is one kernel, element type and set of options, for sm_80, sm_90, sm_100 (Nvidia) and gfx942 (AMD):
  block                rows x columns x depth of a tile
  regs, stack, spill   registers a thread, bytes of stack, and loads and stores of spilled registers (AMD: vector
                       ones; scalar registers spill into lanes of those, not to memory)
  shared               bytes of shared memory, which the chip's limit bounds
  mma                  tensor-core instructions in one pass of the loop over D, by name
  loads                the narrowest global load in that loop: bits, or TMA; elsewhere the widest load
  k-loop               its other instructions (of two loops, teacher's and student's, the longer)
  tile                 those outside it, for one tile of the vocabulary; selects for the last tile and for tiles that
                       hold a label are counted, though a branch skips them elsewhere
  MFLOP, KB            one tile's, at D = 2560; the operands come from L2 mostly
Then the work of whole calls, counted from the tiles, beside the least that any implementation needs.

Promises: no stack and no spills, shared memory within the limit; in the products' inner loop this generation's
tensor-core instruction (HMMA, HGMMA, UTCHMMA, v_mfma) alone, and no global load under 128 bits except where strides or
alignment ("unaligned") rule them out; in the CUDA kernels loads of 16 bytes, but for rows whose size is no multiple
of that. Exits 1 where one is broken. Nothing here is a time.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dasd_kernels import cuda_report, triton_adamw, triton_kl, triton_rows, triton_score
from dasd_kernels.machine_code import PRODUCTS, TMA, Machine, read_gcn, read_sass
from dasd_kernels.triton_ce import WORKSPACE, chunk_rows

SHAPE = (32768, 2560, 151936)  # N, D, V of the tables
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
PROGRAMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}  # multiprocessors, one program each
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INT64 = ("label", "count", "order", "by_label", "offsets")
INT8 = ("poison", "first")
PLAIN = ("rows", "begin", "V", "D", "stride_xn", "stride_wv", "stride_e", "elements", "place", "seed")
FLOATS = ("softcap", "z_loss", "smoothing", "scale", "first_decay", "second_decay", "rate", "root", "eps", "decay")
ELEMENTS = ("x", "w", "bias", "e_out", "xs", "grads")
MODULES = (triton_score, triton_rows, triton_kl, triton_adamw)


@dataclass(frozen=True)
class Case:
    """One compilation; `kernel` is the name of a function of MODULES."""

    arch: str
    kernel: str
    dtype: str
    options: str
    flags: dict[str, Any]
    warps: int = 4
    stages: int = 2
    aligned: bool = True

    def block(self) -> tuple[int, ...]:
        """Rows, columns and depth of a product's tile; () of a sweep."""
        f = self.flags
        return (f["BM"], f.get("BN", f["BM"]), f["BK"]) if "BK" in f else ()


@dataclass
class Facts:
    arch: str
    kernel: str
    dtype: str
    options: str
    block: str = ""
    regs: int = 0
    stack: int = 0
    spill: int = 0
    shared: int = 0
    mma: str = ""
    loads: str = ""
    k_loop: int = 0
    tile: int = 0
    mflop: float = 0.0
    kbytes: float = 0.0
    broken: list[str] = field(default_factory=list)


def cases(arch: str) -> list[Case]:
    return [c for dtype in NAMES for c in [*products(arch, dtype), *divergences(arch, dtype), *sweeps(arch, dtype)]]


def products(arch: str, dtype: torch.dtype) -> list[Case]:
    """exp_kernel and pivot_kernel with the tiles and switches that sum_exponentials and find_pivot give them."""
    fp32 = dtype == torch.float32
    precision = "tf32x3" if fp32 and not arch.startswith("gfx") else "ieee"
    off = {"BIAS": False, "SOFTCAP": False, "WIDEN": False, "PRECISION": precision}
    tma = triton_score.has_tma(arch, dtype)
    every = {"BIAS": True, "SOFTCAP": True}
    wanted: list[tuple[str, str, dict[str, Any], bool]] = [
        ("score", "score", {}, True),
        ("score all", "score", {**every, "ENTROPY": True, "RANK": True}, True),
        ("score entropy rank", "score", {"ENTROPY": True, "RANK": True}, True),
        ("score retry", "score", {"RETRY": True}, True),
        ("max", "max", {"RETRY": True}, True),
        ("score unaligned", "score", {}, False),
        ("score all unaligned", "score", {**every, "ENTROPY": True, "RANK": True}, False),
    ]
    if dtype != torch.float16:
        wanted += [("store", "store", {}, True), ("store all", "store", every, True)]
        wanted += [("store retry", "store", {"RETRY": True}, True), ("store unaligned", "store", {}, False)]
        wanted += [("store all unaligned", "store", every, False)]
    found = []
    for name, mode, switches, aligned in wanted:
        options = any(switches.get(k, False) for k in ("BIAS", "SOFTCAP", "ENTROPY", "RANK"))
        tile = triton_score.exp_tile(dtype, arch, mode == "store", options, aligned)
        flags = {
            **off, "SPLITS": 16, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "MODE": mode, "TMA": tma and aligned,
            "EVEN": aligned, "ENTROPY": False, "RANK": False, "RETRY": False, **switches,
        }  # fmt: skip
        found.append(Case(arch, "exp_kernel", NAMES[dtype], name, flags, tile.warps, tile.stages, aligned))
    for name, switches, aligned in (("", {}, True), ("all", every, True), ("all unaligned", every, False)):
        tile = triton_score.pivot_tile(dtype, arch, aligned)
        flags = {**off, "SAMPLES": triton_score.SAMPLES, "BM": tile.bm, "BK": tile.bk, "EVEN": aligned, **switches}
        found.append(Case(arch, "pivot_kernel", NAMES[dtype], name, flags, tile.warps, tile.stages, aligned))
    return found


def divergences(arch: str, dtype: torch.dtype) -> list[Case]:
    """kl_kernel as sum_pair launches it."""
    fp32, amd = dtype == torch.float32, arch.startswith("gfx")
    every = {"BIAS": True, "BIAS2": True, "SOFTCAP": True, "SOFTCAP2": True}
    found = []
    for name, switches, aligned in (
        ("", {}, True), ("retry", {"RETRY": True}, True), ("all", every, True), ("unaligned", {}, False),
        ("all unaligned", every, False),
    ):  # fmt: skip
        tile = triton_kl.kl_tile(dtype, arch, switches is every, aligned)
        flags = {
            **dict.fromkeys(every, False), "WIDEN": False, "PRECISION": "tf32x3" if fp32 and not amd else "ieee",
            "SPLITS": 16, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "EVEN": aligned, "RETRY": False,
            "TMA": triton_score.has_tma(arch, dtype) and aligned, **switches,
        }  # fmt: skip
        found.append(Case(arch, "kl_kernel", NAMES[dtype], name, flags, tile.warps, tile.stages, aligned))
    return found


def sweeps(arch: str, dtype: torch.dtype) -> list[Case]:
    name, shape = NAMES[dtype], {"PARTS": 16, "WIDTH": 16, "BLOCK": 64}
    every = {"ENTROPY": True, "RANK": True, "GRAD": True, "SOFTCAP": True}
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("finish_kernel", {**shape, **every}),
        ("scale_rows_kernel", {"BLOCK": 1024}),
        ("mean_logit_kernel", {"BLOCK": 1024, "BIAS": True}),
        ("grad_hidden_kernel", {"BLOCK": 1024, "SMOOTH": True}),
        ("grad_label_kernel", {"BLOCK": 1024, "WEIGHT": True, "BIAS": True}),
    ]
    if dtype == torch.float32:
        wanted += [("check_kernel", shape), ("raise_kernel", shape), ("segment_kernel", {"BLOCK": 1024})]
        wanted += [("kl_finish_kernel", shape)]
    if dtype != torch.float16:
        wanted += [("adamw_kernel", {"BLOCK": triton_adamw.BLOCK})]
    return [Case(arch, kernel, name, "", flags) for kernel, flags in wanted]


def signature(case: Case, names: list[str]) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types of the arguments, constants, and which are multiples of 16."""
    types: dict[str, str] = {}
    constants = dict(case.flags)
    tma = case.flags.get("TMA", False)
    for full in names:
        name = full.removesuffix("2")  # the student's in kl_kernel
        if full in case.flags:
            kind = "constexpr"
        elif name in ("x", "w") and tma:
            side = case.flags["BM" if name == "x" else "BN"]
            kind = f"tensordesc<{case.dtype}[{side},{case.flags['BK']}]>"
        elif name in ("stride_xd", "stride_wd") or (name == "bias" and not case.flags["BIAS"]):
            kind, constants[full] = "constexpr", None if name == "bias" else 1
        elif name in INT64 or (name in ("out_rank", "count") and case.kernel in ("finish_kernel", "segment_kernel")):
            kind = "*i64"
        elif name in INT8:
            kind = "*i8"
        elif name == "second":
            kind = "*bf16"
        elif name in ("out_rank", "ranks"):
            kind = "*i32"
        elif name in ELEMENTS or (name == "out" and case.kernel != "mean_logit_kernel"):
            kind = "*" + case.dtype
        elif name in PLAIN:
            kind = "i32"
        else:
            kind = "fp32" if name in FLOATS else "*fp32"
        types[full] = kind
    even = {"D", "stride_xn", "stride_wv", "D2", "stride_xn2", "stride_wv2"} if case.aligned else set()
    multiple = [n for n in names if types[n].startswith("*") or n in even | {"stride_e", "elements"}]
    return types, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in multiple}


def compile_case(case: Case) -> Facts:
    kernel = next(k for m in MODULES if (k := getattr(m, case.kernel, None)))
    names = kernel.arg_names
    types, constants, attributes = signature(case, names)
    keyed = {(names.index(k),): v for k, v in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=keyed, attrs=attributes)
    amd = case.arch.startswith("gfx")
    target = GPUTarget("hip", case.arch, 64) if amd else GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    facts = Facts(case.arch, case.kernel, case.dtype, case.options, "x".join(map(str, case.block())))
    try:
        built = triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})
    except Exception as failure:  # whatever the compiler raises is this line's result
        facts.broken.append(f"does not compile: {str(failure).strip().splitlines()[-1][:120]}")
        return facts
    machine = read_gcn(built.asm["amdgcn"]) if amd else read_sass(built.asm["cubin"])
    facts.regs, facts.stack, facts.spill = machine.regs, machine.stack, machine.spill
    facts.shared = max(machine.shared, built.metadata.shared)
    facts.tile, facts.k_loop = machine.around, max((loop.others for loop in machine.loops), default=0)
    counts = {o: max(loop.products.count(o) for loop in machine.loops) for loop in machine.loops for o in loop.products}
    facts.mma = " + ".join(f"{opcode} {count}" for opcode, count in sorted(counts.items()))
    loads = [bits for loop in machine.loops for bits in loop.loads]
    narrowest = min(loads) if machine.loops and loads else max(machine.loads, default=0)
    facts.loads = "TMA" if narrowest == TMA else str(narrowest or "")
    if case.block():
        rows, columns, _ = case.block()
        size, width = 4 if case.dtype == "fp32" else 2, SHAPE[1] * (2 if case.kernel == "kl_kernel" else 1)
        facts.mflop = 2e-6 * rows * columns * width
        stored = rows * columns if case.flags.get("MODE") == "store" else 0
        facts.kbytes = size / 1024 * ((rows + columns) * width + stored)
    check(case, machine, facts)
    return facts


def check(case: Case, machine: Machine, facts: Facts) -> None:
    broken = facts.broken
    if facts.stack or facts.spill:
        broken.append(f"spills: {facts.stack} bytes of stack, {facts.spill} accesses")
    if facts.shared > SHARED[case.arch]:
        broken.append(f"{facts.shared} bytes of shared memory, more than {SHARED[case.arch]}")
    if not case.block():
        return
    if not machine.loops:
        broken.append("no tensor-core instruction in a loop")
    narrowest = min((min(loop.loads, default=0) for loop in machine.loops), default=0)
    if case.aligned and narrowest < 128:
        broken.append(f"global loads of {narrowest} bits in the inner loop")
    if foreign := set(machine.products) - {PRODUCTS[case.arch]}:
        broken.append(f"{', '.join(sorted(foreign))}, not {PRODUCTS[case.arch]}")


@dataclass(frozen=True)
class Work:
    """A call at SHAPE in bf16: counted, not measured. `floor` TFLOP and `least` GB are kernels' lower bounds."""

    arch: str
    call: str
    tflop: float
    floor: float
    to_chip_gb: float  # from L2 to the multiprocessors
    memory_gb: float  # of device memory, if L2 serves every program that runs at the same time
    least_gb: float


def work(arch: str) -> list[Work]:
    """The score, a loss with its gradients (two of the three products by cuBLAS, in fp32 accumulation), and the
    divergences of two models of this width."""
    n, d, v = SHAPE
    dot = 2e-12 * n * d * v
    found = []
    for call, models in (("score", 1), ("train", 1), ("divergence", 2)):
        tile = triton_score.exp_tile(torch.bfloat16, arch, call == "train", False, True)
        if models == 2:
            tile = triton_kl.kl_tile(torch.bfloat16, arch, False, True)
        rows, columns = math.ceil(n / tile.bm) * tile.bm, math.ceil(v / tile.bn) * tile.bn
        own = 2e-12 * d * (rows * columns + n * (triton_score.SAMPLES + 64))
        to_chip = 2e-9 * d * (rows // tile.bm) * (columns // tile.bn) * (tile.bm + tile.bn)
        together = max(1, PROGRAMS[arch] // triton_score.splits(v))  # row blocks that run at the same time
        memory = 2e-9 * d * (2 * n + v * math.ceil(rows / tile.bm / together))
        least = 2e-9 * d * (n + v)
        if call == "train":
            pitch = math.ceil(v / 64) * 64
            chunks = math.ceil(n / chunk_rows(n, d, pitch, 2, WORKSPACE))
            sweeps_of_rows = 24 * n * d  # gathered and scaled copies, the fp32 product, dX, the labels' residual
            head = d * v * (2 * chunks + 4 * (2 * chunks - 1))  # W read for dX; dW read and written, once a chunk
            memory += 1e-9 * (3 * 2 * n * pitch + sweeps_of_rows + head)  # E is written once and read twice
            least += 1e-9 * (2 * d * n + 4 * d * v)
        extra, floor = (2 * dot, 3 * dot) if call == "train" else (0.0, models * dot)
        found.append(Work(arch, call, models * own + extra, floor, models * to_chip, models * memory, models * least))
    return found


def show(all_facts: list[Facts]) -> None:
    head = ("arch", "kernel", "type", "options", "block", "regs", "stack", "spill", "shared", "mma", "loads", "k-loop",
            "tile", "MFLOP", "KB")  # fmt: skip
    blank = lambda number: round(number) or ""  # noqa: E731
    cells = [(f.arch, f.kernel, f.dtype, f.options, f.block, f.regs, f.stack, f.spill, f.shared, f.mma, f.loads,
              blank(f.k_loop), blank(f.tile), blank(f.mflop), blank(f.kbytes)) for f in all_facts]  # fmt: skip
    table(head, cells, ["" if not f.broken else "BROKEN: " + "; ".join(f.broken) for f in all_facts])


def show_work(found: list[Work]) -> None:
    print("\nbf16, N, D, V = {}, {}, {}; counted, not measured:".format(*SHAPE))
    head = ("arch", "call", "TFLOP", "floor", "x floor", "GB from L2", "GB of memory", "least GB")
    cells = [(w.arch, w.call, f"{w.tflop:.2f}", f"{w.floor:.2f}", f"{w.tflop / w.floor:.4f}", f"{w.to_chip_gb:.0f}",
              f"{w.memory_gb:.1f}", f"{w.least_gb:.1f}") for w in found]  # fmt: skip
    table(head, cells, [""] * len(cells))


def table(head: tuple[str, ...], cells: list[tuple[Any, ...]], ends: list[str]) -> None:
    lines = [head, *(tuple(map(str, row)) for row in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line, end in zip(lines, ["", *ends], strict=True):
        print(("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + "  " + end).rstrip())


def report(archs: list[str], only: str = "") -> list[Facts]:
    """Facts of the cases whose "kernel type options" contains `only`; a process a CPU."""
    wanted = [c for arch in archs for c in cases(arch) if only in f"{c.kernel} {c.dtype} {c.options}"]
    if not wanted:
        return []
    workers = max(1, min(len(wanted), os.cpu_count() or 1))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(compile_case, wanted, chunksize=1)


def cuda_kernels(archs: list[str], only: str = "") -> list[Facts]:
    """Facts of the kernels in the compiled CUDA part; none where the package was built without nvcc."""
    found: list[Facts] = []
    if (module := cuda_report.module()) is None:
        return found
    for arch in (a for a in archs if a.startswith("sm_")):
        for name, machine in cuda_report.read_module(module, arch).items():
            kernel, option = cuda_report.short(name)
            facts = Facts(arch, kernel, "cuda", option, "", machine.regs, machine.stack, machine.spill, machine.shared)
            facts.loads, facts.broken = str(max(machine.loads, default="")), cuda_report.broken(name, machine)
            if only in f"{kernel} cuda {option}":
                found.append(facts)
    return found


def main(arguments: list[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dasd_kernels.compile_report", description=summary)
    parser.add_argument("--arch", nargs="+", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--only", default="", help='cases whose "kernel type options" contains this')
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: nothing would be compiled")
    found = report(options.arch, options.only) + cuda_kernels(options.arch, options.only)
    if options.json:
        json.dump([asdict(f) for f in found], sys.stdout, indent=1)
    else:
        show(found)
        show_work([w for arch in options.arch for w in work(arch)])
    broken = sum(bool(f.broken) for f in found)
    print(f"{len(found)} compiled, {broken} with a broken promise", file=sys.stderr)
    return 1 if broken or not found else 0


if __name__ == "__main__":
    sys.exit(main())

"""What nvcc made of csrc/packing/*.cu, read from the compiled module itself; part of compile_report."""

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

from dasd_kernels.machine_code import TOOLS, Machine, disassemble, of_sass

KERNELS = ("write_packs", "gather_rows", "scatter_rows")
# The widest load that each kernel's inner work must have, by a part of its mangled name: tokens four at a time, rows
# by lines of 16 bytes, and rows that have no such alignment by words.
LOADS = {"write_packs": 128, "gather_rowsINS_4Line": 128, "scatter_rowsINS_4Line": 128, "rowsIj": 32}


def module() -> Path | None:
    """The compiled CUDA part; None where the package was built without nvcc."""
    spec = importlib.util.find_spec("dasd_kernels._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def read_module(path: Path, arch: str) -> dict[str, Machine]:
    """The kernels compiled for `arch`, by mangled name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", arch, path], cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob(f"*{arch}.cubin")):
            usage, sass = disassemble(cubin)
            for name, regs, stack, shared in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
                found[name] = of_sass(int(regs), int(stack), int(shared), _section(sass, name))
    return found


def _section(sass: str, name: str) -> str:
    """One kernel's part of a listing."""
    begin = sass.index(f".section\t.text.{name},")
    end = sass.find(".section\t", begin + 1)
    return sass[begin : end if end > 0 else len(sass)]


def short(name: str) -> tuple[str, str]:
    """(kernel, option) of a mangled name."""
    kernel = next(k for k in KERNELS if k in name)
    return kernel, "16 bytes" if "Line" in name else "4 bytes" if f"{kernel}Ij" in name else ""


def broken(name: str, machine: Machine) -> list[str]:
    """The promises that a kernel breaks."""
    wanted = next(bits for part, bits in LOADS.items() if part in name)
    widest = max(machine.loads, default=0)
    spills = f"spills: {machine.stack} bytes of stack, {machine.spill} accesses"
    narrow = f"global loads of at most {widest} bits, not {wanted}"
    return [what for is_so, what in ((machine.stack or machine.spill, spills), (widest < wanted, narrow)) if is_so]

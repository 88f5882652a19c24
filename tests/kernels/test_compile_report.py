"""compile_report on a few kernels; `python -m dasd_kernels.compile_report`, a step of CI, does all of them."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)
report = pytest.importorskip("dasd_kernels.compile_report")


def case(arch, dtype, options, kernel="exp_kernel"):
    return next(c for c in report.products(arch, dtype) if (c.kernel, c.options) == (kernel, options))


@pytest.mark.parametrize(
    "arch, most, mma", [("sm_80", 255, "HMMA 32"), ("sm_90", 255, "HGMMA 4"), ("sm_100", 255, "UTCHMMA 4"),
                        ("gfx942", 512, "v_mfma 16")],
)  # fmt: skip
def test_training_kernel_keeps_its_promises(arch, most, mma):
    """A pass is 128 x 128 x 64 (sm_80: 32): HGMMA and UTCHMMA take 16 of the depth; HMMA 16 x 8 x 16 and v_mfma
    32 x 32 x 8 in each of 8 warps."""
    facts = report.compile_case(case(arch, torch.bfloat16, "store retry"))
    assert not facts.broken and facts.mma == mma and facts.stack == 0 and facts.spill == 0
    assert 0 < facts.regs <= most and 20 < facts.k_loop < 200 and facts.tile > 500
    assert facts.loads == ("TMA" if arch in ("sm_90", "sm_100") else "128")


def test_the_command_prints_what_it_compiled():
    command = [sys.executable, "-m", "dasd_kernels.compile_report", "--arch", "sm_90", "--only", "kl_finish", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "1 compiled, 0 with a broken promise" in done.stderr, done.stderr[-2000:]
    (facts,) = json.loads(done.stdout)
    assert facts["kernel"] == "kl_finish_kernel" and facts["regs"] > 0 and facts["mma"] == "" and not facts["broken"]


def test_it_refuses_to_report_interpreted_kernels():
    command = [sys.executable, "-m", "dasd_kernels.compile_report"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def test_every_kernel_is_covered():
    members = [pair for module in report.MODULES for pair in vars(module).items()]
    named = {name for name, value in members if name.endswith("_kernel") and hasattr(value, "arg_names")}
    for arch in report.SHARED:
        assert {c.kernel for c in report.cases(arch)} == named
        assert {c.dtype for c in report.cases(arch) if c.kernel in ("exp_kernel", "kl_kernel")} == {
            "bf16",
            "fp16",
            "fp32",
        }


def test_broken_promises_are_found(monkeypatch):
    """Tiles that were rejected: one that spills, one whose stages exceed the shared memory, one of fewer rows than
    wgmma takes, and one whose loads lost their alignment."""
    big = case("sm_90", torch.bfloat16, "store")
    big = replace(big, flags={**big.flags, "BN": 256})
    assert any("spills" in b for b in report.compile_case(big).broken)
    assert any("shared memory" in b for b in report.compile_case(replace(big, stages=6)).broken)
    old = case("sm_90", torch.float32, "", "pivot_kernel")
    old = replace(old, flags={**old.flags, "BM": 32}, warps=4)
    assert report.compile_case(old).broken == ["HMMA, not HGMMA"]
    thin, real = case("sm_80", torch.bfloat16, "score unaligned"), report.signature
    assert report.compile_case(thin).broken == []
    monkeypatch.setattr(report, "signature", lambda c, names: real(replace(c, aligned=False), names))
    assert report.compile_case(replace(thin, aligned=True)).broken == ["global loads of 32 bits in the inner loop"]
    nothing = report.compile_case(replace(thin, flags={**thin.flags, "BK": 8}))
    assert len(nothing.broken) == 1 and nothing.broken[0].startswith("does not compile")


def test_loops_are_told_from_waits_that_jump_back():
    """The wait at the end is entered from inside the loop over D: a backward branch, but no loop of products."""
    from dasd_kernels.machine_code import SASS, parts

    code = ["MOV", ".L_1", "FADD", ".L_2", "@!P0 BRA `(.L_4)", ".L_3", "LDG.E.128 R0", "HMMA.16816 R1", "IADD",
            "@P1 BRA `(.L_2)", "EX2", "@P2 BRA `(.L_1)", "HMMA.16816 R1", "EXIT",
            ".L_4", "NANOSLEEP", "@!P0 BRA `(.L_4)", "BRA `(.L_3)"]  # fmt: skip
    products, loads, loops, around = parts(code, SASS)
    assert products == ("HMMA", "HMMA") and loads == (128,)
    assert [(loop.products, loop.others, loop.loads) for loop in loops] == [(("HMMA",), 7, (128,))]
    assert around == 3  # FADD, EX2 and the branch back


def test_the_work_of_a_call_is_near_the_floor():
    n, d, v = report.SHAPE
    score, train, divergence = report.work("sm_90")
    assert score.floor == pytest.approx(2e-12 * n * d * v) and train.floor == 3 * score.floor
    assert divergence.floor == 2 * score.floor
    assert all(1 < w.tflop / w.floor < 1.005 for w in (score, train, divergence))
    assert score.least_gb == pytest.approx(2e-9 * d * (n + v)) and score.memory_gb < train.memory_gb


def test_cuda_kernels_load_sixteen_bytes_and_spill_nothing():
    """Where nvcc built them; what is printed is read from the module that is shipped."""
    if report.cuda_report.module() is None:
        pytest.skip("the package was built without nvcc (DASD_CUDA)")
    facts = report.cuda_kernels(["sm_80", "sm_90", "sm_100", "gfx942"])
    assert len(facts) == 15 and {f.kernel for f in facts} == set(report.cuda_report.KERNELS)
    assert not any(f.broken for f in facts) and all(0 < f.regs <= 64 for f in facts)
    assert {f.loads for f in facts if f.options != "4 bytes"} == {"128"}
    (packs,) = report.cuda_kernels(["sm_90"], "write_packs")
    assert packs.arch == "sm_90" and packs.stack == packs.spill == packs.shared == 0


def test_broken_promises_of_cuda_kernels_are_found():
    from dasd_kernels.machine_code import Machine

    narrow = Machine(40, 0, 0, 0, (), (32, 64), (), 0)
    name = "_ZN4dasd11gather_rowsINS_4LineEEEvPKT_PKllPS3_"
    assert report.cuda_report.broken(name, narrow) == ["global loads of at most 64 bits, not 128"]
    assert report.cuda_report.broken("_ZN4dasd11gather_rowsIjEEv", replace(narrow, stack=8, spill=2)) == [
        "spills: 8 bytes of stack, 2 accesses"
    ]

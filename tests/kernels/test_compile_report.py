"""compile_report on a few kernels; `python -m dasd_kernels.compile_report` does all of them, in some minutes."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = "import sys; from dasd_kernels import compile_report as c; "


def run(*arguments, **env):
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=kept | env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arch, most, mma", [("sm_80", 255, "HMMA 32"), ("sm_90", 255, "HGMMA 4"), ("sm_100", 255, "UTCHMMA 4"),
                        ("gfx942", 512, "v_mfma 16")],
)  # fmt: skip
def test_training_kernel_keeps_its_promises(arch, most, mma):
    """A pass is 128 x 128 x 64 (sm_80: 32): HGMMA and UTCHMMA take 16 of the depth; HMMA 16 x 8 x 16 and v_mfma
    32 x 32 x 8 in each of 8 warps."""
    done = run("-m", "dasd_kernels.compile_report", "--arch", arch, "--only", "bf16 store retry", "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (facts,) = json.loads(done.stdout)
    assert facts["kernel"] == "exp_kernel" and facts["mma"] == mma and facts["stack"] == 0 and not facts["broken"]
    assert 0 < facts["regs"] <= most and 20 < facts["k_loop"] < 200 and facts["tile"] > 500
    assert facts["loads"] == ("TMA" if arch in ("sm_90", "sm_100") else "128")


def test_broken_promises_are_found():
    """Tiles that were rejected: one that spills, one whose stages exceed the shared memory, one of fewer rows than
    wgmma takes, and one whose loads lost their alignment."""
    code = SCRIPT + (
        "import torch, dataclasses as d, json\n"
        "case = [x for x in c.products('sm_90', torch.bfloat16) if x.options == 'store all'][0]\n"
        "big = d.replace(case, flags={**case.flags, 'BN': 256})\n"
        "deep = d.replace(big, arch='sm_90', stages=6, options='score')\n"
        "old = [x for x in c.products('sm_90', torch.float32) if x.kernel == 'pivot_kernel'][0]\n"
        "old = d.replace(old, flags={**old.flags, 'BM': 32}, warps=4)\n"
        "thin = [x for x in c.products('sm_80', torch.bfloat16) if x.options == 'score unaligned'][0]\n"
        "found = [c.compile_case(x).broken for x in (case, big, deep, old, thin)]\n"
        "real = c.signature\n"
        "c.signature = lambda case, names: real(d.replace(case, aligned=False), names)\n"
        "print(json.dumps([*found, c.compile_case(d.replace(thin, aligned=True)).broken]))"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, spilling, deep, old, excused, thin = json.loads(done.stdout)
    assert kept == [] and any("spills" in b for b in spilling)
    assert any("shared memory" in b for b in deep) and old == ["HMMA, not HGMMA"]
    assert excused == [] and thin == ["global loads of 32 bits in the inner loop"]


def test_loops_are_told_from_waits_that_jump_back():
    """The wait at the end is entered from inside the loop over D: a backward branch, but no loop of products."""
    code = SCRIPT + (
        "from dasd_kernels.machine_code import SASS, parts\n"
        "code = ['MOV', '.L_1', 'FADD', '.L_2', '@!P0 BRA `(.L_4)', '.L_3', 'LDG.E.128 R0', 'HMMA.16816 R1', 'IADD',\n"
        "        '@P1 BRA `(.L_2)', 'EX2', '@P2 BRA `(.L_1)', 'HMMA.16816 R1', 'EXIT',\n"
        "        '.L_4', 'NANOSLEEP', '@!P0 BRA `(.L_4)', 'BRA `(.L_3)']\n"
        "products, loads, loops, around = parts(code, SASS)\n"
        "print([products, loads, [(l.products, l.others, l.loads) for l in loops], around])"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    products, loads, loops, around = eval(done.stdout)
    assert products == ("HMMA", "HMMA") and loads == (128,) and loops == [(("HMMA",), 7, (128,))]
    assert around == 3  # FADD, EX2 and the branch back


def test_the_work_of_a_call_is_near_the_floor():
    code = SCRIPT + "import json; from dataclasses import asdict; print(json.dumps(list(map(asdict, c.work('sm_90')))))"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    score, train = json.loads(done.stdout)
    n, d, v = 32768, 2560, 151936
    assert score["floor"] == pytest.approx(2e-12 * n * d * v) and train["floor"] == pytest.approx(6e-12 * n * d * v)
    assert 1 < score["tflop"] / score["floor"] < 1.005 and 1 < train["tflop"] / train["floor"] < 1.002
    assert score["least_gb"] == pytest.approx(2e-9 * d * (n + v))


def test_it_refuses_to_report_interpreted_kernels():
    done = run("-m", "dasd_kernels.compile_report", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr

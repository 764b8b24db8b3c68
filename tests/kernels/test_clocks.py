"""The model of an SM in kernels/gpu/clocks.py, on loops of which it is known what bounds them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from relattn.kernels.gpu import clocks
from relattn.kernels.gpu.clocks import Kind

HOPPER = clocks.CHIPS["sm_90"]
PRODUCT = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


def text(*lines):
    """As cuobjdump prints it, 16 bytes an instruction."""
    return "\n".join(f"        /*{16 * place:04x}*/                   {line} ;    /* 0x0 */" for place, line in enumerate(lines))


def code(*lines):
    return clocks.parse(text(*lines))


def decoded(line):
    return clocks.decode(code(line)[0])


def loop(*body):
    return code(*body, "@!P0 BRA 0x0")


def test_operands():
    load = decoded("@!P3 LDS.128 R8, [R4+UR6+0x10]")
    assert (load.kind, load.writes, load.reads, load.wavefronts) == (Kind.SHARED, [8, 9, 10, 11], [4, "P3"], 4)
    store = decoded("STS.64 [R2], R6")
    assert (store.writes, store.reads, store.wavefronts) == ([], [2, 6, 7], 2)
    assert decoded("SHFL.BFLY PT, R3, R4, 0x1, 0x1f").writes == [3]
    assert decoded("FSETP.GT.AND P1, PT, R3, R4, PT").writes == ["P1"]
    assert decoded("LDG.E.128 R4, desc[UR4][R2.64]").reads == [2, 3]
    assert decoded("STG.E.64 desc[UR4][R2.64], R8").reads == [2, 3, 8, 9]
    assert decoded(PRODUCT).reads == [8, 9, 10, 11, 12, 13, 4, 5, 6, 7]
    matrices = decoded("LDSM.16.MT88.4 R20, [R4]")
    assert (matrices.writes, matrices.wavefronts) == ([20, 21, 22, 23], 4)
    spilled = decoded("STL.64 [R1+0x8], R2")
    assert (spilled.kind, spilled.reads, spilled.wavefronts) == (Kind.SHARED, [1, 2, 3], 2)
    assert decoded("LDS RZ, [RZ]").kind is Kind.FREE


@pytest.mark.parametrize(
    ("line", "busy", "wavefronts"),
    [("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", 32, 8), ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0", 64, 8)],
)  # fmt: skip
def test_wgmma_reads_what_is_not_in_registers(line, busy, wavefronts):
    product = decoded(line)
    assert (product.kind, product.clocks, product.wavefronts) == (Kind.WGMMA, busy, wavefronts)


def test_innermost_loops():
    lines = (PRODUCT, PRODUCT, "@P0 BRA 0x10", "FADD R0, R0, R0", "@P1 BRA 0x0", "FADD R1, R1, R1", "@P1 BRA 0x50")
    assert [(part[0].address, len(part)) for part in clocks.product_loops(code(*lines))] == [(0x10, 2)]
    single = clocks.product_loops(code(*["FFMA R0, R1, R2, R0"] * 300, "@P0 BRA 0x0", "FFMA R0, R1, R2, R0", "@P1 BRA 0x12d0"))
    assert [len(part) for part in single] == [301]  # float32: without matrix instructions


def test_masking_is_left_out():
    masking = ["FSEL R1, R1, R2, P1"] * 70
    assert len(clocks.usual_path(loop(PRODUCT, f"@P2 BRA {16 * 72:#x}", *masking))) == 3
    assert len(clocks.usual_path(loop(PRODUCT, f"@P2 BRA {16 * 72:#x}", *masking[1:], "LDS R3, [R4]"))) == 73


def test_programs():
    assert clocks.programs("sm_90", 255, 40000, 4) == 2  # by registers
    assert clocks.programs("sm_90", 128, 115200, 4) == 2  # by shared memory
    assert clocks.programs("sm_90", 129, 1000, 4) == 3  # registers come in eights
    assert clocks.programs("sm_90", 16, 1000, 8) == 8  # by warps
    assert clocks.programs("sm_89", 16, 1000, 8) == 6
    assert clocks.programs("sm_80", 128, 90000, 4) == 1
    assert clocks.programs("gfx942", 256, 20000, 4) == 2


def of(*body, warps=4, programs=1, chip=HOPPER):
    return clocks.estimate(loop(*body), warps, programs, chip).clocks


def test_pipes():
    assert of(*["MUFU.EX2 R1, R2"] * 50) == pytest.approx(50 * 8, rel=0.05)
    independent = [f"LOP3.LUT R{place}, R100, R101, RZ, 0xc0, !PT" for place in range(50)]
    assert of(*independent) == pytest.approx(50 * 2, rel=0.15)
    assert of(*independent, programs=2) == pytest.approx(50 * 2, rel=0.06)
    assert of(*["FADD R1, R1, R2"] * 50) == pytest.approx(50 * 4, rel=0.1)  # each waits for the last
    assert of(*["STS.128 [R2], R4"] * 50) == pytest.approx(50 * 4 * 4, rel=0.05)  # four warps share the memory
    assert of("LDG.E R4, desc[UR4][R2.64]", "FADD R5, R4, R4") > clocks.GLOBAL_LATENCY


@pytest.mark.parametrize(("target", "each"), [("sm_80", 8), ("sm_89", 16), ("sm_90", 6.4)])
def test_chips_multiply_at_their_own_rates(target, each):
    products = [f"HMMA.16816.F32.BF16 R{4 * place}, R100, R104, R{4 * place}" for place in range(20)]
    assert of(*products, programs=2, chip=clocks.CHIPS[target]) == pytest.approx(20 * each, rel=0.06)


def test_products_overlap_with_another_program():
    products = ["HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24"] * 8
    body = [*products, "WARPGROUP.DEPBAR.LE gsb0, 0x0", *["MUFU.EX2 R1, R2"] * 32]
    assert of(*body) > 8 * 32 + 32 * 8
    assert of(*body, programs=2) == pytest.approx(256, rel=0.15)
    assert clocks.estimate(loop(*body), 4, 2, HOPPER).bound.startswith(("tensor", "mufu"))


def test_barrier_waits_for_the_slowest():
    assert of(*["FADD R1, R1, R2"] * 40, "BAR.SYNC.DEFER_BLOCKING 0x0") == pytest.approx(40 * 4 + clocks.BARRIER_LATENCY, rel=0.15)


def test_spills_are_counted():
    (found,) = clocks.estimates(text("LDL R1, [R2]", "STL [R2], R1", PRODUCT, "@!P0 BRA 0x0"), "sm_90", 4, 1)
    assert (found.instructions, found.spills) == (4, 2)


def test_spills_cost_more_where_they_miss_the_cache():
    assert not clocks.spills_miss("sm_90", 128, 100000, 4, 2)  # 32 KiB, of 58
    assert clocks.spills_miss("sm_90", 256, 100000, 4, 2)
    assert clocks.spills_miss("sm_89", 256, 50000, 4, 2)
    spilling = loop(*["STL [R1], R2"] * 50)
    assert clocks.estimate(spilling, 4, 1, HOPPER).clocks == pytest.approx(50 * 4, rel=0.05)
    assert clocks.estimate(spilling, 4, 1, HOPPER, misses=True).clocks == pytest.approx(50 * 4 * clocks.MISS, rel=0.05)

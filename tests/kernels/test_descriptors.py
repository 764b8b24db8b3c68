"""Matrix descriptors that ptxas overwrites (kernels/gpu/descriptors.py), in made-up machine code; what becomes of such kernels."""

import pytest
import torch

from relattn.backends import machine_code
from relattn.backends import triton as gpu
from relattn.backends.tape import Slot, Tape

pytest.importorskip("triton")
descriptors = pytest.importorskip("relattn.kernels.gpu.descriptors")


def sass(*lines: str) -> str:
    """As cuobjdump prints it; "#name" in a line is the address of the line "name:"."""
    places, code = {}, []
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = 16 * len(code)
        else:
            code.append(line)
    for name, address in places.items():
        code = [line.replace(f"#{name}", f"{address:#x}") for line in code]
    return "".join(f"        /*{16 * place:04x}*/                   {line} ;      /* 0x0 */\n" for place, line in enumerate(code))


DESCRIPTOR = ("USGXT.U32 UR6, UR4, 0xe", "UMOV UR7, 0x80000020")
PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R28, gdesc[UR4], R24, gsb0"  # one operand in registers, the other where UR6 and UR7 say


@pytest.mark.parametrize(
    "lines",
    [
        (*DESCRIPTOR, PRODUCT),
        (*DESCRIPTOR, "ULDC UR5, c[0x0][0x300]", PRODUCT),  # UR4 and UR5 are not read
        (*DESCRIPTOR, "loop:", PRODUCT, "UISETP.NE.AND UP0, UPT, UR8, URZ, UPT", "BRA UP0, #loop"),
        (*DESCRIPTOR, "MOV R9, UR7", "ULDC UR7, c[0x0][0x300]", "R2UR UR7, R9", PRODUCT),  # put aside, and back
        (*DESCRIPTOR, PRODUCT, "ULDC.64 UR6, c[0x0][0x208]"),
        (*DESCRIPTOR, "BRA #product", "ULDC UR7, c[0x0][0x300]", "product:", PRODUCT),  # never run
        ("ULDC UR7, c[0x0][0x300]", "EXIT"),
    ],
)
def test_a_descriptor_that_is_there(lines):
    assert descriptors.overwritten(sass(*lines)) == []


@pytest.mark.parametrize(
    ("lines", "register"),
    [
        ((*DESCRIPTOR, "ULDC UR7, c[0x0][0x300]", PRODUCT), "UR7"),
        ((*DESCRIPTOR, "ULDC.64 UR6, c[0x0][0x208]", PRODUCT), "UR7"),
        ((*DESCRIPTOR, "LDC R7, c[0x0][0x324]", "R2UR UR6, R7", PRODUCT), "UR6"),
        ((*DESCRIPTOR, "LDC R7, c[0x0][0x324]", "MOV R8, R7", "R2UR UR11, R8", "UMOV UR7, UR11", PRODUCT), "UR7"),
        ((*DESCRIPTOR, "@P0 ULDC UR7, c[0x0][0x300]", PRODUCT), "UR7"),
        # In the second round of a loop.
        ((*DESCRIPTOR, "loop:", PRODUCT, "ULDC UR6, c[0x0][0x300]", "ISETP.NE.AND P0, PT, R2, RZ, PT", "@P0 BRA #loop"), "UR6"),
        # Both operands in shared memory.
        ((*DESCRIPTOR, "UMOV UR5, 0x80000020", "LDS R3, [R2]", "R2UR UR4, R3", PRODUCT.replace("R28, ", "")), "UR4"),
    ],
)
def test_an_overwritten_one_is_found(lines, register):
    found = descriptors.overwritten(sass(*lines))
    assert found
    assert any(f": {register} holds" in line for line in found), found


class Compiled:
    """As Triton's compiler gives it."""

    def __init__(self, name: str, ptx: str = "wgmma.mma_async") -> None:
        self.hash, self.asm = name, {"ptx": ptx, "cubin": b""}


def test_a_kernel_is_looked_through_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RELATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(machine_code, "_RIGHT", set())
    looked = []
    monkeypatch.setattr(machine_code, "_look", lambda cubin: looked.append(cubin) or ["UR7 holds ULDC"] * (len(looked) == 1))
    for _ in range(2):
        with pytest.raises(machine_code.MiscompiledError, match="UR7 holds ULDC"):
            machine_code.check(Compiled("wrong"))
    assert len(looked) == 1
    for _ in range(2):
        machine_code.check(Compiled("right"))
    assert len(looked) == 2
    machine_code.check(Compiled("another", ptx="mma.sync"))  # has no descriptors
    assert len(looked) == 2
    machine_code._RIGHT.clear()  # another process
    machine_code.check(Compiled("right"))
    assert len(looked) == 2
    machine_code._RIGHT.clear()
    (tmp_path / "descriptors" / "right").write_text("looked thr")  # damaged: looked through anew
    machine_code.check(Compiled("right"))
    assert len(looked) == 3


def test_only_compilers_before_12_9_are_suspected(monkeypatch):
    for version, expected in (((12, 8), True), ((12, 9), False), ((13, 0), False), ((0, 0), True)):
        machine_code.suspected.cache_clear()
        monkeypatch.setattr(machine_code, "_compiler", lambda version=version: version)
        assert machine_code.suspected("sm_90") is expected
        assert not machine_code.suspected("sm_80")
    machine_code.suspected.cache_clear()


def test_the_compilers_version_is_found():
    assert machine_code._compiler() >= (12, 0)


class Kernel:
    """A Triton kernel whose launches are counted."""

    def __init__(self) -> None:
        self.launched = 0

    def warmup(self, *arguments, grid, **options) -> Compiled:
        return Compiled("of this kernel")

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launched += 1

        return launch


def test_what_is_miscompiled_is_not_launched_and_another_block_size_is_tried(monkeypatch):
    def refuse(compiled) -> None:
        raise machine_code.MiscompiledError(compiled.hash)

    tape, kernel = Tape({"query": torch.zeros(1)}), Kernel()
    with pytest.raises(machine_code.MiscompiledError, match="of this kernel") as raised:
        tape.launch(kernel, (1,), (Slot("query"),), {}, refuse)
    assert kernel.launched == 0
    assert len(tape) == 0
    assert gpu._does_not_go(raised.value)
    tape.launch(kernel, (1,), (Slot("query"),), {}, lambda compiled: None)
    assert kernel.launched == 1

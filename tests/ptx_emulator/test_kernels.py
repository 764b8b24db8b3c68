"""relattn's kernels in the emulator: right and without findings, and with mistakes put into their PTX, each of which must be found.

All of the calls: `make emulate`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable

import pytest
import torch

import relattn
from relattn.backends import triton as gpu

pytest.importorskip("triton")
pytest.importorskip("numpy", minversion="2.0")
if gpu.INTERPRETED:
    pytest.skip("with the interpreter on, nothing compiles", allow_module_level=True)

from tests.hidden import check_hidden
from tests.ptx_emulator.calls import cases, outcome
from tests.ptx_emulator.harness import Session, emulated

TARGETS = ("sm_80", "sm_90")
# Every kernel, plain and, where there is another form of it, clipped.
RUN = {
    "split": {"forward", "combine", "prepare", "query_gradient", "key_gradient", "product", "table_sum"},
    "clipped": {"forward", "prepare", "query_gradient", "key_gradient", "table_gradient", "table_sum"},
    "rel_v": {"forward", "prepare", "query_gradient", "key_gradient", "table_gradient", "table_sum"},
    "join": {"forward", "prepare", "query_gradient", "product", "join", "table_sum"},
    "parts 128": {"forward", "prepare", "query_gradient", "product", "table_sum"},
    "packed clipped": {"forward", "prepare", "query_gradient", "key_gradient", "table_gradient", "table_sum"},
    "decoding": {"decode", "prepare", "query_gradient", "key_gradient", "product", "matrix_sum", "table_sum"},
    "decoding clipped": {"decode", "combine", "prepare", "query_gradient", "key_gradient", "table_gradient", "table_sum"},
}


# For time's sake: others have their kernels on both targets; `make emulate` runs all.
ON_ONE = {"decoding": "sm_90", "decoding clipped": "sm_80", "packed clipped": "sm_90"}


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in RUN for target in TARGETS if target == ON_ONE.get(name, target)])
def test_kernels(name, target):
    found = outcome(name, target, torch.bfloat16)
    assert {key.partition("_kernel ")[0] for key, _ in found.session.launches} == RUN[name]
    assert found.session.findings() == []
    assert found.right, found.errors


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_hidden_may_hold_anything(target):
    """The careful loops, which hidden NaNs and infinities ask for, give the bits of the others."""
    with emulated(target) as session:
        check_hidden(cases()["causal"], "triton", torch.bfloat16, cut=contextlib.nullcontext)
    assert session.findings() == []


def forward(target: str, edit: Callable[[str], str] = lambda ptx: ptx, **options) -> tuple[float, Session]:
    """The first 64 queries, which the forward kernel's last program has: the largest error, and what else became of it."""
    generator, length = torch.Generator().manual_seed(0), 100
    tensors = [torch.randn(1, 1, length, 64, generator=generator).bfloat16() for _ in range(3)]
    tensors.append(torch.randn(2 * length - 1, 64, generator=generator).bfloat16())
    options |= dict(edit=lambda name, ptx: edit(ptx), choose=lambda name, program, grid: program[0] == 1)
    with emulated(target, **options) as session:
        output = relattn.relative_attention(*tensors, backend="triton")[:, :, :64]
    expected = relattn.relative_attention(*(tensor.double() for tensor in tensors), backend="reference")[:, :, :64]
    return (output.double() - expected).abs().max().item(), session


@functools.cache
def plain(target: str) -> str:
    """The forward kernel's PTX as it should be."""
    error, session = forward(target)
    (machine,) = session.machines.values()
    assert error < 0.01
    return "\n".join(machine.kernel.lines)


def without_one(target: str, pattern: str, step: int = 1) -> list[set[str]]:
    """Kinds of findings without the first line that matches, then without another, `step` further on, ..."""
    found = list(re.finditer(rf"^.*{pattern}.*$", plain(target), re.MULTILINE))[::step]
    assert found
    sessions = (forward(target, lambda ptx, line=line: ptx[: line.start()] + ptx[line.end() :])[1] for line in found)
    return [machine.findings.kinds() for session in sessions for machine in session.machines.values()]


@pytest.mark.parametrize("target", TARGETS)
def test_a_missing_barrier_is_a_race(target):
    """Triton places a few more than are needed."""
    found = [any(kind.startswith("race") for kind in kinds) for kinds in without_one(target, r"bar\.sync", 3)]
    assert sum(found) >= 0.5 * len(found), found


@pytest.mark.parametrize(
    ("target", "pattern", "kind"),
    [
        ("sm_80", r"cp\.async\.wait_group", "cp.async in flight: read before its wait"),
        ("sm_90", r"cp\.async\.wait_group", "cp.async in flight: read before its wait"),
        ("sm_90", r"wgmma\.fence", "wgmma: a register was written after the last wgmma.fence"),
        ("sm_90", r"fence\.proxy\.async", "async proxy: wgmma reads what a store wrote, without fence.proxy.async"),
    ],
)
def test_missing_waits_and_fences(target, pattern, kind):
    assert any(kind in kinds for kinds in without_one(target, pattern))


def test_a_missing_wait_for_wgmma():
    with pytest.raises(RuntimeError, match="wgmma in flight: a result is read before its wait"):
        without_one("sm_90", r"wgmma\.wait_group")


def test_a_wrong_swizzle_is_wrong():
    """3 << 62, in every matrix descriptor: the swizzle of its tile."""
    swizzled = str(1 << 62)
    assert swizzled[:5] in plain("sm_90")
    error, _ = forward("sm_90", lambda ptx: re.sub(r"\b46116862\d{11}\b", lambda match: str(int(match[0]) ^ (3 << 62)), ptx))
    assert not error < 0.1


def test_wavefronts_are_counted():
    _, session = forward("sm_90", count=True)
    assert re.match(r"forward_kernel \w+: \d+ wavefronts of shared memory a program, \d+ by bank conflicts", session.conflicts()[0])

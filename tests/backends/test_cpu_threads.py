"""The native CPU backend on several threads, from several threads, and in forked processes.

Work is dealt out in units: key heads, or where tables differ by head key heads of all batch elements. What is left over when there are
not enough units for all threads is shared by teams (kernels/cpu/gradients.h).
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import relattn
from relattn.backends import cpu
from tests.edges import call
from tests.fuzz import Call, check, random_call, run

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no native library: {cpu.unavailable()}")

# Which units there are. 130 queries are 19 blocks of 7, enough for teams of up to 9; 100 keys 7 panels, fewer than two for each of 5.
SIZES = dict(queries=130, keys=100, size=16, clip=(40, 30))
CASES: dict[str, dict] = {
    "one head": dict(heads=1),
    "one head, nothing relative": dict(heads=1, tables={}),
    "one head, two batch elements": dict(batch=2, heads=1, tables={"rel_k": False}),
    "two heads": dict(heads=2, tables={"rel_k": False, "rel_v": False}),
    "two heads, causal": dict(heads=2, tables={"rel_k": False}, is_causal=True, query_offset=-30),
    "seven heads": dict(heads=7, tables={"rel_k": False, "rel_bias": False}),
    "seven heads, tables by head": dict(heads=7, tables={"rel_k": True}),
    "grouped queries": dict(heads=6, key_heads=2, tables={"rel_k": False, "rel_q": False}),
    "grouped queries, tables by head, three batch elements": dict(batch=3, heads=6, key_heads=3, tables={"rel_k": True, "rel_q": True}),
    "tables by head, three batch elements": dict(batch=3, heads=3, tables={"rel_k": True, "rel_q": True, "rel_v": True, "rel_bias": True}),
    "rel_k shared, rel_bias by head": dict(batch=2, heads=3, tables={"rel_k": False, "rel_bias": True}),
    "rel_k by head, rel_bias shared": dict(batch=2, heads=3, tables={"rel_k": True, "rel_bias": False}),
    "rel_v shared, rel_q by head": dict(batch=2, heads=2, tables={"rel_v": False, "rel_q": True}),
    "everything, causal": dict(batch=2, heads=4, key_heads=2, is_causal=True, query_offset=-30, dropout_p=0.2),
    "lengths": dict(batch=2, heads=1, key_lengths=torch.tensor([100, 3])),
}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    """Set torch's number of threads; the kernel then uses them for the smallest work, in the smallest pieces."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "_ALONE", 0)
    monkeypatch.setattr(cpu, "_TILE", (7, 16))
    yield torch.set_num_threads
    torch.set_num_threads(before)


def made(case: str, seed: int = 3) -> Call:
    """Of a seed that leaves threads and tiles as they are (see tests.fuzz.cut)."""
    assert seed % 3 == 0
    return call(seed, **(SIZES | CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_every_number_of_threads(threads, case: str) -> None:
    """As right as on one thread; the same bits in every run; and the same output as on one thread, since queries are independent."""
    results = {}
    for number in (1, 2, 3, 5):
        threads(number)
        for dtype in (torch.float32, torch.bfloat16):
            check(made(case), "cpu", dtype)
            first, second = (run(made(case), "cpu", dtype) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first), f"{number} threads, {dtype}"
            alone = results.setdefault(dtype, first)
            assert torch.equal(first["output"], alone["output"])
            assert torch.equal(first["lse"], alone["lse"])


def test_the_threads_are_used(threads) -> None:
    """Two threads share a head's gradients of keys, in another order than one would add them; otherwise nothing above is tested."""
    results = []
    for number in (1, 2):
        threads(number)
        results.append(run(made("one head"), "cpu", torch.float32))
    assert not all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_number_of_threads_may_change(threads) -> None:
    """More, fewer, one, more than there are cores, from call to call."""
    expected = {}
    for number in (2, 5, 1, 3, 8, 2, 1, 5):
        threads(number)
        found = run(made("two heads"), "cpu", torch.float32)
        for name, value in expected.setdefault(number, found).items():
            assert torch.equal(found[name], value), f"{name} on {number} threads"


def test_calls_from_many_threads(threads) -> None:
    """Eight Python threads, each with calls of its own and two of the kernel's threads for each: the bits of one after another."""
    calls = [[random_call(20_000 + 10 * worker + index) for index in range(6)] for worker in range(8)]
    for own in calls:
        for one in own:
            one.arguments.pop("dropout_p", None)  # its seed comes from torch's generator, which all threads share
    threads(2)
    expected = [[without_seed(one) for one in own] for own in calls]
    found: list = [None] * len(calls)
    ready = threading.Barrier(len(calls))

    def work(worker: int) -> None:
        torch.set_num_threads(2)  # OpenMP's is the thread's own
        ready.wait()
        found[worker] = [without_seed(one) for one in calls[worker]]

    workers = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=600)
        assert not worker.is_alive()
    for own, theirs in zip(expected, found, strict=True):
        for one, other in zip(own, theirs, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def without_seed(one: Call) -> dict[str, torch.Tensor]:
    """tests.fuzz.run without its torch.manual_seed, which is not for several threads."""
    tensors, arguments = one.cast(torch.float32)
    if "attn_mask" in tensors:
        tensors["attn_mask"].requires_grad_(False)
    output, lse = relattn.relative_attention(**tensors, **arguments, return_lse=True, backend="cpu")
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(one.seed))
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad((output * weight).sum(), list(wanted.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    return {"output": output.detach(), "lse": lse.detach()} | found


# Forked processes: of the parent's threads they have only the one that forked, and OpenMP's records still list the others.

_FORK = textwrap.dedent("""
    import os, sys, signal
    import torch
    from torch.utils.data import DataLoader, Dataset
    import relattn
    from relattn.backends import cpu

    torch.set_num_threads(3)
    cpu._ALONE = 0

    def step(seed=0):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(1, 2, 50, 16, generator=generator).requires_grad_() for _ in range(3)]
        tensors.append(torch.randn(99, 16, generator=generator).requires_grad_())
        output = relattn.relative_attention(*tensors, backend="cpu")
        return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]

    def parallel_torch():
        return torch.ones(1_000_000).exp().sum()

    class Steps(Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return [part.clone() for part in step(index)]

    def same(found, expected):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(found[0], expected[0])

    def in_child(function):
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            code = 1
            try:
                function()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the child ended with status {status}" + (": it hung" if status == signal.SIGALRM else "")
""")

_SCENARIOS = {
    "both ran in the parent": """
        parallel_torch()
        expected = step()
        in_child(lambda: same(step(), expected))
        same(step(), expected)
    """,
    "only torch ran in the parent": """
        parallel_torch()
        in_child(step)
    """,
    "a child of a child": """
        parallel_torch()
        expected = step()
        in_child(lambda: (same(step(), expected), in_child(lambda: same(step(), expected))))
    """,
    "multiprocessing": """
        import torch.multiprocessing as multiprocessing
        parallel_torch()
        expected = step()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for found in pool.map_async(step, [0, 0, 0]).get(timeout=300):
                same(found, expected)
    """,
    "data loader": """
        expected = [step(index) for index in range(4)]
        parallel_torch()
        for epoch in range(2):
            loader = DataLoader(Steps(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=300)
            for found, one in zip(loader, expected, strict=True):
                same(found, one)
            step()
    """,
    "many threads are calling": """
        import threading, time
        expected = step()
        stop = threading.Event()
        def work():
            while not stop.is_set():
                step()
        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.2)
        try:
            for _ in range(2):
                in_child(lambda: same(step(), expected))
        finally:
            stop.set()
        for worker in workers:
            worker.join()
    """,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("scenario", _SCENARIOS)
def test_forked_processes(scenario: str) -> None:
    """They finish, with the right result."""
    script = _FORK + textwrap.dedent(_SCENARIOS[scenario])
    patient = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # more threads than cores
    done = subprocess.run([sys.executable, "-c", script], env=patient, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]

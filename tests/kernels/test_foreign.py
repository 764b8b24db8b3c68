"""The native kernels compiled for AArch64, in an emulator: `python -m tests.foreign` runs more."""

import pytest
import torch

from relattn.backends import cpu
from tests import foreign, fuzz

pytestmark = pytest.mark.skipif(foreign.missing() is not None, reason=f"{foreign.missing()}")


def test_random_calls_on_aarch64() -> None:
    native = cpu._library
    with foreign.foreign() as library:
        for seed in range(15):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
            fuzz.check(fuzz.call_of(seed, "cpu"), "cpu", dtype)
        assert library.calls >= 24  # both passes, but for calls without queries or keys
    assert cpu._library is native

"""The backends, and which of them computes a call.

`reference` is the definition; the others compute the same and share with it only what `relattn.arguments` and
`relattn.philox` say about a call. `blocked` is plain PyTorch, `cpu` and `triton` launch what lies in kernels/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from relattn.arguments import Settings, Tensors
from relattn.backends import blocked, cpu, triton


def _never(*_: object) -> None:
    return None


def _absent(*_: object):
    raise NotImplementedError("this backend does not run behind the operators")


class Backend(NamedTuple):
    """An implementation of the operators behind `relative_attention`.

    `unavailable()` says why this machine cannot run it, `unsupported(tensors, settings)` why it cannot take a call;
    None = it can. `forward(tensors, settings, seed)` returns (output, lse); `backward(grad_output, grad_lse, tensors,
    settings, output, lse, seed, needs)` the gradients of the differentiable tensors for which `needs` is True, in their
    order (see `relattn.operators`). `plan(tensors, settings)`, where there is one, prepares both for calls of the same
    signature (see `relattn.plans`).
    """

    unavailable: Callable[[], str | None] = _never
    unsupported: Callable[[Tensors, Settings], str | None] = _never
    forward: Callable[[Tensors, Settings, Tensor], tuple[Tensor, Tensor]] = _absent
    backward: Callable[..., list[Tensor]] = _absent
    plan: Callable[[Tensors, Settings], Any] | None = None


# Fastest first: the order in which a call is offered to them. The reference takes everything but is only used when
# asked for by name, since blocked, before it, takes everything too.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.unavailable, triton.unsupported, triton.forward, triton.backward),
    "cpu": Backend(cpu.unavailable, cpu.unsupported, cpu.forward, cpu.backward, cpu.Plan),
    "blocked": Backend(forward=blocked.forward, backward=blocked.backward),
    "reference": Backend(),  # plain differentiable PyTorch, outside the operators
}
if triton.INTERPRETED:  # then it is the slowest, and only used when asked for by name
    BACKENDS["triton"] = BACKENDS.pop("triton")


def _or_blocked(name: str) -> Callable[..., Any]:
    """A function of the Triton backend; blocked's, with a warning, where a kernel does not compile or launch."""

    def run(*call: Any) -> Any:
        try:
            return getattr(triton, name)(*call)
        except triton.KernelError as error:
            triton.warn_once(f"{error}; such calls now take backend 'blocked', which is slower (backend='triton' by name raises)")
            return getattr(blocked, name)(*call)

    return run


# A run on a GPU that nobody tried must not be lost: what the operators call where the backend was not named.
_AUTOMATIC = {"triton": "triton or blocked"}
_COMBINED = {"triton or blocked": Backend(forward=_or_blocked("forward"), backward=_or_blocked("backward"))}


def automatic(name: str) -> str:
    """The implementation to use where `select` chose this backend by itself."""
    return _AUTOMATIC.get(name, name)


def implementation(name: str) -> Backend:
    """That of a backend, or of `automatic`'s result."""
    return BACKENDS.get(name) or _COMBINED[name]


def available_backends() -> dict[str, str | None]:
    """Each backend's name, fastest first, and why this machine cannot run it (None = it can)."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def reasons(tensors: Tensors, settings: Settings) -> dict[str, str | None]:
    """Each backend's name, fastest first, and why it cannot take this call (None = it can)."""
    return {name: _reason(backend, tensors, settings) for name, backend in BACKENDS.items()}


def select(tensors: Tensors, settings: Settings, name: str | None) -> str:
    """The backend named, if it can take the call, or else the fastest that can.

    Raises:
        ValueError: no backend has this name, or the one named cannot take the call (the message says why).
    """
    if name is None:
        return next(name for name, backend in BACKENDS.items() if _reason(backend, tensors, settings) is None)
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = _reason(BACKENDS[name], tensors, settings)
    if reason is not None:
        raise ValueError(f"backend: {name!r} cannot take this call: {reason}")
    return name


def _reason(backend: Backend, tensors: Tensors, settings: Settings) -> str | None:
    return backend.unavailable() or backend.unsupported(tensors, settings)

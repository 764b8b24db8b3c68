"""Runs the PTX that Triton compiles for NVIDIA GPUs on a CPU, thread by thread, and looks for what no run of a GPU shows.

    python -m tests.ptx_emulator [names or seeds] --target sm_80 sm_90 --dtype bfloat16      (or `make emulate`)

It sees what the compiler made of a kernel, which Triton's interpreter does not:

- Shared memory, by byte: read or written by one warp after another's write (or written after its read) without a barrier in between; read
  but never written; one instruction that stores different values to one place.
- cp.async: its bytes are poison until the wait; touching them before is a finding.
- wgmma: results cannot be computed with before wgmma.wait_group (an error); operands in shared memory or registers may not be written
  before it; registers written after the last wgmma.fence; shared memory written by ordinary stores, or by cp.async, and read by wgmma
  without fence.proxy.async in between.
- Global memory: outside of the buffers, misaligned (errors), or written by one program and touched by another of the same launch.
- Registers that nothing has written: a program that computes with one is run twice instead, with all such registers filled with ones and
  with zeros, and it is a finding if one bit of memory differs. (Triton leaves padding undefined, of which nothing comes.)

Not seen: races inside one warp (its lanes run in step here), what lies in a buffer but outside of the tensor, what ptxas makes of the PTX,
and whether a formal race does any harm. Matrix units' rounding and the last bit of ex2, lg2 and rcp are numpy's. Not there, since Triton
makes no use of them for these kernels: TMA and mbarriers, clusters, atomics, named barriers.

parser.py makes basic blocks of the text, translate.py (with arithmetic.py) a Python function of numpy operations over all threads of each
block; machine.py runs them, with tensor_core.py for matrix instructions and memory.py for memory and what watches over it.
bank_conflicts.py counts wavefronts. harness.py puts all this in a GPU's place under the backend "triton", calls.py holds calls for it.
"""

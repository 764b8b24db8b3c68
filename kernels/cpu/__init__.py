"""The native CPU kernels: C++ sources, and `build`, which makes librelattn_cpu.so of them."""

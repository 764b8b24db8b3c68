"""The GPU check: `bash benchmarks/gpu_check.sh OUT first|speed|profile|train`; benchmarks/README.md says when."""

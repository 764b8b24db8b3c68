"""The GPU check, stage by stage: `bash benchmarks/gpu_check.sh OUT first|speed|profile|train`; benchmarks/README.md says when."""

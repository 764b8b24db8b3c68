#!/usr/bin/env bash
# The GPU check: correctness on the device, sanitizer, determinism, speed against peers, and the configurations' timings, in under nine
# minutes and without a network. Needs what is installed: torch 2.11 or newer with its Triton. `bash benchmarks/gpu_check.sh [OUT]`
# Any other module of the clone instead, from a clone that is not installed: `bash benchmarks/gpu_check.sh OUT benchmarks --quick`
set -u
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
mkdir -p "$out"
# A clone that was not installed: the kernels stand beside the package, which looks for them inside it.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r relattn "$work/relattn"
cp -r kernels "$work/relattn/kernels"
cp -r tests benchmarks examples "$work/"
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$work/triton}"
absolute=$(cd "$out" && pwd)
cd "$work"
exec_python=${PYTHON:-python3}
shift $(($# > 0))
"$exec_python" -m "${1:-benchmarks.gpu_check}" --out "$absolute" "${@:2}"

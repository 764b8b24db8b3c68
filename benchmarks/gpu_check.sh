#!/usr/bin/env bash
# The GPU check, also from a clone that is not installed, without a network; needs torch 2.11 or newer with its Triton.
#   bash benchmarks/gpu_check.sh OUT first|speed|profile|train [--seconds N]   one stage, under nine minutes
#   bash benchmarks/gpu_check.sh OUT benchmarks --quick                       any other module that has --out
# What is compiled is kept in RELATTN_GPU_CACHE (default /tmp/relattn-gpu), so that a later stage finds it.
set -u
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
what=${2:-first}
mkdir -p "$out"
absolute=$(cd "$out" && pwd)
# A clone that was not installed: the kernels stand beside the package, which looks for them inside it.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r relattn "$work/relattn"
cp -r kernels "$work/relattn/kernels"
cp -r tests benchmarks examples "$work/"
cache=${RELATTN_GPU_CACHE:-/tmp/relattn-gpu}
mkdir -p "$cache"
export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$cache/triton}" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"
export RELATTN_CACHE="$cache" CUDA_CACHE_PATH="$cache/cuda"
cd "$work"
case $what in
first | speed | profile | train) "${PYTHON:-python3}" -m benchmarks.gpu_check "$what" --out "$absolute" "${@:3}" ;;
*) "${PYTHON:-python3}" -m "$what" --out "$absolute" "${@:3}" ;;
esac

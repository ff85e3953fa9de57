#!/usr/bin/env bash
# Makes TARGET a libtorch to link with out of the PyTorch package in TORCH, of VERSION: its headers and its CPU libraries,
# as links. libtorch_cuda stays out, so that torch-sys links the CPU libraries alone; at run time the real folder is used,
# where the CUDA library can still be loaded.
#
# Usage: link-libtorch.sh TORCH TARGET VERSION
set -euo pipefail
torch=$1 target=$2 version=$3
[ -e "$torch/lib/libtorch_cpu.so" ] || { echo "no libtorch_cpu.so in $torch/lib" >&2; exit 1; }
mkdir -p "$target/lib"
ln -sfn "$torch/include" "$target/include"
for library in libtorch.so libtorch_cpu.so libc10.so; do
    ln -sfn "$torch/lib/$library" "$target/lib/$library"
done
# Where PyTorch ships its own OpenMP, linking with it keeps a second one out of the process.
for gomp in "$torch"/lib/libgomp*.so*; do
    if [ -e "$gomp" ]; then
        ln -sfn "$gomp" "$target/lib/libgomp.so.1"
        ln -sfn libgomp.so.1 "$target/lib/libgomp.so"
    fi
done
echo "$version" >"$target/build-version"

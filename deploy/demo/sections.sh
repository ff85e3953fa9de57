#!/usr/bin/env bash
# make demo: prepares model and data, and trains with two workers on this machine. Arguments go to `thaw train`.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=.thaw/demo
deploy/demo/prepare.sh "$folder"
cp deploy/demo/sections.yaml "$folder/sections.yaml"
echo "demo: thaw train $folder/sections.yaml --workers 2 $*"
exec target/debug/thaw train "$folder/sections.yaml" --workers 2 "$@"

#!/usr/bin/env bash
# What only a GPU can show: parity with the CPU, samples per second beside PyTorch, sums by NCCL, a whole gradual run. Under 8 minutes.
#
#   tests/gpu/run.sh [--only parity,nccl,run,steps] [--output FILE.json]
#   tests/gpu/run.sh --pack FOLDER      the programs that it runs, to take to a machine without Rust; there: THAW_BIN=FOLDER tests/gpu/run.sh
#   tests/gpu/run.sh --rehearse         all but NCCL, on the CPU and small: whether this script works, and nothing else
#
# Needs a CUDA build of PyTorch 2.11 (PYTHON, else .venv/bin/python, else python3) with torchvision, timm and transformers, and programs:
# THAW_BIN, else built here. Two ranks on one GPU need NCCL 2.30: THAW_NCCL=.../libnccl.so.2 (package nvidia-nccl-cu13), else pip is asked.
# Ends with 2 where there is no GPU, with 1 where something broke or is not within its bounds.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
fail() { printf 'gpu: %s\n' "$2" >&2; exit "$1"; }

examples=(step_time device_parity gpu_sums)
build() {
    command -v cargo >/dev/null || fail 1 "no Rust here; make the programs elsewhere with tests/gpu/run.sh --pack FOLDER, and set THAW_BIN"
    cargo build --quiet --workspace --bins --examples
}

device=cuda
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --pack)
            [ $# -eq 2 ] || fail 1 "usage: tests/gpu/run.sh --pack FOLDER"
            build
            mkdir -p "$2"
            for program in thaw thaw-worker "${examples[@]/#/examples/}"; do
                strip -o "$2/$(basename "$program")" "target/debug/$program"
            done
            du -sh "$2"
            exit 0
            ;;
        --rehearse) device=cpu ;;
        --only | --output)
            [ $# -ge 2 ] || fail 1 "$1 needs a value"
            arguments+=("$1" "$2")
            shift
            ;;
        *) fail 1 "unknown argument $1; see the head of this file" ;;
    esac
    shift
done

if [ "$device" = cuda ] && ! timeout 20 nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    fail 2 "no GPU here (nvidia-smi lists none), so nothing was checked"
fi
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || fail 1 "no Python; set PYTHON"
"$python" - "$device" <<'CHECK' || exit 1
import sys
try:
    import timm, torch, torchvision, transformers
except ImportError as error:
    sys.exit(f"gpu: {sys.executable} lacks {error.name}; set PYTHON to one with PyTorch 2.11, torchvision, timm and transformers")
if torch.__version__.split("+")[0].rsplit(".", 1)[0] != "2.11":
    sys.exit(f"gpu: {sys.executable} has PyTorch {torch.__version__}; 2.11 is needed")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(f"gpu: PyTorch {torch.__version__} finds no GPU; it must be a CUDA build, and the driver new enough for it")
CHECK

programs=${THAW_BIN:-}
if [ -z "$programs" ]; then
    build
    programs=$root/target/gpu-programs
    mkdir -p "$programs"
    for program in thaw thaw-worker "${examples[@]/#/examples/}"; do
        ln -sfn "$root/target/debug/$program" "$programs/$(basename "$program")"
    done
fi
# The PyTorch that is measured beside them is the libtorch that they use.
torch=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/lib
export LD_LIBRARY_PATH=$torch${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# It keeps to its time by itself, unless something in its own process does not come back.
exec timeout --kill-after=10 470 "$python" tests/gpu/check.py --device "$device" --programs "$programs" "${arguments[@]}"

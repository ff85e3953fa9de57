#!/usr/bin/env bash
# Installs what Thaw needs to build, run and test, and links it into this clone:
#   .venv      Python environment (PyTorch 2.11.0, export helper's and tests' packages), in a cache that all clones share
#   .libtorch  the libtorch inside that environment, as headers and the CPU libraries to link with
#   .chart     Python environment of the chart's and the images' tests, small
#   .bin       grpcurl and helm (where Go is there), thaw-export
# Safe to run at any time, by several clones at once; takes well under a second when nothing is missing.
#
# THAW_CACHE: where the shared part lies (default: $XDG_CACHE_HOME/thaw or ~/.cache/thaw).
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.11.0
GRPCURL=v1.9.4
HELM=v3.22.0
cache=${THAW_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/thaw}

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# --- Debian packages -------------------------------------------------------------------------------------------------

# Prints the Debian packages that are missing, one a line.
missing_packages() {
    command -v c++ >/dev/null || echo g++
    command -v protoc >/dev/null || echo protobuf-compiler
    # The .proto files of google.protobuf, which etcd's API imports.
    [ -e /usr/include/google/protobuf/timestamp.proto ] || [ -e /usr/local/include/google/protobuf/timestamp.proto ] ||
        echo libprotobuf-dev
    command -v etcd >/dev/null || echo etcd-server
    if ! command -v python3 >/dev/null; then
        printf '%s\n' python3 python3-venv
    elif ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        echo python3-venv
    fi
}

install_packages() {
    local packages=("$@") root=()
    command -v apt-get >/dev/null || fail "this is not Debian; install what these packages hold, then run again: ${packages[*]}"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || fail "missing Debian packages, and no sudo; as root: apt-get install ${packages[*]}"
        root=(sudo)
    fi
    say "installing Debian packages: ${packages[*]}"
    "${root[@]}" apt-get -qq update
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${packages[@]}" >/dev/null
    # The package starts a server on etcd's usual port. Thaw's tests start their own.
    if [[ " ${packages[*]} " == *" etcd-server "* ]] && [ -d /run/systemd/system ]; then
        "${root[@]}" systemctl disable --now etcd >/dev/null 2>&1 || true
    fi
}

command -v cargo >/dev/null || fail "cargo is missing: install Rust 1.95 or newer (rustup), then run again"
mapfile -t packages < <(missing_packages)
if [ "${#packages[@]}" -gt 0 ]; then
    install_packages "${packages[@]}"
fi

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$(python3 --version) is too old for PyTorch $TORCH's companions; Python 3.11 or newer is needed"

# --- Python environment ----------------------------------------------------------------------------------------------

# Named by what it holds, so that an old clone keeps its own. It is built in place, since an environment cannot be moved;
# the file .complete is its last line, so what was interrupted is begun again.
key=$( (cat deploy/requirements.txt; python3 -c 'import sys; print(sys.version, sys.base_prefix)') | sha256sum | cut -c1-12)
venv=$cache/venv-$key

build_venv() {
    say "Python packages into $venv (about 3 GB to fetch, 6 GB on disk, once for all clones)"
    rm -rf "$venv"
    python3 -m venv "$venv"
    # pip names each download when it has no terminal to draw on.
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -r deploy/requirements.txt |
        sed -un 's/^ *Downloading \([^ ]*\/\)\{0,1\}\([^ ]* ([0-9.]* [MG]B)\).*/setup:   \2/p; s/^Installing collected.*/setup:   installing/p'
    "$venv/bin/python" -c "import torch; assert torch.__version__.split('+')[0] == '$TORCH', torch.__version__"
    touch "$venv/.complete"
}

# The same for the tests of the chart and the images: apart, since a new checker should not fetch PyTorch again.
key=$( (cat tests/chart/requirements.txt; python3 -c 'import sys; print(sys.version, sys.base_prefix)') | sha256sum | cut -c1-12)
chart=$cache/chart-$key

build_chart() {
    say "Python packages of the chart's tests into $chart"
    rm -rf "$chart"
    python3 -m venv "$chart"
    "$chart/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/chart/requirements.txt
    touch "$chart/.complete"
}

mkdir -p "$cache/bin"
# One builder at a time; the lock goes with this process.
exec 9>"$cache/setup.lock"
if ! flock -n 9; then
    say "another clone is setting up; waiting for it"
    flock 9
fi
[ -e "$venv/.complete" ] || build_venv
[ -e "$chart/.complete" ] || build_chart

# --- libtorch --------------------------------------------------------------------------------------------------------

libtorch=$venv/libtorch
if [ ! -e "$libtorch/build-version" ]; then
    torch=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch
    deploy/link-libtorch.sh "$torch" "$libtorch" "$TORCH" || fail "remove $venv and run again"
fi

# --- Tools built with Go ---------------------------------------------------------------------------------------------

# Tests that need them say so and are skipped where they are missing (an error when CI=true).
go_tool() {
    local name=$1 package=$2 version=$3
    local binary=$cache/bin/$name-$version
    if [ ! -x "$binary" ]; then
        if ! command -v go >/dev/null; then
            command -v "$name" >/dev/null || say "no Go here, so no $name: tests that need it are skipped"
            return
        fi
        say "building $name $version with Go (a minute or two, once)"
        # GOBIN rather than -o: `go install` of a version outside any module has no -o.
        local folder
        folder=$(mktemp -d "$cache/bin/.go-XXXXXX")
        if ! (cd "$folder" && GOBIN=$folder nice -n 10 go install -ldflags='-s -w' "$package@$version" >build.log 2>&1); then
            cat "$folder/build.log" >&2
            rm -rf "$folder"
            [ "${CI:-}" != true ] || fail "building $name $version"
            say "building $name failed: tests that need it are skipped"
            return
        fi
        mv "$folder/$name" "$binary"
        rm -rf "$folder"
    fi
    ln -sfn "$binary" ".bin/$name"
}

mkdir -p .bin
go_tool grpcurl github.com/fullstorydev/grpcurl/cmd/grpcurl "$GRPCURL"
go_tool helm helm.sh/helm/v3/cmd/helm "$HELM"

# --- This clone's links ----------------------------------------------------------------------------------------------

ln -sfn "$venv" .venv
ln -sfn "$chart" .chart
ln -sfn "$libtorch" .libtorch
ln -sfn ../deploy/export/bin/thaw-export .bin/thaw-export
say "ready"

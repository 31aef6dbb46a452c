#!/usr/bin/env bash
# Creates .venv and installs everything at the pinned versions: torch as this machine needs it, then the rest.
#   PYTHON=python3.12   the interpreter to use (otherwise the first of 3.11 and 3.12 that is found)
#   TORCH=cuda|cpu      the build of torch (otherwise cuda where nvidia-smi finds a GPU)
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found${PYTHON:+ at $PYTHON}: install one (Debian 12, Ubuntu 24.04: apt install python3" \
        "python3-venv python3-dev) or name one with PYTHON=/path/to/python"
}

# DeepSpeed and torch.compile build small extensions at first use, for which they need a compiler and Python's headers.
check_system_packages() {
    local version missing=()
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    command -v g++ >/dev/null || missing+=(g++)
    "$1" -c 'import ensurepip' 2>/dev/null || missing+=("python$version-venv")
    "$1" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        missing+=("python$version-dev")
    [ ${#missing[@]} -eq 0 ] || fail "system packages are missing; on Debian or Ubuntu: sudo apt install ${missing[*]}"
}

install_torch() {
    local torch
    torch=$(grep '^torch==' constraints.txt)
    if [ "${TORCH:-}" != cuda ] && { [ "${TORCH:-}" = cpu ] || ! nvidia-smi -L >/dev/null 2>&1; } &&
        [ "$(uname -s)" = Linux ]; then
        # From pip's own configuration (a wheelhouse, a company's index), or else from PyTorch's index of CPU builds.
        "$pip" install --quiet "$torch+cpu" 2>/dev/null ||
            "$pip" install --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu"
    else
        "$pip" install "$torch"
    fi
}

python=$(find_python)
check_system_packages "$python"
[ -x .venv/bin/python ] && supported .venv/bin/python || "$python" -m venv --clear .venv
pip=.venv/bin/pip
export PIP_DISABLE_PIP_VERSION_CHECK=1

echo "installing into .venv (about 3 GB; some minutes the first time)"
install_torch
# compat: the whole checkout is importable, so a package added later is found without another install
"$pip" install --quiet -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
touch .venv/.installed
echo "done; for the commands in this shell: source .venv/bin/activate"

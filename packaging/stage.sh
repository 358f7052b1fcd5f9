# stage.sh - sourced by build-deb and build-rpm: compiles in the repository, with cargo's own directory, so that nothing is
# compiled twice; then copies the source to a directory in which the package's tools may do as they like, with what was
# compiled in $stage/built. Sets $repository, $version, $place (where packages go), $work and $stage.
# shellcheck shell=sh
repository=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$repository/Cargo.toml" | head -1)
mkdir -p "${CARGO_TARGET_DIR:-$repository/target}"
CARGO_TARGET_DIR=$(cd "${CARGO_TARGET_DIR:-$repository/target}" && pwd)
export CARGO_TARGET_DIR
place=$CARGO_TARGET_DIR/package
work=$place/work
stage=$work/imap-tls-$version
mkdir -p "$place"
# Two builds at a time would spoil each other's copy.
exec 9>"$place/lock"
flock 9
rm -rf "$work"
mkdir -p "$stage"
tar -C "$repository" --exclude=./target --exclude=./.git --exclude=./tests/fuzz -cf - . | tar -C "$stage" -xf -
"$repository/packaging/compile" "$stage/built" >&2 9>&-

need() { # need COMMAND PACKAGE: says what is missing, or installs it
    command -v "$1" >/dev/null && return
    echo "$1 is missing: installing $2" >&2
    [ "$(id -u)" = 0 ] && { apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$2"; } >&2
}

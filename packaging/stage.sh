# stage.sh - sourced by build-deb and build-rpm: a copy of the source in a directory whose name stays the same from one run to
# the next, so that cargo finds what it built before; sets $repository,
# $version, $place (where packages go), $work and $stage.
# shellcheck shell=sh
repository=$(cd "$(dirname "$0")/.." && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$repository/Cargo.toml" | head -1)
place=${CARGO_TARGET_DIR:-$repository/target}/package
mkdir -p "$place/cargo"
place=$(cd "$place" && pwd)
# Cargo's own directory is not shared with the repository's: it tells neither two copies of one package apart, nor would it see
# a change in one of them when it last built the other.
export CARGO_TARGET_DIR="$place/cargo"
# Two builds at a time would spoil each other's copy.
exec 9>"$place/lock"
flock 9
work=$place/work
stage=$work/imap-tls-$version
rm -rf "$work"
mkdir -p "$stage"
tar -C "$repository" --exclude=./target --exclude=./.git --exclude=./tests/fuzz -cf - . | tar -C "$stage" -xf -

need() { # need COMMAND PACKAGE: says what is missing, or installs it
    command -v "$1" >/dev/null && return
    echo "$1 is missing: installing $2" >&2
    [ "$(id -u)" = 0 ] && { apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$2"; } >&2
}

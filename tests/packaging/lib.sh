# lib.sh - sourced by run: results, cached Debian trees, writable copies of them, and booting one by systemd-nspawn.
# shellcheck shell=bash
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Trees take a minute to make, so they outlive a run. They are never written to again.
trees=${IMAP_TLS_TREES:-${TMPDIR:-/tmp}/imap-tls-trees}
work=$(mktemp -d "${TMPDIR:-/tmp}/imap-tls-packaging.XXXXXX")
mkdir -p "$trees"
passed=0 failed=0 nspawn= init=
machine=imap-tls-$$

ok() { passed=$((passed + 1)); printf 'ok   %s\n' "$*"; }
bad() { failed=$((failed + 1)); printf 'FAIL %s\n' "$*"; }
has() { # has NAME REGEX TEXT
    if grep -Eq -- "$2" <<<"$3"; then ok "$1"; else bad "$1: no /$2/ in: $(tail -c 400 <<<"$3" | tr '\n' '|')"; fi
}
is() { # is NAME EXPECTED FOUND
    if [ "$2" = "$3" ]; then ok "$1"; else bad "$1: expected '$2', found '$(head -c 1500 <<<"$3")'"; fi
}
part() { printf '\n-- %s (%ss)\n' "$*" "$SECONDS"; }

finish() {
    trap - EXIT
    halt
    # Innermost first.
    awk -v prefix="$work/" 'index($2, prefix) == 1 { print $2 }' /proc/mounts | sort -r | while read -r mounted; do umount -l "$mounted"; done
    rm -rf --one-file-system "$work"
    printf '%d passed, %d failed\n' "$passed" "$failed"
    [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
    exit
}
trap finish EXIT

need() { # need PACKAGE...: installs what this machine lacks
    local package missing=()
    for package; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    local apt=(apt-get -qq -y -o DPkg::Lock::Timeout=600 --no-install-recommends)
    { "${apt[@]}" update && "${apt[@]}" install "${missing[@]}"; } >"$work/apt.log" 2>&1 || { tail -5 "$work/apt.log"; exit 1; }
}

tree() { # tree SUITE PACKAGE,...: prints the path of a minimal system with these packages
    local path
    path=$trees/$1-$(sha256sum <<<"$2" | cut -c1-8)
    if [ ! -e "$path.done" ]; then
        rm -rf --one-file-system "$path"
        # mailutils' imap4d wants a superserver and then serves port 143 by it, in clear. xinetd and openbsd-inetd exclude
        # each other: they are fetched, and installed in turn later.
        # shellcheck disable=SC2016
        mmdebstrap --quiet --variant=minbase --include="$2" \
            --customize-hook='for one in xinetd openbsd-inetd; do mkdir -p "$1/var/cache/superservers/$one/partial" &&
                chroot "$1" apt-get -qq -y -o APT::Sandbox::User=root -o "Dir::Cache::archives=/var/cache/superservers/$one" \
                    --no-install-recommends --download-only install "$one"; done' \
            --customize-hook='chroot "$1" dpkg --purge --force-depends inetutils-inetd' \
            "$1" "$path" < <(sed "s/bookworm/$1/g" /etc/apt/sources.list.d/debian.sources) >"$work/tree.log" 2>&1 \
            || { tail -5 "$work/tree.log" >&2; return 1; }
        touch "$path.done"
    fi
    printf '%s\n' "$path"
}

copy_of() { # copy_of TREE NAME: a writable copy, at once, by an overlay; prints its path
    local path=$work/$2
    mkdir -p "$path" "$path.upper" "$path.work"
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$path.upper,workdir=$path.work" "$path" && printf '%s\n' "$path"
}

cgroups() { awk '$3 == "cgroup2" || ($3 == "cgroup" && $4 ~ /name=systemd/) { print $2 }' /proc/mounts; }

boot() { # boot TREE: systemd as PID 1 there, with a loopback of its own; sets nspawn and init
    local state='' mounted
    # systemd cannot share a cgroup with what is running here; of the filters that nspawn has, the calls that a
    # sandbox needs are let through, as on a real machine.
    (
        for mounted in $(cgroups); do mkdir -p "$mounted/$machine" && echo $BASHPID > "$mounted/$machine/cgroup.procs"; done
        exec systemd-nspawn -q -D "$1" -M "$machine" --boot --register=no --keep-unit --private-network --console=pipe \
            --system-call-filter="landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret"
    ) </dev/null >"$work/boot.log" 2>&1 &
    nspawn=$!
    for _ in $(seq 300); do
        init=$(awk '{ print $1 }' "/proc/$nspawn/task/$nspawn/children" 2>/dev/null)
        [ -n "$init" ] && state=$(inside systemctl is-system-running 2>/dev/null)
        case $state in running | degraded) break ;; esac
        sleep 0.1
    done
    is "systemd $(inside systemctl --version | awk 'NR == 1 { print $2 }') boots" running "$state"
}

halt() {
    local mounted
    [ -n "$nspawn" ] || return 0
    # SIGTERM has nspawn stop what never got as far as listening to systemctl.
    inside systemctl exit 0 2>/dev/null || kill "$nspawn" 2>/dev/null
    wait "$nspawn" 2>/dev/null
    nspawn='' init=''
    for mounted in $(cgroups); do [ -d "$mounted/$machine" ] && find "$mounted/$machine" -depth -type d -exec rmdir {} + 2>/dev/null; done
    return 0
}

inside() { nsenter -t "$init" -a env PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
# This machine's programs on that system's network: clients need not be installed there.
outside() { nsenter -t "$init" -n "$@"; }
journal() { inside sh -c 'journalctl --sync; journalctl -q -o cat --no-pager "$@"' journal "$@"; }

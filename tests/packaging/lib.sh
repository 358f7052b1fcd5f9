# lib.sh - sourced by run: results, cached Debian trees, writable copies of them, and booting one by systemd-nspawn.
# shellcheck shell=bash
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
# shellcheck disable=SC2034 # used by run
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Trees take a minute to make, so they outlive a run. They are never written to again.
trees=${TESTS_TREES:-${TMPDIR:-/tmp}/imap-tls-trees}
work=$(mktemp -d "${TMPDIR:-/tmp}/imap-tls-packaging.XXXXXX")
mkdir -p "$trees"
passed=0 failed=0 nspawn='' init=''
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
    local job children
    trap - EXIT
    halt
    # Trees that are being made.
    for job in $(jobs -p); do
        children=$(cat "/proc/$job/task/$job/children" 2>/dev/null)
        # shellcheck disable=SC2086 # a list
        kill "$job" $children 2>/dev/null
    done
    wait
    # Innermost first.
    awk -v prefix="$work/" 'index($2, prefix) == 1 { print $2 }' /proc/mounts | sort -r | while read -r mounted; do umount -l "$mounted"; done
    rm -rf --one-file-system "$work"
    printf '%d passed, %d failed\n' "$passed" "$failed"
    # With the status said: without, it would be that of before the trap.
    [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
    exit $?
}
trap finish EXIT

need() { # need PACKAGE...: installs what this machine lacks
    local package missing=()
    for package; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    echo "installing ${missing[*]}"
    local apt=(timeout 900 apt-get -qq -y -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 --no-install-recommends)
    { "${apt[@]}" update && "${apt[@]}" install "${missing[@]}"; } >"$work/apt.log" 2>&1 || { tail -5 "$work/apt.log"; bad "apt-get install ${missing[*]}"; exit 1; }
}

sources() { # sources SUITE: this machine's sources of Debian packages, for another suite
    local file codename
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
        grep -qs "$codename" "$file" && { sed "s/\b$codename\b/$1/g" "$file"; return; }
    done
    echo "deb http://deb.debian.org/debian $1 main"
}

# What excludes each other, or listens by itself, is fetched only, and installed in its turn later.
fetched=/var/cache/fetched
fetch_hook() { # prints a script for mmdebstrap
    cat <<EOF
#!/bin/sh
set -e
fetch() {
    name=\$1
    shift
    mkdir -p "\$root$fetched/\$name/partial"
    chroot "\$root" apt-get -qq -y -o APT::Sandbox::User=root -o Acquire::Retries=3 -o "Dir::Cache::archives=$fetched/\$name" \\
        --no-install-recommends --download-only --reinstall install "\$@"
}
root=\$1
fetch inetutils-inetd inetutils-inetd
fetch openbsd-inetd openbsd-inetd
fetch xinetd xinetd
fetch dovecot dovecot-imapd
fetch courier courier-imap courier-authdaemon
fetch fail2ban fail2ban
fetch cyrus cyrus-imapd sasl2-bin libsasl2-modules
# mailutils' imap4d wants a superserver and then serves port 143 by it, in clear.
chroot "\$root" dpkg --purge --force-depends inetutils-inetd
EOF
}

tree() { # tree SUITE PACKAGE,...: prints the path of a minimal system with these packages
    local path log
    path=$trees/$1-$({ echo "$2"; fetch_hook; } | sha256sum | cut -c1-8) log=$work/tree-$1.log
    if [ ! -e "$path.done" ]; then
        fetch_hook > "$work/fetch-$1"
        chmod 755 "$work/fetch-$1"
        # A mirror may fail once.
        for _ in 1 2; do
            rm -rf --one-file-system "$path"
            sources "$1" | timeout -k 10 600 mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Retries "3"' --include="$2" --customize-hook="$work/fetch-$1" "$1" "$path" >"$log" 2>&1 \
                && { touch "$path.done"; break; }
            tail -5 "$log" >&2
        done
        [ -e "$path.done" ] || return 1
    fi
    printf '%s\n' "$path"
}

copy_of() { # copy_of TREE NAME: a writable copy, at once, by an overlay; prints its path
    local path=$work/$2
    mkdir -p "$path" "$path.upper" "$path.work"
    # Not every file system can be the upper one.
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$path.upper,workdir=$path.work" "$path" 2>/dev/null || cp -a "$1/." "$path" || return
    printf '%s\n' "$path"
}

cgroups() { awk '$3 == "cgroup2" || ($3 == "cgroup" && $4 ~ /name=systemd/) { print $2 }' /proc/mounts; }

boot() { # boot TREE: systemd as PID 1 there, with a loopback of its own; sets nspawn and init
    local state='' mounted
    [ -n "$1" ] || { bad "no copy of the tree"; return 1; }
    # systemd cannot share a cgroup with what is running here; of the filters that nspawn has, the calls that a
    # sandbox needs are let through, as on a real machine.
    (
        for mounted in $(cgroups); do mkdir -p "$mounted/$machine" && echo $BASHPID > "$mounted/$machine/cgroup.procs"; done
        exec systemd-nspawn -q -D "$1" -M "$machine" --boot --register=no --keep-unit --private-network --console=pipe \
            --system-call-filter="landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret"
    ) </dev/null >"$work/boot.log" 2>&1 &
    nspawn=$!
    for _ in $(seq 600); do
        init=$(awk '{ print $1 }' "/proc/$nspawn/task/$nspawn/children" 2>/dev/null)
        [ -n "$init" ] && state=$(inside systemctl is-system-running 2>/dev/null)
        case $state in running | degraded) break ;; esac
        ended "$nspawn" 1 && break
    done
    case $state in
        running) ok "systemd $(inside systemctl --version | awk 'NR == 1 { print $2 }') boots" ;;
        degraded) bad "systemd boots degraded: $(inside systemctl --failed --plain --no-legend)" ;;
        *)
            bad "systemd does not boot in systemd-nspawn on this machine, so nothing can be told: $(tail -c 1500 "$work/boot.log")"
            halt
            return 1
            ;;
    esac
}

ended() { # ended PID TENTHS: whether it ends within that time
    for _ in $(seq "$2"); do
        # A zombie has ended as far as we are concerned.
        grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$1/status" || return 0
        sleep 0.1
    done
    return 1
}

halt() {
    local mounted
    [ -n "$nspawn" ] || return 0
    [ -z "$init" ] || inside systemctl exit 0 2>/dev/null
    # SIGTERM has nspawn stop what never got as far as listening to systemctl, SIGKILL even what listens to nothing.
    ended "$nspawn" 200 || kill "$nspawn" 2>/dev/null
    ended "$nspawn" 200 || { bad "the container does not stop"; kill -9 "$nspawn" ${init:+"$init"} 2>/dev/null; }
    wait "$nspawn" 2>/dev/null
    nspawn='' init=''
    for mounted in $(cgroups); do [ -d "$mounted/$machine" ] && find "$mounted/$machine" -depth -type d -exec rmdir {} + 2>/dev/null; done
    return 0
}

# Nothing may hang: each has a time to end in.
inside() { timeout -k 5 300 nsenter -t "$init" -a env PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
# This machine's programs on that system's network: clients need not be installed there.
outside() { timeout -k 5 300 nsenter -t "$init" -n "$@"; }
journal() { inside sh -c 'journalctl --sync; journalctl -q -o cat --no-pager "$@"' journal "$@"; }
logs() { # logs NAME REGEX [ARGUMENT]...: the journal has it, by these arguments of journal's; a session may end, and log, after its client
    local found
    for _ in $(seq 50); do
        found=$(journal "${@:3}")
        grep -Eq -- "$2" <<<"$found" && break
        sleep 0.1
    done
    has "$1" "$2" "$found"
}

//! The tables of system calls are minimal: somebody makes each call that is in them, and nobody any other, whatever the C
//! library's allocator is told to do.

use super::tour::{KEEPER, KEEPER_SERVICE, NETWORK, OPENER, SHARED_KEEPER, Stop, Tour, deaths};
use crate::harness::tracer::Wanted;
use crate::harness::*;
use libtest_mimic::Trial;
use std::collections::BTreeSet;
use tables::Rule;

/// The program's own.
#[path = "../../../src/sandbox/filter/tables.rs"]
mod tables;

const NEEDS: &[Need] = &[Need::Root, Need::X86_64];

pub(super) fn tests() -> Vec<Trial> {
    vec![
        test(
            "confinement: minimal: each call that a filter lets through is made beneath it, and no other",
            NEEDS,
            minimal,
        ),
        test(
            "confinement: minimal: settings of the C library's allocator lead to no other call",
            NEEDS,
            allocators,
        ),
    ]
}

/// A table's name, what is in it, and to whom it applies.
type Table = (&'static str, &'static [Rule], &'static [&'static str]);

const ROLES: &[&str] = &[NETWORK, KEEPER, SHARED_KEEPER, KEEPER_SERVICE, OPENER];
const TABLES: &[Table] = &[
    ("COMMON", tables::COMMON, ROLES),
    ("NETWORK", tables::NETWORK, &[NETWORK]),
    ("KEEPER", tables::KEEPER, &[KEEPER]),
    ("SHARED_KEEPER", tables::SHARED_KEEPER, &[SHARED_KEEPER]),
    ("KEEPER_SERVICE", tables::KEEPER_SERVICE, &[KEEPER_SERVICE]),
    ("OPENER", tables::OPENER, &[OPENER]),
];

/// A call that is there for other builds than some: these have to do without it, or it belongs to all.
struct OfOthers {
    call: i64,
    /// Whether the program under test is one of those that never make it.
    is_unused: fn() -> bool,
    why: &'static str,
}

const OF_OTHERS: &[OfOthers] = &[
    OfOthers {
        call: libc::SYS_fstat,
        is_unused: || !is_static(),
        why: "std asks glibc for statx, which asks for newfstatat where there is none",
    },
    OfOthers {
        call: libc::SYS_newfstatat,
        is_unused: is_static,
        why: "musl has fstat for it",
    },
    OfOthers {
        call: libc::SYS_statx,
        is_unused: is_static,
        why: "std has it from glibc alone",
    },
    OfOthers {
        call: libc::SYS_rt_sigprocmask,
        is_unused: || is_static() || glibc() < (2, 41),
        why: "getrandom in the vDSO is glibc's from 2.41 on",
    },
];

/// Calls that are everybody's though one role alone makes them here.
const OF_ONE: &[(i64, &str, &str)] = &[(
    libc::SYS_write,
    NETWORK,
    "the others say what they died of, if it is of lack of memory or by a panic",
)];

/// The version of the tests' own glibc, which the program has too where it is not static.
fn glibc() -> (u32, u32) {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the function returns a string that is there for good.
        #[allow(unsafe_code)]
        let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
        let mut numbers = version.to_str().unwrap().split('.');
        let mut number = || numbers.next().unwrap().parse().unwrap();
        (number(), number())
    }
    #[cfg(not(target_env = "gnu"))]
    (0, 0)
}

/// Of debug builds std is another; which kind another program is nobody knows.
fn tables() -> impl Iterator<Item = Table> {
    let is_debug = cfg!(debug_assertions) && std::env::var_os("E2E_PROGRAM").is_none();
    let debug = is_debug.then_some(("DEBUG", tables::DEBUG, ROLES));
    TABLES.iter().copied().chain(debug)
}

fn minimal(test: &Test) {
    let wanted = [Wanted::List, Wanted::ListWithoutClock];
    let stops = wanted.map(|wanted| Tour::new(test, wanted, &[]).all());
    let stops: Vec<_> = stops.into_iter().flatten().collect();
    let mut faults = unlisted(&stops);
    for (table, rules, roles) in tables() {
        for rule in rules {
            let makers = makers(&stops, rule, roles);
            let what = format!("{table}: {} ({})", rule.name, rule.why);
            let of_others = OF_OTHERS.iter().find(|other| other.call == rule.call);
            match of_others.filter(|other| (other.is_unused)()) {
                Some(other) if !makers.is_empty() => {
                    faults.push(format!("{what}: made, though {}", other.why));
                }
                None if makers.is_empty() => faults.push(format!("{what}: nobody makes it")),
                Some(_) | None => {}
            }
            let alone = makers
                .first()
                .filter(|_| roles.len() > 1 && makers.len() == 1);
            let of_one = OF_ONE.iter().find(|(call, ..)| *call == rule.call);
            if alone != of_one.map(|(_, role, _)| role) {
                faults.push(format!(
                    "{what}: made by {makers:?}, which is not what OF_ONE says"
                ));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// Who makes a call, of these.
fn makers(stops: &[Stop], rule: &Rule, roles: &[&'static str]) -> BTreeSet<&'static str> {
    let all = stops.iter().flat_map(Stop::confined);
    let those = all.filter(|seen| seen.point.call == rule.call);
    let makers = those.map(|seen| seen.point.role);
    makers.filter(|role| roles.contains(role)).collect()
}

/// Calls that no table lets pass, and deaths for what was wrong with the arguments of others.
fn unlisted(stops: &[Stop]) -> Vec<String> {
    let is_listed = |role: &str, call: i64| {
        let of_role = TABLES.iter().filter(|(.., roles)| roles.contains(&role));
        let rules = of_role.flat_map(|(_, rules, _)| *rules);
        let mut all = rules.chain(tables::DEBUG);
        all.any(|rule| rule.call == call)
    };
    let mut faults = BTreeSet::new();
    for stop in stops {
        for seen in stop.confined() {
            let (role, call) = (seen.point.role, seen.point.call);
            if !is_listed(role, call) {
                faults.insert(format!("{}: {role} makes call {call}", stop.name));
            }
        }
        let deaths = deaths(&stop.trace);
        faults.extend(deaths.iter().map(|death| format!("{}: {death}", stop.name)));
    }
    faults.into_iter().collect()
}

/// What glibc's allocator can be told (mallopt(3), the manual's section 39.2), a set for each tour.
const SETTINGS: &[&[(&str, &str)]] = &[
    &[
        ("MALLOC_ARENA_MAX", "1"),
        ("MALLOC_MMAP_THRESHOLD_", "0"),
        ("MALLOC_PERTURB_", "165"),
        ("MALLOC_TOP_PAD_", "0"),
        ("MALLOC_TRIM_THRESHOLD_", "0"),
    ],
    &[
        ("MALLOC_MMAP_MAX_", "0"),
        ("MALLOC_TOP_PAD_", "4194304"),
        ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"),
    ],
    &[("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")],
    &[("GLIBC_TUNABLES", "glibc.malloc.hugetlb=2")],
];

fn allocators(test: &Test) {
    let mapped = SETTINGS.iter().map(|settings| {
        let stops = Tour::new(test, Wanted::List, settings).all();
        let faults = unlisted(&stops);
        assert!(faults.is_empty(), "{settings:?}:\n{}", faults.join("\n"));
        let all = stops.iter().flat_map(|stop| &stop.trace.seen);
        all.filter(|seen| seen.point.call == libc::SYS_mmap).count()
    });
    let mapped: Vec<_> = mapped.collect();
    // The first settings have it map each block, so before the filters are on it does.
    assert!(is_static() || mapped[0] > 2 * mapped[1], "{mapped:?}");
}

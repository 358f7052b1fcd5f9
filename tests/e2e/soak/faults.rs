//! Faults: processes are killed, certificates and settings change. One at a time, and only to connections that may be killed.

use super::places::{Kind, Place, both_certificates, replace};
use super::{Dice, Soak};
use crate::harness::*;
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// All kinds that there are.
pub const KINDS: &[&str] = &[
    "network process killed",
    "backend killed",
    "keeper of one killed",
    "keeper of all killed",
    "reload with another certificate",
    "reload of broken settings",
    "certificate replaced",
];

/// For something that a busy machine does in its own time.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Injector {
    certificates: [String; 2],
    turn: usize,
}

impl Injector {
    pub fn new(test: &Test) -> Self {
        Self {
            certificates: both_certificates(test).clone(),
            turn: 0,
        }
    }

    pub fn inject(&mut self, soak: &Soak, dice: &mut Dice) {
        let listeners: Vec<&Place> = soak
            .places
            .iter()
            .filter(|place| place.server.is_listener() && !place.is_steady)
            .collect();
        match dice.below(20) {
            0..=1 => kill_keeper(soak, listeners[dice.below(listeners.len())]),
            2..=4 => self.reload(soak, listeners[dice.below(listeners.len())]),
            5 => reload_what_is_broken(soak, listeners[dice.below(listeners.len())]),
            6 => {
                let each: Vec<_> = soak
                    .places
                    .iter()
                    .filter(|place| !place.server.is_listener())
                    .collect();
                self.turn += 1;
                replace(&dice.pick(&each).cert, &self.certificates[self.turn % 2]);
                soak.count("fault: certificate replaced");
            }
            _ => kill_some(soak, dice),
        }
    }

    fn reload(&mut self, soak: &Soak, place: &Place) {
        self.turn += 1;
        replace(&place.cert, &self.certificates[self.turn % 2]);
        let before = log_size(place);
        place.server.signal(libc::SIGHUP);
        wait_log(place, before, "imap-tls: reloaded");
        soak.count("fault: reload with another certificate");
    }
}

/// Settings that are nonsense for a moment.
fn reload_what_is_broken(soak: &Soak, place: &Place) {
    let Some(settings) = &place.settings else {
        return;
    };
    let before = log_size(place);
    replace(settings, "IMAP_TLS_NONSENSE=1\n");
    place.server.signal(libc::SIGHUP);
    wait_log(place, before, "nothing was renewed");
    replace(settings, "");
    soak.count("fault: reload of broken settings");
}

/// A listener's keeper; until there is another, nobody may be served.
fn kill_keeper(soak: &Soak, place: &Place) {
    let Some(keeper) = place.server.keeper() else {
        return;
    };
    let Ok(handle) = sys::open_process(keeper.0) else {
        return;
    };
    if keeper.parent() != Some(place.server.process()) {
        return;
    }
    // Noted before it is done, so that nobody fails unexcused; the end is moved as soon as it is known.
    let begin = Instant::now();
    place
        .without_keeper
        .lock()
        .unwrap()
        .push((begin, begin + 2 * PATIENCE));
    let is_killed = sys::signal_opened(handle.as_fd(), libc::SIGKILL).is_ok();
    let other = within("there is another keeper", PATIENCE, || {
        place.server.keeper().filter(|other| *other != keeper)
    });
    assert_ne!(other, keeper);
    // Whoever came before the listener knew has no keeper, and may find out a little later.
    if let Some((_, end)) = place.without_keeper.lock().unwrap().last_mut() {
        *end = Instant::now();
    }
    if is_killed {
        soak.count("fault: keeper of all killed");
    }
}

/// A process of a connection, and whose it is.
struct Victim {
    place: usize,
    address: SocketAddr,
    network: Process,
    process: Process,
}

/// All processes of one role that may be killed, at the first place from `first` on where there are any.
fn victims(soak: &Soak, role: &str, first: usize) -> Vec<Victim> {
    let count = soak.places.len();
    for place in (first..first + count).map(|number| number % count) {
        let mut connections = soak.places[place].connections();
        {
            let killable = soak.killable.lock().unwrap();
            connections.retain(|address, _| killable.get(address) == Some(&None));
        }
        let victims: Vec<Victim> = connections
            .into_iter()
            .flat_map(|(address, network)| {
                let all = std::iter::once(network).chain(network.children());
                all.filter(|process| role_of(*process, network) == Some(role))
                    .map(|process| Victim {
                        place,
                        address,
                        network,
                        process,
                    })
                    .collect::<Vec<_>>()
            })
            // imap4d would leave its mailbox locked.
            .filter(|_| role != "backend" || soak.places[place].kind != Kind::Mailutils)
            .collect();
        if !victims.is_empty() {
            return victims;
        }
    }
    Vec::new()
}

/// Nothing if it has ended.
fn role_of(process: Process, network: Process) -> Option<&'static str> {
    if process == network {
        return Some("network process");
    }
    if process.exe()? != dir::run_path("imap-tls") {
        return Some("backend");
    }
    Some(match process.uid_if_alive()? {
        KEEPER_ID => "keeper of one",
        NETWORK_ID => "connector",
        _ => "launcher",
    })
}

fn kill_some(soak: &Soak, dice: &mut Dice) {
    // Keepers, launchers and connectors do not live long.
    let role = *dice.pick(&[
        "network process",
        "network process",
        "backend",
        "keeper of one",
        "launcher",
        "connector",
    ]);
    let victims = victims(soak, role, dice.below(soak.places.len()));
    if victims.is_empty() {
        return;
    }
    let victim = dice.pick(&victims);
    let Ok(handle) = sys::open_process(victim.process.0) else {
        return;
    };
    // The number was this process's when the handle was made if it still has the same relatives.
    let connections = soak.places[victim.place].connections();
    let is_the_same = connections.get(&victim.address) == Some(&victim.network)
        && role_of(victim.process, victim.network) == Some(role)
        && (victim.process == victim.network || victim.process.parent() == Some(victim.network));
    if !is_the_same {
        return;
    }
    let mut killable = soak.killable.lock().unwrap();
    // Its client may be through by now.
    let Some(killed @ None) = killable.get_mut(&victim.address) else {
        return;
    };
    if sys::signal_opened(handle.as_fd(), libc::SIGKILL).is_ok() {
        *killed = Some(role);
        drop(killable);
        soak.count(format!("fault: {role} killed"));
    }
}

fn log_size(place: &Place) -> u64 {
    std::fs::metadata(place.server.log_path()).map_or(0, |log| log.len())
}

/// Waits for a line in what was logged after `from`.
fn wait_log(place: &Place, from: u64, wanted: &str) {
    within(wanted, PATIENCE, || {
        let mut log = std::fs::File::open(place.server.log_path()).ok()?;
        log.seek(SeekFrom::Start(from)).ok()?;
        let mut text = Vec::new();
        log.read_to_end(&mut text).ok()?;
        sys::contains(&text, wanted.as_bytes()).then_some(())
    });
}

//! What is done to a contestant, and what is noted down about it.

use std::time::{Duration, Instant};

use crate::Result;
use crate::client::{Client, Ending, Entry, Session};
use crate::contestant::{Contestant, Role};
use crate::growth;
use crate::memory::Memory;
use crate::report::{Bulk, Figures};
use crate::server::Server;
use crate::workspace::Workspace;

/// One kind of load.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scenario {
    /// MiB from the server.
    Down(u64),
    /// More and more connections that stay open, up to this many.
    Growth(usize),
    /// Connections that are open at once and say nothing.
    Idle(usize),
    /// Whole short sessions that resume the one before.
    Resumed(usize),
    /// Whole short sessions, one after the other in each of `concurrency` threads.
    SetUp {
        concurrency: usize,
        connections: usize,
    },
    /// MiB to the server.
    Up(u64),
}

const MIB: u64 = 1 << 20;
/// An idle connection is one that has been idle for this long: what a program gives back sooner does not count.
const IDLE_TIME: Duration = Duration::from_secs(1);
/// MiB each way before a connection is idle again.
const TRAFFIC: u64 = 15;

impl Scenario {
    pub(crate) fn all(connections: usize, bulk: u64, idle: usize, growth: usize) -> Vec<Self> {
        let set_up = |concurrency| Self::SetUp {
            concurrency,
            connections,
        };
        vec![
            set_up(1),
            set_up(8),
            Self::Resumed(connections),
            Self::Down(bulk),
            Self::Up(bulk),
            Self::Idle(idle),
            Self::Growth(growth),
        ]
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Self::Down(mib) => format!("down ({mib} MiB)"),
            Self::Growth(most) => format!("growth (to {most} connections)"),
            Self::Idle(connections) => format!("idle ({connections} connections)"),
            Self::Resumed(connections) => format!("resumed ({connections} connections)"),
            Self::SetUp {
                concurrency,
                connections,
            } => {
                format!("set-up ({connections} connections, {concurrency} at a time)")
            }
            Self::Up(mib) => format!("up ({mib} MiB)"),
        }
    }

    /// Whether it is anything to this contestant: some things are ours alone to show, and take long.
    pub(crate) fn concerns(self, contestant: &Contestant, round: usize) -> bool {
        let is_ours = matches!(contestant.role, Role::Listener | Role::Ours);
        match self {
            // The floors show what of it is tcpserver's, which asks for children that have ended as often as there are news, and what is
            // that of so many processes.
            Self::Growth(_) => {
                let is_shown = match contestant.role {
                    Role::ConfinedFloor | Role::ConfinedListenerFloor | Role::StaticFloor => true,
                    _ => is_ours && contestant.entry == Entry::Implicit,
                };
                is_shown && round == 0
            }
            Self::Resumed(_) => is_ours,
            // Whoever copies, copies as fast.
            Self::Down(_) | Self::Up(_) => !matches!(
                contestant.role,
                Role::ConfinedFloor | Role::ConfinedListenerFloor
            ),
            Self::Idle(_) | Self::SetUp { .. } => true,
        }
    }

    /// Starts the contestant, does it, ends the contestant.
    pub(crate) fn run(
        self,
        contestant: &Contestant,
        workspace: &Workspace,
        client: &Client,
        figures: &mut Figures,
    ) -> Result<()> {
        let most = match self {
            Self::Growth(most) => {
                figures.growth = growth::measure(contestant, workspace, client, most)?;
                return Ok(());
            }
            Self::Idle(connections) => connections,
            Self::SetUp { concurrency, .. } => concurrency,
            Self::Down(_) | Self::Resumed(_) | Self::Up(_) => 1,
        };
        // A connection may begin while the processes of the one before are still ending.
        let mut server = Server::start(contestant, workspace, 2 * most + 16)?;
        let result = match self {
            Self::Down(mib) => bulk(&mut server, contestant, client, |session| {
                session.download(mib * MIB)
            })
            .map(|measured| (measured, &mut figures.down)),
            Self::Up(mib) => bulk(&mut server, contestant, client, |session| {
                session.upload(mib * MIB)
            })
            .map(|measured| (measured, &mut figures.up)),
            Self::Idle(connections) => {
                let result = idle(&server, contestant, workspace, client, connections, figures);
                let stopped = server.stop();
                return result.and(stopped.map(|_| ()));
            }
            Self::Growth(_) => return Ok(()),
            Self::Resumed(connections) => {
                let result = resumed(&mut server, contestant, workspace, client, connections);
                let in_the_end = server.stop()?;
                let used = result?.unwrap_or(in_the_end) / u32::try_from(connections)?;
                figures.resumed.push(used.as_secs_f64() * 1e3);
                return Ok(());
            }
            Self::SetUp {
                concurrency,
                connections,
            } => {
                let result = set_up(
                    &server,
                    contestant,
                    client,
                    concurrency,
                    connections,
                    figures,
                );
                let used = server.stop();
                result?;
                let cost = used? / u32::try_from(connections)?;
                let load = figures.set_up.entry(concurrency).or_default();
                load.processor.push(cost.as_secs_f64() * 1e3);
                return Ok(());
            }
        };
        let in_the_end = server.stop();
        let ((wall, used), list) = result?;
        let used = used.map_or(in_the_end, Ok)?;
        let (Self::Down(mib) | Self::Up(mib)) = self else {
            return Ok(());
        };
        list.push(Bulk {
            megabytes_per_second: (mib * MIB) as f64 / 1e6 / wall.as_secs_f64(),
            processor_per_gib: used.as_secs_f64() * 1024.0 / mib as f64,
        });
        Ok(())
    }
}

fn set_up(
    server: &Server<'_>,
    contestant: &Contestant,
    client: &Client,
    concurrency: usize,
    connections: usize,
    figures: &mut Figures,
) -> Result<()> {
    let port = server.port;
    let visits = std::thread::scope(|scope| {
        let share = |thread| (connections + thread) / concurrency;
        let threads: Vec<_> = (0..concurrency)
            .map(|thread| {
                scope.spawn(move || {
                    (0..share(thread))
                        .map(|_| client.visit(port, contestant.entry))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        let visits = threads.into_iter().map(|thread| thread.join().unwrap());
        visits.collect::<Vec<_>>()
    });
    for visit in visits.into_iter().flatten() {
        let (wall, ending) = visit?;
        let load = figures.set_up.entry(concurrency).or_default();
        load.wall.push(wall.as_secs_f64() * 1e3);
        figures.cut += usize::from(ending == Ending::Cut);
    }
    Ok(())
}

/// Processor time of sessions of which each resumes the one before, if it can be told apart from that of the first.
fn resumed(
    server: &mut Server<'_>,
    contestant: &Contestant,
    workspace: &Workspace,
    client: &Client,
    connections: usize,
) -> Result<Option<Duration>> {
    let client = client.that_resumes(&workspace.authority)?;
    client.log_in(server.port, contestant.entry)?.log_out()?;
    server.count_from_here()?;
    for _ in 0..connections {
        let session = client.log_in(server.port, contestant.entry)?;
        let is_resumed = session.is_resumed;
        session.log_out()?;
        if !is_resumed {
            return Err("a session was not resumed".into());
        }
    }
    server.used()
}

/// Wall time, and processor time if it can be told apart from that of beginning and end.
fn bulk(
    server: &mut Server<'_>,
    contestant: &Contestant,
    client: &Client,
    transfer: impl FnOnce(&mut Session) -> std::io::Result<()>,
) -> Result<(Duration, Option<Duration>)> {
    let mut session = client.log_in(server.port, contestant.entry)?;
    server.count_from_here()?;
    let start = Instant::now();
    transfer(&mut session)?;
    let wall = start.elapsed();
    let used = server.used()?;
    session.log_out()?;
    Ok((wall, used))
}

fn idle(
    server: &Server<'_>,
    contestant: &Contestant,
    workspace: &Workspace,
    client: &Client,
    connections: usize,
    figures: &mut Figures,
) -> Result<()> {
    let mut sessions = (0..connections)
        .map(|_| client.log_in(server.port, contestant.entry))
        .collect::<std::io::Result<Vec<_>>>()?;
    figures.facts.clone_from(&sessions[0].facts);
    let measure = || {
        // Not to wait for anything: being idle is what is measured.
        std::thread::sleep(IDLE_TIME);
        Memory::per_connection(&server.shared(), &workspace.imapd, connections)
    };
    figures.idle.push(measure());
    for session in &mut sessions {
        session.download(TRAFFIC * MIB)?;
        session.upload(TRAFFIC * MIB)?;
    }
    figures.idle_after_traffic.push(measure());
    for session in sessions {
        session.log_out()?;
    }
    Ok(())
}

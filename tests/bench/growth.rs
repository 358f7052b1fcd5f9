//! How the cost of a connection grows with those that are open already, and what an open one costs the kernel.

use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::Result;
use crate::client::Client;
use crate::contestant::Contestant;
use crate::memory::{Memory, kernel_memory};
use crate::server::Server;
use crate::workspace::Workspace;

/// One step: so many are open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) open: usize,
    /// Milliseconds for one more; `None` where it cannot be told apart.
    pub(crate) processor: Option<f64>,
    pub(crate) memory: Memory,
    /// KiB a connection: page tables, kernel stacks and slab, of the IMAP server's process and tcpserver's too.
    pub(crate) kernel: f64,
}

/// How many are open at each step.
const STEPS: [usize; 4] = [1, 100, 1000, 4000];
/// How many short sessions are measured at each.
const VISITS: u32 = 100;
/// After this long an idle connection has given back what it will.
const IDLE_TIME: Duration = Duration::from_secs(1);

/// Opens more and more connections, and measures short ones beside them.
pub(crate) fn measure(
    contestant: &Contestant,
    workspace: &Workspace,
    client: &Client,
    most: usize,
) -> Result<Vec<Step>> {
    let steps = STEPS.into_iter().filter(|open| *open <= most);
    let room = u64::try_from(most)? + 256;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, room, hard.max(room))?;
    let before = kernel_memory();
    let mut server = Server::start(contestant, workspace, most + 64)?;
    let mut sessions = Vec::new();
    let result = steps
        .map(|open| {
            while sessions.len() < open {
                sessions.push(client.log_in(server.port, contestant.entry)?);
            }
            // Not to wait for anything: being idle is what is measured.
            std::thread::sleep(IDLE_TIME);
            let share = open as f64;
            let kernel = (kernel_memory() - before) / share;
            let memory = Memory::per_connection(&server.shared(), &workspace.imapd, open);
            server.count_from_here()?;
            for _ in 0..VISITS {
                client.visit(server.port, contestant.entry)?;
            }
            let processor = server.used()?;
            Ok(Step {
                open,
                processor: processor.map(|used| used.as_secs_f64() * 1e3 / f64::from(VISITS)),
                memory,
                kernel,
            })
        })
        .collect();
    drop(sessions);
    let stopped = server.stop();
    let steps = result;
    stopped?;
    steps
}

//! Where confined processes come from.

use crate::harness::*;

/// Whose place hostile code has taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Role {
    Network,
    /// Of one connection.
    Keeper,
    /// The listener's.
    SharedKeeper,
    /// The service's.
    KeeperService,
    Opener,
}

pub(super) const ROLES: [Role; 5] = [
    Role::Network,
    Role::Keeper,
    Role::SharedKeeper,
    Role::KeeperService,
    Role::Opener,
];

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Role::Network => "network process",
            Role::Keeper => "keeper",
            Role::SharedKeeper => "listener's keeper",
            Role::KeeperService => "keeper service",
            Role::Opener => "opener",
        }
    }

    /// The system call in which it waits.
    pub(super) fn waits_in(self, call: i64) -> bool {
        match self {
            Role::Network => call == libc::SYS_ppoll || call == libc::SYS_poll,
            Role::Keeper | Role::Opener => call == libc::SYS_recvfrom,
            Role::SharedKeeper | Role::KeeperService => call == libc::SYS_epoll_pwait,
        }
    }
}

/// Where a role's processes come from, one after the other.
pub(super) enum Stage {
    /// Connections of a listener, and its keeper.
    Listener(Box<Server>, Role),
    /// The keeper of a service, for programs that are started one after the other.
    Service(Box<Service>, Program),
    /// A start for each.
    Starts(Program, Role),
}

/// A process, and the client that keeps it alive.
pub(super) struct Held {
    pub(super) process: Process,
    pub(super) client: Option<Client>,
    pub(super) session: Option<Session>,
}

impl Stage {
    pub(super) fn new(test: &Test, role: Role) -> Self {
        let program = Program::new(test);
        match role {
            Role::Network | Role::SharedKeeper => {
                let server = Server::start(test, Superserver::Listener, &program);
                Stage::Listener(Box::new(server), role)
            }
            Role::KeeperService => {
                let service = Service::start(test, &Service::keeping(test));
                Stage::Service(Box::new(service), Service::serving(test))
            }
            Role::Keeper => Stage::Starts(program, role),
            Role::Opener => {
                let directory = test.path("names");
                make_dir(&directory, 0o755);
                Stage::Starts(program.option("--cert-dir", directory), role)
            }
        }
    }

    /// A process that waits for its client, or for what the network process asks for.
    pub(super) fn take(&self) -> Held {
        match self {
            Stage::Listener(server, role) => {
                let mut client = server.connect();
                client.greeting();
                let find = || match role {
                    Role::Network => {
                        let sessions = server.sessions();
                        // The one before it may still be on its way out.
                        (sessions.len() == 1).then(|| sessions[0].network)
                    }
                    _ => server.keeper(),
                };
                Held {
                    process: waiting(*role, find),
                    client: Some(client),
                    session: None,
                }
            }
            Stage::Service(service, program) => {
                let mut session = program.start();
                session.client().greeting();
                Held {
                    process: waiting(Role::KeeperService, || service.keeper()),
                    client: None,
                    session: Some(session),
                }
            }
            Stage::Starts(program, role) => {
                let mut session = program.start();
                session.client().greeting();
                let process = waiting(*role, || {
                    let processes = session.processes();
                    match role {
                        Role::Opener => processes.opener,
                        _ => processes.keeper,
                    }
                });
                Held {
                    process,
                    client: None,
                    session: Some(session),
                }
            }
        }
    }

    /// The same, on this kernel.
    pub(super) fn take_on(&self, kernel: Kernel) -> Held {
        kernel.run(|| self.take())
    }
}

/// The process, once it waits as its role does.
pub(super) fn waiting(role: Role, find: impl Fn() -> Option<Process>) -> Process {
    eventually(&format!("the {} waits", role.name()), || {
        let process = find()?;
        let is_waiting = process.state() == Some('S')
            && process.blocked_in().is_some_and(|call| role.waits_in(call));
        is_waiting.then_some(process)
    })
}

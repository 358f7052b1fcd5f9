//! A contestant under tcpserver or by itself, and the processor time of everything that came of it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike as _;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::Result;
use crate::contestant::Contestant;
use crate::memory::{descendants, descendants_of};
use crate::workspace::{Workspace, ending_signals};

/// How processor time is counted.
#[derive(Clone, Debug)]
pub(crate) enum Accounting {
    /// By a control group of version 1: `cpuacct.usage`.
    GroupV1(PathBuf),
    /// By a control group of version 2: `cpu.stat`.
    GroupV2(PathBuf),
    /// By getrusage(2) of all descendants, once they have ended. tcpserver's own start is in it then.
    Waited,
}

impl Accounting {
    /// The best that this machine offers.
    pub(crate) fn choose() -> Self {
        let memberships = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let name = format!("imap-tls-bench.{}", std::process::id());
        for line in memberships.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(own)) = (fields.next(), fields.next()) else {
                continue;
            };
            let own = own.trim_start_matches('/');
            let is_v1 = controllers
                .split(',')
                .any(|controller| controller == "cpuacct");
            let roots: &[&str] = match controllers {
                "" => &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"],
                _ if is_v1 => &["/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup/cpu,cpuacct"],
                _ => &[],
            };
            for root in roots {
                let group = Path::new(root).join(own).join(&name);
                let file = if is_v1 { "cpuacct.usage" } else { "cpu.stat" };
                if fs::create_dir(&group).is_err() {
                    continue;
                }
                if group.join(file).exists() {
                    return if is_v1 {
                        Self::GroupV1(group)
                    } else {
                        Self::GroupV2(group)
                    };
                }
                let _ = fs::remove_dir(&group);
            }
        }
        Self::Waited
    }

    /// Removes the group, which has no members any more.
    pub(crate) fn remove(&self) {
        if let Some(group) = self.group() {
            let _ = fs::remove_dir(group);
        }
    }

    /// To start a program that is counted from its first instruction: a shell joins the group and becomes it.
    fn command(&self, program: &OsStr) -> Command {
        let Some(group) = self.group() else {
            return Command::new(program);
        };
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(group.join("cgroup.procs"))
            .arg(program);
        shell
    }

    fn group(&self) -> Option<&Path> {
        match self {
            Self::GroupV1(group) | Self::GroupV2(group) => Some(group),
            Self::Waited => None,
        }
    }

    /// For the report.
    pub(crate) fn describe(&self) -> &'static str {
        match self {
            Self::GroupV1(_) => "cpuacct.usage of a control group (v1)",
            Self::GroupV2(_) => "cpu.stat of a control group (v2)",
            Self::Waited => {
                "getrusage(2) of all descendants, tcpserver's start included (no control group could be made)"
            }
        }
    }

    /// Processor time used so far by what is, or was, counted.
    fn used(&self) -> Result<Duration> {
        match self {
            Self::GroupV1(group) => {
                let text = fs::read_to_string(group.join("cpuacct.usage"))?;
                Ok(Duration::from_nanos(text.trim().parse()?))
            }
            Self::GroupV2(group) => {
                let text = fs::read_to_string(group.join("cpu.stat"))?;
                let field = text
                    .lines()
                    .find_map(|line| line.strip_prefix("usage_usec "));
                Ok(Duration::from_micros(
                    field.ok_or("no usage_usec in cpu.stat")?.trim().parse()?,
                ))
            }
            Self::Waited => {
                let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
                let time = usage.user_time() + usage.system_time();
                Ok(Duration::from_micros(time.num_microseconds().try_into()?))
            }
        }
    }
}

/// tcpserver, ready for clients.
pub(crate) struct Server<'a> {
    accounting: &'a Accounting,
    base: Duration,
    /// The service that holds keys, if there is one.
    keeper: Option<Pid>,
    pub(crate) port: u16,
    process: Pid,
}

impl<'a> Server<'a> {
    /// Starts tcpserver with a contestant.
    pub(crate) fn start(
        contestant: &Contestant,
        workspace: &'a Workspace,
        most: usize,
    ) -> Result<Self> {
        let accounting = &workspace.accounting;
        let before = accounting.used()?;
        if contestant.role.listens() {
            return Self::start_listener(contestant, workspace, before);
        }
        let keeper = contestant.keeper.as_ref();
        let keeper = keeper.map(|command| start_keeper(command, contestant, workspace));
        let keeper = keeper.transpose()?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(workspace.log(contestant))?;
        // -1: tell the port, when ready. -D: TCP_NODELAY. -H -R -l: ask neither DNS nor ident about anybody.
        let mut command = accounting.command(OsStr::new("tcpserver"));
        command
            .args(["-1", "-D", "-H", "-R", "-l", "localhost", "-b", "128"])
            .arg("-c")
            .arg(most.to_string())
            .args(["127.0.0.1", "0"])
            .args(&contestant.command)
            .envs(contestant.environment.iter().cloned())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut child = spawn(&mut command, "tcpserver")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no pipe")?).read_line(&mut line)?;
        let server = Self {
            accounting,
            base: match accounting {
                Accounting::Waited => before,
                _ => accounting.used()?,
            },
            keeper,
            port: line.trim().parse().unwrap_or_default(),
            process: Pid::from_raw(child.id().try_into()?),
        };
        if server.port == 0 {
            server.stop()?;
            return Err("tcpserver told no port".into());
        }
        Ok(server)
    }

    /// Starts a contestant that listens by itself, on a port that was free a moment ago.
    fn start_listener(
        contestant: &Contestant,
        workspace: &'a Workspace,
        before: Duration,
    ) -> Result<Self> {
        let accounting = &workspace.accounting;
        let address = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
        let mut command = accounting.command(&contestant.command[0]);
        command
            .args(["--listen", &address.to_string()])
            .args(&contestant.command[1..])
            .envs(contestant.environment.iter().cloned());
        let process = start_service(&mut command, &workspace.log(contestant), "listening on")?;
        Ok(Self {
            accounting,
            base: match accounting {
                Accounting::Waited => before,
                _ => accounting.used()?,
            },
            keeper: None,
            port: address.port(),
            process,
        })
    }

    /// What is there without a connection as well.
    pub(crate) fn shared(&self) -> Vec<Pid> {
        let keepers = self.keeper.into_iter().flat_map(descendants_of);
        [self.process]
            .into_iter()
            .chain(self.keeper)
            .chain(keepers)
            .collect()
    }

    /// Counts from here on, where that is possible.
    pub(crate) fn count_from_here(&mut self) -> Result<()> {
        if self.accounting.group().is_some() {
            self.base = self.accounting.used()?;
        }
        Ok(())
    }

    /// Processor time so far; `None` where it is known only in the end.
    pub(crate) fn used(&self) -> Result<Option<Duration>> {
        match self.accounting {
            Accounting::Waited => Ok(None),
            accounting => Ok(Some(accounting.used()?.saturating_sub(self.base))),
        }
    }

    /// Ends tcpserver, waits for everything that it started, and returns the processor time of it all.
    pub(crate) fn stop(self) -> Result<Duration> {
        kill(self.process, Signal::SIGTERM)?;
        if let Some(keeper) = self.keeper {
            kill(keeper, Signal::SIGTERM)?;
        }
        reap()?;
        Ok(self.accounting.used()?.saturating_sub(self.base))
    }
}

/// Starts the keeper service; it is ready when this returns.
fn start_keeper(words: &[OsString], contestant: &Contestant, workspace: &Workspace) -> Result<Pid> {
    let mut command = workspace.accounting.command(&words[0]);
    command.args(&words[1..]);
    let log = workspace.log(contestant).with_extension("keeper");
    start_service(&mut command, &log, "keeping keys")
}

/// Starts what says in its log when it is ready.
fn start_service(command: &mut Command, log: &Path, ready: &str) -> Result<Pid> {
    command.stdout(Stdio::null()).stderr(File::create(log)?);
    let child = spawn(command, "a service")?;
    let deadline = Instant::now() + PATIENCE;
    while !fs::read_to_string(log)?.contains(ready) {
        if Instant::now() > deadline {
            return Err(format!("no '{ready}' in {}", log.display()).into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Pid::from_raw(child.id().try_into()?))
}

/// Starts a program that can be ended: a blocked signal would be handed down.
fn spawn(command: &mut Command, what: &str) -> Result<Child> {
    ending_signals().thread_unblock()?;
    let child = command.stdin(Stdio::null()).spawn();
    ending_signals().thread_block()?;
    child.map_err(|error| format!("cannot start {what}: {error}").into())
}

/// How long processes that have nothing more to do may take to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for every descendant: those whose parent ended are ours, since this process is their subreaper.
pub(crate) fn reap() -> Result<()> {
    let (done, is_done) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let is_late = is_done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
        if is_late {
            kill_descendants();
        }
        is_late
    });
    while !matches!(waitpid(None, None), Err(Errno::ECHILD)) {}
    drop(done);
    match watchdog.join() {
        Ok(false) => Ok(()),
        _ => Err("processes were left over, and killed".into()),
    }
}

/// Kills what this process started, by its ids.
pub(crate) fn kill_descendants() {
    for process in descendants() {
        let _ = kill(process, Signal::SIGKILL);
    }
}

//! `--check`: looks at everything that could go wrong in this machine's real set-up, and says what to do; opens no connection.
//!
//! What serves a client is what is examined: the keeper reads and parses the files, the launcher starts the backend, and the
//! sandbox is entered, by the same code.

mod backend;
mod chain;
mod connect;
mod keys;
mod machine;

use std::fmt;
use std::path::Path;

use crate::cli::{Separation, Task};
use crate::error::{EXIT_SETUP, Error, reason};
use crate::proxy_header::Sender;
use crate::sandbox::{
    self, BoundingSet, Confinement, FEW_DESCRIPTORS, Features, FileGrowth, Identity, Limits,
    OwnUsers, Plan, Role,
};
use crate::sys;

/// How the report is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Format {
    /// An array of objects with `level`, `subject` and `text`.
    Json,
    /// A line for each finding.
    Text,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Level {
    Error,
    Ok,
    Warning,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Ok => "ok",
            Self::Warning => "warning",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug)]
struct Finding {
    level: Level,
    subject: &'static str,
    text: String,
}

/// All that was found.
#[derive(Debug, Default)]
pub(crate) struct Report(Vec<Finding>);

impl Report {
    fn add(&mut self, level: Level, subject: &'static str, text: impl fmt::Display) {
        self.0.push(Finding {
            level,
            subject,
            text: text.to_string(),
        });
    }

    /// Adds what `check` finds, each with the label in front, where there are several of a kind.
    fn labelled(&mut self, label: Option<&str>, check: impl FnOnce(&mut Self)) {
        let mut part = Self::default();
        check(&mut part);
        for mut finding in part.0 {
            if let Some(label) = label {
                finding.text = format!("{label}: {}", finding.text);
            }
            self.0.push(finding);
        }
    }

    /// Takes a result apart: what went well is said with `praise`.
    fn take<T>(
        &mut self,
        subject: &'static str,
        result: Result<T, Error>,
        praise: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.add(Level::Ok, subject, praise(&value));
                Some(value)
            }
            Err(error) => {
                self.add(Level::Error, subject, error);
                None
            }
        }
    }

    /// The report of options that could not be read at all.
    pub(crate) fn of_usage(error: &Error) -> Self {
        let mut report = Self::default();
        report.add(Level::Error, "options", error);
        report
    }

    /// 100 if anything is wrong; warnings alone are not.
    pub(crate) fn exit_status(&self) -> u8 {
        if self.0.iter().any(|finding| finding.level == Level::Error) {
            EXIT_SETUP
        } else {
            0
        }
    }

    /// As it is printed.
    pub(crate) fn write(&self, format: Format) -> String {
        match format {
            Format::Json => {
                let findings = self.0.iter().map(|finding| {
                    serde_json::json!({
                        "level": finding.level.name(),
                        "subject": finding.subject,
                        "text": finding.text,
                    })
                });
                format!("{:#}\n", serde_json::Value::Array(findings.collect()))
            }
            Format::Text => self
                .0
                .iter()
                .map(
                    |Finding {
                         level,
                         subject,
                         text,
                     }| format!("{}: {subject}: {text}\n", level.name()),
                )
                .collect(),
        }
    }
}

/// Examines the set-up.
pub(crate) fn check(task: &Task) -> Report {
    let mut report = Report::default();
    let common = match task {
        Task::Keep(common) => common,
        Task::Serve(options) => &options.common,
    };
    let separation = check_separation(&mut report, &common.separation);
    check_confinement(&mut report, separation.as_ref(), common.memory_limit);
    machine::check_kernel(&mut report, &Features::of_kernel(), &common.required);
    match task {
        Task::Keep(_) => {
            keys::check_keys(&mut report, common, separation.as_ref());
        }
        Task::Serve(options) => {
            keys::check_tls(&mut report, options, separation.as_ref());
            backend::check_backend(&mut report, options, separation.as_ref());
            check_balancers(&mut report, &options.proxy_from);
        }
    }
    machine::check_log(&mut report, common.destination);
    match task {
        Task::Keep(_) => machine::check_keepers_socket(&mut report, common.keeper.as_deref()),
        Task::Serve(options) if common.listening.addresses.is_empty() => {
            machine::check_superserver(&mut report, options.policy);
        }
        Task::Serve(_) => machine::check_listener(&mut report, &common.listening.addresses),
    }
    report
}

/// Who may say whose a connection is.
fn check_balancers(report: &mut Report, senders: &[Sender]) {
    const SUBJECT: &str = "balancer";
    if senders.is_empty() {
        return;
    }
    for sender in senders.iter().filter(|sender| sender.is_everybody()) {
        report.add(
            Level::Warning,
            SUBJECT,
            format!(
                "--proxy-from {sender} is everybody, and whoever connects can give itself any address: name the balancers"
            ),
        );
    }
    let senders: Vec<_> = senders.iter().map(Sender::to_string).collect();
    let senders = senders.join(", ");
    let text = format!("a PROXY header must come, from {senders}; nobody else is served");
    report.add(Level::Ok, SUBJECT, text);
}

/// Users and directory, as far as they are good.
struct Found<'a> {
    chroot: &'a Path,
    users: OwnUsers,
}

fn check_separation<'a>(report: &mut Report, separation: &'a Separation) -> Option<Found<'a>> {
    let (chroot, group, keeper_user, user) = match separation {
        Separation::Full {
            chroot,
            group,
            keeper_user,
            user,
        } => (chroot, group, keeper_user, user),
        Separation::Unprivileged => {
            report.add(
                Level::Warning,
                "separation",
                "--unprivileged: no chroot, and no users of their own; start it as root for all of the protection",
            );
            return None;
        }
    };
    let praise = |identity: &Identity| format!("uid {}, gid {}", identity.user, identity.group);
    let network = Identity::look_up(user, group.as_deref(), "--user");
    let network = report.take("network process", network, |found| {
        format!("user '{user}': {}", praise(found))
    });
    let keeper = Identity::look_up(keeper_user, None, "--keeper-user");
    let keeper = report.take("keeper", keeper, |found| {
        format!("user '{keeper_user}': {}", praise(found))
    });
    let root = report.take("chroot", sandbox::open_root(chroot), |_| {
        format!(
            "'{}' is root's, empty, and nobody else's to write to",
            chroot.display()
        )
    });
    match OwnUsers::new(network?, keeper?) {
        Ok(users) => root.map(|_| Found { chroot, users }),
        Err(error) => {
            report.add(Level::Error, "separation", error);
            None
        }
    }
}

impl Found<'_> {
    fn plan(&self, identity: Identity, memory_limit: u64) -> Result<Plan, Error> {
        let root = sandbox::open_root(self.chroot)?;
        Ok(Plan {
            bounding_set: BoundingSet::Full,
            confinement: Some(Confinement { identity, root }),
            limits: limits(memory_limit),
        })
    }
}

fn limits(memory: u64) -> Limits {
    Limits {
        descriptors: FEW_DESCRIPTORS,
        file_growth: FileGrowth::Forbidden,
        memory,
    }
}

fn plan(
    found: Option<&Found<'_>>,
    who: fn(&Found<'_>) -> Identity,
    memory_limit: u64,
) -> Result<Plan, Error> {
    match found {
        Some(found) => found.plan(who(found), memory_limit),
        None => Ok(Plan {
            bounding_set: BoundingSet::Full,
            confinement: None,
            limits: limits(memory_limit),
        }),
    }
}

/// Enters the sandbox in a process of its own, which then ends.
fn check_confinement(report: &mut Report, found: Option<&Found<'_>>, memory_limit: u64) {
    use nix::sys::wait::{WaitStatus, waitpid};
    const FAILED: u8 = 1;
    let entered = plan(found, |found| found.users.network, memory_limit).and_then(|plan| {
        let child = sys::fork_into(|| match sandbox::enter(Role::Network, plan, &[]) {
            Ok(_) => 0,
            Err(_) => FAILED,
        });
        let child = child.map_err(|error| Error::system("cannot start a process", reason(&error)))?;
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            other => Err(Error::System(format!(
                "the sandbox cannot be entered here ({other:?}): is seccomp there (CONFIG_SECCOMP_FILTER), and may \
                 chroot, setuid and setgid be called?"
            ))),
        }
    });
    let separation = if found.is_some() { "chroot, ids, " } else { "" };
    report.take("sandbox", entered, |()| {
        format!("{separation}limits, no_new_privs and system call filter work on this kernel")
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_fail_the_check() {
        let mut report = Report::default();
        report.add(Level::Ok, "a", "fine");
        report.add(Level::Warning, "b", "not so fine");
        assert_eq!(report.exit_status(), 0);
        assert_eq!(
            report.write(Format::Text),
            "ok: a: fine\nwarning: b: not so fine\n"
        );
        report.add(Level::Error, "c", "a \"quoted\" fault");
        assert_eq!(report.exit_status(), 100);
        let json: serde_json::Value = serde_json::from_str(&report.write(Format::Json)).unwrap();
        assert_eq!(json[2]["level"], "error");
        assert_eq!(json[2]["text"], "a \"quoted\" fault");
    }
}

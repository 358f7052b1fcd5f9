//! The system calls that each role may make, which `tables` lists; everything else is death (seccomp(2)).
//!
//! The kernel runs a new filter over every system call number, to learn which need no look at their arguments, and compiles it:
//! a list, which is what seccompiler makes, costs a connection twice what a search tree does. So the tables are also there as
//! search trees, made by libseccomp with `tests/filters/run` for the usual architectures; tests run both over every number and
//! compare them with the tables. Where there is no tree, and in debug builds, seccompiler translates when it is needed.

use std::borrow::Cow;
use std::collections::BTreeMap;

use nix::libc::c_long;
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, sock_filter,
};

use super::Role;
use crate::error::Error;
use tables::{
    Argument, COMMON, DEBUG, KEEPER, KEEPER_SERVICE, NETWORK, OPENER, Rule, SHARED_KEEPER,
};

#[cfg(any(test, target_arch = "aarch64"))]
mod aarch64;
#[cfg(any(test, target_arch = "riscv64"))]
mod riscv64;
mod tables;
#[cfg(any(test, target_arch = "x86_64"))]
mod x86_64;

/// A filter as the kernel takes it.
pub(crate) type Program = Cow<'static, [sock_filter]>;

/// The filter of a role. Other architectures than the compiled one are refused by the filter itself.
///
/// # Errors
/// `System` if this architecture has no filter.
pub(crate) fn compile(role: Role) -> Result<Program, Error> {
    if let (false, Some(tree)) = (cfg!(debug_assertions), tree(role)) {
        return Ok(Cow::Borrowed(tree));
    }
    let debug: &[Rule] = if cfg!(debug_assertions) { DEBUG } else { &[] };
    translate(
        rules(role).chain(debug).map(|rule| (rule.call, rule)),
        std::env::consts::ARCH,
    )
    .map(Cow::Owned)
    .map_err(|error| Error::system("cannot make the system call filter", error))
}

fn rules(role: Role) -> impl Iterator<Item = &'static Rule> {
    let own = match role {
        Role::Keeper => KEEPER,
        Role::KeeperService => KEEPER_SERVICE,
        Role::Network => NETWORK,
        Role::Opener => OPENER,
        Role::SharedKeeper => SHARED_KEEPER,
    };
    COMMON.iter().chain(own)
}

/// The search tree of a role, where this architecture has one.
#[allow(
    unreachable_code,
    reason = "what comes last is for other architectures"
)]
fn tree(role: Role) -> Option<&'static [sock_filter]> {
    #[cfg(target_arch = "aarch64")]
    use aarch64 as trees;
    #[cfg(target_arch = "riscv64")]
    use riscv64 as trees;
    #[cfg(target_arch = "x86_64")]
    use x86_64 as trees;
    #[cfg(any(
        target_arch = "aarch64",
        target_arch = "riscv64",
        target_arch = "x86_64"
    ))]
    return Some(match role {
        Role::Keeper => trees::KEEPER,
        Role::KeeperService => trees::KEEPER_SERVICE,
        Role::Network => trees::NETWORK,
        Role::Opener => trees::OPENER,
        Role::SharedKeeper => trees::SHARED_KEEPER,
    });
    None
}

/// One instruction of a tree.
const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Has seccompiler translate rules, each with its call's number, for an architecture.
fn translate<'a>(
    rules: impl Iterator<Item = (c_long, &'a Rule)>,
    architecture: &str,
) -> Result<Vec<sock_filter>, BackendError> {
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, rule) in rules {
        table.insert(call, rule.conditions()?);
    }
    SeccompFilter::new(
        table,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        architecture.try_into()?,
    )?
    .try_into()
}

impl Rule {
    /// No rule means that any arguments will do.
    fn conditions(&self) -> Result<Vec<SeccompRule>, BackendError> {
        let conditions: Result<Vec<_>, _> = match self.argument {
            Argument::Any => return Ok(Vec::new()),
            Argument::Are(values) => values
                .iter()
                .map(|(index, value)| whole(*index, SeccompCmpOp::Eq, *value))
                .collect(),
            Argument::Masked(values) => values
                .iter()
                .map(|(index, mask, value)| whole(*index, SeccompCmpOp::MaskedEq(*mask), *value))
                .collect(),
            Argument::Differs(index, mask, value) => {
                return differing(mask, value)
                    .map(|(bit, other)| {
                        let differs = whole(index, SeccompCmpOp::MaskedEq(bit), other)?;
                        SeccompRule::new(vec![differs])
                    })
                    .collect();
            }
        };
        Ok(vec![SeccompRule::new(conditions?)?])
    }
}

/// A number differs if any bit of the mask does: each of them, and what it is then.
fn differing(mask: u64, value: u64) -> impl Iterator<Item = (u64, u64)> {
    let bits = (0..u64::BITS).map(|bit| 1 << bit);
    bits.filter(move |bit| mask & bit != 0)
        .map(move |bit| (bit, !value & bit))
}

/// A condition for all 64 bits.
fn whole(index: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value)
}

/// Puts the filter on for the rest of this process's life.
///
/// # Errors
/// `System` if the kernel refuses.
pub(crate) fn apply(program: &Program) -> Result<(), Error> {
    seccompiler::apply_filter(program)
        .map_err(|error| Error::system("cannot put the system call filter on", error))
}

#[cfg(test)]
mod tests;

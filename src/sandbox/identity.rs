//! Users looked up before chroot; the permanent drop of ids, then the proof of it.

use std::ffi::CString;

use nix::unistd::{Gid, Uid, User};

use crate::error::Error;
use crate::users::{self, Elsewhere};

/// An unprivileged user and group to become. uid 0 and gid 0 are never in one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Identity {
    pub(crate) group: Gid,
    pub(crate) user: Uid,
}

/// The users of the network process and of the keeper: two, and nobody else's, since kill(2) and ptrace(2) ask for no more than the
/// same uid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnUsers {
    pub(crate) keeper: Identity,
    pub(crate) network: Identity,
}

/// The user of the backend, with what its environment and groups need; may be any user but our own, root too.
#[derive(Clone, Debug)]
pub(crate) struct BackendUser {
    pub(crate) group: Gid,
    pub(crate) home: CString,
    pub(crate) name: CString,
    pub(crate) shell: CString,
    pub(crate) user: Uid,
}

/// Whom the connector runs as.
#[derive(Clone, Debug)]
pub(crate) enum ConnectorUser {
    /// As a plain user started us.
    AsStarted,
    /// The user that was named, with its groups, for there may be a socket that only those may use.
    Named(BackendUser),
    /// The network process's.
    Network(Identity),
}

impl ConnectorUser {
    pub(crate) fn is_root(&self) -> bool {
        matches!(self, Self::Named(user) if user.user.is_root())
    }

    /// Becomes this user for good.
    ///
    /// # Errors
    /// `System` if the kernel refuses.
    pub(super) fn become_for_good(&self) -> Result<(), Error> {
        match self {
            Self::AsStarted => Ok(()),
            Self::Named(user) => user.assume(),
            Self::Network(identity) => drop_ids_permanently(*identity),
        }
    }
}

impl Identity {
    /// Looks up a user, and a group if one is named, by name or number. `option` is where the name came from.
    ///
    /// # Errors
    /// `Setup` if there is no such user or group, or if it is root's.
    pub(crate) fn look_up(user: &str, group: Option<&str>, option: &str) -> Result<Self, Error> {
        let number = user.parse().ok().map(Uid::from_raw);
        // Two numbers say all that a look-up could.
        let found = match (number, group) {
            (Some(_), Some(_)) => None,
            _ => look_up_user(user, option, Elsewhere::Ignored)?,
        };
        let uid = found
            .as_ref()
            .map(|user| user.uid)
            .or(number)
            .ok_or_else(|| unknown("user", user, option))?;
        let own_group = match found {
            Some(user) => user.gid,
            // A number that is in no passwd: the group of the same number, as tools that take bare numbers do.
            None => Gid::from_raw(uid.as_raw()),
        };
        let gid = group.map_or(Ok(own_group), look_up_group)?;
        if uid.is_root() || gid.as_raw() == 0 {
            return Err(Error::Setup(format!(
                "user '{user}' ({option}) has uid 0 or gid 0: privileges are to be given up, so name another"
            )));
        }
        Ok(Self {
            group: gid,
            user: uid,
        })
    }
}

impl OwnUsers {
    /// Two, so that a hole in one process does not open the other.
    ///
    /// # Errors
    /// `Setup` if they are one.
    pub(crate) fn new(network: Identity, keeper: Identity) -> Result<Self, Error> {
        if network.user == keeper.user {
            return Err(one_user("--user", KEEPER_USER, network.user, A_HOLE));
        }
        Ok(Self { keeper, network })
    }

    /// The option by which this user is one of them.
    fn option(&self, user: Uid) -> Option<&'static str> {
        [(self.keeper, KEEPER_USER), (self.network, "--user")]
            .into_iter()
            .find_map(|(own, option)| (own.user == user).then_some(option))
    }
}

const BACKEND_USER: &str = "--backend-user";
const KEEPER_USER: &str = "--keeper-user";
/// Why two users must differ.
const A_HOLE: &str = "a hole in one opens the other";

fn one_user(option: &str, other: &str, uid: Uid, else_what: &str) -> Error {
    Error::Setup(format!(
        "{option} and {other} are both uid {uid}: they must differ, or {else_what}"
    ))
}

impl BackendUser {
    /// Looks up the user that the backend is to run as (`--backend-user`).
    ///
    /// Security: whoever has logged in may be able to have programs run as this user.
    ///
    /// # Errors
    /// `Setup` if there is no such user, or if it is one of ours.
    pub(crate) fn look_up(name: &str, own: Option<&OwnUsers>) -> Result<Self, Error> {
        let user = Self::look_up_named(name)?;
        match own.and_then(|own| own.option(user.user)) {
            Some(option) => Err(one_user(
                BACKEND_USER,
                option,
                user.user,
                "whoever has logged in can end other people's sessions",
            )),
            None => Ok(user),
        }
    }

    /// Looks up the user that the connector is to run as. The network process's is what it is by default.
    ///
    /// # Errors
    /// `Setup` if there is no such user, or if it is the keeper's.
    pub(crate) fn look_up_connector(name: &str, own: Option<&OwnUsers>) -> Result<Self, Error> {
        let user = Self::look_up_named(name)?;
        if own.is_some_and(|own| own.keeper.user == user.user) {
            return Err(one_user(BACKEND_USER, KEEPER_USER, user.user, A_HOLE));
        }
        Ok(user)
    }

    fn look_up_named(name: &str) -> Result<Self, Error> {
        // Its name and its home are needed even of one that is given by number.
        look_up_user(name, BACKEND_USER, Elsewhere::Asked)?
            .and_then(Self::of)
            .ok_or_else(|| unknown("user", name, BACKEND_USER))
    }

    /// Looks up the user whom a client's certificate names (`--backend-user-from-cert`).
    ///
    /// # Errors
    /// `Client` if there is no such user, or if it is root or in root's group, who read their mail otherwise, or one of ours.
    pub(crate) fn look_up_unprivileged(name: &str, own: Option<&OwnUsers>) -> Result<Self, Error> {
        const OPTION: &str = "--backend-user-from-cert";
        let refused = |why: &str| {
            Error::Client(format!(
                "the client's certificate names '{name}', {why} ({OPTION})"
            ))
        };
        // By name only: a certificate for "0" or "1000" names nobody.
        let found = users::user_by_name(name).map_err(|why| {
            Error::system(format!("cannot look up user '{name}' ({OPTION})"), why)
        })?;
        let user = Self::of(found.ok_or_else(|| refused("who is no user here"))?)
            .ok_or_else(|| refused("whose entry cannot be used"))?;
        if user.user.is_root() || user.group.as_raw() == 0 {
            return Err(refused("who has uid 0 or gid 0"));
        }
        match own.and_then(|own| own.option(user.user)) {
            Some(option) => Err(refused(&format!("whose uid is that of {option}"))),
            None => Ok(user),
        }
    }

    fn of(user: User) -> Option<Self> {
        Some(Self {
            group: user.gid,
            home: CString::new(user.dir.into_os_string().into_encoded_bytes()).ok()?,
            name: CString::new(user.name).ok()?,
            shell: CString::new(user.shell.into_os_string().into_encoded_bytes()).ok()?,
            user: user.uid,
        })
    }

    /// Becomes this user for good, with its groups.
    ///
    /// # Errors
    /// `System` if the kernel refuses.
    pub(crate) fn assume(&self) -> Result<(), Error> {
        users::assume_groups(&self.name, self.group).map_err(|why| {
            Error::system("cannot become the backend's user (--backend-user)", why)
        })?;
        set_ids(Identity {
            group: self.group,
            user: self.user,
        })
    }
}

fn look_up_user(name: &str, option: &str, elsewhere: Elsewhere) -> Result<Option<User>, Error> {
    match name.parse() {
        Ok(number) => users::user_by_number(Uid::from_raw(number), elsewhere),
        Err(_) => users::user_by_name(name),
    }
    .map_err(|why| Error::system(format!("cannot look up user '{name}' ({option})"), why))
}

fn look_up_group(name: &str) -> Result<Gid, Error> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    users::group_by_name(name)
        .map_err(|why| Error::system(format!("cannot look up group '{name}' (--group)"), why))?
        .ok_or_else(|| unknown("group", name, "--group"))
}

fn unknown(what: &str, name: &str, option: &str) -> Error {
    Error::Setup(format!("unknown {what} '{name}' ({option})"))
}

/// Gives up the ids of this process for good, and proves it: the ids are read back, and regaining root is tried.
///
/// # Errors
/// `System` at the first step that fails; the process must not go on.
pub(crate) fn drop_ids_permanently(identity: Identity) -> Result<(), Error> {
    nix::unistd::setgroups(&[])
        .map_err(|error| Error::system("cannot give up supplementary groups", error.desc()))?;
    set_ids(identity)?;
    let groups = nix::unistd::getgroups()
        .map_err(|error| Error::system("cannot read groups back", error.desc()))?;
    if !groups.is_empty() {
        return Err(Error::System(
            "supplementary groups are still there after giving them up".to_owned(),
        ));
    }
    let root = (Gid::from_raw(0), Uid::from_raw(0));
    if nix::unistd::setegid(root.0).is_ok() || nix::unistd::seteuid(root.1).is_ok() {
        return Err(Error::System(
            "root could be regained after giving it up".to_owned(),
        ));
    }
    Ok(())
}

/// Groups first: without the uid of root they could not be changed any more. Real, effective and saved, then read back.
fn set_ids(Identity { group, user }: Identity) -> Result<(), Error> {
    nix::unistd::setresgid(group, group, group)
        .map_err(|error| Error::system(format!("cannot change to group {group}"), error.desc()))?;
    nix::unistd::setresuid(user, user, user)
        .map_err(|error| Error::system(format!("cannot change to user {user}"), error.desc()))?;
    let users = nix::unistd::getresuid()
        .map_err(|error| Error::system("cannot read user ids back", error.desc()))?;
    let groups = nix::unistd::getresgid()
        .map_err(|error| Error::system("cannot read group ids back", error.desc()))?;
    let is_dropped = [users.real, users.effective, users.saved] == [user; 3]
        && [groups.real, groups.effective, groups.saved] == [group; 3];
    if is_dropped {
        Ok(())
    } else {
        Err(Error::System(
            "the ids are not the ones that were set".to_owned(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(user: &str, group: Option<&str>) -> String {
        Identity::look_up(user, group, "--user")
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn root_is_refused_as_a_target() {
        for (user, group) in [
            ("root", None),
            ("0", None),
            ("61001", Some("0")),
            ("61001", Some("root")),
        ] {
            assert!(
                message(user, group).contains("(--user) has uid 0 or gid 0"),
                "{user} {group:?}"
            );
        }
    }

    #[test]
    fn unknown_names_say_which_option() {
        assert_eq!(
            message("no-such-user", None),
            "unknown user 'no-such-user' (--user)"
        );
        assert_eq!(
            message("61001", Some("no-such-group")),
            "unknown group 'no-such-group' (--group)"
        );
    }

    #[test]
    fn numbers_need_no_passwd_entry() {
        let identity = Identity::look_up("61001", Some("61002"), "--user").unwrap();
        assert_eq!(
            (identity.user.as_raw(), identity.group.as_raw()),
            (61001, 61002)
        );
        assert_eq!(
            Identity::look_up("61001", None, "--user")
                .unwrap()
                .group
                .as_raw(),
            61001
        );
    }
}

//! A system log of a test's own, and /dev/log in a mount namespace that leads there.

use super::{Test, eventually, make_dir, write_file};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Takes lines until it is dropped; its path stays.
pub struct SystemLog(UnixDatagram);

impl SystemLog {
    pub fn bind(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o666)).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    /// What has come since it was last read.
    pub fn read(&self) -> Vec<String> {
        let mut buffer = [0; 8192];
        let mut lines = Vec::new();
        while let Ok(length) = self.0.recv(&mut buffer) {
            lines.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        lines
    }

    /// The first line to come that has this in it.
    pub fn wait_for(&self, wanted: &str) -> String {
        eventually(&format!("the system log has {wanted:?}"), || {
            let lines = self.read();
            lines.into_iter().find(|line| line.contains(wanted))
        })
    }
}

/// For the calling thread and what it starts from now on, the socket at `path` is the system log. Nobody else sees it.
pub fn enter_namespace_with_system_log(path: &Path) {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).expect("unshare");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).expect("nothing is seen outside");
    let devices = path.with_extension("dev");
    make_dir(&devices, 0o755);
    mount(none, &devices, Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
    for name in ["null", "zero", "full", "random", "urandom"] {
        let (from, to) = (Path::new("/dev").join(name), devices.join(name));
        write_file(&to, "", 0o644);
        mount(Some(&from), &to, none, MsFlags::MS_BIND, none).expect("a device");
    }
    symlink(path, devices.join("log")).expect("a link");
    let whole = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(&devices), "/dev", none, whole, none).expect("/dev");
}

/// For [`Server::start_in`]: a script that makes the socket at `path` the system log.
pub fn with_system_log(test: &Test, path: &Path) -> String {
    let devices = test.path("dev");
    make_dir(&devices, 0o755);
    // Where it leads is as it was: what is there may be another socket later.
    format!(
        "mount -t tmpfs none {dev}; \
         for device in null zero full random urandom; do cp -a /dev/$device {dev}/; done; \
         ln -s {path} {dev}/log; mount --rbind {dev} /dev",
        dev = devices.display(),
        path = path.display()
    )
}

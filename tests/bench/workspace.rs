//! The temporary directory, the certificate, the C programs and the control group; and that none of it stays behind.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{SigSet, Signal};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

use crate::contestant::Contestant;
use crate::server::{Accounting, kill_descendants, reap};
use crate::{Key, Result};

/// What all contestants share.
#[derive(Debug)]
pub(crate) struct Workspace {
    directory: PathBuf,
    pub(crate) accounting: Accounting,
    /// What the client trusts (PEM).
    pub(crate) authority: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// Key and certificate in one file, as some want it.
    pub(crate) key_and_certificate: PathBuf,
    /// Where imap-tls makes its ticket keys.
    pub(crate) ticket_keys: PathBuf,
    /// An empty directory of root's to be confined in.
    pub(crate) empty: PathBuf,
    pub(crate) imapd: PathBuf,
    /// Where the keeper service listens.
    pub(crate) keeper: PathBuf,
    /// Compiled as anybody would: linked dynamically.
    pub(crate) makesock: PathBuf,
    pub(crate) makesock_static: PathBuf,
    pub(crate) confined: PathBuf,
    /// The C compiler for those that are linked statically.
    pub(crate) static_compiler: &'static str,
}

impl Workspace {
    /// Makes everything. The result lives to the end of the program, whichever end that is.
    pub(crate) fn create(key: Key) -> Result<&'static Self> {
        let directory = std::env::temp_dir().join(format!("imap-tls-bench.{}", std::process::id()));
        fs::DirBuilder::new().mode(0o755).create(&directory)?;
        let path = |name: &str| directory.join(name);
        let workspace = Box::leak(Box::new(Self {
            accounting: Accounting::choose(),
            authority: path("ca.pem"),
            certificate: path("cert.pem"),
            key: path("key.pem"),
            key_and_certificate: path("both.pem"),
            ticket_keys: path("ticket-keys"),
            empty: path("empty"),
            imapd: path("imapd"),
            keeper: path("keeper"),
            makesock: path("makesock"),
            makesock_static: path("makesock-static"),
            confined: path("confined"),
            // musl's start-up costs next to nothing; glibc's, with its dozens of CPUID, would be noise in all figures.
            static_compiler: compiler(&["musl-gcc", "cc", "gcc"])?,
            directory,
        }));
        workspace.clean_up_on_signals()?;
        let made = workspace.fill(key);
        if made.is_err() {
            workspace.remove();
        }
        made.map(|()| &*workspace)
    }

    fn fill(&self, key: Key) -> Result<()> {
        fs::DirBuilder::new().mode(0o755).create(&self.empty)?;
        self.make_certificate(key)?;
        let compiler = compiler(&["cc", "gcc", "musl-gcc"])?;
        for (source, compiler, linking, program) in [
            ("imapd.c", self.static_compiler, "-static", &self.imapd),
            (
                "makesock.c",
                self.static_compiler,
                "-static",
                &self.makesock_static,
            ),
            ("makesock.c", compiler, "-pie", &self.makesock),
            (
                "confined.c",
                self.static_compiler,
                "-static",
                &self.confined,
            ),
        ] {
            let source = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/bench")
                .join(source);
            let linked = program.with_extension("linked");
            let status = Command::new(compiler)
                .args(["-O2", linking, "-o"])
                .arg(&linked)
                .arg(&source)
                .status()?;
            if !status.success() {
                return Err(format!("cannot compile {}", source.display()).into());
            }
            fs::copy(&linked, program)?;
            fs::remove_file(&linked)?;
        }
        nix::sys::prctl::set_child_subreaper(true)?;
        Ok(())
    }

    fn make_certificate(&self, key: Key) -> Result<()> {
        let authority_key = KeyPair::generate()?;
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let authority = authority.self_signed(&authority_key)?;
        let key = match key {
            Key::P256 => KeyPair::generate()?,
            Key::Rsa2048 => rsa_key()?,
        };
        let certificate = CertificateParams::new(["localhost".to_owned()])?
            .signed_by(&key, &authority, &authority_key)?
            .pem();
        let key = key.serialize_pem();
        fs::write(&self.authority, authority.pem())?;
        fs::write(&self.certificate, &certificate)?;
        for (path, text) in [
            (&self.key, &key),
            (&self.key_and_certificate, &(key.clone() + &certificate)),
        ] {
            fs::File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)?
                .write_all(text.as_bytes())?;
        }
        Ok(())
    }

    /// Copies a program, as an installation does. What a linker has written lies in the page cache page by page, and what was copied
    /// or read from a disk in larger pieces, which are cheaper to map: by a tenth of a connection, for a program of 3 MiB.
    pub(crate) fn install(&self, program: &Path, name: &str) -> Result<PathBuf> {
        let copy = self.directory.join(name);
        fs::copy(program, &copy)?;
        Ok(copy)
    }

    /// Writes a configuration file for a contestant.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Where a contestant's standard error goes.
    pub(crate) fn log(&self, contestant: &Contestant) -> PathBuf {
        let name = contestant.name.replace(|c: char| !c.is_alphanumeric(), "-");
        self.directory.join(format!("{name}.log"))
    }

    /// Prints the end of a contestant's log, after a failure.
    pub(crate) fn show_log(&self, contestant: &Contestant) {
        let text = fs::read_to_string(self.log(contestant)).unwrap_or_default();
        for line in text.lines().rev().take(3) {
            eprintln!("    {line}");
        }
    }

    /// Leaves nothing behind.
    pub(crate) fn remove(&self) {
        kill_descendants();
        let _ = reap();
        self.accounting.remove();
        let _ = fs::remove_dir_all(&self.directory);
    }

    fn clean_up_on_signals(&'static self) -> Result<()> {
        let signals = ending_signals();
        signals.thread_block()?;
        std::thread::spawn(move || {
            let _ = signals.wait();
            self.remove();
            std::process::exit(130);
        });
        Ok(())
    }
}

/// What a thread of ours waits for; blocked in all others.
pub(crate) fn ending_signals() -> SigSet {
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM]
        .into_iter()
        .collect()
}

/// The first of these that works.
fn compiler(names: &[&'static str]) -> Result<&'static str> {
    names
        .iter()
        .copied()
        .find(|name| {
            let probe = Command::new(name).arg("--version").output();
            probe.is_ok_and(|output| output.status.success())
        })
        .ok_or_else(|| "a C compiler is needed (gcc, and better musl-tools too)".into())
}

/// ring, which makes the other keys, does not make RSA keys.
fn rsa_key() -> Result<KeyPair> {
    let output = Command::new("openssl")
        .args(["genpkey", "-algorithm", "RSA"])
        .args(["-pkeyopt", "rsa_keygen_bits:2048"])
        .output()?;
    let pem = String::from_utf8(output.stdout)?;
    Ok(KeyPair::from_pkcs8_pem_and_sign_algo(
        &pem,
        &rcgen::PKCS_RSA_SHA256,
    )?)
}

//! Finds the `imap-tls` program beside this one, after having cargo bring it up to date.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use crate::Result;

/// `cargo run --example` builds no programs but the example, so this does it, with the same profile into the same place.
pub(crate) fn build() -> Result<PathBuf> {
    let demo = env::current_exe()?;
    // target/release/examples/demo, or target/TRIPLE/release/examples/demo
    let profile_directory = demo
        .ancestors()
        .nth(2)
        .ok_or("this program is not in cargo's target directory")?;
    let program = profile_directory.join("imap-tls");
    let Some(cargo) = env::var_os("CARGO") else {
        // Not started by cargo: what is there must do.
        return if program.exists() {
            Ok(program)
        } else {
            Err(format!(
                "there is no {}; start the demonstration with cargo run --release --example demo",
                program.display()
            )
            .into())
        };
    };
    let profile = match profile_directory.file_name() {
        Some(name) if name == "debug" => "dev".into(),
        Some(name) => name.to_os_string(),
        None => return Err("this program is not in cargo's target directory".into()),
    };
    let mut build = Command::new(cargo);
    build.args([
        "build",
        "--bin",
        "imap-tls",
        "--manifest-path",
        concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
    ]);
    build.arg("--profile").arg(profile);
    let above = profile_directory
        .parent()
        .ok_or("this program is not in cargo's target directory")?;
    match (
        above.join("CACHEDIR.TAG").exists(),
        above.parent(),
        above.file_name(),
    ) {
        (false, Some(target_directory), Some(triple)) => {
            build
                .arg("--target-dir")
                .arg(target_directory)
                .arg("--target")
                .arg(triple);
        }
        _ => {
            build.arg("--target-dir").arg(above);
        }
    }
    if !build.status()?.success() {
        return Err("imap-tls could not be built".into());
    }
    Ok(program)
}

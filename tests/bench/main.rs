//! What a connection costs, beside the floors and the programs that do the same: `cargo bench --bench connections`.
//!
//! tcpserver starts each contestant on loopback, one process or more per connection, with one certificate and one tiny IMAP
//! server behind all; a TLS client of our own drives them in rounds that take turns. The result is a Markdown table, printed and
//! written to `target/bench/connections.md`. Needs root, ucspi-tcp and a C compiler; compares with those of stunnel4, tlswrapper
//! and couriertls that are installed. What each figure means stands in the table's own notes.
#![allow(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, computes with rounded numbers, and may fail loudly"
)]

mod client;
mod contestant;
mod floor;
mod growth;
mod memory;
mod report;
mod scenario;
mod server;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use client::Client;
use contestant::Contestant;
use report::{Figures, Report};
use scenario::Scenario;
use workspace::Workspace;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Compares the cost of a connection with the floors and with other programs.
#[derive(Debug, Parser)]
#[command(name = "connections")]
struct Options {
    /// How often everything is measured [default: 5, with --quick 2]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Connections per round and concurrency [default: 40, with --quick 16]
    #[arg(long, value_name = "N")]
    connections: Option<usize>,
    /// MiB each way in the bulk scenarios [default: 256, with --quick 32]
    #[arg(long, value_name = "MIB")]
    bulk: Option<u64>,
    /// Idle connections at a time [default: 20, with --quick 4]
    #[arg(long, value_name = "N")]
    idle: Option<usize>,
    /// Connections that are open at once when growth is measured [default: 4000, with --quick 100]
    #[arg(long, value_name = "N")]
    growth: Option<usize>,
    /// Small numbers, to see whether it works
    #[arg(long)]
    quick: bool,
    /// Measure this imap-tls instead of building one; can be given several times
    #[arg(long = "program", value_name = "[NAME=]PATH")]
    programs: Vec<String>,
    /// The server's key
    #[arg(long, value_enum, default_value_t = Key::P256)]
    key: Key,
    /// The one cipher that the client offers, so that all do the same work
    #[arg(long, value_enum, default_value_t = Cipher::Aes256)]
    cipher: Cipher,
    /// Only scenarios whose name starts so: set-up, resumed, down, up, idle, growth; can be given several times
    #[arg(long = "scenario", value_name = "NAME")]
    scenarios: Vec<String>,
    /// Only contestants whose name contains this (the copy floor is always one); can be given several times
    #[arg(long = "only", value_name = "TEXT")]
    only: Vec<String>,
    /// Cargo says so when it is `cargo bench` that runs this.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Kinds of server key.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Key {
    P256,
    Rsa2048,
}

/// What the client offers.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Cipher {
    Aes128,
    Aes256,
    Any,
    Chacha20,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !options.bench {
        println!("a benchmark: run it with `cargo bench --bench connections`");
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("connections: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err("root is needed: the contestants are to give up privileges".into());
    }
    let programs = contestant::programs(&options.programs)?;
    let workspace = Workspace::create(options.key)?;
    let result =
        install(programs, workspace).and_then(|programs| compare(options, &programs, workspace));
    workspace.remove();
    result
}

/// Each program as one has it that was installed, and not as the linker left it.
fn install(
    programs: Vec<(String, PathBuf)>,
    workspace: &Workspace,
) -> Result<Vec<(String, PathBuf)>> {
    let installed = programs.into_iter().map(|(name, path)| {
        let copy = workspace.install(&path, &format!("program-{name}"))?;
        Ok((name, copy))
    });
    let installed = installed.collect();
    // Pages of a file that was just written would count as every process's own.
    nix::unistd::sync();
    installed
}

fn compare(
    options: &Options,
    programs: &[(String, PathBuf)],
    workspace: &'static Workspace,
) -> Result<()> {
    let contestants: Vec<_> = contestant::all(programs, workspace)?
        .into_iter()
        .filter(|contestant| is_chosen(contestant, &options.only))
        .collect();
    let client = Client::new(&workspace.authority, options.cipher)?;
    let scenarios: Vec<_> = Scenario::all(
        options
            .connections
            .unwrap_or(if options.quick { 16 } else { 40 }),
        options.bulk.unwrap_or(if options.quick { 32 } else { 256 }),
        options.idle.unwrap_or(if options.quick { 4 } else { 20 }),
        options
            .growth
            .unwrap_or(if options.quick { 100 } else { 4000 }),
    )
    .into_iter()
    .filter(|scenario| {
        let wanted = &options.scenarios;
        let name = scenario.name();
        wanted.is_empty() || wanted.iter().any(|wanted| name.starts_with(wanted))
    })
    .collect();
    let rounds = options.rounds.unwrap_or(if options.quick { 2 } else { 5 });

    let mut report = Report::begin(options, workspace, programs);
    let mut figures: Vec<_> = contestants.iter().map(|_| Figures::default()).collect();
    for round in 0..rounds {
        report.floors.measure(workspace, options.cipher)?;
        for scenario in &scenarios {
            eprintln!("round {} of {rounds}: {}", round + 1, scenario.name());
            // Who comes first changes, so that nobody always has the caches of the same neighbour.
            for turn in 0..contestants.len() {
                let index = (turn + round) % contestants.len();
                let contestant = &contestants[index];
                if !scenario.concerns(contestant, round) {
                    continue;
                }
                if let Err(error) =
                    scenario.run(contestant, workspace, &client, &mut figures[index])
                {
                    eprintln!("  {}: {error}", contestant.name);
                    workspace.show_log(contestant);
                    figures[index].failures += 1;
                }
            }
        }
    }
    let text = report.finish(&contestants, &figures);
    println!("{text}");
    let directory = contestant::target_directory()?.join("bench");
    std::fs::create_dir_all(&directory)?;
    let path = directory.join("connections.md");
    std::fs::write(&path, text)?;
    eprintln!("written to {}", path.display());
    Ok(())
}

fn is_chosen(contestant: &Contestant, only: &[String]) -> bool {
    contestant.entry == client::Entry::Plain
        || only.is_empty()
        || only.iter().any(|text| contestant.name.contains(text))
}

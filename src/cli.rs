//! The command line: parse, dispatch, exit code. One file a command.

mod check;
mod node;
mod probe;
mod status;
mod worker;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Mounts secrets so that only the application container can read them: a CSI node driver.
#[derive(Debug, Parser)]
#[command(name = "sealmount", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the kubelet on this node (started by the DaemonSet, as root)
    Node(node::Flags),
    /// Show what stands on this node and how fresh it is
    Status(status::Flags),
    /// Say by the exit code whether the driver works: the probes of its pod
    Probe(probe::Flags),
    /// Judge pods before they run: who can read what, and what the driver would refuse
    Check(Box<check::Flags>),
    /// The unprivileged half; started by `node` alone
    #[command(hide = true)]
    Worker(worker::Flags),
}

/// Runs what the arguments say. Exit codes: 0 done, 1 failed, 2 wrong usage (clap's), and the worker's own.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match Cli::try_parse_from(args) {
        Ok(cli) => match cli.command {
            Command::Node(flags) => node::run(&flags),
            Command::Status(flags) => status::run(&flags),
            Command::Probe(flags) => probe::run(&flags),
            Command::Check(flags) => check::run(&flags),
            Command::Worker(flags) => worker::run(&flags),
        },
        Err(error) => {
            // A broken pipe while help is printed is nobody's fault.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
    }
}

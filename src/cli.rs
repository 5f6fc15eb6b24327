//! The command line: parse, dispatch, exit code. One file a command.

mod check;
mod node;
mod probe;
mod status;
mod worker;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

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
    /// Print the completions of a shell, for its startup file
    Completions {
        /// Which
        shell: clap_complete::Shell,
    },
    /// Print the manual page of `sealmount check`, for man(1)
    Man,
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
            Command::Completions { shell } => completions(shell),
            Command::Man => manual(),
            Command::Worker(flags) => worker::run(&flags),
        },
        Err(error) => {
            // A broken pipe while help is printed is nobody's fault.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
    }
}

fn completions(shell: clap_complete::Shell) -> ExitCode {
    clap_complete::generate(shell, &mut Cli::command(), "sealmount", &mut Quiet(std::io::stdout()));
    ExitCode::SUCCESS
}

fn manual() -> ExitCode {
    let check = Cli::command().find_subcommand("check").cloned().unwrap_or_default();
    let page = clap_mangen::Man::new(check.name("sealmount-check").version(env!("CARGO_PKG_VERSION")));
    // A reader that went away is nobody's fault.
    let _ = page.render(&mut Quiet(std::io::stdout()));
    ExitCode::SUCCESS
}

/// An output whose reader may go away: `clap_complete` panics on an error.
struct Quiet<W>(W);

impl<W: Write> Write for Quiet<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}

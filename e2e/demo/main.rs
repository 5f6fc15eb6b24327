//! Shows on a fresh machine what the driver promises: real secrets out of a real OpenBao, mounted for one UID, and a
//! real Envoy that tries to read them. Ends with 0 only if every promise held.
// A lab may stop at the first thing that is wrong; the driver may not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)]
#![allow(clippy::string_slice, clippy::disallowed_methods)]

#[path = "../lab/mod.rs"]
mod lab;

mod attacks;
mod stage;
mod story;
mod table;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    // Fetched before sudo, so that the cache stays the caller's.
    for name in ["bao", "envoy"] {
        lab::program(name);
    }
    if !lab::node::binary().exists() {
        eprintln!("{} is missing: cargo build --release --bin sealmount", lab::node::binary().display());
        return ExitCode::FAILURE;
    }
    if !rustix::process::geteuid().is_root() {
        return with_sudo();
    }
    // Everything below one directory, which goes away even if this process is killed.
    let scratch = lab::scratch::Scratch::new();
    tempfile::env::override_temp_dir(scratch.path()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut screen = table::Screen::new();
        let mut interrupt = signal(SignalKind::interrupt()).unwrap();
        let mut terminate = signal(SignalKind::terminate()).unwrap();
        let mut hangup = signal(SignalKind::hangup()).unwrap();
        // The story that loses is dropped, and with it every process, mount and file it made.
        let code = tokio::select! {
            () = story::run(&mut screen) => None,
            _ = interrupt.recv() => Some(130),
            _ = terminate.recv() => Some(143),
            _ = hangup.recv() => Some(129),
        };
        match code {
            Some(code) => {
                eprintln!("\ninterrupted; everything was taken away again");
                ExitCode::from(code)
            }
            None if screen.end() => ExitCode::SUCCESS,
            None => ExitCode::FAILURE,
        }
    })
}

/// Runs the demo again as root; comes back only if there is no sudo.
fn with_sudo() -> ExitCode {
    eprintln!("The demo mounts file systems and starts programs as other users; it needs root. Asking sudo:");
    let mut sudo = Command::new("sudo");
    sudo.arg("env");
    for name in ["HOME", "XDG_CACHE_HOME", "NO_COLOR", "SEALMOUNT_BIN", "TMPDIR"] {
        if let Some(value) = std::env::var_os(name) {
            let mut pair = std::ffi::OsString::from(format!("{name}="));
            pair.push(value);
            sudo.arg(pair);
        }
    }
    let error = sudo.arg(std::env::current_exe().unwrap()).exec();
    eprintln!("sudo: {error}; run the demo as root, or: apt-get install sudo");
    ExitCode::FAILURE
}

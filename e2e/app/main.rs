//! What runs in the pods of `make e2e`: one static program for their every part.
//!
//!     app pause               the sandbox of a pod: waits, and takes in orphans
//!     app hold FILE...        opens the files, keeps them open, and says on its output when `..data` beside one moves
//!     app own NAME FILE...    keeps the files open and in memory, and listens on the abstract socket NAME
//!     app agent NAME PORT FILE   the same, and gives the file to who asks on 127.0.0.1:PORT, as agents do
//!     app trap PORT FILE      takes down what others send to the port
//!     app names ADDRESS       answers every question for a name with this address, on UDP port 53
//!     app read|list|...       an attack; prints what it gained, or the errno
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // ends its own container only
#![allow(clippy::disallowed_methods)]

mod attack;
mod hold;
mod serve;

use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{WaitOptions, wait};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        Some(("pause", _)) => pause(),
        Some(("hold", files)) => hold::run(files),
        Some(("own", args)) => serve::own(args),
        Some(("agent", args)) => serve::agent(args),
        Some(("trap", args)) => serve::trap(args),
        Some(("names", args)) => serve::names(args),
        other => other.and_then(|(name, args)| attack::run(name, args)).unwrap_or_else(|| {
            eprintln!("app pause | hold FILE... | own NAME FILE... | agent NAME PORT FILE | trap PORT FILE");
            eprintln!("  | names ADDRESS | ATTACK");
            ExitCode::FAILURE
        }),
    }
}

/// Ends with the default action of SIGTERM only as another process than 1; so the signal is taken here.
fn end_at_sigterm() {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            signal(SignalKind::terminate()).unwrap().recv().await;
            std::process::exit(0);
        })
    });
}

fn pause() -> ! {
    end_at_sigterm();
    loop {
        if !matches!(wait(WaitOptions::empty()), Ok(Some(_))) {
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

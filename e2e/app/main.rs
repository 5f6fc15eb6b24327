//! What runs in the pods of `make e2e`: one static program for their every part.
//!
//!     app pause               the sandbox of a pod: waits, and takes in orphans
//!     app hold FILE...        opens the files, keeps them open, and says on its output when `..data` beside one moves
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // ends its own container only
#![allow(clippy::disallowed_methods)]

mod hold;

use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{WaitOptions, wait};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        Some(("pause", _)) => pause(),
        Some(("hold", files)) => hold::run(files),
        _ => {
            eprintln!("app pause | hold FILE...");
            ExitCode::FAILURE
        }
    }
}

/// Ends with the default action of SIGTERM only as another process than 1; so the signal is taken here.
fn pause() -> ! {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            signal(SignalKind::terminate()).unwrap().recv().await;
            std::process::exit(0);
        })
    });
    loop {
        if !matches!(wait(WaitOptions::empty()), Ok(Some(_))) {
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

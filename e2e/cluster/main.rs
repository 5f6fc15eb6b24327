//! `make e2e`: the driver where it is used. A real API server, kubelet, containerd and runc, the chart installed as a
//! platform team installs it, a real OpenBao, and a real Envoy that tries to get at the secret.
//!
//!     e2e programs           builds what the cluster runs, as far as the cache does not hold it
//!     e2e [NAME...]          starts a cluster, runs the checks whose group or name contains one of NAME, ends it
//!     e2e readme             puts the table of attacks that a run wrote into the README
//!     e2e down               ends a cluster that KEEP=1 left
//!
//! `K8S=1.34.4` takes another version, `KEEP=1` leaves the cluster up, `LONG=1` lets outages last as long as the
//! defaults do, `E2E_DIR` is where all of it lives.
//!
//! Everything runs in network, mount and process namespaces of its own, below one directory: what ends the first
//! process of the namespace ends every process and mount.
// A lab may stop at the first thing that is wrong; the driver may not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)]
#![allow(clippy::string_slice, clippy::disallowed_methods)]

#[path = "../lab/mod.rs"]
mod lab;
#[path = "../sanity/mod.rs"]
mod sanity;

mod admission;
mod attacks;
mod chart;
mod cluster;
mod gvisor;
mod images;
mod install;
mod kube;
mod life;
mod machine;
mod pods;
mod programs;
mod readme;
mod runner;
mod suite;

use std::process::ExitCode;

/// The newest Kubernetes supported: the default, and what the README's table is of.
const NEWEST: &str = "1.37.2";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let version = std::env::var("K8S").ok().filter(|version| !version.is_empty());
    let version = version.unwrap_or_else(|| NEWEST.to_owned());
    let programs = || programs::Programs::get(&version);
    let result = match args.first().map(String::as_str) {
        Some("programs") => programs().map(|_| {
            // Fetched before sudo, so that the cache stays the caller's.
            for name in ["bao", "envoy"] {
                lab::program(name);
            }
            0
        }),
        Some("readme") => attacks::into_readme(std::path::Path::new(env!("CARGO_MANIFEST_DIR"))).map(|()| 0),
        Some("down") => machine::down().map(|()| 0),
        // The first process inside, and the one that does the work.
        Some("init") => Ok(machine::init(&args[1..])),
        Some("inside") => programs().map(|programs| u8::from(!runner::run(&version, programs, &args[1..]))),
        _ => programs().and_then(|_| machine::up(&args)),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("e2e: {error}");
            ExitCode::FAILURE
        }
    }
}

//! `sealmount node`.

use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use crate::broker::serve::{self, Settings};
use crate::config;
use crate::log;

/// Where the kubelet expects a driver's CSI socket.
pub(super) const CSI_SOCKET: &str = "/var/lib/kubelet/plugins/csi.sealmount.io/csi.sock";

/// The flags of `sealmount node` (docs/configuration.md).
#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    /// The platform team's file; without it only Kubernetes Secrets are served
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the platform file, print all its faults and exit
    #[arg(long, requires = "config")]
    check_config: bool,
    /// The kubelet's root directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// The socket to serve CSI on, as the host names it
    #[arg(long, value_name = "PATH", default_value = CSI_SOCKET)]
    csi_socket: PathBuf,
    /// The kubelet's plugin registration directory
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet/plugins_registry")]
    registration_dir: PathBuf,
    /// This node's name in the API server
    #[arg(long, value_name = "NAME", required_unless_present = "check_config")]
    node_name: Option<String>,
    /// How to reach the API server, instead of the pod's own ServiceAccount
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Where facts about pods come from: auto, kubelet, api or manifest:DIR
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pods_from: String,
    /// Where /metrics is served
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9810")]
    listen: SocketAddr,
    /// The most memory all volumes of the node may take, at their worst
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = Size::from_str)]
    max_node_bytes: Size,
    /// The size of the worker's own tmpfs, which content passes through
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = Size::from_str)]
    work_bytes: Size,
    /// Serve although the kernel cannot keep a tmpfs out of swap (before Linux 6.4)
    #[arg(long)]
    allow_swap: bool,
    /// Not available in this version
    #[arg(long, value_name = "MODE", hide = true, value_parser = later)]
    gate: Option<Later>,
    /// Not available in this version
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", value_parser = later)]
    require_gate: Option<Later>,
}

/// The value of a flag whose work comes with a later version: there is none, so that nobody relies on it.
#[derive(Debug, Clone, Copy)]
enum Later {}

fn later(_: &str) -> Result<Later, &'static str> {
    Err("not available in this version")
}

/// A size on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size(u64);

impl FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        config::bytes(text).map(Self).ok_or_else(|| "write a size such as 64MiB or 1GiB".to_owned())
    }
}

pub(super) fn run(flags: &Flags) -> ExitCode {
    log::init(tracing::Level::INFO);
    if flags.check_config {
        return check(flags);
    }
    let settings = Settings {
        kubelet_dir: flags.kubelet_dir.clone(),
        csi_socket: flags.csi_socket.clone(),
        registration_dir: flags.registration_dir.clone(),
        max_node_bytes: flags.max_node_bytes.0,
        work_bytes: flags.work_bytes.0,
        allow_swap: flags.allow_swap,
        worker: PathBuf::from("/proc/self/exe"),
        worker_args: worker_args(flags),
        worker_env: worker_env(),
    };
    if let Err(error) = make_directory(&flags.csi_socket) {
        tracing::error!("make the directory of {}: {error}", flags.csi_socket.display());
        return ExitCode::FAILURE;
    }
    match serve::run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The kubelet makes the directory of all plugins; each driver makes its own in it, for root alone.
fn make_directory(socket: &Path) -> io::Result<()> {
    let Some(directory) = socket.parent() else { return Ok(()) };
    match DirBuilder::new().mode(0o750).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn check(flags: &Flags) -> ExitCode {
    let Some(path) = &flags.config else { return ExitCode::FAILURE };
    let mut out = io::stdout();
    match config::load(path) {
        Ok(config) => {
            let _ = writeln!(out, "{}: valid, {} connections", path.display(), config.connections.len());
            ExitCode::SUCCESS
        }
        Err(faults) => {
            for fault in &faults {
                let _ = writeln!(out, "{}: {fault}", path.display());
            }
            ExitCode::FAILURE
        }
    }
}

/// The worker's own flags: what it needs, and no more.
fn worker_args(flags: &Flags) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["worker".into()];
    let mut push = |flag: &str, value: OsString| args.extend([OsString::from(flag), value]);
    if let Some(config) = &flags.config {
        push("--config", config.into());
    }
    if let Some(kubeconfig) = &flags.kubeconfig {
        push("--kubeconfig", kubeconfig.into());
    }
    push("--kubelet-dir", flags.kubelet_dir.clone().into());
    push("--csi-socket", flags.csi_socket.clone().into());
    push("--node-name", flags.node_name.clone().unwrap_or_default().into());
    push("--pods-from", flags.pods_from.clone().into());
    push("--listen", flags.listen.to_string().into());
    args
}

/// The worker's whole environment: how a pod finds the API server. Nothing else there changes what it does: no proxy,
/// no address or token of Vault's.
#[allow(clippy::disallowed_methods)] // the only two it takes
fn worker_env() -> Vec<(OsString, OsString)> {
    ["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"]
        .into_iter()
        .filter_map(|name| Some((name.into(), std::env::var_os(name)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::*;

    #[test]
    fn the_table_of_flags_is_that_of_the_code() {
        let command = Flags::augment_args(Command::new("node"));
        let mut flags: Vec<String> =
            command.get_arguments().filter_map(|arg| Some(format!("--{}", arg.get_long()?))).collect();
        flags.sort();
        let page = include_str!("../../docs/configuration.md");
        let lines = page.lines().filter(|line| line.starts_with("| `--"));
        let first = lines.filter_map(|line| line.split('|').nth(1));
        let mut written: Vec<String> =
            first.flat_map(|cell| cell.split(',').map(|flag| flag.trim().trim_matches('`').to_owned())).collect();
        written.sort();
        assert_eq!(written, flags);
    }

    #[test]
    fn what_comes_later_is_refused_and_says_so() {
        for flag in ["--gate=enforce", "--require-gate"] {
            let command = Flags::augment_args(Command::new("node"));
            let error = command.try_get_matches_from(["node", "--node-name", "a", flag]).unwrap_err();
            assert!(error.to_string().contains("not available in this version"), "{error}");
        }
    }
}

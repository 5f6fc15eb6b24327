//! `sealmount status`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::admin::{self, AdminError, proto::StatusResponse};

/// The flags of `sealmount status`.
#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    /// The driver's CSI socket
    #[arg(long, value_name = "PATH", default_value = super::node::CSI_SOCKET)]
    csi_socket: PathBuf,
}

pub(super) fn run(flags: &Flags) -> ExitCode {
    match ask(&flags.csi_socket) {
        Ok(status) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            // A reader that went away is nobody's fault.
            let _ = std::io::stdout().write_all(show(&status, now).as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "sealmount status: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Asks the driver; it ends in any case, also where the worker hangs.
pub(super) fn ask(socket: &Path) -> Result<StatusResponse, AdminError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| AdminError::Answer(error.to_string()))?;
    runtime.block_on(admin::status(socket, admin::ANSWER_TIME))
}

/// One line for the driver, one a volume, and one more below for each thing that is not as it should be.
fn show(status: &StatusResponse, now: u64) -> String {
    let mut out = String::new();
    let registered = if status.registered { "registered" } else { "not registered with the kubelet" };
    let restarts = status.worker_restarts;
    let _ = writeln!(out, "sealmount {} on {}: {registered}, worker restarts {restarts}", status.version, status.node);
    if !status.config.is_empty() {
        let _ = writeln!(out, "  the newest platform file was not taken: {}", status.config);
    }
    if !status.broker.is_empty() {
        let _ = writeln!(out, "  the half that mounts does not answer: {}", status.broker);
    }
    if status.volumes.is_empty() {
        let _ = writeln!(out, "no volume stands on this node");
        return out;
    }
    let pods = status.volumes.iter().map(|volume| volume.namespace.len() + 1 + volume.pod.len());
    let wide = pods.max().unwrap_or_default().max(3);
    let names = status.volumes.iter().map(|volume| volume.volume.len()).max().unwrap_or_default().max(6);
    let _ = writeln!(
        out,
        "{:wide$}  {:names$}  {:>10}  {:>8}  {:>9}  SOURCE",
        "POD", "VOLUME", "UID", "BYTES", "CONFIRMED"
    );
    for volume in &status.volumes {
        let pod = format!("{}/{}", volume.namespace, volume.pod);
        let source = if volume.connection.is_empty() { "Secret" } else { &volume.connection };
        let age = ago(now, volume.confirmed);
        let _ = writeln!(
            out,
            "{pod:wide$}  {:names$}  {:>10}  {:>8}  {age:>9}  {source}{}",
            volume.volume,
            volume.owner,
            volume.bytes,
            if volume.stale { "  STALE" } else { "" },
        );
        if volume.failing_since > 0 {
            let _ = writeln!(out, "  failing since {}: {}", ago(now, volume.failing_since), volume.failing);
        }
        if !volume.refused.is_empty() {
            let _ = writeln!(out, "  would be refused now: {}", volume.refused);
        }
    }
    out
}

fn ago(now: u64, then: u64) -> String {
    let age = now.saturating_sub(then);
    match age {
        0..=119 => format!("{age}s ago"),
        120..=7199 => format!("{}m ago", age / 60),
        _ => format!("{}h ago", age / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::proto::Volume;

    #[test]
    fn what_is_wrong_stands_below_its_volume() {
        let volume = Volume {
            namespace: "shop".into(),
            pod: "pay-0".into(),
            volume: "db".into(),
            owner: 1000,
            connection: "prod".into(),
            confirmed: 100,
            failing_since: 130,
            failing: "SM310 the server is away".into(),
            stale: true,
            bytes: 12,
            ..Volume::default()
        };
        let status = StatusResponse {
            version: "1".into(),
            node: "n".into(),
            registered: true,
            volumes: vec![volume],
            ..Default::default()
        };
        let lines: Vec<_> = show(&status, 160).lines().map(str::to_owned).collect();
        assert_eq!(lines[0], "sealmount 1 on n: registered, worker restarts 0");
        assert!(lines[2].contains("shop/pay-0") && lines[2].ends_with("60s ago  prod  STALE"), "{}", lines[2]);
        assert_eq!(lines[3], "  failing since 30s ago: SM310 the server is away");
        assert_eq!(lines.len(), 4);
    }
}

//! `sealmount probe`: the exec probes of the driver's pod. The kubelet could not ask the pod's loopback address.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::admin::proto::StatusResponse;

/// The flags of `sealmount probe`.
#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    /// What to ask
    what: What,
    /// The driver's CSI socket
    #[arg(long, value_name = "PATH", default_value = super::node::CSI_SOCKET)]
    csi_socket: PathBuf,
}

/// The questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Do both processes answer? If not, a restart helps
    Live,
    /// Did the kubelet register the driver?
    Ready,
}

/// Exit code 0 for yes; otherwise 1 and a line on stderr, which the kubelet puts into an event.
///
/// The caller bounds the time: a worker that hangs gives no answer, and the kubelet ends the probe.
pub(super) fn run(flags: &Flags) -> ExitCode {
    let fault = match super::status::ask(&flags.csi_socket) {
        Ok(status) => fault(flags.what, &status),
        Err(error) => Some(error.to_string()),
    };
    let Some(fault) = fault else { return ExitCode::SUCCESS };
    let _ = writeln!(std::io::stderr(), "sealmount probe: {fault}");
    ExitCode::FAILURE
}

fn fault(what: What, status: &StatusResponse) -> Option<String> {
    match what {
        What::Live if !status.broker.is_empty() => Some(format!("the half that mounts: {}", status.broker)),
        What::Ready if !status.registered => Some("the kubelet has not registered the driver".to_owned()),
        What::Live | What::Ready => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_has_its_own_answer() {
        let status = |broker: &str, registered| StatusResponse {
            broker: broker.to_owned(),
            registered,
            ..StatusResponse::default()
        };
        for (broker, registered, live, ready) in
            [("", true, true, true), ("", false, true, false), ("gone", true, false, true)]
        {
            let status = status(broker, registered);
            assert_eq!(fault(What::Live, &status).is_none(), live);
            assert_eq!(fault(What::Ready, &status).is_none(), ready);
        }
    }
}

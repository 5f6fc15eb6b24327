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
    /// Do both processes answer?
    Live,
    /// Did the kubelet register the driver, and is a platform file in force?
    Ready,
}

/// Exit code 0 for yes; otherwise 1 and a line on stderr, which the kubelet puts into an event. It ends by itself
/// before the kubelet's `timeoutSeconds`: a probe that is killed has no line.
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
        // A new pod with a bad file has none, and the update ends there. One that still has the file before it stays
        // ready: the controller would replace every pod that is not, whatever maxUnavailable says.
        What::Ready if !status.config_in_force => Some(format!("the platform file was not taken: {}", status.config)),
        What::Live | What::Ready => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_has_its_own_answer() {
        let status = |broker: &str, registered, config: &str, config_in_force| StatusResponse {
            broker: broker.to_owned(),
            registered,
            config: config.to_owned(),
            config_in_force,
            ..StatusResponse::default()
        };
        for (status, live, ready) in [
            (status("", true, "", true), true, true),
            (status("", false, "", true), true, false),
            (status("gone", true, "", true), false, true),
            (status("", true, "line 3: unknown field", false), true, false),
            (status("", true, "line 3: unknown field", true), true, true),
        ] {
            assert_eq!(fault(What::Live, &status).is_none(), live, "{status:?}");
            assert_eq!(fault(What::Ready, &status).is_none(), ready, "{status:?}");
        }
    }
}

//! `sealmount worker`: the unprivileged half, which only `sealmount node` starts.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::broker::{REGISTRATION_REFUSED, client::Inherited};
use crate::harden::{self, Confinement};
use crate::node::{self, End, Options};
use crate::{log, secret};

/// What `sealmount node` passes on.
#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[arg(long)]
    config: Option<PathBuf>,
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    #[arg(long)]
    kubelet_dir: PathBuf,
    #[arg(long)]
    csi_socket: PathBuf,
    #[arg(long)]
    node_name: String,
    #[arg(long)]
    pods_from: String,
    #[arg(long)]
    listen: SocketAddr,
}

pub(super) fn run(flags: &Flags) -> ExitCode {
    log::init(tracing::Level::INFO);
    match start(flags) {
        Ok(End::Stopped) => ExitCode::SUCCESS,
        Ok(End::BrokerGone) => {
            tracing::error!("the broker is gone; the worker ends with it");
            ExitCode::FAILURE
        }
        Ok(End::RegistrationRefused) => ExitCode::from(REGISTRATION_REFUSED),
        Err(error) => {
            tracing::error!("the worker cannot serve: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(flags: &Flags) -> Result<End, Box<dyn std::error::Error>> {
    let inherited = Inherited::take()?;
    let options = Options {
        config: flags.config.clone(),
        kubeconfig: flags.kubeconfig.clone(),
        kubelet_dir: flags.kubelet_dir.clone(),
        csi_socket: flags.csi_socket.clone(),
        node_name: flags.node_name.clone(),
        pods_from: flags.pods_from.parse()?,
        listen: flags.listen,
    };
    // Before the runtime: some of it holds only for threads that come after.
    let read = options.readable();
    let read: Vec<_> = read.iter().map(PathBuf::as_path).collect();
    let confinement = Confinement { broker: inherited.broker, read: &read, work: inherited.work.as_fd() };
    for missing in harden::worker(&confinement)? {
        tracing::warn!("this kernel does not confine the worker fully: {missing}");
    }
    secret::keep_texts_in(harden::arena()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(node::run(options, inherited))?)
}

//! What tests, demo and bench share: the real programs they start and the kubelet they play.
#![allow(dead_code, unused_imports, unreachable_pub, missing_debug_implementations)] // each of the three uses a part of it
#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing)] // a lab that cannot start fails its test
#![allow(clippy::disallowed_methods)] // those guard the driver; the lab keeps a cache and writes no secret

pub mod apiserver;
pub mod canary;
pub mod certificates;
pub mod envoy;
pub mod issuer;
pub mod kubelet;
pub mod node;
pub mod openbao;
pub mod pod;
pub mod programs;
pub mod replies;
pub mod scratch;

pub use apiserver::{ApiServer, KubeletPods};
pub use certificates::Authority;
pub use issuer::{Identity, Issuer};
pub use openbao::OpenBao;
pub use programs::{Daemon, program};
pub use replies::{Reply, Seen, Server};

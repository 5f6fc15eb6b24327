//! The real two-process binary on temporary sockets, real kernel mounts and a real OpenBao.
// A lab may stop at the first thing that is wrong; the driver may not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable, clippy::indexing_slicing)]
#![allow(clippy::string_slice, clippy::disallowed_methods)]

#[path = "../lab/mod.rs"]
mod lab;

mod broker;
mod hostile;
mod kill;
mod life;
mod many;
mod openbao;
mod outage;
mod pods;
mod secret;
mod vault;

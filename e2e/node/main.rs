//! The real two-process binary on temporary sockets, real kernel mounts and a real OpenBao.
#[path = "../lab/mod.rs"]
mod lab;

//! The two sides of the privilege boundary: the broker, which mounts and holds no secret byte, and the worker's
//! client of it. What they say to each other is [`wire`].

pub mod client;
mod layout;
mod mounts;
pub mod serve;
mod volume;
pub mod wire;

/// UID and GID of the worker; policy refuses it as an owner too.
pub use crate::request::WORKER_UID;

/// The worker ends with this code when the kubelet refused its registration: both sockets are then bound anew, since
/// a new inode makes the kubelet register again.
pub const REGISTRATION_REFUSED: u8 = 75;

/// Names, for the worker, what it inherited; see [`client::Inherited`].
const INHERITED: &str = "SEALMOUNT_INHERITED";

//! Sealmount: a CSI node driver that mounts secrets so that only the application container can read them.
// Unit tests make their own files and may read the environment; the driver may not.
#![cfg_attr(test, allow(clippy::disallowed_methods, clippy::string_slice))]

#[cfg(all(feature = "waive-anything", not(debug_assertions)))]
compile_error!("waive-anything is for the lab alone: it lifts what is never waived, and no release may have it");

pub mod admin;
pub mod broker;
pub mod check;
pub mod cli;
pub mod config;
pub mod csi;
pub mod events;
pub mod harden;
pub mod health;
pub mod log;
pub mod metrics;
pub mod node;
pub mod pods;
pub mod policy;
pub mod publish;
pub mod registration;
pub mod request;
pub mod schedule;
pub mod secret;
pub mod source;

//! The platform team's file: connections, rules, limits (surface 2). Parsed strictly as a whole; all faults at once.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::policy::Rules;

/// The whole file, valid.
#[derive(Debug, Clone)]
pub struct Config {
    /// `connections`, by name.
    pub connections: BTreeMap<String, Connection>,
    /// `limits`.
    pub limits: Limits,
    /// `stale_after`.
    pub stale_after: Duration,
    /// `policy`.
    pub policy: Rules,
}

/// `limits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `volume_bytes`.
    pub volume_bytes: u64,
    /// `files`.
    pub files: u32,
}

/// One connection.
#[derive(Debug, Clone)]
pub struct Connection {}

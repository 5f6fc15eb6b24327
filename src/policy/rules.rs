//! The rule table.

use crate::request::Code;

/// Whether a finding refuses or warns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The volume is refused.
    Refuse,
    /// The pod's owner is told.
    Warn,
}

/// One rule.
#[derive(Debug)]
pub struct Rule {
    /// Stable code.
    pub code: Code,
    /// Severity.
    pub severity: Severity,
}

/// The platform's settings for the rules.
#[derive(Debug, Clone)]
pub struct Rules {}

/// All rules.
pub static RULES: &[Rule] = &[];

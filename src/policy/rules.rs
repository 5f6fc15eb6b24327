//! The rule table: what makes a pod unfit to be given a secret, and the platform's settings for it.
//!
//! A rule must be true: it names the way by which the bytes get out. Codes are stable and never reused.

use std::time::SystemTime;

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
    /// The field it is about, as a path into the pod; a finding names the exact one.
    pub field: &'static str,
    /// What is wrong when it fires, and by which way the bytes would get out.
    pub text: &'static str,
    /// What to write instead.
    pub change: &'static str,
    /// Where the fact behind it is documented.
    pub source: &'static str,
    /// Whether the platform team may waive it.
    pub waivable: bool,
}

/// The platform's settings for the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// `mesh_uids`: UIDs of mesh proxies besides those recognised in the pod.
    pub mesh_uids: Vec<u32>,
    /// `distinct_uids`: a neighbour with the owner's UID is refused, not only warned of.
    pub distinct_uids: bool,
    /// `refuse`: codes of warnings made refusals.
    pub refuse: Vec<Code>,
    /// `namespaces`.
    pub namespaces: Namespaces,
    /// `waivers`.
    pub waivers: Vec<Waiver>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            mesh_uids: vec![1337],
            distinct_uids: false,
            refuse: Vec::new(),
            namespaces: Namespaces::default(),
            waivers: Vec::new(),
        }
    }
}

/// `policy.namespaces`: names, or `*` for all. `deny` wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespaces {
    /// Who may have volumes.
    pub allow: Vec<String>,
    /// Who may not.
    pub deny: Vec<String>,
}

impl Default for Namespaces {
    fn default() -> Self {
        Self { allow: vec!["*".into()], deny: Vec::new() }
    }
}

/// A refusal that the platform team accepts for some pods, for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiver {
    /// The refusal's code; its rule is waivable.
    pub code: Code,
    /// The namespace.
    pub namespace: String,
    /// Only pods of this service account.
    pub service_account: Option<String>,
    /// Only findings about this container.
    pub container: Option<String>,
    /// Until then, exclusive.
    pub until: SystemTime,
    /// Why.
    pub reason: String,
}

/// All rules, in the order they are reported.
pub static RULES: &[Rule] = &[];

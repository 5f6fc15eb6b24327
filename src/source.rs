//! Where secrets come from. A fetch needs a [`Grant`], which only policy can make, and gives a whole [`Payload`] or
//! an error: never a file without its content.

mod assemble;
pub mod codes;
mod kubernetes;
mod template;
mod vault;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use self::assemble::Found;
use self::vault::read::Reading;
use self::vault::{Connections, Order};
use crate::config::Config;
use crate::policy::Grant;
use crate::request::{Code, Fault, FileName, Publish, VolumeId};
use crate::secret::SecretBytes;

/// Everything a volume will hold, complete.
#[allow(missing_debug_implementations)] // holds secrets
pub struct Payload {
    /// The files, sorted by name, no name twice.
    pub files: Vec<(FileName, SecretBytes)>,
    /// What decides when to fetch again.
    pub origin: Origin,
}

/// What the source says of a payload's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// KV 2 versions by path.
    Versions(Vec<(String, u64)>),
    /// A lease that must be renewed and revoked.
    Lease {
        /// Vault's lease id.
        id: String,
        /// When it ends.
        until: SystemTime,
    },
    /// A certificate's end.
    NotAfter(SystemTime),
    /// Nothing known: the interval decides.
    None,
}

/// Who must act, and whether trying again may help: decides the gRPC code (platform B3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The pod's author: the same request will fail again.
    Pod,
    /// The platform team: config, Vault role or policy.
    Platform,
    /// Nobody: the source is away or slow; try again, not before the time if one is given.
    Away(Option<Duration>),
}

/// Why a fetch gave nothing. Holds no byte of a reply's body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{fault}")]
pub struct SourceError {
    /// Code, pod field (may be empty) and text.
    pub fault: Fault,
    /// Who must act.
    pub blame: Blame,
}

impl SourceError {
    /// An error.
    pub fn new(blame: Blame, code: Code, field: impl Into<String>, text: impl Into<String>) -> Self {
        Self { fault: Fault { code, field: field.into(), text: text.into() }, blame }
    }

    /// Whether there is nothing, which an optional entry takes for an answer; 403 and other errors never say so.
    fn is_missing(&self) -> bool {
        [codes::MISSING_KEY, codes::NO_SECRET, codes::NOT_FOUND, codes::DELETED].contains(&self.fault.code)
    }
}

/// Both sources, with the logins and reads they share.
#[derive(Default)]
pub struct Sources {
    vault: Connections,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

impl Sources {
    /// Fetches everything `publish` asks for, within `deadline`. What the platform's file forbids is found before
    /// anything is sent.
    pub async fn fetch(
        &self,
        grant: &Grant,
        publish: &Publish,
        config: &Config,
        deadline: tokio::time::Instant,
    ) -> Result<Payload, SourceError> {
        let Some(files) = &publish.claim.files else {
            let files = assemble::within(config.limits, kubernetes::whole(publish)?)?;
            return Ok(Payload { files, origin: Origin::None });
        };
        assemble::check(files)?;
        let vault = match Order::new(grant, publish, files, config)? {
            Some(order) => self.vault.fetch(order, deadline).await?,
            None => BTreeMap::new(),
        };
        let versions = vault.iter().filter_map(|((path, _), reading)| match &**reading {
            Reading::Found(document) => Some((path.as_str().to_owned(), document.version?)),
            Reading::Absent(_) => None,
        });
        let versions: Vec<_> = versions.collect();
        let origin = if versions.is_empty() { Origin::None } else { Origin::Versions(versions) };
        let files = assemble::files(files, &Found { publish, vault }, config.limits)?;
        Ok(Payload { files, origin })
    }

    /// `volume` was unpublished: gives up the logins that only it used, and revokes them in the background.
    pub fn forget(&self, volume: &VolumeId) {
        self.vault.forget(volume);
    }

    /// The process ends: revokes what was logged in, until `deadline` at the latest.
    pub async fn close(&self, deadline: tokio::time::Instant) {
        self.vault.close(deadline).await;
    }
}

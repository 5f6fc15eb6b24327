//! The platform team's file: connections, rules, limits (surface 2). Parsed strictly as a whole; all faults at once.

pub mod expand;
mod read;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use crate::policy::Rules;
use crate::request::files::VaultPath;
use crate::request::yaml::Place;
use crate::request::{Claim, Code, Fault, PodRef, Publish, Refresh, Token, nearest, shown};
use expand::{Expand, NamePattern, PathPattern};
pub use read::{FIELDS, bytes};

/// `vault` names no connection of the platform file.
pub const UNKNOWN_CONNECTION: Code = Code("SM201");
/// `vault` is left out and no connection is the default.
pub const NO_DEFAULT_CONNECTION: Code = Code("SM202");
/// `role` is left out and the connection has none.
pub const NO_ROLE: Code = Code("SM203");
/// No rule of the connection's `allow` covers this pod, role and path.
pub const NOT_ALLOWED: Code = Code("SM204");
/// `refresh` lies outside the connection's bounds.
pub const REFRESH_BOUNDS: Code = Code("SM205");
/// A fact of the pod cannot stand in a path or a namespace.
pub const NOT_EXPANDABLE: Code = Code("SM206");
/// The kubelet brought no token for the connection's audience.
pub const NO_TOKEN: Code = Code("SM207");

/// One thing that is wrong with the platform file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFault {
    /// Where; `None` if the file could not be read at all.
    pub place: Option<Place>,
    /// The field: `connections.prod.address`. Empty if the text is no YAML.
    pub field: String,
    /// What is wrong and what to write instead.
    pub text: String,
}

impl fmt::Display for ConfigFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = self.place {
            write!(f, "{place}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.text)
    }
}

/// Reads the platform file and the files it names. On `Err` every fault is there, in the order of the file.
pub fn load(path: &Path) -> Result<Config, Vec<ConfigFault>> {
    read::file(path)
}

/// The whole file, valid. The default is what holds without a file: no connection, so Kubernetes Secrets only.
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
    /// `log.level`.
    pub log_level: tracing::Level,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connections: BTreeMap::new(),
            limits: Limits::default(),
            stale_after: Duration::from_secs(300),
            policy: Rules::default(),
            log_level: tracing::Level::INFO,
        }
    }
}

/// `limits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `volume_bytes`: the most content of one volume.
    pub volume_bytes: u64,
    /// `files`: the most files of one volume, at most [`Limits::MAX_FILES`].
    pub files: u32,
}

impl Limits {
    /// The most files a volume may have: their names must fit one packet to the broker (surface 4).
    pub const MAX_FILES: u32 = 256;
}

impl Default for Limits {
    fn default() -> Self {
        Self { volume_bytes: 1024 * 1024, files: Self::MAX_FILES }
    }
}

/// One connection: a Vault or OpenBao the platform team chose, and who may use it for what.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Its name in the file.
    pub name: String,
    /// Whether it is taken when `vault` is left out.
    pub default: bool,
    /// `scheme://host:port`, no path, no trailing `/`. Plain `http` only for a loopback address.
    pub address: String,
    /// Other addresses, of the same form, that a redirect may go to.
    pub redirect_to: Vec<String>,
    /// The CA certificates, PEM, at least one; empty only with `http`.
    pub ca_pem: Vec<u8>,
    /// The name to expect in the server's certificate, if it is not the address's host.
    pub server_name: Option<String>,
    /// Vault's namespace for a pod.
    pub namespace: Option<Expand>,
    /// How a pod's token becomes a Vault token.
    pub auth: Auth,
    /// Who may use what; empty: nobody.
    pub allow: Vec<Allow>,
    /// Bounds of `refresh`.
    pub refresh: RefreshBounds,
    /// The longest life of a token after a restart of the driver forgot it.
    pub max_token_ttl: Duration,
    /// What a login may be shared by.
    pub share_login: ShareLogin,
    /// How long one request may take.
    pub timeout: Duration,
    /// The longest reply, in bytes.
    pub max_reply: u64,
    /// How many requests this connection may make.
    pub requests: Requests,
}

/// `auth`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    /// `method`.
    pub method: Method,
    /// Where the method is mounted, below `auth/`.
    pub mount: String,
    /// The audience of the pod's token: this connection's own, never an API server's.
    pub audience: String,
    /// The role for pods that name none.
    pub role: Option<String>,
}

/// A login with the pod's own ServiceAccount token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The `kubernetes` auth method: Vault asks the API server about the token.
    Kubernetes,
    /// The `jwt` auth method: Vault checks the signature itself.
    Jwt,
}

/// One rule of `allow`: a pod, role and path that all four lists cover may be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allow {
    /// `namespaces`.
    pub namespaces: Vec<NamePattern>,
    /// `service_accounts`.
    pub service_accounts: Vec<NamePattern>,
    /// `roles`.
    pub roles: Vec<NamePattern>,
    /// `paths`.
    pub paths: Vec<PathPattern>,
}

/// `refresh` of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefreshBounds {
    /// For volumes that say nothing.
    pub default: Duration,
    /// The shortest interval.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

/// `share_login`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareLogin {
    /// Pods of one service account and role share a login.
    ServiceAccount,
    /// Each pod has its own. Always so with [`Method::Jwt`], whose roles can bind claims of the pod.
    Pod,
}

/// `requests`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requests {
    /// At one time; at least 1.
    pub at_once: u32,
    /// In a second; at least 1.
    pub per_second: u32,
}

fn attribute(code: Code, name: &str, text: String) -> Fault {
    Fault { code, field: format!("volumeAttributes.{name}"), text }
}

impl Config {
    /// The connection a claim means: the one it names, else the default.
    pub fn connection(&self, claim: &Claim) -> Result<&Connection, Fault> {
        match &claim.vault {
            Some(name) => self.connections.get(name).ok_or_else(|| {
                let near = nearest(name, self.connections.keys().map(String::as_str));
                let text = format!("the platform file has no connection \"{}\"{near}", shown(name));
                attribute(UNKNOWN_CONNECTION, "vault", text)
            }),
            None => self.connections.values().find(|connection| connection.default).ok_or_else(|| {
                let text = "name a connection: the platform file has no default one".to_owned();
                attribute(NO_DEFAULT_CONNECTION, "vault", text)
            }),
        }
    }
}

impl Connection {
    /// The role a claim means: the one it names, else the connection's. Whether the pod may use it is for
    /// [`Connection::permits`] to say.
    pub fn role<'a>(&'a self, claim: &'a Claim) -> Result<&'a str, Fault> {
        claim.role.as_deref().or(self.auth.role.as_deref()).ok_or_else(|| {
            let text = format!("name a role: connection \"{}\" has no default one", self.name);
            attribute(NO_ROLE, "role", text)
        })
    }

    /// How often a claim's content is fetched again. Outside the bounds is refused, never clamped.
    pub fn refresh(&self, claim: &Claim) -> Result<Refresh, Fault> {
        let every = match claim.refresh {
            None => return Ok(Refresh::Every(self.refresh.default)),
            Some(Refresh::Never) => return Ok(Refresh::Never),
            Some(Refresh::Every(every)) => every,
        };
        let RefreshBounds { min, max, .. } = self.refresh;
        if every < min || every > max {
            let (min, max) = (min.as_secs(), max.as_secs());
            let text = format!("connection \"{}\" takes {min}s to {max}s, or never", self.name);
            return Err(attribute(REFRESH_BOUNDS, "refresh", text));
        }
        Ok(Refresh::Every(every))
    }

    /// Whether a pod may read `path` with `role`: one rule of `allow` must cover all of it.
    pub fn permits(&self, pod: &PodRef, role: &str, path: &VaultPath) -> Result<(), Fault> {
        let covers = |allow: &Allow| -> Result<bool, Fault> {
            let any = |patterns: &[NamePattern], name: &str| patterns.iter().any(|pattern| pattern.covers(name));
            if !any(&allow.namespaces, &pod.namespace)
                || !any(&allow.service_accounts, &pod.service_account)
                || !any(&allow.roles, role)
            {
                return Ok(false);
            }
            for pattern in &allow.paths {
                if pattern.covers(pod, path)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        for allow in &self.allow {
            if covers(allow)? {
                return Ok(());
            }
        }
        let text = format!(
            "no rule lets namespace {}, service account {} with role \"{}\" read {}; ask the platform team for one",
            pod.namespace,
            pod.service_account,
            shown(role),
            shown(path.as_str()),
        );
        Err(Fault { code: NOT_ALLOWED, field: format!("platform file: connections.{}.allow", self.name), text })
    }

    /// The pod's token for this connection.
    pub fn token<'a>(&self, publish: &'a Publish) -> Result<&'a Token, Fault> {
        publish.tokens.get(&self.auth.audience).ok_or_else(|| Fault {
            code: NO_TOKEN,
            field: format!("CSIDriver {}: spec.tokenRequests", crate::request::DRIVER),
            text: format!("list audience \"{}\" of connection \"{}\"", shown(&self.auth.audience), self.name),
        })
    }
}

#[cfg(test)]
mod tests;

//! Logins: with the pod's own token, shared where that is safe, revoked when their last user is done.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use vaultrs::api::auth::kubernetes::requests::LoginWithKubernetesRequest;
use vaultrs::api::auth::oidc::requests::JWTLoginRequest;

use super::client::{Client, Reply, jittered};
use super::read::Request;
use super::status;
use crate::config::{Auth, Method};
use crate::request::{VolumeId, shown};
use crate::secret::SecretText;
use crate::source::{Blame, SourceError, codes};

/// A shared login that nobody used for so long is given up.
const IDLE: Duration = Duration::from_secs(30);
/// No token is used for longer, whatever its life.
const LONGEST_USE: Duration = Duration::from_secs(86_400);
/// How often a refused login is tried again: Vault says 403 also when the API server is away (platform E).
const TRIES: u32 = 3;
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// Revocations at one time, and how far they are spread, so that a drained node does not hit Vault at once.
const REVOCATIONS: usize = 4;
const SPREAD: Duration = Duration::from_millis(500);
const REVOKE_WITHIN: Duration = Duration::from_secs(10);

/// Who logs in.
pub(super) struct Who {
    /// The connection's auth method.
    pub(super) auth: Auth,
    /// The role.
    pub(super) role: String,
    /// Vault's namespace.
    pub(super) namespace: Option<String>,
    /// The pod's token.
    pub(super) jwt: SecretText,
    /// The longest life a token may have.
    pub(super) max_token_ttl: Duration,
}

/// What a login may be shared by: everything that decides what Vault would answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct LoginKey {
    /// Vault's namespace.
    pub(super) namespace: Option<String>,
    /// The role.
    pub(super) role: String,
    /// Namespace, name and UID of the service account.
    pub(super) service_account: (String, String, String),
}

/// A Vault token, revoked when the last user drops it.
pub(super) struct Login {
    token: Option<SecretText>,
    namespace: Option<String>,
    /// Batch tokens cannot be revoked.
    revocable: bool,
    /// `token_num_uses`: what is left of it.
    uses: Option<AtomicU32>,
    made: Instant,
    /// Two thirds of its life: not used for new reads after that.
    good_until: Instant,
    client: Arc<Client>,
    revoker: Arc<Revoker>,
}

impl Login {
    /// Logs in.
    pub(super) async fn new(
        client: &Arc<Client>,
        revoker: &Arc<Revoker>,
        who: &Who,
        deadline: Instant,
    ) -> Result<Self, SourceError> {
        let reply = Self::ask(client, who, deadline).await?;
        let parsed: LoginReply = serde_json::from_slice(&reply.body).unwrap_or(LoginReply { auth: None });
        let Some(auth) = parsed.auth else {
            let text = format!("the login at auth/{} gave no token; is it an auth method?", who.auth.mount);
            return Err(SourceError::new(Blame::Platform, codes::NO_VAULT_TOKEN, client.field("auth.mount"), text));
        };
        let ttl = Duration::from_secs(auth.lease_duration);
        let made = Instant::now();
        let login = Self {
            token: Some(SecretText::new(auth.client_token)),
            namespace: who.namespace.clone(),
            revocable: auth.token_type.as_deref() != Some("batch"),
            uses: (auth.num_uses > 0).then(|| AtomicU32::new(auth.num_uses)),
            made,
            // A number from outside must not overflow the clock.
            good_until: made + ttl.min(LONGEST_USE) / 3 * 2,
            client: Arc::clone(client),
            revoker: Arc::clone(revoker),
        };
        // A token that a crash leaves behind ends by itself within max_token_ttl, or the promise is none. Nothing
        // the driver sends can shorten it, so the role has to. Zero is a token that never ends.
        if ttl.is_zero() || ttl > who.max_token_ttl {
            let max = who.max_token_ttl.as_secs();
            let text = format!(
                "role \"{}\" gives tokens of {} s, longer than max_token_ttl; set token_ttl to {max}s or less on the role",
                shown(&who.role),
                auth.lease_duration,
            );
            return Err(SourceError::new(Blame::Platform, codes::TOKEN_TTL, client.field("max_token_ttl"), text));
        }
        Ok(login)
    }

    async fn ask(client: &Client, who: &Who, deadline: Instant) -> Result<Reply, SourceError> {
        let mut wait = FIRST_WAIT;
        for attempt in 1.. {
            let (mount, role, jwt) = (who.auth.mount.clone(), who.role.clone(), who.jwt.expose().to_owned());
            let namespace = who.namespace.as_deref();
            let reply = match who.auth.method {
                Method::Kubernetes => {
                    client.call(LoginWithKubernetesRequest { mount, role, jwt }, "", namespace, deadline).await?
                }
                Method::Jwt => {
                    client.call(JWTLoginRequest { mount, role: Some(role), jwt }, "", namespace, deadline).await?
                }
            };
            let again = Instant::now() + wait < deadline && attempt < TRIES;
            match reply.status {
                StatusCode::OK => return Ok(reply),
                // The jwt method decides by itself: its refusal is final.
                StatusCode::FORBIDDEN if who.auth.method == Method::Kubernetes && again => {
                    tokio::time::sleep(jittered(wait)).await;
                    wait = wait.saturating_mul(2);
                }
                StatusCode::BAD_REQUEST | StatusCode::FORBIDDEN => {
                    let text = format!(
                        "Vault refused the login ({}) at auth/{} with role \"{}\"; check that the role exists there and \
                         takes this service account, its namespace and audience \"{}\"",
                        reply.status.as_u16(),
                        shown(&who.auth.mount),
                        shown(&who.role),
                        shown(&who.auth.audience),
                    );
                    return Err(SourceError::new(Blame::Platform, codes::LOGIN_REFUSED, client.field("auth"), text));
                }
                StatusCode::NOT_FOUND => {
                    let text = format!("Vault has no auth method at auth/{}", shown(&who.auth.mount));
                    return Err(SourceError::new(
                        Blame::Platform,
                        codes::NO_AUTH_METHOD,
                        client.field("auth.mount"),
                        text,
                    ));
                }
                _ => return Err(status(client, &reply, "the login")),
            }
        }
        Err(SourceError::new(Blame::Away(None), codes::SLOW, client.field("auth"), "the login took too long"))
    }

    /// The token for one more request, or `None` if a new login is needed.
    pub(super) fn take(&self) -> Option<&str> {
        if Instant::now() >= self.good_until {
            return None;
        }
        if let Some(uses) = &self.uses {
            uses.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).ok()?;
        }
        self.token.as_ref().map(SecretText::expose)
    }

    /// When it was made.
    pub(super) fn made(&self) -> Instant {
        self.made
    }

    /// Revokes a lease made by a read, where the token's own revocation will not end it.
    pub(super) async fn revoke_lease(&self, lease: &str, deadline: Instant) {
        let Some(token) = self.token.as_ref().filter(|_| !self.revocable) else { return };
        let body = serde_json::json!({ "lease_id": lease }).to_string().into_bytes();
        let method = rustify::enums::RequestMethod::PUT;
        let request = Request { method, path: "sys/leases/revoke".into(), version: None, body: Some(body) };
        // The default policy does not allow it: then the lease ends with the batch token.
        let _ = self.client.call(request, token.expose(), self.namespace.as_deref(), deadline).await;
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        let used_up = self.uses.as_ref().is_some_and(|uses| uses.load(Ordering::Relaxed) == 0);
        if let Some(token) = self.token.take()
            && self.revocable
            && !used_up
        {
            self.revoker.revoke(Arc::clone(&self.client), self.namespace.take(), token);
        }
    }
}

#[derive(Deserialize)]
struct LoginReply {
    #[serde(default)]
    auth: Option<AuthReply>,
}

/// vaultrs's `AuthInfo` has no `num_uses` and can be printed, so this is our own.
#[derive(Deserialize)]
struct AuthReply {
    client_token: String,
    lease_duration: u64,
    #[serde(default)]
    token_type: Option<String>,
    #[serde(default)]
    num_uses: u32,
}

/// The shared login of one key, made by whoever needs it first. Each caller logs in with a token of its own: a pod
/// whose token is refused cannot fail another's.
pub(super) struct Slot {
    login: tokio::sync::Mutex<Option<Arc<Login>>>,
    state: Mutex<SlotState>,
}

struct SlotState {
    users: HashSet<VolumeId>,
    used: Instant,
}

impl Slot {
    /// A slot without a login.
    pub(super) fn new() -> Self {
        let state = SlotState { users: HashSet::new(), used: Instant::now() };
        Self { login: tokio::sync::Mutex::default(), state: Mutex::new(state) }
    }

    /// The standing login, or a new one.
    pub(super) async fn login(
        &self,
        client: &Arc<Client>,
        revoker: &Arc<Revoker>,
        who: &Arc<Who>,
        deadline: Instant,
    ) -> Result<Arc<Login>, SourceError> {
        let mut standing = self.login.lock().await;
        if let Some(login) = &*standing
            && Instant::now() < login.good_until
            && login.uses.as_ref().is_none_or(|uses| uses.load(Ordering::Relaxed) > 0)
        {
            return Ok(Arc::clone(login));
        }
        // A task of its own: a login under way whose pod goes would leave a token that nobody knows.
        let task = {
            let (client, revoker, who) = (Arc::clone(client), Arc::clone(revoker), Arc::clone(who));
            tokio::spawn(async move { Login::new(&client, &revoker, &who, deadline).await })
        };
        let login = task.await.unwrap_or_else(|_| {
            let text = "the login ended without an answer";
            Err(SourceError::new(Blame::Away(None), codes::CUT, client.field("auth"), text))
        })?;
        let login = Arc::new(login);
        *standing = Some(Arc::clone(&login));
        Ok(login)
    }

    /// Takes a login out of use that Vault no longer accepts, unless another has taken its place.
    pub(super) async fn retire(&self, login: &Arc<Login>) {
        let mut standing = self.login.lock().await;
        if standing.as_ref().is_some_and(|standing| Arc::ptr_eq(standing, login)) {
            *standing = None;
        }
    }
}

/// The shared logins of one connection.
#[derive(Default)]
pub(super) struct Logins {
    slots: Mutex<HashMap<LoginKey, Arc<Slot>>>,
}

impl Logins {
    /// The slot of `key`, kept until `volume` and all others are gone or it is idle.
    pub(super) fn slot(self: &Arc<Self>, key: &LoginKey, volume: &VolumeId) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.entry(key.clone()).or_insert_with(|| {
            tokio::spawn(idle(Arc::downgrade(self), key.clone()));
            Arc::new(Slot::new())
        });
        let mut state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.users.insert(volume.clone());
        state.used = Instant::now();
        Arc::clone(slot)
    }

    /// `volume` is gone: gives up the logins that only it used.
    pub(super) fn forget(&self, volume: &VolumeId) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, slot| {
            let mut state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
            !state.users.remove(volume) || !state.users.is_empty()
        });
    }

    /// Gives up all logins.
    pub(super) fn clear(&self) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Gives a slot up once it was idle; one task a slot.
async fn idle(logins: std::sync::Weak<Logins>, key: LoginKey) {
    let mut until = Instant::now() + IDLE;
    loop {
        tokio::time::sleep_until(until).await;
        let Some(logins) = logins.upgrade() else { return };
        let mut slots = logins.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = slots.get(&key) else { return };
        until = slot.state.lock().unwrap_or_else(PoisonError::into_inner).used + IDLE;
        if until <= Instant::now() {
            slots.remove(&key);
            return;
        }
    }
}

/// Revokes tokens in the background.
pub(super) struct Revoker {
    tasks: Mutex<JoinSet<()>>,
    permits: Arc<Semaphore>,
    closing: watch::Sender<bool>,
}

impl Default for Revoker {
    fn default() -> Self {
        Self {
            tasks: Mutex::default(),
            permits: Arc::new(Semaphore::new(REVOCATIONS)),
            closing: watch::Sender::new(false),
        }
    }
}

impl Revoker {
    fn revoke(&self, client: Arc<Client>, namespace: Option<String>, token: SecretText) {
        // Without a runtime the process is ending; the token ends by max_token_ttl.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let permits = Arc::clone(&self.permits);
        let mut closing = self.closing.subscribe();
        let task = async move {
            tokio::select! {
                () = tokio::time::sleep(jittered(SPREAD)) => {}
                _ = closing.wait_for(|closing| *closing) => {}
            }
            let Ok(_permit) = permits.acquire().await else { return };
            let method = rustify::enums::RequestMethod::POST;
            let request = Request { method, path: "auth/token/revoke-self".into(), version: None, body: None };
            let deadline = Instant::now() + REVOKE_WITHIN;
            let reply = client.call(request, token.expose(), namespace.as_deref(), deadline).await;
            // 403: it has ended already.
            match reply {
                Ok(reply) if reply.status.is_success() || reply.status == StatusCode::FORBIDDEN => {}
                Ok(reply) => tracing::warn!(status = reply.status.as_u16(), "a Vault token was not revoked"),
                Err(error) => tracing::warn!(code = %error.fault.code, "a Vault token was not revoked"),
            }
        };
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &runtime);
    }

    /// Revokes what is left, without spreading it, and waits until that is done or the time is up.
    pub(super) async fn close(&self, deadline: Instant) {
        self.closing.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout_at(deadline, all).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{PodUid, VolumeName};

    fn key(role: &str) -> LoginKey {
        let text = String::from;
        LoginKey { namespace: None, role: text(role), service_account: (text("a"), text("b"), text("c")) }
    }

    fn volume(pod: &str) -> VolumeId {
        VolumeId { pod: PodUid::parse(pod).unwrap(), name: VolumeName::parse("db").unwrap() }
    }

    fn standing(logins: &Logins) -> Vec<String> {
        let mut roles: Vec<_> = logins.slots.lock().unwrap().keys().map(|key| key.role.clone()).collect();
        roles.sort();
        roles
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_login_is_given_up_and_a_used_one_is_not() {
        let logins = Arc::new(Logins::default());
        logins.slot(&key("idle"), &volume("pod-1"));
        logins.slot(&key("used"), &volume("pod-1"));
        tokio::time::sleep(Duration::from_secs(20)).await;
        logins.slot(&key("used"), &volume("pod-1"));
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert_eq!(standing(&logins), ["used"]);
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(standing(&logins).is_empty());
    }

    #[tokio::test]
    async fn a_login_stands_until_its_last_volume_is_gone() {
        let logins = Arc::new(Logins::default());
        let first = logins.slot(&key("r"), &volume("pod-1"));
        assert!(Arc::ptr_eq(&first, &logins.slot(&key("r"), &volume("pod-2"))));
        logins.forget(&volume("pod-3"));
        logins.forget(&volume("pod-1"));
        assert_eq!(standing(&logins), ["r"]);
        logins.forget(&volume("pod-2"));
        assert!(standing(&logins).is_empty());
    }
}

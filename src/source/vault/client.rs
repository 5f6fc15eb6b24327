//! The way to one Vault: TLS with the connection's CA and nothing of the environment, limits, retries.
//!
//! vaultrs gives the requests, rustify sends them through [`Session`], which is ours: `VaultClient::new` would read
//! VAULT_* variables and panic on values from outside.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{HeaderMap, LOCATION, RETRY_AFTER};
use http::{Response, StatusCode, Uri};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use rustify::endpoint::Endpoint;
use rustify::errors::ClientError;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::Mutex;
use tokio::time::{Instant, Sleep};
use tower::limit::{ConcurrencyLimit, RateLimit};
use tower::retry::{Policy, Retry};
use tower::{Service, ServiceExt};
use vaultrs::api::EndpointMiddleware;

use crate::config::Connection;
use crate::request::shown;
use crate::source::{Blame, SourceError, codes};

/// The longest time of retrying in one call: the kubelet gives 120 s to all of it.
pub(super) const MAX_RETRYING: Duration = Duration::from_secs(30);
/// An idle connection's TLS buffers may hold what was last read over it until it is closed.
const POOL_IDLE: Duration = Duration::from_secs(2);
const MAX_REDIRECTS: usize = 3;
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// A lagging server (412) catches up within moments or not at all.
const MAX_LAGGING: u32 = 4;

type Body = Vec<u8>;
type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Why there is no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// No connection; the reason is the system's.
    #[error("no connection: {0}")]
    Unreachable(String),
    /// TLS failed, by the server's certificate or otherwise.
    #[error("{0}")]
    Untrusted(&'static str),
    /// No whole reply within `timeout`, or no time left.
    #[error("no whole reply in time")]
    Slow,
    /// The connection broke.
    #[error("the connection broke")]
    Cut,
    /// Longer than `max_reply`.
    #[error("the reply is too long")]
    TooLarge,
    /// A redirect that is not followed.
    #[error("a redirect to {0}")]
    Redirected(String),
    /// A request that cannot be put on the wire.
    #[error("the request cannot be sent")]
    Unsendable,
}

impl Failure {
    fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Slow | Self::Cut)
    }
}

/// A reply of any status.
pub(super) struct Reply {
    /// The status.
    pub(super) status: StatusCode,
    /// The body, at most `max_reply` long. May hold secrets; freed memory is zeroed by the allocator.
    pub(super) body: Body,
    /// `Retry-After` in seconds.
    pub(super) retry_after: Option<Duration>,
}

/// One connection's client.
pub(super) struct Client {
    name: String,
    base: String,
    timeout: Duration,
    max_reply: u64,
    gate: Gate,
}

impl Client {
    /// Prepares a client; connects to nothing.
    pub(super) fn new(connection: &Connection) -> Result<Self, SourceError> {
        let unusable = |what: &str, text: &str| {
            let field = format!("platform file: connections.{}.{what}", connection.name);
            SourceError::new(Blame::Platform, codes::UNUSABLE, field, text)
        };
        let tls = tls(&connection.ca_pem).ok_or_else(|| unusable("ca_file", "it holds no usable CA certificate"))?;
        let addresses = std::iter::once(&connection.address).chain(&connection.redirect_to);
        let origins: Option<Vec<Origin>> = addresses.map(|address| Origin::new(address, connection, &tls)).collect();
        let origins = origins.filter(|origins| !origins.is_empty());
        let origins = origins.ok_or_else(|| unusable("address", "it cannot be used"))?;
        let base = origins.first().map(|origin| origin.base.clone()).unwrap_or_default();
        let wire = Wire { origins: origins.into(), timeout: connection.timeout, max_reply: connection.max_reply };
        let at_once = usize::try_from(connection.requests.at_once.max(1)).unwrap_or(usize::MAX);
        let per_second = u64::from(connection.requests.per_second.max(1));
        let limits = tower::ServiceBuilder::new()
            .rate_limit(per_second, Duration::from_secs(1))
            .concurrency_limit(at_once)
            .service(wire);
        Ok(Self {
            name: connection.name.clone(),
            base,
            timeout: connection.timeout,
            max_reply: connection.max_reply,
            gate: Gate(Arc::new(Mutex::new(limits))),
        })
    }

    /// Sends `endpoint` and gives the reply, of whatever status; tries again until `deadline` where that may help.
    pub(super) async fn call<E: Endpoint>(
        &self,
        endpoint: E,
        token: &str,
        namespace: Option<&str>,
        deadline: Instant,
    ) -> Result<Reply, SourceError> {
        // The middleware panics on what cannot be a header; the platform's file and Vault's token come from outside.
        for value in [Some(token), namespace].into_iter().flatten() {
            if http::HeaderValue::from_str(value).is_err() {
                let text = "the namespace or Vault's token cannot be sent as a header";
                return Err(SourceError::new(Blame::Platform, codes::UNUSABLE, self.field("namespace"), text));
            }
        }
        let middleware = EndpointMiddleware {
            token: token.to_owned(),
            version: "v1".to_owned(),
            wrap: None,
            namespace: namespace.map(str::to_owned),
        };
        let session = Session { client: self, deadline };
        let result = endpoint.with_middleware(&middleware).exec(&session).await;
        let failure = match result {
            Ok(result) => {
                let (parts, body) = result.response.into_parts();
                return Ok(Reply { status: parts.status, body, retry_after: retry_after(&parts.headers) });
            }
            Err(ClientError::RequestError { source, .. }) => {
                source.downcast_ref::<Failure>().cloned().unwrap_or(Failure::Unsendable)
            }
            Err(_) => Failure::Unsendable,
        };
        Err(self.explain(&failure))
    }

    /// A field of this connection in the platform's file.
    pub(super) fn field(&self, field: &str) -> String {
        format!("platform file: connections.{}.{field}", self.name)
    }

    fn explain(&self, failure: &Failure) -> SourceError {
        let away = Blame::Away(None);
        let name = &self.name;
        let (blame, code, field, text) = match failure {
            Failure::Unreachable(why) => {
                (away, codes::UNREACHABLE, "address", format!("connection \"{name}\" cannot be reached: {why}"))
            }
            Failure::Untrusted(why) => {
                (Blame::Platform, codes::UNTRUSTED, "ca_file", format!("connection \"{name}\" is not trusted: {why}"))
            }
            Failure::Slow => {
                let text = format!("connection \"{name}\" gave no whole reply in time ({:?} a request)", self.timeout);
                (away, codes::SLOW, "timeout", text)
            }
            Failure::Cut => {
                (away, codes::CUT, "address", format!("connection \"{name}\" broke in the middle of a reply"))
            }
            Failure::TooLarge => {
                let text = format!("connection \"{name}\" sent more than {} bytes", self.max_reply);
                (Blame::Platform, codes::REPLY_TOO_LARGE, "max_reply", text)
            }
            Failure::Redirected(to) => {
                let text = format!("connection \"{name}\" redirects to {to}");
                (Blame::Platform, codes::REDIRECTED, "redirect_to", text)
            }
            Failure::Unsendable => (
                Blame::Platform,
                codes::UNUSABLE,
                "address",
                format!("connection \"{name}\": the request cannot be sent"),
            ),
        };
        SourceError::new(blame, code, self.field(field), text)
    }
}

/// One call through a client: what rustify needs, with the call's deadline.
struct Session<'a> {
    client: &'a Client,
    deadline: Instant,
}

impl Session<'_> {
    async fn attempt(&self, request: http::Request<Body>) -> Result<Response<Body>, Failure> {
        let backoff = Backoff { deadline: self.deadline, wait: FIRST_WAIT, lagging: 0 };
        let service = Retry::new(backoff, self.client.gate.clone());
        let call = Call { request, deadline: self.deadline };
        tokio::time::timeout_at(self.deadline, service.oneshot(call)).await.unwrap_or(Err(Failure::Slow))
    }

    async fn exchange(&self, request: http::Request<Body>) -> Result<Response<Body>, ClientError> {
        let (url, method) = (request.uri().to_string(), request.method().to_string());
        self.attempt(request).await.map_err(|failure| ClientError::RequestError { source: failure.into(), url, method })
    }
}

// Written out as `async_trait` would: two methods do not pay for the macro.
impl rustify::client::Client for Session<'_> {
    fn send<'life0, 'future>(
        &'life0 self,
        request: http::Request<Body>,
    ) -> BoxFuture<'future, Result<Response<Body>, ClientError>>
    where
        'life0: 'future,
        Self: 'future,
    {
        Box::pin(self.exchange(request))
    }

    fn base(&self) -> &str {
        &self.client.base
    }

    /// The default turns every status but success into an error that carries the body, and logs it.
    fn execute<'life0, 'future>(
        &'life0 self,
        request: http::Request<Body>,
    ) -> BoxFuture<'future, Result<Response<Body>, ClientError>>
    where
        'life0: 'future,
        Self: 'future,
    {
        Box::pin(self.exchange(request))
    }
}

/// A request with the time it has.
#[derive(Clone)]
struct Call {
    request: http::Request<Body>,
    deadline: Instant,
}

/// Tries again what may pass, with jittered waits that double, or as long as the server asks for.
#[derive(Clone)]
struct Backoff {
    deadline: Instant,
    wait: Duration,
    lagging: u32,
}

impl Policy<Call, Response<Body>, Failure> for Backoff {
    type Future = Sleep;

    fn retry(&mut self, _: &mut Call, result: &mut Result<Response<Body>, Failure>) -> Option<Sleep> {
        let asked = match result {
            Ok(reply) if reply.status() == StatusCode::PRECONDITION_FAILED => {
                self.lagging = self.lagging.saturating_add(1);
                if self.lagging > MAX_LAGGING {
                    return None;
                }
                None
            }
            Ok(reply) if reply.status() == StatusCode::TOO_MANY_REQUESTS || reply.status().is_server_error() => {
                retry_after(reply.headers())
            }
            Err(failure) if failure.may_pass() => None,
            Ok(_) | Err(_) => return None,
        };
        let wait = asked.unwrap_or_else(|| jittered(self.wait));
        self.wait = self.wait.saturating_mul(2).min(LONGEST_WAIT);
        // Not worth waiting for: what the caller learns now, with the time to come back, is more than a timeout.
        let again = Instant::now().checked_add(wait)?;
        (again < self.deadline).then(|| tokio::time::sleep_until(again))
    }

    fn clone_request(&mut self, call: &Call) -> Option<Call> {
        Some(call.clone())
    }
}

/// Between half of `wait` and all of it.
pub(super) fn jittered(wait: Duration) -> Duration {
    // Without random numbers the waits are merely not spread.
    // Each hasher of the standard library begins with other keys: enough for jitter, and no file is opened for it.
    let random = u32::try_from(RandomState::new().build_hasher().finish() >> 32).unwrap_or(u32::MAX);
    let half = wait / 2;
    half.saturating_add(half.mul_f64(f64::from(random) / f64::from(u32::MAX)))
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// The limits of a connection, shared by all calls: who is let through next is decided under the lock, the request
/// itself runs outside it.
#[derive(Clone)]
struct Gate(Arc<Mutex<RateLimit<ConcurrencyLimit<Wire>>>>);

impl Service<Call> for Gate {
    type Response = Response<Body>;
    type Error = Failure;
    type Future = BoxFuture<'static, Result<Response<Body>, Failure>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let limits = Arc::clone(&self.0);
        Box::pin(async move {
            let request = limits.lock().await.ready().await?.call(call);
            request.await
        })
    }
}

/// The requests themselves.
#[derive(Clone)]
struct Wire {
    origins: Arc<[Origin]>,
    timeout: Duration,
    max_reply: u64,
}

impl Service<Call> for Wire {
    type Response = Response<Body>;
    type Error = Failure;
    type Future = BoxFuture<'static, Result<Response<Body>, Failure>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let wire = self.clone();
        Box::pin(async move { wire.send(call).await })
    }
}

impl Wire {
    /// Sends a request, to the address and from there only where `redirect_to` allows, with the same path.
    async fn send(&self, call: Call) -> Result<Response<Body>, Failure> {
        let path = call.request.uri().path_and_query().cloned().ok_or(Failure::Unsendable)?;
        let mut origin = self.origins.first().ok_or(Failure::Unsendable)?;
        for _ in 0..=MAX_REDIRECTS {
            let reply = self.once(origin, &call, path.as_str()).await?;
            if !matches!(reply.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(reply);
            }
            let location = reply.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location: Uri = location.and_then(|text| text.parse().ok()).ok_or(Failure::Cut)?;
            if location.authority().is_some() {
                let to = address(&location).unwrap_or_default();
                origin = self
                    .origins
                    .iter()
                    .find(|origin| origin.address == to)
                    .ok_or_else(|| Failure::Redirected(format!("{}, which is not listed", shown(&to))))?;
            }
            if location.path_and_query() != Some(&path) {
                return Err(Failure::Redirected("another path".into()));
            }
        }
        Err(Failure::Redirected("itself again and again".into()))
    }

    async fn once(&self, origin: &Origin, call: &Call, path: &str) -> Result<Response<Body>, Failure> {
        let left = call.deadline.saturating_duration_since(Instant::now()).min(self.timeout);
        let mut headers = call.request.headers().clone();
        if let Some(token) = headers.get_mut("x-vault-token") {
            token.set_sensitive(true);
        }
        let mut reply = origin
            .http
            .request(call.request.method().clone(), format!("{}{path}", origin.base))
            .headers(headers)
            .body(call.request.body().clone())
            .timeout(left)
            .send()
            .await
            .map_err(|error| classify(&error))?;
        let mut body = Body::new();
        let fits = |bytes: usize| u64::try_from(bytes).is_ok_and(|bytes| bytes <= self.max_reply);
        if reply.content_length().is_some_and(|length| length > self.max_reply) {
            return Err(Failure::TooLarge);
        }
        while let Some(chunk) = reply.chunk().await.map_err(|error| classify(&error))? {
            if !fits(body.len().saturating_add(chunk.len())) {
                return Err(Failure::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        let mut response = Response::new(body);
        *response.status_mut() = reply.status();
        *response.headers_mut() = std::mem::take(reply.headers_mut());
        Ok(response)
    }
}

/// One address, with its own HTTP client: the name to expect in the certificate is resolved to the address's host.
struct Origin {
    /// As the platform's file and redirects name it.
    address: String,
    /// As the URL says it, with the certificate's name as host.
    base: String,
    http: reqwest::Client,
}

impl Origin {
    fn new(text: &str, connection: &Connection, tls: &rustls::ClientConfig) -> Option<Self> {
        let uri: Uri = text.parse().ok()?;
        let address = address(&uri)?;
        let mut builder = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .https_only(uri.scheme_str() == Some("https"))
            // No HTTP/2: one cut connection then costs one request, and no frame buffer is shared by many.
            .http1_only()
            .tls_backend_preconfigured(tls.clone())
            .connect_timeout(connection.timeout)
            .pool_idle_timeout(POOL_IDLE);
        let mut base = address.clone();
        if let Some(name) = &connection.server_name {
            let (scheme, port) = (uri.scheme_str()?, address.rsplit_once(':')?.1);
            base = format!("{scheme}://{name}:{port}");
            builder = builder.dns_resolver(Arc::new(HostOf(uri.host()?.trim_matches(['[', ']']).to_owned())));
        }
        Some(Self { address, base, http: builder.build().ok()? })
    }
}

/// `scheme://host:port` in lower case, with the port written out.
fn address(uri: &Uri) -> Option<String> {
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = uri.port_u16().or(match scheme.as_str() {
        "https" => Some(443),
        "http" => Some(80),
        _ => None,
    })?;
    Some(format!("{scheme}://{}:{port}", uri.host()?.to_ascii_lowercase()))
}

/// Resolves any name to the addresses of one host.
struct HostOf(String);

impl Resolve for HostOf {
    fn resolve(&self, _: Name) -> Resolving {
        let host = self.0.clone();
        Box::pin(async move {
            let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// TLS 1.2 or 1.3 with the CAs of the file and no other; `None` if one of them is unusable.
fn tls(ca_pem: &[u8]) -> Option<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem) {
        roots.add(certificate.ok()?).ok()?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
    let config = rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(&versions).ok()?;
    Some(config.with_root_certificates(roots).with_no_client_auth())
}

/// What a failed request means. Looks for TLS's and the system's errors below reqwest's, whose texts name the URL.
fn classify(error: &reqwest::Error) -> Failure {
    let mut at: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut system: Option<std::io::ErrorKind> = None;
    while let Some(cause) = at {
        if let Some(tls) = cause.downcast_ref::<rustls::Error>() {
            return Failure::Untrusted(distrust(tls));
        }
        if cause.to_string() == "dns error" {
            return Failure::Unreachable("its name does not resolve".into());
        }
        at = cause.source();
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            system = Some(io.kind());
            // What an io::Error wraps is not its source but the source's own.
            if let Some(inner) = io.get_ref() {
                at = Some(inner);
            }
        }
    }
    if error.is_timeout() {
        return Failure::Slow;
    }
    if error.is_connect() {
        let why = system.map_or_else(|| "no connection came about".to_owned(), |kind| kind.to_string());
        return Failure::Unreachable(why);
    }
    if error.is_builder() { Failure::Unsendable } else { Failure::Cut }
}

fn distrust(error: &rustls::Error) -> &'static str {
    use rustls::CertificateError as Certificate;
    match error {
        rustls::Error::InvalidCertificate(why) => match why {
            // A CA made anew under its old name shows as a bad signature.
            Certificate::UnknownIssuer | Certificate::BadSignature => {
                "its certificate was signed by another CA than ca_file's"
            }
            Certificate::Expired | Certificate::ExpiredContext { .. } => {
                "its certificate has expired (ca_file is not at fault)"
            }
            Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => "its certificate is not valid yet",
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
                "its certificate is for another name than the address; see server_name"
            }
            _ => "its certificate is not valid",
        },
        rustls::Error::PeerIncompatible(_) => "it speaks no TLS 1.2 or 1.3 with a common cipher",
        rustls::Error::InvalidMessage(_) => "it does not speak TLS",
        _ => "TLS failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_compare_with_their_ports() {
        let of = |text: &str| address(&text.parse().unwrap());
        assert_eq!(of("https://Vault.Example/v1/x").as_deref(), Some("https://vault.example:443"));
        assert_eq!(of("http://127.0.0.1:8200").as_deref(), Some("http://127.0.0.1:8200"));
        assert_eq!(of("https://[::1]:8200").as_deref(), Some("https://[::1]:8200"));
        assert_eq!(of("/v1/x"), None);
    }

    #[test]
    fn jitter_stays_within_its_bounds() {
        for _ in 0..100 {
            let wait = jittered(Duration::from_millis(100));
            assert!((50..=100).contains(&wait.as_millis()), "{wait:?}");
        }
    }

    #[test]
    fn retry_after_in_seconds_only() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(of("3"), Some(Duration::from_secs(3)));
        assert_eq!(of("Wed, 21 Oct 2026 07:28:00 GMT"), None);
        assert_eq!(of("-1"), None);
    }
}

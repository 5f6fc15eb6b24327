//! Vault and OpenBao: which connection, who logs in, what is read, and what of that is shared.
//!
//! With the `kubernetes` method and `share_login: service_account`, pods of one service account share a login and a
//! read that is under way: Vault would answer each the same. A pod whose connection has the `jwt` method, or
//! `share_login: pod`, has a login of its own, which is revoked when its reads are done.

mod auth;
mod client;
pub(super) mod read;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use http::StatusCode;
use tokio::time::Instant;

use self::auth::{Login, LoginKey, Logins, Revoker, Slot, Who};
use self::client::{Client, Reply, jittered};
use self::read::{Place, Reading, Request, Unreadable};
use super::{Blame, SourceError, codes};
use crate::config::{Auth, Config, Connection, Method, Requests, ShareLogin};
use crate::policy::Grant;
use crate::request::files::{Content, Files, Location};
use crate::request::{Publish, VolumeId, shown};
use crate::secret::SecretText;

/// How often a read is tried again that a fresh token may not do: a standby may not know the token yet (platform E).
const FRESH_TRIES: u32 = 3;
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// All connections, each with its client and logins.
#[derive(Default)]
pub(super) struct Connections {
    rooms: Mutex<HashMap<String, Arc<Room>>>,
    revoker: Arc<Revoker>,
}

/// What is to be read, checked against the platform's file: nothing was sent yet.
pub(super) struct Order<'a> {
    connection: &'a Connection,
    who: Who,
    key: Option<LoginKey>,
    volume: VolumeId,
    places: BTreeSet<Place>,
}

impl<'a> Order<'a> {
    /// What `files` needs of Vault; `None` if nothing. All that the platform's file forbids is found here.
    pub(super) fn new(
        grant: &Grant,
        publish: &Publish,
        files: &Files,
        config: &'a Config,
    ) -> Result<Option<Self>, SourceError> {
        let places = places(files);
        if places.is_empty() {
            return Ok(None);
        }
        let pod = grant.pod();
        let platform = |fault| SourceError { fault, blame: Blame::Platform };
        let connection = config.connection(&publish.claim).map_err(|fault| SourceError { fault, blame: Blame::Pod })?;
        let role = connection.role(&publish.claim).map_err(|fault| SourceError { fault, blame: Blame::Pod })?;
        for (path, _) in &places {
            connection.permits(pod, role, path).map_err(platform)?;
        }
        let namespace = connection.namespace.as_ref().map(|text| text.expand(pod)).transpose().map_err(platform)?;
        let token = connection.token(publish).map_err(platform)?;
        let shared =
            connection.auth.method == Method::Kubernetes && connection.share_login == ShareLogin::ServiceAccount;
        let key = shared.then(|| LoginKey {
            namespace: namespace.clone(),
            role: role.to_owned(),
            service_account: (pod.namespace.clone(), pod.service_account.clone(), token.service_account_uid.clone()),
        });
        let who = Who {
            auth: connection.auth.clone(),
            role: role.to_owned(),
            namespace,
            jwt: SecretText::new(token.jwt.expose().to_owned()),
            max_token_ttl: connection.max_token_ttl,
        };
        Ok(Some(Self { connection, who, key, volume: grant.volume().clone(), places }))
    }
}

/// The places that entries and their templates name.
fn places(files: &Files) -> BTreeSet<Place> {
    let mut locations: Vec<&Location> = Vec::new();
    for entry in files.entries() {
        match &entry.content {
            Content::Key(key) => locations.push(&key.location),
            Content::All(location) => locations.push(location),
            Content::Template { with, .. } => locations.extend(with.iter().map(|(_, key)| &key.location)),
        }
    }
    let place = |location: &&Location| match location {
        Location::Secret => None,
        Location::Vault { path, version } => Some((path.clone(), *version)),
    };
    locations.iter().filter_map(place).collect()
}

impl Connections {
    /// Reads all places of an order, or none.
    pub(super) async fn fetch(
        &self,
        order: Order<'_>,
        deadline: Instant,
    ) -> Result<BTreeMap<Place, Arc<Reading>>, SourceError> {
        let room = self.room(order.connection)?;
        let deadline = deadline.min(Instant::now() + client::MAX_RETRYING);
        let slot = order.key.as_ref().map(|key| room.logins.slot(key, &order.volume));
        // A slot of this fetch alone is dropped with it, and its login revoked.
        let slot = slot.unwrap_or_else(|| Arc::new(Slot::new()));
        let reader =
            Reader { room: Arc::clone(&room), revoker: Arc::clone(&self.revoker), slot, who: Arc::new(order.who) };
        let reader = Arc::new(reader);
        let reads = order.places.into_iter().map(|place| {
            let (reader, key) = (Arc::clone(&reader), order.key.clone());
            async move {
                let reading = match key {
                    Some(key) => reader.share(key, place.clone(), deadline).await?,
                    None => reader.read(&place, deadline).await?,
                };
                Ok((place, reading))
            }
        });
        let all = futures_util::future::try_join_all(reads);
        let readings = tokio::time::timeout_at(deadline, all).await.unwrap_or_else(|_| {
            let text = format!("connection \"{}\" did not answer in time", order.connection.name);
            Err(SourceError::new(Blame::Away(None), codes::SLOW, room.client.field("timeout"), text))
        })?;
        Ok(readings.into_iter().collect())
    }

    /// `volume` is gone: gives up and revokes the logins that only it used.
    pub(super) fn forget(&self, volume: &VolumeId) {
        for room in self.rooms.lock().unwrap_or_else(PoisonError::into_inner).values() {
            room.logins.forget(volume);
        }
    }

    /// Revokes what was logged in, until `deadline` at the latest.
    pub(super) async fn close(&self, deadline: Instant) {
        let rooms = std::mem::take(&mut *self.rooms.lock().unwrap_or_else(PoisonError::into_inner));
        for room in rooms.values() {
            room.logins.clear();
        }
        self.revoker.close(deadline).await;
    }

    /// The connection's client and logins, made anew if the platform's file describes it differently now.
    fn room(&self, connection: &Connection) -> Result<Arc<Room>, SourceError> {
        let wiring = Wiring::of(connection);
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(room) = rooms.get(&connection.name)
            && room.wiring == wiring
        {
            return Ok(Arc::clone(room));
        }
        let client = Arc::new(Client::new(connection)?);
        let room = Arc::new(Room { wiring, client, logins: Arc::default(), flights: Mutex::default() });
        if let Some(old) = rooms.insert(connection.name.clone(), Arc::clone(&room)) {
            old.logins.clear();
        }
        Ok(room)
    }
}

/// What a client and its logins were made from.
#[derive(PartialEq)]
struct Wiring {
    address: String,
    redirect_to: Vec<String>,
    ca_pem: Vec<u8>,
    server_name: Option<String>,
    auth: Auth,
    max_token_ttl: Duration,
    timeout: Duration,
    max_reply: u64,
    requests: Requests,
}

impl Wiring {
    fn of(connection: &Connection) -> Self {
        Self {
            address: connection.address.clone(),
            redirect_to: connection.redirect_to.clone(),
            ca_pem: connection.ca_pem.clone(),
            server_name: connection.server_name.clone(),
            auth: connection.auth.clone(),
            max_token_ttl: connection.max_token_ttl,
            timeout: connection.timeout,
            max_reply: connection.max_reply,
            requests: connection.requests,
        }
    }
}

type ReadResult = Result<Arc<Reading>, SourceError>;
type FlightKey = (LoginKey, Place);

/// One connection's client, logins and reads under way.
struct Room {
    wiring: Wiring,
    client: Arc<Client>,
    logins: Arc<Logins>,
    flights: Mutex<HashMap<FlightKey, WeakShared<BoxFuture<'static, ReadResult>>>>,
}

/// Takes a flight off the list when it has landed or nobody waits for it any more: its result is not kept.
struct Landing {
    room: Arc<Room>,
    key: FlightKey,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.room.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Reads for one pod.
struct Reader {
    room: Arc<Room>,
    revoker: Arc<Revoker>,
    slot: Arc<Slot>,
    who: Arc<Who>,
}

impl Reader {
    /// The read of this place that is under way for the same service account, or a new one.
    fn share(
        self: &Arc<Self>,
        key: LoginKey,
        place: Place,
        deadline: Instant,
    ) -> Shared<BoxFuture<'static, ReadResult>> {
        let key = (key, place);
        let mut flights = self.room.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(&key).and_then(WeakShared::upgrade) {
            return flight;
        }
        let landing = Landing { room: Arc::clone(&self.room), key: key.clone() };
        let reader = Arc::clone(self);
        let read = async move {
            let result = reader.read(&landing.key.1, deadline).await;
            drop(landing);
            result
        };
        let flight = read.boxed().shared();
        if let Some(weak) = flight.downgrade() {
            flights.insert(key, weak);
        }
        flight
    }

    async fn read(&self, place: &Place, deadline: Instant) -> ReadResult {
        let client = &self.room.client;
        let (path, version) = place;
        let started = Instant::now();
        let mut refusals = 0;
        let mut wait = FIRST_WAIT;
        while Instant::now() < deadline {
            let login = self.slot.login(client, &self.revoker, &self.who, deadline).await?;
            let Some(token) = login.take() else { continue };
            let method = rustify::enums::RequestMethod::GET;
            let request = Request { method, path: path.as_str().to_owned(), version: *version, body: None };
            let reply = client.call(request, token, self.who.namespace.as_deref(), deadline).await?;
            match reply.status {
                status if status.is_success() => return self.parse(&reply, place, &login, deadline).await,
                StatusCode::NOT_FOUND => return Ok(Arc::new(Reading::Absent(read::parse_absent(&reply.body)))),
                // A token from before this read may have been revoked by someone else.
                StatusCode::FORBIDDEN if login.made() < started => self.slot.retire(&login).await,
                StatusCode::FORBIDDEN if refusals < FRESH_TRIES => {
                    refusals += 1;
                    tokio::time::sleep(jittered(wait)).await;
                    wait = wait.saturating_mul(2);
                }
                StatusCode::FORBIDDEN => {
                    let (role, path) = (shown(&self.who.role), shown(path.as_str()));
                    let text =
                        format!("Vault's policies do not let role \"{role}\" read {path}; grant it \"read\" there");
                    return Err(SourceError::new(Blame::Platform, codes::FORBIDDEN, client.field("auth.role"), text));
                }
                StatusCode::BAD_REQUEST | StatusCode::METHOD_NOT_ALLOWED => {
                    let path = shown(path.as_str());
                    let text = format!("Vault cannot read {path} ({}); is it a path to read?", reply.status.as_u16());
                    return Err(SourceError::new(Blame::Pod, codes::NOT_READABLE, "volumeAttributes.files", text));
                }
                _ => return Err(status(client, &reply, &shown(path.as_str()))),
            }
        }
        let text = format!("{} could not be read in time", shown(path.as_str()));
        Err(SourceError::new(Blame::Away(None), codes::SLOW, client.field("timeout"), text))
    }

    async fn parse(&self, reply: &Reply, place: &Place, login: &Arc<Login>, deadline: Instant) -> ReadResult {
        let fault = match read::parse(&reply.body, place) {
            Ok(reading) => return Ok(Arc::new(reading)),
            Err(fault) => fault,
        };
        if let Unreadable::Leased(lease) = &fault {
            login.revoke_lease(lease, deadline).await;
            self.slot.retire(login).await;
        }
        Err(fault.error(&place.0))
    }
}

/// An error for a status that has no meaning of its own at this request.
fn status(client: &Client, reply: &Reply, what: &str) -> SourceError {
    let number = reply.status.as_u16();
    let field = client.field("address");
    let (blame, code, text) = match reply.status {
        StatusCode::TOO_MANY_REQUESTS => {
            (Blame::Away(reply.retry_after), codes::QUOTA, format!("a quota of Vault's is used up at {what} (429)"))
        }
        StatusCode::SERVICE_UNAVAILABLE => {
            (Blame::Away(reply.retry_after), codes::SEALED, format!("Vault is sealed or not ready at {what} (503)"))
        }
        StatusCode::PRECONDITION_FAILED => {
            (Blame::Away(None), codes::LAGGING, format!("the Vault server that answered {what} lags behind (412)"))
        }
        status if status.is_server_error() => {
            (Blame::Away(reply.retry_after), codes::SERVER_ERROR, format!("Vault failed at {what} ({number})"))
        }
        _ => {
            let text = format!("Vault answered {what} with {number}, which means nothing here: is the address right?");
            (Blame::Platform, codes::STATUS, text)
        }
    };
    SourceError::new(blame, code, field, text)
}

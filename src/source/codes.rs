//! The codes of this room, `SM3xx`: why a fetch gave nothing. Documented in docs/codes.md, never reused.

use crate::request::Code;

/// The Secret or path holds no such key, or the key is null.
pub const MISSING_KEY: Code = Code("SM301");
/// The pod names no Secret, or one without a key, and an entry takes a key of it.
pub const NO_SECRET: Code = Code("SM302");
/// Vault has nothing at this path, or not this version.
pub const NOT_FOUND: Code = Code("SM303");
/// The version was deleted or destroyed.
pub const DELETED: Code = Code("SM304");
/// A value that should be base64 is not.
pub const NOT_BASE64: Code = Code("SM305");
/// A key taken by `#*`, or of a whole Secret, cannot name a file.
pub const BAD_FILE_NAME: Code = Code("SM306");
/// Two entries make the same file, or one makes a file where the other needs a directory.
pub const COLLISION: Code = Code("SM307");
/// `#*` found no key.
pub const NO_KEYS: Code = Code("SM308");
/// A template cannot be read, or uses what templates here do not have.
pub const BAD_TEMPLATE: Code = Code("SM309");
/// A template could not be filled in: an unknown variable, or a value that is no text.
pub const TEMPLATE_FAILED: Code = Code("SM310");
/// More files or bytes than `limits` allows a volume.
pub const OVER_LIMITS: Code = Code("SM311");

/// No connection to Vault came about.
pub const UNREACHABLE: Code = Code("SM320");
/// Vault's certificate is not one the connection trusts.
pub const UNTRUSTED: Code = Code("SM321");
/// No whole reply in time.
pub const SLOW: Code = Code("SM322");
/// The connection broke during the reply.
pub const CUT: Code = Code("SM323");
/// The reply is longer than `max_reply`.
pub const REPLY_TOO_LARGE: Code = Code("SM324");
/// Vault redirects to an address that is not in `redirect_to`.
pub const REDIRECTED: Code = Code("SM325");
/// 429: a quota of Vault's is used up.
pub const QUOTA: Code = Code("SM326");
/// 503: Vault is sealed or not ready.
pub const SEALED: Code = Code("SM327");
/// Another 5xx.
pub const SERVER_ERROR: Code = Code("SM328");
/// A status that has no meaning here.
pub const STATUS: Code = Code("SM329");
/// 412: the server that answered lags behind.
pub const LAGGING: Code = Code("SM330");
/// A role, namespace or CA of the platform file that cannot be used.
pub const UNUSABLE: Code = Code("SM331");

/// Vault refused the login.
pub const LOGIN_REFUSED: Code = Code("SM340");
/// There is no auth method at the connection's mount.
pub const NO_AUTH_METHOD: Code = Code("SM341");
/// The reply to a login holds no token.
pub const NO_VAULT_TOKEN: Code = Code("SM342");
/// The role's tokens live longer than `max_token_ttl`.
pub const TOKEN_TTL: Code = Code("SM343");

/// Vault's policies do not let this role read the path.
pub const FORBIDDEN: Code = Code("SM360");
/// The reply is not what Vault's API describes.
pub const NOT_A_REPLY: Code = Code("SM361");
/// The reply holds no data.
pub const EMPTY_REPLY: Code = Code("SM362");
/// The data is no object.
pub const NOT_AN_OBJECT: Code = Code("SM363");
/// The path makes a new secret with a lease at each read.
pub const LEASED: Code = Code("SM364");
/// A version is asked for where there are none.
pub const NO_VERSIONS: Code = Code("SM365");
/// A value is a string that is no Unicode text.
pub const BAD_VALUE: Code = Code("SM366");
/// The path cannot be read, only written or listed.
pub const NOT_READABLE: Code = Code("SM367");

//! The only types that hold secret bytes. They print nothing, are not cloned, and are wiped on drop.
//!
//! Besides these the whole process frees memory through an allocator that zeroes (`zeroizing-alloc`), since the
//! buffers of TLS, HTTP and protobuf are not ours to wrap.

use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use sha2::Sha256;

/// The bytes of one secret value.
#[allow(missing_debug_implementations)] // a secret's type cannot print itself
pub struct SecretBytes(SecretSlice<u8>);

impl SecretBytes {
    /// Takes the bytes over; the vector's memory is wiped when this is dropped.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(SecretSlice::from(bytes))
    }

    /// The bytes. The one door, so that every use can be found by its name.
    pub fn expose(&self) -> &[u8] {
        self.0.expose_secret()
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.expose().len()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.expose().is_empty()
    }
}

/// A secret that is text: a token, a password.
#[allow(missing_debug_implementations)] // a secret's type cannot print itself
pub struct SecretText(SecretString);

impl SecretText {
    /// Takes the text over; its memory is wiped when this is dropped.
    pub fn new(text: String) -> Self {
        Self(SecretString::from(text))
    }

    /// The text. The one door, so that every use can be found by its name.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

/// A key for [`TagKey::tag`], one a volume, made once by the worker. It is no secret of the application's, but
/// whoever has key and tag can try guesses of the content: so the broker hands out keys, never tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagKey(pub [u8; 32]);

impl TagKey {
    /// A key that nobody can guess; an error only where the kernel has no randomness to give.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut key = [0; 32];
        getrandom::fill(&mut key)?;
        Ok(Self(key))
    }

    /// HMAC-SHA-256 over the sorted names and bytes: the same content has the same tag under one key.
    pub fn tag<'a>(&self, files: impl IntoIterator<Item = (&'a str, &'a SecretBytes)>) -> Tag {
        let mut files: Vec<_> = files.into_iter().collect();
        files.sort_by_key(|(name, _)| *name);
        // A key of any length is taken by HMAC (RFC 2104), so this cannot fail.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return Tag([0; 32]) };
        for (name, bytes) in files {
            for part in [name.as_bytes(), bytes.expose()] {
                mac.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
                mac.update(part);
            }
        }
        Tag(mac.finalize().into_bytes().into())
    }
}

/// What [`TagKey::tag`] gives. Compared by the broker to tell new content from the same bytes fetched again.
#[derive(Clone, Copy, PartialEq, Eq)]
#[allow(missing_debug_implementations)] // a tag and its key allow guessing
pub struct Tag(pub [u8; 32]);

//! The only types that hold secret bytes. They print nothing, are not cloned, and are wiped on drop.
//!
//! Besides these the whole process frees memory through an allocator that zeroes (`zeroizing-alloc`), since the
//! buffers of TLS, HTTP and protobuf are not ours to wrap.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use sha2::Sha256;
use zeroize::Zeroize;

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

/// A secret that is text: a token, a password. In a process that called [`keep_texts_in`] it lies in that arena, which
/// is locked in memory and left out of dumps, as long as a slot is free and long enough.
#[allow(missing_debug_implementations)] // a secret's type cannot print itself
pub struct SecretText(Held);

enum Held {
    Slot { slot: &'static mut [u8], length: usize },
    Heap(SecretString),
}

/// The arena's free slots.
static SLOTS: Mutex<Vec<&'static mut [u8]>> = Mutex::new(Vec::new());

/// The size of one slot, in bytes: a ServiceAccount token has a little over a thousand.
const SLOT: usize = 2048;

/// Gives [`SecretText`] an arena to lie in. Called once, by the worker (`harden::arena`).
pub fn keep_texts_in(arena: &'static mut [u8]) {
    slots().extend(arena.chunks_exact_mut(SLOT));
}

/// A panic elsewhere cannot leave the list half changed.
fn slots() -> MutexGuard<'static, Vec<&'static mut [u8]>> {
    SLOTS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SecretText {
    /// Takes the text over; its memory is wiped when this is dropped, and the given one's at once if it was copied.
    pub fn new(mut text: String) -> Self {
        let length = text.len();
        let slot = if length <= SLOT { slots().pop() } else { None };
        let Some(slot) = slot else { return Self(Held::Heap(SecretString::from(text))) };
        for (to, from) in slot.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        text.zeroize();
        Self(Held::Slot { slot, length })
    }

    /// The text. The one door, so that every use can be found by its name.
    pub fn expose(&self) -> &str {
        match &self.0 {
            // It was text when it was copied, and nobody else has the slot.
            Held::Slot { slot, length } => {
                slot.get(..*length).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
            }
            Held::Heap(text) => text.expose_secret(),
        }
    }
}

impl Drop for SecretText {
    fn drop(&mut self) {
        if let Held::Slot { slot, .. } = &mut self.0 {
            let slot = std::mem::take(slot);
            slot.zeroize();
            slots().push(slot);
        }
    }
}

/// A key for [`TagKey::tag`], one a volume, made once by the worker. It is no secret of the application's, but
/// whoever has key and tag can try guesses of the content: so the broker hands out keys, never tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagKey(pub [u8; 32]);

impl TagKey {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_lie_in_the_arena_while_it_has_room_and_are_wiped_when_dropped() {
        let arena: &'static mut [u8] = Box::leak(vec![0; 2 * SLOT].into_boxed_slice());
        let (start, end) = (arena.as_ptr() as usize, arena.as_ptr() as usize + arena.len());
        keep_texts_in(arena);
        let inside = |text: &SecretText| (start..end).contains(&(text.expose().as_ptr() as usize));
        let long = SecretText::new("x".repeat(SLOT + 1));
        let texts: Vec<_> = ["first", "second", "third"].map(|text| SecretText::new(text.to_owned())).into();
        assert!(!inside(&long) && inside(&texts[0]) && inside(&texts[1]) && !inside(&texts[2]));
        assert_eq!(texts.iter().map(SecretText::expose).collect::<Vec<_>>(), ["first", "second", "third"]);
        drop(texts);
        assert_eq!(slots().len(), 2);
        assert!(slots().iter().all(|slot| slot.iter().all(|byte| *byte == 0)));
    }

    #[test]
    fn a_tag_depends_on_names_bytes_and_key_but_not_on_order() {
        let bytes = |text: &str| SecretBytes::new(text.as_bytes().to_vec());
        let (one, two) = (bytes("1"), bytes("2"));
        let key = TagKey([7; 32]);
        let tag = |key: &TagKey, files: &[(&str, &SecretBytes)]| key.tag(files.iter().copied()).0;
        let first = tag(&key, &[("a", &one), ("b", &two)]);
        assert_eq!(first, tag(&key, &[("b", &two), ("a", &one)]));
        assert_ne!(first, tag(&key, &[("a", &two), ("b", &one)]));
        assert_ne!(first, tag(&TagKey([8; 32]), &[("a", &one), ("b", &two)]));
        let (joined, rest) = (bytes("12"), bytes(""));
        assert_ne!(tag(&key, &[("a", &joined), ("b", &rest)]), tag(&key, &[("a", &one), ("b", &two)]));
    }
}

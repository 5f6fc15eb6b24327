//! The Secret of `nodePublishSecretRef`. The kubelet reads it and brings its data with each call; the driver has no
//! right on Secrets and reads none.

use std::collections::BTreeMap;

use super::{Blame, SourceError, codes};
use crate::request::{FileName, Publish};
use crate::secret::SecretBytes;

/// The Secret's data, or what to do about there being none.
pub(super) fn data(publish: &Publish) -> Result<&BTreeMap<String, SecretBytes>, SourceError> {
    publish.secret.as_ref().ok_or_else(|| {
        let text = "an entry takes a key of the Secret, but the pod names none here, or it is empty; \
                    name one, or write the entry as path#key";
        SourceError::new(Blame::Pod, codes::NO_SECRET, "nodePublishSecretRef", text)
    })
}

/// Every key of the Secret under its own name: what a volume without `files` holds.
pub(super) fn whole(publish: &Publish) -> Result<Vec<(FileName, SecretBytes)>, SourceError> {
    let files = data(publish)?.iter().map(|(key, value)| {
        // The API server lets no key through that is no file name, but this is where one would matter.
        let name = FileName::join(None, key).map_err(|why| {
            let text = format!("a key of the Secret cannot name a file: {why}; pick and rename it with files");
            SourceError::new(Blame::Pod, codes::BAD_FILE_NAME, "nodePublishSecretRef", text)
        })?;
        Ok((name, SecretBytes::new(value.expose().to_vec())))
    });
    files.collect()
}

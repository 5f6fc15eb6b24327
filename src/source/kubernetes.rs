//! The Secret of `nodePublishSecretRef`.

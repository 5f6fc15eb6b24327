//! What the worker knows of itself, for `status` and the probes.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

/// One worker's state.
#[derive(Debug)]
pub struct Health {
    /// How often the broker started the worker again.
    pub worker_restarts: u64,
    /// Whether the kubelet took the driver.
    pub registered: Arc<AtomicBool>,
    config: Mutex<String>,
}

impl Health {
    /// A worker that the kubelet does not know yet.
    pub fn new(worker_restarts: u64) -> Self {
        Self { worker_restarts, registered: Arc::default(), config: Mutex::default() }
    }

    /// Why the newest platform file was not taken; empty if it was.
    pub fn config_fault(&self) -> String {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers what became of the newest platform file.
    pub fn set_config_fault(&self, fault: String) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }
}

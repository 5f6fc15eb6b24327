//! The least work that fetches the same thing: one keep-alive client that sends the requests the driver sends, and
//! does nothing with the replies but check their status.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::{Client, Method};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};

/// A client of one OpenBao.
pub struct Bare {
    http: Client,
    address: String,
    revoked: AtomicU64,
}

impl Bare {
    /// A client with nothing open yet, over the TLS the driver uses.
    pub fn new(address: String, ca_pem: &str) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap()).unwrap();
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let http = Client::builder()
            .no_proxy()
            .tls_backend_preconfigured(tls)
            .timeout(Duration::from_secs(30))
            .build()
            .unwrap();
        Self { http, address, revoked: AtomicU64::new(0) }
    }

    async fn call(&self, method: Method, path: &str, token: &str, body: Option<&Value>) -> Value {
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.address));
        if !token.is_empty() {
            request = request.header("x-vault-token", token);
        }
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        let reply = request.send().await.unwrap().error_for_status().unwrap();
        serde_json::from_slice(&reply.bytes().await.unwrap()).unwrap_or_default()
    }

    /// A login; gives the token.
    pub async fn login(&self, mount: &str, role: &str, jwt: &str) -> String {
        let body = json!({"role": role, "jwt": jwt});
        let reply = self.call(Method::POST, &format!("auth/{mount}/login"), "", Some(&body)).await;
        reply["auth"]["client_token"].as_str().unwrap().to_owned()
    }

    /// A read.
    pub async fn read(&self, token: &str, path: &str) -> Value {
        self.call(Method::GET, path, token, None).await
    }

    /// Ends a token within half a second, at a time that differs from token to token.
    pub fn revoke_later(self: &Arc<Self>, token: String) {
        let client = Arc::clone(self);
        let wait = Duration::from_millis(self.revoked.fetch_add(311, Ordering::Relaxed) % 500);
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            client.call(Method::POST, "auth/token/revoke-self", &token, None).await;
        });
    }
}

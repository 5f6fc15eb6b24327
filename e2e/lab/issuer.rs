//! Signs ServiceAccount tokens as an API server does, and answers TokenReviews about them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::KeyPair;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, UnparsedPublicKey};
use serde_json::{Value, json};

use super::replies::{Reply, Server};
use super::{Authority, Seen};

/// A pod as its tokens name it.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Namespace.
    pub namespace: String,
    /// Pod name.
    pub pod: String,
    /// Pod UID.
    pub pod_uid: String,
    /// Service account.
    pub service_account: String,
    /// Its UID.
    pub service_account_uid: String,
}

/// An API server's token signer: issuer `https://kubernetes.default.svc`, ES256.
pub struct Issuer {
    key: KeyPair,
}

impl Issuer {
    /// A new signer.
    pub fn new() -> Self {
        Self { key: KeyPair::generate().expect("make a key") }
    }

    /// What `jwt_validation_pubkeys` takes.
    pub fn public_key_pem(&self) -> String {
        self.key.public_key_pem()
    }

    /// A token of `pod` for `audience`, valid for an hour.
    pub fn token(&self, pod: &Identity, audience: &str) -> String {
        self.token_for(pod, audience, Duration::from_secs(3600))
    }

    /// A token of `pod` for `audience`.
    pub fn token_for(&self, pod: &Identity, audience: &str, life: Duration) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let claims = json!({
            "iss": "https://kubernetes.default.svc",
            "sub": format!("system:serviceaccount:{}:{}", pod.namespace, pod.service_account),
            "aud": [audience],
            "iat": now,
            "nbf": now.saturating_sub(10),
            "exp": now + life.as_secs(),
            "kubernetes.io": {
                "namespace": pod.namespace,
                "pod": {"name": pod.pod, "uid": pod.pod_uid},
                "serviceaccount": {"name": pod.service_account, "uid": pod.service_account_uid},
            },
        });
        let text = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", text(&json!({"alg": "ES256", "typ": "JWT"})), text(&claims));
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, self.key.serialized_der(), &random);
        let signature = key.expect("a P-256 key").sign(&random, signed.as_bytes()).expect("sign");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    /// What the kubelet hands over under `csi.storage.k8s.io/serviceAccount.tokens`.
    pub fn kubelet_tokens(&self, pod: &Identity, audiences: &[&str]) -> String {
        let expires = SystemTime::now() + Duration::from_secs(3600);
        let expires = jiff::Timestamp::try_from(expires).expect("a time").strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let tokens: BTreeMap<_, _> = audiences
            .iter()
            .map(|audience| (*audience, json!({"token": self.token(pod, audience), "expirationTimestamp": expires})))
            .collect();
        json!(tokens).to_string()
    }

    /// The TokenReview endpoint of an API server that trusts this signer, for OpenBao's `kubernetes` auth method.
    pub fn token_review(self: &Arc<Self>, authority: &Authority) -> Server {
        let issuer = Arc::clone(self);
        Server::start(&authority.server(), move |seen: &Seen| {
            let Ok(review) = serde_json::from_slice::<Value>(&seen.body) else {
                return Reply::status(400);
            };
            let status = issuer.review(&review["spec"]);
            Reply::json(
                201,
                &json!({"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status}),
            )
        })
    }

    fn review(&self, spec: &Value) -> Value {
        let refused = |why: &str| json!({"authenticated": false, "error": why});
        let Some((signed, signature)) = spec["token"].as_str().and_then(|token| token.rsplit_once('.')) else {
            return refused("not a token");
        };
        let signature = URL_SAFE_NO_PAD.decode(signature).unwrap_or_default();
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key_raw());
        if key.verify(signed.as_bytes(), &signature).is_err() {
            return refused("the signature is not ours");
        }
        let claims = signed.split_once('.').map(|(_, claims)| URL_SAFE_NO_PAD.decode(claims).unwrap_or_default());
        let claims: Value = serde_json::from_slice(&claims.unwrap_or_default()).unwrap_or_default();
        let wanted = spec["audiences"].as_array().cloned().unwrap_or_default();
        let granted: Vec<Value> = claims["aud"]
            .as_array()
            .cloned()
            .unwrap_or_default()
            .into_iter()
            .filter(|aud| wanted.contains(aud))
            .collect();
        if granted.is_empty() {
            return refused("token audiences are not among the wanted ones");
        }
        let account = &claims["kubernetes.io"];
        json!({
            "authenticated": true,
            "audiences": granted,
            "user": {
                "username": claims["sub"],
                "uid": account["serviceaccount"]["uid"],
                "groups": ["system:serviceaccounts", "system:authenticated"],
                "extra": {"authentication.kubernetes.io/pod-name": [account["pod"]["name"]]},
            },
        })
    }
}

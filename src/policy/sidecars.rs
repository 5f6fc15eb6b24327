//! Which containers are whose: injected proxies and agents, by the names and images that their injectors give them.

use super::facts::Container;

/// Whose container it is, by the name its injector gives it.
const KNOWN: [(&str, &str); 16] = [
    ("istio-proxy", "Istio"),
    ("istio-init", "Istio"),
    ("istio-validation", "Istio"),
    ("linkerd-proxy", "Linkerd"),
    ("linkerd-init", "Linkerd"),
    ("consul-dataplane", "Consul"),
    ("consul-connect-inject-init", "Consul"),
    ("kuma-sidecar", "Kuma"),
    ("kuma-init", "Kuma"),
    ("envoy", "Envoy"),
    ("envoy-sidecar", "Envoy"),
    ("daprd", "Dapr"),
    ("cloud-sql-proxy", "Cloud SQL"),
    ("cloudsql-proxy", "Cloud SQL"),
    ("vault-agent", "Vault"),
    ("vault-agent-init", "Vault"),
];

/// Whose container it is, if an injector's name says so: `Istio`, `Linkerd`, `Dapr`.
pub fn product(name: &str) -> Option<&'static str> {
    KNOWN.iter().find(|(known, _)| *known == name).map(|(_, product)| *product)
}

/// A container for a message: its name, and whose it is where that is known, for people who did not write it.
pub(super) fn called(container: &Container) -> String {
    match product(&container.name) {
        Some(product) => format!("{} ({product})", container.name),
        None => container.name.clone(),
    }
}

/// Whether a container is a service mesh's proxy, by the names that the injectors give it or by its image: istio,
/// linkerd, consul, kuma, and plain Envoy.
pub(super) fn is_mesh_proxy(container: &Container) -> bool {
    const NAMES: [&str; 6] =
        ["istio-proxy", "linkerd-proxy", "consul-dataplane", "envoy", "envoy-sidecar", "kuma-sidecar"];
    const IMAGES: [&str; 5] = ["proxyv2", "envoy", "consul-dataplane", "kuma-dp", "envoy-distroless"];
    // "registry:5000/istio/proxyv2:1.29@sha256:…" names the repository "registry:5000/istio/proxyv2".
    let image = container.image.split('@').next().unwrap_or_default();
    let (path, name) = image.rsplit_once('/').unwrap_or(("", image));
    let name = name.split(':').next().unwrap_or_default();
    NAMES.contains(&container.name.as_str())
        || IMAGES.contains(&name)
        || (name == "proxy" && path.rsplit('/').next() == Some("linkerd"))
}

//! Which containers are whose: injected proxies and agents, by the names and images that their injectors give them.

use super::Case;
use super::facts::Container;

/// Whose container it is, by the name its injector gives it, and whether it is a mesh's proxy.
const KNOWN: [(&str, &str, bool); 16] = [
    ("istio-proxy", "Istio", true),
    ("istio-init", "Istio", false),
    ("istio-validation", "Istio", false),
    ("linkerd-proxy", "Linkerd", true),
    ("linkerd-init", "Linkerd", false),
    ("consul-dataplane", "Consul", true),
    ("consul-connect-inject-init", "Consul", false),
    ("kuma-sidecar", "Kuma", true),
    ("kuma-init", "Kuma", false),
    ("envoy", "Envoy", true),
    ("envoy-sidecar", "Envoy", true),
    ("daprd", "Dapr", false),
    ("cloud-sql-proxy", "Cloud SQL", false),
    ("cloudsql-proxy", "Cloud SQL", false),
    ("vault-agent", "Vault", false),
    ("vault-agent-init", "Vault", false),
];

/// Whose container it is, if an injector's name says so: `Istio`, `Linkerd`, `Dapr`.
pub fn product(name: &str) -> Option<&'static str> {
    KNOWN.iter().find(|(known, ..)| *known == name).map(|(_, product, _)| *product)
}

/// A container for a message: its name, and whose it is where that is known, for people who did not write it.
pub(super) fn called(container: &Container) -> String {
    match product(&container.name) {
        Some(product) => format!("{} ({product})", container.name),
        None => container.name.clone(),
    }
}

/// Whether a container is a service mesh's proxy, by the names that the injectors give it, by its image (istio,
/// linkerd, consul, kuma, and plain Envoy), or since Istio's injector names it among what it added.
pub(super) fn is_mesh_proxy(case: &Case<'_>, container: &Container) -> bool {
    const IMAGES: [&str; 5] = ["proxyv2", "envoy", "consul-dataplane", "kuma-dp", "envoy-distroless"];
    // "registry:5000/istio/proxyv2:1.29@sha256:…" names the repository "registry:5000/istio/proxyv2".
    let image = container.image.split('@').next().unwrap_or_default();
    let (path, name) = image.rsplit_once('/').unwrap_or(("", image));
    let name = name.split(':').next().unwrap_or_default();
    KNOWN.iter().any(|(known, _, proxy)| *known == container.name && *proxy)
        || IMAGES.contains(&name)
        || (name == "proxy" && path.rsplit('/').next() == Some("linkerd"))
        || case.added_by_istio.contains(container.name.as_str())
}

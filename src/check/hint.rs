//! The change that a finding asks for, as a strategic merge patch of the object, where there is just one.

use serde_json::{Value as Json, json};

use super::manifest::Found;
use super::{Finding, at, text};
use crate::pods::capability;

/// Capabilities that are refused by themselves; SYS_CHROOT only with something else, of which either may go.
const CAPABILITIES: [&str; 6] = ["SM161", "SM162", "SM163", "SM164", "SM165", "SM166"];

/// The patch for one of the findings of an object. What an injector will add is not in the object and cannot be patched
/// there, nor can ephemeral containers.
pub(super) fn of(finding: &Finding, all: &[Finding], object: &Found) -> Option<Json> {
    let field = finding.fault.field.as_str();
    let code = finding.fault.code.0;
    let pod = &object.pod;
    let container = || {
        let (list, rest) = field.strip_prefix("spec.")?.split_once('[')?;
        let index: usize = rest.split_once(']')?.0.parse().ok()?;
        let container = at(pod, &["spec", list])?.get(index).filter(|_| list != "ephemeralContainers")?;
        Some((list, text(container, &["name"])?, container))
    };
    let of_container = |change: Json| {
        let (list, name, _) = container()?;
        Some(json!({"spec": {list: [{"name": name, "securityContext": change}]}}))
    };
    let annotation = |value: Json| {
        let key = field.strip_prefix("metadata.annotations[")?.strip_suffix(']')?;
        Some(json!({"metadata": {"annotations": {key: value}}}))
    };
    let patch = match code {
        _ if finding.waived => return None,
        "SM102" | "SM103" => {
            let index: usize = field.strip_prefix("spec.volumes[")?.split_once(']')?.0.parse().ok()?;
            let name = text(at(pod, &["spec", "volumes"])?.get(index)?, &["name"])?;
            let change = if code == "SM102" { json!({"readOnly": true}) } else { json!({"fsType": null}) };
            json!({"spec": {"volumes": [{"name": name, "csi": change}]}})
        }
        "SM131" => json!({"spec": {"shareProcessNamespace": null}}),
        "SM132" => json!({"spec": {"hostPID": null}}),
        "SM160" => of_container(json!({"privileged": null}))?,
        code if CAPABILITIES.contains(&code) => {
            let (_, _, found) = container()?;
            // A patch replaces the whole list: without all that are refused, or one patch would bring back another's.
            let (list, _) = field.rsplit_once('[')?;
            let refused = |index: &usize| {
                let this = format!("{list}[{index}]");
                let mut refusals = all.iter().filter(|other| other.refuses && other.fault.field == this);
                refusals.any(|other| CAPABILITIES.contains(&other.fault.code.0))
            };
            let added = at(found, &["securityContext", "capabilities", "add"])?.as_array()?;
            let kept: Vec<&Json> =
                added.iter().enumerate().filter(|(index, _)| !refused(index)).map(|(_, name)| name).collect();
            of_container(json!({"capabilities": {"add": kept}}))?
        }
        "SM168" => of_container(json!({"procMount": null}))?,
        // The API server refuses this for a container that is privileged or adds SYS_ADMIN.
        "SM175" if !container().is_some_and(|(.., found)| may_escalate(found)) => {
            of_container(json!({"allowPrivilegeEscalation": false}))?
        }
        "SM191" | "SM192" => annotation(Json::Null)?,
        "SM193" => annotation(json!("REDIRECT"))?,
        _ => return None,
    };
    Some(object.path.iter().rfold(patch, |patch, step| json!({*step: patch})))
}

fn may_escalate(container: &Json) -> bool {
    let added = at(container, &["securityContext", "capabilities", "add"]).and_then(Json::as_array);
    let mut added = added.into_iter().flatten().filter_map(Json::as_str);
    at(container, &["securityContext", "privileged"]) == Some(&Json::Bool(true))
        || added.any(|name| matches!(capability(name).as_str(), "SYS_ADMIN" | "ALL"))
}

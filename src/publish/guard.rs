//! The live guard: a pod that changes under its volumes is judged again, and what breaks the promise by now is told.
//!
//! Nothing is taken away (the promise P3): an event on the pod, a line in the log and a metric say it, once.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::Publisher;
use super::volume::{Volume, locked};
use crate::config::Config;
use crate::policy::facts::PodFacts;
use crate::policy::{self, Warning};
use crate::request::{Fault, PodRef, VolumeId, summary};

/// Changes that come together are looked at together: a pod's start is a dozen of them.
const GATHER: Duration = Duration::from_millis(250);
/// How long until a volume that was being refreshed is looked at again.
const BUSY: Duration = Duration::from_secs(1);

impl Publisher {
    /// Judges the pods of standing volumes again whenever a pod of this node changes. Never ends.
    pub async fn guard(&self) {
        let mut seen = 0;
        loop {
            self.pods.changed(&mut seen).await;
            tokio::time::sleep(GATHER).await;
            while !self.judge_all().await {
                tokio::time::sleep(BUSY).await;
            }
        }
    }

    /// Judges each standing volume whose claim is known; gives whether none was busy.
    async fn judge_all(&self) -> bool {
        let Ok(config) = self.config() else { return true };
        let slots: Vec<_> = locked(&self.slots).iter().map(|(id, slot)| (id.clone(), slot.clone())).collect();
        let mut all = true;
        for (id, slot) in slots {
            // Who holds the lock may have judged before the change.
            let Ok(mut state) = slot.state.try_lock() else {
                all &= !slot.stands();
                continue;
            };
            let Some(volume) = state.as_mut().filter(|volume| volume.claim.is_some()) else { continue };
            if let Some(facts) = self.pods.known(&volume.pod).await {
                self.judge_standing(&id, volume, &facts, &config, None);
                slot.show(&id, state.as_ref());
            }
        }
        all
    }

    /// What the rules, or the platform's file by `fault`, say now of a standing volume's pod is told once, and changes
    /// nothing.
    pub(super) fn judge_standing(
        &self,
        id: &VolumeId,
        volume: &mut Volume,
        facts: &PodFacts,
        config: &Config,
        fault: Option<&Fault>,
    ) {
        let Some(claim) = &volume.claim else { return };
        let (found, codes) = match policy::judge(id, claim, facts, &config.policy, SystemTime::now()) {
            Ok((grant, warnings)) if grant.owner() == volume.owner => {
                volume.grant = Some(grant);
                self.warn(id, &volume.pod, warnings, &mut volume.warned);
                (
                    fault.map(|fault| summary(std::slice::from_ref(fault))),
                    fault.map(|fault| fault.code).into_iter().collect(),
                )
            }
            Ok((grant, _)) => {
                let text = format!(
                    "the owner would be UID {} now, but the volume stands with {}: delete the pod to change it",
                    grant.owner().uid,
                    volume.owner.uid
                );
                (Some(text), Vec::new())
            }
            Err(refusals) => {
                (Some(summary(&refusals)), refusals.iter().map(|refusal| refusal.code).collect::<Vec<_>>())
            }
        };
        if found == volume.refused {
            return;
        }
        for code in codes {
            self.metrics.refusal(code);
        }
        if let Some(text) = &found {
            tracing::warn!(pod = %volume.pod, volume = %id, "would be refused now, and is kept: {text}");
            let note = format!("volume {} would be refused now, and is kept: {text}", id.name);
            self.events.warning(&volume.pod, "SealmountRefused", note);
        }
        volume.refused = found;
    }

    /// Tells the warnings that were not told yet, all in one event; one that a waiver made is counted and logged too.
    pub(super) fn warn(&self, id: &VolumeId, pod: &PodRef, warnings: Vec<Warning>, told: &mut BTreeSet<String>) {
        let new: Vec<Warning> = warnings.into_iter().filter(|warning| told.insert(warning.to_string())).collect();
        for waived in new.iter().filter(|warning| warning.waived) {
            self.metrics.waived(waived.fault.code);
            tracing::warn!(pod = %pod, volume = %id, "{waived}");
        }
        let (waived, plain): (Vec<_>, Vec<_>) = new.into_iter().partition(|warning| warning.waived);
        for (reason, warnings) in [("SealmountWaived", waived), ("SealmountWarning", plain)] {
            let faults: Vec<Fault> = warnings.into_iter().map(|warning| warning.fault).collect();
            if !faults.is_empty() {
                self.events.warning(pod, reason, summary(&faults));
            }
        }
    }
}

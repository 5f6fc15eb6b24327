//! The live guard: a pod that changes under its volumes is judged again, and what breaks the promise by now is told.
//!
//! Nothing is taken away (the promise P3): an event on the pod, a line in the log and a metric say it, once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::volume::{Volume, locked};
use super::{Publisher, interval};
use crate::config::Config;
use crate::policy::facts::PodFacts;
use crate::policy::{self, Warning};
use crate::request::{Code, Fault, PodRef, VolumeId, summary};

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
            while !self.judge_all() {
                tokio::time::sleep(BUSY).await;
            }
        }
    }

    /// Judges each standing volume whose claim is known and whose pod changed; gives whether none was busy.
    fn judge_all(&self) -> bool {
        let Ok(config) = self.config() else { return true };
        let slots: Vec<_> = locked(&self.slots).iter().map(|(id, slot)| (id.clone(), slot.clone())).collect();
        let mut all = true;
        for (id, slot) in slots {
            // Who holds the lock may have judged before the change.
            let Ok(mut state) = slot.state.try_lock() else {
                all = false;
                continue;
            };
            let Some(volume) = state.as_mut() else { continue };
            let Some(facts) = self.pods.known(&volume.pod) else { continue };
            let same =
                |(by, file): &(Arc<PodFacts>, Arc<Config>)| Arc::ptr_eq(by, &facts) && Arc::ptr_eq(file, &config);
            if !volume.judged.as_ref().is_some_and(same) {
                self.judge_standing(&id, volume, &facts, &config);
                slot.show(&id, state.as_ref());
            }
        }
        all
    }

    /// What the rules and the platform's file say now of a standing volume's pod is told once, and changes nothing.
    /// Until a publish after a restart has said what the pod asks for, there is nothing to judge.
    pub(super) fn judge_standing(
        &self,
        id: &VolumeId,
        volume: &mut Volume,
        facts: &Arc<PodFacts>,
        config: &Arc<Config>,
    ) {
        let Some(claim) = &volume.claim else { return };
        volume.judged = Some((Arc::clone(facts), Arc::clone(config)));
        let fault = interval(claim, config).err();
        let (found, codes) = match policy::judge(id, claim, facts, &config.policy, SystemTime::now()) {
            Ok((grant, warnings)) if grant.owner() == volume.owner => {
                volume.grant = Some(grant);
                self.warn(id, &volume.pod, warnings, &mut volume.warned);
                (
                    fault.as_ref().map(|fault| summary(std::slice::from_ref(fault))),
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
    pub(super) fn warn(
        &self,
        id: &VolumeId,
        pod: &PodRef,
        warnings: Vec<Warning>,
        told: &mut BTreeSet<(Code, String)>,
    ) {
        let is_new = |warning: &Warning| told.insert((warning.fault.code, warning.fault.field.clone()));
        let new: Vec<Warning> = warnings.into_iter().filter(is_new).collect();
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

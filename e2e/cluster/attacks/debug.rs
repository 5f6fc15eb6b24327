//! Debug containers, which come to a pod that runs: admission refuses them, and where it is off the live guard tells.

use serde_json::{Value, json};

use super::scene::{APP, COLUMNS, MARKS, NAMESPACE, READY, Scene, app, mount, pod};
use super::table::{self, Got, Row};
use crate::cluster::{Cluster, until};
use crate::images;

const POD: &str = "debugged";

/// One way of debugging: how `kubectl debug` is called, what it may then try, and what refuses it.
struct Way {
    number: u32,
    tried: &'static str,
    name: &'static str,
    args: String,
    custom: Value,
    attack: [&'static str; 2],
    refused: &'static str,
}

fn ways() -> Vec<Way> {
    let mounts: Vec<_> = COLUMNS.iter().map(|it| mount(it)).collect();
    let mounting = json!({"volumeMounts": mounts, "securityContext": {"runAsUser": 0}});
    let as_app = json!({"securityContext": {"runAsUser": APP, "runAsGroup": APP, "capabilities": {"drop": ["ALL"]}}});
    vec![
        Way {
            number: 2,
            tried: "kubectl debug with a volumeMount, root",
            name: "mounting",
            args: "--profile=general".to_owned(),
            custom: mounting,
            attack: ["read", "/run/{}/password"],
            refused: "SM130 spec.ephemeralContainers[0].volumeMounts[2]",
        },
        Way {
            number: 8,
            tried: "kubectl debug --target=app with the app's UID: `/proc/PID/root`",
            name: "targeting",
            args: "--profile=restricted --target=app".to_owned(),
            custom: as_app,
            attack: ["roots", "/run/{}/password"],
            refused: "SM133 spec.ephemeralContainers[0].targetContainerName",
        },
        Way {
            number: 8,
            tried: "kubectl debug --profile=sysadmin: pidfd_getfd from the app, found by its unix socket",
            name: "sysadmin",
            args: "--profile=sysadmin".to_owned(),
            custom: json!({"securityContext": {"runAsUser": 0}}),
            attack: ["peer", "app"],
            refused: "SM160 spec.ephemeralContainers[0].securityContext.privileged",
        },
    ]
}

/// Each way in a pod of its own, in a namespace that admission leaves out; the event of the guard must tell of it.
pub(super) async fn run(cluster: &mut Cluster) -> String {
    let scene = Scene::new(cluster).await;
    let mut rows = Vec::new();
    for way in ways() {
        let name = format!("{POD}-{}", way.name);
        scene.start(&pod(&name, &COLUMNS, None, &[app(&COLUMNS)])).await;
        debug(&scene, NAMESPACE, &name, &way).await.unwrap_or_else(|error| panic!("{}: {error}", way.tried));
        let told = scene.cluster.kube.event(NAMESPACE, &name, way.refused, READY).await;
        assert_eq!(told.reason, "SealmountRefused", "{told:?}");
        until("the debug container runs", READY, async || {
            let pod = scene.cluster.kube.pod(NAMESPACE, &name).await.unwrap_or_default();
            !pod["status"]["ephemeralContainerStatuses"][0]["state"]["running"].is_null()
        })
        .await;
        let mut seen = [Got::Nothing, Got::Nothing, Got::Nothing];
        for (column, got) in seen.iter_mut().enumerate() {
            let [what, argument] = way.attack;
            let mut attack = vec![what.to_owned(), argument.replace("{}", COLUMNS[column])];
            if what == "peer" {
                attack.push(MARKS[column].to_owned());
            }
            let attack: Vec<&str> = attack.iter().map(String::as_str).collect();
            *got = scene.attack(&name, way.name, column, &attack).await;
        }
        let refused = admission(&scene, &way).await;
        rows.push(Row::not_admitted(way.number, way.tried, seen, &refused));
        scene.cluster.kube.delete_pod(NAMESPACE, &name).await;
    }
    table::add(rows)
}

/// `kubectl debug` with a container of our image.
async fn debug(scene: &Scene<'_>, namespace: &str, pod: &str, way: &Way) -> Result<String, String> {
    let file = scene.cluster.dir.join(format!("tmp/{}.json", way.name));
    let mut custom = way.custom.clone();
    custom["imagePullPolicy"] = json!("Never");
    std::fs::write(&file, custom.to_string()).expect("write the container");
    let command = format!(
        "debug -n {namespace} {pod} --image={} --container={} {} --custom={} -- /bin/app pause",
        images::APP,
        way.name,
        way.args,
        file.display()
    );
    scene.cluster.kube.try_run(&command).await
}

/// The same where admission looks: what the API server says.
async fn admission(scene: &Scene<'_>, way: &Way) -> Got {
    let kube = scene.cluster.kube;
    let namespace = format!("admitted-{}", way.name);
    scene.cluster.namespace(&namespace, "privileged").await;
    scene.cluster.secret(&namespace, "db", &[("password", &scene.values[2])]).await;
    let plain = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": POD},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "app", "image": images::APP, "imagePullPolicy": "Never", "command": ["/bin/app", "pause"],
                "securityContext": {"runAsUser": APP}, "volumeMounts": [{"name": "sealed", "mountPath": "/run/sealed"}],
            }],
            "volumes": [
                {"name": "sealed", "csi": {
                    "driver": "csi.sealmount.io", "readOnly": true, "nodePublishSecretRef": {"name": "db"},
                }},
                {"name": "usual", "emptyDir": {}},
                {"name": "native", "secret": {"secretName": "db"}},
            ],
        },
    });
    kube.apply(&namespace, &plain.to_string()).await;
    kube.ready(&namespace, POD, READY).await;
    let got = match debug(scene, &namespace, POD, way).await {
        Ok(_) => Got::Odd(format!("{} was admitted", way.tried)),
        Err(error) if error.contains(way.refused) => Got::Refused(way.refused.to_owned()),
        Err(error) => Got::Odd(error),
    };
    kube.delete_pod(&namespace, POD).await;
    got
}

//! `sealmount check` as people and pipelines call it: the binary, its output and its exit codes.
// A test stops at what is not as it should be.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

/// What a run gave.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn check(args: &[&str], input: &str) -> Ran {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sealmount"))
        .arg("check")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read its input closes it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

/// A pod template as people write it, indented for where it stands.
fn template(indent: usize, change: impl Fn(&str) -> String) -> String {
    let text = "\
metadata:
  labels: {app: api}
spec:
  automountServiceAccountToken: false
  containers:
  - name: app
    image: app:1
    securityContext: {runAsUser: 1000}
    volumeMounts:
    - {name: db, mountPath: /run/db}
  - name: exporter
    image: exporter:1
    securityContext: {runAsUser: 1001, allowPrivilegeEscalation: false}
    volumeMounts: []
  volumes:
  - name: db
    csi:
      driver: csi.sealmount.io
      readOnly: true
      nodePublishSecretRef: {name: db}
";
    let blank = " ".repeat(indent);
    change(text).lines().map(|line| format!("{blank}{line}\n")).collect()
}

fn valid(text: &str) -> String {
    text.to_owned()
}

/// The sidecar mounts it too.
fn shared(text: &str) -> String {
    text.replace("volumeMounts: []", "volumeMounts: [{name: db, mountPath: /db}]")
        .replace("      readOnly: true\n", "      readOnly: true\n      volumeAttributes: {for: app}\n")
}

fn deployment(change: impl Fn(&str) -> String) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: api, namespace: payments}}\nspec:\n  template:\n{}",
        template(4, change)
    )
}

fn json_of(ran: &Ran) -> Value {
    serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

/// Code, line and column of each finding.
fn findings(report: &Value) -> Vec<(String, u64, u64)> {
    let pods = report["pods"].as_array().unwrap();
    let all = pods.iter().flat_map(|pod| pod["findings"].as_array().unwrap());
    all.map(|it| {
        (it["code"].as_str().unwrap().to_owned(), it["line"].as_u64().unwrap(), it["column"].as_u64().unwrap())
    })
    .collect()
}

#[test]
fn every_kind_that_holds_a_pod() {
    let at = |path: &str, indent: usize| {
        let head: String =
            path.split('.').enumerate().map(|(n, step)| format!("{}{step}:\n", "  ".repeat(n))).collect();
        head + &template(indent, shared)
    };
    for (kind, body) in [
        ("Deployment", at("spec.template", 4)),
        ("StatefulSet", at("spec.template", 4)),
        ("DaemonSet", at("spec.template", 4)),
        ("ReplicaSet", at("spec.template", 4)),
        ("ReplicationController", at("spec.template", 4)),
        ("Job", at("spec.template", 4)),
        ("CronJob", at("spec.jobTemplate.spec.template", 8)),
        ("PodTemplate", at("template", 2)),
    ] {
        let ran = check(&["-o", "json", "-"], &format!("kind: {kind}\nmetadata: {{name: x}}\n{body}"));
        assert_eq!(ran.code, 1, "{kind}: {ran:?}");
        let report = json_of(&ran);
        assert_eq!(report["pods"][0]["kind"], kind);
        let [(code, line, _)] = &findings(&report)[..] else { panic!("{kind}: {report:#}") };
        assert_eq!(code, "SM130", "{kind}");
        let text = body.lines().nth(usize::try_from(*line).unwrap() - 3).unwrap();
        assert!(text.contains("mountPath: /db"), "{kind}, line {line}: {text}");
    }
    let pod = format!("kind: Pod\n{}", template(0, shared).replace("  labels: {app: api}", "  name: api"));
    let list = json!({"kind": "List", "items": [{"kind": "Service"}, {"kind": "PodList", "items": [
        {"metadata": {"name": "in"}, "spec": {"containers": [{"name": "a"}]}},
    ]}]});
    for (text, pods, code) in [
        (pod.clone(), 1, 1),
        (format!("---\n# nothing\n---\nkind: ConfigMap\ndata: {{a: 'kind: Pod'}}\n---\n{pod}---\n{pod}"), 2, 1),
        (list.to_string(), 1, 0),
    ] {
        let ran = check(&["-o", "json", "-"], &text);
        assert_eq!((ran.code, json_of(&ran)["pods"].as_array().unwrap().len()), (code, pods), "{ran:?}");
    }
}

#[test]
fn the_text_names_place_code_field_and_change() {
    let ran = check(&["-"], &deployment(shared));
    assert_eq!(ran.code, 1);
    assert!(ran.out.starts_with("stdin:1: Deployment payments/api\n"), "{}", ran.out);
    let line = "stdin:19:24: refused SM130 spec.containers[1].volumeMounts[0]: exporter mounts the volume too; \
                take this mount out; if it reads the files too and has the same UID, name it in for:\n";
    assert!(ran.out.contains(line), "{}", ran.out);
    assert!(ran.out.ends_with("1 pod: 1 refused, 0 with warnings, 0 clean\n"), "{}", ran.out);
    assert!(!ran.out.contains('\u{1b}'), "a pipe has no colours");
    let clean = check(&["-"], &deployment(valid));
    assert_eq!(clean.code, 0, "{clean:?}");
    assert!(
        clean.out.contains("app        yes    Secret db  sealmount  the reader: 0400, its own UID"),
        "{}",
        clean.out
    );
    assert!(clean.out.contains("exporter   no     Secret db  sealmount  not mounted"), "{}", clean.out);
}

#[test]
fn a_warning_is_no_refusal() {
    let same = |text: &str| text.replace("runAsUser: 1001", "runAsUser: 1000");
    let ran = check(&["-"], &deployment(same));
    assert_eq!(ran.code, 0);
    assert!(ran.out.contains(": warning SM150 spec.containers[1].securityContext.runAsUser: exporter runs"), "{ran:?}");
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("platform.yaml");
    fs::write(&config, "version: 1\npolicy: {distinct_uids: true}\n").unwrap();
    let ran = check(&["--config", config.to_str().unwrap(), "-"], &deployment(same));
    assert_eq!(ran.code, 1, "{ran:?}");
    fs::write(
        &config,
        "version: 1\npolicy: {waivers: [{code: SM163, namespace: payments, until: 2999-01-01T00:00:00Z, reason: old}]}\n",
    )
    .unwrap();
    let adding = |text: &str| text.replace("{runAsUser: 1001,", "{runAsUser: 1001, capabilities: {add: [SYS_RAWIO]},");
    let ran = check(&["-o", "json", "--config", config.to_str().unwrap(), "-"], &deployment(adding));
    let waived = &json_of(&ran)["pods"][0]["findings"][0];
    assert_eq!((ran.code, &waived["code"], &waived["waived"]), (0, &json!("SM163"), &json!(true)));
    assert_eq!((&waived["severity"], &waived["patch"]), (&json!("warn"), &Value::Null));
    fs::write(&config, "version: 1\npolicy: {distinct_uid: true}\n").unwrap();
    let ran = check(&["--config", config.to_str().unwrap(), "-"], &deployment(same));
    assert!(ran.code == 2 && ran.err.contains("distinct_uid"), "{ran:?}");
}

#[test]
fn attributes_are_read_as_the_driver_reads_them() {
    let misspelt = |text: &str| shared(text).replace("{for: app}", "{fro: app}");
    let ran = check(&["-o", "json", "-"], &deployment(misspelt));
    let report = json_of(&ran);
    assert_eq!(findings(&report)[0].0, "SM010");
    let message = report["pods"][0]["findings"][0]["message"].as_str().unwrap();
    assert!(message.contains("did you mean \"for\"?"), "{message}");
    let planted = |text: &str| {
        valid(text).replace(
            "      readOnly: true\n",
            "      readOnly: true\n      volumeAttributes: {csi.storage.k8s.io/pod.name: x}\n",
        )
    };
    let ran = check(&["-o", "json", "-"], &deployment(planted));
    assert_eq!(findings(&json_of(&ran)), [("SM005".to_owned(), 25, 29)], "{ran:?}");
}

/// What is asked of Vault under a platform file, in the driver's order: the pod first.
#[test]
fn the_platform_file_is_asked_as_the_driver_asks_it() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("platform.yaml");
    let ca = rcgen::generate_simple_self_signed(vec!["vault.example".to_owned()]).unwrap();
    fs::write(directory.path().join("ca.pem"), ca.cert.pem()).unwrap();
    let platform = |role: &str, paths: &str| {
        let text = format!(
            "version: 1\nconnections:\n  prod:\n    default: true\n    address: https://vault.example:8200\n    \
             ca_file: ca.pem\n    auth: {{method: kubernetes, mount: kubernetes, audience: vault-prod{role}}}\n    \
             allow:\n    - {{namespaces: [payments], service_accounts: [default], roles: [pay], paths: [{paths}], \
             methods: [read]}}\n    refresh: {{default: 30m, min: 1m, max: 1h}}\n"
        );
        fs::write(&config, text).unwrap();
    };
    let asks = |attributes: &'static str, change: fn(&str) -> String| {
        let volume = format!("      readOnly: true\n      volumeAttributes: {{{attributes}}}\n");
        deployment(move |text| {
            let text = change(text).replace("      nodePublishSecretRef: {name: db}\n", "");
            text.replace("      readOnly: true\n      volumeAttributes: {for: app}\n", "      readOnly: true\n")
                .replace("      readOnly: true\n", &volume)
        })
    };
    let seen = |text: &str| {
        let ran = check(&["-o", "json", "--config", config.to_str().unwrap(), "-"], text);
        let report = json_of(&ran);
        let findings = &report["pods"][0]["findings"];
        let first = findings.get(0).map_or((String::new(), String::new(), 0), |it| {
            let text = |name: &str| it[name].as_str().unwrap().to_owned();
            (text("code"), text("field"), it["line"].as_u64().unwrap())
        });
        let reads = report["pods"][0]["access"][0]["reads"].as_bool().unwrap();
        (first.0, first.1, first.2, reads)
    };
    let at =
        |code: &str, name: &str| (code.to_owned(), format!("spec.volumes[db].csi.volumeAttributes.{name}"), 25, false);
    let found = (String::new(), String::new(), 0, true);
    const FILES: &str = "for: app, files: 'p: secret/data/pay/db#p'";
    platform(", role: pay", "secret/data/pay/*");
    assert_eq!(seen(&asks(FILES, valid)), found);
    assert_eq!(seen(&asks("vault: pord, for: app, files: 'p: secret/data/pay/db#p'", valid)), at("SM201", "vault"));
    let far = asks("refresh: 2h, for: app, files: 'p: secret/data/pay/db#p'", valid);
    assert_eq!(seen(&far), at("SM205", "refresh"));
    let other = seen(&asks("for: app, files: 'p: secret/data/other/db#p'", valid));
    assert_eq!((&*other.0, &*other.1, other.2, other.3), ("SM204", "platform file: connections.prod.allow", 25, false));
    assert_eq!(seen(&asks("vault: pord, for: app, files: 'p: secret/data/pay/db#p'", shared)).0, "SM130");
    platform("", "secret/data/pay/*");
    assert_eq!(seen(&asks(FILES, valid)), at("SM203", "role"));
    // No manifest of a Deployment tells the names of its pods.
    platform(", role: pay", "'secret/data/{{ pod.name }}/db'");
    assert_eq!(seen(&asks(FILES, valid)), found);
    assert_eq!(seen(&asks("for: app, files: 'p: secret/data/pay/tls#p'", valid)).0, "SM204");
}

/// The API server asks rule by rule, and says the first that fails.
#[test]
fn several_volumes_are_reported_in_the_order_of_the_rules() {
    let text = "\
kind: Pod
metadata: {name: two}
spec:
  shareProcessNamespace: true
  containers:
  - {name: app, image: a, securityContext: {runAsUser: 1000}, volumeMounts: [{name: a, mountPath: /a}, {name: b, mountPath: /b}]}
  - {name: other, image: a, securityContext: {runAsUser: 1001, privileged: true}, volumeMounts: [{name: b, mountPath: /b}]}
  volumes:
  - {name: a, csi: {driver: csi.sealmount.io, readOnly: true, nodePublishSecretRef: {name: a}}}
  - {name: b, csi: {driver: csi.sealmount.io, nodePublishSecretRef: {name: b}, volumeAttributes: {for: app}}}
";
    let codes = |text: &str| -> Vec<String> {
        findings(&json_of(&check(&["-o", "json", "-"], text))).into_iter().map(|(code, ..)| code).collect()
    };
    assert_eq!(codes(text), ["SM102", "SM130", "SM131", "SM160"]);
    // What the attributes say comes before.
    assert_eq!(codes(&text.replace("{for: app}", "{fro: app}")), ["SM010", "SM131", "SM160"]);
}

#[test]
fn what_cannot_be_read_has_its_place() {
    for (text, place, said) in [
        ("a: [", "stdin:1:4: ", "this is not YAML"),
        ("metadata: {}", "stdin:1:1: ", "no Kubernetes object: it has no kind"),
        ("kind: Deployment\nspec: {}\n", "stdin:2:7: ", "there is no template here"),
        ("kind: Pod\nmetadata: {name: a}\n", "stdin:1:1: ", "a pod has a spec"),
        (
            "kind: Pod\nspec:\n  containers:\n  - {name: a, image: 5}\n",
            "stdin:4:22: ",
            "spec.containers[0].image: expected a string",
        ),
        (
            "kind: Pod\nspec: {containers: [{name: a, securityContext: {runAsUser: x}}]}\n",
            "stdin:2:60: ",
            "runAsUser: expected i64",
        ),
        ("kind: Pod\nspec: {containers: [{name: a, securityContext: {runAsUser: -1}}]}\n", "stdin:2:7: ", "is no UID"),
    ] {
        let ran = check(&["-"], text);
        assert_eq!(ran.code, 2, "{text}: {ran:?}");
        let line = ran.out.lines().find(|line| line.contains("unreadable")).unwrap_or_default();
        assert!(line.starts_with(place) && line.contains(said), "{text}: {line}");
    }
    // What can be read is still judged.
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    file("a.yaml", &deployment(shared));
    file("b.yml", "a: [");
    file("c.txt", "not looked at: [");
    let ran = check(&[directory.path().to_str().unwrap(), "/nonexistent/x.yaml"], "");
    assert_eq!(ran.code, 2);
    assert!(ran.out.contains("SM130") && ran.out.contains("b.yml:1:") && ran.out.contains("/nonexistent/x.yaml: "));
    assert!(!ran.out.contains("c.txt"));
    // One document hides no other.
    let text = format!("a: [\n---\n{}---\nkind: Pod\n---\nb: *c\n---\nmetadata: {{}}\n", deployment(shared));
    for text in [text.clone(), text.replace('\n', "\r\n")] {
        let ran = check(&["-o", "json", "-"], &text);
        let report = json_of(&ran);
        assert_eq!(ran.code, 2);
        assert_eq!(findings(&report), [("SM130".to_owned(), 21, 24)], "{report:#}");
        let lines = report["unreadable"].as_array().unwrap().iter().map(|it| it["line"].as_u64().unwrap());
        assert_eq!(lines.collect::<Vec<_>>(), [1, 30, 32, 34], "{report:#}");
    }
}

#[test]
fn no_value_of_a_manifest_is_printed() {
    let pod =
        |env: &str| format!("kind: Pod\nmetadata: {{name: a}}\nspec: {{containers: [{{name: a, env: {env}}}]}}\n");
    for text in [
        pod("[{name: PASSWORD, value: 87654321}]"),
        pod("[{name: PASSWORD, value: [87654321]}]"),
        pod("'87654321, expected 87654321'"),
        pod("[{name: PASSWORD, value: *87654321}]"),
        pod("[{name: PASSWORD, value: \"87654321}]"),
    ] {
        for output in ["text", "json", "sarif", "github"] {
            let ran = check(&["-o", output, "-"], &text);
            assert_eq!(ran.code, 2, "{ran:?}");
            assert!(!ran.out.contains("87654321") && !ran.err.contains("87654321"), "{text}: {ran:?}");
        }
    }
}

#[test]
fn names_of_a_manifest_are_no_commands() {
    let text = "\
kind: Pod
metadata: {name: \"a\\n::error::forged\\u001b[31m\", namespace: \"b\\r::warning::forged\"}
spec:
  containers:
  - {name: \"::error::forged\", image: a, volumeMounts: [{name: db, mountPath: \"/db\\n::error::forged\"}]}
  - {name: \"c\\n::error::forged\", image: a, volumeMounts: [{name: db, mountPath: /db}]}
  volumes:
  - {name: db, csi: {driver: csi.sealmount.io, readOnly: true, nodePublishSecretRef: {name: \"d\\n::error::forged\"}}}
  - {name: s, secret: {secretName: \"d\\n::error::forged\"}}
---
apiVersion: argoproj.io/v1alpha1
kind: \"R\\n::error::forged\"
metadata: {name: \"r\\n::error::forged\"}
spec: {volumes: [{csi: {driver: csi.sealmount.io}}]}
---
kind: Pod
metadata: {name: \"a\\n::error::forged\"}
spec: 1
";
    for output in ["text", "github"] {
        let ran = check(&["-o", output, "-"], text);
        assert!(ran.out.contains("forged") && !ran.out.contains('\u{1b}') && !ran.out.contains('\r'), "{ran:?}");
        for line in ran.out.lines() {
            assert!(!line.trim_start().starts_with("::error::forged"), "{output}: {line}");
        }
    }
}

#[test]
fn directories_are_searched() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let all = directory.path().to_str().unwrap().to_owned();
    let ran = check(&[&all], "");
    assert!(ran.code == 2 && ran.out.contains("no *.yaml, *.yml or *.json below it"), "{ran:?}");
    fs::create_dir_all(path("base/deep")).unwrap();
    fs::write(path("base/deep/api.yaml"), deployment(shared)).unwrap();
    std::os::unix::fs::symlink(directory.path(), path("base/again")).unwrap();
    // Not of Kubernetes: passed over where nobody named it.
    fs::write(path("values.yaml"), "image: {tag: x}\n").unwrap();
    let ran = check(&["-o", "json", &all], "");
    assert_eq!((ran.code, json_of(&ran)["pods"].as_array().unwrap().len()), (1, 1), "{ran:?}");
    let ran = check(&[path("values.yaml").to_str().unwrap()], "");
    assert!(ran.code == 2 && ran.out.contains("it has no kind"), "{ran:?}");
    // Refused, not cut.
    fs::File::create(path("values.yaml")).unwrap().set_len(64 * 1024 * 1024 + 1).unwrap();
    let ran = check(&[&all], "");
    assert!(ran.code == 2 && ran.out.contains("longer than 64 MiB"), "{ran:?}");
}

#[test]
fn other_kinds_are_named_if_they_use_the_driver() {
    let rollout = deployment(shared)
        .replace("apiVersion: apps/v1\nkind: Deployment", "apiVersion: argoproj.io/v1alpha1\nkind: Rollout");
    let job = deployment(shared)
        .replace("apiVersion: apps/v1\nkind: Deployment", "apiVersion: batch.volcano.sh/v1alpha1\nkind: Job");
    let text = format!("{rollout}---\n{job}---\napiVersion: argoproj.io/v1alpha1\nkind: Rollout\nspec: {{}}\n");
    let ran = check(&["-o", "json", "-"], &text);
    let report = json_of(&ran);
    assert_eq!((ran.code, &report["pods"]), (0, &json!([])), "{ran:?}");
    let lines: Vec<_> = report["unjudged"].as_array().unwrap().iter().map(|it| (&it["kind"], &it["line"])).collect();
    assert_eq!(lines, [(&json!("Rollout"), &json!(1)), (&json!("Job"), &json!(28))]);
    let ran = check(&["-"], &text);
    assert!(ran.out.contains("stdin:1:1: not judged Rollout api: it uses the driver"), "{ran:?}");
    assert!(ran.out.ends_with("0 clean; 2 not judged\n"), "{ran:?}");
    assert!(check(&["-o", "github", "-"], &text).out.starts_with("::notice title=not judged::Rollout api"));
}

#[test]
fn claims_of_a_stateful_set_are_volumes() {
    let text = "\
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: pg}
spec:
  template:
    spec:
      automountServiceAccountToken: false
      containers:
      - {name: pg, image: pg, volumeMounts: [{name: data, mountPath: /data}]}
      - {name: exporter, image: e, volumeMounts: [{name: data, mountPath: /pg}]}
  volumeClaimTemplates:
  - {metadata: {name: data}, spec: {accessModes: [ReadWriteOnce]}}
";
    let ran = check(&["-"], text);
    for line in ["pg         yes    claim data  shared claim  /data", "exporter   yes    claim data  shared claim  /pg"]
    {
        assert!(ran.out.contains(line), "{}", ran.out);
    }
}

#[test]
fn programs_get_json_sarif_and_workflow_commands() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a,b.yaml");
    fs::write(&file, deployment(shared)).unwrap();
    let path = file.to_str().unwrap();
    let report = json_of(&check(&["-o", "json", path], ""));
    assert_eq!((&report["version"], &report["summary"]["refused"]), (&json!(1), &json!(1)));
    let access = report["pods"][0]["access"].as_array().unwrap();
    assert!(access.iter().any(|it| it["container"] == "exporter" && it["reads"] == false), "{access:?}");

    let sarif = json_of(&check(&["-o", "sarif", path], ""));
    let run = &sarif["runs"][0];
    let result = &run["results"][0];
    assert_eq!((&sarif["version"], &result["ruleId"]), (&json!("2.1.0"), &json!("SM130")));
    let region = &result["locations"][0]["physicalLocation"]["region"];
    assert_eq!((&region["startLine"], &region["startColumn"]), (&json!(19), &json!(24)));
    let rules: BTreeSet<_> =
        run["tool"]["driver"]["rules"].as_array().unwrap().iter().map(|rule| rule["id"].as_str().unwrap()).collect();
    assert!(["SM005", "SM130", "SM204"].iter().all(|code| rules.contains(code)), "{rules:?}");
    assert_eq!(run["columnKind"], "unicodeCodePoints");
    let uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].as_str().unwrap();
    assert!(uri.starts_with("file:///") && uri.ends_with("/a%2Cb.yaml"), "{uri}");
    // What is in no file has a name alone.
    let sarif = json_of(&check(&["-o", "sarif", "-"], &deployment(shared)));
    let name = &sarif["runs"][0]["results"][0]["locations"][0]["logicalLocations"][0]["fullyQualifiedName"];
    assert_eq!(name, "Deployment payments/api");
    let ran = check(&["-o", "github", "-"], &deployment(shared));
    assert!(ran.out.starts_with("::error title=SM130::Deployment payments/api: SM130 "), "{}", ran.out);

    let ran = check(&["-o", "github", path], "");
    let line = ran.out.lines().next().unwrap();
    assert!(line.starts_with("::error file="), "{line}");
    let rest = "a%2Cb.yaml,line=19,col=24,title=SM130::Deployment payments/api: SM130 spec.";
    assert!(line.contains(rest), "{line}");
}

#[test]
fn the_proxy_of_a_mesh_is_judged_before_it_is_there() {
    let told = |text: &str| {
        text.replace(
            "  labels: {app: api}\n",
            "  labels: {app: api}\n  annotations:\n    sidecar.istio.io/userVolumeMount: '[{\"name\": \"db\", \"mountPath\": \"/db\"}]'\n",
        )
        .replace("      readOnly: true\n", "      readOnly: true\n      volumeAttributes: {for: app}\n")
    };
    let codes = |args: &[&str], text: &str| -> BTreeSet<String> {
        findings(&json_of(&check(args, text))).into_iter().map(|(code, ..)| code).collect()
    };
    let text = deployment(told);
    assert_eq!(codes(&["-o", "json", "-"], &text), BTreeSet::from(["SM190".to_owned()]));
    for how in ["--istio", "--istio=native", "--istio=plain", "--istio=1.26.2"] {
        let seen = codes(&["-o", "json", how, "-"], &text);
        assert!(seen.is_superset(&BTreeSet::from(["SM130".to_owned(), "SM190".to_owned()])), "{how}: {seen:?}");
    }
    assert_eq!(check(&["--istio=new", "-"], "").code, 2);
    // The same as a recorded pod that was injected.
    let dumping = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/manifests/istio-core-dump-only-annotated.yaml");
    let seen = codes(&["-o", "json", "--istio", dumping.to_str().unwrap()], "");
    assert_eq!(seen, BTreeSet::from(["SM160".to_owned(), "SM161".to_owned()]));
    let ran = check(&["--istio", "-"], &deployment(valid));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("istio-proxy (Istio)  no     Secret db"), "{}", ran.out);
}

#[test]
fn pods_without_this_driver_show_who_reads_what() {
    let text = "\
kind: Pod
metadata: {name: old, annotations: {vault.hashicorp.com/agent-inject: 'true'}}
spec:
  containers:
  - {name: app, image: a, volumeMounts: [{name: s, mountPath: /s}, {name: agent, mountPath: /vault/secrets}]}
  - name: istio-proxy
    image: p
    env: [{name: P, valueFrom: {secretKeyRef: {name: db, key: p}}}]
    volumeMounts: [{name: agent, mountPath: /vault/secrets}, {name: data, mountPath: /data}, {name: own, mountPath: /o}]
  - name: vault-agent
    image: v
    volumeMounts: [{name: agent, mountPath: /vault/secrets}, {name: data, mountPath: /d}, {name: own, mountPath: /o}]
  volumes:
  - {name: s, secret: {secretName: tls}}
  - {name: agent, emptyDir: {medium: Memory}}
  - {name: data, persistentVolumeClaim: {claimName: pgdata}}
  - {name: own, ephemeral: {volumeClaimTemplate: {spec: {accessModes: [ReadWriteOnce]}}}}
";
    let ran = check(&["-o", "json", "-"], text);
    assert_eq!(ran.code, 0, "{ran:?}");
    let report = json_of(&ran);
    let access = report["pods"][0]["access"].as_array().unwrap();
    let has = |container: &str, what: &str, how: &str| {
        access.iter().any(|it| it["container"] == container && it["what"] == what && it["how"] == how)
    };
    assert!(has("app", "Secret tls", "Secret volume"), "{access:#?}");
    assert!(!has("istio-proxy", "Secret tls", "Secret volume"));
    assert!(has("istio-proxy", "Secret db", "env"));
    assert!(has("istio-proxy", "volume agent", "emptyDir of an agent"));
    assert!(has("istio-proxy", "claim pgdata", "shared claim"));
    assert!(has("istio-proxy", "claim own", "shared claim"));
    assert!(has("app", "token of default", "automount"));
}

/// The code and the patch of each finding that has one.
fn patches(args: &[&str], text: &str) -> Vec<(String, Value)> {
    let report = json_of(&check(&[&["-o", "json", "-"], args].concat(), text));
    let findings = report["pods"][0]["findings"].as_array().unwrap().iter();
    let patched = findings.filter(|it| !it["patch"].is_null());
    patched.map(|it| (it["code"].as_str().unwrap().to_owned(), it["patch"].clone())).collect()
}

#[test]
fn a_patch_where_one_change_is_right() {
    let writable = |text: &str| shared(text).replace("      readOnly: true\n", "");
    let ran = check(&["--fix-hint", "-"], &deployment(writable));
    // Of the Deployment, not of its pod. SM130 has two ways out, so no patch.
    let patch = r#"  patch: {"spec":{"template":{"spec":{"volumes":[{"csi":{"readOnly":true},"name":"db"}]}}}}"#;
    assert!(ran.out.contains(patch) && ran.out.matches("patch:").count() == 1, "{}", ran.out);
    let cron = format!(
        "kind: CronJob\nmetadata: {{name: x}}\nspec:\n  jobTemplate:\n    spec:\n      template:\n{}",
        template(8, writable)
    );
    let [(_, patch)] = &patches(&[], &cron)[..] else { panic!("{cron}") };
    let volumes = &patch["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"];
    assert_eq!(volumes, &json!([{"name": "db", "csi": {"readOnly": true}}]));

    // A patch replaces the whole list of capabilities: none may bring back what another takes out.
    let adding = |added: &'static str| {
        move |text: &str| {
            text.replace("{runAsUser: 1001,", &format!("{{runAsUser: 1001, capabilities: {{add: {added}}},"))
        }
    };
    let seen = patches(&[], &deployment(adding("[SYS_PTRACE, CHOWN, SYS_ADMIN, BPF]")));
    let expected = json!({"spec": {"template": {"spec": {"containers": [
        {"name": "exporter", "securityContext": {"capabilities": {"add": ["CHOWN", "BPF"]}}},
    ]}}}});
    assert_eq!(seen, [("SM161".to_owned(), expected.clone()), ("SM162".to_owned(), expected)]);
    // What another rule needs is no patch that the API server refuses.
    let escalating = |rights: &'static str| move |text: &str| text.replace("allowPrivilegeEscalation: false", rights);
    let seen = patches(&[], &deployment(escalating("privileged: false")));
    assert_eq!(seen.iter().map(|(code, _)| &**code).collect::<Vec<_>>(), ["SM175"]);
    // The proxy is no container of the manifest.
    assert_eq!(patches(&["--istio=plain"], &deployment(valid)), []);
    let told = |text: &str| {
        text.replace("  labels: {app: api}\n", "  labels: {app: api}\n  annotations: {sidecar.istio.io/enableCoreDump: 'true', sidecar.istio.io/interceptionMode: TPROXY}\n")
    };
    let seen = patches(&["--istio"], &deployment(told));
    assert_eq!(seen, [], "a refused pod has no warnings");
    let seen = patches(&[], &deployment(told));
    let annotations = |value: Value| json!({"spec": {"template": {"metadata": {"annotations": value}}}});
    assert_eq!(
        seen,
        [
            ("SM192".to_owned(), annotations(json!({"sidecar.istio.io/enableCoreDump": null}))),
            ("SM193".to_owned(), annotations(json!({"sidecar.istio.io/interceptionMode": "REDIRECT"}))),
        ]
    );
    let debugged = "kind: Pod\nmetadata: {name: x}\n".to_owned()
        + &template(0, valid).replace("metadata:\n  labels: {app: api}\n", "")
        + "  ephemeralContainers:\n  - {name: debug, image: d, securityContext: {runAsUser: 5, privileged: true}}\n";
    assert_eq!(patches(&[], &debugged), []);
}

#[test]
fn codes_are_explained() {
    for (code, said) in
        [("SM162", "never waived"), ("sm162", "never waived"), ("SM010", "no such attribute"), ("SM204", "allow")]
    {
        let ran = check(&["--explain", code], "");
        assert!(ran.code == 0 && ran.out.contains(said), "{ran:?}");
    }
    let ran = check(&["--explain", "SM999"], "");
    assert!(ran.code == 2 && ran.err.contains("there is no code SM999"), "{ran:?}");
    let ran = check(&["--rules"], "");
    assert!(ran.out.contains("| `SM130` | another container mounts the volume |"), "{}", ran.out);
    assert_eq!(check(&[], "").code, 2, "nothing to check is wrong usage");
}

#[test]
fn shells_and_man_are_served() {
    let sealmount = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_sealmount")).args(args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        let text = sealmount(&["completions", shell]);
        assert!(text.contains("fix-hint"), "{shell}");
        assert!(!text.contains("kubelet-dir=/"), "{shell}");
    }
    let page = sealmount(&["man"]);
    assert!(page.starts_with(".ie") && page.contains("sealmount\\-check") && page.contains("Exit code"), "{page}");
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let many: String = std::iter::repeat_n(deployment(shared), 2_000).collect::<Vec<_>>().join("---\n");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("many.yaml");
    fs::write(&file, many).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sealmount"))
        .args(["check", file.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    // A report that is lost otherwise was not made.
    let output = Command::new(env!("CARGO_BIN_EXE_sealmount"))
        .args(["check", "--rules"])
        .stdout(fs::File::options().write(true).open("/dev/full").unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

/// Serves one list of pods for each request, and tells the paths that were asked for.
fn api_server(pods: &Value) -> (u16, std::sync::mpsc::Receiver<String>) {
    let body = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods}).to_string();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 8192];
            let read = stream.read(&mut head).unwrap();
            let line = String::from_utf8_lossy(&head[..read]);
            let path = line.split(' ').nth(1).unwrap().split('?').next().unwrap().to_owned();
            let length = body.len();
            let reply = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
                 connection: close\r\n\r\n{body}"
            );
            stream.write_all(reply.as_bytes()).unwrap();
            if tell.send(path).is_err() {
                return;
            }
        }
    });
    (port, told)
}

#[test]
fn a_cluster_is_asked_for_the_namespace_of_the_context() {
    let pod = |name: &str, phase: &str| {
        json!({
            "metadata": {"name": name, "namespace": "payments", "uid": name},
            "spec": {
                "nodeName": "n", "serviceAccountName": "default",
                "containers": [{"name": "app", "image": "a", "volumeMounts": [{"name": "db", "mountPath": "/db"}]}],
                "volumes": [{"name": "db", "csi": {"driver": "csi.sealmount.io", "nodePublishSecretRef": {"name": "db"}}}],
            },
            "status": {"phase": phase},
        })
    };
    let (port, told) = api_server(&json!([pod("ended", "Succeeded"), pod("failed", "Failed"), pod("runs", "Running")]));
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \
         'http://127.0.0.1:{port}'}}}}]\nusers: [{{name: u, user: {{}}}}]\ncontexts: [{{name: c, context: {{cluster: \
         c, user: u, namespace: payments}}}}]\n"
    );
    fs::write(&config, text).unwrap();
    let cluster = ["--cluster", "--kubeconfig", config.to_str().unwrap()];
    for (more, path) in [
        (&[][..], "/api/v1/namespaces/payments/pods"),
        (&["-n", "other"], "/api/v1/namespaces/other/pods"),
        (&["-A"], "/api/v1/pods"),
    ] {
        let ran = check(&[&cluster[..], more, &["-o", "json"]].concat(), "");
        let report = json_of(&ran);
        assert_eq!((ran.code, &report["pods"][0]["name"], &report["pods"][1]), (1, &json!("runs"), &Value::Null));
        assert_eq!(told.recv().unwrap(), path);
    }
    let ran = check(&[&cluster[..], &["--fail-if-used"]].concat(), "");
    assert!(ran.code == 1 && ran.out.ends_with("without it: 1\n  payments/runs\n"), "{ran:?}");
    let ran = check(&[&cluster[..], &["-o", "github"]].concat(), "");
    assert!(ran.out.starts_with("::error title=SM102::Pod payments/runs: SM102 "), "{ran:?}");
}

/// What a terminal of so many columns is shown.
fn on_a_terminal(columns: u16, environment: &[(&str, &str)], file: &Path) -> String {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let size = rustix::termios::Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&terminal, size).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let side = fs::File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sealmount"))
        .args(["check", file.to_str().unwrap()])
        .env_remove("COLUMNS")
        .env_remove("NO_COLOR")
        .env("TERM", "xterm")
        .envs(environment.iter().copied())
        .stdout(side)
        .spawn()
        .unwrap();
    let mut shown = Vec::new();
    // EIO: the other side is closed.
    let _ = fs::File::from(terminal).read_to_end(&mut shown);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    String::from_utf8(shown).unwrap().replace("\r\n", "\n")
}

#[test]
fn a_terminal_has_colours_and_a_width() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("api.yaml");
    fs::write(&file, deployment(shared)).unwrap();
    let row = |shown: &str| shown.lines().find(|line| line.starts_with("  app ")).unwrap().to_owned();
    let shown = on_a_terminal(40, &[], &file);
    assert!(shown.contains("\u{1b}[31mrefused\u{1b}[0m"), "{shown}");
    assert!(row(&shown).chars().count() == 40 && row(&shown).ends_with('…'), "{shown}");
    let shown = on_a_terminal(40, &[("COLUMNS", "50"), ("NO_COLOR", "1")], &file);
    assert!(!shown.contains('\u{1b}') && row(&shown).chars().count() == 50, "{shown}");
    // Nothing is cut where nothing is known.
    let shown = on_a_terminal(0, &[("TERM", "dumb"), ("COLUMNS", "0")], &file);
    assert!(!shown.contains('\u{1b}') && row(&shown).ends_with("the volume is refused"), "{shown}");
}

/// The manifests in the shape of public charts: each says in its head what refuses it, with its field, and what is
/// warned of.
#[test]
fn real_world_manifests_get_their_recorded_verdict() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/manifests");
    let mut files: Vec<PathBuf> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 40, "{} manifests", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let line = |mark: &str| text.lines().find_map(|line| line.strip_prefix(mark)).map(str::trim);
        let expected = line("# expect:").unwrap_or_else(|| panic!("{} records no verdict", file.display()));
        assert!(line("# because:").is_some(), "{} gives no reason", file.display());
        let ran = check(&["-o", "json", file.to_str().unwrap()], "");
        let report = json_of(&ran);
        let pods = report["pods"].as_array().unwrap();
        let mut seen: Vec<String> = Vec::new();
        for finding in pods.iter().flat_map(|pod| pod["findings"].as_array().unwrap()) {
            let (code, field) = (finding["code"].as_str().unwrap(), finding["field"].as_str().unwrap());
            let said = match finding["severity"].as_str().unwrap() {
                "refuse" => format!("{code} {field}"),
                _ => format!("warns {code}"),
            };
            if !seen.contains(&said) {
                seen.push(said);
            }
        }
        let seen = if seen.is_empty() { "none".to_owned() } else { seen.join(", ") };
        let refused = report["summary"]["refused"] != 0;
        if seen != expected || pods.is_empty() || ran.code != i32::from(refused) {
            wrong.push(format!("{}: expected {expected}, saw {seen}, exit {}", file.display(), ran.code));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

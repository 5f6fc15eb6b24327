//! Many volumes, many calls, and the limits of a volume and of the node.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::join_all;
use tonic::Code;

use crate::lab::kubelet::{Kubelet, PodSpec, is_mounted};
use crate::lab::node::{Node, Options};
use crate::secret::{pod, read};

async fn start(args: &[&str], config: &str) -> (Node, Kubelet) {
    let options = args.iter().fold(Options::new(config), |options, arg| options.arg(arg));
    Node::start(options).await
}

fn pods(count: usize) -> Vec<PodSpec> {
    (0..count).map(|index| pod(&format!("many-{index}"))).collect()
}

#[tokio::test]
async fn sixty_four_volumes_at_once_and_one_volume_sixty_four_times() {
    let (node, kubelet) = start(&[], "version: 1\n").await;
    let pods = pods(64);
    pods.iter().for_each(|pod| kubelet.admit(pod));
    for done in join_all(pods.iter().map(|pod| kubelet.publish(pod, "creds"))).await {
        done.unwrap();
    }
    assert_eq!(node.mounts().len(), 64);
    let one = pod("one");
    kubelet.admit(&one);
    for done in join_all((0..64).map(|_| kubelet.publish(&one, "creds"))).await {
        done.unwrap();
    }
    assert_eq!(node.mounts().len(), 65, "a second mount was stacked");
    for done in join_all(pods.iter().chain([&one]).map(|pod| kubelet.unpublish(pod, "creds"))).await {
        done.unwrap();
    }
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_node_full_of_pods() {
    let (node, kubelet) = start(&[], "version: 1\n").await;
    let pods = pods(110);
    for pod in &pods {
        kubelet.admit(pod);
        kubelet.publish(pod, "creds").await.unwrap();
    }
    for pod in &pods {
        assert_eq!(read(&kubelet, pod, "username"), "app");
    }
    let stats = kubelet.stats(&pods[7], "creds").await.unwrap();
    assert!(stats.usage.iter().all(|usage| usage.total >= usage.used && usage.used > 0), "{stats:?}");
    for pod in &pods {
        kubelet.unpublish(pod, "creds").await.unwrap();
    }
    assert_eq!(node.mounts(), Vec::<PathBuf>::new());
    assert_eq!(kubelet.stats(&pods[7], "creds").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn publish_and_unpublish_of_one_volume_race() {
    let (node, kubelet) = start(&[], "version: 1\n").await;
    let kubelet = Arc::new(kubelet);
    let pod = pod("race");
    kubelet.admit(&pod);
    kubelet.prepare(&pod, "creds");
    for round in 0..40 {
        let request = kubelet.request(&pod, "creds");
        let (published, removed) = tokio::join!(kubelet.call_publish(request), async {
            let target_path = kubelet.target(&pod, "creds").to_str().unwrap().to_owned();
            let volume_id = crate::lab::kubelet::handle(&pod, "creds");
            let request = sealmount::csi::proto::csi::NodeUnpublishVolumeRequest { volume_id, target_path };
            kubelet.csi().await.unwrap().node_unpublish_volume(request).await
        });
        removed.unwrap();
        if let Err(status) = published {
            assert_eq!(status.code(), Code::Aborted, "round {round}: {status:?}");
        }
        let target = kubelet.target(&pod, "creds");
        if is_mounted(&target) {
            assert_eq!(read(&kubelet, &pod, "username"), "app");
            assert_eq!(node.mounts().len(), 1);
        } else {
            assert!(!target.exists(), "round {round}: an empty directory is left");
        }
    }
}

#[tokio::test]
async fn a_volume_larger_than_its_limit_is_refused() {
    let (node, kubelet) = start(&[], "version: 1\nlimits: {volume_bytes: 64KiB}\n").await;
    let large = "x".repeat(64 * 1024 + 1);
    let pod = PodSpec::new("large", "node-a").secret("db", &[("k", &large)]);
    kubelet.admit(&pod);
    let status = kubelet.publish(&pod, "creds").await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("volume_bytes"), "{}", status.message());
    assert!(kubelet.is_gone(&pod, "creds"));
    let fits = PodSpec::new("fits", "node-a").secret("db", &[("k", &large[1..])]);
    kubelet.admit(&fits);
    kubelet.publish(&fits, "creds").await.unwrap();
    assert_eq!(node.mounts().len(), 1);
}

#[tokio::test]
async fn the_nodes_budget_is_reached_and_freed() {
    let (node, kubelet) = start(&["--max-node-bytes", "5MiB"], "version: 1\n").await;
    let pods = pods(3);
    pods.iter().for_each(|pod| kubelet.admit(pod));
    kubelet.publish(&pods[0], "creds").await.unwrap();
    kubelet.publish(&pods[1], "creds").await.unwrap();
    let status = kubelet.publish(&pods[2], "creds").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("--max-node-bytes"), "{}", status.message());
    assert_eq!(node.mounts().len(), 2);
    // After an uncertain code the kubelet is sure to unpublish.
    kubelet.unpublish(&pods[2], "creds").await.unwrap();
    kubelet.unpublish(&pods[0], "creds").await.unwrap();
    kubelet.publish(&pods[2], "creds").await.unwrap();
    assert_eq!(read(&kubelet, &pods[2], "username"), "app");
}

#[tokio::test]
async fn content_waits_for_room_in_the_workers_tmpfs() {
    let (node, kubelet) = start(&["--work-bytes", "64KiB"], "version: 1\n").await;
    let value = "v".repeat(30 * 1024);
    let pods: Vec<_> =
        (0..16).map(|index| PodSpec::new(&format!("waits-{index}"), "node-a").secret("db", &[("k", &value)])).collect();
    pods.iter().for_each(|pod| kubelet.admit(pod));
    for done in join_all(pods.iter().map(|pod| kubelet.publish(pod, "creds"))).await {
        done.unwrap();
    }
    assert!(pods.iter().all(|pod| read(&kubelet, pod, "k") == value));
    // What can never fit does not wait.
    let large = PodSpec::new("large", "node-a").secret("db", &[("k", &"v".repeat(65 * 1024))]);
    kubelet.admit(&large);
    let status = kubelet.publish(&large, "creds").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("--work-bytes"), "{}", status.message());
    assert_eq!(node.mounts().len(), 16);
}

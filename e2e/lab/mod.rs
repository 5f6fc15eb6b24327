//! What tests, demo and bench share: the real programs they start and the kubelet they play.

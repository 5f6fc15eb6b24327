//! What tests, demo and bench share: the real programs they start and the kubelet they play.
#![allow(dead_code, unreachable_pub, missing_debug_implementations)] // each of the three uses a part of it

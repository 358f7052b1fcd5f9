//! PROXY headers (proxy-protocol.txt of HAProxy): what a balancer tells us about its client.

pub mod incoming;
mod sender;

pub(crate) use sender::Sender;

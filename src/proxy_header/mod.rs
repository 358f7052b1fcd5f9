//! The PROXY protocol (HAProxy's proxy-protocol.txt): who the client is, said before a connection's first byte. What a balancer
//! tells us, and what we tell a backend that we connect to.

pub mod incoming;
pub(crate) mod outgoing;
mod sender;

pub(crate) use sender::Sender;

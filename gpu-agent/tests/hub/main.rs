//! A hub and its feed against engines with real sockets.

mod engine;
mod feed;
mod support;

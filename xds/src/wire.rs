//! Generated protobuf types: our transcription of the Envoy v3 subset, and our own feed.
//!
//! Made from `xds/proto` by the test `codegen` of the conformance crate and checked in, so that a build needs no
//! protobuf compiler. Nothing outside this crate and the control plane uses them.

include!("wire/tree.rs");

/// All of the above as a `FileDescriptorSet`, for reading and writing protobuf JSON.
pub const DESCRIPTORS: &[u8] = include_bytes!("wire/descriptors.bin");

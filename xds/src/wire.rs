//! Generated protobuf types: our transcription of the Envoy v3 subset, and our own feed.

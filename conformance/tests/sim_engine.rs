//! Is the simulated engine what a client of vLLM 0.32 would take for one? Every recorded exchange it supports is sent
//! to it over a real socket and compared; then its cache, its events and its faults are tested by what they cause.

#[path = "sim_engine/cache.rs"]
mod cache;
#[path = "sim_engine/client.rs"]
mod client;
#[path = "sim_engine/faults.rs"]
mod faults;
#[path = "sim_engine/forms.rs"]
mod forms;
#[path = "sim_engine/json.rs"]
mod json;
#[path = "sim_engine/model_files.rs"]
mod model_files;
#[path = "sim_engine/nixl.rs"]
mod nixl;
#[path = "sim_engine/recordings.rs"]
mod recordings;
#[path = "sim_engine/sglang.rs"]
mod sglang;
#[path = "sim_engine/stored.rs"]
mod stored;
#[path = "sim_engine/trtllm.rs"]
mod trtllm;
#[path = "sim_engine/zmtp.rs"]
mod zmtp;

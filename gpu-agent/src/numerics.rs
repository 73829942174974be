//! What decides an engine's numbers beside program, version and model: types, quantisation, parallelism, as far as it says.
//!
//! A text to compare, in the engine's own words. Where the model's files are is no part of it: an engine that serves
//! other weights under the same name is to be compared with the rest.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Settings in the text of vLLM's `/server_info`.
const VLLM: [&str; 5] = [
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "pipeline_parallel_size",
];
/// Fields of SGLang's `/server_info`.
const SGLANG: [&str; 6] = [
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "tp_size",
    "pp_size",
    "ep_size",
];

/// Of a vLLM: all with `VLLM_SERVER_DEV_MODE=1`, else what its metrics say.
pub(crate) fn of_vllm(server_info: Option<&Bytes>, cache_dtype: Option<&str>) -> String {
    #[derive(Deserialize)]
    struct Info {
        vllm_config: String,
    }
    match server_info.and_then(|body| serde_json::from_slice::<Info>(body).ok()) {
        Some(info) => text(VLLM, |name| {
            setting(&info.vllm_config, name).map(str::to_owned)
        }),
        None => text(["kv_cache_dtype"], |_| cache_dtype.map(str::to_owned)),
    }
}

/// Of an SGLang.
pub(crate) fn of_sglang(server_info: Option<&Bytes>) -> String {
    let info: Map<String, Value> = server_info
        .and_then(|body| serde_json::from_slice(body).ok())
        .unwrap_or_default();
    text(SGLANG, |name| match info.get(name)? {
        Value::String(said) => Some(said.clone()),
        other => Some(other.to_string()),
    })
}

fn text<const N: usize>(names: [&str; N], said: impl Fn(&str) -> Option<String>) -> String {
    let known = names.map(|name| said(name).map(|said| format!("{name}={said}")));
    known.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// The value in `…, NAME=VALUE, …`.
fn setting<'a>(config: &'a str, name: &str) -> Option<&'a str> {
    let begin = format!(" {name}=");
    let at = config.find(&begin)? + begin.len();
    config[at..].split(',').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(path: &str) -> Bytes {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../conformance/fixtures/");
        std::fs::read(format!("{root}{path}")).unwrap().into()
    }

    #[test]
    fn a_recorded_vllm_says_it_where_it_is_asked_and_its_metrics_a_little() {
        let info = recorded("http-vllm-0.32.0/get_server_info.body");
        assert_eq!(
            of_vllm(Some(&info), Some("auto")),
            "dtype=torch.bfloat16 quantization=None kv_cache_dtype=auto tensor_parallel_size=1 pipeline_parallel_size=1"
        );
        let page = recorded("http-vllm-0.32.0/get_metrics.body");
        let figures = crate::load::parse(&String::from_utf8_lossy(&page));
        assert_eq!(
            of_vllm(None, figures.cache_dtype.as_deref()),
            "kv_cache_dtype=auto"
        );
        assert_eq!(of_vllm(Some(&Bytes::from("{}")), None), "");
    }

    #[test]
    fn a_recorded_sglang_says_it() {
        let info = recorded("http-sglang-0.5.23/get_server_info.body");
        assert_eq!(
            of_sglang(Some(&info)),
            "dtype=float32 quantization=null kv_cache_dtype=auto tp_size=1 pp_size=1 ep_size=1"
        );
        assert_eq!(of_sglang(None), "");
    }
}

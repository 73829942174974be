//! The process: from the command line to an exit code.
//!
//! What runs in between is [`Proxy`]'s; this only says with what it starts and when it ends.

use crate::{
    admin::{
        self,
        logging::{LogFormat, LogHandle},
    },
    bootstrap,
    cluster::Clusters,
    discovery::Discovery,
    engines::Watcher,
    feed,
    fleet::Fleet,
    options::{Mode, Options, registrar},
    run::{Proxy, Settings, main_runtime},
    upstream::Pools,
};
use clap::Parser;
use outrigger_filters::{
    kv_index::{self, KvIndex},
    services::Services,
    tokens::{Tokenizers, TokenizersConfig},
};
use outrigger_xds::{
    block_hash::BLOCK_TOKENS_DEFAULT,
    load::{self, Syntax, Unknown},
    resource::bootstrap::Bootstrap,
};
use std::{ffi::OsString, process::ExitCode, sync::Arc, thread, time::Duration};

/// The whole process: reads the command line, serves until told to end. Exit codes: 0 ended well (or the
/// configuration is valid), 1 could not start, 2 the command line is wrong.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match Options::try_parse_from(arguments) {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    if options.envoy.hot_restart_version {
        println!("disabled");
        return ExitCode::SUCCESS;
    }
    let path = options.envoy.log_path.as_deref();
    let served = admin::logging::init_tracing(&options.log_level, LogFormat::Text, path)
        .map_err(|error| vec![format!("the log: {error}")])
        .and_then(|log| serve(&options, log));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(errors) => {
            for error in errors {
                eprintln!("outrigger-proxy: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

fn resources(options: &Options) -> Result<Bootstrap, Vec<String>> {
    let is_written = options.config_path.is_some() || options.envoy.config_yaml.is_some();
    let mut read = if is_written {
        written(options)?
    } else {
        bootstrap::from_options(options)?
    };
    if let Some(node) = &options.node_id {
        read.node.id.clone_from(node);
    }
    if let Some(cluster) = &options.envoy.service_cluster {
        read.node.cluster.clone_from(cluster);
    }
    if let Some(zone) = &options.envoy.service_zone {
        read.node.locality[1].clone_from(zone);
    }
    if read.node.id.is_empty() {
        read.node.id = options.node();
    }
    if is_written {
        return Ok(read);
    }
    // The same checks as a file's.
    load::bootstrap_from_value(load::bootstrap_to_json(&read))
        .map_err(|errors| vec![errors.to_string()])
}

/// The bootstrap of `-c`, with that of `--config-yaml` over it.
fn written(options: &Options) -> Result<Bootstrap, Vec<String>> {
    let mut named = Vec::new();
    let mut texts = Vec::new();
    if let Some(path) = &options.config_path {
        let text = std::fs::read_to_string(path)
            .map_err(|error| vec![format!("{}: {error}", path.display())])?;
        let is_json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        let syntax = if is_json { Syntax::Json } else { Syntax::Yaml };
        named.push(path.display().to_string());
        texts.push((text, syntax));
    }
    if let Some(text) = &options.envoy.config_yaml {
        named.push("--config-yaml".to_owned());
        texts.push((text.clone(), Syntax::Yaml));
    }
    let unknown = if options.envoy.allow_unknown_static_fields {
        Unknown::Counted
    } else {
        Unknown::Refused
    };
    let texts: Vec<(&str, Syntax)> = texts
        .iter()
        .map(|(text, syntax)| (&**text, *syntax))
        .collect();
    load::bootstrap_over(&texts, unknown)
        .map_err(|errors| vec![format!("{}:\n{errors}", named.join(", "))])
}

fn watcher(options: &Options) -> Result<Watcher, Vec<String>> {
    if let Some(agent) = &options.agent {
        let address = crate::options::url(agent, "--agent").map_err(|error| vec![error])?;
        let uri = format!("http://{address}")
            .parse()
            .map_err(|error| vec![format!("--agent {agent}: {error}")])?;
        return Ok(Watcher::elsewhere(Arc::new(feed::AgentSource(uri))));
    }
    if let Some(nats) = &options.nats {
        return Watcher::nats(nats).map_err(|error| vec![error]);
    }
    let key = match &options.engine_api_key_file {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| {
                vec![format!("--engine-api-key-file {}: {error}", path.display())]
            })?;
            Some(text.trim().to_owned())
        }
    };
    Watcher::embedded(key.as_deref(), options.block_tokens).map_err(|error| vec![error])
}

fn serve(options: &Options, log: LogHandle) -> Result<(), Vec<String>> {
    // Before anything is counted.
    crate::metrics::install();
    for flag in options.envoy.without_effect() {
        tracing::warn!(flag, "a flag of Envoy's that has no effect here");
    }
    let register = registrar(options)?;
    let bootstrap = resources(options)?;
    if options.mode == Mode::Validate {
        return validate(&bootstrap, options);
    }
    let concurrency = options
        .concurrency
        .unwrap_or_else(|| thread::available_parallelism().map_or(1, std::num::NonZero::get));
    let watcher = {
        let main = main_runtime().map_err(|error| vec![error.to_string()])?;
        let _guard = main.enter();
        let watcher = watcher(options);
        main.shutdown_background();
        watcher?
    };
    let command_line = serde_json::json!({
        "concurrency": concurrency,
        "config_path": options.config_path,
        "mode": "Serve",
        "drain_time": format!("{}s", options.drain_time_s),
        "service_node": bootstrap.node.id,
        "service_cluster": bootstrap.node.cluster,
        "config_yaml": options.envoy.config_yaml,
        "log_level": options.log_level,
        "log_path": options.envoy.log_path,
        "allow_unknown_static_fields": options.envoy.allow_unknown_static_fields,
        "disable_hot_restart": true,
        "engine": options.engine,
        "peer": options.peer,
    });
    let proxy = Proxy::start(
        bootstrap,
        Settings {
            concurrency,
            watcher,
            block_tokens: options.block_tokens,
            drain_time: options.drain_time(),
            stream_gather: Duration::from_micros(options.stream_gather_us),
            config_cache: options.config_cache.clone(),
            register,
            command_line,
            log: Some(log),
        },
    )?;
    announce(&proxy);
    tell_admin_address(&proxy, options)?;
    proxy
        .wait_for_end()
        .map_err(|error| vec![error.to_string()])?;
    proxy.drain(options.drain_time());
    proxy.stop();
    Ok(())
}

fn validate(bootstrap: &Bootstrap, options: &Options) -> Result<(), Vec<String>> {
    let (listeners, clusters) = check(bootstrap)?;
    let main = main_runtime().map_err(|error| vec![error.to_string()])?;
    let _guard = main.enter();
    watcher(options)?;
    println!("configuration is valid: {listeners} listeners, {clusters} clusters");
    Ok(())
}

/// Checks what starting would check, short of binding sockets, and the files that are referred to. Gives how many
/// listeners and clusters there are.
///
/// # Errors
/// Everything that is wrong.
pub fn check(bootstrap: &Bootstrap) -> Result<(usize, usize), Vec<String>> {
    let main = main_runtime().map_err(|error| vec![error.to_string()])?;
    let _guard = main.enter();
    let index = Arc::new(KvIndex::new(kv_index::Limits::default()));
    let clusters = Clusters::new(
        Fleet::new(index.clone(), BLOCK_TOKENS_DEFAULT),
        Arc::default(),
    );
    let services = Services {
        endpoints: clusters,
        upstream: Arc::new(Pools),
        kv_index: index,
        tokenizers: Arc::new(Tokenizers::new(TokenizersConfig::default())),
        compute: main.handle().clone(),
        migration: Arc::default(),
        token_limits: Arc::default(),
        serving: Arc::default(),
        node_cluster: bootstrap.node.cluster.as_str().into(),
        own_host: None,
        runtime: Arc::default(),
        stat_prefix: Arc::default(),
    };
    let mut discovery = Discovery::new(services, Arc::default(), Arc::default());
    discovery.write(bootstrap.clone())?;
    discovery.look(std::time::Instant::now());
    let problems = discovery.problems();
    if problems.is_empty() {
        Ok(discovery.counts())
    } else {
        Err(problems)
    }
}

fn announce(proxy: &Proxy) {
    for (name, address) in proxy.addresses() {
        tracing::info!(listener = name, %address, "listening");
    }
    if let Some(address) = proxy.admin_address() {
        tracing::info!(%address, "admin");
    }
}

/// `--admin-address-path`, as Envoy's.
fn tell_admin_address(proxy: &Proxy, options: &Options) -> Result<(), Vec<String>> {
    let (Some(path), Some(address)) = (&options.admin_address_path, proxy.admin_address()) else {
        return Ok(());
    };
    // A reader must never see half of it.
    let half = path.with_extension("part");
    std::fs::write(&half, address.to_string())
        .and_then(|()| std::fs::rename(&half, path))
        .map_err(|error| vec![format!("--admin-address-path {}: {error}", path.display())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn who_the_node_is_flags_say_last() {
        let told = "--node-id n --service-cluster c --service-zone z";
        for how in [
            "",
            "--control-plane http://127.0.0.1:1",
            "--config-yaml {\"node\":{\"id\":\"x\",\"cluster\":\"y\",\"locality\":{\"zone\":\"w\"}}}",
        ] {
            let flags = format!("proxy {how} {told}");
            let options = Options::try_parse_from(flags.split_whitespace()).unwrap();
            let node = resources(&options).unwrap().node;
            assert_eq!((&*node.id, &*node.cluster), ("n", "c"), "{how}");
            assert_eq!(node.locality[1], "z", "{how}");
        }
    }
}

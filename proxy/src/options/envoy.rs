//! Envoy's flags, as its operators and pilot-agent give them: those that mean something here, and those that do not.

use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Beside those that the proxy has under the same name.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "As Envoy")]
pub struct EnvoyFlags {
    /// Bootstrap in YAML, laid over that of the file
    #[arg(long, value_name = "YAML", allow_hyphen_values = true, conflicts_with_all = super::OF_A_FILE)]
    pub config_yaml: Option<String>,
    /// Name of the group that this proxy belongs to; overrides the bootstrap's
    #[arg(long, value_name = "NAME")]
    pub service_cluster: Option<String>,
    /// Zone that this proxy runs in; overrides the bootstrap's
    #[arg(long, value_name = "ZONE")]
    pub service_zone: Option<String>,
    /// A field of the bootstrap that nobody knows is counted instead of refused
    #[arg(long)]
    pub allow_unknown_static_fields: bool,
    /// File that the proxy's own log goes to, instead of standard error
    #[arg(long, value_name = "FILE")]
    pub log_path: Option<PathBuf>,
    /// Prints `disabled` and ends: there is no hot restart
    #[arg(long)]
    pub hot_restart_version: bool,
    /// There is no hot restart; anything but 0 would be one
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=0))]
    pub restart_epoch: u32,
    /// There is none
    #[arg(long)]
    pub disable_hot_restart: bool,
    /// A drain begins at once, whatever this says
    #[arg(long, value_enum, value_name = "S")]
    pub drain_strategy: Option<DrainStrategy>,
    #[command(flatten)]
    ignored: Ignored,
}

/// `--drain-strategy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DrainStrategy {
    /// More and more.
    Gradual,
    /// At once.
    Immediate,
}

/// Accepted without effect, which is said in the log.
#[derive(Debug, Clone, Default, Args)]
struct Ignored {
    /// No effect: of hot restart
    #[arg(long, value_name = "N")]
    base_id: Option<u32>,
    /// No effect: of hot restart
    #[arg(long, value_name = "FILE")]
    base_id_path: Option<PathBuf>,
    /// No effect: of hot restart
    #[arg(long)]
    use_dynamic_base_id: bool,
    /// No effect: of hot restart
    #[arg(long, value_name = "S")]
    parent_shutdown_time_s: Option<u32>,
    /// No effect: see `--log-level`
    #[arg(long, value_name = "LIST")]
    component_log_level: Option<String>,
    /// No effect: lines are the proxy's own
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// No effect: both are spoken
    #[arg(long, value_name = "v4|v6")]
    local_address_ip_version: Option<String>,
    /// No effect: access logs are written within a second
    #[arg(long, value_name = "MS")]
    file_flush_interval_msec: Option<u32>,
    /// No effect: as above
    #[arg(long, value_name = "KB")]
    file_flush_min_size_kb: Option<u32>,
    /// No effect: nothing is deprecated
    #[arg(long)]
    skip_deprecated_logs: bool,
    /// No effect: that is the system's to say
    #[arg(long)]
    enable_core_dump: bool,
    /// No effect: see `--concurrency`
    #[arg(long)]
    cpuset_threads: bool,
}

impl EnvoyFlags {
    /// Those that were given and do nothing.
    #[must_use]
    pub fn without_effect(&self) -> Vec<&'static str> {
        let ignored = &self.ignored;
        let all = [
            ("--base-id", ignored.base_id.is_some()),
            ("--base-id-path", ignored.base_id_path.is_some()),
            ("--use-dynamic-base-id", ignored.use_dynamic_base_id),
            (
                "--parent-shutdown-time-s",
                ignored.parent_shutdown_time_s.is_some(),
            ),
            (
                "--component-log-level",
                ignored.component_log_level.is_some(),
            ),
            ("--log-format", ignored.log_format.is_some()),
            (
                "--local-address-ip-version",
                ignored.local_address_ip_version.is_some(),
            ),
            (
                "--file-flush-interval-msec",
                ignored.file_flush_interval_msec.is_some(),
            ),
            (
                "--file-flush-min-size-kb",
                ignored.file_flush_min_size_kb.is_some(),
            ),
            ("--skip-deprecated-logs", ignored.skip_deprecated_logs),
            ("--enable-core-dump", ignored.enable_core_dump),
            ("--cpuset-threads", ignored.cpuset_threads),
            (
                "--drain-strategy gradual",
                self.drain_strategy == Some(DrainStrategy::Gradual),
            ),
        ];
        let given = all.into_iter().filter(|(_, given)| *given);
        given.map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::options::Options;
    use clap::Parser;

    /// As pilot-agent starts Envoy.
    #[test]
    fn the_way_pilot_agent_starts_envoy_is_understood() {
        let given = "envoy -c /etc/bootstrap.json --drain-time-s 45 --drain-strategy immediate \
            --local-address-ip-version v4 --file-flush-interval-msec 1000 --disable-hot-restart \
            --allow-unknown-static-fields -l warning --component-log-level misc:error \
            --config-yaml {} --concurrency 2 --skip-deprecated-logs --enable-core-dump \
            --file-flush-min-size-kb 64";
        let options = Options::try_parse_from(given.split_whitespace()).unwrap();
        assert_eq!(options.drain_time_s, 45);
        assert_eq!(options.concurrency, Some(2));
        assert_eq!(options.log_level, "warning");
        assert!(options.envoy.allow_unknown_static_fields);
        assert_eq!(options.envoy.config_yaml.as_deref(), Some("{}"));
        assert_eq!(
            options.envoy.without_effect(),
            [
                "--component-log-level",
                "--local-address-ip-version",
                "--file-flush-interval-msec",
                "--file-flush-min-size-kb",
                "--skip-deprecated-logs",
                "--enable-core-dump",
            ]
        );
    }

    #[test]
    fn envoys_flags_are_understood_and_a_hot_restart_is_refused() {
        let parse = |given: &str| Options::try_parse_from(given.split_whitespace());
        let options = parse(
            "envoy --config-yaml {} --service-cluster c --service-node n --service-zone z \
             --base-id 3 --restart-epoch 0 --parent-shutdown-time-s 9 --drain-strategy gradual \
             --log-path /tmp/x --log-format %v --mode validate --use-dynamic-base-id",
        )
        .unwrap();
        assert_eq!(options.envoy.service_cluster.as_deref(), Some("c"));
        assert_eq!(options.envoy.service_zone.as_deref(), Some("z"));
        assert_eq!(options.node_id.as_deref(), Some("n"));
        assert_eq!(options.envoy.without_effect().len(), 5);
        assert!(parse("envoy --restart-epoch 1").is_err());
        assert!(parse("envoy --config-yaml {} --engine http://a:1").is_err());
        assert!(parse("envoy").unwrap().envoy.without_effect().is_empty());
    }
}

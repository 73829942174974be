//! Where this process's own log goes and how its level changes while it runs. Not the access log.

use std::{fmt, fs::File, io, path::Path, sync::Mutex};
use tracing_subscriber::{
    EnvFilter, Registry, fmt::writer::BoxMakeWriter, layer::SubscriberExt, reload,
    util::SubscriberInitExt,
};

/// Shape of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The way to the level of a running log.
#[derive(Clone)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogHandle").finish_non_exhaustive()
    }
}

/// Starts the log of this process, on standard error or at the end of a file. `level` is a level or a list of `target=level`, as in
/// `info,h2=warn`; Envoy's names of levels are understood.
///
/// # Errors
/// A level that is not one, a file that cannot be written, or a log that was started before.
pub fn init_tracing(
    level: &str,
    format: LogFormat,
    path: Option<&Path>,
) -> Result<LogHandle, String> {
    let (filter, handle) = reload::Layer::new(parse(level)?);
    let writer = match path {
        None => BoxMakeWriter::new(io::stderr),
        Some(path) => {
            let file = File::options().append(true).create(true).open(path);
            let file = file.map_err(|error| format!("{}: {error}", path.display()))?;
            BoxMakeWriter::new(Mutex::new(file))
        }
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = lines.with_ansi(path.is_none());
    let started = match format {
        LogFormat::Text => tracing_subscriber::registry()
            .with(filter)
            .with(lines)
            .try_init(),
        LogFormat::Json => tracing_subscriber::registry()
            .with(filter)
            .with(lines.json().flatten_event(true))
            .try_init(),
    };
    started.map_err(|error| format!("the log is started already: {error}"))?;
    Ok(LogHandle { filter: handle })
}

impl LogHandle {
    /// Applies directives, or none if `directives` is empty, and gives those in force. A list without a bare level
    /// changes those targets alone.
    ///
    /// # Errors
    /// Directives that are none.
    pub fn set(&self, directives: &str) -> Result<String, String> {
        let current = self
            .filter
            .with_current(ToString::to_string)
            .map_err(|error| error.to_string())?;
        if directives.is_empty() {
            return Ok(current);
        }
        let has_bare_level = directives
            .split(',')
            .any(|directive| !directive.contains('='));
        let wanted = if has_bare_level {
            directives.to_owned()
        } else {
            format!("{current},{directives}")
        };
        let filter = parse(&wanted)?;
        let shown = filter.to_string();
        self.filter
            .reload(filter)
            .map_err(|error| error.to_string())?;
        Ok(shown)
    }
}

fn parse(directives: &str) -> Result<EnvFilter, String> {
    let directives: Vec<String> = directives
        .split(',')
        .map(translate)
        .collect::<Result<_, _>>()?;
    EnvFilter::try_new(directives.join(",")).map_err(|error| format!("no log level: {error}"))
}

/// Envoy's names of levels to ours. Also refuses a bare word that is no level: it would silence everything but a
/// target of that name.
fn translate(directive: &str) -> Result<String, String> {
    let (target, level) = match directive.trim().rsplit_once('=') {
        Some((target, level)) => (Some(target), level),
        None => (None, directive.trim()),
    };
    let level = match level.to_ascii_lowercase().as_str() {
        "warning" | "warn" => "warn",
        "critical" | "error" => "error",
        "trace" => "trace",
        "debug" => "debug",
        "info" => "info",
        "off" => "off",
        _ => {
            return Err(format!(
                "{level:?} is no log level (trace, debug, info, warning, error, off)"
            ));
        }
    };
    Ok(target.map_or_else(|| level.to_owned(), |target| format!("{target}={level}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(level: &str) -> (LogHandle, reload::Layer<EnvFilter, Registry>) {
        let (layer, filter) = reload::Layer::new(parse(level).unwrap());
        (LogHandle { filter }, layer)
    }

    #[test]
    fn levels_change_and_bad_ones_change_nothing() {
        let (handle, _layer) = handle("warning");
        assert_eq!(handle.set("").unwrap(), "warn");
        assert_eq!(handle.set("debug").unwrap(), "debug");
        assert_eq!(handle.set("h2=trace").unwrap(), "h2=trace,debug");
        assert_eq!(
            handle
                .set("h2=critical,outrigger_proxy::admin=info")
                .unwrap(),
            "outrigger_proxy::admin=info,h2=error,debug"
        );
        for bad in ["loud", "h2=loud", "info,,debug", "="] {
            assert!(handle.set(bad).is_err(), "{bad}");
        }
        assert_eq!(
            handle.set("").unwrap(),
            "outrigger_proxy::admin=info,h2=error,debug"
        );
        assert_eq!(handle.set("info").unwrap(), "info");
    }

    #[test]
    fn a_second_log_is_refused() {
        let first = init_tracing("error", LogFormat::Json, None);
        let second = init_tracing("error", LogFormat::Text, None);
        assert!(first.is_err() || second.is_err());
        assert!(second.unwrap_err().contains("started already"));
    }
}

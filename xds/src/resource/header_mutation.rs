//! Headers that routes add to messages and remove from them: `HeaderValueOption` and what stands around it.
//!
//! Values are formats of the access log's operators; whether they are well formed is checked where they are compiled.

use crate::{problems::ConfigErrors, wire::envoy::config::core::v3 as wire};
use wire::header_value_option::HeaderAppendAction;

/// What a route, virtual host, route table or weighted cluster does to headers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeaderMutations {
    /// To requests.
    pub request: Mutations,
    /// To responses.
    pub response: Mutations,
}

/// Removals come first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mutations {
    /// Headers to set.
    pub add: Vec<HeaderToAdd>,
    /// Lower-case names.
    pub remove: Vec<String>,
}

/// `HeaderValueOption`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderToAdd {
    /// Lower-case name.
    pub name: String,
    /// A format.
    pub value: String,
    /// What becomes of a header that is there already.
    pub action: AppendAction,
    /// Set even if its value turns out empty.
    pub keep_empty_value: bool,
}

/// `HeaderAppendAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AppendAction {
    /// One more line.
    #[default]
    AppendIfExistsOrAdd,
    /// It stays as it is.
    AddIfAbsent,
    /// It is replaced.
    OverwriteIfExistsOrAdd,
    /// It is replaced; one that is not there is not added.
    OverwriteIfExists,
}

impl HeaderMutations {
    /// The four fields that a message has for them.
    pub(super) fn read(
        problems: &mut ConfigErrors,
        request: (Vec<wire::HeaderValueOption>, Vec<String>),
        response: (Vec<wire::HeaderValueOption>, Vec<String>),
    ) -> Self {
        let mut part = |of: &str, (add, remove): (Vec<_>, Vec<String>)| {
            let mut names = Vec::with_capacity(remove.len());
            for (index, name) in remove.iter().enumerate() {
                let place = format!("{of}_headers_to_remove[{index}]");
                names.push(header_name(problems, &place, name, "removed"));
            }
            Mutations {
                add: problems.take_all(&format!("{of}_headers_to_add"), add),
                remove: names,
            }
        };
        Self {
            request: part("request", request),
            response: part("response", response),
        }
    }
}

/// A name in lower case; Envoy's words for those that frame or address a message.
fn header_name(problems: &mut ConfigErrors, place: &str, name: &str, what: &str) -> String {
    let name = name.to_ascii_lowercase();
    if name.starts_with(':') || name == "host" {
        problems.add(
            place,
            format!(":-prefixed or host headers may not be {what}"),
        );
    } else if http::HeaderName::try_from(&name).is_err() {
        problems.add(place, format!("'{name}' is no header name"));
    }
    name
}

impl TryFrom<wire::HeaderValueOption> for HeaderToAdd {
    type Error = ConfigErrors;

    fn try_from(wire: wire::HeaderValueOption) -> Result<Self, ConfigErrors> {
        let mut problems = ConfigErrors::default();
        let action = match (wire.append, wire.append_action()) {
            (Some(_), action) if action != HeaderAppendAction::AppendIfExistsOrAdd => {
                problems.add("", "only one of 'append' and 'append_action' may be set");
                AppendAction::default()
            }
            (Some(false), _) | (None, HeaderAppendAction::OverwriteIfExistsOrAdd) => {
                AppendAction::OverwriteIfExistsOrAdd
            }
            (_, HeaderAppendAction::AddIfAbsent) => AppendAction::AddIfAbsent,
            (_, HeaderAppendAction::OverwriteIfExists) => AppendAction::OverwriteIfExists,
            _ => AppendAction::AppendIfExistsOrAdd,
        };
        let Some(header) = wire.header else {
            problems.add("header", "required");
            return problems.finish(None);
        };
        let name = header_name(&mut problems, "header.key", &header.key, "modified");
        problems.finish(Some(Self {
            name,
            value: header.value,
            action,
            keep_empty_value: wire.keep_empty_value,
        }))
    }
}

impl Mutations {
    /// The two fields of a message.
    pub(super) fn show(&self) -> (Vec<wire::HeaderValueOption>, Vec<String>) {
        (
            self.add.iter().map(Into::into).collect(),
            self.remove.clone(),
        )
    }
}

impl From<&HeaderToAdd> for wire::HeaderValueOption {
    fn from(plain: &HeaderToAdd) -> Self {
        let action = match plain.action {
            AppendAction::AppendIfExistsOrAdd => HeaderAppendAction::AppendIfExistsOrAdd,
            AppendAction::AddIfAbsent => HeaderAppendAction::AddIfAbsent,
            AppendAction::OverwriteIfExistsOrAdd => HeaderAppendAction::OverwriteIfExistsOrAdd,
            AppendAction::OverwriteIfExists => HeaderAppendAction::OverwriteIfExists,
        };
        Self {
            header: Some(wire::HeaderValue {
                key: plain.name.clone(),
                value: plain.value.clone(),
            }),
            append: None,
            append_action: action.into(),
            keep_empty_value: plain.keep_empty_value,
        }
    }
}

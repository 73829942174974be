//! Changes to headers (`HeaderMutation`, `HeaderValueOption`), their values plain or format strings.
//!
//! A format string may use what a filter can know: `%REQ(X?Y):N%`, `%RESP(X?Y):N%`, `%RESPONSE_CODE%`,
//! `%RESPONSE_CODE_DETAILS%`, `%PROTOCOL%`, `%ROUTE_NAME%`, `%UPSTREAM_CLUSTER%`, `%UPSTREAM_HOST%`. What is not
//! there is left empty, as in Envoy. Other operators are refused by name.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, uri::PathAndQuery,
};
use serde::Deserialize;
use std::sync::Arc;

/// `envoy.config.common.mutation_rules.v3.HeaderMutation`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HeaderMutation {
    Remove(String),
    Append(HeaderValueOption),
}

/// `envoy.config.core.v3.HeaderValueOption`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HeaderValueOption {
    header: KeyAndValue,
    append: Option<bool>,
    append_action: Option<AppendAction>,
    keep_empty_value: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct KeyAndValue {
    key: String,
    value: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum AppendAction {
    AppendIfExistsOrAdd,
    AddIfAbsent,
    OverwriteIfExistsOrAdd,
    OverwriteIfExists,
}

/// One change, ready to be made.
#[derive(Debug, Clone)]
pub(crate) struct Edit {
    name: HeaderName,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Remove,
    Put {
        value: Template,
        action: AppendAction,
        keep_empty: bool,
    },
}

/// A value: the same each time, or made of pieces.
#[derive(Debug, Clone)]
enum Template {
    Plain(HeaderValue),
    Pieces(Arc<[Piece]>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Request(Field),
    Response(Field),
    Code,
    Details,
    Protocol,
    RouteName,
    Cluster,
    Host,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Field {
    name: String,
    otherwise: Option<String>,
    length_max: usize,
}

/// What is known where a change is made, beside the headers themselves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scene<'a> {
    pub(crate) route_name: &'a str,
    pub(crate) cluster: &'a str,
    pub(crate) side: Side<'a>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Side<'a> {
    Request {
        method: &'a Method,
        uri: &'a Uri,
        version: Version,
    },
    Response {
        status: StatusCode,
        details: &'a str,
        host: &'a str,
    },
}

impl HeaderMutation {
    pub(crate) fn compile(&self) -> Result<Edit, String> {
        match self {
            Self::Remove(name) => Ok(Edit {
                name: header_name(name)?,
                what: What::Remove,
            }),
            Self::Append(option) => option.compile(),
        }
    }
}

impl HeaderValueOption {
    pub(crate) fn compile(&self) -> Result<Edit, String> {
        let name = header_name(&self.header.key)?;
        let action = match (self.append, self.append_action) {
            (Some(_), Some(action)) if action != AppendAction::AppendIfExistsOrAdd => {
                return Err(format!(
                    "header '{name}': both append and append_action are set"
                ));
            }
            (Some(false), _) => AppendAction::OverwriteIfExistsOrAdd,
            (_, action) => action.unwrap_or(AppendAction::AppendIfExistsOrAdd),
        };
        let value = Template::parse(&self.header.value)
            .map_err(|error| format!("header '{name}': {error}"))?;
        Ok(Edit {
            name,
            what: What::Put {
                value,
                action,
                keep_empty: self.keep_empty_value,
            },
        })
    }
}

/// All changes of a list; the error says which one is wrong.
pub(crate) fn compile<'a, T: 'a>(
    field: &str,
    list: impl IntoIterator<Item = &'a T>,
    one: fn(&T) -> Result<Edit, String>,
) -> Result<Vec<Edit>, String> {
    let each = list.into_iter().enumerate();
    each.map(|(index, item)| one(item).map_err(|error| format!("{field}[{index}]: {error}")))
        .collect()
}

fn header_name(name: &str) -> Result<HeaderName, String> {
    if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
        return Err(format!(
            "':'-prefixed or host headers may not be modified: '{name}'"
        ));
    }
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("'{name}' is not a header name"))
}

impl Edit {
    /// Whether it is made of the request, so that it must be [bound](Self::bind) before that is gone.
    pub(crate) fn needs_request(&self) -> bool {
        let What::Put {
            value: Template::Pieces(pieces),
            ..
        } = &self.what
        else {
            return false;
        };
        pieces
            .iter()
            .any(|piece| matches!(piece, Piece::Request(_) | Piece::Protocol))
    }

    /// The same change, with what comes of the request put in.
    pub(crate) fn bind(&self, scene: Scene<'_>, headers: &HeaderMap) -> Self {
        let mut bound = self.clone();
        if let What::Put {
            value: Template::Pieces(pieces),
            ..
        } = &mut bound.what
        {
            *pieces = pieces
                .iter()
                .map(|piece| match piece {
                    Piece::Request(_) | Piece::Protocol => {
                        let mut text = String::new();
                        piece.write(scene, headers, &mut text);
                        Piece::Text(text)
                    }
                    other => other.clone(),
                })
                .collect();
        }
        bound
    }

    /// Makes the change. A value that no header can have is left out.
    pub(crate) fn apply(&self, scene: Scene<'_>, headers: &mut HeaderMap) {
        let What::Put {
            value,
            action,
            keep_empty,
        } = &self.what
        else {
            headers.remove(&self.name);
            return;
        };
        let exists = headers.contains_key(&self.name);
        match action {
            AppendAction::AddIfAbsent if exists => return,
            AppendAction::OverwriteIfExists if !exists => return,
            _ => {}
        }
        let Some(value) = value.render(scene, headers) else {
            return;
        };
        if value.is_empty() && !keep_empty {
            return;
        }
        if *action == AppendAction::AppendIfExistsOrAdd {
            headers.append(self.name.clone(), value);
        } else {
            headers.insert(self.name.clone(), value);
        }
    }
}

impl Template {
    fn parse(text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(start) = rest.find('%') {
            plain.push_str(&rest[..start]);
            rest = &rest[start + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                plain.push('%');
                rest = after;
                continue;
            }
            let end = rest
                .find('%')
                .ok_or_else(|| format!("'{text}': an operator has no end"))?;
            if !plain.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut plain)));
            }
            pieces.push(Piece::parse(&rest[..end])?);
            rest = &rest[end + 1..];
        }
        plain.push_str(rest);
        if pieces.is_empty() {
            return HeaderValue::from_str(&plain)
                .map(Self::Plain)
                .map_err(|_| format!("'{}' cannot be a header value", plain.escape_debug()));
        }
        if !plain.is_empty() {
            pieces.push(Piece::Text(plain));
        }
        Ok(Self::Pieces(pieces.into()))
    }

    fn render(&self, scene: Scene<'_>, headers: &HeaderMap) -> Option<HeaderValue> {
        match self {
            Self::Plain(value) => Some(value.clone()),
            Self::Pieces(pieces) => {
                let mut text = String::new();
                for piece in pieces.iter() {
                    piece.write(scene, headers, &mut text);
                }
                HeaderValue::try_from(text).ok()
            }
        }
    }
}

impl Piece {
    fn parse(operator: &str) -> Result<Self, String> {
        let (name, argument) = match operator.split_once('(') {
            Some((name, argument)) => (name, Some(argument)),
            None => (operator, None),
        };
        Ok(match (name, argument) {
            ("REQ", Some(argument)) => Self::Request(Field::parse(argument)?),
            ("RESP", Some(argument)) => Self::Response(Field::parse(argument)?),
            ("RESPONSE_CODE", None) => Self::Code,
            ("RESPONSE_CODE_DETAILS", None) => Self::Details,
            ("PROTOCOL", None) => Self::Protocol,
            ("ROUTE_NAME", None) => Self::RouteName,
            ("UPSTREAM_CLUSTER", None) => Self::Cluster,
            ("UPSTREAM_HOST", None) => Self::Host,
            _ => return Err(format!("not supported yet in a header value: %{operator}%")),
        })
    }

    fn write(&self, scene: Scene<'_>, headers: &HeaderMap, out: &mut String) {
        match (self, scene.side) {
            (Self::Text(text), _) => out.push_str(text),
            (Self::RouteName, _) => out.push_str(scene.route_name),
            (Self::Cluster, _) => out.push_str(scene.cluster),
            (Self::Request(field), Side::Request { method, uri, .. }) => {
                field.write(|name| value_of(name, method, uri, headers), out);
            }
            (Self::Protocol, Side::Request { version, .. }) => {
                out.push_str(if version == Version::HTTP_2 {
                    "HTTP/2"
                } else {
                    "HTTP/1.1"
                });
            }
            (Self::Response(field), Side::Response { .. }) => {
                field.write(|name| headers.get(name)?.to_str().ok(), out);
            }
            (Self::Code, Side::Response { status, .. }) => out.push_str(status.as_str()),
            (Self::Details, Side::Response { details, .. }) => out.push_str(details),
            (Self::Host, Side::Response { host, .. }) => out.push_str(host),
            // Not known on this side: empty.
            _ => {}
        }
    }
}

impl Field {
    /// `X?Y):N`, after the opening bracket.
    fn parse(argument: &str) -> Result<Self, String> {
        let wrong = || format!("'({argument}' is not (HEADER?OTHER):LENGTH");
        let (names, length) = argument.split_once(')').ok_or_else(wrong)?;
        let length_max = match length.strip_prefix(':') {
            Some(length) => length.parse().map_err(|_| wrong())?,
            None if length.is_empty() => usize::MAX,
            None => return Err(wrong()),
        };
        let mut names = names.split('?').map(str::to_ascii_lowercase);
        Ok(Self {
            name: names
                .next()
                .filter(|name| !name.is_empty())
                .ok_or_else(wrong)?,
            otherwise: names.next(),
            length_max,
        })
    }

    fn write<'a>(&self, find: impl Fn(&str) -> Option<&'a str>, out: &mut String) {
        let found =
            find(&self.name).or_else(|| find(self.otherwise.as_deref().unwrap_or_default()));
        let value = found.unwrap_or_default();
        let end = self.length_max.min(value.len());
        // Header text that became a str is ASCII.
        out.push_str(value.get(..end).unwrap_or(value));
    }
}

/// A request's header, or one of its pseudo-headers.
fn value_of<'a>(
    name: &str,
    method: &'a Method,
    uri: &'a Uri,
    headers: &'a HeaderMap,
) -> Option<&'a str> {
    match name {
        ":method" => Some(method.as_str()),
        ":path" => uri.path_and_query().map(PathAndQuery::as_str),
        ":authority" => uri.authority().map_or_else(
            || headers.get(http::header::HOST)?.to_str().ok(),
            |authority| Some(authority.as_str()),
        ),
        ":scheme" => Some(uri.scheme_str().unwrap_or("http")),
        name => headers.get(name)?.to_str().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(template: &str, headers: &[(&str, &str)]) -> String {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                value.parse().unwrap(),
            );
        }
        let uri: Uri = "/path?q=1".parse().unwrap();
        let scene = Scene {
            route_name: "r",
            cluster: "c",
            side: Side::Request {
                method: &Method::GET,
                uri: &uri,
                version: Version::HTTP_11,
            },
        };
        let rendered = Template::parse(template).unwrap().render(scene, &map);
        rendered.unwrap().to_str().unwrap().to_owned()
    }

    #[test]
    fn format_strings_say_what_a_filter_knows() {
        let headers = [("x-a", "alpha")];
        for (template, expected) in [
            ("plain", "plain"),
            ("100%%", "100%"),
            ("<%REQ(X-A)%>", "<alpha>"),
            ("%REQ(x-a):2%", "al"),
            ("%REQ(x-b?x-a)%", "alpha"),
            ("%REQ(x-b)%", ""),
            (
                "%REQ(:METHOD)% %REQ(:PATH)% %PROTOCOL%",
                "GET /path?q=1 HTTP/1.1",
            ),
            ("%ROUTE_NAME%/%UPSTREAM_CLUSTER%", "r/c"),
            ("%RESPONSE_CODE%", ""),
        ] {
            assert_eq!(value(template, &headers), expected, "{template}");
        }
    }

    #[test]
    fn unknown_operators_are_refused_by_name() {
        let error = Template::parse("%DYNAMIC_METADATA(a:b)%").unwrap_err();
        assert!(error.contains("%DYNAMIC_METADATA(a:b)%"), "{error}");
        assert!(Template::parse("%REQ(x").is_err());
        assert!(Template::parse("a\nb").is_err());
        for name in [":path", "Host", "b d"] {
            assert!(header_name(name).is_err(), "{name}");
        }
    }
}

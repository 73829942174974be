//! Answers "which form must this answer have": the tool call or the JSON that a chat request forces on the engine.
//!
//! As the recordings show: a tool call is text within `<tool_call>`, told as `tool_calls` when it is streamed or whole,
//! and as content when a whole answer was cut inside it. With `tool_choice` `auto` the model never calls. How an answer
//! ends behind a complete call is not recorded: it says `tool_calls`, as vLLM's documentation does.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::api::ApiError;
use super::engine::Engine;
use super::http::Request;
use super::model::{History, mix};
use super::scheduler::Sampling;
use super::schema;

/// What stands behind the arguments of a call.
const CALL_END: &str = "}\n</tool_call>";
/// The schema of a function without parameters, and of `json_object`.
const NO_PARAMETERS: &str = "{}";
const ANY_OBJECT: &str = r#"{"type":"object","required":["answer"]}"#;

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    response_format: Option<Format<'a>>,
    #[serde(borrow)]
    tools: Option<Vec<Tool<'a>>>,
    #[serde(borrow)]
    tool_choice: Option<Choice<'a>>,
}

#[derive(Deserialize)]
struct Format<'a> {
    #[serde(borrow)]
    r#type: Cow<'a, str>,
    #[serde(borrow)]
    json_schema: Option<Named<'a>>,
}

#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    schema: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Tool<'a> {
    #[serde(borrow)]
    function: Function<'a>,
}

#[derive(Deserialize)]
struct Function<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Choice<'a> {
    #[serde(borrow)]
    Word(Cow<'a, str>),
    Named {
        #[serde(borrow)]
        function: ChosenFunction<'a>,
    },
}

#[derive(Deserialize)]
struct ChosenFunction<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
}

/// The form that a request asks for.
pub(crate) enum Form {
    /// Any text.
    Free,
    /// JSON that fits a schema.
    Json(Box<RawValue>),
    /// A call of one of these tools: their names and the schemas of their arguments.
    Call(Vec<(String, Box<RawValue>)>),
}

/// A form filled in for one choice.
#[derive(Default)]
pub(crate) struct Filled {
    /// The tokens to make; any if `None`.
    pub(crate) tokens: Option<Arc<[u32]>>,
    pub(crate) call: Option<Call>,
}

/// Where in the text of a choice its tool call stands.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    id: String,
    name: String,
    /// The first byte behind the name.
    name_end: usize,
    arguments: Range<usize>,
}

/// `tool_calls` of a whole message.
#[derive(Serialize)]
pub(crate) struct ToolCall {
    id: String,
    r#type: &'static str,
    function: FunctionCall,
}

#[derive(Serialize)]
struct FunctionCall {
    name: String,
    arguments: String,
}

/// `tool_calls` of a chunk: the name comes first, arguments in further chunks.
#[derive(Debug, Serialize)]
pub(crate) struct ToolDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    index: usize,
    function: FunctionDelta,
}

#[derive(Debug, Serialize)]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<String>,
}

fn bad(message: &str, param: &str) -> ApiError {
    ApiError::new(400, "BadRequestError", message, Some(param))
}

fn unsupported(what: &str, param: &str) -> ApiError {
    let message = format!(
        "The provided JSON schema contains features not supported by the simulated engine: {what}."
    );
    bad(&message, param)
}

/// The form a chat request asks for.
pub(crate) fn read(request: &Request) -> Result<Form, ApiError> {
    let body: Body<'_> =
        serde_json::from_slice(&request.body).map_err(|error| bad(&error.to_string(), "tools"))?;
    let form = match (read_call(&body)?, body.response_format) {
        (Some(call), _) => call,
        (None, Some(format)) => read_format(&format)?,
        (None, None) => Form::Free,
    };
    let (schemas, param): (Vec<&RawValue>, _) = match &form {
        Form::Free => (Vec::new(), ""),
        Form::Json(schema) => (vec![schema], "response_format"),
        Form::Call(tools) => (tools.iter().map(|(_, schema)| &**schema).collect(), "tools"),
    };
    for schema in schemas {
        schema::check(schema).map_err(|what| unsupported(&what, param))?;
    }
    Ok(form)
}

fn read_call(body: &Body<'_>) -> Result<Option<Form>, ApiError> {
    let tools = body.tools.as_deref().unwrap_or_default();
    let choice = body.tool_choice.as_ref();
    if tools.is_empty() {
        let missing = "When using `tool_choice`, `tools` must be set.";
        return match choice {
            Some(Choice::Word(word)) if *word == "none" => Ok(None),
            Some(_) => Err(bad(missing, "tool_choice")),
            None => Ok(None),
        };
    }
    let chosen: Vec<_> = match choice {
        None => return Ok(None),
        Some(Choice::Word(word)) => match &**word {
            "none" | "auto" => return Ok(None),
            "required" => tools.iter().collect(),
            _ => {
                let message =
                    "`tool_choice` must be a named tool, \"auto\", \"none\" or \"required\".";
                return Err(bad(message, "tool_choice"));
            }
        },
        Some(Choice::Named { function }) => tools
            .iter()
            .filter(|tool| tool.function.name == function.name)
            .take(1)
            .collect(),
    };
    if chosen.is_empty() {
        let message =
            "The tool specified in `tool_choice` does not match any of the specified `tools`";
        return Err(bad(message, "tool_choice"));
    }
    let tool = |tool: &Tool<'_>| {
        let schema = tool.function.parameters.map(ToOwned::to_owned);
        let schema = schema.unwrap_or_else(|| raw(NO_PARAMETERS));
        // Arguments are an object, whether their schema says so or not.
        let object = if schema.get() == NO_PARAMETERS {
            raw(r#"{"type":"object"}"#)
        } else {
            schema
        };
        (tool.function.name.clone().into_owned(), object)
    };
    Ok(Some(Form::Call(chosen.into_iter().map(tool).collect())))
}

fn read_format(format: &Format<'_>) -> Result<Form, ApiError> {
    match &*format.r#type {
        "text" => Ok(Form::Free),
        "json_object" => Ok(Form::Json(raw(ANY_OBJECT))),
        "json_schema" => match format.json_schema.as_ref().and_then(|named| named.schema) {
            Some(schema) => Ok(Form::Json(schema.to_owned())),
            None => Err(bad(
                "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
                "response_format",
            )),
        },
        other => Err(ApiError::not_implemented(&format!(
            "the response format {other}"
        ))),
    }
}

fn raw(text: &str) -> Box<RawValue> {
    RawValue::from_string(text.to_owned()).expect("invariant: a constant is JSON")
}

impl Form {
    /// Fills the form in, by the tokens of the prompt and what makes this sample its own.
    pub(crate) fn fill(
        &self,
        engine: &Engine,
        prompt: &[u32],
        sampling: &Sampling,
        index: usize,
    ) -> Result<Filled, ApiError> {
        let salt = sampling.salt(engine.default_seed(), index);
        let bits = mix(History::of(prompt).hash() ^ salt);
        let word = |bits| {
            let token = engine.model.word(bits);
            engine.tokenizer.decode(&[token]).trim_start().to_owned()
        };
        let (text, call) = match self {
            Self::Free => return Ok(Filled::default()),
            Self::Json(schema) => {
                let text = schema::write(schema, bits, &word)
                    .map_err(|what| unsupported(&what, "response_format"))?;
                (text, None)
            }
            Self::Call(tools) => {
                let (name, schema) = &tools[(bits % tools.len() as u64) as usize];
                let arguments = schema::write(schema, mix(bits), &word)
                    .map_err(|what| unsupported(&what, "tools"))?;
                let quoted = serde_json::Value::from(name.as_str());
                let mut text = format!("<tool_call>\n{{\"name\": {quoted}");
                let name_end = text.len();
                text.push_str(", \"arguments\": ");
                let start = text.len();
                text.push_str(&arguments);
                let call = Call {
                    id: format!("chatcmpl-tool-{}", engine.made_up_id()),
                    name: name.clone(),
                    name_end,
                    arguments: start..text.len(),
                };
                text.push_str(CALL_END);
                (text, Some(call))
            }
        };
        Ok(Filled {
            tokens: Some(engine.tokenizer.encode_as_text(&text).into()),
            call,
        })
    }
}

impl Call {
    /// The call as a whole message tells it; `None` if `text` ends inside it.
    pub(crate) fn whole(&self, text: &str) -> Option<ToolCall> {
        let complete = text.len() == self.arguments.end + CALL_END.len();
        complete.then(|| ToolCall {
            id: self.id.clone(),
            r#type: "function",
            function: FunctionCall {
                name: self.name.clone(),
                arguments: text[self.arguments.clone()].to_owned(),
            },
        })
    }

    /// Whether `text` bytes are all of the call.
    pub(crate) fn is_complete(&self, text: usize) -> bool {
        text >= self.arguments.end + CALL_END.len()
    }

    /// What `text` tells of the call when `told` bytes went before it.
    pub(crate) fn delta(&self, told: usize, text: &str) -> Option<ToolDelta> {
        let end = told + text.len();
        let names = told < self.name_end && end >= self.name_end;
        let from = self.arguments.start.clamp(told, end) - told;
        let to = self.arguments.end.clamp(told, end) - told;
        let arguments = (from < to).then(|| text[from..to].to_owned());
        (names || arguments.is_some()).then(|| ToolDelta {
            id: names.then(|| self.id.clone()),
            r#type: names.then_some("function"),
            index: 0,
            function: FunctionDelta {
                name: names.then(|| self.name.clone()),
                arguments,
            },
        })
    }
}

//! The formats of a line: detection by keys, strict parsing, and the prompt that a format puts around its fields.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::error::LineProblem;

/// What the lines of a file hold (`[data] format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One of the others, by the keys of each file's first line.
    Auto,
    /// `{"input_ids":[...], "labels":[...]}`, labels optional.
    Tokens,
    /// `{"text":"..."}`, loss on everything.
    Text,
    /// `{"prompt":"...", "completion":"..."}`, loss on the completion.
    Completion,
    /// `{"instruction":"...", "input":"...", "output":"..."}`, input optional, loss on the output.
    Alpaca,
}

/// A format that is known: what [`Format`] is once a file's first line has been seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LineFormat {
    Tokens,
    Text,
    Completion,
    Alpaca,
}

/// A line as it stands in the file; keys beyond these are ignored.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Tokens {
        input_ids: Vec<i64>,
        labels: Option<Vec<i64>>,
    },
    Text(String),
    /// `completion`, and `alpaca` with its prompt applied.
    Completion {
        prompt: String,
        completion: String,
    },
}

/// A problem and, where it is known, the byte of the line (from 1) at which it shows.
pub(crate) type Located = (LineProblem, Option<u64>);

impl Format {
    /// This format if it names one, else the one that the keys of `first_line` say.
    pub(crate) fn resolve(self, first_line: &[u8]) -> Result<LineFormat, Located> {
        match self {
            Format::Auto => detect(first_line),
            Format::Tokens => Ok(LineFormat::Tokens),
            Format::Text => Ok(LineFormat::Text),
            Format::Completion => Ok(LineFormat::Completion),
            Format::Alpaca => Ok(LineFormat::Alpaca),
        }
    }

    /// The text that a model trained on this format should see for a user's `prompt`.
    pub(crate) fn apply_prompt(self, prompt: &str) -> String {
        match self {
            Format::Alpaca => alpaca_prompt(prompt, ""),
            _ => prompt.to_owned(),
        }
    }
}

impl LineFormat {
    pub(crate) fn needs_tokenizer(self) -> bool {
        self != LineFormat::Tokens
    }

    /// Reads one line (without its line end).
    pub(crate) fn parse(self, line: &[u8]) -> Result<Record, Located> {
        let line = json_object(line, self.example())?;
        Ok(match self {
            LineFormat::Tokens => {
                let TokensLine { input_ids, labels } = self.fields(line)?;
                Record::Tokens { input_ids, labels }
            }
            LineFormat::Text => Record::Text(self.fields::<TextLine>(line)?.text),
            LineFormat::Completion => {
                let CompletionLine { prompt, completion } = self.fields(line)?;
                Record::Completion { prompt, completion }
            }
            LineFormat::Alpaca => {
                let AlpacaLine { instruction, input, output } = self.fields(line)?;
                Record::Completion {
                    prompt: alpaca_prompt(&instruction, input.as_deref().unwrap_or("")),
                    completion: output,
                }
            }
        })
    }

    fn fields<T: DeserializeOwned>(self, line: &str) -> Result<T, Located> {
        serde_json::from_str(line).map_err(|e| match e.classify() {
            serde_json::error::Category::Data => (
                LineProblem::WrongFields {
                    format: self.name(),
                    reason: without_location(&e),
                    expected: self.example(),
                },
                Some(e.column() as u64),
            ),
            _ => not_json(&e),
        })
    }

    fn name(self) -> &'static str {
        match self {
            LineFormat::Tokens => "tokens",
            LineFormat::Text => "text",
            LineFormat::Completion => "completion",
            LineFormat::Alpaca => "alpaca",
        }
    }

    fn example(self) -> &'static str {
        match self {
            LineFormat::Tokens => r#"{"input_ids":[1,2,3],"labels":[-100,2,3]}"#,
            LineFormat::Text => r#"{"text":"..."}"#,
            LineFormat::Completion => r#"{"prompt":"...","completion":"..."}"#,
            LineFormat::Alpaca => r#"{"instruction":"...","input":"...","output":"..."}"#,
        }
    }
}

#[derive(Deserialize)]
struct TokensLine {
    input_ids: Vec<i64>,
    labels: Option<Vec<i64>>,
}

#[derive(Deserialize)]
struct TextLine {
    text: String,
}

#[derive(Deserialize)]
struct CompletionLine {
    prompt: String,
    completion: String,
}

#[derive(Deserialize)]
struct AlpacaLine {
    instruction: String,
    input: Option<String>,
    output: String,
}

fn detect(line: &[u8]) -> Result<LineFormat, Located> {
    let line = json_object(line, LineFormat::Completion.example())?;
    let keys: BTreeMap<String, IgnoredAny> = serde_json::from_str(line).map_err(|e| not_json(&e))?;
    let has = |key: &str| keys.contains_key(key);
    if has("input_ids") {
        Ok(LineFormat::Tokens)
    } else if has("prompt") && has("completion") {
        Ok(LineFormat::Completion)
    } else if has("instruction") && has("output") {
        Ok(LineFormat::Alpaca)
    } else if has("text") {
        Ok(LineFormat::Text)
    } else {
        let keys = keys.into_keys().collect();
        Err((LineProblem::UnknownKeys { keys }, None))
    }
}

/// `line` as text that begins as a JSON object does.
fn json_object<'a>(line: &'a [u8], expected: &'static str) -> Result<&'a str, Located> {
    if let Some(at) = memchr::memchr(0, line) {
        return Err((LineProblem::Nul, Some(at as u64 + 1)));
    }
    let line = str::from_utf8(line).map_err(|e| (LineProblem::NotUtf8, Some(e.valid_up_to() as u64 + 1)))?;
    let start = line.len() - line.trim_ascii_start().len();
    let got = match line.as_bytes()[start..].first() {
        Some(b'{') => return Ok(line),
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b'-' | b'0'..=b'9') => "a number",
        Some(b't' | b'f') => "true or false",
        Some(b'n') => "null",
        _ => "something else",
    };
    Err((LineProblem::NotAnObject { got, expected }, Some(start as u64 + 1)))
}

fn not_json(e: &serde_json::Error) -> Located {
    (LineProblem::NotJson(without_location(e)), Some(e.column() as u64))
}

/// serde_json's message without its " at line 1 column N": the line is the file's, not this text's.
fn without_location(e: &serde_json::Error) -> String {
    let message = e.to_string();
    match message.rfind(" at line ") {
        Some(end) => message[..end].to_owned(),
        None => message,
    }
}

/// The prompt of the Alpaca data set, which models tuned on such data expect to the letter.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    }
}

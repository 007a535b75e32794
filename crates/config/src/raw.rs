//! What was written: the file and the `--set` flags as one tree of values, each with its place.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

use crate::error::ConfigError;
use crate::names;

/// The whole config as written, by table; nothing is checked yet but the syntax.
#[derive(Debug)]
pub(crate) struct RawConfig {
    /// The path of the file, for messages about what is absent.
    pub file: String,
    pub root: RawTable,
}

/// Keys in alphabetical order.
pub(crate) type RawTable = BTreeMap<String, Entry>;

/// A key with its value.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub key_at: Place,
    pub value: Located,
}

#[derive(Debug, Clone)]
pub(crate) struct Located {
    pub at: Place,
    pub value: Value,
}

/// Where something was written: `file:line:col`, or the flag as typed.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub text: String,
    /// Orders places as the user wrote them, flags behind the file.
    pub order: usize,
    pub is_flag: bool,
}

#[derive(Debug, Clone)]
pub(crate) enum Value {
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Datetime(String),
    Array(Vec<Located>),
    Table(RawTable),
}

impl Value {
    /// The value as a message shows it: its type, and itself where it is short.
    pub fn describe(&self) -> String {
        match self {
            Self::String(text) if text.chars().count() <= 60 => format!("the string {text:?}"),
            Self::String(_) => "a long string".to_owned(),
            Self::Integer(number) => format!("the integer {number}"),
            Self::Float(number) => format!("the number {number}"),
            Self::Boolean(value) => format!("the boolean {value}"),
            Self::Datetime(text) => format!("the date {text}"),
            Self::Array(items) => format!("an array of {}", items.len()),
            Self::Table(_) => "a table".to_owned(),
        }
    }
}

impl RawConfig {
    /// Parses the file's `bytes` and lays `sets` over it.
    pub fn parse(file: &str, bytes: &[u8], sets: &[String]) -> Result<Self, ConfigError> {
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
            Err(error) => {
                let (line, column) = line_and_column(bytes, error.valid_up_to());
                return Err(ConfigError::Syntax {
                    at: format!("{file}:{line}:{column}"),
                    message: "the file is not UTF-8; save it as UTF-8".to_owned(),
                });
            }
        };
        let source = Source::File { file, text };
        let parsed = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            at: source.place(error.span().unwrap_or(0..0)).text,
            message: error.message().to_owned(),
        })?;
        let mut config = Self { file: file.to_owned(), root: source.table(parsed.into_inner())? };
        for (index, set) in sets.iter().enumerate() {
            config.set(set, index)?;
        }
        Ok(config)
    }

    /// Applies one `--set table.key=value`.
    fn set(&mut self, set: &str, index: usize) -> Result<(), ConfigError> {
        let flag = format!("--set {set}");
        let bad = |got: &str| ConfigError::Flag { flag: flag.clone(), got: got.to_owned() };
        let (path, text) = set.split_once('=').ok_or_else(|| bad("no equals sign"))?;
        let (table, key) = path.trim().split_once('.').ok_or_else(|| bad("a key without a table"))?;
        if table.is_empty() || key.is_empty() || key.contains('.') {
            return Err(bad("a path that is not one table and one key"));
        }
        let source = Source::Flag { flag: &flag, index };
        let value = match DeValue::parse(text.trim()) {
            Ok(value) => source.value(value.span(), value.into_inner())?,
            Err(_) => Located { at: source.place(0..0), value: Value::String(text.to_owned()) },
        };
        let place = source.place(0..0);
        let entry = self.root.entry(table.to_owned()).or_insert_with(|| Entry {
            key_at: place.clone(),
            value: Located { at: place.clone(), value: Value::Table(RawTable::new()) },
        });
        let Value::Table(keys) = &mut entry.value.value else {
            return Err(bad("a key below something that is no table in the file"));
        };
        // A flag for one of two exclusive keys overrules the file's choice of the other.
        if let Some(other) = names::alternative(table, key)
            && keys.get(other).is_some_and(|entry| !entry.key_at.is_flag)
        {
            keys.remove(other);
        }
        let key_at = place;
        keys.insert(key.to_owned(), Entry { key_at, value });
        Ok(())
    }
}

/// Where the text that is being taken over came from.
enum Source<'a> {
    File { file: &'a str, text: &'a str },
    Flag { flag: &'a str, index: usize },
}

impl Source<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        match self {
            Self::File { file, text } => {
                let (line, column) = line_and_column(text.as_bytes(), span.start);
                Place { text: format!("{file}:{line}:{column}"), order: span.start, is_flag: false }
            }
            Self::Flag { flag, index } => {
                Place { text: (*flag).to_owned(), order: usize::MAX / 2 + index, is_flag: true }
            }
        }
    }

    fn table(&self, table: DeTable<'_>) -> Result<RawTable, ConfigError> {
        let mut entries = RawTable::new();
        for (key, value) in table {
            let entry = Entry { key_at: self.place(key.span()), value: self.value(value.span(), value.into_inner())? };
            entries.insert(key.into_inner().into_owned(), entry);
        }
        Ok(entries)
    }

    fn value(&self, span: Range<usize>, value: DeValue<'_>) -> Result<Located, ConfigError> {
        let at = self.place(span);
        let out_of_range = |what: &str, text: &str| ConfigError::Syntax {
            at: at.text.clone(),
            message: format!("the {what} {text} does not fit into 64 bits"),
        };
        let value = match value {
            DeValue::String(text) => Value::String(text.into_owned()),
            DeValue::Integer(integer) => Value::Integer(
                i64::from_str_radix(integer.as_str(), integer.radix())
                    .map_err(|_| out_of_range("integer", integer.as_str()))?,
            ),
            DeValue::Float(float) => {
                Value::Float(float.as_str().parse().map_err(|_| out_of_range("number", float.as_str()))?)
            }
            DeValue::Boolean(value) => Value::Boolean(value),
            DeValue::Datetime(datetime) => Value::Datetime(datetime.to_string()),
            DeValue::Array(items) => Value::Array(
                items.into_iter().map(|item| self.value(item.span(), item.into_inner())).collect::<Result<_, _>>()?,
            ),
            DeValue::Table(table) => Value::Table(self.table(table)?),
        };
        Ok(Located { at, value })
    }
}

/// Line and column of the byte at `offset`, both from 1; a column is a character, not a byte.
fn line_and_column(text: &[u8], offset: usize) -> (usize, usize) {
    let before = &text[..offset.min(text.len())];
    let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    (line, String::from_utf8_lossy(&before[line_start..]).chars().count() + 1)
}

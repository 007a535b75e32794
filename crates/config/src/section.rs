//! Takes typed, checked values out of one table.

use std::ops::RangeInclusive;

use crate::error::ConfigError;
use crate::names;
use crate::raw::{Entry, Located, Place, RawTable, Value};

/// One table of the config, from which keys are taken.
#[derive(Debug)]
pub(crate) struct Section {
    name: String,
    /// The table's header, or the file alone where the table is absent: the place of what is missing.
    at: String,
    keys: RawTable,
}

/// A value together with its place, for checks that need more than the value.
pub(crate) struct Taken<T> {
    pub value: T,
    pub at: Place,
}

impl Section {
    pub fn new(name: &str, at: String, keys: RawTable) -> Self {
        Self { name: name.to_owned(), at, keys }
    }

    /// The entry of `key`, which the table then no longer has.
    pub fn take(&mut self, key: &str) -> Option<Entry> {
        self.keys.remove(key)
    }

    /// The error for a `value` of `key` that is not `expected`.
    pub fn wrong(&self, at: &Place, key: &str, expected: &str, got: String, hint: &str) -> ConfigError {
        ConfigError::Value {
            at: at.text.clone(),
            key: format!("[{}] {key}", self.name),
            expected: expected.to_owned(),
            got,
            hint: hint.to_owned(),
        }
    }

    /// The error for a `key` that has no default and was not given.
    pub fn missing(&self, key: &str, expected: &str) -> ConfigError {
        ConfigError::Value {
            at: self.at.clone(),
            key: format!("[{}] {key}", self.name),
            expected: expected.to_owned(),
            got: "nothing".to_owned(),
            hint: format!("add {key} to [{}]", self.name),
        }
    }

    fn mismatch(&self, located: &Located, key: &str, expected: &str, hint: &str) -> ConfigError {
        self.wrong(&located.at, key, expected, located.value.describe(), hint)
    }

    /// A string that is not empty.
    pub fn string(&mut self, key: &str, expected: &str) -> Result<Option<Taken<String>>, ConfigError> {
        let Some(Entry { value: located, .. }) = self.take(key) else {
            return Ok(None);
        };
        match located.value {
            Value::String(ref text) if text.trim().is_empty() => Err(self.mismatch(&located, key, expected, "")),
            Value::String(value) => Ok(Some(Taken { value, at: located.at })),
            _ => Err(self.mismatch(&located, key, expected, "put it in quotes")),
        }
    }

    /// An array of strings, none of them empty; empty where the key is absent.
    pub fn strings(&mut self, key: &str, expected: &str) -> Result<Vec<String>, ConfigError> {
        let Some(Entry { value: located, .. }) = self.take(key) else {
            return Ok(Vec::new());
        };
        let items = match &located.value {
            Value::Array(items) => items,
            Value::String(text) => {
                let hint = format!("put it in brackets: {key} = [{text:?}]");
                return Err(self.mismatch(&located, key, expected, &hint));
            }
            _ => return Err(self.mismatch(&located, key, expected, "")),
        };
        let mut strings = Vec::with_capacity(items.len());
        for item in items {
            match &item.value {
                Value::String(text) if !text.trim().is_empty() => strings.push(text.clone()),
                _ => return Err(self.mismatch(item, key, expected, "")),
            }
        }
        Ok(strings)
    }

    /// An integer within `range`.
    pub fn integer(&mut self, key: &str, range: RangeInclusive<u64>) -> Result<Option<Taken<u64>>, ConfigError> {
        let Some(Entry { value: located, .. }) = self.take(key) else {
            return Ok(None);
        };
        if let Value::Integer(number) = located.value
            && let Ok(value) = u64::try_from(number)
            && range.contains(&value)
        {
            return Ok(Some(Taken { value, at: located.at }));
        }
        let expected = format!("an integer from {} to {}", range.start(), range.end());
        Err(self.mismatch(&located, key, &expected, ""))
    }

    /// A finite number for which `accept` holds; `expected` says so in words.
    pub fn number(
        &mut self,
        key: &str,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<Taken<f64>>, ConfigError> {
        let Some(Entry { value: located, .. }) = self.take(key) else {
            return Ok(None);
        };
        match as_number(&located) {
            Some(value) if accept(value) => Ok(Some(Taken { value, at: located.at })),
            _ => {
                let hint = match located.value {
                    Value::String(_) => "write it without quotes, as 1e-4 or 0.0001",
                    _ => "",
                };
                Err(self.mismatch(&located, key, expected, hint))
            }
        }
    }

    /// Two numbers for each of which `accept` holds.
    pub fn pair(
        &mut self,
        key: &str,
        expected: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<[f64; 2]>, ConfigError> {
        let Some(Entry { value: located, .. }) = self.take(key) else {
            return Ok(None);
        };
        let Value::Array(items) = &located.value else {
            return Err(self.mismatch(&located, key, expected, ""));
        };
        for item in items {
            if !as_number(item).is_some_and(&accept) {
                return Err(self.mismatch(item, key, expected, ""));
            }
        }
        let numbers: Vec<f64> = items.iter().filter_map(as_number).collect();
        match numbers[..] {
            [a, b] => Ok(Some([a, b])),
            _ => Err(self.mismatch(&located, key, expected, "")),
        }
    }

    pub fn boolean(&mut self, key: &str, default: bool) -> Result<bool, ConfigError> {
        match self.take(key) {
            None => Ok(default),
            Some(Entry { value: located, .. }) => match located.value {
                Value::Boolean(value) => Ok(value),
                _ => Err(self.mismatch(&located, key, "true or false", "")),
            },
        }
    }

    /// A switch whose feature is not built: `false` or absent.
    pub fn off(&mut self, key: &str) -> Result<bool, ConfigError> {
        let at = self.keys.get(key).map(|entry| entry.value.at.text.clone());
        match (self.boolean(key, false)?, at) {
            (true, Some(at)) => Err(ConfigError::NotBuilt {
                at,
                key: format!("[{}] {key}", self.name),
                value: "true".to_owned(),
                available: "false".to_owned(),
            }),
            _ => Ok(false),
        }
    }

    /// One of `choices`; values in `not_built` have a meaning, but no code yet.
    pub fn choice<T: Copy>(
        &mut self,
        key: &str,
        choices: &[(&str, T)],
        not_built: &[&str],
    ) -> Result<Option<T>, ConfigError> {
        let Some(Entry { value: located, .. }) = self.take(key) else {
            return Ok(None);
        };
        let quoted: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
        let available = quoted.join(" or ");
        let Value::String(name) = &located.value else {
            return Err(self.mismatch(&located, key, &available, ""));
        };
        if let Some((_, value)) = choices.iter().find(|(choice, _)| choice == name) {
            return Ok(Some(*value));
        }
        if not_built.contains(&name.as_str()) {
            return Err(ConfigError::NotBuilt {
                at: located.at.text.clone(),
                key: format!("[{}] {key}", self.name),
                value: format!("{name:?}"),
                available,
            });
        }
        let hint = names::nearest(name, choices.iter().map(|(choice, _)| *choice), 0.5)
            .map_or_else(String::new, |near| format!("did you mean {near:?}?"));
        Err(self.mismatch(&located, key, &available, &hint))
    }

    /// Refuses `second` where `first` is given as well.
    pub fn exclusive(&self, first: &str, second: &str) -> Result<(), ConfigError> {
        match (self.keys.get(first), self.keys.get(second)) {
            (Some(a), Some(b)) => Err(self.wrong(
                &b.key_at,
                second,
                &format!("one of {first} and {second}"),
                format!("both ({first} at {})", a.key_at.text),
                "remove one of the two",
            )),
            _ => Ok(()),
        }
    }
}

fn as_number(located: &Located) -> Option<f64> {
    match located.value {
        Value::Integer(number) => Some(number as f64),
        Value::Float(number) if number.is_finite() => Some(number),
        _ => None,
    }
}

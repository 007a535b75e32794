//! Deterministic mutations of an input.

use fastrand::Rng;

/// What parsers of JSON, TOML and node lists look for.
const TOKENS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "\n",
    "\r\n",
    "\0",
    "\u{feff}",
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "18446744073709551615",
    "18446744073709551616",
    "\\u0000",
    "\\ud800",
    "..",
    "/",
    "#",
    "=",
    "-",
    "[1-65536]",
    "é",
];

/// A random change of `input`, or a few; `other` lends a piece of itself.
pub fn mutated(input: &[u8], other: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..1 + rng.usize(0..3) {
        mutate(&mut bytes, other, rng);
    }
    bytes
}

fn mutate(bytes: &mut Vec<u8>, other: &[u8], rng: &mut Rng) {
    let at = rng.usize(0..=bytes.len());
    let end = bytes.len().min(at + 1 + rng.usize(0..16));
    match rng.u8(0..8) {
        0 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(0..8),
        1 if at < bytes.len() => bytes[at] = rng.u8(..),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..end)),
        // A piece twice.
        4 => {
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece);
        }
        5 => {
            let from = rng.usize(0..=other.len());
            let piece = &other[from..other.len().min(from + 64)];
            bytes.splice(at..end, piece.iter().copied());
        }
        6 => {
            let number = ["0", "1", "9", "4294967296", "9223372036854775807"][rng.usize(0..5)];
            let digits = bytes[at..].iter().position(u8::is_ascii_digit).map(|found| at + found);
            if let Some(start) = digits {
                let len = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                bytes.splice(start..start + len, number.bytes());
            }
        }
        _ => drop(bytes.splice(at..at, TOKENS[rng.usize(0..TOKENS.len())].bytes())),
    }
}

//! A panic inside the `tokenizers` crate prints nothing and ends nothing; any other is reported as ever. One test: the
//! panic hook is the process's.

mod common;

use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Folder, character_tokenizer};
use fsdp_data::{Format, TextTokenizer};
use serde_json::json;

#[test]
fn only_panics_of_the_tokenizer_are_silent() {
    static REPORTED: AtomicUsize = AtomicUsize::new(0);
    panic::set_hook(Box::new(|_| {
        REPORTED.fetch_add(1, Ordering::Relaxed);
    }));

    let folder = Folder::with_tokenizer();
    let mut tokenizer = character_tokenizer();
    tokenizer["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0});
    folder.write("tokenizer.json", tokenizer.to_string());
    let tokenizer = TextTokenizer::open(folder.path()).unwrap();
    for _ in 0..2 {
        let error = tokenizer.encode_prompt("a", Format::Text).unwrap_err().to_string();
        assert!(error.ends_with("tokenizer.json: the tokenizer fails: chunk size must be non-zero"), "{error}");
    }
    assert_eq!(REPORTED.load(Ordering::Relaxed), 0);

    assert!(panic::catch_unwind(|| panic!("another")).is_err());
    assert_eq!(REPORTED.load(Ordering::Relaxed), 1);
    drop(panic::take_hook());
}

//! A model folder's tokenizer is input like any other: wrong, too large or hostile ones are errors, never a panic.

mod common;

use std::fs;

use common::{BOS, EOS, Folder, VOCAB, character_tokenizer, ids};
use fsdp_data::{DataError, DataSpec, Dataset, Format, TextTokenizer, check};
use serde_json::{Value, json};

#[test]
fn a_vocabulary_larger_than_the_embedding_is_refused_with_both_numbers() {
    let folder = Folder::with_tokenizer();
    let text = folder.write("text.jsonl", "{\"text\":\"a\"}\n");
    let mut spec = folder.spec(&[text], Format::Auto, 8);
    assert!(Dataset::open(&spec).is_ok());
    spec.vocab_size -= 1;
    let error = Dataset::open(&spec).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: the tokenizer's token \"9\" has id 72"), "{error}");
    assert!(error.contains("only 72 rows"), "{error}");

    // An added token counts too.
    let mut tokenizer = character_tokenizer();
    let mut added = tokenizer["added_tokens"][0].clone();
    added["id"] = json!(VOCAB);
    added["content"] = json!("<new>");
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    folder.write("tokenizer.json", tokenizer.to_string());
    spec.vocab_size = VOCAB;
    let error = Dataset::open(&spec).unwrap_err().to_string();
    assert!(error.contains("\"<new>\" has id 73") && error.contains("only 73 rows"), "{error}");
}

#[test]
fn tokens_need_no_tokenizer_and_text_does() {
    let folder = Folder::new();
    let tokens = folder.write("tokens.jsonl", "{\"input_ids\":[1,2]}\n");
    assert!(Dataset::open(&folder.spec(std::slice::from_ref(&tokens), Format::Auto, 8)).is_ok());
    let text = folder.write("text.jsonl", "{\"text\":\"a\"}\n");
    let mut spec = folder.spec(&[tokens, text], Format::Auto, 8);
    let error = Dataset::open(&spec).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: is missing") && error.contains("save_pretrained"), "{error}");
    spec.tokenizer_dir = None;
    let error = Dataset::open(&spec).unwrap_err();
    assert!(matches!(error, DataError::NoTokenizer { .. }) && error.to_string().contains("text.jsonl"), "{error}");
}

#[test]
fn the_beginning_of_sequence_is_added_where_the_tokenizer_adds_it() {
    let template = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}});
    // post-processor, tokenizer_config.json, special_tokens_map.json -> beginning, end of sequence
    let cases = [
        (Value::Null, json!({"bos_token": "<s>", "eos_token": "</s>"}), Value::Null, None, Some(EOS)),
        (Value::Null, json!({"bos_token": "<s>", "add_bos_token": true}), Value::Null, Some(BOS), None),
        (template.clone(), json!({"bos_token": "<s>"}), Value::Null, Some(BOS), None),
        (template.clone(), json!({"bos_token": {"content": "<s>", "lstrip": false}}), Value::Null, Some(BOS), None),
        (template.clone(), json!({"bos_token": "<s>", "add_bos_token": false}), Value::Null, None, None),
        (template.clone(), Value::Null, json!({"bos_token": "<s>", "eos_token": "</s>"}), Some(BOS), Some(EOS)),
        (template, json!({"eos_token": null}), json!({"eos_token": {"content": "</s>"}}), None, Some(EOS)),
    ];
    for (post_processor, config, map, bos, eos) in cases {
        let folder = Folder::new();
        let mut tokenizer = character_tokenizer();
        tokenizer["post_processor"] = post_processor;
        folder.write("tokenizer.json", tokenizer.to_string());
        folder.write("tokenizer_config.json", config.to_string());
        folder.write("special_tokens_map.json", map.to_string());
        let tokenizer = TextTokenizer::open(folder.path()).unwrap();
        let expected: Vec<i64> = bos.into_iter().chain(ids("ab")).collect();
        assert_eq!(tokenizer.encode_prompt("ab", Format::Text).unwrap(), expected, "{config} {map}");
        assert_eq!(tokenizer.eos_id(), eos, "{config} {map}");
    }
}

#[test]
fn decoding_leaves_out_special_and_unknown_tokens() {
    let tokenizer = TextTokenizer::open(Folder::with_tokenizer().path()).unwrap();
    let mut all = vec![BOS];
    all.extend(ids("planet 7"));
    all.extend([EOS, 99_999, -100]);
    assert_eq!(tokenizer.decode(&all).unwrap(), "planet 7");
    assert_eq!(tokenizer.vocab_size(), VOCAB);
}

#[test]
fn characters_without_a_token_are_counted() {
    let bpe = |unk_token: Value, byte_fallback: bool| {
        let mut vocab = json!({"a": 0, "b": 1, "ab": 2, "?": 3});
        if byte_fallback {
            (0..256).for_each(|byte| vocab[format!("<0x{byte:02X}>")] = json!(4 + byte));
        }
        let merges = json!([["a", "b"]]);
        json!({"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": unk_token, "byte_fallback": byte_fallback})
    };
    let folder = Folder::with_tokenizer();
    let text = folder.write("text.jsonl", "{\"text\":\"ab cé 日本\"}\n{\"text\":\"a\"}\n{\"text\":\"zzz\"}\n");
    let pairs = folder.write("pairs.jsonl", "{\"prompt\":\"ac\",\"completion\":\"bcd\"}\n");
    for (model, in_text, in_pairs) in [
        (bpe(Value::Null, false), 4 + 3, 1 + 2),
        (bpe(json!("?"), false), 0, 0),
        (bpe(Value::Null, true), 0, 0),
        (character_tokenizer()["model"].clone(), 0, 0),
    ] {
        let mut tokenizer = character_tokenizer();
        tokenizer["pre_tokenizer"] = json!({"type": "WhitespaceSplit"});
        tokenizer["model"] = model.clone();
        folder.write("tokenizer.json", tokenizer.to_string());
        for (file, expected) in [(&text, in_text), (&pairs, in_pairs)] {
            let spec = DataSpec { vocab_size: 1000, ..folder.spec(std::slice::from_ref(file), Format::Auto, 64) };
            assert_eq!(check(&spec, u64::MAX).unwrap().dropped_chars, expected, "{file:?}: {model}");
        }
    }
}

#[test]
fn hostile_tokenizers_are_errors() {
    let template = |token: &str, special_tokens: Value| {
        let only = json!([{"SpecialToken": {"id": token, "type_id": 0}}]);
        json!({"type": "TemplateProcessing", "single": only, "pair": only, "special_tokens": special_tokens})
    };
    let bpe = |merge: &[&str; 2], prefix: &str| {
        let vocab = json!({"a": 0, "é": 1, "ab": 2});
        json!({"type": "BPE", "vocab": vocab, "merges": [merge], "continuing_subword_prefix": prefix})
    };
    let split =
        |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let padding = json!({"strategy": {"Fixed": 1_u64 << 60}, "direction": "Right", "pad_to_multiple_of": null,
                         "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"});
    let truncation = json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
    // Where it is changed, to what, and what comes of it: the tokenizer does not open, its text fails, all is well.
    #[derive(Debug, PartialEq)]
    enum Outcome {
        Closed,
        Fails,
        /// Tokens with loss.
        Works(u64),
    }
    use Outcome::*;
    let cases = [
        // These make the tokenizers crate panic.
        ("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}), Fails),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}), Fails),
        ("/model", bpe(&["a", "é"], "x"), Closed),
        ("/post_processor", template("zz", json!({})), Closed),
        // This one lets the regex give up: the text is one unknown piece.
        ("/pre_tokenizer", split("(?:a|b|ab)*(?=c)"), Works(1)),
        ("/pre_tokenizer", split("("), Closed),
        ("/pre_tokenizer", json!({"type": "Unheard"}), Closed),
        ("/model", json!({"type": "WordLevel", "vocab": {}, "unk_token": "x"}), Fails),
        ("/model", json!({"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}), Closed),
        ("/model", json!({"type": "WordLevel", "vocab": {"a": 4294967296_u64}, "unk_token": "a"}), Closed),
        ("/model", json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}), Fails),
        ("/model", json!({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "c"]]}), Closed),
        ("/model", json!({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "dropout": 0.1}), Closed),
        ("/model", json!({"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 5}), Closed),
        ("/model", json!({"type": "Unigram", "vocab": [["a", -1.0]]}), Fails),
        ("/model", json!({}), Closed),
        ("/added_tokens", json!([{"id": 3}]), Closed),
        ("/version", json!("9.9"), Closed),
        // Lengths and templates of the file are not followed.
        (
            "/post_processor",
            template("<s>", json!({"<s>": {"id": "<s>", "ids": [1, 1], "tokens": ["<s>", "<s>"]}})),
            Works(61),
        ),
        ("/padding", padding, Works(60)),
        ("/truncation", truncation, Works(60)),
    ];
    let folder = Folder::new();
    folder.write("tokenizer_config.json", json!({"bos_token": "<s>", "eos_token": "</s>"}).to_string());
    let line = format!("{{\"text\":\"{}\"}}\n", "ab".repeat(30));
    let file = folder.write("text.jsonl", format!("\n{line}"));
    let spec = folder.spec(&[file], Format::Text, 64);
    for (pointer, value, expected) in cases {
        let mut tokenizer = character_tokenizer();
        tokenizer[&pointer[1..]] = Value::Null;
        *tokenizer.pointer_mut(pointer).unwrap() = value.clone();
        folder.write("tokenizer.json", tokenizer.to_string());
        let (outcome, error) = match check(&spec, u64::MAX) {
            Ok(report) => (Works(report.valid_tokens), String::new()),
            Err(e @ DataError::Line { .. }) => (Fails, e.to_string()),
            Err(e) => (Closed, e.to_string()),
        };
        assert_eq!(outcome, expected, "{pointer} {value}: {error}");
        match outcome {
            Closed => assert!(error.contains("tokenizer.json: is not a usable tokenizer: "), "{error}"),
            Fails => assert!(error.contains("text.jsonl:2: the tokenizer fails on this text: "), "{error}"),
            Works(_) => {}
        }
    }
}

#[test]
fn broken_tokenizer_files_are_errors() {
    let folder = Folder::with_tokenizer();
    let open = || TextTokenizer::open(folder.path()).unwrap_err().to_string();
    for contents in ["", "{", "[]", "null", "\0\0", "{\"model\":"] {
        folder.write("tokenizer.json", contents);
        assert!(open().contains("tokenizer.json: is not a usable tokenizer: "), "{contents}: {}", open());
    }
    folder.write("tokenizer.json", "[".repeat(1_000_000));
    assert!(open().contains("tokenizer.json: is not a usable tokenizer: "));
    folder.write("tokenizer.json", character_tokenizer().to_string());
    folder.write("tokenizer_config.json", "{\"bos_token\":");
    assert!(open().contains("tokenizer_config.json: is not JSON: "));
    folder.write("tokenizer_config.json", " ".repeat((4 << 20) + 1));
    assert!(open().contains("tokenizer_config.json: expected a regular file of at most 4194304 bytes"));
    fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
    fs::create_dir(folder.path().join("tokenizer_config.json")).unwrap();
    assert!(open().contains("tokenizer_config.json: expected a regular file"));
}

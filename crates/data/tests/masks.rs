//! Which tokens carry loss, in each format; what is cut; what is padded.

mod common;

use common::{BOS, EOS, Folder, PAD, ids};
use fsdp_data::{Dataset, Format, Loader, MicroBatch, TextTokenizer};
use serde_json::{Value, json};

fn only_batch(folder: &Folder, line: &Value, format: Format, seq_len: usize) -> (MicroBatch, u64) {
    let file = folder.write("data.jsonl", format!("{line}\n"));
    let mut loader = Loader::new(Dataset::open(&folder.spec(&[file], format, seq_len)).unwrap(), 0, 1, 1, 1);
    let batch = loader.next_step().unwrap().remove(0);
    assert_eq!((batch.batch, batch.seq_len, batch.input_ids.len()), (1, seq_len, seq_len));
    assert_eq!(batch.num_valid_tokens, batch.targets.iter().filter(|t| **t != -100).count() as u64);
    (batch, loader.dataset().num_cut())
}

/// What `prompt` (no loss) and `completion` (loss) must become, both given as ids.
fn assert_masked(batch: &MicroBatch, prompt: &[i64], completion: &[i64]) {
    let ids: Vec<i64> = prompt.iter().chain(completion).copied().collect();
    let mut labels = vec![-100; prompt.len()];
    labels.extend(completion);
    let mut input_ids = ids.clone();
    input_ids.resize(batch.seq_len, PAD);
    labels.resize(batch.seq_len + 1, -100);
    assert_eq!(batch.input_ids, input_ids);
    assert_eq!(batch.targets, labels[1..]);
}

fn join(parts: &[&[i64]]) -> Vec<i64> {
    parts.concat()
}

#[test]
fn tokens_are_taken_as_they_are_and_shifted() {
    let folder = Folder::new();
    let (batch, _) = only_batch(&folder, &json!({"input_ids": [5, 6, 7]}), Format::Auto, 5);
    assert_eq!((batch.input_ids, batch.targets), (vec![5, 6, 7, 0, 0], vec![6, 7, -100, -100, -100]));
    let line = json!({"input_ids": [5, 6, 7], "labels": [9, -100, 8]});
    let (batch, _) = only_batch(&folder, &line, Format::Tokens, 3);
    assert_eq!((batch.input_ids, batch.targets), (vec![5, 6, 7], vec![-100, 8, -100]));
    let (batch, _) = only_batch(&folder, &json!({"input_ids": [5], "labels": [5]}), Format::Tokens, 3);
    assert_eq!((batch.targets, batch.num_valid_tokens), (vec![-100; 3], 0));
    let (batch, _) = only_batch(&folder, &json!({"input_ids": [5, 6], "labels": null}), Format::Tokens, 1 + 1);
    assert_eq!(batch.targets, [6, -100]);
}

#[test]
fn text_has_loss_on_all_of_it_and_on_its_end() {
    let folder = Folder::with_tokenizer();
    let (batch, _) = only_batch(&folder, &json!({"text": "abc"}), Format::Auto, 7);
    assert_masked(&batch, &[BOS], &join(&[&ids("abc"), &[EOS]]));
    let (batch, _) = only_batch(&folder, &json!({"text": ""}), Format::Auto, 3);
    assert_masked(&batch, &[BOS], &[EOS]);
}

#[test]
fn completion_has_loss_on_the_completion_alone() {
    let folder = Folder::with_tokenizer();
    let (batch, cut) = only_batch(&folder, &json!({"prompt": "ab:", "completion": " cd"}), Format::Auto, 10);
    assert_masked(&batch, &join(&[&[BOS], &ids("ab:")]), &join(&[&ids(" cd"), &[EOS]]));
    assert_eq!((batch.num_valid_tokens, cut), (4, 0));
    let (batch, _) = only_batch(&folder, &json!({"prompt": "", "completion": "a"}), Format::Completion, 10);
    assert_masked(&batch, &[BOS], &join(&[&ids("a"), &[EOS]]));
}

#[test]
fn alpaca_has_the_prompt_of_its_data_set_and_loss_on_the_output() {
    let folder = Folder::with_tokenizer();
    let with_input = "Below is an instruction that describes a task, paired with an input that provides further \
                      context. Write a response that appropriately completes the request.\n\n\
                      ### Instruction:\nReverse the word.\n\n### Input:\nplanet\n\n### Response:";
    let without_input = "Below is an instruction that describes a task. \
                         Write a response that appropriately completes the request.\n\n\
                         ### Instruction:\nReverse planet.\n\n### Response:";
    let cases = [
        (json!({"instruction": "Reverse the word.", "input": "planet", "output": "tenalp"}), with_input),
        (json!({"instruction": "Reverse planet.", "input": "", "output": "tenalp"}), without_input),
        (json!({"instruction": "Reverse planet.", "input": null, "output": "tenalp"}), without_input),
        (json!({"instruction": "Reverse planet.", "output": "tenalp"}), without_input),
    ];
    for (line, prompt) in cases {
        let (batch, _) = only_batch(&folder, &line, Format::Auto, 320);
        assert_masked(&batch, &join(&[&[BOS], &ids(prompt)]), &join(&[&ids("tenalp"), &[EOS]]));
    }
    let tokenizer = TextTokenizer::open(folder.path()).unwrap();
    let prompt = tokenizer.encode_prompt("Reverse planet.", Format::Alpaca).unwrap();
    assert_eq!(prompt, join(&[&[BOS], &ids(without_input)]));
}

#[test]
fn long_lines_are_cut_on_the_right_and_counted() {
    let folder = Folder::with_tokenizer();
    // line, sequence length -> prompt, completion, lines cut
    let cases = [
        (json!({"text": "abcdef"}), 8, "", "abcdef", 0),
        (json!({"text": "abcdefg"}), 8, "", "abcdefg", 1),
        (json!({"text": "abcdefgh"}), 8, "", "abcdefg", 1),
        (json!({"text": "x".repeat(100_000)}), 8, "", "xxxxxxx", 1),
        (json!({"prompt": "abcd", "completion": "efgh"}), 8, "abcd", "efg", 1),
        (json!({"prompt": "abcdefg", "completion": "h"}), 8, "abcdefg", "", 1),
        (json!({"prompt": "x".repeat(100_000), "completion": "y"}), 8, "xxxxxxx", "", 1),
        (json!({"prompt": "x", "completion": "y".repeat(100_000)}), 8, "x", "yyyyyy", 1),
    ];
    for (line, seq_len, prompt, completion, cut) in cases {
        let (batch, num_cut) = only_batch(&folder, &line, Format::Auto, seq_len);
        let mut completion = ids(completion);
        if cut == 0 {
            completion.push(EOS);
        }
        assert_masked(&batch, &join(&[&[BOS], &ids(prompt)]), &completion);
        assert_eq!(num_cut, cut, "{completion:?}");
    }
}

#[test]
fn training_sees_the_prompt_as_generation_does() {
    // Two letters in one piece become one id, so "ab" + "b" differs from "abb" at the seam.
    let folder = Folder::new();
    let vocab = json!({"a": 0, "b": 1, "bb": 2, "c": 3, "ac": 4});
    let model = json!({"type": "BPE", "vocab": vocab, "merges": [["b", "b"], ["a", "c"]]});
    folder.write("tokenizer.json", json!({"version": "1.0", "model": model}).to_string());
    // prompt, completion -> ids of the prompt, ids of the completion
    let cases: [(&str, &str, &[i64], &[i64]); 3] = [
        ("ab", "b", &[0, 1], &[1]),      // not the one id of "bb"
        ("ab", "acb", &[0, 1], &[4, 1]), // in one piece
        ("a", "cbb", &[0], &[3, 2]),
    ];
    for (prompt, completion, prompt_ids, completion_ids) in cases {
        let line = json!({"prompt": prompt, "completion": completion});
        let (batch, _) = only_batch(&folder, &line, Format::Auto, 8);
        assert_masked(&batch, prompt_ids, completion_ids);
        let tokenizer = TextTokenizer::open(folder.path()).unwrap();
        assert_eq!(tokenizer.encode_prompt(prompt, Format::Completion).unwrap(), prompt_ids);
    }
}

#[test]
fn files_of_different_formats_make_one_data_set() {
    let folder = Folder::with_tokenizer();
    let files = [
        folder.write("tokens.jsonl", "{\"input_ids\":[4,5]}\n{\"input_ids\":[6,7]}\n"),
        folder.write("text.jsonl", "{\"text\":\"a\"}\n"),
        folder.write("pair.jsonl", "{\"prompt\":\"a\",\"completion\":\"b\"}\n"),
    ];
    let dataset = Dataset::open(&folder.spec(&files, Format::Auto, 4)).unwrap();
    assert_eq!((dataset.num_samples(), dataset.format()), (4, Format::Tokens));
    let batch = &Loader::new(dataset, 0, 1, 4, 1).next_step().unwrap()[0];
    let (a, b) = (ids("a")[0], ids("b")[0]);
    let expected = [[5, -100, -100, -100], [7, -100, -100, -100], [a, EOS, -100, -100], [-100, b, EOS, -100]];
    assert_eq!(batch.targets, expected.concat());
}

//! Configs that are wrong: each is refused at once, with its place, and no rank starts.

use std::time::Duration;

use fsdp_tests_behaviour::job::Job;

use crate::tally::{Tally, Times};

/// From the command to its refusal.
const AT_ONCE: Duration = Duration::from_millis(300);

/// What is replaced in a config that is right, by what, where the message says it is wrong, and what else it says.
type Case = (&'static str, &'static str, &'static str, &'static str);

#[rustfmt::skip]
const CASES: &[Case] = &[
    // No TOML.
    ("lr = 1e-3", "lr =", ":4:", "syntax error"),
    ("lr = 1e-3", "lr = 1e-3 1e-4", ":4:", "syntax error"),
    ("lr = 1e-3", "lr 1e-3", ":4:", "syntax error"),
    ("lr = 1e-3", "lr = 1e-3\nlr = 1e-4", ":5:1", "duplicate key"),
    ("[optimizer]", "[optimizer", ":3:", "syntax error"),
    ("[optimizer]", "[[optimizer]]", ":3:", "[optimizer]"),
    ("path = \"model\"", "path = \"model", ":2:", "syntax error"),
    ("path = \"model\"", "path = model", ":2:", "syntax error"),
    ("[\"train.jsonl\"]", "[\"train.jsonl\"", ":11:", "syntax error"),
    ("[checkpoint]", "[training]\nseed = 1\n[checkpoint]", ":11:", "duplicate key"),
    ("steps = 20", "steps = 0x", ":6:", "syntax error"),
    ("steps = 20", "steps = 99999999999999999999", ":6:", "fit"),
    ("steps = 20", "steps = 20\u{0}", ":6:", "syntax error"),
    // Keys and tables that do not exist.
    ("lr = 1e-3", "lrr = 1e-3", ":4:1: [optimizer] lrr", "lr"),
    ("seq_len = 8", "seq_lenght = 8", ":7:1: [training] seq_lenght", "did you mean seq_len?"),
    ("steps = 20", "max_steps = 20", ":6:1: [training] max_steps", "steps"),
    ("micro_batch_size = 2", "batch_size = 2", ":8:1: [training] batch_size", "micro_batch_size"),
    ("micro_batch_size = 2", "per_device_train_batch_size = 2", ":8:1: [training] per_device_train_batch_size", "micro_batch_size"),
    ("micro_batch_size = 2", "local_batch_size = 2", ":8:1: [training] local_batch_size", "micro_batch_size"),
    ("micro_batch_size = 2", "gradient_accumulation_steps = 2", ":8:1: [training] gradient_accumulation_steps", "grad_accumulation"),
    ("lr = 1e-3", "learning_rate = 1e-3", ":4:1: [optimizer] learning_rate", "lr"),
    ("lr = 1e-3", "lr = 1e-3\nmax_grad_norm = 1.0", ":5:1: [optimizer] max_grad_norm", "[training]"),
    ("every_steps = 0", "interval = 5", ":12:1: [checkpoint] interval", "every_steps"),
    ("every_steps = 0", "save_total_limit = 3", ":12:1: [checkpoint] save_total_limit", "keep"),
    ("[optimizer]", "[optim]", ":3:2: [optim]", "did you mean [optimizer]?"),
    ("[optimizer]", "[optimiser]", ":3:2: [optimiser]", "did you mean [optimizer]?"),
    ("[output]", "[outputs]", ":13:2: [outputs]", "[output]"),
    ("[output]", "[wandb]\nproject = \"a\"\n[output]", ":13:2: [wandb]", "the tables are"),
    // Keys that are missing.
    ("path = \"model\"", "", ":1:2: [model] path", "got nothing"),
    ("lr = 1e-3", "", ":3:2: [optimizer] lr", "got nothing"),
    ("steps = 20", "", ":5:2: [training] steps", "epochs"),
    ("seq_len = 8", "", ":5:2: [training] seq_len", "got nothing"),
    ("train = [\"train.jsonl\"]", "", ":9:2: [data] train", "got nothing"),
    ("train = [\"train.jsonl\"]", "train = []", ":9:2: [data] train", "got nothing"),
    // Types.
    ("path = \"model\"", "path = 5", ":2:8: [model] path", "got the integer 5"),
    ("path = \"model\"", "path = [\"model\"]", ":2:8: [model] path", "got an array"),
    ("lr = 1e-3", "lr = \"1e-3\"", ":4:6: [optimizer] lr", "without quotes"),
    ("lr = 1e-3", "lr = true", ":4:6: [optimizer] lr", "got the boolean true"),
    ("steps = 20", "steps = 20.5", ":6:9: [training] steps", "expected an integer"),
    ("steps = 20", "steps = \"20\"", ":6:9: [training] steps", "expected an integer"),
    ("steps = 20", "steps = 2026-01-01", ":6:9: [training] steps", "got the date"),
    ("steps = 20", "steps = {}", ":6:9: [training] steps", "got a table"),
    ("[\"train.jsonl\"]", "\"train.jsonl\"", ":10:9: [data] train", "put it in brackets"),
    ("[\"train.jsonl\"]", "[\"train.jsonl\", 7]", ":10:25: [data] train", "got the integer 7"),
    ("[data]", "[data]\nshuffle = 1", ":10:11: [data] shuffle", "true or false"),
    ("every_steps = 0", "every_steps = 5\nasync = \"yes\"", ":13:9: [checkpoint] async", "true or false"),
    // Ranges.
    ("lr = 1e-3", "lr = 0", ":4:6: [optimizer] lr", "above 0"),
    ("lr = 1e-3", "lr = -1e-3", ":4:6: [optimizer] lr", "above 0"),
    ("lr = 1e-3", "lr = nan", ":4:6: [optimizer] lr", "got the number NaN"),
    ("lr = 1e-3", "lr = inf", ":4:6: [optimizer] lr", "got the number inf"),
    ("lr = 1e-3", "lr = 1e-3\nbetas = [0.9, 1.0]", ":5:15: [optimizer] betas", "below 1"),
    ("lr = 1e-3", "lr = 1e-3\nbetas = [0.9]", ":5:9: [optimizer] betas", "two numbers"),
    ("lr = 1e-3", "lr = 1e-3\neps = 0.0", ":5:7: [optimizer] eps", "above 0"),
    ("lr = 1e-3", "lr = 1e-3\nweight_decay = -1", ":5:16: [optimizer] weight_decay", "at least 0"),
    ("steps = 20", "steps = 0", ":6:9: [training] steps", "from 1"),
    ("steps = 20", "epochs = -1", ":6:10: [training] epochs", "from 1"),
    ("seq_len = 8", "seq_len = 0", ":7:11: [training] seq_len", "got the integer 0"),
    ("seq_len = 8", "seq_len = 8\nseed = -1", ":8:8: [training] seed", "got the integer -1"),
    ("micro_batch_size = 2", "micro_batch_size = 0", ":8:20: [training] micro_batch_size", "got the integer 0"),
    ("every_steps = 0", "every_steps = -5", ":12:15: [checkpoint] every_steps", "got the integer -5"),
    ("every_steps = 0", "every_steps = 5\nkeep = 1", ":13:8: [checkpoint] keep", "from 2"),
    ("[output]", "[fsdp]\ntimeout_secs = 0\n[output]", ":14:16: [fsdp] timeout_secs", "got the integer 0"),
    // Values that are not among those there are.
    ("[output]", "[fsdp]\nstrategy = \"zero3\"\n[output]", ":14:12: [fsdp] strategy", "\"full_shard\""),
    ("[output]", "[fsdp]\nbackend = \"gloo\"\n[output]", ":14:11: [fsdp] backend", "\"shm\""),
    ("[output]", "[precision]\nparam = \"fp8\"\n[output]", ":14:9: [precision] param", "\"bf16\""),
    ("[output]", "[lr_scheduler]\nkind = \"cosin\"\n[output]", ":14:8: [lr_scheduler] kind", "\"cosine\""),
    ("[data]", "[data]\nformat = \"csv\"", ":10:10: [data] format", "\"tokens\""),
    ("seq_len = 8", "seq_len = 8\non_nonfinite = \"ignore\"", ":8:16: [training] on_nonfinite", "\"skip\""),
    // Conflicts.
    ("steps = 20", "steps = 20\nepochs = 1", ":7:1: [training] epochs", "remove one of the two"),
    ("micro_batch_size = 2", "micro_batch_size = 2\nglobal_batch_size = 7", ":9:21: [training] global_batch_size", "multiple"),
    ("[output]", "[lr_scheduler]\nwarmup_steps = 1\nwarmup_ratio = 0.1\n[output]", ":15:1: [lr_scheduler] warmup_ratio", "remove one of the two"),
    ("[output]", "[lr_scheduler]\nmin_lr = 1e-5\n[output]", ":14:10: [lr_scheduler] min_lr", "kind"),
    ("[output]", "[validation]\nevery_steps = 5\n[output]", ":13:2: [validation] data", "prompts"),
    ("seq_len = 8", "seq_len = 65", "[training] seq_len", "max_position_embeddings"),
];

/// Row 19: each of them, whatever `n` is, and again for more than there are.
pub fn wrong(tally: &mut Tally, n: usize) {
    assert!(CASES.len() >= 60);
    let times = Times::default();
    for (from, to, at, says) in CASES.iter().cycle().take(n.max(CASES.len())) {
        tally.check(format_args!("{to:?} for {from:?}"), || {
            let job = Job::new();
            job.replace("job.toml", from, to);
            let ended = job.run(4, &[]);
            times.add(ended.took);
            assert_eq!(ended.status, 2, "{ended:?}");
            let place = if at.starts_with(':') { format!("fsdp-launch: job.toml{at}") } else { (*at).to_owned() };
            for part in [place.as_str(), says] {
                assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
            }
            assert!(!ended.stderr.contains("panicked"), "{ended:?}");
            // It is written before the first rank starts.
            assert!(!job.resolved_config().exists());
            job.assert_no_survivors(Duration::ZERO);
            assert!(ended.took <= AT_ONCE, "{ended:?}");
        });
    }
    tally.note(format!("{} configs, refused after {times}", CASES.len()));
}

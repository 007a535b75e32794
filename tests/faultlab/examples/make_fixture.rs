//! `make_fixture FOLDER`: a job, the checkpoint after half of its steps, and the metrics of all, for `fixtures/VERSION`.
//!
//! Run it for each released version whose checkpoints differ; what an earlier version has made stays as it is.

use std::path::Path;

use fsdp_tests_behaviour::job::Job;

fn main() {
    let folder = std::env::args_os().nth(1).expect("usage: make_fixture FOLDER");
    let folder = Path::new(&folder);
    let job = Job::new();
    // No path of this machine, any number of ranks, and numbers that do not depend on the processor's bf16 products.
    job.replace("job.toml", &format!("{:?}", job.path("out")), "\"out\"");
    job.replace("job.toml", "micro_batch_size = 2", "micro_batch_size = 1\nglobal_batch_size = 12");
    job.replace("job.toml", "steps = 20", "steps = 8");
    job.replace("job.toml", "every_steps = 0", "every_steps = 4\n[precision]\nparam = \"fp32\"");
    job.finish(2, &[]);
    for name in [
        "job.toml",
        "train.jsonl",
        "model/config.json",
        "model/tokenizer.json",
        "model/model.safetensors",
        "out/metrics.jsonl",
        "out/checkpoints/step-00000004/manifest.json",
        "out/checkpoints/step-00000004/rank-00000-of-00002.safetensors",
        "out/checkpoints/step-00000004/rank-00001-of-00002.safetensors",
    ] {
        let to = folder.join(name);
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("a new folder");
        std::fs::copy(job.path(name), to).expect("a copy");
    }
}

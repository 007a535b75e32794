//! Everything that can be known to be wrong before a rank starts: config, model files, tokenizer, data, output folder.
//! A run does this first; `fsdp-launch check` does nothing else and prints what it found.

use std::path::Path;

use fsdp_checkpoint::hf_folder::ModelFolder;
use fsdp_checkpoint::sharded::{self, Manifest};
use fsdp_config::{Backend, Init, JobConfig, Resume, compatible_for_resume};
use fsdp_control::ExitStatus;
use fsdp_data::{DataSpec, Format, TextTokenizer};
use fsdp_plan::plan::format_bytes;
use fsdp_plan::{Architecture, Unit, units};
use rustix::fs::Access;

use crate::backend;
use crate::cli::{BackendArg, JobArgs};
use crate::failure::Failure;
use crate::hub::{self, Wanted};
use crate::mpirun::Mpirun;
use crate::worker;

/// How much of each data file is parsed before the run.
const DATA_LIMIT_BYTES: u64 = 64 << 20;

/// A job in which nothing wrong was found.
#[derive(Debug)]
pub struct Checked {
    pub config: JobConfig,
    /// What starts the ranks for back end `mpi`.
    pub mpirun: Option<Mpirun>,
    /// (What, what is known of it), for a person.
    facts: Vec<(&'static str, String)>,
}

/// `fsdp-launch check`.
pub fn check(job: &JobArgs) -> Result<ExitStatus, Failure> {
    let checked = preflight(job, 1)?;
    checked.check_ranks(job.nproc, job.nproc)?;
    for (what, fact) in &checked.facts {
        crate::print(&format!("{what:<12}{fact}"));
    }
    crate::print("nothing wrong was found");
    Ok(ExitStatus::Done)
}

/// Checks all of the job that a node can check for itself.
///
/// # Errors
/// The first thing that is wrong, from the config outwards.
pub fn preflight(job: &JobArgs, num_nodes: usize) -> Result<Checked, Failure> {
    let mut config = load_config(job)?;
    backend::resolve(&mut config, num_nodes, job.nproc)?;
    let (device, backend) = (config.fsdp.device.name(), config.fsdp.backend.name());
    let mut facts =
        vec![("config", format!("{}: {} ranks on {device} over {backend}", job.config.display(), job.nproc))];
    let mpirun = if config.fsdp.backend == Backend::Mpi { Some(Mpirun::find()?) } else { None };
    if let Some(mpirun) = &mpirun {
        worker::check_mpi()?;
        facts.push(("mpirun", mpirun.to_string()));
    }
    hub::resolve(&mut config, Wanted::Everything)?;
    let arch = load_architecture(&config)?;
    let units = units::units(&arch);
    facts.push(("model", describe_model(&config, &arch, &units)));
    if config.model.init == Init::Pretrained {
        facts.push(("weights", check_weights(Path::new(&config.model.path), &units)?));
    }
    let (data, format) = check_data(&DataSpec::for_training(&config, arch.vocab_size))?;
    facts.push(("data", data));
    if let Some(spec) = DataSpec::for_validation(&config, arch.vocab_size) {
        facts.push(("validation", check_data(&spec)?.0));
    }
    if let Some(validation) = &config.validation {
        check_prompts(&config, &arch, &validation.prompts, format)?;
    }
    facts.push(("output", check_output(&config)?));
    Ok(Checked { config, mpirun, facts })
}

impl Checked {
    /// Checks what depends on the number of ranks of the whole run, `num_local_ranks` of them on this node.
    ///
    /// # Errors
    /// Batch, shards or the checkpoint to resume from do not go together with it.
    pub fn check_ranks(&self, num_ranks: usize, num_local_ranks: usize) -> Result<(), Failure> {
        let config = &self.config;
        config.num_microbatches(num_ranks as u64).map_err(Failure::bad_input)?;
        config.num_shards(num_ranks as u64, num_local_ranks as u64).map_err(Failure::bad_input)?;
        let checkpoints = sharded::list(&config.output.dir.join("checkpoints")).map_err(Failure::bad_input)?;
        match (&config.checkpoint.resume, checkpoints.last()) {
            (Resume::Auto, Some((_, path))) | (Resume::Path(path), _) => check_saved_config(path, config, num_ranks),
            (Resume::Auto | Resume::Never, _) => Ok(()),
        }
    }
}

/// The config with the flags laid over it.
pub fn load_config(job: &JobArgs) -> Result<JobConfig, Failure> {
    let mut sets = job.sets.clone();
    sets.extend(job.backend.map(|backend| {
        let name = match backend {
            BackendArg::Auto => "auto",
            BackendArg::Shm => "shm",
            BackendArg::Nccl => "nccl",
            BackendArg::Mpi => "mpi",
        };
        format!("fsdp.backend={name}")
    }));
    JobConfig::load(&job.config, &sets).map_err(Failure::bad_input)
}

/// The architecture of the model folder, long enough for the job's sequences.
pub fn load_architecture(config: &JobConfig) -> Result<Architecture, Failure> {
    let folder = Path::new(&config.model.path);
    if !folder.is_dir() {
        let found = if folder.exists() { "a file" } else { "no such folder" };
        return Err(Failure::bad_input(format!(
            "[model] path: expected a folder with config.json, or org/name on the Hugging Face Hub, got {:?}: {found}; \
             correct it",
            config.model.path
        )));
    }
    let arch = Architecture::from_config_json(&folder.join("config.json")).map_err(Failure::bad_input)?;
    let (seq_len, most) = (config.training.seq_len, arch.max_position_embeddings as u64);
    if seq_len > most {
        return Err(Failure::bad_input(format!(
            "[training] seq_len: expected at most {most}, the max_position_embeddings of {}, got {seq_len}; lower \
             seq_len, or use a model with a longer context",
            folder.join("config.json").display()
        )));
    }
    Ok(arch)
}

fn describe_model(config: &JobConfig, arch: &Architecture, units: &[Unit]) -> String {
    let num_params: usize = units.iter().map(Unit::num_params).sum();
    format!(
        "{}: {:?}, {num_params} parameters in {} blocks, vocabulary {}",
        config.model.path, arch.family, arch.num_layers, arch.vocab_size
    )
}

/// Opens all weight files and compares their headers with the architecture.
fn check_weights(folder: &Path, units: &[Unit]) -> Result<String, Failure> {
    let files = ModelFolder::open(folder).map_err(Failure::bad_input)?;
    let wanted: Vec<(String, Vec<usize>)> =
        units.iter().flat_map(|unit| &unit.params).map(|param| (param.name.clone(), param.shape.clone())).collect();
    files.expect(&wanted).map_err(Failure::bad_input)?;
    Ok(format!("{} tensors, {}, {}", wanted.len(), format_bytes(files.total_bytes()), files.dominant_dtype()))
}

/// What the data is, in words, and its format.
fn check_data(spec: &DataSpec) -> Result<(String, Format), Failure> {
    let report = fsdp_data::check(spec, DATA_LIMIT_BYTES).map_err(Failure::bad_input)?;
    if report.valid_tokens == 0 {
        return Err(Failure::bad_input(format!(
            "{}: expected tokens to learn from, got none: all labels are -100 or cut off; check the labels and [training] \
             seq_len",
            spec.files[0].display()
        )));
    }
    let dropped = match report.dropped_chars {
        0 => String::new(),
        num => format!(", {num} characters have no token and are left out"),
    };
    let text = format!(
        "{} samples in {}, {} tokens to learn, the longest has {}, {} are cut to {}{dropped}",
        report.samples,
        format_bytes(report.bytes_checked),
        report.valid_tokens,
        report.max_tokens,
        report.cut,
        spec.seq_len
    );
    Ok((text, report.format))
}

/// Prompts need a tokenizer, also where the data needs none, and room for an answer.
fn check_prompts(config: &JobConfig, arch: &Architecture, prompts: &[String], format: Format) -> Result<(), Failure> {
    if prompts.is_empty() {
        return Ok(());
    }
    let tokenizer = TextTokenizer::open(Path::new(&config.model.path)).map_err(Failure::bad_input)?;
    tokenizer.check_fits(arch.vocab_size).map_err(Failure::bad_input)?;
    for prompt in prompts {
        let num_tokens = tokenizer.encode_prompt(prompt, format).map_err(Failure::bad_input)?.len() as u64;
        if !(1..config.training.seq_len).contains(&num_tokens) {
            return Err(Failure::bad_input(format!(
                "[validation] prompts: expected 1 to {} tokens (less than [training] seq_len), got {num_tokens} in {prompt:?}; \
                 shorten it or raise seq_len",
                config.training.seq_len - 1
            )));
        }
    }
    Ok(())
}

/// The output folder can be written, and what it holds goes together with `resume` and the config.
fn check_output(config: &JobConfig) -> Result<String, Failure> {
    let dir = &config.output.dir;
    let absolute = std::path::absolute(dir).map_err(Failure::bad_input)?;
    let existing = absolute.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let refused = match rustix::fs::access(existing, Access::WRITE_OK | Access::EXEC_OK) {
        _ if !existing.is_dir() => Some("is no folder".to_owned()),
        Ok(()) => None,
        Err(error) => Some(format!("cannot be written: {error}")),
    };
    if let Some(reason) = refused {
        return Err(Failure::bad_input(format!(
            "[output] dir: expected a folder that can be written, got {}: {} {reason}; choose another one",
            dir.display(),
            existing.display()
        )));
    }
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(&dir.join("hf"), Path::new(&config.model.path)) {
        return Err(Failure::bad_input(format!(
            "[output] dir: expected another folder than that of [model] path, got {}: its hf/ would be replaced by the \
             export; choose another one",
            dir.display()
        )));
    }
    let checkpoints = sharded::list(&dir.join("checkpoints")).map_err(Failure::bad_input)?;
    let newest = checkpoints.last();
    match (&config.checkpoint.resume, newest) {
        (Resume::Never, Some((_, path))) => {
            return Err(Failure::bad_input(format!(
                "[checkpoint] resume: expected an output folder without checkpoints with \"never\", got {}; move them \
                 away, choose another [output] dir, or use \"auto\"",
                path.display()
            )));
        }
        (Resume::Path(path), _) if !path.join("manifest.json").is_file() => {
            return Err(Failure::bad_input(format!(
                "[checkpoint] resume: expected \"auto\", \"never\" or a checkpoint's folder, got {:?}, which has no \
                 manifest.json; give a folder such as out/checkpoints/step-00000010",
                path.display()
            )));
        }
        _ => {}
    }
    Ok(match newest {
        Some((step, _)) => format!("{}: {} checkpoints, the newest of step {step}", dir.display(), checkpoints.len()),
        None => format!("{}: no checkpoint yet", dir.display()),
    })
}

/// Refuses a config that does not continue the checkpoint's. A manifest that cannot be read is the workers' affair: they
/// validate checkpoints in full and may fall back to an older one.
fn check_saved_config(checkpoint: &Path, config: &JobConfig, num_ranks: usize) -> Result<(), Failure> {
    let path = checkpoint.join("manifest.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
    let Ok(manifest) = Manifest::parse(&text, &path) else { return Ok(()) };
    let origin = format!("{} (saved config)", checkpoint.display());
    if let Some(global_batch_size) = manifest.meta.trainer["global_batch_size"].as_u64() {
        config
            .clone()
            .keep_global_batch(global_batch_size, num_ranks as u64)
            .map_err(|error| Failure::bad_input(format!("cannot continue {}: {error}", checkpoint.display())))?;
    }
    let saved = JobConfig::parse(&origin, &manifest.meta.config).map_err(Failure::bad_input)?;
    compatible_for_resume(&saved, config).map_err(|differences| {
        let lines: Vec<String> = differences.iter().map(ToString::to_string).collect();
        Failure::bad_input(format!("cannot continue {}: {}", checkpoint.display(), lines.join("\n  ")))
    })
}

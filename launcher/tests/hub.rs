//! `[model] path` as a name on a model hub, against a hub on this machine.

mod job;

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fsdp_checkpoint::sharded::{self, Chunk, ManifestMeta, ShardWriter, State};
use job::{Ended, Job, end, free_port, send};
use rustix::process::Signal;

const FIRST: &str = "1111111111111111111111111111111111111111";
const SECOND: &str = "2222222222222222222222222222222222222222";

/// What the hub has and does. Weights are redirected, as large files are.
#[derive(Debug, Default)]
struct Served {
    /// The newest commit of `main`.
    commit: String,
    /// The files of each commit.
    files: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Answers all requests.
    refusal: Option<u16>,
    /// Requests without it are answered with 401.
    token: Option<String>,
    /// After how many bytes the next bodies of weights end.
    cuts: VecDeque<usize>,
    /// Before each body of weights.
    delay: Duration,
    /// (File, first byte) of each body asked for.
    downloads: Vec<(String, usize)>,
    num_requests: usize,
}

struct Hub {
    port: u16,
    state: Arc<Mutex<Served>>,
}

impl Hub {
    /// Has the job's model folder as `org/tiny`, with files that nobody needs, and the job use it.
    fn of(job: &Job) -> Self {
        let entries = std::fs::read_dir(job.path("model")).unwrap().flatten();
        let mut files: BTreeMap<String, Vec<u8>> = entries
            .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
            .collect();
        for name in ["pytorch_model.bin", "model.gguf", "README.md", "original/consolidated.00.pth"] {
            files.insert(name.to_owned(), b"not for us".to_vec());
        }
        for name in ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"] {
            files.insert(name.to_owned(), format!("{{\"of\": \"{name}\"}}").into_bytes());
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let commit = FIRST.to_owned();
        let state = Served { files: BTreeMap::from([(commit.clone(), files)]), commit, ..Served::default() };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                // A client that goes away is no error of the hub's.
                std::thread::spawn(move || _ = answer(stream, port, &state));
            }
        });
        job.write("job.toml", job.read("job.toml").replace("path = \"model\"", "path = \"org/tiny\""));
        Self { port, state }
    }

    fn state(&self) -> MutexGuard<'_, Served> {
        self.state.lock().unwrap()
    }

    /// The files whose bodies were asked for since the last call, sorted.
    fn take_downloads(&self) -> Vec<String> {
        let mut names: Vec<String> = self.state().downloads.drain(..).map(|(name, _)| name).collect();
        names.sort();
        names
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn command(&self, job: &Job, args: &[&str]) -> Command {
        let mut command = job.command(args);
        for name in ["HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"] {
            command.env_remove(name);
        }
        command
            .env("HF_ENDPOINT", self.endpoint())
            .env("HF_HOME", job.path("home"))
            .env("NO_PROXY", "127.0.0.1")
            .env("no_proxy", "127.0.0.1");
        command
    }

    /// `check` of the job.
    fn check(&self, job: &Job, args: &[&str], variables: &[(&str, &str)]) -> Ended {
        let mut command = self.command(job, &["check", "job.toml"]);
        end(command.args(args).envs(variables.iter().copied()).spawn().unwrap())
    }
}

/// Answers one request.
fn answer(stream: TcpStream, port: u16, state: &Mutex<Served>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        match line?.split_once(": ") {
            Some((name, value)) => _ = headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        }
    }
    let mut stream = stream;
    let mut send = |status: u16, headers: &str, len: usize, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {len}\r\n{headers}\r\n")?;
        stream.write_all(body)
    };
    let mut hub = state.lock().unwrap();
    hub.num_requests += 1;
    let bearer = hub.token.as_ref().map(|token| format!("Bearer {token}"));
    let denied = bearer.filter(|bearer| headers.get("authorization") != Some(bearer)).map(|_| 401);
    if let Some(status) = hub.refusal.or(denied) {
        return send(status, "", 0, b"");
    }
    let commit_of = |revision: &str| if revision == "main" { hub.commit.clone() } else { revision.to_owned() };
    if let Some(revision) = path.strip_prefix("/api/models/org/tiny/revision/") {
        let commit = commit_of(revision);
        let Some(files) = hub.files.get(&commit) else { return send(404, "", 0, b"") };
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"id": "org/tiny", "sha": commit, "siblings": siblings}).to_string();
        return send(200, "Content-Type: application/json\r\n", body.len(), body.as_bytes());
    }
    let rest = path.strip_prefix("/org/tiny/resolve/").or_else(|| path.strip_prefix("/large/"));
    let found = rest.and_then(|rest| rest.split_once('/')).and_then(|(revision, name)| {
        let commit = commit_of(revision);
        let bytes = hub.files.get(&commit)?.get(name)?.clone();
        Some((commit, name.to_owned(), bytes))
    });
    let Some((commit, name, bytes)) = found else { return send(404, "", 0, b"") };
    let etag = format!("{:016x}", name_of(&bytes));
    let is_large = name.ends_with(".safetensors");
    if is_large && path.starts_with("/org/") {
        let location = format!("http://127.0.0.1:{port}/large/{commit}/{name}");
        let headers = format!("X-Repo-Commit: {commit}\r\nX-Linked-ETag: \"{etag}\"\r\nLocation: {location}\r\n");
        return send(302, &headers, 0, b"");
    }
    let range = headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let (start, last) = range.expect("all files are asked for with a range");
    let start: usize = start.parse().unwrap();
    if start >= bytes.len() {
        return send(416, "", 0, b"");
    }
    let is_download = last.is_empty();
    let stop = if is_download { bytes.len() } else { last.parse::<usize>().unwrap() + 1 };
    let mut body = &bytes[start..stop];
    let len = body.len();
    let mut delay = Duration::ZERO;
    if is_download {
        hub.downloads.push((name.clone(), start));
        if is_large {
            delay = hub.delay;
            body = &body[..hub.cuts.pop_front().unwrap_or(len)];
        }
    }
    drop(hub);
    std::thread::sleep(delay);
    let range = format!("bytes {start}-{}/{}", stop - 1, bytes.len());
    let weak = if name.ends_with(".json") { "W/" } else { "" };
    send(206, &format!("X-Repo-Commit: {commit}\r\nETag: {weak}\"{etag}\"\r\nContent-Range: {range}\r\n"), len, body)
}

/// A name for the bytes (FNV-1a).
fn name_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

fn snapshot(job: &Job, commit: &str) -> std::path::PathBuf {
    job.path(&format!("home/hub/models--org--tiny/snapshots/{commit}"))
}

fn assert_says(ended: &Ended, status: i32, parts: &[&str]) {
    assert_eq!(ended.status, status, "{ended:?}");
    for part in parts {
        assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
    }
}

const SMALL: [&str; 5] =
    ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];

#[test]
fn a_run_downloads_each_file_it_needs_once_and_the_ranks_get_the_folder() {
    let job = Job::new(2);
    let hub = Hub::of(&job);
    let run = |args: &[&str]| {
        let mut command = hub.command(&job, &["--nproc", "2", "job.toml"]);
        end(command.args(args).env("WORKER_SCRIPT", "").spawn().unwrap())
    };
    let planned = end(hub.command(&job, &["plan", "job.toml"]).spawn().unwrap());
    assert_says(&planned, 0, &["downloading org/tiny config.json"]);
    assert_eq!(hub.take_downloads(), ["config.json"]);

    assert_says(&run(&[]), 0, &["fsdp-launch: downloading org/tiny model.safetensors ("]);
    let mut rest = SMALL.to_vec();
    rest.retain(|name| *name != "config.json");
    rest.insert(2, "model.safetensors");
    assert_eq!(hub.take_downloads(), rest);
    let path = snapshot(&job, FIRST);
    assert!(job.read("out/config.toml").contains(&format!("path = \"{}\"", path.display())));
    for name in SMALL.iter().chain(&["model.safetensors"]) {
        assert_eq!(std::fs::read(path.join(name)).unwrap(), hub.state().files[FIRST][*name], "{name}");
    }

    let again = run(&["--set", "training.steps=3"]);
    assert_says(&again, 0, &[]);
    assert!(!again.stderr.contains("downloading"), "{again:?}");
    let checked = hub.check(&job, &[], &[]);
    assert!(checked.stdout.contains(&path.display().to_string()), "{checked:?}");
    assert_eq!(hub.take_downloads(), [""; 0]);
}

#[test]
fn weights_are_what_the_index_names_and_none_for_random_ones() {
    let job = Job::new(2);
    let names: Vec<String> = {
        let mut names = Vec::new();
        job.write_weights(|name, _| {
            names.push(format!("\"{name}\": \"model-00001-of-00001.safetensors\""));
            true
        });
        names
    };
    std::fs::rename(job.path("model/model.safetensors"), job.path("model/model-00001-of-00001.safetensors")).unwrap();
    job.write("model/model.safetensors.index.json", format!("{{\"weight_map\": {{{}}}}}", names.join(",")));
    job.write("model/extra.safetensors", b"not in the index");
    let hub = Hub::of(&job);
    assert_says(&hub.check(&job, &["--set", "model.init=random"], &[]), 0, &[]);
    assert_eq!(hub.take_downloads(), SMALL);
    // In a folder of its own for the hub's files.
    let cache = job.path("cache").display().to_string();
    assert_says(&hub.check(&job, &[], &[("HF_HUB_CACHE", &cache)]), 0, &[]);
    let downloads = hub.take_downloads();
    assert_eq!(downloads.iter().filter(|name| name.contains("safetensors")).count(), 2, "{downloads:?}");
    assert!(job.path("cache/models--org--tiny/refs/main").is_file());
    hub.state().files.get_mut(FIRST).unwrap().remove("model-00001-of-00001.safetensors");
    std::fs::remove_dir_all(job.path("cache")).unwrap();
    assert_says(
        &hub.check(&job, &[], &[("HF_HUB_CACHE", &cache)]),
        2,
        &["lacks model-00001-of-00001.safetensors, which its model.safetensors.index.json names"],
    );
}

#[test]
fn a_complete_cache_is_enough_without_a_network() {
    let job = Job::new(2);
    let hub = Hub::of(&job);
    let offline = [("HF_HUB_OFFLINE", "1")];
    assert_says(&hub.check(&job, &[], &offline), 2, &["[model] path", "HF_HUB_OFFLINE", "lacks its config.json"]);
    assert_eq!(end(hub.command(&job, &["plan", "job.toml"]).spawn().unwrap()).status, 0);
    assert_says(&hub.check(&job, &[], &offline), 2, &["lacks its model.safetensors"]);
    let unreachable = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    assert_says(
        &hub.check(&job, &[], &unreachable),
        2,
        &["127.0.0.1:9 cannot be asked", "lacks its model.safetensors"],
    );
    assert_says(&hub.check(&job, &[], &[]), 0, &[]);
    let num_requests = hub.state().num_requests;
    let ended = hub.check(&job, &[], &offline);
    assert_says(&ended, 0, &[]);
    assert_eq!(ended.stderr, "");
    assert_says(&hub.check(&job, &["--set", &format!("model.path=org/tiny@{FIRST}")], &offline), 0, &[]);
    let ended = hub.check(&job, &[], &unreachable);
    assert_says(&ended, 0, &["using the cache, "]);
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    assert_eq!(hub.state().num_requests, num_requests);
    hub.state().refusal = Some(503);
    assert_says(&hub.check(&job, &[], &[]), 0, &["503", "using the cache, "]);
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let job = Job::new(2);
    let hub = Hub::of(&job);
    let half = hub.state().files[FIRST]["model.safetensors"].len() / 2;
    // Within one run.
    hub.state().cuts = [half].into();
    assert_says(&hub.check(&job, &[], &[]), 0, &["trying again in 1 s"]);
    let starts = |hub: &Hub| {
        let downloads = std::mem::take(&mut hub.state().downloads);
        let weights = downloads.into_iter().filter(|(name, _)| name == "model.safetensors");
        weights.map(|(_, start)| start).collect::<Vec<_>>()
    };
    assert_eq!(starts(&hub), [0, half]);
    // Over two runs.
    std::fs::remove_dir_all(job.path("home")).unwrap();
    hub.state().cuts = [half, 0, 0, 0].into();
    let ended = hub.check(&job, &[], &[]);
    assert_says(&ended, 2, &["[model] path", "its model.safetensors cannot be downloaded", "run again"]);
    assert_eq!(starts(&hub), [0, half, half, half]);
    assert_says(&hub.check(&job, &[], &[]), 0, &["of it are here"]);
    assert_eq!(starts(&hub), [half]);
    // With a whole one that has not got its name, because the launcher was killed.
    for name in ["model.safetensors", "tokenizer.json"] {
        let path = snapshot(&job, FIRST).join(name);
        let blob = std::fs::canonicalize(&path).unwrap();
        std::fs::rename(&blob, blob.with_extension("part")).unwrap();
        assert_says(&hub.check(&job, &[], &[]), 0, &[]);
        assert_eq!(std::fs::read(&path).unwrap(), hub.state().files[FIRST][name]);
    }
}

#[test]
fn a_refusal_says_what_to_do() {
    let job = Job::new(2);
    let hub = Hub::of(&job);
    let token = [("HF_TOKEN", "hf_test")];
    let gated = format!("{}/org/tiny", hub.endpoint());
    for (status, variables, parts) in [
        (401, &[][..], ["without a token (401)", "accept the licence at", &gated, "set HF_TOKEN"]),
        (401, &token, ["does not take the token (401)", "set HF_TOKEN", "[model] path", "no such folder"]),
        (403, &token, ["(403)", "gated", &gated, "HF_TOKEN belongs to"]),
        (404, &[], ["no such model", "revision \"main\" (404)", "check the name", "\"org/tiny\""]),
    ] {
        hub.state().refusal = Some(status);
        assert_says(&hub.check(&job, &[], variables), 2, &parts);
    }
    hub.state().refusal = None;
    assert_says(&hub.check(&job, &["--set", "model.path=org/tiny@v9"], &[]), 2, &["revision \"v9\" (404)"]);
    assert_says(&hub.check(&job, &[], &[("HF_ENDPOINT", "nonsense")]), 2, &["nonsense", "check"]);
    job.write("file", "");
    let home = job.path("file").display().to_string();
    assert_says(&hub.check(&job, &[], &[("HF_HOME", &home)]), 2, &["HF_HOME", "can be written"]);
    hub.state().files.get_mut(FIRST).unwrap().remove("model.safetensors");
    assert_says(&hub.check(&job, &[], &[]), 2, &["has no safetensors", "convert it"]);
    hub.state().files.get_mut(FIRST).unwrap().remove("config.json");
    assert_says(&hub.check(&job, &[], &[]), 2, &["has no config.json"]);
    assert_eq!(hub.take_downloads(), [""; 0]);
}

#[test]
fn the_token_is_that_of_the_variable_or_of_the_file() {
    let job = Job::new(2);
    let hub = Hub::of(&job);
    hub.state().token = Some("hf_test".to_owned());
    assert_says(&hub.check(&job, &[], &[]), 2, &["without a token"]);
    assert_says(&hub.check(&job, &[], &[("HF_TOKEN", "hf_other")]), 2, &["does not take the token"]);
    assert_says(&hub.check(&job, &["--set", "model.init=random"], &[("HF_TOKEN", "hf_test")]), 0, &[]);
    std::fs::create_dir_all(job.path("home")).unwrap();
    job.write("home/token", "hf_test\n");
    assert_says(&hub.check(&job, &[], &[]), 0, &[]);
}

#[test]
fn two_nodes_with_one_cache_download_each_file_once_and_run() {
    let job = Job::new(2);
    let hub = Hub::of(&job);
    hub.state().delay = Duration::from_secs(1);
    let port = free_port().to_string();
    let start = |node_rank: &str| {
        let nodes = ["--nnodes", "2", "--node-rank", node_rank, "--master-addr", "127.0.0.1", "--master-port", &port];
        let mut command = hub.command(&job, &nodes);
        command.args(["--nproc", "1", "--backend", "shm", "job.toml"]).env("WORKER_SCRIPT", "").spawn().unwrap()
    };
    let ended = [start("0"), start("1")].map(end);
    for ended in &ended {
        assert_eq!(ended.status, 0, "{ended:?}");
    }
    let waited = ended.iter().filter(|ended| ended.stderr.contains("waiting for another launcher"));
    assert_eq!(waited.count(), 1, "{ended:?}");
    let mut all = SMALL.to_vec();
    all.insert(3, "model.safetensors");
    assert_eq!(hub.take_downloads(), all);
}

#[test]
fn a_signal_ends_a_download_at_once_and_the_next_run_does_it() {
    let job = Job::new(2);
    let hub = Hub::of(&job);
    let start = || hub.command(&job, &["--nproc", "1", "job.toml"]).env("WORKER_SCRIPT", "").spawn().unwrap();
    for (signal, status) in [(Signal::TERM, 75), (Signal::KILL, 128 + 9)] {
        hub.state().delay = Duration::from_secs(20);
        let child = start();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !hub.state().downloads.iter().any(|(name, _)| name == "model.safetensors") {
            assert!(Instant::now() < deadline, "nothing is downloaded");
            std::thread::sleep(Duration::from_millis(2));
        }
        send(child.id(), signal);
        let ended = end(child);
        assert_eq!(ended.status, status, "{ended:?}");
        assert!(ended.took < Duration::from_secs(10), "{ended:?}");
        hub.state().delay = Duration::ZERO;
        hub.take_downloads();
    }
    assert_says(&end(start()), 0, &["downloading org/tiny model.safetensors"]);
    assert_eq!(hub.take_downloads(), ["model.safetensors"]);
}

#[test]
fn a_resumed_run_keeps_its_snapshot_when_the_branch_moves() {
    let job = Job::new(3);
    let hub = Hub::of(&job);
    let run = |args: &[&str]| {
        let mut command = hub.command(&job, &["--nproc", "1", "job.toml"]);
        end(command.args(args).env("WORKER_SCRIPT", "").spawn().unwrap())
    };
    assert_says(&run(&[]), 0, &[]);
    let root = job.path("out/checkpoints");
    let chunk = Chunk { state: State::Param, name: "w", shape: &[1], start: 0, len: 1 };
    let mut writer = ShardWriter::create(&root, 3, "a", 0, 1, &[chunk]).unwrap();
    writer.write_f32(&[1.0]).unwrap();
    let meta = ManifestMeta {
        config: job.read("out/config.toml"),
        data_digest: String::new(),
        tokenizer_digest: String::new(),
        trainer: serde_json::Value::Null,
        versions: BTreeMap::new(),
    };
    sharded::commit(&root, 3, "a", &[writer.finish().unwrap()], meta).unwrap();
    {
        let mut state = hub.state();
        let mut files = state.files[FIRST].clone();
        files.insert("generation_config.json".to_owned(), b"{\"new\": true}".to_vec());
        state.files.insert(SECOND.to_owned(), files);
        state.commit = SECOND.to_owned();
    }
    hub.take_downloads();
    let path_line = |commit| format!("path = \"{}\"", snapshot(&job, commit).display());
    let num_requests = hub.state().num_requests;
    assert_says(&run(&["--set", "training.steps=4"]), 0, &[]);
    assert!(job.read("out/config.toml").contains(&path_line(FIRST)));
    assert_eq!(hub.state().num_requests, num_requests, "all that it needs is here");
    // Also where the cache has been lost.
    std::fs::remove_dir_all(job.path("home")).unwrap();
    assert_says(&run(&["--set", "training.steps=5"]), 0, &["downloading"]);
    assert!(job.read("out/config.toml").contains(&path_line(FIRST)));
    // A branch that is asked for by name is a change.
    let changed = run(&["--set", "training.steps=6", "--set", "model.path=org/tiny@main"]);
    assert_says(&changed, 2, &["[model] path: expected", FIRST, SECOND]);
    // Elsewhere the new commit is used, with the old one's files where they are the same.
    assert!(hub.take_downloads().contains(&"model.safetensors".to_owned()));
    std::fs::remove_dir_all(snapshot(&job, SECOND)).unwrap();
    assert_says(&run(&["--set", "output.dir=other"]), 0, &[]);
    assert!(job.read("other/config.toml").contains(&path_line(SECOND)));
    assert_eq!(hub.take_downloads(), [""; 0]);
}

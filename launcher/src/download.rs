//! The files of a model on the Hugging Face Hub: those that a run opens, from the cache or from the network.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fsdp_checkpoint::export::is_side_file;
use fsdp_checkpoint::hf_folder::parse_index;
use fsdp_plan::plan::format_bytes;
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::failure::Failure;
use crate::hub::Wanted;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Waits between attempts that bring no new byte of a file.
const PAUSES_SECS: [u64; 3] = [1, 2, 4];

/// One model, the place it comes from, and the cache it goes to.
#[derive(Debug)]
pub struct Hub {
    id: String,
    revision: String,
    endpoint: String,
    has_token: bool,
    is_offline: bool,
    cache: Cache,
    api: Api,
}

impl Hub {
    /// With the variables that Hugging Face's own programs read.
    pub fn from_env(id: String, revision: String) -> Result<Self, Failure> {
        let home = variable("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
            Some(cache.or_else(|| Some(Path::new(&variable("HOME")?).join(".cache")))?.join("huggingface"))
        });
        let home = home.and_then(|home| std::path::absolute(home).ok()).ok_or_else(|| {
            Failure::bad_input("HF_HOME: expected a folder for the model's files, got neither it nor HOME; set it")
        })?;
        let dir = variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let cache = Cache::new(std::path::absolute(dir).map_err(Failure::bad_input)?);
        let token = variable("HF_TOKEN").or_else(|| {
            let path = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
            Some(fs::read_to_string(path).ok()?.trim().to_owned()).filter(|token| !token.is_empty())
        });
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let is_offline = variable("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&&*value.to_ascii_lowercase()));
        let has_token = token.is_some();
        let api = ApiBuilder::from_cache(cache.clone())
            .with_token(token)
            .with_endpoint(endpoint.clone())
            .with_progress(io::stderr().is_terminal())
            .build()
            .map_err(Failure::bad_input)?;
        Ok(Self { id, revision, endpoint, has_token, is_offline, cache, api })
    }

    /// The folder with the files of the revision.
    pub fn snapshot(&self, wanted: Wanted, with_weights: bool) -> Result<PathBuf, Failure> {
        let lacks = |missing: String| format!("the cache {} lacks its {missing}", self.cache.path().display());
        if self.is_offline {
            return self.cached(with_weights).map_err(|missing| {
                let what = "run once without HF_HUB_OFFLINE where there is a network, or give the model's folder";
                self.refused(&format!("with HF_HUB_OFFLINE, {}", lacks(missing)), what)
            });
        }
        match self.api.repo(self.repo(&self.revision)).info() {
            Ok(info) => self.download(&info, wanted, with_weights),
            Err(error) if may_pass(&error) => match self.cached(with_weights) {
                Ok(folder) => {
                    crate::say(&format!(
                        "fsdp-launch: {} cannot be asked for {} ({error}); using the cache, {}",
                        self.endpoint,
                        self.id,
                        folder.display()
                    ));
                    Ok(folder)
                }
                Err(missing) => Err(self.refused(
                    &format!("{} cannot be asked ({error}), and {}", self.endpoint, lacks(missing)),
                    "check the network and HF_ENDPOINT, or give the model's folder",
                )),
            },
            Err(error) => Err(self.denied(&error)),
        }
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, revision.to_owned())
    }

    /// The folder in the cache with all that is wanted, or the first file that it lacks.
    fn cached(&self, with_weights: bool) -> Result<PathBuf, String> {
        let cache = self.cache.repo(self.repo(&self.revision));
        let commit = cache.pointer_path(&self.revision);
        let folder = match cache.get(CONFIG) {
            _ if commit.is_dir() => commit,
            Some(config) => config.parent().expect("a file of the cache is in a folder").to_owned(),
            None => return Err(CONFIG.to_owned()),
        };
        first_missing(&folder, with_weights).map_or(Ok(folder), Err)
    }

    /// Downloads what is wanted of the commit and not in the cache.
    fn download(&self, info: &RepoInfo, wanted: Wanted, with_weights: bool) -> Result<PathBuf, Failure> {
        let commit = &info.sha;
        if commit.is_empty() || !commit.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            let reason = format!("{} names {commit:?} as its commit", self.endpoint);
            return Err(self.refused(&reason, "check HF_ENDPOINT"));
        }
        let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
        let lacks = |what: &str, hint: &str| self.refused(&format!("the model on {} {what}", self.endpoint), hint);
        if !has(CONFIG) {
            return Err(lacks("has no config.json", "choose a model in the format of transformers"));
        }
        let folder = self.cache.repo(self.repo(commit)).pointer_path(commit);
        let files = info.siblings.iter().map(|file| file.rfilename.as_str());
        let is_wanted = |name: &&str| match wanted {
            Wanted::Config => *name == CONFIG,
            Wanted::Everything => *name == CONFIG || is_side_file(name),
        };
        let mut names: Vec<&str> = files.filter(is_wanted).collect();
        let weights = [SINGLE, INDEX].into_iter().find(|name| has(name));
        match weights {
            _ if !with_weights => {}
            Some(name) => names.push(name),
            None => {
                let hint = "choose one that has them, or convert it (save_pretrained in transformers does) and give its \
                            folder";
                return Err(lacks("has no safetensors (model.safetensors or its index)", hint));
            }
        }
        self.fetch(commit, &folder, &names)?;
        if with_weights && weights == Some(INDEX) {
            let path = folder.join(INDEX);
            let text = fs::read_to_string(&path)
                .map_err(|error| Failure::bad_input(format!("{}: cannot be read: {error}", path.display())))?;
            let shards = parse_index(&text, &path).map_err(Failure::bad_input)?;
            if let Some(name) = shards.keys().find(|name| !has(name)) {
                return Err(lacks(&format!("lacks {name}, which its {INDEX} names"), "choose another revision"));
            }
            self.fetch(commit, &folder, &shards.keys().map(String::as_str).collect::<Vec<_>>())?;
        }
        let branch = self.cache.repo(self.repo(&self.revision));
        if self.revision != *commit && branch.get(CONFIG) != Some(folder.join(CONFIG)) {
            // For runs without network. A cache that cannot be written may have all files all the same.
            let _ = branch.create_ref(commit);
        }
        Ok(folder)
    }

    /// Brings the files into the folder, where they are not.
    fn fetch(&self, commit: &str, folder: &Path, names: &[&str]) -> Result<(), Failure> {
        if names.iter().all(|name| folder.join(name).exists()) {
            return Ok(());
        }
        let _lock = self.lock()?;
        let repo = self.api.repo(self.repo(commit));
        for name in names {
            // Another launcher may have brought it meanwhile.
            if !folder.join(name).exists() {
                self.fetch_file(&repo, commit, &folder.join(name), name)?;
            }
        }
        Ok(())
    }

    /// One launcher at a time: the downloads' own locks give up after seconds.
    fn lock(&self) -> Result<File, Failure> {
        let dir = self.cache.path().join(".locks").join(self.repo(&self.revision).folder_name());
        let path = dir.join("fsdp-launch.lock");
        let failed = |error: io::Error| {
            Failure::bad_input(format!(
                "HF_HOME: expected a folder that can be written, to download {} to, got {}: {error}; set another one",
                self.id,
                path.display()
            ))
        };
        fs::create_dir_all(&dir).map_err(failed)?;
        let file = File::create(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                crate::say(&format!("fsdp-launch: waiting for another launcher that downloads {}", self.id));
                file.lock().map_err(failed)?;
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        Ok(file)
    }

    /// Downloads a file, from where the last attempt ended.
    fn fetch_file(&self, repo: &ApiRepo, commit: &str, file: &Path, name: &str) -> Result<(), Failure> {
        let mut pauses = PAUSES_SECS.iter();
        let mut most_bytes = 0;
        let mut is_first = true;
        loop {
            let mut num_bytes = 0;
            let Err(error) = self.try_file(repo, commit, (file, name), is_first, &mut num_bytes) else {
                return Ok(());
            };
            is_first = false;
            if !may_pass(&error) {
                return Err(self.denied(&error));
            }
            if num_bytes > most_bytes {
                most_bytes = num_bytes;
                pauses = PAUSES_SECS.iter();
            }
            let Some(&pause_secs) = pauses.next() else {
                return Err(self.refused(
                    &format!("its {name} cannot be downloaded from {} ({error})", self.endpoint),
                    "run again: what has come is kept, and the download goes on from there",
                ));
            };
            crate::say(&format!("fsdp-launch: {} {name}: {error}; trying again in {pause_secs} s", self.id));
            std::thread::sleep(Duration::from_secs(pause_secs));
        }
    }

    /// One attempt. Sets `num_bytes` to what has come so far where it fails in the midst of the file.
    fn try_file(
        &self,
        repo: &ApiRepo,
        commit: &str,
        (file, name): (&Path, &str),
        is_first: bool,
        num_bytes: &mut u64,
    ) -> Result<(), ApiError> {
        let metadata = self.api.metadata(&repo.url(name))?;
        let (etag, size_bytes) = (metadata.etag(), metadata.size() as u64);
        if metadata.commit_hash() != commit {
            return Err(ApiError::InvalidHeader("x-repo-commit"));
        }
        // It becomes a file's name, in a folder `W` where it is a weak one.
        let hash = etag.trim_start_matches("W/");
        if hash.is_empty() || !hash.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return Err(ApiError::InvalidHeader("etag"));
        }
        let blob = self.cache.repo(self.repo(commit)).blob_path(etag);
        if file.symlink_metadata().is_ok() {
            // A link to what has been deleted.
            fs::remove_file(file)?;
        }
        if fs::metadata(&blob).is_ok_and(|blob| blob.len() == size_bytes) {
            // Another commit's file is the same.
            fs::create_dir_all(file.parent().expect("a file of the cache is in a folder"))?;
            let depth = name.split('/').count() + 1;
            let link: PathBuf = std::iter::repeat_n("..", depth).chain(["blobs", etag]).collect();
            std::os::unix::fs::symlink(link, file)?;
            return Ok(());
        }
        let part = blob.with_extension("part");
        let part_bytes = || fs::metadata(&part).map_or(0, |part| part.len());
        // What servers send compressed has no end to go on from, and a whole one has no rest to ask for: a launcher was
        // killed before it gave that its name.
        let is_weights = name.ends_with(".safetensors");
        if !is_weights || part_bytes() >= size_bytes {
            let _ = fs::remove_file(&part);
        }
        if is_first {
            let rest = match part_bytes() {
                0 => String::new(),
                bytes => format!(", {} of it are here", format_bytes(bytes)),
            };
            let size = format_bytes(size_bytes);
            crate::say(&format!("fsdp-launch: downloading {} {name} ({size}{rest})", self.id));
        }
        let downloaded = repo.download(name);
        if io::stderr().is_terminal() {
            // The bar leaves the cursor behind it.
            crate::say("");
        }
        if let Err(error) = downloaded {
            *num_bytes = part_bytes();
            return Err(error);
        }
        let got_bytes = fs::metadata(&blob)?.len();
        if is_weights && got_bytes != size_bytes {
            fs::remove_file(file)?;
            fs::remove_file(&blob)?;
            let message = format!("expected {size_bytes} bytes, got {got_bytes}");
            return Err(io::Error::new(ErrorKind::UnexpectedEof, message).into());
        }
        Ok(())
    }

    /// What an answer means that will not change by itself.
    fn denied(&self, error: &ApiError) -> Failure {
        let Self { id, endpoint, revision, .. } = self;
        let status = match error {
            ApiError::RequestError(error) => match **error {
                ureq::Error::StatusCode(status) => Some(status),
                _ => None,
            },
            _ => None,
        };
        match status {
            Some(401) if self.has_token => self.refused(
                &format!("{endpoint} does not take the token (401)"),
                "set HF_TOKEN to a valid one, or, for a public model, remove it",
            ),
            Some(401) => self.refused(
                &format!("{endpoint} does not show it without a token (401): there is no such model, or it is gated or private"),
                &format!("check the name; for a gated model accept the licence at {endpoint}/{id} and set HF_TOKEN"),
            ),
            Some(403) => self.refused(
                &format!("{endpoint} does not give it to this token (403): the model is gated or private"),
                &format!("accept the licence at {endpoint}/{id} with the account that HF_TOKEN belongs to"),
            ),
            Some(404) => self.refused(
                &format!("{endpoint} has no such model, or not its revision {revision:?} (404)"),
                "check the name",
            ),
            _ => self.refused(&format!("it cannot be had from {endpoint} ({error})"), "check HF_ENDPOINT and HF_HOME"),
        }
    }

    fn refused(&self, reason: &str, what_to_do: &str) -> Failure {
        Failure::bad_input(format!(
            "[model] path: expected a folder or a model on the Hugging Face Hub, got {:?}: there is no such folder, and \
             {reason}; {what_to_do}",
            self.id
        ))
    }
}

/// The variable's value, where it has one.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// The same request may succeed later: network and servers, not what is asked for and not the disk.
fn may_pass(error: &ApiError) -> bool {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => matches!(status, 408 | 429 | 500..),
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => false,
            _ => true,
        },
        ApiError::IoError(error) => !matches!(
            error.kind(),
            ErrorKind::StorageFull
                | ErrorKind::QuotaExceeded
                | ErrorKind::FileTooLarge
                | ErrorKind::PermissionDenied
                | ErrorKind::ReadOnlyFilesystem
                | ErrorKind::NotFound
                | ErrorKind::AlreadyExists
        ),
        ApiError::LockAcquisition(_) => true,
        _ => false,
    }
}

/// The first file that is wanted and not there. An index that cannot be read is not missing.
pub fn first_missing(folder: &Path, with_weights: bool) -> Option<String> {
    let mut names = BTreeSet::from([CONFIG.to_owned()]);
    if with_weights && !folder.join(SINGLE).exists() {
        let index = folder.join(INDEX);
        match fs::read_to_string(&index) {
            Ok(text) => names.extend(parse_index(&text, &index).unwrap_or_default().into_keys()),
            Err(_) => _ = names.insert(SINGLE.to_owned()),
        }
    }
    names.into_iter().find(|name| !folder.join(name).exists())
}

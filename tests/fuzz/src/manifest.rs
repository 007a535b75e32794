//! A checkpoint's manifest.

use std::collections::BTreeMap;
use std::path::Path;

use fsdp_checkpoint::sharded::Manifest;
use xxhash_rust::xxh3::xxh3_128;

use crate::within::memory_bound;

/// A manifest as it stands, and then with the digest that it should begin with.
///
/// The pieces of an accepted one lie inside their files and tile their tensors, and what it says is the same once it is
/// written again.
pub fn manifest(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    check(text);
    if let Some(rest) = text.splitn(3, '\n').nth(2) {
        check(&format!("{{\n  \"digest\": \"{:032x}\",\n{rest}", xxh3_128(rest.as_bytes())));
    }
}

fn check(text: &str) {
    let path = Path::new("step-00000010/manifest.json");
    match memory_bound(text.len(), || Manifest::parse(text, path)) {
        Ok(manifest) => {
            assert_tiled(&manifest);
            let again = Manifest::parse(&manifest.to_sealed_text(), path);
            assert_eq!(again.as_ref().ok(), Some(&manifest), "{again:?}");
        }
        Err(error) => assert!(error.to_string().contains("step-00000010/manifest.json"), "{error}"),
    }
}

fn assert_tiled(manifest: &Manifest) {
    assert!(manifest.world_size >= 1 && manifest.files.len() == manifest.world_size);
    let mut tensors: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let mut files = vec![Vec::new(); manifest.files.len()];
    for chunk in &manifest.chunks {
        let end = chunk.offset_bytes.checked_add(4 * chunk.len as u64).expect("an end");
        assert!(chunk.len > 0 && end <= manifest.files[chunk.file].len_bytes, "{chunk:?}");
        tensors.entry((chunk.state, &chunk.name)).or_default().push(chunk);
        files[chunk.file].push((chunk.offset_bytes, end));
    }
    for ((state, name), mut chunks) in tensors {
        chunks.sort_by_key(|chunk| chunk.start);
        let mut end = 0;
        for chunk in &chunks {
            assert!(chunk.start == end && chunk.shape == chunks[0].shape, "{state:?} {name}: {chunks:?}");
            end += chunk.len;
        }
        assert_eq!(chunks[0].shape.iter().product::<usize>(), end, "{state:?} {name}: {chunks:?}");
    }
    for mut pieces in files {
        pieces.sort();
        assert!(pieces.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{pieces:?} overlap");
    }
}

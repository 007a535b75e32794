//! In what two resolved configs differ.

/// (Table and key, first value, second value) of every key that differs, in the order of the first.
pub fn differences(first: &str, second: &str) -> Vec<(String, String, String)> {
    let (first, second) = (entries(first), entries(second));
    let value_of = |entries: &[(String, String)], key: &str| {
        entries.iter().find(|(name, _)| name == key).map_or("nothing".to_owned(), |(_, value)| value.clone())
    };
    let only_second = second.iter().filter(|(key, _)| first.iter().all(|(name, _)| name != key));
    let keys = first.iter().chain(only_second).map(|(key, _)| key);
    let both = keys.map(|key| (key.clone(), value_of(&first, key), value_of(&second, key)));
    both.filter(|(_, first, second)| first != second).collect()
}

/// The entries of a resolved config, which has one a line.
fn entries(config: &str) -> Vec<(String, String)> {
    let mut table = "";
    let mut entries = Vec::new();
    for line in config.lines() {
        match line.split_once(" = ") {
            Some((key, value)) => entries.push((format!("{table} {key}"), value.to_owned())),
            None if line.starts_with('[') => table = line,
            None => {}
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use fsdp_config::JobConfig;

    use super::*;

    const CONFIG: &str = "[model]\npath = \"m\"\n[optimizer]\nlr = 1e-3\n[training]\nsteps = 1\nseq_len = 8\nseed = 1\n\
                          [data]\ntrain = [\"a = b\"]\n";

    fn resolved(from: &str, to: &str) -> String {
        JobConfig::parse("job", &CONFIG.replace(from, to)).unwrap().to_toml()
    }

    #[test]
    fn each_key_is_named_with_both_values() {
        let config = resolved("", "");
        assert_eq!(differences(&config, &config), []);
        let triple = |key: &str, first: &str, second: &str| (key.to_owned(), first.to_owned(), second.to_owned());
        for (to, expected) in [
            ("steps = 1\nmicro_batch_size = 2", vec![triple("[training] micro_batch_size", "1", "2")]),
            (
                "epochs = 1",
                vec![triple("[training] steps", "1", "nothing"), triple("[training] epochs", "nothing", "1")],
            ),
        ] {
            assert_eq!(differences(&config, &resolved("steps = 1", to)), expected);
        }
        let other = resolved("a = b", "a = c");
        assert_eq!(differences(&config, &other), [triple("[data] train", "[\"a = b\"]", "[\"a = c\"]")]);
    }
}

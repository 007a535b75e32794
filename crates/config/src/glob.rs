//! The patterns of `[[precision.override]]`.

/// Whether `pattern` matches the whole of `name`; `*` stands for any run of characters (dots too), `?` for one.
///
/// Takes time in proportion to the product of both lengths at most, so a hostile pattern cannot stall a run.
pub fn glob_match(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    let (mut p, mut n) = (0, 0);
    // Where to go on after a mismatch: behind the last star, which then swallows one more character.
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                p += 1;
                retry = Some((p, n));
            }
            Some(&c) if c == '?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match retry {
                Some((after_star, start)) => {
                    p = after_star;
                    n = start + 1;
                    retry = Some((after_star, n));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::glob_match;

    #[test]
    fn patterns_match_whole_names() {
        let norm = "model.layers.11.input_layernorm.weight";
        for (pattern, name, expected) in [
            ("*norm*", norm, true),
            ("*norm", norm, false),
            ("*", norm, true),
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("model.layers.?.*", norm, false),
            ("model.layers.??.*", norm, true),
            ("*.weight", norm, true),
            ("*.bias", norm, false),
            ("model.layers.11.input_layernorm.weight", norm, true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b-d", false),
            ("**a", "bba", true),
            ("?", "é", true),
            ("?", "", false),
        ] {
            assert_eq!(glob_match(pattern, name), expected, "{pattern} on {name}");
        }
    }

    #[test]
    fn many_stars_do_not_blow_up() {
        let pattern = "a*".repeat(200) + "b";
        assert!(!glob_match(&pattern, &"a".repeat(2000)));
    }
}

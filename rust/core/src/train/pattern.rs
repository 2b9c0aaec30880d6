//! Patterns on parameter names, as in a shell: `*` is any text, `?` any one character.

/// Whether `name` matches `pattern` from end to end.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // The last star and where its text ends so far: only that one ever has to grow.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, end)) => {
                    star = Some((at, end + 1));
                    (p, n) = (at + 1, end + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

/// Whether one of the patterns matches.
pub(super) fn any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn stars_take_any_text_and_question_marks_one_character() {
        for (pattern, name) in [
            ("*", ""),
            ("*", "a.b"),
            ("*.bias", "encoder.layers.0.feed_forward.up.bias"),
            ("*norm.weight", "encoder.norm.weight"),
            ("*norm.weight", "decoder.layers.1.cross_attention_norm.weight"),
            ("encoder.*.weight", "encoder.layers.3.weight"),
            ("a*b*c", "abbcbc"),
            ("layer?", "layer1"),
            ("**é", "né"),
            ("", ""),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in
            [("*.bias", "bias"), ("*.bias", "a.bias.b"), ("layer?", "layer10"), ("a*b", "ac"), ("", "a"), ("a", "")]
        {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn many_stars_stay_fast() {
        assert!(!matches(&"*a".repeat(40), &"a".repeat(39)));
        assert!(!matches(&format!("{}b", "a*".repeat(200)), &"a".repeat(2000)));
    }
}
